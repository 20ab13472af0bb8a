"""The peers' objectives against their formulas, and each method from end to end on a very small model."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.lib.records import write_jsonl
from pipeline.lib.stage import BadInput, run
from pipeline.methods import (
    early_mlp,
    gradient_ascent,
    gradient_difference,
    kl_minimisation,
    npo,
    npo_low_rank,
    npo_merged,
    random_answer,
    sugd,
)
from pipeline.methods.loop import (
    TOFU,
    Job,
    Settings,
    Step,
    answer_losses,
    begin,
    both_answers,
    clock,
    descend,
    epochs_within,
    frozen,
    scaled,
    scaled_blocks,
    scaled_lora,
    shuffled,
    train_only,
)
from pipeline.unlearn import Text, read_texts
from tests.conftest import make_rows

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = lambda name: True  # noqa: E731
BLOCKS = lambda *wanted: lambda name: any(f"layers.{index}." in name for index in wanted)  # noqa: E731

# Which tensors may change in a model of six blocks, and where the loss of the forget and the retain answers goes.
METHODS: dict[str, tuple[Callable[[str], bool], str, str]] = {
    "gradient_ascent": (ALL, "up", "any"),
    "gradient_difference": (ALL, "up", "down"),
    "kl_minimisation": (ALL, "up", "any"),
    "npo": (ALL, "up", "down"),
    "sugd": (BLOCKS(4, 5), "any", "down"),  # the last quarter
    "npo_merged": (lambda name: any(f"{part}.weight" in name for part in LINEAR), "up", "down"),
    "random_answer": (ALL, "any", "down"),
    "early_mlp": (lambda name: BLOCKS(0, 1)(name) and ".mlp." in name, "up", "any"),  # the first 6/16
    "npo_low_rank": (lambda name: "q_proj" in name or "v_proj" in name, "up", "any"),
    "random_weights": (ALL, "any", "any"),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows a side, so that a method takes a second."""
    folder = tmp_path_factory.mktemp("few")
    for side in ("forget", "retain"):
        write_jsonl(folder / side / f"{side}.jsonl", make_rows(side, documents=1))
    return folder


@pytest.fixture
def job(checkpoint: Path, few: Path) -> Job:
    """The very small model and the rows, with no haste."""
    args = Namespace(model=checkpoint, forget=few / "forget", retain=few / "retain", seed=0, strength=1.0)
    return begin(args, clock() + 3600)


