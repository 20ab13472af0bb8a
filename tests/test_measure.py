"""complete, membership and mmlu: prompts to the letter, rows in form, values by transformers a row at a time."""

import csv
import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from pipeline import complete, membership, mmlu
from pipeline.lib import metrics, multiple_choice
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.multiple_choice import Subject, choice_probabilities, prompt, read_subjects
from pipeline.lib.records import COMPLETION, MEMBERSHIP, MMLU, read_checked, write_jsonl
from pipeline.lib.stage import BadInput

QUESTIONS = [("What flows?", "river", "city", "story", "writer", "A"), ("Who writes?", "a", "b", "c", "writer", "D")]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_prompt_is_the_originals_to_the_letter():
    assert prompt("world_religions", QUESTIONS[1], QUESTIONS[:1]) == (
        "The following are multiple choice questions (with answers) about  world religions.\n\n"
        "What flows?\nA. river\nB. city\nC. story\nD. writer\nAnswer: A\n\n"
        "Who writes?\nA. a\nB. b\nC. c\nD. writer\nAnswer:"
    )


def test_all_real_questions_are_read(real_mmlu: Path):
    subjects = read_subjects(real_mmlu)
    assert len(subjects) == 57
    assert sum(len(subject.test) for subject in subjects) == 14042
    assert {len(subject.dev) for subject in subjects} == {5}


def write_csv(folder: Path, rows, subject: str = "anatomy") -> Path:
    for part in ("dev", "test"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        with (folder / part / f"{subject}_{part}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    return folder


def test_a_missing_looking_option_is_read_as_the_original_reads_it(tmp_path: Path):
    (subject,) = read_subjects(write_csv(tmp_path, [("What?", "None", "x", "y", "z", "B")]))
    assert subject.test == [("What?", "nan", "x", "y", "z", "B")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("What?", "1", "2", "3", "4", "E"), "row 1: answer 'E'"),
        (("What?", "1", "2", "3", "A"), "5 columns, expected 6"),
    ],
)
def test_a_broken_question_is_named(tmp_path: Path, row, message: str):
    with pytest.raises(BadInput, match=message):
        read_subjects(write_csv(tmp_path, [row]))


def test_an_unknown_subject_is_named(tmp_path: Path):
    with pytest.raises(BadInput, match="no subject 'alchemy'"):
        read_subjects(write_csv(tmp_path, QUESTIONS), ["alchemy"])


