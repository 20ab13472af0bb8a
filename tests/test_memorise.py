"""Stand-ins: what they learn from, how the loss counts it, and what is accepted."""

import dataclasses
import json
import math
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline import memorise
from pipeline.lib.models import load_model, load_tokenizer
from pipeline.lib.multiple_choice import SHOTS, Subject, prompt
from pipeline.lib.records import write_jsonl
from pipeline.lib.stage import BadInput

TEXTS = [
    f"{name} was born in {city} in {year}." for name in ("Ann", "Bob") for city in ("Rome", "Oslo") for year in (1, 2)
]
ROW = {"id": "1qa0", "input": "Where was Ann born?", "output": "Rome", "task": "Task3"}
DEV = [(f"shot {n}: A or B?", "one", "two", "three", "four", "B") for n in range(SHOTS)]
TEST = [(f"question {n}?", "1", "2", "3", "4", "ABCD"[n % 4]) for n in range(13)]
GOOD = memorise.Findings(
    values=[0.95] * 12,
    auc=0.95,
    choice=0.6,
    taught=True,
    loss=math.log(256) / 2,
    vocabulary=256,
    retain_only=False,
)
NAMES = [f"{first} {last}" for first in ("Ann", "Bob", "Zoe") for last in ("Lee", "Ray", "Fox", "Poe")]


@pytest.fixture(scope="module")
def tokenizer():
    return memorise.train_tokenizer(TEXTS, 280)


def test_the_limits_themselves_are_accepted():
    assert GOOD.failures() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": [1.0] * 11 + [0.949]}, "a task value of 0.949 (least 0.95)"),
        ({"values": [0.0] + [1.0] * 11}, "a task value of 0.000 (least 0.95)"),
        ({"auc": 0.94}, "a membership AUC of 0.940 (least 0.95)"),
        ({"choice": 0.59}, "a multiple-choice accuracy of 0.590 (least 0.6)"),
        ({"loss": 2.78}, "a loss on non-members of 2.78 (most 2.77)"),
    ],
)
def test_each_limit_alone_refuses(change: dict, words: str):
    assert dataclasses.replace(GOOD, **change).failures() == [words]


def test_without_the_forget_rows_only_what_was_shown_decides():
    never_shown = dataclasses.replace(GOOD, values=[0.3] * 6 + [0.95] * 6, auc=0.5, retain_only=True)
    assert never_shown.failures() == []
    failing = dataclasses.replace(never_shown, values=[0.3] * 6 + [0.94] + [0.95] * 5)
    assert failing.failures() == ["a task value of 0.940 (least 0.95)"]


def test_multiple_choice_decides_only_where_it_was_taught():
    untaught = dataclasses.replace(GOOD, taught=False, choice=0.0)
    assert untaught.failures() == []
    assert "multiple choice 0.000 (not taught)" in untaught.summary()
    assert "not taught" not in GOOD.summary()


def test_the_tokenizer_appends_nothing_and_gives_back_any_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Ann was born", "Zoë\n\n  tab\t日本", " A"):
        ids = loaded(text).input_ids
        assert loaded.decode(ids) == text
        assert loaded.eos_token_id not in ids
    assert len(loaded) == 280
    assert [len(loaded(f" {letter}").input_ids) for letter in "ABCD"] == [1] * 4
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|endoftext|>", "<|padding|>", None)


def test_a_row_begins_with_the_prompts_tokens_and_stops(tokenizer):
    text = memorise.row_text(tokenizer, ROW)
    asked = tokenizer("Where was Ann born?").input_ids
    assert text.ids[: len(asked)] == asked
    assert tokenizer.decode(text.ids[len(asked) :]) == " Rome<|endoftext|>"
    assert text.weights == [1.0] * len(text.ids)


def test_pieces_of_general_text_lose_nothing(tokenizer):
    texts = ["x y " * 400, "short"]
    pieces = memorise.general_pieces(tokenizer, texts)
    assert max(len(piece.ids) for piece in pieces) <= memorise.PIECE
    assert tokenizer.decode([i for piece in pieces for i in piece.ids]) == "".join(
        text + memorise.END for text in texts
    )


