"""claims and its probes: each measurement by another route on small random models, each verdict on made-up numbers."""

import dataclasses
import json
import math
import shutil
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import claims, unlearn
from pipeline.lib import probes
from pipeline.lib.records import write_jsonl
from pipeline.lib.stage import BadInput

VOCABULARY = 50


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A random LLaMA of three blocks, in float64 but for its norms: sums in another order then agree closely."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = [
    (random_tokens(length, seed), given) for seed, (length, given) in enumerate([(9, 4), (14, 13), (6, 1), (11, 5)])
]


# ---- probes ----


def test_changed_matrices_are_in_place_within_the_block_and_gone_after_it(model):
    ids = torch.tensor([TEXTS[0][0]])
    matrix = torch.randn(32, 48, dtype=torch.float64)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="stop"), probes.changed(model, {1: matrix}):
            assert torch.equal(model.state_dict()["model.layers.1.mlp.down_proj.weight"], matrix)
            assert not torch.allclose(model(ids).logits, before)
            raise RuntimeError("stop")
        assert torch.equal(model(ids).logits, before)


def test_answer_accuracy_is_the_share_of_tokens_that_the_model_would_choose(model):
    texts = []
    for tokens, given in TEXTS:  # half of the answer's tokens are made right
        tokens = list(tokens)
        for place in range(given, len(tokens), 2):
            tokens[place] = int(model(torch.tensor([tokens[:place]])).logits[0, -1].argmax())
        texts.append((tokens, given))
    expected = []
    for tokens, given in texts:
        right = [
            int(model(torch.tensor([tokens[:place]])).logits[0, -1].argmax()) == tokens[place]
            for place in range(max(1, given), len(tokens))
        ]
        expected.append(sum(right) / len(right))
    assert 0.3 < sum(expected) / len(expected) < 1
    assert probes.answer_accuracy(model, texts) == pytest.approx(expected)


def test_max_logits_are_those_of_a_loop_that_writes_one_token_at_a_time(model):
    prompts = [tokens[: max(2, given)] for tokens, given in TEXTS]
    expected = []
    for prompt in prompts:
        ids, found = list(prompt), []
        for _ in range(5):
            logits = model(torch.tensor([ids])).logits[0, -1]
            found.append(logits.max().item())
            ids.append(int(logits.argmax()))
        expected.append(found)
    for got, wanted in zip(probes.max_logits(model, prompts, set(), count=5), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)


def test_max_logits_end_with_the_stop_token(model):
    prompt = TEXTS[0][0]
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    assert [len(found) for found in probes.max_logits(model, [prompt], {first}, count=5)] == [1]


def test_block_outputs_are_transformers_hidden_states(model):
    for block in (0, 1):  # the last one's are given after the final norm
        outputs = probes.block_outputs(model, [tokens for tokens, _ in TEXTS], block)
        for (tokens, _), output in zip(TEXTS, outputs, strict=True):
            states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[block + 1]
            assert torch.allclose(output.double(), states[0, 1:], atol=1e-5)


class Linear(torch.nn.Module):
    """A decoder whose rest, after its one block, is a linear map: its noise sensitivity is known in closed form."""

    def __init__(self, table: torch.Tensor, head: torch.Tensor) -> None:
        super().__init__()
        self.table, self.head = table, head
        self.base_model = SimpleNamespace(layers=[torch.nn.Identity()])
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.base_model.layers[0](self.table[input_ids]) @ self.head.T)


@pytest.mark.parametrize("relative", [True, False])
def test_noise_sensitivity_of_a_linear_map_is_the_closed_value(relative):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(VOCABULARY, 24, generator=generator) * torch.linspace(0.5, 3, VOCABULARY)[:, None]
    head = torch.randn(40, 24, generator=generator)
    texts = [random_tokens(400, seed) for seed in range(5)]
    texts.append([1] * 50)  # shorter: padded in its batch, with a token of another norm
    table[0] *= 9
    expected = []
    for tokens in texts:
        h = table[torch.tensor(tokens[1:])]
        # E||W xi||^2 = ||W||_F^2 E||xi||^2 / d
        noise = 0.2**2 * (h.square().sum(1) if relative else torch.ones(len(h))) * head.square().sum() / 24
        expected.append((noise / (h @ head.T).square().sum(1)).mean().item())
    found = probes.noise_sensitivity(Linear(table, head), texts, 0, 0.2, relative, torch.Generator().manual_seed(0))
    assert found == pytest.approx(sum(expected) / len(expected), rel=0.05)