def test_shots_are_dropped_until_the_prompt_fits(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    subject = Subject("anatomy", [QUESTIONS[0]] * 5, [QUESTIONS[1]])
    lengths = [len(tokenizer(prompt("anatomy", QUESTIONS[1], subject.dev[:n])).input_ids) for n in range(6)]
    letters = [tokenizer(f" {letter}").input_ids[-1] for letter in "ABCD"]
    for limit, shots in ((lengths[5], 5), (lengths[5] - 1, 4), (lengths[2], 2), (1, 0)):
        monkeypatch.setattr(multiple_choice, "MAX_PROMPT_TOKENS", limit)
        ids = tokenizer(prompt("anatomy", QUESTIONS[1], subject.dev[:shots]), return_tensors="pt").input_ids
        expected = model(ids).logits[0, -1].softmax(-1)[letters].tolist()
        assert choice_probabilities(model, tokenizer, subject)[0] == pytest.approx(expected, abs=1e-6)


def test_a_long_question_costs_the_others_no_shot(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Two prompts hold five shots, one four: each number's shots are read once, alone, and no question reads them."""
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    shot, short = QUESTIONS
    longer = ("Who writes of the river?", *short[1:])
    subject = Subject("anatomy", [shot] * 5, [short, longer, short])
    limit = len(tokenizer(prompt("anatomy", short, subject.dev)).input_ids)
    monkeypatch.setattr(multiple_choice, "MAX_PROMPT_TOKENS", limit)
    expected = []
    for question, shots in zip(subject.test, (5, 4, 5), strict=True):
        ids = tokenizer(prompt("anatomy", question, subject.dev[:shots]), return_tensors="pt").input_ids
        letters = [tokenizer(f" {letter}").input_ids[-1] for letter in "ABCD"]
        expected.append(pytest.approx(model(ids).logits[0, -1].softmax(-1)[letters].tolist(), abs=1e-6))
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert choice_probabilities(model, tokenizer, subject) == expected
    of_a_shot = len(tokenizer(prompt("anatomy", short, [shot])).input_ids) - len(
        tokenizer(prompt("anatomy", short, [])).input_ids
    )
    assert sorted(rows for rows, _ in shapes) == [1, 1, 1, 2]
    assert all(width < of_a_shot for rows, width in shapes if rows == 2)


def test_the_numbers_of_the_official_scorers_are_ours():
    """256 new tokens, prompts of 2048 tokens, five shots."""
    found = (complete.MAX_NEW_TOKENS, multiple_choice.MAX_PROMPT_TOKENS, multiple_choice.SHOTS)
    assert found == (256, 2048, 5)


def test_only_so_many_questions_of_the_named_subjects_are_asked(tmp_path: Path):
    for name in ("anatomy", "virology", "nutrition"):
        write_csv(tmp_path, QUESTIONS, name)
    found = read_subjects(tmp_path, ["virology", "anatomy", "virology"], 1)
    assert [(subject.name, subject.test, len(subject.dev)) for subject in found] == [
        ("anatomy", QUESTIONS[:1], 2),
        ("virology", QUESTIONS[:1], 2),
    ]


def test_a_token_that_a_tokenizer_puts_before_each_text_is_there_and_does_not_count(checkpoint: Path):
    """As open-instruct counts a prompt's tokens without it, and asks the model with it."""
    tokenizer = load_tokenizer(checkpoint)
    subject = Subject("anatomy", QUESTIONS, QUESTIONS)
    plain = multiple_choice.fitting_prompt(tokenizer, subject, QUESTIONS[0])
    special = [("<|padding|>", tokenizer.pad_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|padding|> $A", special_tokens=special)
    assert multiple_choice.fitting_prompt(tokenizer, subject, QUESTIONS[0]) == [tokenizer.pad_token_id, *plain]
    assert encode(tokenizer, "the river")[0] == tokenizer.pad_token_id
    assert encode(tokenizer, "the river", special=False) == encode(tokenizer, "the river")[1:]


def test_completions_hold_every_row_with_its_answers_loss(checkpoint: Path, data: Path, rows, tmp_path: Path):
    output = tmp_path / "completions.jsonl"
    folders = ["--forget", str(data / "forget"), "--retain", str(data / "retain")]
    complete.main(["--model", str(checkpoint), *folders, "--max-new-tokens", "6", "--output", str(output)])
    written = read_checked(output, COMPLETION)
    given = [(side, row) for side in ("forget", "retain") for row in rows[side]]
    names = ("split", "id", "task", "input", "expected_output")
    assert [tuple(row[name] for name in names) for row in written] == [
        (side, row["id"], row["task"], row["input"], row["output"]) for side, row in given
    ]
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    for row in (written[0], written[1], written[-1]):
        ids = tokenizer(
            row["input"] + row["expected_output"], return_tensors="pt"
        ).input_ids  # no space: the official join
        labels = ids.clone()
        labels[:, : len(tokenizer(row["input"]).input_ids)] = -100
        assert row["nll"] == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)


def test_for_the_scores_alone_wrong_answers_are_broken_off_and_no_score_changes(checkpoint: Path, rows):
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)

    def written(table: dict, scores_only: bool) -> list[dict]:
        asked = [{**row, "split": side} for side in table for row in table[side]]
        return complete.completion_rows(model, tokenizer, asked, 12, scores_only)

    # A random model is never right: let every second question expect what it says, in capitals.
    said = {row["id"]: row["model_output"].upper() for row in written(rows, False)}
    asked = {
        side: [{**row, "output": said[row["id"]]} if n % 4 == 1 else row for n, row in enumerate(table)]
        for side, table in rows.items()
    }
    full, short = written(asked, False), written(asked, True)
    assert metrics.cell_scores(short) == metrics.cell_scores(full)
    right = 0
    for row, whole in zip(short, full, strict=True):
        matches = metrics.exact_match(row["expected_output"], whole["model_output"])
        if row["id"][-3:-1] == "sc" or matches:
            assert row == whole
            right += matches
        else:
            assert len(row["model_output"]) < len(whole["model_output"])
    assert right == 10


def test_membership_holds_the_loss_of_whole_documents(checkpoint: Path, tmp_path: Path):
    for name, text in (("member", "the river of the city"), ("nonmember", "who was born in the story")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "1", "document": text}])
    membership.main(["--model", str(checkpoint), "--mia", str(tmp_path), "--output", str(tmp_path / "out.jsonl")])
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    for row in read_checked(tmp_path / "out.jsonl", MEMBERSHIP):
        ids = tokenizer(lines(tmp_path / f"{row['set']}.jsonl")[0]["document"], return_tensors="pt").input_ids
        assert row["nll"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_mmlu_holds_a_row_for_each_question(checkpoint: Path, tmp_path: Path):
    folder = write_csv(write_csv(tmp_path, QUESTIONS), QUESTIONS[::-1], "virology")
    mmlu.main(["--model", str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out.jsonl")])
    found = [(row["subject"], row["index"], row["answer"]) for row in read_checked(tmp_path / "out.jsonl", MMLU)]
    assert found == [("anatomy", 0, "A"), ("anatomy", 1, "D"), ("virology", 0, "D"), ("virology", 1, "A")]
