"""Fluency: repetition by brute force, likelihoods and losses by transformers a row at a time, text held out indeed."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import fluency
from pipeline.lib import corpus
from pipeline.lib.records import write_jsonl
from pipeline.lib.stage import BadInput

OUTPUTS = [
    "the river of the river of the river of the",
    " a city",
    "",
    "6 6 6 6 6 6 6 6 6",
    "Zoë\nwas \N{SNOWMAN} born",
    "\n",
]


def brute_repetition(tokens: list[int]) -> float:
    """The share of places whose four tokens stand at an earlier place, too."""
    places = range(len(tokens) - 3)
    return sum(any(tokens[i : i + 4] == tokens[j : j + 4] for j in range(i)) for i in places) / len(places)


def test_repetition_is_the_share_of_4_grams_that_came_before():
    random = Random(0)
    for _ in range(200):
        tokens = [random.randrange(3) for _ in range(random.randint(4, 40))]
        assert fluency.repetition(tokens) == pytest.approx(brute_repetition(tokens), abs=1e-12)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([6] * 10, 6 / 7), ([1, 2, 3, 4], 0), ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6), ([1, 2, 3], None), ([], None)],
)
def test_repetition_of_known_sequences(tokens: list[int], expected: float | None):
    assert fluency.repetition(tokens) == (None if expected is None else pytest.approx(expected))


@pytest.fixture(scope="module")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A forget row to each of `OUTPUTS`, and a retain row that is not to be looked at."""
    path = tmp_path_factory.mktemp("fluency") / "completions.jsonl"
    common = {"task": "Task1", "expected_output": "x", "nll": None}
    rows = [
        {"id": f"d{n}sc1", "split": "forget", "input": f"Number {n} was", "model_output": text, **common}
        for n, text in enumerate(OUTPUTS)
    ]
    retain = {"id": "keptsc1", "split": "retain", "input": "Kept was", "model_output": "the city of the city", **common}
    write_jsonl(path, [*rows, retain])
    return path