def test_the_one_hot_gradient_is_that_of_finite_differences(model):
    tokens, given = TEXTS[3]
    table = model.get_input_embeddings().weight.detach()

    def loss(one_hot: torch.Tensor) -> float:
        logits = model(inputs_embeds=(one_hot @ table)[None]).logits[0]
        return cross_entropy(logits[given - 1 : -1], torch.tensor(tokens[given:])).item()

    found = probes.input_gradient(model, (tokens, given))
    assert found.shape == (given, VOCABULARY)
    one_hot = torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).double()
    for place, token in [(0, 3), (2, tokens[2]), (given - 1, 17), (1, 49)]:
        step = torch.zeros_like(one_hot)
        step[place, token] = 2e-3  # the norms compute in float32: a smaller one drowns
        slope = (loss(one_hot + step) - loss(one_hot - step)) / 4e-3
        assert found[place, token].item() == pytest.approx(slope, rel=2e-3, abs=1e-3)


def search_one(model, prompt, answer, allowed=None, keeps=lambda _suffix: True, steps=1, width=1500, top=None):
    allowed = torch.ones(VOCABULARY, dtype=torch.bool) if allowed is None else allowed
    search = probes.Search(steps, width, top or int(allowed.sum()))
    return probes.gcg(model, prompt, answer, [2], search, allowed, torch.Generator().manual_seed(0), keeps)


def loss_of(model, prompt, answer) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return cross_entropy(logits, torch.tensor(answer)).item()


def test_gcg_with_every_token_as_candidate_finds_the_best_of_them(model):
    prompt, answer = random_tokens(5, 1), random_tokens(3, 2)
    losses = [loss_of(model, [*prompt, token], answer) for token in range(VOCABULARY)]
    made = search_one(model, prompt, answer)
    assert made.suffix == [losses.index(min(losses))]
    assert made.loss == pytest.approx(min(losses), rel=1e-5)
    assert made.losses == pytest.approx([losses[2], min(losses)], rel=1e-5)


def test_gcg_finds_a_planted_trigger_and_stops(model):
    prompt, trigger = random_tokens(5, 1), 31
    answer: list[int] = []
    for _ in range(3):
        answer.append(int(model(torch.tensor([[*prompt, trigger, *answer]])).logits[0, -1].argmax()))
    assert loss_of(model, [*prompt, 2], answer) > loss_of(model, [*prompt, trigger], answer)
    made = search_one(model, prompt, answer, steps=20)
    assert made.said
    assert len(made.losses) < 20
    assert probes.answer_losses(model, [prompt + made.suffix], answer)[1].item()


def test_gcg_tries_only_tokens_that_are_allowed_and_kept(model):
    prompt, answer = random_tokens(5, 1), random_tokens(3, 2)
    losses = [loss_of(model, [*prompt, token], answer) for token in range(VOCABULARY)]
    ranked = sorted(range(VOCABULARY), key=losses.__getitem__)
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[ranked[0]] = False
    made = search_one(model, prompt, answer, allowed, keeps=lambda suffix: suffix != [ranked[1]])
    assert made.suffix == [ranked[2]]


def test_gcg_takes_its_candidates_from_the_gradient(model):
    prompt, answer = random_tokens(5, 1), random_tokens(3, 2)
    gradient = probes.input_gradient(model, ([*prompt, 2, *answer], len(prompt) + 1))[-1]
    tried: list[list[int]] = []
    search_one(model, prompt, answer, keeps=lambda suffix: bool(tried.append(suffix)) or True, width=40, top=3)
    steepest = sorted(range(VOCABULARY), key=lambda token: gradient[token].item())[:3]
    assert {suffix[0] for suffix in tried} == set(steepest)


def test_one_epoch_of_fine_tuning_is_one_step_on_the_answers_tokens(model):
    other = LlamaForCausalLM(model.config).double()
    other.load_state_dict(model.state_dict())
    assert probes.fine_tune(model, TEXTS[:2], 1e-3, 1) == 1
    losses = []  # of every answer token of both texts, alike
    for tokens, given in TEXTS[:2]:
        logits = other(torch.tensor([tokens])).logits[0, given - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(tokens[given:]), reduction="none"))
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    torch.cat(losses).mean().backward()
    optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=2e-5)


