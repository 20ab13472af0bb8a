"""What was published: the leaderboard, where a result of ours would stand in it, and RMU's window.

The rows are those of SemEval-2025 Task 4 as published, numbers kept as text to their published digits:
size (7B|1B), team, final, task_aggregate, mia, mmlu, group (ranked | below floor | baseline).
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from pipeline.lib.records import TASKS, json_object, parse_json
from pipeline.lib.stage import BadInput

SIZES = ("7B", "1B")
GROUPS = ("ranked", "below floor", "baseline")
FIELDS = ("size", "team", "final", "task_aggregate", "mia", "mmlu", "group")
WINDOW = 3  # blocks, l-2 to l: those whose down_proj RMU changes to steer block l (arXiv 2403.03218)
MMLU_FLOOR_7B = 0.371  # 75 % of the untouched 7B's .495; there is no floor on 1B, which is at chance before and after


@dataclass(frozen=True)
class Published:
    """A published row. The four numbers are text, with the digits that were published."""

    size: str
    team: str
    final: str
    task_aggregate: str
    mia: str
    mmlu: str
    group: str


@dataclass(frozen=True)
class Parts:
    """The final score and its three parts, all 0 to 1; None where a part was not measured."""

    final: float | None
    task_aggregate: float
    mia: float | None
    mmlu: float | None


# By arithmetic, at its best: a model that outputs noise retains nothing, knows no member, answers at chance.
DESTROYED = Parts(final=(0 + 1 + 0.25) / 3, task_aggregate=0, mia=1, mmlu=0.25)


_PUBLISHED_NUMBER = {"type": "string", "pattern": r"^[01](\.[0-9]+)?$"}
ROW = Draft202012Validator(
    json_object(
        size={"enum": list(SIZES)},
        team={"type": "string", "minLength": 1},
        group={"enum": list(GROUPS)},
        **{name: _PUBLISHED_NUMBER for name in ("final", "task_aggregate", "mia", "mmlu")},
    )
)
_NUMBER = {"type": "number", "minimum": 0, "maximum": 1}
_TWO = json_object(**{"regurgitation-score": _NUMBER, "knowledge-score": _NUMBER})
_SIDE = json_object(**{task: _TWO for task in TASKS})
_KEYS = {
    "forget-set": _SIDE,
    "retain-set": _SIDE,
    "harmonic-mean-task-aggregate": _NUMBER,
    "aggregate-score": _NUMBER | {"minimum": -1},
}
_OPTIONAL = {"mia_final_score": _NUMBER, "mmlu_average": _NUMBER}
RESULTS = Draft202012Validator({"type": "object", "required": list(_KEYS), "properties": _KEYS | _OPTIONAL})


def read_published(path: Path, size: str) -> list[Published]:
    """Return the published rows of a size ("7B" or "1B") in the order of the file."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise BadInput(f"{path}: line 1: columns {reader.fieldnames}, expected {', '.join(FIELDS)}")
            table = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not csv in UTF-8: {error}") from None
    for number, row in enumerate(table, start=1):
        for problem in ROW.iter_errors(row):
            raise BadInput(f"{path}: row {number}: {problem.json_path}: {problem.message}")
    rows = [Published(**{name: row[name] for name in FIELDS}) for row in table]
    return [row for row in rows if row.size == size]


def read_results(path: Path) -> dict[str, Any]:
    """Read an evaluation_results.jsonl: one line, the official keys."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    results = parse_json(str(path), path.read_bytes())
    for problem in RESULTS.iter_errors(results):
        raise BadInput(f"{path}: {problem.json_path}: {problem.message.splitlines()[0]}")
    checked: dict[str, Any] = results
    return checked


def parts(results: dict[str, Any]) -> Parts:
    """Return the parts of a result as `read_results` returns it."""
    mia, mmlu = results.get("mia_final_score"), results.get("mmlu_average")
    final = None if mia is None or mmlu is None else results["aggregate-score"]
    return Parts(final, results["harmonic-mean-task-aggregate"], mia, mmlu)


def place(final: float, published: list[Published]) -> int:
    """Return 1 + the number of ranked rows with a higher final score. Equal scores share a place."""
    return 1 + sum(float(row.final) > final for row in published if row.group == "ranked")


def would_be(ours: Parts, size: str, stand_in: bool, published: list[Published]) -> str:
    """Return in words where a final score would stand: a comparison of numbers, never a rank.

    A stand-in's number is compared with none. On 7B an MMLU accuracy below the organisers' floor is out of the awards.
    """
    if stand_in:
        return "not comparable"
    if ours.final is None:
        return "no final score"
    if size == "7B" and ours.mmlu is not None and ours.mmlu < MMLU_FLOOR_7B:
        return "below floor"
    return f"would be {place(ours.final, published)} of {1 + sum(row.group == 'ranked' for row in published)}"


def caution(size: str, stand_in: bool) -> str:
    """Return the sentence that must stand beside a number of ours."""
    if stand_in:
        return (
            f"This is a stand-in, a small model made to memorise, not the organisers' {size} model. Its numbers are "
            "not leaderboard numbers and have no place among them. Its MMLU column is the multiple choice of its own "
            "target, which a small stand-in is taught."
        )
    return (
        f"Measured by this project on the organisers' {size} model and public data, not by the organisers on theirs. "
        "A place given for it is where the number would stand, not a rank."
    )
