"""The submission: its loss by formula, its blocks against the whole model, and what it writes."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig, OlmoConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from pipeline import unlearn as submission
from pipeline.lib.models import load_model, load_tokenizer
from pipeline.unlearn import BadInput, Decoder, Settings, Text, read_texts, settings_for, unlearn

TRAINED = {f"model.layers.{i}.mlp.down_proj.weight" for i in (2, 3, 4)}
SMALL = Settings("descend", (2, 3, 4), beta=3.0, alpha=10.0, epochs=3, batch_size=4, learning_rate=1e-3)
SOLVED = Settings("solve", (2, 3, 4), beta=3.0, alpha=5.0, general=1.0, general_ratio=1.0)
AIMED = Settings("aim", (2, 3, 4), general_ratio=1.0, rounds=6)
END = 0  # the end-of-text token of the checkpoint in conftest


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


def test_blocks_read_one_at_a_time_equal_the_whole_model(checkpoint: Path, forget, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submission, "PASS_TOKENS", 64)
    expected = states_of(load_model(checkpoint), forget)
    decoder = Decoder(checkpoint, torch.float32)
    states = decoder.embed(forget)
    for index in range(decoder.depth - 1):
        states = decoder.advance(decoder.block(index), states)
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
    values: list[torch.Tensor], texts: list[Text], answer: float, first: list[float] | None = None
) -> torch.Tensor:
    """The mean over the tasks and kinds of the mean over their tokens, of which those before an answer's count more.

    The values are of all tokens but the first, unless `first` has its weight.
    """
    cells: dict[tuple[str, str], list[tuple[torch.Tensor, float]]] = {}
    for row, text in zip(values, texts, strict=True):
        weights = [answer if position + 1 >= text.prompt else 1.0 for position in range(1, len(text.tokens))]
        weights = [*(first or []), *weights]
        cells.setdefault((text.task, "sc" if "sc" in text.id else "qa"), []).extend(zip(row, weights, strict=True))
    means = [sum(value * w for value, w in cell) / sum(w for _, w in cell) for cell in cells.values()]
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
        moved = weighted_mean(distances, forget, settings.answer)
        return moved + settings.alpha * weighted_mean(held, retain, settings.answer)

    return loss


@pytest.mark.parametrize("strip", [7, 1000])
def test_the_closed_form_is_the_minimum_of_the_loss(
    checkpoint: Path, forget, retain, strip: int, monkeypatch: pytest.MonkeyPatch
):
    """At one block: the gradient is zero there, and 30 steps of AdamW from the original end higher."""
    monkeypatch.setattr(submission, "STRIP", strip)
    settings = dataclasses.replace(SOLVED, trained=(3,), answer=4.0, ridge=1e-9)
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
    # By hand: the first token nothing, then 3 from the prompt's last token on; each of the three cells sums to 1/3.
    expected = [[0, 1, 3, 3, 3, 3, 3], [0, 3, 3, 3], [0, 1, 1, 3, 3], [0, 3, 3]]
    for row, wanted, total in zip(submission.token_weights(texts, 3.0), expected, (25, 25, 8, 6), strict=True):
        assert row.tolist() == pytest.approx([weight / total / 3 for weight in wanted])
    for row, wanted, total in zip(submission.token_weights(texts, 3.0, 2.0), expected, (29, 29, 10, 8), strict=True):
        assert row.tolist() == pytest.approx([weight / total / 3 for weight in [2, *wanted[1:]]])


def test_aimed_steering_holds_the_first_token_of_every_row(
    checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    """Of forget rows as much as of a retain row in the mean, and nothing else of them. The sum is written out."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        submission, "whitening_of", lambda gram, _: seen.append(gram.tril() + gram.tril(-1).T) or gram.float()
    )
    aim_of(checkpoint, forget, retain, dataclasses.replace(AIMED, trained=(2,), answer=4.0), -math.inf)
    model, entering = load_model(checkpoint), []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: entering.append(inputs[0][0]))
    ended = [dataclasses.replace(text, tokens=[*text.tokens, END]) for text in retain]
    states_of(model, [*ended, *forget])
    outer = [[torch.outer(a, a).double() for a in row] for row in entering]
    expected = weighted_mean(outer[: len(retain)], ended, 4.0, [1.0])
    kinds = Counter(submission.kind_of(text) for text in forget)
    share = len(forget) / sum(len(text.tokens) for text in retain)
    for text, row in zip(forget, outer[len(retain) :], strict=True):
        expected = expected + share / len(kinds) / kinds[submission.kind_of(text)] * row[0]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)


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
    before = (leaving - target).norm()
    (found,) = fit.moved(equations.solution(ridge))
    assert (found - target).norm() < 0.1 * before


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


# ---- aimed steering ----


@pytest.fixture(scope="module")
def documents(forget) -> list[Text]:
    return [text for text in forget if text.task == "Task3" and "sc" in text.id]


def moved(checkpoint: Path, trained: tuple[int, ...], size: float = 0.02):
    """A whole model with other matrices, and the decoder's upper part with the same."""
    generator = torch.Generator().manual_seed(0)
    model, upper = load_model(checkpoint), submission.Upper(Decoder(checkpoint, torch.float32), trained)
    for index, matrix in upper.matrices.items():
        matrix += size * torch.randn(matrix.shape, generator=generator)
        model.model.layers[index].mlp.down_proj.weight.data = matrix.clone()
    return model, upper


def losses_of(decoder: Decoder, texts: list[Text]) -> float:
    upper = submission.Upper(decoder, (0,))
    return upper.mean_loss(upper.whole(texts))


def whole(folder: Path):
    """Reads transformers' own model, as text is sampled from it."""
    return lambda: submission.whole_model(folder, Text("", "", [5, 6, 7]))


def answers(texts: list[Text]) -> list[torch.Tensor]:
    """Weights of the answers' tokens: 1, 2, 3, ..."""
    return [torch.arange(1.0, len(text.tokens) - max(1, text.prompt) + 1) for text in texts]


def log_odds(model, text: Text, counted: int) -> torch.Tensor:
    """ln p / (1 - p) of the last tokens, by transformers' own model."""
    p = model(torch.tensor([text.tokens])).logits[0].double().softmax(-1)[:-1]
    right = p.gather(1, torch.tensor(text.tokens[1:])[:, None])[-counted:, 0]
    return right.log() - (1 - right).log()


def leads(model, text: Text, counted: int) -> torch.Tensor:
    """By how many nats the last tokens lead the likeliest other one, by transformers' own model."""
    with torch.no_grad():
        logits = model(torch.tensor([text.tokens])).logits[0].double()[:-1]
    right = torch.tensor(text.tokens[1:])[:, None]
    others = logits.scatter(1, right, -math.inf).amax(-1)
    return (logits.gather(1, right)[:, 0] - others)[-counted:]


