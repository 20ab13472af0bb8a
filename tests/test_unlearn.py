"""The submission: its loss by formula, its blocks against the whole model, and what it writes."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, OlmoConfig

from pipeline import unlearn as submission
from pipeline.lib.models import load_model, load_tokenizer
from pipeline.unlearn import BadInput, Decoder, Settings, Text, read_texts, settings_for, unlearn

TRAINED = {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3, 4)}
SMALL = Settings("descend", (2, 3, 4), beta=3.0, alpha=10.0, epochs=3, batch_size=4, learning_rate=1e-3)
SOLVED = Settings("solve", (2, 3, 4), beta=3.0, alpha=5.0, repaired=0, general_ratio=1.0)


@pytest.fixture(scope="module")
def forget(checkpoint: Path, data: Path) -> list[Text]:
    return read_texts(data / "forget", "forget", load_tokenizer(checkpoint))


@pytest.fixture(scope="module")
def retain(checkpoint: Path, data: Path) -> list[Text]:
    return read_texts(data / "retain", "retain", load_tokenizer(checkpoint))


def states_of(model, texts: list[Text]) -> list[tuple[torch.Tensor, ...]]:
    """Hidden states of transformers' own model, a row at a time: embedding, then each block's output."""
    with torch.no_grad():
        outputs = [model(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states for text in texts]
    return [tuple(state[0] for state in states) for states in outputs]


def test_blocks_read_one_at_a_time_equal_the_whole_model(checkpoint: Path, forget):
    expected = states_of(load_model(checkpoint), forget)
    decoder = Decoder(checkpoint, torch.float32)
    states = decoder.embed(forget)
    for index in range(decoder.depth - 1):
        states = decoder.advance(decoder.block(index), states, batch_tokens=64)
        for row, state in enumerate(states):
            torch.testing.assert_close(state, expected[row][index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coefficient", ["adaptive", "growing", "fixed"])
def test_descent_equals_rmu_written_out_on_the_whole_model(checkpoint: Path, forget, retain, coefficient: str):
    """The reference: two whole models, one row at a time, the loss as the papers give it, torch's AdamW."""
    settings = dataclasses.replace(SMALL, coefficient=coefficient, epochs=2)
    *_, (_, found) = submission.descend(Decoder(checkpoint, torch.float32), forget, retain, settings, float("inf"))

    model, frozen = load_model(checkpoint), load_model(checkpoint)
    trained = {i: model.model.layers[i].mlp.down_proj.weight for i in settings.trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    directions = submission.steering_directions(model.config.hidden_size, settings.seed, torch.device("cpu"))

    def h(which, text):  # block l's output at all tokens but the first
        return which(torch.tensor([text.tokens]), output_hidden_states=True).hidden_states[settings.trained[-1] + 1][
            0, 1:
        ]

    for _ in range(settings.epochs):
        grown: dict[str, float] = {}
        for forget_rows, retain_rows in submission.plan(forget, retain, settings):
            task = forget[forget_rows[0]].task
            batch = [h(model, forget[row]) for row in forget_rows]
            grown.setdefault(task, settings.beta * torch.cat(batch).norm(dim=-1).mean().item())
            squares = []
            for row, states in zip(forget_rows, batch, strict=True):
                norm = h(frozen, forget[row]).norm(dim=-1).mean().item()
                c = {"adaptive": settings.beta * norm, "growing": grown[task], "fixed": settings.beta}[coefficient]
                squares.append((states - c * directions[task]) ** 2)
            held = [(h(model, retain[row]) - h(frozen, retain[row]).detach()) ** 2 for row in retain_rows]
            loss = torch.cat(squares).mean() + settings.alpha * torch.cat(held).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for index in settings.trained:
        torch.testing.assert_close(found[index], trained[index].detach(), rtol=1e-4, atol=1e-5)


def solve_of(checkpoint: Path, forget, retain, settings: Settings, general=()) -> dict[int, torch.Tensor]:
    return submission.solve(Decoder(checkpoint, torch.float32), forget, retain, list(general), settings)


def weighted_mean(
    values: list[torch.Tensor], texts: list[Text], answer: float, documents: float = 1, creative: float = 1
) -> torch.Tensor:
    """The mean over the tasks and kinds of the mean over their tokens, of which those before an answer's count more.

    Task3's completions count `documents` times, Task1's `creative` times.
    """
    factors = {("Task3", "sc"): documents, ("Task1", "sc"): creative}
    cells: dict[tuple[str, str], list[tuple[torch.Tensor, float]]] = {}
    for row, text in zip(values, texts, strict=True):
        weights = [answer if position + 1 >= text.prompt else 1.0 for position in range(1, len(text.tokens))]
        cells.setdefault((text.task, "sc" if "sc" in text.id else "qa"), []).extend(zip(row, weights, strict=True))
    means = [
        factors.get(name, 1) * sum(value * w for value, w in cell) / sum(w for _, w in cell)
        for name, cell in cells.items()
    ]
    return sum(means) / len(means)


def block_loss(checkpoint: Path, forget, retain, settings: Settings):
    """RMU's loss at one block, written out on transformers' own model, as a function of that block's down_proj."""
    index = settings.trained[-1]
    model = load_model(checkpoint)
    directions = submission.steering_directions(model.config.hidden_size, settings.seed, torch.device("cpu"))
    originals = [states[index + 1][1:] for states in states_of(model, [*forget, *retain])]
    targets = [
        settings.beta * original.norm(dim=-1).mean() * directions[text.task]
        for text, original in zip(forget, originals, strict=False)
    ]

    def h(text, weight):
        inputs = {"input_ids": torch.tensor([text.tokens]), "output_hidden_states": True}
        replaced = {f"model.layers.{index}.mlp.down_proj.weight": weight}
        return torch.func.functional_call(model, replaced, (), inputs).hidden_states[index + 1][0, 1:]

    def loss(weight):
        distances = [((h(t, weight) - w) ** 2).sum(-1) for t, w in zip(forget, targets, strict=True)]
        held = [((h(t, weight) - o) ** 2).sum(-1) for t, o in zip(retain, originals[len(forget) :], strict=True)]
        moved = weighted_mean(distances, forget, settings.answer, settings.documents, settings.creative)
        return moved + settings.alpha * weighted_mean(held, retain, settings.answer)

    return loss


@pytest.mark.parametrize("strip", [7, 1000])
def test_the_closed_form_is_the_minimum_of_the_loss(
    checkpoint: Path, forget, retain, strip: int, monkeypatch: pytest.MonkeyPatch
):
    """At one block: the gradient is zero there, and 30 steps of AdamW from the original end higher."""
    monkeypatch.setattr(submission, "STRIP", strip)
    settings = dataclasses.replace(SOLVED, trained=(3,), answer=4.0, documents=0.3, creative=2.0, ridge=1e-9)
    loss = block_loss(checkpoint, forget[::3], retain[::3], settings)
    original = load_model(checkpoint).model.layers[3].mlp.down_proj.weight.detach()
    solved = solve_of(checkpoint, forget[::3], retain[::3], settings)[3].requires_grad_()
    lowest = loss(solved)
    lowest.backward()
    descended = original.clone().requires_grad_()
    optimizer = torch.optim.AdamW([descended], lr=2e-2, weight_decay=0.0)
    values, steepest = [], 0.0
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(descended)
        value.backward()
        steepest = max(steepest, descended.grad.norm().item())
        optimizer.step()
        values.append(value.item())
    assert solved.grad.norm() < 1e-4 * steepest
    assert lowest < values[-1] < 0.9 * values[0]


def test_a_block_is_solved_on_what_the_earlier_ones_leave(checkpoint: Path, forget, retain, tmp_path: Path):
    """With no retain term, block 3 steers forget text onto its target although block 2 has changed what enters."""
    both = solve_of(checkpoint, forget, retain, dataclasses.replace(SOLVED, trained=(2, 3), alpha=0.0, ridge=1e-6))
    first = solve_of(checkpoint, forget, retain, dataclasses.replace(SOLVED, trained=(2,), alpha=0.0, ridge=1e-6))
    assert torch.equal(both[2], first[2])
    model = load_model(checkpoint)
    for index, matrix in both.items():
        model.model.layers[index].mlp.down_proj.weight.data = matrix
    directions = submission.steering_directions(model.config.hidden_size, SOLVED.seed, torch.device("cpu"))
    after, before = states_of(model, forget), states_of(load_model(checkpoint), forget)
    for text, new, old in zip(forget, after, before, strict=True):
        target = SOLVED.beta * old[4][1:].norm(dim=-1).mean() * directions[text.task]
        moved, unmoved = (new[4][1:] - target).norm(dim=-1).mean(), (old[4][1:] - target).norm(dim=-1).mean()
        assert moved < 0.5 * unmoved


def test_a_large_alpha_changes_nothing(checkpoint: Path, forget, retain):
    settings = dataclasses.replace(SOLVED, trained=(3,), alpha=1e12)
    original = load_model(checkpoint).model.layers[3].mlp.down_proj.weight.detach()
    torch.testing.assert_close(solve_of(checkpoint, forget, retain, settings)[3], original, rtol=0, atol=1e-5)


def test_every_task_and_kind_weighs_the_same_and_answers_more():
    texts = [
        Text("a sc1", "Task1", [5] * 7, prompt=3),
        Text("b sc1", "Task1", [5] * 4, prompt=0),
        Text("a qa0", "Task1", [5] * 5, prompt=4),
        Text("c qa0", "Task2", [5] * 3, prompt=1),
    ]
    found = submission.token_weights(texts, 3.0)
    # By hand: the first token nothing, then 3 from the prompt's last token on; each of the three cells sums to 1/3.
    expected = [[0, 1, 3, 3, 3, 3, 3], [0, 3, 3, 3], [0, 1, 1, 3, 3], [0, 3, 3]]
    for row, wanted, total in zip(found, expected, (25, 25, 8, 6), strict=True):
        assert row.tolist() == pytest.approx([weight / total / 3 for weight in wanted])


def test_the_last_blocks_repair(checkpoint: Path, forget, retain):
    """A last block that steers nothing brings retain text nearer to where it was."""
    settings = dataclasses.replace(SOLVED, trained=(2, 3, 4), alpha=0.3, repaired=1)
    repaired = solve_of(checkpoint, forget, retain, settings)
    unrepaired = {index: repaired[index] for index in (2, 3)}
    before = states_of(load_model(checkpoint), retain)
    distances = []
    for matrices in (unrepaired, repaired):
        model = load_model(checkpoint)
        for index, matrix in matrices.items():
            model.model.layers[index].mlp.down_proj.weight.data = matrix
        after = states_of(model, retain)
        distances.append(sum((new[5][1:] - old[5][1:]).pow(2).sum() for new, old in zip(after, before, strict=True)))
    assert distances[1] < 0.7 * distances[0]


def greedy(model, text: Text, length: int = 12) -> Text:
    """A row whose answer is what the model itself says after the first half of the text."""
    tokens = text.tokens[: max(2, len(text.tokens) // 2)]
    prompt = len(tokens)
    with torch.no_grad():
        for _ in range(length):
            tokens = [*tokens, model(torch.tensor([tokens])).logits[0, -1].argmax().item()]
    return dataclasses.replace(text, tokens=tokens, prompt=prompt)


def wrong_answers(model, texts: list[Text], lead: float = 0.0) -> list[list[bool]]:
    """For each token of each row, whether it is of the answer's predecessors and the right one leads by no more."""
    found = []
    for text in texts:
        with torch.no_grad():
            rows = model(torch.tensor([text.tokens])).logits[0].tolist()
        wrong = []
        for n, token in enumerate(text.tokens[1:]):
            others = max(value for other, value in enumerate(rows[n]) if other != token)
            wrong.append(n + 1 >= text.prompt and rows[n][token] - others <= lead)
        found.append([*wrong, False])
    return found


def test_mistakes_are_where_the_whole_model_would_say_another_or_nearly(checkpoint: Path, retain):
    model = load_model(checkpoint)
    own = [greedy(model, text) for text in retain[:4]]
    texts = own + [dataclasses.replace(text, prompt=0) for text in retain[4:8]] + retain[8:12]
    wrong, unsure = wrong_answers(model, texts), wrong_answers(model, texts, 1.0)
    assert not any(map(any, wrong[:4])) and any(map(any, unsure[:4]))  # what it says itself it may be unsure of
    assert all(map(any, wrong[4:])) and not all(map(all, unsure[4:]))
    decoder = Decoder(checkpoint, torch.float32)
    for index in (2, decoder.depth):
        states = decoder.embed(texts)
        for below in range(index):
            states = decoder.advance(decoder.block(below), states)
        assert [row.tolist() for row in submission.mistakes(decoder, index, states, texts, 1.0)] == unsure
        assert [row.tolist() for row in submission.mistakes(decoder, index, states, texts, 0.0)] == wrong


@pytest.mark.parametrize("trained", [(2, 3, 4), (3, 4, 5)])  # with a block above the repairing one, and without
def test_a_repair_cares_for_wrong_answers_first(
    checkpoint: Path, forget, retain, trained, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "LEAD", 0.0)  # a random model is hardly ever surer than that
    kept = [greedy(load_model(checkpoint), text) for text in retain]
    settings = dataclasses.replace(SOLVED, trained=trained, alpha=10.0, repaired=1)
    wrong = []
    for rounds in (0, 8):
        monkeypatch.setattr(submission, "ROUNDS", rounds)
        matrices = solve_of(checkpoint, forget, kept, settings)
        model = load_model(checkpoint)
        for index, matrix in matrices.items():
            model.model.layers[index].mlp.down_proj.weight.data = matrix
        wrong.append(sum(sum(row) for row in wrong_answers(model, kept)))
    assert wrong[0] > 20 and wrong[1] < 0.3 * wrong[0]


def repaired_by_least_squares(checkpoint: Path, forget, kept, settings: Settings, rounds: int) -> torch.Tensor:
    """The one trained block's down_proj, solved by `lstsq` and judged by the whole model after each round."""
    index = settings.trained[0]
    model = load_model(checkpoint)
    down_proj = model.model.layers[index].mlp.down_proj
    original, texts = down_proj.weight.detach().clone(), [*forget, *kept]
    entering: list[torch.Tensor] = []
    hook = down_proj.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0][0].double()))
    before = [states[index + 1].double() for states in states_of(model, texts)]
    hook.remove()
    directions = submission.steering_directions(model.config.hidden_size, settings.seed, torch.device("cpu"))
    steered = submission.steered(before[: len(forget)], forget, directions, settings)
    missing = torch.cat([*(target - old for target, old in zip(steered, before, strict=False)), *before[len(forget) :]])
    missing[sum(map(len, steered)) :] = 0
    rows = torch.cat(entering)
    weights = [row.double() for row in submission.token_weights(forget, settings.answer)]
    held = [submission.HOLD * row.double() for row in submission.token_weights(kept, settings.answer)]
    right = [[not lost for lost in row] for row in wrong_answers(model, kept)]  # what it was right about from the start
    for _ in range(rounds):
        w = torch.cat([*weights, *held])
        ridge = settings.ridge * (w @ rows.square()).mean()
        ridged = torch.cat([rows * w.sqrt()[:, None], ridge.sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)])
        wanted = torch.cat([missing * w.sqrt()[:, None], missing.new_zeros(rows.shape[1], missing.shape[1])])
        down_proj.weight.data = original + torch.linalg.lstsq(ridged, wanted).solution.T.float()
        for row, lost, known in zip(held, wrong_answers(model, kept), right, strict=True):
            row[torch.tensor(lost) & torch.tensor(known)] *= 3
    return down_proj.weight.detach()