def run_on(checkpoint: Path, few: Path, out: Path, name: str, *flags: str) -> dict[str, torch.Tensor]:
    module = importlib.import_module(f"pipeline.methods.{name}")
    module.main([str(checkpoint), str(out), str(few / "forget"), str(few / "retain"), *flags])
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def made_by(checkpoint: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the folder that a method made; each method is run once."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "out"
            run_on(checkpoint, few, folders[name], name, "--seed", "7")  # by 0 the checkpoint was drawn
        return folders[name]

    return folder


def answer_loss(model: torch.nn.Module, text: Text) -> torch.Tensor:
    """Each answer token's loss, of a row alone and by the definition: (answer tokens,)."""
    logits = model(input_ids=torch.tensor([text.tokens])).logits[0]
    places = range(text.prompt, len(text.tokens))
    return torch.stack([-logits[place - 1].log_softmax(-1)[text.tokens[place]] for place in places])


def log_probabilities(model: torch.nn.Module, text: Text) -> torch.Tensor:
    """Of the whole vocabulary, where the row's answer tokens are predicted: (answer tokens, vocabulary)."""
    return model(input_ids=torch.tensor([text.tokens])).logits[0, text.prompt - 1 : -1].log_softmax(-1)


def mean_loss(folder: Path, few: Path, side: str) -> float:
    """CE of a side's answers: the mean over tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = read_texts(few / side, side, AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        return torch.cat([answer_loss(model, text) for text in texts]).mean().item()


def text(number: int, tokens: list[int] | None = None, prompt: int = 1) -> Text:
    return Text(f"row{number}qa0", "Task1", tokens or [number, number + 1], prompt)


# ---- the loop ----


def test_only_answers_are_predicted_and_padding_changes_nothing(job: Job):
    step = Step(job.forget[:3], job.retain[:4])
    forget, retain = both_answers(job.model, step)
    for some, rows in ((forget, step.forget), (retain, step.retain)):
        alone = [answer_loss(job.model, row) for row in rows]
        assert some.lengths == [len(one) for one in alone]
        torch.testing.assert_close(some.losses(), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_frozen_values_are_kept_by_row_and_outlive_the_weights(job: Job):
    before = frozen(job.model, job.forget, answer_losses)
    expected = {row.id: answer_loss(job.model, row) for row in job.forget}
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.zero_()
    assert before.keys() == expected.keys()
    for key, value in before.items():
        torch.testing.assert_close(value, expected[key].detach(), atol=1e-5, rtol=1e-5)


def test_an_epoch_has_every_forget_row_once_and_retain_rows_evenly(job: Job):
    settings = Settings(learning_rate=1.0, epochs=5, forget_rows=4, retain_rows=5)
    epochs = shuffled(job, settings)
    assert [[len(step.forget) for step in epoch] for epoch in epochs] == [[4, 2]] * 5
    for epoch in epochs:
        assert sorted(row.id for step in epoch for row in step.forget) == sorted(row.id for row in job.forget)
    seen = [row.id for epoch in epochs for step in epoch for row in step.retain]
    assert len(seen) == 50
    for n in range(0, 48, 6):  # six retain rows: each is seen once before any is seen again
        assert sorted(seen[n : n + 6]) == sorted(row.id for row in job.retain)
    orders = {tuple(row.id for step in epoch for row in step.forget) for epoch in epochs}
    assert len(orders) > 1
    assert epochs == shuffled(job, settings)


def moved(job: Job, settings: Settings, phases: int, steps: int) -> float:
    """How far `descend` moves each weight of the head down a constant slope; AdamW goes the learning rate a step."""
    parameters = train_only(job.model, lambda name: name == "lm_head.weight")
    before = parameters[0].detach().clone()
    epoch = [Step(job.forget[:1], job.retain[:1])] * steps
    descend(job, parameters, settings, [[epoch] * settings.epochs] * phases, lambda _: parameters[0].sum())
    distance = before - parameters[0].detach()
    torch.testing.assert_close(distance, distance.mean().expand_as(distance), atol=2e-5, rtol=1e-3)
    return distance.mean().item()


@pytest.mark.parametrize("phases", [1, 3])
def test_the_learning_rate_falls_linearly_and_starts_anew_with_each_phase(job: Job, phases: int):
    # Two epochs of 5 steps: 1 + .9 + .8 + ... + .1 = 5.5 times the learning rate, in every phase.
    assert moved(job, Settings(0.01, 2, 1, 1), phases, 5) == pytest.approx(phases * 0.055, rel=1e-3)


def test_a_warm_up_of_one_epoch_then_linear_or_constant(job: Job):
    # Three epochs of 4 steps: 0, 1/4, 2/4, 3/4, then 8/8, 7/8, ..., 1/8 or eight times 1.
    falling, constant = Settings(0.01, 3, 1, 1, warmup=1), Settings(0.01, 3, 1, 1, warmup=1, decay=False)
    assert moved(job, falling, 1, 4) == pytest.approx(0.01 * (1.5 + 4.5), rel=1e-3)
    assert moved(job, constant, 1, 4) == pytest.approx(0.01 * (1.5 + 8), rel=1e-3)


def test_measuring_the_time_of_a_step_moves_nothing_and_the_deadline_stops(job: Job):
    weights = copy.deepcopy(job.model.state_dict())
    late = Job(**{**vars(job), "deadline": clock() - 1})
    with pytest.raises(BadInput, match="--minutes is too short"):
        descend(late, train_only(job.model, ALL), TOFU, [shuffled(job, TOFU)], lambda _: torch.zeros(()))
    assert all(torch.equal(value, weights[key]) for key, value in job.model.state_dict().items())


def test_a_deadline_after_the_first_step_of_a_warm_up_is_refused(job: Job):
    parameters = train_only(job.model, lambda name: name == "lm_head.weight")
    short = Job(**{**vars(job), "deadline": clock() + 2})

    steps = []

    def slow(step: Step) -> torch.Tensor:
        steps.append(step)
        while clock() <= short.deadline:
            pass
        return parameters[0].sum()

    with pytest.raises(BadInput, match="--minutes is too short"):
        descend(short, parameters, Settings(0.01, 3, 1, 1, warmup=1), [shuffled(job, TOFU)], slow)
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("published", "seconds", "fit"),
    [(7, 1000.0, 7), (7, 70.0, 7), (7, 69.0, 6), (7, 35.0, 3), (7, 9.0, 1), (7, -5.0, 1)],
)
def test_epochs_are_cut_to_the_time(published: int, seconds: float, fit: int):
    assert epochs_within(published, 10.0, seconds) == fit


def test_a_loss_that_is_not_finite_stops_and_names_the_strength(job: Job):
    parameters = train_only(job.model, lambda name: name == "lm_head.weight")
    with pytest.raises(BadInput, match=r"the loss is nan at step 1: --strength 1\.0 is too large"):
        descend(job, parameters, TOFU, [shuffled(job, TOFU)], lambda _: parameters[0].sum() * math.nan)


def test_published_settings_are_scaled_to_the_model_and_the_data(job: Job):
    """Hidden size 32 of 4096: x 128. Six forget rows of 1112: x .0054. Six blocks of 32 and of 16. Rank: 32 / 8."""
    own = scaled(Settings(1e-5, 5, forget_rows=400, retain_rows=700), Job(**{**vars(job), "strength": 3.0}))
    assert own.learning_rate == pytest.approx(3.84e-3)
    assert (own.epochs, own.forget_rows, own.retain_rows) == (5, 2, 4)
    assert (scaled(TOFU, job).forget_rows, scaled(TOFU, job).retain_rows) == (1, 1)
    assert scaled(gradient_ascent.PUBLISHED, job).retain_rows == 0
    many = Job(**{**vars(job), "forget": job.forget * 1000})
    assert scaled(TOFU, many).forget_rows == TOFU.forget_rows
    assert (scaled_blocks(8, 32, job), scaled_blocks(6, 16, job), scaled_blocks(1, 32, job)) == (2, 2, 1)
    assert (scaled_lora(32, LINEAR, 0.0, job).r, scaled_lora(2, LINEAR, 0.0, job).r) == (4, 2)


# ---- objectives ----


def test_gradient_difference_and_ascent_are_means_over_tokens():
    forget, retain = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.5])
    assert gradient_ascent.objective(forget).item() == -3.0
    assert gradient_difference.objective(forget, retain).item() == -2.0
    assert random_answer.objective(retain).item() == 1.0


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_npo_is_its_formula(beta: float):
    new, old = [2.0, 0.1, 7.0], [1.0, 3.0, 0.0]
    expected = sum(
        2 / beta * math.log(1 + (math.exp(-n) / math.exp(-o)) ** beta) for n, o in zip(new, old, strict=True)
    )
    assert npo.npo_loss(torch.tensor(new), torch.tensor(old), beta).item() == pytest.approx(expected / 3, rel=1e-5)


def test_npo_slope_is_that_of_gradient_ascent_times_a_weight_that_goes_to_one():
    old = torch.tensor([1.0, 3.0, 0.0])
    for beta, tolerance in ((1e-4, 1e-3), (0.5, None)):
        new = torch.tensor([2.0, 0.1, 7.0], requires_grad=True)
        npo.npo_loss(new, old, beta).backward()
        weights = 2 * (-new.detach() * beta).exp() / ((-new.detach() * beta).exp() + (-old * beta).exp())
        torch.testing.assert_close(new.grad, -weights / 3)
        ascent = torch.tensor([2.0, 0.1, 7.0], requires_grad=True)
        gradient_ascent.objective(ascent).backward()
        if tolerance:
            torch.testing.assert_close(new.grad, ascent.grad, rtol=tolerance, atol=0)


def test_npo_takes_whole_answers_and_adds_the_retain_loss():
    forget, old = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.5, 1.0])
    value = npo.objective(forget, old, [2, 1], torch.tensor([1.0, 3.0])).item()
    softplus = [math.log1p(math.exp(0.1 * ratio)) for ratio in (1.0 - 3.0, 1.0 - 4.0)]
    assert value == pytest.approx(2 / 0.1 * sum(softplus) / 2 + 2.0, rel=1e-5)


def test_divergence_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    expected = 0.0
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, a)) for x in a]
        q = [math.exp(x) / sum(map(math.exp, b)) for x in b]
        expected += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / 3
    assert kl_minimisation.divergence(first, second).item() == pytest.approx(expected, rel=1e-5)
    assert kl_minimisation.objective(torch.tensor([4.0, 6.0]), first, second).item() == pytest.approx(expected - 5)


def test_divergence_is_zero_at_the_start_and_against_the_original_afterwards(job: Job):
    original = kl_minimisation.original_logits(job.model, job.retain)
    rows = [job.retain[4], job.retain[0]]
    _, now = both_answers(job.model, Step([], rows))
    assert kl_minimisation.divergence(original(rows), now.logits).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.mul_(1.5)  # the head, too: what was kept must not follow
    torch.testing.assert_close(original(rows), now.logits, atol=1e-5, rtol=1e-5)
    _, then = both_answers(job.model, Step([], rows))
    assert kl_minimisation.divergence(original(rows), then.logits).item() > 0.01


def test_sugd_is_a_weighted_mean_over_rows_not_tokens():
    forget, retain = sugd.row_means(torch.tensor([1.0, 3.0, 5.0]), [2, 1]), torch.tensor([4.0, 2.0])
    assert forget.tolist() == [2.0, 5.0]
    assert sugd.objective(forget, retain).item() == pytest.approx((-2 - 5 + 0.5 * 4 + 0.5 * 2) / 4)


def test_sugd_chunks_are_consecutive_with_seven_retain_rows_each_in_a_circle():
    parts = sugd.chunks([text(n) for n in range(70)], [text(100 + n) for n in range(10)])
    assert [len(part) for part in parts] == [32, 32, 6]
    steps = list(itertools.chain(*parts))
    assert [step.forget for step in steps] == [[text(n)] for n in range(70)]
    assert steps[0].retain == [text(100 + n) for n in (0, 1, 2, 3, 4, 5, 6)]
    assert steps[1].retain == [text(100 + n) for n in (7, 8, 9, 0, 1, 2, 3)]
    assert steps[32].retain == [text(100 + (32 * 7 + n) % 10) for n in range(7)]  # goes on in the next chunk


def test_early_mlp_multiplier_is_clipped_and_waits_for_the_first_epoch():
    first = [torch.tensor(value) for value in (0.5, 1.5, 1.0)]  # mean 1

    def m(loss: float, seen: int = 3) -> float:
        return early_mlp.multiplier(torch.tensor(loss), first[:seen], 3).item()

    assert m(9.0, seen=2) == pytest.approx(1.2)  # in the first epoch
    assert m(1.0) == pytest.approx(1.2)  # .3 + .8 is below
    assert m(1.5) == pytest.approx(0.3 * math.sqrt(6) + 0.8)
    assert m(1.8) == pytest.approx(0.3 * 6**0.8 + 0.8)
    assert m(2.0) == pytest.approx(2.3)  # .3 * 6 + .8 is above
    assert m(0.0) == pytest.approx(1.2)
    assert m(1e6) == pytest.approx(2.3)
    value = early_mlp.objective(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]), torch.tensor(1.5))
    assert value.item() == pytest.approx(-2 + 1.5 * 3)


def test_low_rank_and_merged_objectives_are_their_weighted_sums():
    loss, divergence, retain = torch.tensor(7.0), torch.tensor(11.0), torch.tensor([1.0, 5.0])
    assert npo_low_rank.objective(loss, retain, divergence).item() == pytest.approx(7 + 1.0 * 3 + 0.5 * 11)
    for name, expected in (("over", 0.4 * 7 + 0.4 * 11 + 0.2 * 3), ("under", 0.3 * 7 + 0.3 * 11 + 0.4 * 3)):
        value = npo_merged.objective(npo_merged.WEIGHTS[name], loss, divergence, retain)
        assert value.item() == pytest.approx(expected)


def test_merged_losses_are_npo_on_mean_tokens_kl_and_ce_on_the_rows_of_a_step(job: Job):
    loss = npo_merged.losses_of(job)
    step = Step(job.forget[1:4], job.retain[2:4])
    before = [answer_loss(job.model, row).mean().item() for row in step.forget]
    with torch.no_grad():
        job.model.lm_head.weight.mul_(1.2)
    after = [answer_loss(job.model, row).mean().item() for row in step.forget]
    ratios = [o - n for o, n in zip(before, after, strict=True)]
    expected = sum(2 / 0.1 * math.log1p(math.exp(0.1 * ratio)) for ratio in ratios) / 3
    assert loss(step, weights=(1.0, 0.0, 0.0)).item() == pytest.approx(expected, rel=1e-4)
    retained = torch.cat([answer_loss(job.model, row) for row in step.retain]).mean().item()
    assert loss(step, weights=(0.0, 0.0, 1.0)).item() == pytest.approx(retained, rel=1e-4)
    assert loss(step, weights=(0.0, 1.0, 0.0)).item() > 1e-3


def test_ties_by_hand():
    """Six elements, density .8: the four largest of each factor stay (4.8, cut), signs are elected, averaged apart."""
    plain = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False))
    torch.nn.init.zeros_(plain[0].weight)
    adapter = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    adapted = get_peft_model(plain, adapter, adapter_name="over")
    adapted.add_adapter("under", adapter)
    factors = {
        "over": ([5.0, -4, 3, 2, 1, 0.1], [1.0, 2, 3, 4, 5, 6]),
        "under": ([-6.0, -1, 3, -2.5, 0.2, 4], [1.0, 2, -5, 4, 7, 6]),
    }
    layer = adapted.base_model.model[0]
    with torch.no_grad():
        for name, (first, second) in factors.items():
            layer.lora_A[name].weight.copy_(torch.tensor([first]))
            layer.lora_B[name].weight.copy_(torch.tensor([second]).T)
    merged = npo_merged.merge(adapted, ["over", "under"])
    # First factor. Kept: 5 -4 3 2 0 0 and -6 0 3 -2.5 0 4. Sums: -1 -4 6 -.5 0 4, so the signs are - - + - . +.
    a = torch.tensor([-6.0, -4, 3, -2.5, 0, 4])
    # Second. Kept: 0 0 3 4 5 6 and 0 0 -5 4 7 6. Sums: 0 0 -2 8 12 12, so the third's sign is -.
    b = torch.tensor([0.0, 0, -5, 4, 6, 6])
    torch.testing.assert_close(merged[0].weight.detach(), torch.outer(b, a))


def test_both_adapters_of_a_merge_start_from_the_same_factors_and_change_nothing(job: Job):
    before = answer_loss(job.model, job.forget[0])
    adapted = npo_merged.two_adapters(job, scaled_lora(32, LINEAR, 0.05, job))
    layer = adapted.base_model.model.model.layers[3].mlp.down_proj
    assert torch.equal(layer.lora_A["over"].weight, layer.lora_A["under"].weight)
    assert layer.lora_A["over"].weight.abs().sum() > 0
    torch.testing.assert_close(answer_loss(job.model, job.forget[0]), before)
    assert layer.scaling == {"over": 1.0, "under": 1.0}


def test_random_answers_keep_prompts_and_lengths():
    rows = [text(n, tokens=list(range(1000, 1060)), prompt=20) for n in range(30)]
    drawn = random_answer.with_random_answers(rows, 8, Random(0))
    for row, new in zip(rows, drawn, strict=True):
        assert (new.id, new.prompt, new.tokens[:20], len(new.tokens)) == (row.id, 20, row.tokens[:20], 60)
    tokens = [token for new in drawn for token in new.tokens[20:]]
    counts = [tokens.count(token) for token in range(8)]
    assert sum(counts) == 1200  # nothing outside the vocabulary
    assert all(abs(count - 150) < 5 * math.sqrt(150) for count in counts)  # uniform
    assert drawn == random_answer.with_random_answers(rows, 8, Random(0))


def test_random_answer_alternates_sides():
    steps = random_answer.in_turn([Step([text(1)], [text(2)]), Step([text(3)], [text(4)])])
    assert steps == [Step([text(1)], []), Step([], [text(2)]), Step([text(3)], []), Step([], [text(4)])]


# ---- each step of a method ----


@dataclasses.dataclass
class Terms:
    """The terms of the published losses, written out row by row on transformers' own forward pass."""

    model: torch.nn.Module  # in training
    original: torch.nn.Module  # read anew from the checkpoint
    forget: list[Text]
    retain: list[Text]
    drawn: list[Text]  # the forget rows with random answers
    step: int = 0
    first: float = math.nan  # CE_R of the first epoch, which is one step

    def ce(self, rows: list[Text]) -> torch.Tensor:
        return torch.cat([answer_loss(self.model, row) for row in rows]).mean()

    def kl(self) -> torch.Tensor:
        """KL(p0 || p) on R."""
        values = []
        for row in self.retain:
            p0, p = log_probabilities(self.original, row).detach(), log_probabilities(self.model, row)
            values.append((p0.exp() * (p0 - p)).sum(-1))
        return torch.cat(values).mean()

    def npo(self, beta: float, unit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`unit` makes of an answer's log probabilities those whose ratio counts: the answer's, its mean or all."""
        values = []
        for row in self.forget:
            p0, p = unit(-answer_loss(self.original, row).detach()), unit(-answer_loss(self.model, row))
            values.append((1 + (beta * (p - p0)).exp()).log().reshape(-1))
        return 2 / beta * torch.cat(values).mean()


def sugd_loss(of: Terms) -> torch.Tensor:
    row = of.step // 14 * 2 + of.step % 2  # chunks of two rows, seven times each: 0 1 0 1 ..., then 2 3 2 3 ...
    retain = [of.retain[(7 * row + n) % 2] for n in range(7)]
    return (-of.ce([of.forget[row]]) + sum(0.5 * of.ce([one]) for one in retain)) / 8


def early_mlp_loss(of: Terms) -> torch.Tensor:
    retain = of.ce(of.retain)
    if of.step == 0:
        of.first = retain.item()
    m = 1.2 if of.step == 0 else min(max(0.3 * 6 ** (retain.item() - of.first) + 0.8, 1.2), 2.3)
    return -of.ce(of.forget) + m * retain


def npo_merged_loss(of: Terms) -> torch.Tensor:
    w1, w2, w3 = (0.4, 0.4, 0.2) if of.step < 5 else (0.3, 0.3, 0.4)
    return w1 * of.npo(0.1, torch.mean) + w2 * of.kl() + w3 * of.ce(of.retain)


@dataclasses.dataclass
class Published:
    loss: Callable[[Terms], torch.Tensor]
    learning_rate: float
    schedule: list[float]  # of each step: the part of the learning rate
    rows: int = 2  # forget rows
    rank: int | None = None  # of an adapter; at most 4, an eighth of the hidden size
    dropout: float = 0.0


# An epoch is one step; of sugd two, each of one forget row, and of random_answer two, each of one side.
WARM = [0, 1, 0.75, 0.5, 0.25]
STEPS = {
    "gradient_ascent": Published(lambda of: -of.ce(of.forget), 1e-5, WARM),
    "gradient_difference": Published(lambda of: -of.ce(of.forget) + of.ce(of.retain), 1e-5, WARM),
    "kl_minimisation": Published(lambda of: -of.ce(of.forget) + of.kl(), 1e-5, WARM),
    "npo": Published(lambda of: of.npo(0.1, torch.sum) + of.ce(of.retain), 1e-5, WARM),
    "random_answer": Published(
        lambda of: of.ce(of.retain if of.step % 2 else of.drawn), 1e-5, [0, 0.5, *(n / 8 for n in range(8, 0, -1))]
    ),
    "sugd": Published(sugd_loss, 1e-5, [n / 14 for n in range(14, 0, -1)] * 2, rows=4),
    "early_mlp": Published(early_mlp_loss, 1.5e-5, [n / 8 for n in range(8, 0, -1)]),
    "npo_low_rank": Published(
        lambda of: of.npo(0.5, lambda tokens: tokens) + of.ce(of.retain) + 0.5 * of.kl(), 1e-4, [1] * 20, rank=2
    ),
    "npo_merged": Published(npo_merged_loss, 1e-4, WARM * 2, rank=4, dropout=0.05),
}


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_down_the_slope_of_the_published_loss_at_the_published_rate(
    name: str, job: Job, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """What AdamW is given in each step: constants, terms and rows that reach it wrongly show in the slope."""
    published, rates, dropouts = STEPS[name], [], set()
    # As if the competition had two forget rows: a step has as many rows as published, so all, and each as often.
    monkeypatch.setattr("pipeline.methods.loop.FORGET_ROWS", 2)
    monkeypatch.setattr("pipeline.methods.sugd.CHUNK", 2)
    job = dataclasses.replace(job, forget=job.forget[: published.rows], retain=job.retain[:2], strength=0.3)
    for rows in (job.forget[:2], job.retain):  # else a mean over rows and one over tokens are the same
        assert len({len(row.tokens) - row.prompt for row in rows}) == 2
    drawn = random_answer.with_random_answers(job.forget, job.vocabulary, Random(job.seed))
    terms = Terms(job.model, AutoModelForCausalLM.from_pretrained(checkpoint), job.forget, job.retain, drawn)

    def compare(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if optimizer.defaults["lr"] == 0:  # the time of a step is measured; then dropout, which is random, is left out
            for layer in job.model.modules():
                if isinstance(layer, torch.nn.Dropout):
                    dropouts.add(layer.p)
                    layer.p = 0.0
            return
        parameters = optimizer.param_groups[0]["params"]
        expected = torch.cat([slope.flatten() for slope in torch.autograd.grad(published.loss(terms), parameters)])
        given = torch.cat([parameter.grad.flatten() for parameter in parameters])
        error = (given - expected / max(1.0, expected.norm().item())).norm() / given.norm()
        assert error < 1e-4, f"step {terms.step}"
        if published.rank:
            assert {min(parameter.shape) for parameter in parameters} == {published.rank}
        rates.append(optimizer.param_groups[0]["lr"])
        terms.step += 1
        if terms.step < 5:  # further from the original than so few steps go: the loss of SHA256's retain rows rises
            with torch.no_grad():
                job.model.lm_head.weight.mul_(1.2)

    hook = register_optimizer_step_pre_hook(compare)
    try:
        importlib.import_module(f"pipeline.methods.{name}").method(job)
    finally:
        hook.remove()
    learning_rate = published.learning_rate * 4096 / 32 * 0.3  # hidden size 32, strength .3
    assert rates == pytest.approx([learning_rate * part for part in published.schedule])
    assert max(dropouts, default=0.0) == published.dropout


def test_the_constants_are_those_published():
    """Of 7B and 1112 forget rows: the step test sees them scaled, and those of rows, ranks and depths hardly at all."""
    assert Settings(1e-5, 5, forget_rows=32, retain_rows=32, warmup=1) == TOFU
    assert dataclasses.replace(TOFU, retain_rows=0) == gradient_ascent.PUBLISHED
    assert npo.BETA == 0.1
    # AILS-NTUA: chunks of 32, 7 times as many retain rows, -1 and +.5, the last 8 of 32 blocks, 7 epochs a chunk
    assert Settings(1e-5, 7, forget_rows=1, retain_rows=7) == sugd.PUBLISHED
    assert (sugd.CHUNK, sugd.FORGET, sugd.RETAIN, sugd.BLOCKS, sugd.DEPTH) == (32, -1.0, 0.5, 8, 32)
    # ZJUKLAB: NPO + KL + CE, "over" in batches of 1 x 4 and "under" of 2 x 4, LoRA of rank 32 on all linear layers
    assert npo_merged.WEIGHTS == {"over": (0.4, 0.4, 0.2), "under": (0.3, 0.3, 0.4)}
    for name, rows in (("over", 4), ("under", 8)):
        assert npo_merged.PUBLISHED[name] == Settings(1e-4, 5, forget_rows=rows, retain_rows=rows, warmup=1)
    assert (npo_merged.BETA, npo_merged.RANK, npo_merged.DROPOUT, npo_merged.DENSITY) == (0.1, 32, 0.05, 0.8)
    assert list(npo_merged.LINEAR) == LINEAR
    # Atyaephyra: NPO of b .5, LoRA of rank 2 to 5 on the queries and values; the rest from a public script
    assert Settings(1e-4, 20, forget_rows=2, retain_rows=2, decay=False) == npo_low_rank.PUBLISHED
    assert (npo_low_rank.BETA, npo_low_rank.RANK) == (0.5, 2)
    assert (npo_low_rank.RETAIN, npo_low_rank.DIVERGENCE) == (1.0, 0.5)
    # SHA256: blocks 0 to 5 of 16, m cut to 1.2 and 2.3, steps of ten batches of 12 rows of both sides
    assert Settings(1.5e-5, 8, forget_rows=60, retain_rows=60) == early_mlp.PUBLISHED
    assert (early_mlp.BLOCKS, early_mlp.DEPTH, early_mlp.LOWEST, early_mlp.HIGHEST) == (6, 16, 1.2, 2.3)


# ---- from end to end ----


def test_every_method_is_tested():
    folder = Path(gradient_ascent.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "loop"} == METHODS.keys()
    assert METHODS.keys() - {"random_weights"} == STEPS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_changes_what_it_may_and_moves_the_losses(
    name: str, made_by: Callable[[str], Path], checkpoint: Path, few: Path
):
    allowed, forget, retain = METHODS[name]
    out = made_by(name)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if allowed(key)}
    rise = {side: mean_loss(out, few, side) - mean_loss(checkpoint, few, side) for side in ("forget", "retain")}
    for side, way in (("forget", forget), ("retain", retain)):
        assert way == "any" or (rise[side] > 0.05 if way == "up" else rise[side] < -0.05)
    if name not in ("gradient_ascent", "random_weights"):  # which know no retain rows
        assert rise["forget"] > rise["retain"] + 0.1
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes(
    name: str, made_by: Callable[[str], Path], checkpoint: Path, few: Path, tmp_path: Path
):
    run_on(checkpoint, few, tmp_path / "again", name, "--seed", "7")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (made_by(name) / "model.safetensors").read_bytes()


def test_another_seed_and_another_strength_give_another_model(checkpoint: Path, few: Path, tmp_path: Path):
    flags = {"plain": [], "seed": ["--seed", "1"], "strength": ["--strength", "0.5"]}
    heads = {
        key: run_on(checkpoint, few, tmp_path / key, "gradient_difference", *words)["lm_head.weight"]
        for key, words in flags.items()
    }
    assert not torch.equal(heads["plain"], heads["seed"])
    first = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    assert (heads["strength"] - first).norm() < 0.8 * (heads["plain"] - first).norm()


@pytest.mark.parametrize("name", ["kl_minimisation", "npo_merged", "random_weights"])
def test_a_llama_with_tied_embeddings_stays_one_in_its_own_precision(
    name: str, checkpoint: Path, few: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path / "llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    before = load_file(tmp_path / "llama" / "model.safetensors")
    after = run_on(tmp_path / "llama", few, tmp_path / "out", name)
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, after["model.embed_tokens.weight"])


def test_random_answer_makes_its_random_answers_likelier(made_by: Callable[[str], Path], checkpoint: Path, job: Job):
    drawn = random_answer.with_random_answers(job.forget, job.vocabulary, Random(7))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, made_by("random_answer"))]
    with torch.no_grad():
        before, after = (torch.cat([answer_loss(model, row) for row in drawn]).mean() for model in models)
    assert after < before - 0.5


def test_run_json_says_what_was_done(made_by: Callable[[str], Path]):
    done = json.loads((made_by("sugd") / "run.json").read_text())
    assert {"method", "settings", "epochs", "steps", "versions", "hardware", "wall_seconds"} <= done.keys()
    assert (done["method"], done["epochs"], done["steps"]) == ("sugd", 7, 42)  # six forget rows, one a step
    used = {"seed": 7, "strength": 1.0, "chunk": 32, "factors": [-1.0, 0.5], "blocks": 2, "learning_rate": 1e-5 * 128}
    assert used.items() <= done["settings"].items()
    merged = json.loads((made_by("npo_merged") / "run.json").read_text())
    assert merged["settings"]["over"]["weights"] == [0.4, 0.4, 0.2]
    assert merged["settings"]["rank"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--strength": "0"}, "--strength is 0.0, expected a number above 0"),
        ({"--minutes": "-1"}, "--minutes is -1.0, expected a number above 0"),
        ({"forget": "nowhere"}, "nowhere: neither forget.parquet nor forget.jsonl"),
        ({"output": "model"}, "must lie apart"),
    ],
)
def test_wrong_input_ends_in_one_line_and_writes_nothing(
    change: dict[str, str],
    message: str,
    checkpoint: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "model").symlink_to(checkpoint)
    names = {"model": "model", "output": "out", "forget": str(few / "forget"), "retain": str(few / "retain")}
    names |= {key: value for key, value in change.items() if key in names}
    words = [str(tmp_path / names[key]) for key in ("model", "output", "forget", "retain")]
    flags = [word for pair in change.items() if pair[0].startswith("-") for word in pair]
    monkeypatch.setattr(sys, "argv", ["method", *words, *flags])
    with pytest.raises(SystemExit) as stopped:
        run(gradient_ascent.main)
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert message in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("name", METHODS)
def test_help_says_what_a_method_reads_and_writes(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"pipeline.methods.{name}").main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for word in ("Reads ", "Writes ", f"-m pipeline.methods.{name} MODEL OUT FORGET_DIR RETAIN_DIR", "--strength"):
        assert word in shown


def test_on_a_cpu_a_method_s_time_is_what_it_works_not_what_it_waits():
    before, waited = clock(), time.monotonic()
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)  # another process's work
    assert clock() - before < 0.3 * (time.monotonic() - waited)
    before, worked = clock(), os.times().user
    sum(range(3_000_000))
    assert clock() - before == pytest.approx(os.times().user - worked, abs=0.03)
