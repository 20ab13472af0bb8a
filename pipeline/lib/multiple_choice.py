"""MMLU's questions and prompts, as open-instruct's evaluation builds them.

Source: open-instruct, eval/mmlu; Hendrycks et al., arXiv 2009.03300.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from pipeline.lib.inference import Tokens, next_token_probabilities
from pipeline.lib.models import Model, Tokenizer, encode
from pipeline.lib.records import CHOICES
from pipeline.lib.stage import BadInput

SHOTS = 5
MAX_PROMPT_TOKENS = 2048

Question = tuple[str, ...]  # six texts: question, four options, letter of the answer


@dataclass(frozen=True)
class Subject:
    """One of MMLU's subjects: `dev` has the shots, `test` the questions that count."""

    name: str
    dev: list[Question]
    test: list[Question]


def read_subjects(folder: Path, subjects: Sequence[str] | None = None, limit: int | None = None) -> list[Subject]:
    """Read `folder`/{dev,test}/<subject>_{dev,test}.csv: all or the named ones, at most `limit` questions each."""
    found = sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv"))
    if not found:
        raise BadInput(f"{folder / 'test'}: no *_test.csv")
    if limit is not None and limit < 1:
        raise BadInput(f"{folder}: {limit} questions of each subject asked for, expected at least 1")
    for name in subjects or []:
        if name not in found:
            raise BadInput(f"{folder / 'test'}: no subject {name!r}")
    return [
        Subject(name, _read(folder / "dev" / f"{name}_dev.csv"), _read(folder / "test" / f"{name}_test.csv")[:limit])
        for name in sorted(set(subjects or found))
    ]


def prompt(subject: str, question: Question, shots: Sequence[Question]) -> str:
    """Return head, answered shots and the open question. The original's head has two spaces before the subject."""
    head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
    return head + "".join(f"{_ask(shot)} {shot[5]}\n\n" for shot in shots) + _ask(question)


def choice_probabilities(model: Model, tokenizer: Tokenizer, subject: Subject) -> list[list[float]]:
    """Return for each test question the probabilities of " A" to " D" as the next token (over the whole vocabulary).

    Questions with equally many shots are asked together: one that leaves room for fewer shares as few with the others.
    """
    letters, prompts = letter_tokens(tokenizer), [_fit(tokenizer, subject, question) for question in subject.test]
    found: list[list[float]] = [[] for _ in prompts]
    for shots in {shots for shots, _ in prompts}:
        asked = [number for number, (own, _) in enumerate(prompts) if own == shots]
        probabilities = next_token_probabilities(model, [prompts[number][1] for number in asked], letters)
        for number, row in zip(asked, probabilities, strict=True):
            found[number] = row
    return found


def letter_tokens(tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of " A" to " D"."""
    return [tokenizer(f" {choice}", add_special_tokens=False).input_ids[-1] for choice in CHOICES]


def fitting_prompt(tokenizer: Tokenizer, subject: Subject, question: Question) -> Tokens:
    """Return the tokens of the prompt with as many shots as leave it within the limit.

    As in the original the limit does not count a token that a tokenizer puts before each text.
    """
    return _fit(tokenizer, subject, question)[1]


def _fit(tokenizer: Tokenizer, subject: Subject, question: Question) -> tuple[int, Tokens]:
    """Return the shots that fit and the prompt's tokens."""
    for shots in range(min(SHOTS, len(subject.dev)), -1, -1):
        text = prompt(subject.name, question, subject.dev[:shots])
        ids: Tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= MAX_PROMPT_TOKENS:
            break
    return shots, encode(tokenizer, "") + ids


def _ask(question: Question) -> str:
    options = "".join(f"\n{choice}. {text}" for choice, text in zip(CHOICES, question[1:5], strict=True))
    return f"{question[0]}{options}\nAnswer:"


def _read(path: Path) -> list[Question]:
    """Read one csv as the original does, so that the prompts are the original's to the letter.

    Trap: pandas reads "None" or "N/A" as a missing value, and a column of numbers as numbers ("1.50" is then "1.5");
    the original formats those into its prompts, so we do too.
    """
    try:
        table = pandas.read_csv(path, header=None)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not a readable csv file: {str(error).splitlines()[0]}") from None
    if table.shape[1] != 6:
        raise BadInput(f"{path}: {table.shape[1]} columns, expected 6: question, four options, answer")
    rows = []
    for number, values in enumerate(table.itertuples(index=False), start=1):
        question = tuple(str(value) for value in values)
        if question[5] not in CHOICES:
            raise BadInput(f"{path}: row {number}: answer {question[5]!r}, expected one of A, B, C, D")
        rows.append(question)
    return rows