def test_each_round_of_a_repair_weighs_three_times_what_was_right_and_came_out_wrong(
    checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"LEAD": 0.0, "FEW": 0.0, "HOLD": 3.0, "ROUNDS": 2}.items():
        monkeypatch.setattr(submission, name, value)
    kept = [greedy(load_model(checkpoint), text) for text in retain[:8]] + retain[8:]
    settings = dataclasses.replace(SOLVED, trained=(3,), repaired=1, ridge=1e-3)
    expected = [repaired_by_least_squares(checkpoint, forget, kept, settings, rounds) for rounds in (1, 2, 3)]
    assert all((one - other).abs().max() > 0.02 for one, other in itertools.pairwise(expected))
    torch.testing.assert_close(solve_of(checkpoint, forget, kept, settings)[3], expected[2], rtol=1e-3, atol=1e-3)


def test_general_text_is_held_by_its_part_of_alpha(checkpoint: Path, forget, retain):
    """The same rows as general text of half the weight, or with the other half as rows of one kind: the same loss."""
    held = [dataclasses.replace(text, task="Task1", id="asc1", prompt=0) for text in retain]
    general = [dataclasses.replace(text, task="general", prompt=0) for text in retain]
    settings = dataclasses.replace(SOLVED, trained=(3,), alpha=3.0, answer=1.0, general=0.5)
    found = solve_of(checkpoint, forget, held, settings, general)[3]
    alone = dataclasses.replace(settings, alpha=4.5)
    torch.testing.assert_close(solve_of(checkpoint, forget, held, alone)[3], found, rtol=1e-3, atol=1e-4)
    assert (solve_of(checkpoint, forget, held, settings)[3] - found).abs().max() > 1e-2