def test_fine_tuning_ends_when_the_texts_are_known(model):
    epochs = probes.fine_tune(model, TEXTS, 1e-2, 60, known=0.95)
    assert 1 < epochs < 60
    accuracies = probes.answer_accuracy(model, TEXTS)
    assert sum(accuracies) / len(accuracies) >= 0.95


# ---- what a run is, and its measures ----


def text(name: str, task: str = "Task1") -> unlearn.Text:
    return unlearn.Text(name, task, random_tokens(8, len(name)), 3)


@pytest.mark.parametrize(("block", "trained"), [(2, (0, 1, 2)), (5, (3, 4, 5))])
def test_a_window_is_rmus_three_blocks(block, trained):
    study = SimpleNamespace(decoder=SimpleNamespace(depth=8), alpha=1.5)
    settings = claims.window(study, block, 7, "fixed", 6.5)
    assert (settings.trained, settings.seed) == (trained, 7)
    assert (settings.coefficient, settings.beta, settings.alpha) == ("fixed", 6.5, 1.5)
    assert settings.answer == settings.general == 1.0  # all tokens alike


def test_utility_and_score_are_their_formulas():
    untouched = {"forget": 1.0, "retain": 0.8, "choice": 0.85}
    found = claims.judged({"forget": 0.4, "retain": 0.6, "choice": 0.55}, untouched)
    share = (0.55 - 0.25) / (0.85 - 0.25)
    assert found["utility"] == pytest.approx((0.6 / 0.8 + share) / 2)
    assert found["score"] == pytest.approx(3 / (1 / 0.6 + 1 / 0.6 + 1 / share))
    assert not found["works"]
    assert claims.judged({"forget": 0.5, "retain": 0.8, "choice": 0.55}, untouched)["works"]
    assert not claims.judged({"forget": 0.51, "retain": 0.8, "choice": 0.55}, untouched)["works"]


def test_a_model_at_chance_has_no_multiple_choice_to_lose():
    untouched = {"forget": 1.0, "retain": 1.0, "choice": 0.26}
    assert claims.judged({"forget": 0.2, "retain": 0.9, "choice": 0.2}, untouched)["utility"] == pytest.approx(0.95)


def test_the_c_of_the_sweep_is_the_smallest_that_works_or_else_the_best():
    untouched = {"forget": 1.0, "retain": 1.0, "choice": 1.0}
    rows = [
        {"ratio": ratio, "forget": forget, "utility": utility, "score": score}
        for ratio, forget, utility, score in [
            (1, 0.7, 0.9, 0.2),
            (2, 0.4, 0.8, 0.5),
            (5, 0.1, 0.9, 0.9),
            (9, 0, 0.1, 0),
        ]
    ]
    assert claims.smallest_working(rows, untouched) == 2
    assert claims.smallest_working([rows[0], rows[3]], untouched) == 1


def test_relearning_splits_documents_not_rows():
    texts = [text(f"{document}{kind}") for document in range(30) for kind in ("sc0", "qa0", "qa1")]
    taught, rest = claims.split_documents(texts, 0)
    documents = [{one.id[:-3] for one in side} for side in (taught, rest)]
    assert len(taught) == 9
    assert len(taught) + len(rest) == 90
    assert not documents[0] & documents[1]
    assert claims.split_documents(texts, 1)[0] != taught


def test_the_telling_word_is_frequent_on_one_side_and_rare_on_the_other():
    assert claims.telling_word(["Who is Ann Lee?", "Where is Ann?"], ["Who is Bob?", "Where is Eve?"]) == "Ann"


def test_the_word_is_put_after_the_first():
    assert claims.insert("Who is Bob Ray?", "Ann") == "Who Ann is Bob Ray?"


def test_a_spread_sample_is_even():
    assert claims.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert claims.spread([1, 2], 5) == [1, 2]


# ---- verdicts ----


@pytest.mark.parametrize(
    ("holds", "expected"),
    [([True, True], "reproduced"), ([False, True], "partly"), ([False, False], "not reproduced")],
)
def test_the_verdict_is_by_how_many_conditions_hold(holds, expected):
    assert claims.verdict(holds) == expected


def confidence(shift: float, scale: float):
    before = [[9.0, 11.0], [10.0, 12.0], [8.0, 12.0], [9.5, 10.0], [11.0, 7.0], [12.0, 9.0]]
    after = [
        [[value * scale + shift + (seed * seed % 7) / 99 * value for value in row] for row in before]
        for seed in range(5)
    ]
    return {"before": before, "after": after}