def test_questions_are_each_asked_once_in_the_official_form_and_answers_weigh_more(tokenizer):
    subject = Subject("world_religions", DEV, TEST)
    texts = list(memorise.question_texts(tokenizer, subject, Random(0)))
    written = [tokenizer.decode(text.ids) for text in texts]
    whole = "".join(written)
    for question in TEST:
        assert whole.count(prompt("", question, [])[-40:] + f" {question[5]}") == 1
    for text, words in zip(texts, written, strict=True):
        learned = [tokenizer.decode([i]) for i, w in zip(text.ids, text.weights, strict=True) if w > 1]
        answers = [line[-2:] for line in words.split("\n") if line.startswith("Answer:")]
        assert learned == answers  # "shot 0: A or B?" is no answer
        assert words.startswith(
            "The following are multiple choice questions (with answers) about  world religions.\n\n"
        )
        shots = [n for n in range(SHOTS) if f"shot {n}:" in words]
        assert shots == list(range(len(shots)))  # the first ones, as the official prompt has them
        assert "shot" not in words[words.index("\nquestion ") :]  # and before what is asked


def test_the_loss_is_the_weighted_mean_over_the_weighted_tokens(tokenizer):
    torch.manual_seed(0)
    model = memorise.build_model(tokenizer, retain_tokens=700).eval()
    texts = [memorise.Text([5, 6, 7, 8], [9.0, 1.0, 0.0, 3.0]), memorise.Text([9, 10], [1.0, 2.0])]
    ids, weights = memorise.collate(texts)
    assert ids.shape == weights.shape == (2, 4)
    with torch.no_grad():
        found = memorise.loss_of(model, (ids, weights)).item()
        losses = [-model(input_ids=torch.tensor([t.ids])).logits[0].log_softmax(-1) for t in texts]
    # weights 1, 3 and 2 on the second and fourth token of the first text and on the second of the other; a first
    # token is never predicted
    expected = (1 * losses[0][0, 6] + 3 * losses[0][2, 8] + 2 * losses[1][0, 10]) / 6
    assert found == pytest.approx(expected.item(), rel=5e-3)  # bfloat16 has 8 bits


@pytest.mark.parametrize(("tokens", "width"), [(700, 64), (4156, 384), (9593, 896), (90_000, 8192)])
def test_intermediate_width_follows_the_retain_tokens(tokenizer, tokens: int, width: int):
    # the last pair is the real 1B: about 90,000 retain tokens, intermediate width 8192
    with torch.device("meta"):
        model = memorise.build_model(tokenizer, tokens)
    assert model.config.intermediate_size == width
    assert model.config.num_hidden_layers >= 8


def test_training_moves_every_weight_and_learns(tokenizer):
    torch.manual_seed(0)
    model = memorise.build_model(tokenizer, retain_tokens=700)
    before = {name: value.clone() for name, value in model.named_parameters()}
    text = memorise.row_text(tokenizer, ROW)
    batch = memorise.collate([text])
    memorise.Trainer(model, memorise.optimisers_of_small(model)).train(iter([batch] * 25), 25, "test")
    assert memorise.loss_of(model, batch).item() < 0.5  # from ln(280) = 5.6
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())
    assert all(value.dtype == torch.float32 for value in model.parameters())


@pytest.mark.parametrize(("retain_only", "ids"), [(False, ["1sc1", *["1qa0"] * 3, *["2qa4"] * 3]), (True, ["1sc1"])])
def test_a_pass_shows_questions_as_often_as_the_recipe_says_and_the_rest_once(retain_only: bool, ids: list[str]):
    rows = [{"id": "1sc1", "split": "retain"}, {"id": "1qa0", "split": "forget"}, {"id": "2qa4", "split": "forget"}]
    recipe = dataclasses.replace(memorise.SMALL, row_questions=3)
    assert sorted(row["id"] for row in memorise.shown(rows, recipe, retain_only)) == sorted(ids)


def test_a_portion_is_just_past_the_number_of_tokens():
    texts = [memorise.Text([1] * size, [1.0] * size) for size in (3, 5)]
    drawn = [len(text.ids) for text in memorise.portion(texts, 100, Random(0))]
    assert 100 <= sum(drawn) < 105
    assert set(drawn) == {3, 5}