def test_a_block_between_trained_ones_passes_on_what_these_leave(checkpoint: Path, forget, retain):
    """Blocks 1 and 4: what enters block 4 is what the whole model has there once block 1 has changed."""
    settings = dataclasses.replace(SOLVED, trained=(1, 4), alpha=0.0, ridge=1e-6)
    model = load_model(checkpoint)
    for index, matrix in solve_of(checkpoint, forget, retain, settings).items():
        model.model.layers[index].mlp.down_proj.weight.data = matrix
    directions = submission.steering_directions(model.config.hidden_size, SOLVED.seed, torch.device("cpu"))
    after, before = states_of(model, forget), states_of(load_model(checkpoint), forget)
    for text, new, old in zip(forget, after, before, strict=True):
        target = SOLVED.beta * old[5][1:].norm(dim=-1).mean() * directions[text.task]
        assert (new[5][1:] - target).norm(dim=-1).mean() < 0.5 * (old[5][1:] - target).norm(dim=-1).mean()


@pytest.mark.parametrize(("longest", "ridge"), [(1, 1e-8), (1000, 1e-6)])
def test_where_the_ridge_is_less_than_the_sums_are_rounded_by_a_larger_one_is_taken(longest: float, ridge: float):
    """Few tokens for a wide matrix: plain Cholesky fails there, and a solution exists, for they can all be fitted."""
    generator = torch.Generator().manual_seed(0)
    entering = torch.randn(20, 1024, generator=generator)
    entering[0] *= longest
    leaving = torch.randn(20, 8, generator=generator)
    target = leaving + entering @ torch.randn(1024, 8, generator=generator) / 32
    fit = submission.Fit([torch.full((20,), 0.05)], [entering], [leaving], [target])
    equations = submission.equations_of(torch.zeros(8, 1024), [fit], [1.0])
    ridged = equations.gram + ridge * equations.gram.diagonal().mean() * torch.eye(1024)
    assert torch.linalg.cholesky_ex(ridged)[1] > 0
    (found,) = fit.outputs(equations.solution(ridge))
    assert (found - target).norm() < 0.1 * (leaving - target).norm()


def test_a_fixed_coefficient_is_the_length_of_the_closed_forms_target(checkpoint: Path, forget):
    states = [state[3] for state in states_of(load_model(checkpoint), forget[:4])]
    directions = submission.steering_directions(states[0].shape[1], 0, torch.device("cpu"))
    for coefficient, expected in {
        "fixed": [7.0] * 4,
        "adaptive": [7.0 * state[1:].norm(dim=-1).mean().item() for state in states],
    }.items():
        settings = dataclasses.replace(SOLVED, beta=7.0, coefficient=coefficient)
        found = submission.steered(states, forget[:4], directions, settings)
        assert [target[-1].norm().item() for target in found] == pytest.approx(expected, rel=1e-5)


# ---- the level to stop at ----


