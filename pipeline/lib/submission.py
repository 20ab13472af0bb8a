"""What a submission's zip holds: the form that package writes and verify reads.

Without texts, the two tables with texts give way to tables of row scores. Each row then has one sha256 over its three
texts together: a hash of a short answer alone (a telephone number) could be undone by trying all of them.
"""

import json
from itertools import product
from typing import Any

from jsonschema import Draft202012Validator

from pipeline.lib.provenance import sha256_of
from pipeline.lib.published import DESTROYED, SIZES, Parts, caution, parts
from pipeline.lib.records import SETS, SIDES, TASKS, Row

ORIGINAL = "original/"  # before the names of the untouched checkpoint's members
TEXT_COLUMNS = ("id", "task", "input", "expected_output", "model_output", "nll")  # the official form
SCORE_COLUMNS = ("id", "task", "score", "nll", "texts_sha256")
MEMBERSHIP_COLUMNS = ("id", "nll")
DATE = (1980, 1, 1, 0, 0, 0)  # of every member: the earliest that a zip can hold
MODE = 0o100644  # of every member: a plain file
UNIX = 3  # zip's number for the system that wrote it; the same wherever this runs

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 1}
_SHA256 = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_HASHES = {"type": "object", "minProperties": 1, "additionalProperties": _SHA256}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


SCORE = Draft202012Validator(
    _object(
        id={"type": "string", "pattern": r"(sc|qa).\Z"},
        task={"enum": list(TASKS)},
        split={"enum": list(SIDES)},
        score={"type": "number", "minimum": 0, "maximum": 1},
        nll={"type": ["number", "null"]},
        texts_sha256=_SHA256,
    )
)
MANIFEST = Draft202012Validator(
    _object(
        target=_TEXT,
        stand_in={"type": "boolean"},
        published_size={"enum": list(SIZES)},
        texts={"type": "boolean"},
        members=_HASHES,
        model=_object(
            source=_TEXT,
            original=_HASHES,
            unlearned=_HASHES,
            changed={
                "type": "object",
                "minProperties": 1,
                "additionalProperties": _object(
                    dtype=_TEXT, shape={"type": "array", "items": {"type": "integer"}}, sha256=_SHA256
                ),
            },
        ),
        data=_object(source=_TEXT, files={"type": "object", "minProperties": 1, "additionalProperties": _HASHES}),
        unlearning=_object(settings={"type": "object"}, versions={"type": "object"}, hardware=_TEXT, threads=_COUNT),
        scoring=_object(versions={"type": "object"}),
        sha256=_SHA256,
    )
)


def table_name(side: str, texts: bool) -> str:
    """Return the member with a side's rows: the official name for the official form, another for row scores."""
    return f"{side}_0.csv" if texts else f"{side}_scores.csv"


def member_names(texts: bool) -> set[str]:
    """Return the names of all members of a zip with or without texts."""
    checkpoint = {"evaluation_results.jsonl", "mmlu.jsonl"}
    checkpoint |= {table_name(side, texts) for side in SIDES} | {f"mia_results/{name}_0.csv" for name in SETS}
    once = {"submission.py", "manifest.json", "README.md"}
    return once | {prefix + name for prefix in ("", ORIGINAL) for name in checkpoint}


def texts_sha256(row: Row) -> str:
    """Return the sha256 of a completion row's three texts, as the JSON list of input, expected and model output."""
    return sha256_of(json.dumps([row["input"], row["expected_output"], row["model_output"]]).encode())


def manifest_json(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest: its last key, "sha256", is the sha256 of the text without that key."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, indent=2, ensure_ascii=False)
    return json.dumps(body | {"sha256": sha256_of(text.encode())}, indent=2, ensure_ascii=False) + "\n"


def readme(manifest: dict[str, Any], results: dict[str, Any], control: dict[str, Any], where: str) -> str:
    """Return the zip's README: what the numbers are, the parts beside the controls', and the twelve values.

    `results` and `control` are the official results of the unlearned and the untouched checkpoint, `where` is what
    `published.would_be` says of the first. Of the manifest only target, stand_in and published_size are read.
    """
    label = caution(manifest["published_size"], manifest["stand_in"])
    lines = [f"# Submission {manifest['target']}", "", label, "", "## Score", ""]
    lines += ["| | final | task aggregate | MIA | MMLU |", "|---|---|---|---|---|"]
    lines.append(_parts_line("unlearned", parts(results)))
    lines.append(_parts_line("untouched (control)", parts(control)))
    lines.append(_parts_line("destroyed (control, by arithmetic)", DESTROYED))
    lines += ["", f"Among the ranked published finals: {where}.", "", "## The twelve values", ""]
    lines += ["On forget lower is better (the aggregate takes 1 - value), on retain higher.", ""]
    lines += ["| side | task | regurgitation | knowledge | regurgitation, untouched | knowledge, untouched |"]
    lines += ["|---|---|---|---|---|---|"]
    for side, task in product(SIDES, TASKS):
        cells = " | ".join(_two_values(values[f"{side}-set"][task]) for values in (results, control))
        lines.append(f"| {side} | {task} | {cells} |")
    lines += ["", "manifest.json holds the sha256 of every file here, of the models and of the data, and what was run."]
    return "\n".join(lines) + "\n"


def _two_values(values: dict[str, float]) -> str:
    return f"{values['regurgitation-score']:.3f} | {values['knowledge-score']:.3f}"


def _parts_line(name: str, values: Parts) -> str:
    numbers = (values.final, values.task_aggregate, values.mia, values.mmlu)
    return f"| {name} | " + " | ".join("missing" if number is None else f"{number:.3f}" for number in numbers) + " |"