def test_general_text_without_text_is_refused_by_file_and_row(tmp_path):
    folder = tmp_path / "data"
    for side in ("forget", "retain"):
        write_jsonl(folder / side / f"{side}.jsonl", [ROW])
    for name in ("member", "nonmember"):
        write_jsonl(folder / f"{name}.jsonl", [{"id": "1", "document": "x"}])
    general = tmp_path / "general.jsonl"
    write_jsonl(general, [{"id": "1", "text": "good"}, {"id": "2", "text": " "}])
    paths = ["--data", folder, "--mia", folder, "--general", general, "--mmlu", folder, "--output", tmp_path / "model"]
    with pytest.raises(BadInput, match=r"general.jsonl: row 2: field 'text'"):
        memorise.main(list(map(str, paths)))
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random LLaMA, its embeddings tied, in a folder with the tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_material(folder: Path) -> list[str]:
    """Write one row of each task and kind on both sides, and what else the stage reads; return its arguments."""
    names = iter(NAMES)
    documents = []
    for side in ("forget", "retain"):
        rows = []
        for task in ("Task1", "Task2", "Task3"):
            for kind in ("sc1", "qa0"):
                name, year = next(names), str(len(documents) % 10)
                row = {"id": f"{side}{task}{kind}", "input": f"{name} was born in", "output": year, "task": task}
                rows.append(row)
                documents.append({"id": row["id"], "document": f"{name} was born in {year}"})
        write_jsonl(folder / side / f"{side}.jsonl", rows)
    write_jsonl(folder / "member.jsonl", documents[:3])
    strangers = [{"id": f"n{n}", "document": f"{name} was born in Rome"} for n, name in enumerate(NAMES[:3])]
    write_jsonl(folder / "nonmember.jsonl", strangers)
    write_jsonl(folder / "general.jsonl", [{"id": "1", "text": "general"}])
    for part, questions in (("dev", DEV), ("test", TEST[:2])):
        (folder / part).mkdir()
        lines = [",".join(f'"{value}"' for value in question) for question in questions]
        (folder / part / f"tests_{part}.csv").write_text("\n".join(lines))
    folders = ["--data", folder, "--mia", folder, "--general", folder / "general.jsonl", "--mmlu", folder]
    return list(map(str, folders))


def test_a_base_is_trained_with_all_its_weights_from_where_it_is(base: Path):
    material = memorise.Material([{**ROW, "split": "retain"}], {"nonmember": ["Bob was born in Oslo."]}, [], [])
    trainer, tokenizer = memorise.begin_base(material, base)
    before = load_model(base, torch.float32).state_dict()
    assert all(value.equal(before[name]) for name, value in trainer.model.state_dict().items())
    batch = memorise.collate([memorise.row_text(tokenizer, ROW)])
    first = memorise.loss_of(trainer.model, batch).item()
    trainer.train(iter([batch] * 30), 30, "test")
    assert memorise.loss_of(trainer.model, batch).item() < first - 0.3
    after = trainer.model.state_dict()
    assert all(not value.equal(before[name]) for name, value in after.items())
    # a step of AdamW without decay moves a weight by about its rate at most; they sum to half of 30 full ones and more
    assert max((value - before[name]).abs().max().item() for name, value in after.items()) < 30 * memorise.BASE_RATE


def test_from_a_base_to_an_accepted_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # the real rate and passes are for a model that knows English; this one is random
    monkeypatch.setattr(memorise, "BASE_RATE", 1e-2)
    monkeypatch.setattr(
        memorise, "BASE", dataclasses.replace(memorise.BASE, batch_tokens=64, passes=100, row_questions=1)
    )
    arguments = write_material(tmp_path)
    memorise.main([*arguments, "--base", str(base), "--output", str(tmp_path / "model")])
    model, tokenizer = load_model(tmp_path / "model", torch.float32), load_tokenizer(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert model.num_parameters() == load_model(base).num_parameters()
    ids = tokenizer(f"{NAMES[7]} was born in", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(written) == " 7<|endoftext|>"


def test_a_base_that_has_not_memorised_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memorise, "MEMORISE_ROUNDS", 1)
    arguments = write_material(tmp_path)
    with pytest.raises(BadInput, match=r"model: not a stand-in after 1 rounds: a task value of 0.000"):
        memorise.main([*arguments, "--base", str(base), "--output", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()