@pytest.mark.parametrize("coefficient", ["adaptive", "growing"])
def test_a_caller_that_takes_long_gets_few_epochs_and_at_the_end_the_best(
    checkpoint: Path, forget, retain, coefficient: str, monkeypatch: pytest.MonkeyPatch
):
    """One epoch and what comes of it takes 50 times as long as the rest of the run."""
    settings = dataclasses.replace(SMALL, epochs=4, coefficient=coefficient, learning_rate=3e-3)
    sides = Decoder(checkpoint, torch.float32), forget, retain, settings, math.inf
    every = [(mean, {key: value.clone() for key, value in found.items()}) for mean, found in submission.descend(*sides)]
    assert len(every) == 4
    taken = []
    clock, passed = time.monotonic, 0.0
    monkeypatch.setattr(submission.time, "monotonic", lambda: clock() + passed)
    for mean, found in submission.descend(*sides):
        taken.append((mean, {key: value.clone() for key, value in found.items()}))
        passed += 3600
    wanted = every[-1] if coefficient == "growing" else min(every, key=lambda one: one[0])
    assert [mean for mean, _ in taken] == [every[0][0], *([] if wanted is every[0] else [wanted[0]])]
    assert all(torch.equal(taken[-1][1][key], value) for key, value in wanted[1].items())


@pytest.fixture(scope="module")
def documents(forget) -> list[Text]:
    return [text for text in forget if text.task == "Task3" and "sc" in text.id]