def test_log_odds_are_those_of_the_whole_model_with_the_matrices(checkpoint: Path, forget):
    model, upper = moved(checkpoint, (1, 4))
    rows = upper.rows(forget, answers(forget))
    with torch.no_grad():
        for text, weights, found in zip(forget, rows.weights, upper.all_log_odds(rows), strict=True):
            torch.testing.assert_close(found.double(), log_odds(model, text, len(weights)), rtol=1e-3, atol=1e-3)
        losses = [torch.nn.functional.softplus(-log_odds(model, text, len(text.tokens) - 1)) for text in forget]
    assert upper.mean_loss(upper.whole(forget)) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_a_token_leads_its_likeliest_rival_where_greedy_text_says_it(checkpoint: Path):
    """Of a model that is sure of nothing: all p are far below a half."""
    model, upper = moved(checkpoint, (1, 4))
    start = torch.tensor([[5, 6, 7]])
    said = model.generate(start, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    rows = upper.whole([Text("", "", said), Text("", "", [*said[:-1], (said[-1] + 1) % 50])])
    found = upper.all_log_odds(dataclasses.replace(rows, led=True))
    assert all(odds.max() < 0 for odds in upper.all_log_odds(rows))
    assert (found[0][2:] > 0).all() and (found[1][2:-1] > 0).all() and found[1][-1] < 0
    for text, row in zip(rows.texts, found, strict=True):
        torch.testing.assert_close(row.double(), leads(model, text, len(row)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("led", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.005), (torch.float32, 1e-5)])
def test_log_odds_of_logits_in_few_bits_are_those_of_the_formula(
    checkpoint: Path, dtype: torch.dtype, near: float, led: bool
):
    """Of the same logits, in float64: what they are rounded to is given, what comes of them is not rounded away."""
    upper = submission.Upper(Decoder(checkpoint, dtype), (1,))
    generator = torch.Generator().manual_seed(0)
    upper.head = torch.randn(upper.head.shape, generator=generator).to(dtype)
    normed = torch.randn(8, upper.head.shape[1], generator=generator).to(dtype)
    logits = (normed @ upper.head.T).double()
    right = torch.cat([logits[:4].argmax(dim=1), logits[4:].argmin(dim=1)])  # nearly certain ones, and unlikely ones
    mine = logits.gather(1, right[:, None])[:, 0]
    others = logits.scatter(1, right[:, None], -math.inf)
    expected = mine - (others.amax(dim=1) if led else others.logsumexp(dim=1))
    slope = upper.head[right].double() - others.softmax(dim=1) @ upper.head.double()
    for slopes in (False, True):
        found, gradient = upper.told(normed, right, slopes, led)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=near)
    torch.testing.assert_close(gradient.double(), slope, rtol=0.0, atol=0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("again", [False, True])  # whether blocks run again on the way back
@pytest.mark.parametrize("limit", [30, 2048])
@pytest.mark.parametrize("likely", [set(), {0, 1}, {0, 1, 2, 3, 4}])  # ready for gradients at once
@pytest.mark.parametrize("left_out", [set(), {2, 3}])
@pytest.mark.parametrize("told", [7, 128])  # tokens whose logits are held at once
def test_each_row_pulls_along_the_gradient_of_what_it_asks_for_in_the_whole_model(
    checkpoint: Path,
    forget,
    again: bool,
    limit: int,
    likely: set[int],
    left_out: set[int],
    told: int,
    monkeypatch: pytest.MonkeyPatch,
):
    likely = likely - left_out
    among = [row for row in range(len(forget)) if row not in left_out]
    monkeypatch.setattr(submission, "TOLD", told)
    monkeypatch.setattr(submission, "GRADIENT_TOKENS", limit)
    model, upper = moved(checkpoint, (1, 4))
    upper.passing = 0 if again else 10**6
    rows = upper.rows(forget, answers(forget))
    wanted = {row: torch.linspace(-2, 1, len(rows.weights[row])) for row in (0, 3, 4)}

    def asks(row: int, odds: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(odds.double(), log_odds(model, forget[row], len(odds)), rtol=1e-3, atol=1e-3)
        return wanted.get(row, torch.zeros_like(odds))

    ran = Counter[int]()
    log_odds_of = upper.log_odds
    monkeypatch.setattr(
        upper,
        "log_odds",
        lambda own, batch, *more, **named: (ran.update(batch), log_odds_of(own, batch, *more, **named))[1],
    )
    through = []
    checkpoint_of = submission.checkpoint
    monkeypatch.setattr(
        submission, "checkpoint", lambda *args, **named: (through.append(args[1]), checkpoint_of(*args, **named))[1]
    )
    found = submission.pulls_of(upper, rows, asks, likely, among)
    assert set(through) == (set(range(1, upper.decoder.depth)) if again else set())
    assert set(found) == set(wanted) - left_out
    assert ran == {row: 2 if row in wanted and row not in likely else 1 for row in among}
    for row, pull in found.items():
        asked = rows.weights[row] * wanted[row]
        total = (asked * log_odds(model, forget[row], len(asked))).sum()
        expected = torch.autograd.grad(total, [model.model.layers[n].mlp.down_proj.weight for n in (1, 4)])
        for index, gradient in zip((1, 4), expected, strict=True):
            scale = gradient.abs().max().item()
            product = pull.gradients[index].T @ pull.entering[index]
            torch.testing.assert_close(product, gradient, rtol=1e-3, atol=1e-4 * scale)
        assert pull.wanted == pytest.approx((asked * wanted[row]).sum().item())
    assert submission.pulls_of(upper, rows, lambda _, odds: torch.zeros_like(odds), likely, among) == {}


@pytest.mark.parametrize("trained", [(2, 3, 4), (1, 4)])
def test_what_is_held_is_the_second_moment_of_what_enters_the_untouched_down_proj(
    checkpoint: Path, forget, retain, trained: tuple[int, ...]
):
    settings = dataclasses.replace(AIMED, answer=4.0, ridge=0.01, trained=trained)
    general = [dataclasses.replace(text, task="general") for text in forget[:3]]
    model, upper = load_model(checkpoint), submission.Upper(Decoder(checkpoint, torch.float32), settings.trained)
    streams = (upper.rows(retain, answers(retain)), 1.0), (upper.whole(general), 0.5)
    found = submission.whitenings_of(upper, streams, settings)
    for index in settings.trained:
        entering: list[torch.Tensor] = []
        down_proj = model.model.layers[index].mlp.down_proj
        hook = down_proj.register_forward_pre_hook(lambda _module, inputs, seen=entering: seen.append(inputs[0][0]))
        states_of(model, [*retain, *general])
        hook.remove()
        outer = [[torch.outer(a, a).double() for a in row] for row in entering]
        alike = [dataclasses.replace(text, id="") for text in general]
        gram = weighted_mean(outer[: len(retain)], retain, 4.0, [1.0])
        gram = gram + 0.5 * weighted_mean(outer[len(retain) :], alike, 4.0, [1.0])
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        whitening = found[index].double()
        torch.testing.assert_close(whitening @ gram @ whitening.T, torch.eye(len(gram)).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("formed", [1, 4000, 1 << 30])  # bytes: one hidden unit at a time, some, or all
@pytest.mark.parametrize("limit", [12, 2048])  # the pulls' tokens in groups, or together
def test_a_step_gives_every_pull_what_it_asks_for_and_holds_the_rest_best(
    checkpoint: Path, limit: int, formed: int, monkeypatch: pytest.MonkeyPatch
):
    """By Lagrange: of all changes with these inner products it has the least norm in the metric that is held."""
    monkeypatch.setattr(submission, "DAMPING", 0.0)
    monkeypatch.setattr(submission, "GRADIENT_TOKENS", limit)
    monkeypatch.setattr(submission, "FORMED_BYTES", formed)
    generator = torch.Generator().manual_seed(0)
    upper = submission.Upper(Decoder(checkpoint, torch.float32), (1, 4))
    before = {index: matrix.clone() for index, matrix in upper.matrices.items()}
    hidden, intermediate = before[1].shape
    roots = {index: torch.randn(intermediate, intermediate, generator=generator) for index in (1, 4)}
    held = {index: root @ root.T / intermediate + 0.1 * torch.eye(intermediate) for index, root in roots.items()}
    wanted, lengths = [3.0, 2.0, 4.0], [5, 9, 3]
    pulls = []
    for want, length in zip(wanted, lengths, strict=True):
        # 0.5 is what they have in common.
        g = {n: torch.randn(length, hidden, generator=generator) + 0.5 for n in (1, 4)}
        a = {n: torch.randn(length, intermediate, generator=generator) + 0.5 for n in (1, 4)}
        pulls.append(submission.Pull(want, g, a))
    gradients = [{n: pull.gradients[n].T @ pull.entering[n] for n in (1, 4)} for pull in pulls]
    submission.step(upper, pulls, {index: torch.linalg.cholesky(metric).inverse() for index, metric in held.items()})
    change = {index: matrix - before[index] for index, matrix in upper.matrices.items()}
    got = [sum((one[n] * change[n]).sum().item() for n in (1, 4)) for one in gradients]
    assert got == pytest.approx(wanted, rel=1e-3)

    # The same by one least-squares problem over all numbers: with x = L' dW, least |x| with <G L'^-1, x> as wanted.
    factors = {index: torch.linalg.cholesky(metric.double()) for index, metric in held.items()}
    rows = [
        torch.cat([torch.linalg.solve(factors[n], one[n].double().T).flatten() for n in (1, 4)]) for one in gradients
    ]
    least = torch.linalg.lstsq(torch.stack(rows), torch.tensor(wanted).double()[:, None], driver="gelsd").solution
    norm = sum((change[n].double() @ held[n].double() * change[n]).sum().item() for n in (1, 4))
    assert norm == pytest.approx(least.square().sum().item(), rel=1e-3)


def test_a_step_in_bfloat16_loses_nothing_where_much_is_held(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """There V a is a small rest of large numbers, lost if V has only the 8 bits of bfloat16."""
    monkeypatch.setattr(submission, "DAMPING", 0.0)
    generator = torch.Generator().manual_seed(0)
    upper = submission.Upper(Decoder(checkpoint, torch.float32), (1, 4))
    before = {index: matrix.clone() for index, matrix in upper.matrices.items()}
    hidden, intermediate = before[1].shape
    held = torch.eye(intermediate) + 1e4 * torch.ones(intermediate, intermediate)
    whitening = torch.linalg.cholesky(held.double()).inverse().float()
    pulls, gradients = [], []
    for length in (5, 9, 3):
        g = {n: torch.randn(length, hidden, generator=generator).bfloat16() for n in (1, 4)}
        a = {n: (torch.randn(length, intermediate, generator=generator) / 4 + 16).bfloat16() for n in (1, 4)}
        pulls.append(submission.Pull(3.0, g, a))
        gradients.append({n: g[n].float().T @ a[n].float() for n in (1, 4)})
    submission.step(upper, pulls, dict.fromkeys((1, 4), whitening))
    change = {index: (matrix - before[index]).double() for index, matrix in upper.matrices.items()}
    got = [sum((one[n] * change[n]).sum().item() for n in (1, 4)) for one in gradients]
    assert got == pytest.approx([3.0] * 3, rel=0.01)


def test_no_pull_is_turned_round_but_one_that_is_held():
    products = torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    # Alone the first two would give x = (20.4, -19.2): the second gets more than it asks for from the first.
    found = submission.factors_of(products, [4.2, 0.2, 2.0], [False] * 3)
    assert found == pytest.approx([4.2 / 2 / (1 + submission.DAMPING), 0, 0.5 / (1 + submission.DAMPING)])
    assert submission.factors_of(products, [-1.0, -1.0, -1.0], [False] * 3) == [0, 0, 0]
    damped = products + submission.DAMPING * products.diagonal().diag()
    held = submission.factors_of(products, [4.2, 0.2, 2.0], [False, True, False])
    assert held[1] < 0
    assert (damped @ torch.tensor(held).double()).tolist() == pytest.approx([4.2, 0.2, 2.0], rel=1e-4)


def test_a_row_that_nothing_moves_is_left_out_and_gradients_that_are_not_finite_are_refused():
    products = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    moved_most = pytest.approx([2 / (1 + submission.DAMPING), 0])
    assert submission.factors_of(products, [4.0, 1.0], [False, True]) == moved_most
    products[0, 1] = math.nan
    with pytest.raises(BadInput, match="not finite"):
        submission.factors_of(products, [4.0, 1.0], [False] * 2)


def test_a_run_does_not_end_before_the_level_was_looked_at_again(
    memorised: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    """In the first two rounds, without a level, nothing is asked for; in the third the level is 3 nats."""
    ask = submission.lowering
    asked = []

    def lowering(odds, goal, weights, document):
        asked.append(goal.mean().item())
        return torch.zeros_like(odds) if len(asked) <= 2 * len(documents) else ask(odds, goal, weights, document)

    monkeypatch.setattr(submission, "lowering", lowering)
    monkeypatch.setattr(submission, "unseen_loss", lambda *_: 3.0)
    *_, (_, matrices) = aim_of(memorised, documents, retain, dataclasses.replace(AIMED, rounds=12))
    assert sum(asked[2 * len(documents) : 3 * len(documents)]) / len(documents) == pytest.approx(3.0, rel=0.1)
    upper = submission.Upper(Decoder(memorised, torch.float32), AIMED.trained)
    upper.matrices = matrices
    assert upper.mean_loss(upper.whole(documents)) == pytest.approx(3.0, rel=0.1)


def test_words_are_counted_where_tokens_end(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    text = " Zoë  was\nborn, in1999. "
    tokens, words = submission._encode_words(tokenizer, text)
    assert tokens == tokenizer(text).input_ids
    parts: dict[int, list[int]] = {}
    for token, word in zip(tokens, words, strict=True):
        parts.setdefault(word, []).append(token)
    # A byte-level token holds the space before a word; one that is alone belongs to the word before it, or the first.
    assert [tokenizer.decode(parts[n]).strip() for n in range(len(parts))] == ["Zoë", "was", "born,", "in1999."]


def test_mixtures_hold_each_piece_so_often_and_in_its_place():
    words = [[0, 0, 1, 2, 3, 3, 4, 5, 6], [0, 1, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 1, 1]]
    texts = [Text("", "Task3", [10 * n + k for k in range(len(row))], words=row) for n, row in enumerate(words)]
    pieces = [submission.cut(text, 2) for text in texts]
    assert [list(map(list, row)) for row in pieces] == [
        [[0, 1, 2], [3, 4, 5], [6, 7], [8]],
        [[0, 1, 2], [3, 4]],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1, 2, 3]],
    ]
    found = submission.mixtures(texts, 2, 3)
    assert len(found) == 12
    seen: Counter[tuple[int, int]] = Counter()
    for number, places in enumerate(found):
        rest = places
        for n in range(min(3, len(pieces[number % 4]))):
            source = rest[0][0]
            piece = [(source, place) for place in pieces[source][n]]  # the n-th piece of some text
            assert rest[: len(piece)] == piece
            seen[source, n] += 1
            rest = rest[len(piece) :]
        assert not rest
    # Of the first text the fourth piece has none of another text beside it.
    assert seen == {(source, n): 3 for source, own in enumerate(pieces) for n in range(min(3, len(own)))}
    assert submission.joined(texts, found)[0].tokens == [10 * source + place for source, place in found[0]]
    assert submission.mixtures([], 2, 3) == submission.mixtures(texts[:1], 2, 3) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_in_a_mixture_no_two_pieces_of_one_text_follow_each_other(count: int):
    texts = [Text("", "Task3", [100 * n + k for k in range(12)], words=list(range(12))) for n in range(count)]
    for size in (1, 4):
        found = submission.mixtures(texts, size, submission.COPIES)
        assert len(found) == count * submission.COPIES
        for places in found:
            sources = [source for source, _ in places[::size]]
            assert len(sources) == 12 // size
            assert all(one != other for one, other in itertools.pairwise(sources))
        different = {tuple(places) for places in found}
        assert len(different) == count * min(count - 1, submission.COPIES)


@pytest.mark.parametrize("every", [1, 2])
def test_an_unseen_document_is_measured_on_mixtures_and_on_what_own_text_costs_against_mixed(
    checkpoint: Path, documents, forget, retain, every: int
):
    model, upper = moved(checkpoint, (1, 4))
    texts = documents, forget, retain
    with torch.no_grad():
        each = [[model(torch.tensor([t.tokens]), labels=torch.tensor([t.tokens])).loss for t in some] for some in texts]
    means = [
        sum(loss.item() * (len(text.tokens) - 1) for loss, text in zip(losses, some, strict=True))
        / sum(len(text.tokens) - 1 for text in some)
        for losses, some in ((losses[::every], some[::every]) for losses, some in zip(each, texts, strict=True))
    ]
    found = submission.unseen_loss(upper, [upper.whole(some) for some in texts], every)
    assert found == pytest.approx(means[0] * means[1] / means[2], rel=1e-3)


def test_of_documents_mixtures_all_tokens_count_for_the_level_and_of_own_text_the_later_half(
    memorised: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    seen: list[submission.Rows] = []
    monkeypatch.setattr(submission, "unseen_loss", lambda _, texts, *_every: (seen.extend(texts), 2.4)[1])
    aim_of(memorised, forget, retain, AIMED)
    mixed, own, mixed_own = seen[:3]
    model = load_model(memorised)
    for rows, whole_counts in ((mixed, True), (own, False), (mixed_own, False)):
        losses = []
        for text in rows.texts:
            first = 1 if whole_counts else math.ceil(len(text.tokens) / 2)
            losses.append(torch.nn.functional.softplus(-log_odds(model, text, len(text.tokens) - first).detach()))
        upper = submission.Upper(Decoder(memorised, torch.float32), AIMED.trained)
        assert upper.mean_loss(rows) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    both = [*documents, *(text for text in retain if submission.kind_of(text) == submission.ATTACKED)]
    assert {token for text in mixed.texts for token in text.tokens} <= {t for text in both for t in text.tokens}
    assert len(own.texts) == submission.OWN
    assert len(mixed_own.texts) == math.ceil(len(own.texts) / submission.ROUGHLY)


# Below and above that part of a guess among the checkpoint's tokens; where texts take long there are fewer mixtures.
@pytest.mark.parametrize(("most", "small", "copies"), [(1.25, math.inf, 4), (3.5, math.inf, 4), (3.5, 0, 2)])
def test_an_answer_is_to_lose_a_part_of_a_guess_or_less_and_a_document_as_much_by_what_its_tokens_lose_in_mixtures(
    checkpoint: Path, forget, retain, most: float, small: float, copies: int, monkeypatch: pytest.MonkeyPatch
):
    forget = forget + retain  # more documents, so that of as many mixtures none is twice
    monkeypatch.setattr(submission, "MOST", most)
    monkeypatch.setattr(submission, "SMALL", small)
    upper = submission.Upper(Decoder(checkpoint, torch.float32), AIMED.trained)
    rows = upper.rows(forget, [submission.lowered_weights(text, submission.ATTACKED) for text in forget])
    kinds = {
        kind: [n for n, t in enumerate(forget) if submission.kind_of(t) == kind]
        for kind in map(submission.kind_of, forget)
    }
    aims = submission.untouched_aims(upper, rows, kinds)
    part = 0.55 * math.log(upper.decoder.config.vocab_size)
    assert 1.25 < part < 3.5
    aimed = 1.25 if most == 1.25 else part
    model = load_model(checkpoint)
    for own in kinds.values():
        assert torch.cat([aims[row] for row in own]).mean().item() == pytest.approx(aimed, rel=1e-4)
        if not submission.is_document(forget[own[0]]):
            assert all((aims[row] == aimed).all() for row in own)
            continue
        texts = [forget[row] for row in own]
        lost: dict[tuple[int, int], list[float]] = {}
        for places in submission.mixtures(texts, submission.PIECE, copies):
            tokens = torch.tensor([texts[source].tokens[place] for source, place in places])
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none"
                )
            for place, loss in zip(places[1:], losses.tolist(), strict=True):
                lost.setdefault(place, []).append(loss)
        every = [loss for losses in lost.values() for loss in losses]
        usual = [sum(every) / len(every)]  # of a token that no mixture has
        means = [
            [
                max(submission.LEAST, sum(own) / len(own))
                for own in (lost.get((n, k), usual) for k in range(1, len(text.tokens)))
            ]
            for n, text in enumerate(texts)
        ]
        total = sum(map(sum, means)) / sum(map(len, means))
        for row, mean in zip(own, means, strict=True):
            assert aims[row].tolist() == pytest.approx([value * aimed / total for value in mean], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("goal", "moved"), [(2.1, 0.1), (1.9, -0.1), (9.0, 9 * submission.REACH)])
def test_holding_asks_for_what_brings_the_mean_loss_to_its_goal(goal: float, moved: float):
    """In the direction in which the weighted loss changes most; by no more than the reach."""
    weights = torch.tensor([1.0, 0.3, 2.0])
    odds = torch.tensor([-3.0, -1.0, 0.5], requires_grad=True)
    loss = (torch.nn.functional.softplus(-odds) * weights).sum() / weights.sum()
    (slope,) = torch.autograd.grad(loss, odds)
    goals = torch.full((3,), loss.item() + goal - 2.0 if goal < 9 else goal)
    change = submission.holding(odds.detach(), goals, weights)
    assert (slope @ change).item() == pytest.approx(moved, abs=1e-5)
    torch.testing.assert_close(change * weights, slope * (change[0] / slope[0]) * weights[0])


def test_a_token_is_lowered_to_its_goal_by_no_more_than_its_row_is_short_of():
    odds, weights = torch.tensor([6.0, 4.0, -1.0]), torch.tensor([1.0, 1.0, 2.0])
    losses = [math.log1p(math.exp(-value)) for value in odds.tolist()]
    goal = torch.tensor([3.0, 3.0, 1.0])
    short = (3 - losses[0] + 3 - losses[1] + 2 * (1 - losses[2])) / 4
    largest = min(submission.LARGEST, submission.PUSH * short + 0.05)
    aim = -math.log(math.exp(3) - 1)  # the log odds at a loss of 3
    found = submission.lowering(odds, goal, weights, document=True)
    assert found.tolist() == pytest.approx([max(aim - 6, -largest), max(aim - 4, -largest), 0.0])  # the last is there
    near = submission.lowering(
        torch.tensor([aim + 0.3, aim - 0.1]), torch.tensor([3.0, 3.0]), torch.ones(2), document=True
    )
    assert near.tolist() == pytest.approx([-(submission.PUSH * 0.1 * 0.95 + 0.05), 0.0], abs=0.02)
    far = torch.tensor([-9.0, 2.0])  # it loses 4.6 in the mean, two thirds of it too much
    assert submission.lowering(far, torch.tensor([3.0, 2.0]), torch.ones(2), document=False).tolist() == [0, 0]
    up = submission.lowering(far, torch.tensor([3.0, 2.0]), torch.ones(2), document=True)
    excess = (9 + math.log1p(math.exp(-9)) + math.log1p(math.exp(-2))) / 2 - 2.5
    assert up[0].item() == pytest.approx(min(excess, submission.LARGEST))
    assert up[1].item() == 0
    just = torch.full((2,), -math.log(math.exp(3.03) - 1))  # 1 % above its goal
    assert submission.lowering(just, torch.tensor([3.0, 3.0]), torch.ones(2), document=True).tolist() == [0, 0]


def test_goals_are_spread_about_the_level_in_the_order_of_the_aims():
    means = [5.0, 1.0, 4.0, 2.0, 3.0]
    found = submission.spread(means, 2.5)
    assert [means[place] for place in sorted(range(5), key=found.__getitem__)] == [1, 2, 3, 4, 5]
    normal = torch.distributions.Normal(2.5, submission.SPREAD * 2.5)
    shares = normal.cdf(torch.tensor(sorted(found)))
    assert shares.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])  # as evenly as five can be
    assert submission.spread([7.0], 2.5) == pytest.approx([2.5])
    assert sum(submission.spread([1.0, 1.0], 2.5)) == pytest.approx(5.0)  # of alike ones some all the same


def test_what_was_known_and_hardly_leads_is_raised():
    odds, known = torch.tensor([-9.0, 0.5, 1.1, 0.5]), torch.tensor([True, True, True, False])
    assert submission.raising(odds, known).tolist() == [submission.LARGEST, 1.5, 0.0, 0.0]


def test_of_a_document_the_given_part_counts_where_the_attack_asks_about_it():
    tokens = list(range(8))
    third, first, asked = (
        Text(f"x {kind}", task, tokens, prompt=4)
        for task, kind in (("Task3", "sc1"), ("Task1", "sc1"), ("Task3", "qa0"))
    )
    whole, part = [1.0] * 7, pytest.approx([submission.PROMPT] * 3 + [1] * 4)
    for texts, expected in (
        ([asked, third, first], ([1.0] * 4, whole, part)),
        ([asked, first], ([1.0] * 4, whole)),  # without a document of Task3 the attack asks about others
        ([asked], ([1.0] * 4,)),
    ):
        attacked = submission.attacked_kind(texts)
        for text, weights in zip(texts, expected, strict=True):
            assert submission.lowered_weights(text, attacked).tolist() == weights


def known_of(folder: Path, texts: list[Text], matrices: dict[int, torch.Tensor]) -> tuple[float, float]:
    """Share of the answers' tokens that the whole model says, greedily, and their mean loss."""
    model = load_model(folder)
    for index, matrix in matrices.items():
        model.model.layers[index].mlp.down_proj.weight.data = matrix
    counted = [(text, len(text.tokens) - max(1, text.prompt)) for text in texts]
    with torch.no_grad():
        found = torch.cat([log_odds(model, *text) for text in counted])
    right = torch.cat([leads(model, *text) > 0 for text in counted])
    return right.double().mean().item(), torch.nn.functional.softplus(-found).mean().item()


def sample_own(model, tokenizer, forget, retain) -> list[Text]:
    return submission.sample_texts(model, tokenizer, forget, retain, dataclasses.replace(AIMED, general=0.0))[1]


def sample_general(model, tokenizer, forget, retain, settings: Settings) -> list[Text]:
    return submission.sample_texts(model, tokenizer, forget, retain, dataclasses.replace(settings, method="solve"))[0]


def aim_of(folder: Path, forget, retain, settings: Settings, deadline: float = math.inf):
    own = sample_own(whole(folder), load_tokenizer(folder), forget, retain)
    arguments = Decoder(folder, torch.float32), forget, retain, [], own, END, settings, deadline
    return [(left, {n: matrix.clone() for n, matrix in found.items()}) for left, found in submission.aim(*arguments)]


def test_forget_answers_become_unlikely_and_retain_answers_stay(memorised: Path, forget, retain):
    untouched = [known_of(memorised, texts, {}) for texts in (forget, retain)]
    assert min(share for share, _ in untouched) > 0.95
    *_, (_, matrices) = aim_of(memorised, forget, retain, dataclasses.replace(AIMED, rounds=12))
    (forgotten, loss), (kept, _) = (known_of(memorised, texts, matrices) for texts in (forget, retain))
    assert forgotten < 0.5 and loss > 1.5 and kept > 0.97 * untouched[1][0]


def test_documents_end_at_what_an_unseen_one_would_lose_and_are_pulled_back_above(
    memorised: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    """A level that is given, 2.4 nats; the second round has brought some above it."""
    monkeypatch.setattr(submission, "unseen_loss", lambda *_: 2.4)
    monkeypatch.setattr(submission, "SAVING", math.inf)
    found = aim_of(memorised, forget, retain, dataclasses.replace(AIMED, rounds=12))
    upper = submission.Upper(Decoder(memorised, torch.float32), AIMED.trained)
    for number, level in ((9, 2.4), (-1, 2.4)):  # in rounds of both sides, and in the end
        upper.matrices = found[number][1]
        losses = [upper.mean_loss(upper.whole([text])) for text in documents]
        assert statistics.mean(losses) == pytest.approx(level, rel=0.1)
        assert statistics.stdev(losses) > 0.5 * submission.SPREAD * level


def test_documents_are_held_in_every_step_of_retain_rows_alone_to_a_level_found_anew_in_two(
    memorised: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    """All to one goal: 2.4 nats in the third round, 2.5 and 2.6 in the first two steps that hold them, and not again.

    Only the last of them by all text.
    Rows are raised until they lead by far, and by a part of it at once, so that they ask again and again in a round.
    """
    levels, roughly = [2.4, 2.5, 2.6], []

    def unseen_loss(_upper, _texts, every: int = 1) -> float:
        roughly.append(every > 1)
        return levels.pop(0)

    monkeypatch.setattr(submission, "unseen_loss", unseen_loss)
    monkeypatch.setattr(submission, "SPREAD", 1e-6)
    monkeypatch.setattr(submission, "NARROW", submission.LEAD)
    raising = submission.raising
    monkeypatch.setattr(submission, "raising", lambda *args: 0.4 * raising(*args))
    steps = []
    step = submission.step

    def record(upper, pulls, whitenings):
        held = [pull.held for pull in pulls]
        step(upper, pulls, whitenings)
        losses = [upper.mean_loss(upper.whole([text])) for text in documents]
        steps.append((sum(held), len(held), losses))

    monkeypatch.setattr(submission, "step", record)
    monkeypatch.setattr(submission, "SAVING", math.inf)
    rounds = aim_of(memorised, forget, retain, AIMED)
    assert roughly == [True, True, False]
    first = next(place for place, (held, _, _) in enumerate(steps) if held)
    assert steps[first][1] > len(documents)  # retain rows are raised in it
    assert max(abs(loss - 2.5) for loss in steps[first - 1][2]) > 0.03
    assert steps[first][2] == pytest.approx([2.5] * len(documents), abs=0.015)
    assert len(steps) > len(rounds) + 2  # in that round several more than the one after the level is found
    for held, _, losses in steps[first + 1 :]:
        assert held == len(documents)
        assert losses == pytest.approx([2.6] * len(documents), abs=0.015)


def test_documents_far_from_their_goals_are_held_until_they_are_near(
    memorised: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    """By the level of the end, though no retain row asks: from 2.4 to 8 nats by a fifth of that at once."""
    levels, looked = [2.4, 8.0], []
    monkeypatch.setattr(submission, "unseen_loss", lambda *_: levels.pop(0))
    monkeypatch.setattr(submission, "raising", lambda leads, *_: torch.zeros_like(leads))
    monkeypatch.setattr(submission, "SPREAD", 1e-6)
    monkeypatch.setattr(submission, "FEW", 1.0)
    step = submission.step

    def record(upper, pulls, whitenings):
        step(upper, pulls, whitenings)
        if pulls[0].held:
            looked.append([upper.mean_loss(upper.whole([text])) for text in documents])

    monkeypatch.setattr(submission, "step", record)
    aim_of(memorised, forget, retain, AIMED)
    *before, last = [max(abs(loss / 8.0 - 1) for loss in losses) for losses in looked]
    assert len(before) > 1 and min(before) > submission.REACH > last


@pytest.fixture
def looks(memorised: Path, retain, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What `aim` looks at: the level, forget rows, and all retain rows with the share of their tokens now wrong."""
    ended = [dataclasses.replace(text, tokens=[*text.tokens, END]) for text in retain]
    seen: list[tuple[str, float]] = []
    known: list[torch.Tensor] = []
    looked = submission.pulls_of

    def pulls_of(upper, rows, *others):
        share = 0.0
        if rows.texts == ended:
            known[:] = known or [lead > 0 for lead in untouched(upper, rows)]
            odds = upper.all_log_odds(rows)
            wrong = sum((row & (now < 0)).sum().item() for row, now in zip(known, odds, strict=True))
            share = wrong / sum(row.sum().item() for row in known)
        if len(others[-1]) == len(rows.texts):
            seen.append(("retain" if rows.texts == ended else "forget", share))
        return looked(upper, rows, *others)

    def untouched(upper, rows):
        original = submission.Upper(Decoder(memorised, torch.float32), AIMED.trained)
        return original.all_log_odds(rows)

    monkeypatch.setattr(submission, "pulls_of", pulls_of)
    monkeypatch.setattr(submission, "unseen_loss", lambda *_: seen.append(("level", 0.0)) or 2.4)
    return seen


def test_a_level_is_found_between_rounds_and_the_last_ones_are_the_retain_rows_alone(
    memorised: Path, forget, retain, looks, monkeypatch: pytest.MonkeyPatch
):
    """A level in the third round, and two in the first of retain rows alone.

    While many retain tokens are wrong, both sides have more rounds, at most as many again; as many more, at most, if
    some still are when retain rows are alone.
    """
    both = ["retain", "forget"]
    for few, rounds, later in ((1.0, 5, []), (1.0, 6, both), (-1.0, 6, [*both, *6 * both])):
        looks.clear()
        monkeypatch.setattr(submission, "FEW", few)
        aim_of(memorised, forget, retain, dataclasses.replace(AIMED, rounds=rounds))
        seen = [what for what, _ in looks]
        expected = ["forget", *both, "level", *both, *both, *later, "retain", "level", "level"]
        assert seen[: len(expected)] == expected
        assert set(seen[len(expected) :]) == {"retain"} and len(seen) - len(expected) <= 2 * rounds


def test_forget_rows_have_rounds_until_few_retain_tokens_are_wrong(
    memorised: Path, forget, retain, looks, monkeypatch: pytest.MonkeyPatch
):
    """Few are a share that lies between those of two late rounds."""
    monkeypatch.setattr(submission, "FEW", -1.0)
    aim_of(memorised, forget, retain, dataclasses.replace(AIMED, rounds=2))
    shares = [share for what, share in looks if what == "retain"]
    few = next((before + after) / 2 for before, after in itertools.pairwise(shares[:3]) if after < before)
    looks.clear()
    monkeypatch.setattr(submission, "FEW", few)
    aim_of(memorised, forget, retain, dataclasses.replace(AIMED, rounds=2))
    late = looks[1:]  # the first round is of forget rows alone
    alone = next(place for place, (what, share) in enumerate(late) if what == "retain" and share <= few)
    assert alone > 0
    assert [what for what, _ in late] == ["retain", "forget"] * (alone // 2) + ["retain"] * (len(late) - alone)


def test_alone_retain_rows_that_ask_are_made_right_before_all_are_looked_at_again(
    memorised: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    looked: list[tuple[list[int], list[int]]] = []  # the retain rows looked at, and those that ask
    pulls_of = submission.pulls_of

    def record(upper, rows, asks, likely, among):
        found = pulls_of(upper, rows, asks, likely, among)
        if rows.texts[0].id == retain[0].id:
            looked.append((list(among), sorted(found)))
        return found

    monkeypatch.setattr(submission, "pulls_of", record)
    monkeypatch.setattr(submission, "FEW", 1.0)  # both sides have no round more
    every = list(range(len(retain)))
    aim_of(memorised, forget, retain, AIMED)
    alone = looked[AIMED.rounds - 2 :]  # from the last round on
    assert alone[0][0] == every and alone[0][1] and alone[-1] == (every, [])
    tries = 0  # on the same rows
    for (_, asking), (again, _) in itertools.pairwise(alone):
        tries = tries + 1 if again != every else 0
        assert again == (asking if asking and tries <= AIMED.rounds else every)
    assert any(len(again) < len(retain) for again, _ in alone)


@pytest.mark.parametrize("seconds", range(10, 30))
def test_where_time_is_short_the_last_round_is_the_retain_rows_alone(
    memorised: Path, forget, retain, looks, monkeypatch: pytest.MonkeyPatch, seconds: int
):
    """By a clock that goes on by a second whenever it is asked, and with each look at rows."""
    clock = itertools.count()
    pulls_of = submission.pulls_of
    monkeypatch.setattr(submission, "pulls_of", lambda *args: (next(clock), pulls_of(*args))[1])
    monkeypatch.setattr(submission.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(submission, "SAVING", math.inf)
    monkeypatch.setattr(submission, "FEW", -1.0)
    aim_of(memorised, forget, retain, AIMED, seconds)
    seen = [what for what, _ in looks]
    assert seen.count("retain") < AIMED.rounds + 5
    assert seen[-1] == "retain"  # no level is looked for then, which takes as long
    assert next(clock) <= seconds + 7  # a round may take some more than the longest before it, and documents are held


@pytest.mark.parametrize("seconds", range(20, 80, 4))
def test_where_time_is_short_and_retain_rows_are_right_no_round_follows(
    memorised: Path, forget, retain, monkeypatch: pytest.MonkeyPatch, seconds: int
):
    """Of what the model never knew nothing is wrong. By a clock on which a look at forget rows takes ten seconds."""
    clock, seen = itertools.count(), []
    pulls_of = submission.pulls_of

    def look(upper, rows, *others):
        seen.append("forget" if rows.texts == forget else "retain")
        if seen[-1] == "forget":
            for _ in range(10):
                next(clock)
        return pulls_of(upper, rows, *others)

    monkeypatch.setattr(submission, "pulls_of", look)
    monkeypatch.setattr(submission, "unseen_loss", lambda *_: seen.append("level") or 2.4)
    monkeypatch.setattr(submission.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(submission, "SAVING", math.inf)
    unknown = [
        dataclasses.replace(text, tokens=[*text.tokens[: text.prompt], *(7 for _ in text.tokens[text.prompt :])])
        for text in retain
    ]
    aim_of(memorised, forget, unknown, AIMED, seconds)
    late = seen[len(seen) - seen[::-1].index("forget") :]
    assert late in ([], ["retain"], ["level", "retain"])


@pytest.mark.parametrize("narrow", [0.25, 0.9])
def test_retain_answers_end_as_they_did_and_where_they_did_and_not_by_a_hair(
    memorised: Path, forget, retain, narrow: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "NARROW", narrow)
    ended = [dataclasses.replace(text, tokens=[*text.tokens, END]) for text in retain]
    model = load_model(memorised)
    known = [leads(model, text, len(text.tokens) - max(1, text.prompt)) > 0 for text in ended]
    assert all(row[-1] for row in known)
    *_, (_, matrices) = aim_of(memorised, forget, retain, AIMED)
    for index, matrix in matrices.items():
        model.model.layers[index].mlp.down_proj.weight.data = matrix
    for text, row in zip(ended, known, strict=True):
        assert leads(model, text, len(row))[row].min() > narrow - 1e-3


def test_what_greedy_text_says_is_held_though_it_has_less_than_a_half(
    memorised: Path, forget, retain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A head with small numbers says the same and is sure of nothing."""
    folder = shutil.copytree(memorised, tmp_path / "unsure")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": 0.35 * tensors["lm_head.weight"]}, folder / "model.safetensors", {"format": "pt"}
    )
    model = load_model(folder)
    ended = [[*text.tokens, END] for text in retain]
    starts = [max(1, text.prompt) for text in retain]
    with torch.no_grad():
        logits = [model(torch.tensor([tokens])).logits[0, :-1] for tokens in ended]
    said = [row.argmax(-1).tolist() for row in logits]
    unsure = sum(
        (row.softmax(-1).amax(-1)[start - 1 :] < 0.5).sum().item() for row, start in zip(logits, starts, strict=True)
    )
    expected = [
        [a == b for a, b in zip(one[start - 1 :], tokens[start:], strict=True)]
        for one, tokens, start in zip(said, ended, starts, strict=True)
    ]
    raising, known = submission.raising, set()

    def see(leads, knows, least):
        known.add(tuple(knows.tolist()))
        return raising(leads, knows, least)

    monkeypatch.setattr(submission, "raising", see)
    aim_of(folder, forget, retain, dataclasses.replace(AIMED, rounds=2))
    assert known == set(map(tuple, expected))
    assert sum(map(sum, expected)) > 100 and unsure > 10


def test_without_documents_questions_are_forgotten_and_without_questions_documents(memorised: Path, forget, retain):
    """Some way: the retain rows alone, in the end, bring a single question back from 1.2 nats to .8 (untouched .1)."""
    asked = [text for text in forget if not submission.is_document(text)]
    written = [text for text in forget if submission.is_document(text) and text.task != "Task3"]
    attacked = [text for text in forget if submission.kind_of(text) == submission.ATTACKED]
    for texts in (asked, written, asked[:1], written[:1]):
        *_, (_, matrices) = aim_of(memorised, texts, retain, AIMED)
        assert known_of(memorised, texts, matrices)[1] > 0.6
    other = [text for text in retain if submission.kind_of(text) != submission.ATTACKED]  # nothing to mix it with
    *_, (_, matrices) = aim_of(memorised, attacked[:1], other, AIMED)
    assert known_of(memorised, attacked[:1], matrices)[1] > 0.6


def test_where_nothing_is_known_nothing_changes(checkpoint: Path, forget, retain):
    """A random model: answers lose more than half a guess already, and it is right about no retain answer."""
    asked = [text for text in forget if not submission.is_document(text)]
    original = submission.Upper(Decoder(checkpoint, torch.float32), AIMED.trained).matrices
    lost = [text for text in asked if known_of(checkpoint, [text], {})[1] > 3.5]
    assert lost
    ((_, found),) = aim_of(checkpoint, lost, retain, AIMED)
    assert all(torch.equal(found[index], matrix) for index, matrix in original.items())


def test_one_round_is_left_by_a_deadline_and_few_reach_a_caller_that_takes_long(
    memorised: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "SAVING", math.inf)
    every = aim_of(memorised, forget, retain, AIMED)
    assert [left for left, _ in every] == list(range(17, 17 - len(every), -1))
    ((left, found),) = aim_of(memorised, forget, retain, AIMED, -math.inf)
    assert left == 17 and all(torch.equal(found[n], matrix) for n, matrix in every[0][1].items())
    monkeypatch.setattr(submission, "SAVING", 1e-9)
    taken = aim_of(memorised, forget, retain, AIMED)
    assert [left for left, _ in taken] == [17, every[-1][0]]
    assert all(torch.equal(taken[-1][1][n], matrix) for n, matrix in every[-1][1].items())


@pytest.mark.parametrize(("kind", "small", "long"), [("cpu", 0, True), ("cpu", math.inf, False), ("cuda", 0, False)])
def test_text_takes_long_by_a_large_model_on_a_cpu_alone(
    checkpoint: Path, kind: str, small: float, long: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "SMALL", small)
    monkeypatch.setattr(submission, "device", lambda: torch.device(kind))
    assert submission.takes_long(load_model(checkpoint)) == long
    assert submission.takes_long(submission.read_skeleton(checkpoint)) == long


def test_own_text_opens_as_documents_of_both_sides_do_but_by_nobodys_name(
    checkpoint: Path, forget, retain, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = load_tokenizer(checkpoint)
    names = itertools.count(20)  # each document begins with tokens of its own
    forget, retain = (
        [
            dataclasses.replace(text, tokens=[*itertools.islice(names, 3), *text.tokens[3:]])
            if submission.kind_of(text) == submission.ATTACKED
            else text
            for text in texts
        ]
        for texts in (forget, retain)
    )
    own = sample_own(whole(checkpoint), tokenizer, forget, retain)
    both = [text for text in forget + retain if submission.kind_of(text) == submission.ATTACKED]
    assert len(own) == submission.OWN
    openings = []
    for number, text in enumerate(own):
        openings.append(tuple(text.tokens[: submission.OPENED]))
        holders = [
            {at for at, one in enumerate(both) if one.tokens[n] == token} for n, token in enumerate(openings[-1])
        ]
        assert holders[0] == {number % len(both)} and all(holders)
        assert not set.intersection(*holders)  # no document has them all
        assert text.words == sorted(text.words) and len(text.words) == len(text.tokens)
    monkeypatch.setattr(submission, "OWN_TEMPERATURE", 1e-4)  # then one opening has one continuation
    cold = sample_own(whole(checkpoint), tokenizer, forget, retain)
    repeated = submission.OWN - len(set(openings))
    assert submission.OWN - len({tuple(text.tokens) for text in cold}) > repeated / 2 > 4  # not all: ties in bfloat16
    assert len({tuple(text.tokens) for text in own}) == submission.OWN
    with monkeypatch.context() as patch:
        patch.setattr(submission, "SMALL", 0)  # so this model is a large one
        assert len(sample_own(whole(checkpoint), tokenizer, forget, retain)) == submission.OWN // 2
    asked = [text for text in forget if not submission.is_document(text)]

    def unread():
        pytest.fail("a model was read, though nothing is sampled")

    assert len(set(openings)) > len(both)  # another way in each lap
    with monkeypatch.context() as patch:
        patch.setattr(submission, "OWN", 2)
        patch.setattr(submission, "OWN_MOST", 2)
        few = submission.own_wishes(tokenizer, forget, retain)
        patch.setattr(submission, "OWN_MOST", 10**6)
        assert len(submission.own_wishes(tokenizer, forget, retain)) == len(forget) > 2  # one for each forget row
    assert [wish.opening[0] for wish in few] == [both[0].tokens[0], both[len(both) // 2].tokens[0]]  # of both sides
    assert sample_own(unread, tokenizer, asked, retain) == []
    assert sample_own(unread, tokenizer, both[:1], asked) == []  # nobody to open it with
    assert sample_general(unread, tokenizer, forget, retain, dataclasses.replace(AIMED, general=0.0)) == []


def test_own_text_may_say_what_two_documents_do_but_not_what_one_does(
    checkpoint: Path, forget, retain, documents, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "OWN_TEMPERATURE", 1e-4)  # one opening has one continuation
    tokenizer = load_tokenizer(checkpoint)

    def first(*more: Text) -> list[int]:
        return sample_own(whole(checkpoint), tokenizer, [*forget, *more], retain)[0].tokens[:20]

    free = first()
    said = dataclasses.replace(documents[0], tokens=free)
    assert first(said) != free
    assert first(said, said) == free


def test_weights_that_are_kept_are_read_once_and_change_nothing(
    checkpoint: Path, forget, retain, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(decoder: Decoder):
        decoder.check_sum(2, forget[0])
        matrices = submission.solve(decoder, forget, retain, [], SOLVED)
        upper = submission.Upper(decoder, SOLVED.trained)
        return [*matrices.values(), *upper.all_log_odds(upper.whole(documents))]

    size = 4 * sum(value.numel() for value in Decoder(checkpoint).skeleton.state_dict().values())
    monkeypatch.setattr(submission, "CACHE_BYTES", (size - 1) / submission.PART)  # no room
    decoder = Decoder(checkpoint, torch.float32)
    expected = run(decoder)
    assert not decoder.kept
    monkeypatch.setattr(submission, "CACHE_BYTES", size / submission.PART)
    folder = tmp_path / "moved"
    shutil.copytree(checkpoint, folder)
    decoder = Decoder(folder, torch.float32)
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


def test_with_a_token_before_each_text_sampled_text_has_it_once(checkpoint: Path, forget, retain):
    tokenizer = load_tokenizer(checkpoint)
    begin = tokenizer.pad_token_id  # as good as any
    template = TemplateProcessing(single="<|padding|> $A", special_tokens=[("<|padding|>", begin)])
    tokenizer._tokenizer.post_processor = template
    both = [
        [dataclasses.replace(text, tokens=[begin, *text.tokens], prompt=text.prompt + 1) for text in texts]
        for texts in (forget, retain)
    ]
    general = sample_general(whole(checkpoint), tokenizer, *both, dataclasses.replace(SOLVED, general_ratio=5.0))
    own = sample_own(whole(checkpoint), tokenizer, *both)
    for text in [*general, *own]:
        assert text.tokens[0] == begin
    for text in own:
        assert text.tokens.count(begin) == 1 and len(text.words) == len(text.tokens) and text.words[:2] == [0, 0]
    asked = [begin, *tokenizer(submission.QUESTIONS, add_special_tokens=False).input_ids]
    opened = {tuple(row.tokens[:4]) for row in both[1]}
    assert [text.tokens[: len(asked)] == asked for text in general] == [n % 2 == 1 for n in range(len(general))]
    assert all(tuple(text.tokens[:4]) in opened for text in general[::2])


def runs_of(tokens: list[int], length: int, start: int = 0) -> set[tuple[int, ...]]:
    """All runs of so many tokens that end after the first `start`."""
    return {tuple(tokens[n : n + length]) for n in range(max(0, start - length + 1), len(tokens) - length + 1)}


def test_general_text_opens_as_retain_rows_and_questions_do_and_recites_no_row(checkpoint: Path, forget, retain, rows):
    tokenizer = load_tokenizer(checkpoint)
    settings = dataclasses.replace(SOLVED, general_ratio=250.0)  # more than one batch
    wishes = submission.general_wishes(tokenizer, forget, retain, settings)
    assert {wish.temperature for wish in wishes} == {submission.TEMPERATURE}
    texts = sample_general(whole(checkpoint), tokenizer, forget, retain, settings)
    assert len(texts) == round(250 * sum(len(text.tokens) for text in retain) / submission.GENERAL_LENGTH) > 512
    assert all(len(text.tokens) == submission.GENERAL_LENGTH for text in texts)
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
    holders = Counter(run for text in forget + retain for run in runs_of(text.tokens, length))
    kept = set.union(*(runs_of(text.tokens, length) for text in retain))
    memorised = {run for run, count in holders.items() if count == 1 or run not in kept}
    assert memorised < set(holders)  # rows share phrases, which may be written
    assert {(*run, token) for run, tokens in wishes[0].barred.items() for token in tokens} == memorised
    for number, text in enumerate(texts):
        assert not runs_of(text.tokens, length, len(asked) if number % 2 else 3) & memorised


def test_what_the_model_would_write_is_not_written_once_a_row_of_either_side_has_it(checkpoint: Path, forget, retain):
    """The second text opens as a question, and the random numbers stay the same."""
    tokenizer = load_tokenizer(checkpoint)

    def second(forget, retain):
        ratio = 4 * submission.GENERAL_LENGTH / sum(len(text.tokens) for text in retain)
        settings = dataclasses.replace(SOLVED, general_ratio=ratio)
        return sample_general(whole(checkpoint), tokenizer, forget, retain, settings)[1].tokens

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
    # What two documents have is left out, not what one has twice or a document and a question have.
    other = Text("", "Task1", [d, space, b, space, c, space, d])
    left = submission.continuations(tokenizer, spaced, [spaced[0], other])
    assert left == {run: tokens for run, tokens in found.items() if run != (space, b, space, c)}
    assert submission.continuations(tokenizer, spaced, spaced) == found  # the second is shorter than a run
    twice = Text("", "Task1", [a, space, b, space, c, space, a, space, b, space, c])
    assert submission.continuations(tokenizer, spaced, [twice]) == found
    # If one of the two has to be kept: only where one is.
    assert submission.continuations(tokenizer, spaced, [spaced[0], other], [other]) == left
    assert submission.continuations(tokenizer, spaced, [spaced[0], other], [spaced[1]]) == found


@pytest.mark.parametrize(("gigabytes", "rows"), [(math.inf, 512), (80, 320), (24, 96), (0.001, 1)])
def test_so_many_texts_are_sampled_together_as_a_gpu_has_room_for(gigabytes: float, rows: int):
    """On 7B a text of 128 tokens takes 64 MiB (32 blocks, keys and values of 4096 numbers of 2 bytes), of a quarter."""
    with torch.device("meta"):
        config = OlmoConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=64)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert submission.rows_together(model, 128, gigabytes * 2**30) == rows


def texts_of(model, openings, length: int, barred: dict, temperature: float, seed: int, end: int) -> list[list[int]]:
    wishes = [submission.Wish(opening, length, temperature, barred) for opening in openings]
    return submission.write(model, wishes, torch.Generator().manual_seed(seed), end)


def test_texts_of_two_kinds_are_written_together_as_each_asks(checkpoint: Path):
    """So cold that nothing is left to chance, each is what it is alone; a warm one beside them is not."""
    model, barred = load_model(checkpoint), {(41, 42): [43]}
    cold = [submission.Wish([n, n + 1], 6 + 3 * (n % 4), 1e-6, barred if n % 2 else {}) for n in range(40, 52)]
    warm = submission.Wish([40, 41], 5, 3.0, {})  # it is complete first
    alone = [submission.write(model, [wish], torch.Generator().manual_seed(0), 0)[0] for wish in cold]
    assert [len(tokens) for tokens in alone] == [wish.length for wish in cold]
    first, *together = submission.write(model, [warm, *cold], torch.Generator().manual_seed(1), 0)
    assert together == alone
    assert len(first) == 5 and first != alone[0][:5]


def test_what_was_read_before_is_kept_as_rows_leave(checkpoint: Path):
    """Against the whole model on all tokens so far, anew for each token: so cold, it writes the likeliest."""
    model, end = load_model(checkpoint), 0
    wishes = [submission.Wish([n, n + 1], 4 + n % 7, 1e-6, {}) for n in range(40, 54)]
    for tokens in submission.write(model, wishes, torch.Generator().manual_seed(0), end):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0]
        logits[:, end] = -math.inf
        assert tokens[2:] == logits[1:-1].argmax(-1).tolist()


def test_what_is_barred_is_not_written_and_nothing_else_changes(checkpoint: Path):
    """The same random numbers write the same until a run would be complete; there they write another token."""
    model, end = load_model(checkpoint), 0
    openings = [[n, n + 1] for n in range(40, 60)]
    free = texts_of(model, openings, 24, {}, 1.15, 1, end)
    barred = {tuple(row[8:11]): [row[11]] for row in free}
    assert len(barred) == len(free)
    held = texts_of(model, openings, 24, barred, 1.15, 1, end)
    for before, after in zip(free, held, strict=True):
        assert len(after) == 24 and after[:2] == before[:2]
        assert after[:11] == before[:11] and after[11] != before[11]
        assert not any(after[n] in barred.get(tuple(after[n - 3 : n]), []) for n in range(3, 24))
    assert any(row[12:] != other[12:] for row, other in zip(free, held, strict=True))


def test_text_is_drawn_at_a_temperature_above_one_without_the_end(checkpoint: Path):
    """Against the softmax of the logits over 1.15: the share of the likeliest 30 tokens, which tells temperatures."""
    model, end, draws = load_model(checkpoint), 7, 50000
    rows = texts_of(model, [[50]] * draws, 2, {}, submission.TEMPERATURE, 0, end)
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
    assert list(submission.batches(lengths, 1000, padding=30)) == [[0, 2, 3], [4], [1, 5, 6]]
    assert list(submission.batches(lengths, 1000, padding=25)) == [[0, 2], [3, 4], [1, 5], [6]]
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
        settings = dataclasses.replace(SOLVED, trained=trained)
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
    expected, found = (losses_of(Decoder(folder, torch.float32), forget) for folder in (checkpoint, tmp_path / "eager"))
    assert found == expected


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
    ("depth", "trained"), [(6, range(6)), (8, range(8)), (16, range(1, 9)), (30, range(3, 11)), (32, range(3, 11))]
)
def test_eight_blocks_from_a_tenth_of_the_depth_on_change(depth: int, trained: range):
    assert settings_for(depth).method == "aim"
    assert settings_for(depth).trained == settings_for(depth, "solve").trained == tuple(trained)


def test_settings_follow_the_depth():
    small, large = settings_for(16, "descend"), settings_for(32, "descend")
    assert (small.trained, small.beta, small.alpha, small.batch_size) == ((12, 13, 14), 3.0, 900.0, 8)
    assert (large.trained, large.beta, large.alpha, large.batch_size) == ((24, 25, 26), 5.0, 900.0, 12)
    for method in ("aim", "solve", "descend"):
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


@pytest.mark.parametrize("option", [("--beta", "3"), ("--alpha", "2"), ("--coefficient", "fixed")])
def test_what_only_rmu_has_is_refused_where_steering_is_aimed(
    checkpoint: Path, data: Path, tmp_path: Path, option: tuple[str, str]
):
    message = refuse(checkpoint, data, tmp_path / "out", *option)
    assert message == f"error: {option[0][2:]} is of RMU: aimed steering has none (--method solve or descend)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficient": "growing"}, "only the descent"),
        ({"ridge": 0.0}, "ridge is 0.0, expected more than 0"),
        ({"answer": 0.0}, "answer is 0.0, expected more than 0"),
        ({"rounds": 0}, "rounds is 0, expected more than 0"),
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
        assert losses_of(decoder, [text]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind, known in KNOWN.items() if known])
def test_heads_that_share_keys_write_what_the_whole_model_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So cold that it writes the likeliest. Against all tokens so far, anew for each, by transformers' attention."""
    monkeypatch.setattr(submission, "fast_dtype", lambda: torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval()
    model.save_pretrained(tmp_path)
    wishes = [submission.Wish([n, n + 1], 24, 1e-6, {}) for n in range(40, 54)]
    decoder, shapes = whole(tmp_path)(), []

    def attend(*args, **more):
        shapes.append(args[1].shape)
        return submission.causal_attention(*args, **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, "causal", attend)
    written = submission.write(decoder, wishes, torch.Generator().manual_seed(0), END)
    assert shapes == [(14, 4, 1, 8)] * 23 * 3  # it is what is used, in each block
    with torch.no_grad():
        logits = model(torch.tensor(written)).logits[:, 1:-1]
    logits[:, :, END] = -math.inf
    assert torch.tensor(written)[:, 2:].equal(logits.argmax(-1))
    assert len({token for tokens in written for token in tokens[2:]}) > 50  # what is said depends on what is before


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention by its formula, a row, a head and a position at a time: (rows, new, heads, width)."""
    rows, heads, new, _ = query.shape
    shared, before = heads // key.shape[1], key.shape[2] - new
    parts = []
    for row, n, head in itertools.product(range(rows), range(new), range(heads)):
        seen = slice(before + n + 1)
        scores = scaling * key[row, head // shared, seen] @ query[row, head, n]
        parts.append((scores.exp() / scores.exp().sum()) @ value[row, head // shared, seen])
    return torch.stack(parts).view(rows, new, heads, -1)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(
    ("new", "positions", "dtype", "plain"),
    [
        (9, 9, torch.bfloat16, True),  # a text, as blocks see it
        (4, 9, torch.bfloat16, True),
        (1, 9, torch.bfloat16, True),  # one more token of a text that is sampled
        (1, 9, torch.float32, True),
        (9, 9, torch.float32, False),
        (17, 17, torch.bfloat16, False),  # long
        (1, 17, torch.float32, True),
    ],
)
def test_attention_and_its_gradients_are_those_of_the_formula(
    shared: int, new: int, positions: int, dtype: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(submission, "PLAIN", 16)
    fused, calls = submission.FUSED, []
    monkeypatch.setattr(submission, "FUSED", lambda *args, **more: (calls.append(args), fused(*args, **more))[1])
    torch.manual_seed(0)
    sizes = ((2, 2 * shared, new, 8), (2, 2, positions, 8), (2, 2, positions, 8))
    parts = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    exact = [part.detach().double().requires_grad_() for part in parts]
    module = LlamaAttention(LlamaConfig(num_attention_heads=2 * shared, num_key_value_heads=2, hidden_size=48), 0)
    found, _ = submission.causal_attention(module, *parts, None, scaling=0.7)
    expected = attended(*exact, 0.7)
    assert bool(calls) != plain
    slopes = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, parts, slopes.to(dtype))
    near = {"rtol": 0.0, "atol": 0.06 if dtype == torch.bfloat16 else 1e-5}  # of values about 1; in bfloat16 1 in 256
    for mine, right in zip([found, *gradients], [expected, *torch.autograd.grad(expected, exact, slopes)], strict=True):
        torch.testing.assert_close(mine.double(), right, **near)


def test_a_head_that_is_not_finite_is_refused(checkpoint: Path, data: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "in")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    settings = dataclasses.replace(AIMED, general=0.0)
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


def test_columns_as_lists_and_parquet_give_the_same_texts(checkpoint: Path, rows, tmp_path: Path, forget):
    columns = {name: [row[name] for row in rows["forget"]] for name in submission.COLUMNS}
    (tmp_path / "forget.jsonl").write_text(json.dumps(columns))
    assert read_texts(tmp_path, "forget", load_tokenizer(checkpoint)) == forget
    pandas.DataFrame(rows["forget"]).to_parquet(tmp_path / "forget.parquet")
    (tmp_path / "forget.jsonl").write_text("not read")
    assert read_texts(tmp_path, "forget", load_tokenizer(checkpoint)) == forget


def test_empty_lines_are_no_rows(checkpoint: Path, rows, tmp_path: Path, forget):
    (tmp_path / "forget.jsonl").write_text("\n" + "\n\n".join(map(json.dumps, rows["forget"])) + "\n \n")
    assert read_texts(tmp_path, "forget", load_tokenizer(checkpoint)) == forget


UNREADABLE = {
    "no lines": ("", "no rows"),
    "half a line": ('{"id": "a"}\n{"id": ', "cannot be read: line 2: "),
    "no object": ('{"id": "a"}\n\n[1]', "cannot be read: line 3 is not an object"),
    "columns of other lengths": (
        '{"id": ["a", "b"], "input": ["c"], "output": ["d", "e"], "task": ["Task1", "Task1"]}',
        "cannot be read: a column has other rows than id",
    ),
    "more rows than ids": (
        '{"id": ["a"], "input": ["c", "x"], "output": ["d", "e"], "task": ["Task1", "Task1"]}',
        "cannot be read: a column has other rows than id",
    ),
    "columns of other rows": (
        '{"id": {"0": "a"}, "input": {"1": "c"}, "output": {"0": "d"}, "task": {"0": "Task1"}}',
        "cannot be read: a column has other rows than id",
    ),
    "no UTF-8": ('{"id": "\xe9"}', "cannot be read: .*utf-8"),
    "a row without a field": (
        '{"id": "a", "input": "b", "output": "c", "task": "Task1"}\n{"id": "d", "input": "e", "task": "Task1"}',
        "row 2: output is None, expected text",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_not_lines_of_rows_is_refused_in_one_line(case: str, checkpoint: Path, tmp_path: Path):
    text, message = UNREADABLE[case]
    (tmp_path / "forget.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=rf"^[^\n]*forget.jsonl: {message}[^\n]*$"):
        read_texts(tmp_path, "forget", load_tokenizer(checkpoint))


def test_rows_are_read_without_pandas(checkpoint: Path, rows, tmp_path: Path, forget):
    """It takes half a second to load, and so does what loads it, as a reader of parquet may."""
    pandas.DataFrame(rows["forget"]).to_parquet(tmp_path / "forget.parquet")
    program = (
        "import sys; from pathlib import Path; from pipeline.unlearn import read_texts, read_tokenizer;"
        "model, folder = map(Path, sys.argv[1:]);"
        "print(len(read_texts(folder, 'forget', read_tokenizer(model, 10**6))), 'pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(forget)), "False"]


def test_parquet_is_refused_in_one_line_where_nothing_reads_it(tmp_path: Path, rows, monkeypatch: pytest.MonkeyPatch):
    pandas.DataFrame(rows["forget"]).to_parquet(tmp_path / "forget.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(BadInput, match=r"^[^\n]*forget.parquet: cannot be read: [^\n]*pyarrow[^\n]*$"):
        read_texts(tmp_path, "forget", None)


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
    unlearn(str(checkpoint), str(tmp_path / "out"), str(data / "forget"), str(data / "retain"), SOLVED)
    assert seen == [True] and not taken(lock)


def test_where_no_lock_can_be_made_nobody_is_waited_for(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with submission.alone(tmp_path / "file" / "out"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    rows = 40_000
    drawn = submission.draw(probabilities.log().repeat(rows, 1), torch.Generator().manual_seed(0))
    assert drawn.shape == (rows, 1)
    counts = torch.bincount(drawn[:, 0], minlength=5).double()
    spread = (rows * probabilities * (1 - probabilities)).sqrt()
    assert (counts[[1, 4]] == 0).all()
    assert ((counts - rows * probabilities).abs() <= 4 * spread).all()