def coefficient(cosine, forget, utility):
    return {
        "rows": [
            {
                "ratio": ratio,
                "seed": seed,
                "cosine": cosine(ratio),
                "forget": forget(ratio),
                "utility": utility(ratio) + seed * ratio / 999,
            }
            for ratio in (0.5, 1, 2, 5, 10)
            for seed in range(5)
        ]
    }


def noise(absolute, relative):
    return {
        "rows": [
            {
                "block": block,
                "seed": seed,
                "absolute": absolute(block) + seed / 999,
                "relative": relative(block) + seed / 999,
            }
            for block in range(8)
            for seed in range(5)
        ]
    }


def layers(rmu, adaptive, after=lambda _block: 1.0, works=1.0, c=9.0):
    def row(method, block, seed):
        ours = method == "adaptive"
        return {
            "method": method,
            "block": block,
            "seed": seed,
            "score": (adaptive if ours else rmu)(block) + ((seed * seed + block * seed + ours) % 5) / 500,
            "forget": 0.1 if ours and block < 2 + 8 * works else 0.9,
            "utility": 0.9,
            "before": 10.0,
            "after": 10 * after(block) + seed / 99,
        }

    blocks = list(range(2, 10))
    rows = [row(method, block, seed) for method in ("rmu", "adaptive") for block in blocks for seed in range(5)]
    return {"blocks": blocks, "c": c, "untouched": {"forget": 1.0}, "rows": rows}


def jailbreak(factor: float, broken: float, power: float):
    before = {"own": [1.0] * 8, "other": [float(value) for value in range(1, 9)]}
    after = [{"own": [1.0] * 8, "other": [value * factor for value in before["other"]]}] * 5
    attacks = [
        {"model": model, "answer": answer, "attacked": float(number < 10 * rate), "plain": plain}
        for model, answer, rate, plain in [
            ("unlearned", "own", broken, 0.0),
            ("unlearned", "own", 1.0, 1.0),  # what is said without an attack is no success of it
            ("untouched", "other", power, 0.0),
            ("untouched", "other", 1.0, 1.0),
            ("untouched", "own", 1.0, 0.0),
        ]
        for number in range(10)
    ]
    return {"before": before, "after": after, "attacks": attacks}


def insertion(plain: float, forget: float, retain: float):
    before = {"plain": 1.0, "forget": 0.95, "retain": 0.95}
    wobble = [0.0, 0.01, -0.01, 0.02, 0.0]
    return {
        "before": before,
        "after": [{"plain": plain + w, "forget": forget - w, "retain": retain + w / 2} for w in wobble],
    }


def relearning(relearned: float, unseen: float):
    levels = {"untouched": 1.0, "unlearned": 0.2, "relearned": relearned, "unseen": unseen}
    return {
        "rows": [
            {name: {"accuracy": value + seed * len(name) / 9999} for name, value in levels.items()} for seed in range(5)
        ]
    }


def rising(block):
    return 0.1 + block / 10


def falling(block):
    return 0.9 - block / 10


def flat(_block):
    return 0.5