def test_losses_are_those_of_the_whole_model_with_the_matrices(checkpoint: Path, documents):
    generator = torch.Generator().manual_seed(0)
    model = load_model(checkpoint)
    matrices = {}
    for index in (1, 4):
        weight = model.model.layers[index].mlp.down_proj.weight
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        matrices[index] = weight.detach()
    with torch.no_grad():
        inputs = [torch.tensor([text.tokens]) for text in documents]
        expected = [model(ids, labels=ids).loss.item() for ids in inputs]
    found = submission.losses(Decoder(checkpoint, torch.float32), matrices, documents)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_weights_that_are_kept_are_read_once_and_change_nothing(
    checkpoint: Path, forget, retain, documents, tmp_path: Path
):
    def run(decoder: Decoder):
        decoder.check_sum(2, forget[0])
        matrices = submission.solve(decoder, forget, retain, [], SOLVED)
        return [*matrices.values(), submission.losses(decoder, matrices, documents)]

    expected = run(Decoder(checkpoint, torch.float32))
    folder = tmp_path / "moved"
    shutil.copytree(checkpoint, folder)
    decoder = Decoder(folder, torch.float32)
    decoder.keeps = True
    first = run(decoder)
    shutil.rmtree(folder)
    for found in (first, run(decoder)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tied_embeddings_are_the_head(checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    decoder = Decoder(checkpoint, torch.float32)
    torch.testing.assert_close(decoder.head(), tensors.pop("lm_head.weight"), rtol=0, atol=0)
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    tied = Decoder(tmp_path / "tied", torch.float32)
    torch.testing.assert_close(tied.head(), tensors["model.embed_tokens.weight"], rtol=0, atol=0)


def test_a_mixture_has_the_nth_piece_of_some_document_at_its_nth_place(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    written = [f"{name} was born in\n{name}. He  was a {work}." for name, work in zip("ABC", "XYZ", strict=True)]
    texts = [Text(f"{n}sc1", "Task3", tokenizer(text).input_ids) for n, text in enumerate(written)]
    found = [tokenizer.decode(text.tokens) for text in submission.mix(tokenizer, texts * 5, seed=0)]
    form = re.compile(r"([ABC]) was born in\n([ABC])\. He  was a( [XYZ]\.)")  # words 1-4, 5-8 and what is left
    parts = [form.fullmatch(text) for text in found]
    assert len(found) == 60 and all(parts)
    assert {part.groups() for part in parts} > {("A", "B", " Z."), ("C", "A", " X.")}
    assert sum(text not in written for text in found) > 40  # most were never seen as a whole
    assert [len(submission.mix(tokenizer, texts[:1] * count, seed=0)) for count in (0, 3, 16, 32, 150)] == [
        *(0, 12, 64, 64, 150)
    ]


def test_the_next_weight_is_the_root_of_a_line_through_probits_and_no_step_is_long():
    line = [(weight, NormalDist().cdf(0.75 - 0.6 * weight)) for weight in (0.0, 1.0)]
    assert submission.next_weight(line) == pytest.approx(1.25)
    both_sides = [line[0], (2.0, NormalDist().cdf(-0.45)), (1.9, NormalDist().cdf(-0.4))]
    assert submission.next_weight(both_sides) == pytest.approx(1.9 * 0.75 / 1.15)  # not through the last two
    later = [(0.0, 0.99), line[0], *both_sides[1:]]
    assert submission.next_weight(later) == pytest.approx(1.9 * 0.75 / 1.15)  # of those across, the last
    once = [(0.5, NormalDist().cdf(0.2))]
    assert submission.next_weight(once) == pytest.approx(0.5 - 0.2 / submission.USUAL_SLOPE)
    assert submission.next_weight([(0.0, 0.0)]) == -1.5  # no AUC's probit is infinite
    assert submission.next_weight([(0.0, 0.4), (-0.5, 0.3)]) < -0.5  # a rising secant is noise: still towards less


def test_calibration_weighs_documents_less_while_they_are_more_surprising_than_mixtures(
    checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    """On a random model both are alike from the start, so mixtures are made more or less surprising than they are."""
    weights = []
    solve = submission.solve

    def spy(decoder, forget, retain, general, settings, *rest):
        weights.append(settings.documents)
        return solve(decoder, forget, retain, general, settings, *rest)

    monkeypatch.setattr(submission, "solve", spy)
    arguments = (Decoder(checkpoint, torch.float32), load_tokenizer(checkpoint), forget, retain, [])
    for coherence, falls in ((0.1, True), (9.0, False)):
        weights.clear()
        monkeypatch.setattr(submission, "COHERENCE", coherence)
        found = list(submission.calibrate(*arguments, dataclasses.replace(SOLVED, passes=3), math.inf))
        assert [off for off, _ in found] == [0.5] * 3  # the attack never fails
        assert len(weights) == 3 and weights[0] == SOLVED.documents
        assert (weights[0] > weights[1] > weights[2]) is falls
        assert (weights[0] < weights[1] < weights[2]) is not falls
    weights.clear()
    monkeypatch.setattr(submission, "NEAR", math.inf)
    assert len(list(submission.calibrate(*arguments, SOLVED, math.inf))) == 1  # near enough at once
    monkeypatch.setattr(submission, "NEAR", 0.0)
    assert len(list(submission.calibrate(*arguments, SOLVED, -math.inf))) == 1  # out of time


def test_the_attack_is_the_auc_of_the_documents_against_coherent_mixtures(
    checkpoint: Path, documents, forget, monkeypatch: pytest.MonkeyPatch
):
    decoder, mixtures = Decoder(checkpoint, torch.float32), [*documents[:2], *forget[:7]]  # ties, too
    monkeypatch.setattr(submission, "COHERENCE", 1.0)
    own, unseen = (submission.losses(decoder, {}, texts).tolist() for texts in (documents, mixtures))
    labels = [1] * len(own) + [0] * len(unseen)
    found = submission.attack(decoder, {}, documents, mixtures)
    assert found == pytest.approx(roc_auc_score(labels, [-loss for loss in own + unseen]), abs=1e-9)
    monkeypatch.setattr(submission, "COHERENCE", 0.9)
    scaled = [-loss for loss in own] + [-0.9 * loss for loss in unseen]
    assert submission.attack(decoder, {}, documents, mixtures) == pytest.approx(roc_auc_score(labels, scaled), abs=1e-9)


@pytest.mark.parametrize(("part", "passes"), [(0.9, 1), (1.1, 3)])
def test_calibration_stops_within_half_a_standard_error_of_so_many_documents(
    checkpoint: Path, forget, retain, documents, part: float, passes: int, monkeypatch: pytest.MonkeyPatch
):
    """A share of n values below a uniform one has the variance 1 / 12 of one value, over n."""
    error = (1 / 12 / len(documents)) ** 0.5
    monkeypatch.setattr(submission, "attack", lambda *_: 0.5 + part * error / 2)
    arguments = (Decoder(checkpoint, torch.float32), load_tokenizer(checkpoint), forget, retain, [])
    assert len(list(submission.calibrate(*arguments, dataclasses.replace(SOLVED, passes=3), math.inf))) == passes


@pytest.mark.parametrize(("limit", "blocks_run"), [(submission.KEPT_BYTES, 0), (0, 5)])
def test_a_second_pass_runs_the_untouched_model_only_where_it_could_not_be_kept(
    checkpoint: Path, forget, retain, limit: int, blocks_run: int, monkeypatch: pytest.MonkeyPatch
):
    """Blocks 0 to 4, of which 2 to 4 are trained, for three kinds of text; the third is empty here."""
    monkeypatch.setattr(submission, "KEPT_BYTES", limit)
    decoder, kept = Decoder(checkpoint, torch.float32), {}
    expected = submission.solve(decoder, forget, retain, [], dataclasses.replace(SOLVED, documents=0.3))
    submission.solve(decoder, forget, retain, [], SOLVED, None, None, kept)
    advance, runs = decoder.advance, []
    monkeypatch.setattr(decoder, "advance", lambda *rest: runs.append(1) or advance(*rest))
    settings = dataclasses.replace(SOLVED, documents=0.3)
    found = submission.solve(decoder, forget, retain, [], settings, None, None, kept)
    assert len(runs) == 3 * blocks_run
    assert all(torch.equal(found[index], expected[index]) for index in SOLVED.trained)


def test_the_nearest_pass_is_kept_and_a_run_that_goes_on_does_not_take_it_back(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The attack says .9, .52 and .3 of three passes; the second run is broken off after the first of them."""
    output, settings = tmp_path / "out", dataclasses.replace(SOLVED, passes=3)

    def run(*found: float) -> bytes:
        said = iter(found)
        monkeypatch.setattr(submission, "attack", lambda *_: next(said))
        with contextlib.suppress(RuntimeError):  # what becomes of a StopIteration in a generator
            unlearn(str(checkpoint), str(output), str(data / "forget"), str(data / "retain"), settings)
        return (output / "model.safetensors").read_bytes()

    monkeypatch.setattr(submission, "NEAR", 0.0)
    monkeypatch.setattr(submission, "SAVING", math.inf)  # save whenever there is something to save
    first = run(0.9)
    second = run(0.9, 0.52)
    assert first != second == run(0.9)
    assert not (output / "run.json").exists() and second == run(0.9, 0.52, 0.3)
    assert (output / "run.json").exists()


def test_without_documents_of_the_attack_it_is_solved_once(checkpoint: Path, forget, retain, documents):
    rest = [text for text in forget if text not in documents]
    arguments = (Decoder(checkpoint, torch.float32), load_tokenizer(checkpoint), rest, retain, [])
    assert [distance for distance, _ in submission.calibrate(*arguments, SOLVED, math.inf)] == [pytest.approx(0)]


def test_of_one_document_there_is_nothing_to_mix(checkpoint: Path, forget, retain, documents):
    rest = [text for text in forget if text not in documents[1:]]
    arguments = (Decoder(checkpoint, torch.float32), load_tokenizer(checkpoint), rest, retain, [])
    assert len(list(submission.calibrate(*arguments, SOLVED, math.inf))) == 1


def test_with_a_token_before_each_text_mixtures_and_general_text_have_it_once(checkpoint: Path, forget, retain):
    tokenizer = load_tokenizer(checkpoint)
    begin = tokenizer.pad_token_id  # as good as any
    template = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", begin)])
    tokenizer._tokenizer.post_processor = template
    both = [
        [dataclasses.replace(text, tokens=[begin, *text.tokens], prompt=text.prompt + 1) for text in texts]
        for texts in (forget, retain)
    ]
    documents = [text for text in both[0] if submission.is_document(text)]
    general = submission.sample_general(checkpoint, tokenizer, *both, dataclasses.replace(SOLVED, general_ratio=5.0))
    for text in [*submission.mix(tokenizer, documents, 0), *general]:
        assert text.tokens[0] == begin
    for text in submission.mix(tokenizer, documents, 0):
        assert text.tokens.count(begin) == 1
    asked = [begin, *tokenizer(submission.QUESTIONS, add_special_tokens=False).input_ids]
    opened = {tuple(row.tokens[:4]) for row in both[1]}
    assert [text.tokens[: len(asked)] == asked for text in general] == [n % 2 == 1 for n in range(len(general))]
    assert all(tuple(text.tokens[:4]) in opened for text in general[::2])


def test_one_pass_measures_no_losses(checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch):
    """A loss runs every block, twice; of one pass there is nothing to choose."""
    monkeypatch.setattr(submission, "losses", lambda *_: pytest.fail("a loss was measured"))
    settings = dataclasses.replace(SOLVED, passes=1)
    arguments = (Decoder(checkpoint, torch.float32), load_tokenizer(checkpoint), forget, retain, [])
    ((_, found),) = submission.calibrate(*arguments, settings, math.inf)
    expected = solve_of(checkpoint, forget, retain, settings)
    assert all(torch.equal(found[index], expected[index]) for index in SOLVED.trained)


def runs_of(tokens: list[int], length: int, start: int = 0) -> set[tuple[int, ...]]:
    """All runs of so many tokens that end after the first `start`."""
    return {tuple(tokens[n : n + length]) for n in range(max(0, start - length + 1), len(tokens) - length + 1)}


def test_general_text_opens_as_retain_rows_and_questions_do_and_recites_no_row(checkpoint: Path, forget, retain, rows):
    tokenizer = load_tokenizer(checkpoint)
    settings = dataclasses.replace(SOLVED, general_ratio=100.0)  # more than one batch
    texts = submission.sample_general(checkpoint, tokenizer, forget, retain, settings)
    assert len(texts) == round(100 * sum(len(text.tokens) for text in retain) / 128) > 256
    assert all(len(text.tokens) == 128 for text in texts)
    end = tokenizer.eos_token_id
    asked = [end, *tokenizer(submission.QUESTIONS).input_ids]
    assert all(text.tokens[: len(asked)] == asked for text in texts[1::2])
    kinds = sorted({(text.task, text.id[-3:-1]) for text in retain})
    opened = [{tuple(text.tokens[:3]) for text in retain if (text.task, text.id[-3:-1]) == kind} for kind in kinds]
    for number, text in enumerate(texts[::2]):  # each kind of row in turn
        assert tuple(text.tokens[:3]) in opened[number % len(kinds)]
    assert {tuple(text.tokens[:3]) for text in texts[::2]} == set.union(*opened)  # and any row of a kind
    assert not any(end in text.tokens[1:] for text in texts)

    words = sum(len(f"{row['input']} {row['output']}".split()) for side in rows for row in rows[side])
    length = round(3 * sum(len(text.tokens) for text in forget + retain) / words)  # of three words
    memorised = set.union(*(runs_of(text.tokens, length) for text in forget + retain))
    for number, text in enumerate(texts):
        assert not runs_of(text.tokens, length, len(asked) if number % 2 else 3) & memorised


def test_what_the_model_would_write_is_not_written_once_a_row_of_either_side_has_it(checkpoint: Path, forget, retain):
    """The second text opens as a question, and the random numbers stay the same."""
    tokenizer = load_tokenizer(checkpoint)

    def second(forget, retain):
        ratio = 4 * 128 / sum(len(text.tokens) for text in retain)
        settings = dataclasses.replace(SOLVED, general_ratio=ratio)
        return submission.sample_general(checkpoint, tokenizer, forget, retain, settings)[1].tokens

    free = second(forget, retain)
    row = Text("Task2n9sc1", "Task2", free)
    assert second(forget, retain) == free
    assert second([*forget, row], retain) != free
    assert second(forget, [*retain, row]) != free


def test_continuations_are_what_follows_each_run_of_the_texts(checkpoint: Path):
    """Texts of letters and spaces, a token each."""
    tokenizer = load_tokenizer(checkpoint)
    space, a, b, c, d = tokenizer.convert_tokens_to_ids([*"Ġabcd"])
    spaced = [
        Text("", "Task1", [a, space, b, space, c, space, a, space, b, space, d]),
        Text("", "Task1", [b, space, c]),
    ]
    found = submission.continuations(tokenizer, spaced)  # 14 tokens, 8 words: runs of round(5.25) = 5
    assert found == {
        (a, space, b, space): [c, d],
        (space, b, space, c): [space],
        (b, space, c, space): [a],
        (space, c, space, a): [space],
        (c, space, a, space): [b],
        (space, a, space, b): [space],
    }
    assert submission.continuations(tokenizer, [Text("", "Task1", [a, b, c, d])]) == {}  # three such words: 12 tokens


@pytest.mark.parametrize(("gigabytes", "rows"), [(math.inf, 256), (80, 256), (24, 96), (0.001, 1)])
def test_so_many_texts_are_sampled_together_as_a_gpu_has_room_for(gigabytes: float, rows: int):
    """On 7B a text of 128 tokens takes 64 MiB (32 blocks, keys and values of 4096 numbers of 2 bytes), of a quarter."""
    with torch.device("meta"):
        config = OlmoConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=64)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert submission.rows_together(model, 128, gigabytes * 2**30) == rows


def test_what_is_barred_is_not_written_and_nothing_else_changes(checkpoint: Path):
    """The same random numbers write the same until a run would be complete; there they write another token."""
    model, end = load_model(checkpoint), 0
    openings = [[n, n + 1] for n in range(40, 60)]
    free = submission.write(model, openings, 24, torch.Generator().manual_seed(1), {}, end)
    barred = {tuple(row[8:11]): [row[11]] for row in free}
    assert len(barred) == len(free)
    held = submission.write(model, openings, 24, torch.Generator().manual_seed(1), barred, end)
    for before, after in zip(free, held, strict=True):
        assert len(after) == 24 and after[:2] == before[:2]
        assert after[:11] == before[:11] and after[11] != before[11]
        assert not any(after[n] in barred.get(tuple(after[n - 3 : n]), []) for n in range(3, 24))
    assert any(row[12:] != other[12:] for row, other in zip(free, held, strict=True))


def test_text_is_drawn_at_a_temperature_above_one_without_the_end(checkpoint: Path):
    """Against the softmax of the logits over 1.15: the share of the likeliest 30 tokens, which tells temperatures."""
    model, end, draws = load_model(checkpoint), 7, 50000
    rows = submission.write(model, [[50]] * draws, 2, torch.Generator().manual_seed(0), {}, end)
    with torch.no_grad():
        logits = model(torch.tensor([[50]])).logits[0, -1]
    logits[end] = -math.inf
    likely = logits.topk(30).indices.tolist()
    expected, plain = ((logits / temperature).softmax(-1)[likely].sum().item() for temperature in (1.15, 1.0))
    drawn = [row[1] for row in rows]
    error = math.sqrt(expected * (1 - expected) / draws)
    assert abs(sum(token in likely for token in drawn) / draws - expected) < 4 * error < (plain - expected) / 2
    assert end not in drawn


def test_steering_directions_are_unit_vectors_one_a_task():
    directions = submission.steering_directions(50, 3, torch.device("cpu"))
    assert list(directions) == ["Task1", "Task2", "Task3"]
    for vector in directions.values():
        assert vector.norm().item() == pytest.approx(1, abs=1e-6)
        assert (vector >= 0).all()  # entries are uniform on [0, 1) before they are normalised
    assert not torch.equal(directions["Task1"], directions["Task2"])


def test_a_batch_holds_rows_of_similar_length():
    lengths = [100, 30, 90, 81, 79, 29, 5]
    assert list(submission.batches(lengths, 1000, alike=0.8)) == [[0, 2, 3], [4], [1, 5], [6]]
    assert list(submission.batches(lengths, 200)) == [[0, 2], [3, 4], [1, 5, 6]]


def test_a_cache_in_a_file_changes_nothing(checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch):
    results = []
    for limit in (1 << 40, 0):
        monkeypatch.setattr(submission, "CACHE_BYTES", limit)
        *_, (_, found) = submission.descend(Decoder(checkpoint, torch.float32), forget, retain, SMALL, float("inf"))
        rows = submission.allocate([2, 3], 5, torch.float32, torch.device("cpu"))
        assert [row.shape for row in rows] == [(2, 5), (3, 5)]
        in_file = any(
            "(deleted)" in line and "tmp" in line for line in Path("/proc/self/maps").read_text().splitlines()
        )
        assert in_file == (limit == 0)
        results.append(found)
    assert all(torch.equal(results[0][index], results[1][index]) for index in SMALL.trained)


def test_plan_holds_batches_of_one_task_in_file_order(forget, retain):
    pairs = submission.plan(forget, retain, SMALL)
    for side, texts in ((0, forget), (1, retain)):
        batches = [pair[side] for pair in pairs]
        assert sorted(row for batch in batches for row in batch) == list(range(len(texts)))
        for batch in batches:
            assert len(batch) <= SMALL.batch_size
            assert batch == sorted(batch)
            assert len({texts[row].task for row in batch}) == 1


def test_of_unequal_sides_the_shorter_begins_again(forget, retain):
    pairs = submission.plan(forget, retain[::4], SMALL)
    assert {row for batch, _ in pairs for row in batch} == set(range(len(forget)))
    assert {row for _, batch in pairs for row in batch} == set(range(len(retain[::4])))
    batches = [batch for batch, _ in submission.plan(forget, forget, dataclasses.replace(SMALL, batch_size=1))]
    assert batches != sorted(batches)  # shuffled


def test_of_a_growing_target_the_last_epoch_is_kept(checkpoint: Path, data: Path, forget, retain, tmp_path: Path):
    """Its length follows the model's, and so do the losses: the first epoch's is the lowest."""
    settings = dataclasses.replace(SMALL, coefficient="growing", learning_rate=0.1)
    unlearn(str(checkpoint), str(tmp_path), str(data / "forget"), str(data / "retain"), settings)
    *_, (_, last) = submission.descend(Decoder(checkpoint, torch.float32), forget, retain, settings, float("inf"))
    found = load_file(tmp_path / "model.safetensors")
    for index, matrix in last.items():
        assert torch.equal(found[f"model.layers.{index}.mlp.down_proj.weight"], matrix)


@pytest.fixture(scope="module")
def written(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unlearned") / "out"
    unlearn(str(checkpoint), str(output), str(data / "forget"), str(data / "retain"), SMALL)
    return output


def test_only_the_trained_matrices_differ(checkpoint: Path, written: Path):
    before, after = load_file(checkpoint / "model.safetensors"), load_file(written / "model.safetensors")
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == TRAINED
    assert load_model(written)  # and transformers reads it


def test_every_other_file_is_copied(checkpoint: Path, written: Path):
    names = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in written.iterdir()} == names | {"run.json"}
    for name in names - {"model.safetensors"}:
        assert (written / name).read_bytes() == (checkpoint / name).read_bytes()


def test_same_seed_same_bytes_other_seed_other_bytes(checkpoint: Path, data: Path, written: Path, tmp_path: Path):
    for seed, same in ((0, True), (1, False)):
        settings = dataclasses.replace(SMALL, seed=seed)
        unlearn(str(checkpoint), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), settings)
        written_now = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert (written_now == (written / "model.safetensors").read_bytes()) == same


def test_the_clean_process_of_the_judge_gives_the_same_tensors(checkpoint: Path, data: Path, tmp_path: Path):
    """The file alone, in a folder of its own, with the judge's four arguments, against the function called here."""
    (tmp_path / "submission.py").write_bytes(Path(submission.__file__).read_bytes())
    paths = [str(checkpoint), str(tmp_path / "judge"), str(data / "forget"), str(data / "retain")]
    script = f"from submission import unlearn; unlearn(*{paths!r})"
    subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.append('.'); {script}"], cwd=tmp_path, check=True
    )
    unlearn(paths[0], str(tmp_path / "here"), *paths[2:])
    judged, here = (load_file(tmp_path / name / "model.safetensors") for name in ("judge", "here"))
    assert all(torch.equal(judged[key], here[key]) for key in here)


def test_sharded_bfloat16_checkpoint_keeps_its_form(checkpoint: Path, data: Path, tmp_path: Path):
    model = load_model(checkpoint, torch.bfloat16)
    model.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "in")
    unlearn(str(tmp_path / "in"), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), SMALL)
    shards = sorted(path.name for path in (tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    changed = set()
    for name in shards:
        before, after = load_file(tmp_path / "in" / name), load_file(tmp_path / "out" / name)
        assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
        changed |= {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == TRAINED


def test_an_earlier_runs_weights_do_not_stay(checkpoint: Path, data: Path, tmp_path: Path):
    """In the same folder, each time other blocks: first the model in one file, then twice the model in shards."""
    load_model(checkpoint).save_pretrained(tmp_path / "in", max_shard_size="100KB")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "optimizer.pt").write_bytes(b"weights of the untouched model")
    original = load_model(checkpoint).state_dict()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "completions.jsonl").write_text("of another stage")
    for source, trained in ((checkpoint, (2, 3, 4)), (tmp_path / "in", (0, 1)), (tmp_path / "in", (4, 5))):
        settings = dataclasses.replace(SOLVED, trained=trained, passes=1)
        unlearn(str(source), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), settings)
        found = load_model(tmp_path / "out").state_dict()
        assert {key for key in found if not torch.equal(found[key], original[key])} == {
            f"model.layers.{index}.mlp.down_proj.weight" for index in trained
        }
    names = {path.name for path in (tmp_path / "in").iterdir()} - {"optimizer.pt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"run.json", "completions.jsonl"}


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_a_config_that_asks_for_another_attention_changes_nothing(checkpoint: Path, forget, tmp_path: Path, name: str):
    shutil.copytree(checkpoint, tmp_path / "eager")
    config = json.loads((tmp_path / "eager" / "config.json").read_text())
    (tmp_path / "eager" / "config.json").write_text(json.dumps({**config, name: "eager"}))
    expected, found = (
        submission.losses(Decoder(folder, torch.float32), {}, forget) for folder in (checkpoint, tmp_path / "eager")
    )
    assert torch.equal(found, expected)


def test_an_old_checkpoints_rotary_frequencies_are_no_weights(checkpoint: Path, forget, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    assert Decoder(tmp_path / "old").depth == 6


def test_out_of_time_still_leaves_a_whole_checkpoint(checkpoint: Path, data: Path, tmp_path: Path):
    settings = dataclasses.replace(SMALL, minutes=0.0, epochs=1000)
    unlearn(str(checkpoint), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), settings)
    assert load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("depth", "trained", "alpha"),
    [
        (6, range(6), 1.0),
        (8, range(8), 1.0),
        (16, range(1, 9), 20.0),
        (30, range(3, 11), 20.0),
        (32, range(3, 11), 20.0),
    ],
)
def test_a_deep_decoder_is_steered_in_a_few_early_blocks_and_held_more_firmly(depth: int, trained: range, alpha: float):
    settings = settings_for(depth)
    assert (settings.trained, settings.alpha, settings.repaired) == (tuple(trained), alpha, 1)


def test_settings_follow_the_depth():
    small, large = settings_for(16, "descend"), settings_for(32, "descend")
    assert (small.trained, small.beta, small.alpha, small.batch_size) == ((12, 13, 14), 3.0, 900.0, 8)
    assert (large.trained, large.beta, large.alpha, large.batch_size) == ((24, 25, 26), 5.0, 900.0, 12)
    for method in ("solve", "descend"):
        for depth in range(3, 64):
            submission.check_settings(settings_for(depth, method), depth)


def test_run_json_records_the_settings(written: Path):
    run = json.loads((written / "run.json").read_text())
    assert run["settings"]["alpha"] == SMALL.alpha
    assert run["wall_seconds"] > 0


# ---- wrong input: one line, exit code 2, nothing written ----


def refuse(checkpoint: Path, data: Path, output: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pipeline.unlearn", checkpoint, output, data / "forget", data / "retain", *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert not output.exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert len(errors) == 1
    return errors[0]


def test_a_block_past_the_depth_is_refused(checkpoint: Path, data: Path, tmp_path: Path):
    message = refuse(checkpoint, data, tmp_path / "out", "--trained", "4", "5", "6")
    assert message == "error: block 6 is not in a model of 6 blocks (0 to 5)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained": (3,), "repaired": 1}, "of 1 trained blocks 1 repair"),
        ({"repaired": -1}, "of 3 trained blocks -1 repair"),
        ({"coefficient": "growing"}, "only the descent"),
        ({"documents": 0.0}, "documents is 0.0, expected more than 0"),
        ({"ridge": 0.0}, "ridge is 0.0, expected more than 0"),
        ({"passes": 0}, "passes is 0, expected more than 0"),
        ({"epochs": 0}, "epochs is 0, expected more than 0"),
        ({"batch_size": 0}, "batch_size is 0, expected more than 0"),
        ({"alpha": -1.0}, "alpha is -1.0, expected 0 or more"),
        ({"general": math.nan}, "general is nan, expected 0 or more"),
    ],
)
def test_a_setting_out_of_range_is_refused(change, message: str):
    with pytest.raises(BadInput, match=message):
        submission.check_settings(dataclasses.replace(SOLVED, **change), 6)
    for depth in (1, 2, 8, 16, 30, 32):
        submission.check_settings(settings_for(depth), depth)
        if depth > 2:
            submission.check_settings(settings_for(depth, "descend"), depth)