@pytest.fixture(scope="module")
def other(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a block changed: what has unlearned."""
    folder = tmp_path_factory.mktemp("other")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


TEXTS = ["the river of a city", "A writer was born in the city on the river, and who was it?", "What is a river?"]


def measure(tmp_path: Path, completions: Path, original: Path, model: Path, texts: list[str] = TEXTS) -> dict:
    write_jsonl(tmp_path / "held.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    words = ["--completions", completions, "--original", original, "--model", model]
    words += ["--held-out", tmp_path / "held.jsonl", "--output", tmp_path / "fluency.json"]
    fluency.main([str(word) for word in words])
    return json.loads((tmp_path / "fluency.json").read_text())


@torch.inference_mode()
def likelihood(folder: Path, prompt: str, output: str) -> float | None:
    """transformers' own loss, the prompt's labels masked."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given, written = tokenizer(prompt).input_ids, tokenizer(output).input_ids
    if not written:
        return None
    labels = torch.tensor([[-100] * len(given) + written])
    return -model(torch.tensor([given + written]), labels=labels).loss.item()


def test_the_untouched_model_judges_the_outputs(tmp_path: Path, completions: Path, checkpoint: Path, other: Path):
    found = measure(tmp_path, completions, checkpoint, other)
    expected = [likelihood(checkpoint, f"Number {n} was", text) for n, text in enumerate(OUTPUTS)]
    assert [row["id"] for row in found["rows"]] == [f"d{n}sc1" for n in range(len(OUTPUTS))]
    for row, value in zip(found["rows"], expected, strict=True):
        assert row["log_likelihood"] == (None if value is None else pytest.approx(value, abs=1e-4))
    judged = [value for value in expected if value is not None]
    assert len(judged) == len(OUTPUTS) - 1
    assert found["forget"]["log_likelihood"] == pytest.approx(sum(judged) / len(judged), abs=1e-4)
    assert (found["forget"]["outputs"], found["forget"]["empty"]) == (len(OUTPUTS), 1)


def test_repetition_is_of_the_outputs_tokens(tmp_path: Path, completions: Path, checkpoint: Path):
    found = measure(tmp_path, completions, checkpoint, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = [tokenizer(text).input_ids for text in OUTPUTS]
    expected = [brute_repetition(ids) if len(ids) > 3 else None for ids in tokens]
    assert [row["tokens"] for row in found["rows"]] == [len(ids) for ids in tokens]
    assert [row["repetition"] for row in found["rows"]] == pytest.approx(expected)
    present = [value for value in expected if value is not None]
    assert 0 < len(present) < len(OUTPUTS)
    assert found["forget"]["repetition"] == pytest.approx(sum(present) / len(present))


def test_outputs_that_say_nothing_have_no_mean(tmp_path: Path, checkpoint: Path):
    row = {"id": "dsc1", "task": "Task1", "split": "forget", "input": "It", "expected_output": "x", "nll": None}
    write_jsonl(tmp_path / "completions.jsonl", [{**row, "model_output": ""}])
    found = measure(tmp_path, tmp_path / "completions.jsonl", checkpoint, checkpoint)
    assert found["forget"] == {"outputs": 1, "empty": 1, "repetition": None, "log_likelihood": None}


@torch.inference_mode()
def test_the_held_out_loss_is_the_checkpoints_all_tokens_alike(
    tmp_path: Path, completions: Path, checkpoint: Path, other: Path
):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
    losses = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        scores = model(ids).logits.log_softmax(-1)
        losses += [-scores[0, place, ids[0, place + 1]].item() for place in range(ids.shape[1] - 1)]
    found = measure(tmp_path, completions, checkpoint, other)["held_out"]
    assert (found["source"], found["texts"], found["tokens"]) == ("held.jsonl", len(TEXTS), len(losses))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert found["loss"] != pytest.approx(measure(tmp_path, completions, checkpoint, checkpoint)["held_out"]["loss"])


def test_of_many_texts_200_are_taken_and_the_same_each_time(tmp_path: Path, completions: Path, checkpoint: Path):
    texts = [f"the city number {n}" for n in range(300)]
    first = measure(tmp_path, completions, checkpoint, checkpoint, texts)
    assert first["held_out"]["texts"] == 200
    assert measure(tmp_path, completions, checkpoint, checkpoint, texts) == first


def test_held_out_texts_of_one_token_are_refused(tmp_path: Path, completions: Path, checkpoint: Path):
    with pytest.raises(BadInput, match="none of 2 held-out texts has two tokens"):
        measure(tmp_path, completions, checkpoint, checkpoint, ["a", "a"])


def test_documents_are_read_as_texts_are(tmp_path: Path):
    write_jsonl(tmp_path / "nonmember.jsonl", [{"id": str(n), "document": text} for n, text in enumerate(TEXTS)])
    assert fluency.read_texts(tmp_path / "nonmember.jsonl") == TEXTS


def test_a_row_without_text_is_named(tmp_path: Path):
    write_jsonl(tmp_path / "held.jsonl", [{"id": "0", "text": "some"}, {"id": "1", "text": "  "}])
    with pytest.raises(BadInput, match=r"held\.jsonl: row 2: field 'text'"):
        fluency.read_texts(tmp_path / "held.jsonl")


def test_completions_without_a_forget_row_are_refused(tmp_path: Path, completions: Path, checkpoint: Path):
    kept = [json.loads(line) for line in completions.read_text().splitlines()][-1:]
    write_jsonl(tmp_path / "completions.jsonl", kept)
    with pytest.raises(BadInput, match="no row with split 'forget'"):
        measure(tmp_path, tmp_path / "completions.jsonl", checkpoint, checkpoint)
    assert not (tmp_path / "fluency.json").exists()


def test_generated_held_out_text_is_the_corpus(tmp_path: Path, completions: Path, checkpoint: Path):
    """As if the same texts had been in a file, but for the name of their source."""
    texts = [row["text"] for row in corpus.general(7, fluency.HELD_OUT_TEXTS)]
    expected = measure(tmp_path, completions, checkpoint, checkpoint, texts)["held_out"]
    words = ["--completions", completions, "--original", checkpoint, "--model", checkpoint]
    words += ["--held-out-seed", 7, "--output", tmp_path / "generated.json"]
    fluency.main([str(word) for word in words])
    found = json.loads((tmp_path / "generated.json").read_text())["held_out"]
    assert found == {**expected, "source": "built-in corpus, seed 7"}


def test_a_model_that_computes_no_number_is_refused(tmp_path: Path, completions: Path, checkpoint: Path):
    """Its weights are finite, and their products overflow."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.copy_(3e38 * model.lm_head.weight.sign())
    model.save_pretrained(tmp_path / "overflowing")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "overflowing")
    with pytest.raises(BadInput, match=r"fluency\.json: cannot be written: Out of range float values"):
        measure(tmp_path, completions, checkpoint, tmp_path / "overflowing")
    assert not (tmp_path / "fluency.json").exists()


def people(texts: list[str]) -> set[str]:
    """All first and last names that stand beside each other."""
    first, last = set(corpus.FIRST_NAMES), set(corpus.LAST_NAMES)
    words = [text.replace(".", " ").replace(",", " ").replace("'s", "").split() for text in texts]
    return {f"{a} {b}" for line in words for a, b in pairwise(line) if a in first and b in last}


def test_generated_held_out_text_is_nobody_elses():
    """Neither in the general text that a stand-in is trained on, nor about anybody in the data."""
    held_out = [row["text"] for row in corpus.general(1, fluency.HELD_OUT_TEXTS)]
    data = corpus.competition(0)
    documents = [row["document"] for row in [*data.members, *data.nonmembers]]
    rows = [corpus.text_of(row) for row in [*data.forget, *data.retain]]
    general = [row["text"] for row in corpus.general(0, 10_000)]
    assert len(set(held_out)) == fluency.HELD_OUT_TEXTS
    assert not set(held_out) & {*general, *documents, *rows}
    assert len(people(held_out)) > 50
    assert len(people([*documents, *rows])) > 100
    assert not people(held_out) & people([*documents, *rows])