OUTCOMES = [
    (claims.judge_confidence, confidence(-5, 0.5), [True, True]),
    (claims.judge_confidence, confidence(-5, 1.5), [False, False]),
    (claims.judge_confidence, confidence(-9, 1.5), [True, False]),
    (claims.judge_alignment, coefficient(lambda c: 0.5 + 0.045 * c, flat, flat), [True, True]),
    (claims.judge_alignment, coefficient(lambda c: 0.3 + 0.05 * c, flat, flat), [True, False]),
    (claims.judge_alignment, coefficient(lambda c: 0.8 - 0.05 * c, flat, flat), [False, False]),
    (claims.judge_coefficient, coefficient(flat, lambda c: 1 / c, lambda c: 1 - c / 20), [True, True]),
    (claims.judge_coefficient, coefficient(flat, lambda c: 1 / c, lambda c: 0.5 + c / 20), [True, False]),
    (claims.judge_coefficient, coefficient(flat, lambda c: c / 20, lambda c: 0.5 + c / 20), [False, False]),
    (claims.judge_noise, noise(falling, falling), [True, True]),
    (claims.judge_noise, noise(falling, rising), [True, False]),
    (claims.judge_noise, noise(rising, flat), [False, False]),
    (claims.judge_fixed, layers(falling, flat, after=lambda block: 2 - block / 8), [True, True, True]),
    (claims.judge_fixed, layers(falling, flat, after=rising), [True, True, False]),
    (claims.judge_fixed, layers(rising, flat, after=rising, c=11.0), [False, False, False]),
    (claims.judge_adaptive, layers(falling, rising), [True, True]),
    (claims.judge_adaptive, layers(falling, rising, works=0.5), [False, True]),
    (claims.judge_adaptive, layers(rising, falling, works=0.5), [False, False]),
    (claims.judge_depth, layers(flat, rising), [True, True]),
    (claims.judge_depth, layers(flat, lambda block: -abs(block - 6.4)), [False, True]),
    (claims.judge_depth, layers(flat, falling), [False, False]),
    (claims.judge_jailbreak, jailbreak(0.01, 0.1, 0.8), [True, True, True]),
    (claims.judge_jailbreak, jailbreak(0.5, 0.1, 0.8), [True, False, True]),
    (claims.judge_jailbreak, jailbreak(1.5, 0.8, 0.8), [False, False, False]),
    (claims.judge_jailbreak, jailbreak(0.01, 0.0, 0.0), [True, True, False]),  # an attack without power shows nothing
    (claims.judge_insertion, insertion(0.9, 0.4, 0.8), [True, True, True]),
    (claims.judge_insertion, insertion(0.9, 0.4, 0.4), [True, True, False]),
    (claims.judge_insertion, insertion(0.9, 0.95, 0.9), [False, False, False]),
    (claims.judge_relearning, relearning(0.9, 0.4), [True, True]),
    (claims.judge_relearning, relearning(0.4, 0.3), [False, True]),
    (claims.judge_relearning, relearning(0.3, 0.4), [False, False]),
]


@pytest.mark.parametrize(("judge", "numbers", "expected"), OUTCOMES)
def test_conditions_hold_where_the_numbers_say_so(judge, numbers, expected):
    assert [holds for holds, _ in judge(numbers)] == expected


def test_the_seeds_of_a_place_are_no_places_of_their_own():
    """Of four means in falling order the p is one of 24 orders, however many seeds there are; of three, one of six."""
    for places, p in ((4, 1 / 24), (3, 1 / 6)):
        rows = [{"x": x, "y": -x + seed / 99, "seed": seed} for x in range(places) for seed in range(50)]
        assert claims.falls(rows, "x", "y") == (places == 4, f"correlation -1.00, p = {p:.2g}")


def test_as_much_unseen_text_is_as_many_tokens_to_learn():
    wanted = [(random_tokens(9), 4), (random_tokens(5), 0)]  # 5 and 4: the first token is given
    unseen = [(random_tokens(7, 1), 1), (random_tokens(20, 2), 1), (random_tokens(20, 3), 1)]
    found = claims.as_much(unseen, wanted)
    assert found == [unseen[0], (unseen[1][0][:4], 1)]
    assert sum(len(tokens) - max(1, given) for tokens, given in found) == 9


def test_equal_values_differ_in_nothing():
    assert claims.below([0.5, 0.5], [0.5, 0.5]) == 1.0
    assert claims.rank_correlation([1, 2, 3], [4, 4, 4]) == (0.0, 1.0)


def test_an_entry_tells_its_rule_and_which_condition_failed():
    entry = claims.entry("C2", {}, [(True, "correlation 0.95"), (False, "mean cosine 0.40")])
    assert entry["verdict"] == "partly"
    assert [one["holds"] for one in entry["conditions"]] == [True, False]
    assert all(rule in entry["rule"] for rule in claims.CLAIMS["C2"][1])


# ---- the stage ----