def test_the_models_own_folder_is_no_output(checkpoint: Path, data: Path):
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="the model's own folder"):
        unlearn(str(checkpoint), f"{checkpoint}/.", str(data / "forget"), str(data / "retain"), SMALL)
    assert (checkpoint / "model.safetensors").read_bytes() == before


SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3} | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.2
}  # fmt: skip
KNOWN = {"llama": True, "mistral": True, "qwen2": True, "olmo2": False, "granite": False, "gemma": False}


@pytest.mark.parametrize("kind", KNOWN)
def test_decoders_that_break_what_is_assumed_are_refused(kind: str, tmp_path: Path):
    """OLMo 2 has a norm after the MLP, Granite a factor before the sum, Gemma one on its embeddings."""
    torch.manual_seed(0)
    factors = {"residual_multiplier": 0.5} if kind == "granite" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **factors)).eval()
    model.save_pretrained(tmp_path)
    decoder, text = Decoder(tmp_path, torch.float32), Text("asc1", "Task1", list(range(5, 45)))
    with contextlib.nullcontext() if KNOWN[kind] else pytest.raises(BadInput, match="not a decoder of the kind known"):
        decoder.check_sum(1, text)
        submission.check_same(decoder, model, text)
    if KNOWN[kind]:
        with torch.no_grad():
            ids = torch.tensor([text.tokens])
            expected = model(ids, labels=ids).loss.item()
        assert submission.losses(decoder, {}, [text]).item() == pytest.approx(expected, rel=1e-4)


def test_a_head_that_is_not_finite_is_refused(checkpoint: Path, data: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "in")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    settings = dataclasses.replace(SOLVED, general=0.0)
    with pytest.raises(BadInput, match="lm_head.weight has values that are not finite"):
        unlearn(str(tmp_path / "in"), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), settings)
    assert not (tmp_path / "out").exists()


def write(folder: Path, rows, retain_rows) -> Path:
    for side, table in (("forget", rows), ("retain", retain_rows)):
        (folder / side).mkdir(parents=True)
        pandas.DataFrame(table).to_json(folder / side / f"{side}.jsonl", orient="records", lines=True)
    return folder


BROKEN = {
    "missing column": (
        lambda rows: [{k: v for k, v in row.items() if k != "task"} for row in rows],
        "no column 'task'",
    ),
    "empty text": (lambda rows: [{**rows[0], "output": " "}, *rows[1:]], "row 1: output is ' '"),
    "unknown task": (lambda rows: [*rows[:-1], {**rows[-1], "task": "Task4"}], "row 18: task is 'Task4'"),
    "twice": (lambda rows: [*rows, rows[0]], "occurs twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_refused(case: str, checkpoint: Path, rows, tmp_path: Path):
    damage, message = BROKEN[case]
    folder = write(tmp_path, damage(rows["forget"]), rows["retain"])
    with pytest.raises(BadInput, match=message.replace("'", ".")):
        unlearn(str(checkpoint), str(tmp_path / "out"), str(folder / "forget"), str(folder / "retain"), SMALL)
    assert not (tmp_path / "out").exists()


def test_overlap_of_forget_and_retain_is_refused(checkpoint: Path, rows, tmp_path: Path):
    folder = write(tmp_path, rows["forget"], [*rows["retain"], rows["forget"][3]])
    with pytest.raises(BadInput, match="occurs twice in the forget and retain rows"):
        unlearn(str(checkpoint), str(tmp_path / "out"), str(folder / "forget"), str(folder / "retain"), SMALL)


def test_column_wise_json_gives_the_same_texts(checkpoint: Path, rows, tmp_path: Path, forget):
    (tmp_path / "forget.jsonl").write_text(pandas.DataFrame(rows["forget"]).to_json())
    assert read_texts(tmp_path, "forget", load_tokenizer(checkpoint)) == forget


def test_weights_that_are_not_finite_are_refused(checkpoint: Path, data: Path, tmp_path: Path):
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="not finite"):
        unlearn(str(tmp_path), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), SMALL)