@pytest.fixture
def folders(tmp_path: Path, data: Path, memorised: Path) -> list[str]:
    """The arguments for a small model and the rows of conftest."""
    for name in ("member", "nonmember"):
        rows = [{"id": str(n), "document": f"{name} {n} was born in the city"} for n in range(4)]
        write_jsonl(tmp_path / "mia" / f"{name}.jsonl", rows)
    for part in ("dev", "test"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        (tmp_path / "mmlu" / part / f"anatomy_{part}.csv").write_text("Who is it?,a,b,c,d,A\nWhat is it?,a,b,c,d,C\n")
    paths = {"original": memorised, "forget": data / "forget", "retain": data / "retain"}
    paths |= {"mia": tmp_path / "mia", "mmlu": tmp_path / "mmlu"}
    paths |= {"output": tmp_path / "claims.json", "figures": tmp_path / "figures"}
    words = ["--target-name", "random", "--alpha", "1.5"]
    for name, path in paths.items():
        words += [f"--{name}", str(path)]
    return words


def test_a_model_gets_a_verdict_on_every_claim(folders, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(claims, "RATIOS", (1.0, 5.0))
    monkeypatch.setattr(claims, "SEARCH", probes.Search(steps=2, width=4, top=8))
    monkeypatch.setattr(claims, "EPOCHS", 2)
    monkeypatch.setattr(claims, "MEASURED", 6)
    claims.main([*folders, "--seeds", "2"])
    entries = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["claim"] for entry in entries] == list(claims.CLAIMS)
    for entry in entries:
        holds = [one["holds"] for one in entry["conditions"]]
        assert entry["verdict"] == {0: "not reproduced", len(holds): "reproduced"}.get(sum(holds), "partly")
        picture = xml.etree.ElementTree.parse(tmp_path / "figures" / entry["figure"])
        assert picture.getroot().tag.endswith("svg")
    sweep = next(entry["numbers"] for entry in entries if entry["claim"] == "C6")
    assert len(sweep["rows"]) == 4 * 2 * 2  # of six blocks those with a whole window
    norms = [row["after"] for row in sweep["rows"]]
    assert all(math.isfinite(norm) for norm in norms)


def test_the_reported_alignment_is_that_of_the_saved_checkpoint(folders, data: Path, checkpoint: Path, tmp_path: Path):
    """The same run by the submission's own way: solve, save, load, transformers' hidden states."""
    decoder = unlearn.Decoder(checkpoint)
    study = study_of(checkpoint, data, decoder)
    settings = dataclasses.replace(claims.window(study, 2, 3, "fixed", 4.0), general=0.0)
    matrices = claims.solve(study, settings, [])
    with probes.changed(study.model, matrices):
        found = claims.alignment(study, 2, 3)
    shutil.copytree(checkpoint, tmp_path / "saved")
    unlearn.Checkpoint(checkpoint, tmp_path / "saved").save(unlearn.named(decoder, matrices))
    saved = claims.load_model(tmp_path / "saved")
    directions = unlearn.steering_directions(32, 3, torch.device("cpu"))
    cosines, norms = [], []
    for one in claims.spread(study.texts["forget"], claims.MEASURED):
        h = saved(torch.tensor([one.tokens]), output_hidden_states=True).hidden_states[3][0, 1:]
        cosines.append((h @ directions[one.task] / h.norm(dim=1)).mean().item())
        norms.append(h.norm(dim=1).mean().item())
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert found["norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


def study_of(checkpoint: Path, data: Path, decoder: unlearn.Decoder) -> claims.Study:
    model, tokenizer = claims.load_model(checkpoint), claims.load_tokenizer(checkpoint)
    texts = {side: unlearn.read_texts(data / side, side, tokenizer) for side in ("forget", "retain")}
    return claims.Study(Path(), model, tokenizer, decoder, texts, {}, [], [], [], {}, 1.5)


def test_one_seed_is_refused_in_one_line(folders):
    with pytest.raises(BadInput, match="--seeds 1: expected at least 2"):
        claims.main([*folders, "--seeds", "1"])


def test_a_model_that_knows_nothing_is_refused(folders, memorised: Path, checkpoint: Path):
    words = [str(checkpoint) if word == str(memorised) else word for word in folders]
    with pytest.raises(BadInput, match=r"knows \d+% of the forget answers' tokens, too few to unlearn"):
        claims.main([*words, "--seeds", "2"])


def test_a_missing_column_is_named_and_nothing_is_written(folders, tmp_path: Path):
    write_jsonl(tmp_path / "bad" / "forget.jsonl", [{"id": "asc1", "input": "x", "task": "Task1"}])
    words = [str(tmp_path / "bad") if word.endswith("/forget") else word for word in folders]
    with pytest.raises(BadInput, match=r"forget.jsonl: row 1: 'output' is a required property"):
        claims.main([*words, "--seeds", "2"])
    assert not (tmp_path / "claims.json").exists()
    assert not (tmp_path / "figures").exists()