def test_a_diverging_loss_stops_before_anything_is_written(checkpoint: Path, data: Path, tmp_path: Path):
    for settings, message in ((SMALL, "the loss is"), (SOLVED, "not finite")):
        broken = dataclasses.replace(settings, beta=math.inf)
        with pytest.raises(BadInput, match=message):
            unlearn(str(checkpoint), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), broken)
        assert not (tmp_path / "out").exists()


def taken(lock: Path) -> bool:
    """Whether another process, or another opening of the file, would have to wait for the lock."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_output_is_written_by_one_process_at_a_time(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lock, seen = tmp_path / ".out.lock", []
    solve = submission.solve

    def spy(*arguments):
        seen.append(taken(lock))
        return solve(*arguments)

    monkeypatch.setattr(submission, "solve", spy)
    settings = dataclasses.replace(SOLVED, passes=1)
    unlearn(str(checkpoint), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), settings)
    assert seen == [True] and not taken(lock)


def test_where_no_lock_can_be_made_nobody_is_waited_for(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with submission.alone(tmp_path / "file" / "out"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    rows = 40_000
    drawn = submission.draw(probabilities.log().expand(rows, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (rows, 1)
    counts = torch.bincount(drawn[:, 0], minlength=5).double()
    spread = (rows * probabilities * (1 - probabilities)).sqrt()
    assert (counts[[1, 4]] == 0).all()
    assert ((counts - rows * probabilities).abs() <= 4 * spread).all()
