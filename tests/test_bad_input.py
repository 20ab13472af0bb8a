"""Wrong input of every kind: one line that names the place, exit code 2, no traceback, nothing written; or, where the
input is legal, the right result.

Each case is one change to a folder of sound inputs. The stage then runs as from the command line, in this process. The
last test counts the cases and fails if too few ran.
"""

import contextlib
import copy
import io
import json
import random
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from pipeline.lib.records import TASKS
from tests.conftest import ROOT

LEAST = 800  # cases
LONGEST = 700  # characters of a message
KEPT = "written before, must survive"
PUBLISHED = ROOT / "data" / "leaderboard.csv"
QUESTION = ["What is {}?", "one", "two", "three", "four", "ABCD"]

Edit = Callable[[Path], object]
tried: list[str] = []


@pytest.fixture(autouse=True)
def counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Count a case once it has been tried, whatever came of it."""
    yield
    tried.append(request.node.name)


# ---- sound inputs, and the stages on them ----


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(data: dict[str, list[dict]], seed: int) -> dict[str, list[dict]]:
    """What complete, membership and mmlu write."""
    dice = random.Random(seed)
    completions = [
        {
            "id": row["id"],
            "task": row["task"],
            "split": side,
            "input": row["input"],
            "expected_output": row["output"],
            "model_output": dice.choice([row["output"], row["output"][: len(row["output"]) // 2], "no"]),
            "nll": dice.random(),
        }
        for side, rows in data.items()
        for row in rows
    ]
    losses = [{"id": f"d{n}", "set": "member" if n < 4 else "nonmember", "nll": 3 * dice.random()} for n in range(8)]
    questions = [
        {"subject": "anatomy", "index": n, "answer": "ABCD"[n % 4], "probs": [dice.random() for _ in range(4)]}
        for n in range(6)
    ]
    return {"completions": completions, "membership": losses, "mmlu": questions}


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, data: Path, rows) -> Path:
    """One folder with sound inputs for every stage, and in out/ what must survive."""
    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(checkpoint, folder / "model")
    shutil.copytree(data, folder / "data")
    for name in ("member", "nonmember"):
        documents = [{"id": f"{name}{n}", "document": f"{name} number {n} was born in the city"} for n in range(4)]
        write(folder / "mia" / f"{name}.jsonl", documents)
        write(folder / "raw" / "mia" / f"{name}.jsonl", documents)
    for part in ("dev", "test"):
        table = [[text.format(n) if i < 5 else text[n % 4] for i, text in enumerate(QUESTION)] for n in range(6)]
        path = folder / "questions" / part / f"anatomy_{part}.csv"
        path.parent.mkdir(parents=True)
        pandas.DataFrame(table).to_csv(path, header=False, index=False)
    for side in rows:
        shutil.copy(data / side / f"{side}.parquet", folder / "raw" / f"{side}_train.parquet")
        write(folder / "raw" / f"{side}_validation.jsonl", [row | {"id": f"v{row['id']}"} for row in rows[side]])
    write(folder / "raw" / "general.jsonl", [{"id": f"g{n}", "text": f"The river number {n}."} for n in range(3)])
    shutil.copy(PUBLISHED, folder / "leaderboard.csv")
    for seed, name in enumerate(("original", "unlearned")):
        for table, values in measured(rows, seed).items():
            write(folder / name / f"{table}.jsonl", values)
    shutil.copytree(checkpoint, folder / "unlearned", dirs_exist_ok=True)
    alter(lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].mul_(2))(folder, "unlearned")
    run_json = {
        "settings": {"beta": 2.0},
        "versions": {"torch": "2"},
        "hardware": "a machine",
        "threads": 1,
        "wall_seconds": 1.5,
    }
    (folder / "unlearned" / "run.json").write_text(json.dumps(run_json))
    for name in ("original", "unlearned"):
        assert call("score", score_flags(folder, name, folder / name / "evaluation_results.jsonl"))[0] == 0
    assert call("package", arguments("package", folder))[0] == 0
    shutil.move(folder / "out" / "x.zip", folder / "x.zip")
    shutil.rmtree(folder / "out")
    for name in ("file", "folder/file"):
        path = folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(KEPT)
    return folder


def score_flags(folder: Path, name: str, output: Path) -> list[object]:
    tables = [word for table in ("completions", "membership", "mmlu") for word in (f"--{table}", table)]
    paths = [word if word.startswith("--") else folder / name / f"{word}.jsonl" for word in tables]
    return [*paths, "--output", output]


def arguments(stage: str, folder: Path) -> list[object]:
    """The command line of a stage. All write to out/file or out/folder."""
    out, model, data = folder / "out", folder / "model", folder / "data"
    file, new = ["--output", out / "file"], ["--output", out / "folder"]
    sides = ["--forget", data / "forget", "--retain", data / "retain"]
    results = folder / "unlearned" / "evaluation_results.jsonl"
    control = folder / "original" / "evaluation_results.jsonl"
    published, name = ["--published", folder / "leaderboard.csv"], ["--name", "tiny", "--size", "1B"]
    match stage:
        case "complete":
            return ["--model", model, *sides, "--max-new-tokens", 2, *file]
        case "membership":
            return ["--model", model, "--mia", folder / "mia", *file]
        case "mmlu":
            return ["--model", model, "--data", folder / "questions", *file]
        case "score":
            return score_flags(folder, "original", out / "file")
        case "split":
            return ["--raw", folder / "raw", *new]
        case "fetch_model":
            return ["--local", model, *new]
        case "fetch_data":
            return ["--source", "semeval25", "--local", folder / "raw", *new]
        case "unlearn":
            return [model, out / "folder", data / "forget", data / "retain"]
        case "memorise":
            mia = ["--mia", folder / "mia", "--general", folder / "raw" / "general.jsonl"]
            return ["--data", data, *mia, "--mmlu", folder / "questions", *new]
        case "leaderboard":
            return ["--results", results, "--control", control, *published, *name, *file]
        case "package":
            submission = ["--submission", ROOT / "pipeline" / "unlearn.py", "--model", model, "--data", data]
            checkpoints = ["--original", folder / "original", "--unlearned", folder / "unlearned"]
            sources = ["--model-source", "some/model@abc", "--data-source", "some/data@def"]
            outputs = ["--output", out / "x.zip", "--cost", out / "x.cost.json"]
            return [*submission, *checkpoints, *published, *name, *sources, *outputs]
        case _:
            return [folder / "x.zip", *published]


def call(stage: str, words: list[object]) -> tuple[int, str]:
    """Run a stage as `python -m` does, but in this process. Return its exit code and what it said on stderr."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [stage, *map(str, words)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "pipeline" / f"{stage}.py"), run_name="__main__")
    except SystemExit as stopped:
        return stopped.code, said.getvalue()
    finally:
        sys.argv = argv
    return 0, said.getvalue()


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound inputs, to be spoilt."""
    return shutil.copytree(sound, tmp_path / "in")


def assert_refused(code: int, said: str, folder: Path, place: str) -> None:
    """One line, exit code 2; what was there before is as it was, and nothing else is there."""
    assert code == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == said.splitlines()[-1:], said
    assert "Traceback" not in said
    assert re.search(place, errors[0]), f"{errors[0]!r} does not name {place!r}"
    assert len(errors[0].replace(str(folder), "")) <= LONGEST
    left = {path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*") if path.is_file()}
    assert {name for name in left if not name.endswith(".lock")} == {"file", "folder/file"}
    assert {(folder / "out" / name).read_text() for name in ("file", "folder/file")} == {KEPT}


def refuse(stage: str, folder: Path, edit: Edit, place: str, extra: list[object] | None = None) -> None:
    edit(folder)
    code, said = call(stage, [*arguments(stage, folder), *(extra or [])])
    assert_refused(code, said, folder, place)


def cases(*table: tuple) -> pytest.MarkDecorator:
    """Parametrize by (id, ...), the id being part of what is said when a case fails."""
    names = {3: "stage, edit, place", 2: "edit, place"}[len(table[0]) - 1]
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in table])


def crossed(stages: list[str], table: list[tuple[str, Edit, str]]) -> pytest.MarkDecorator:
    """Parametrize by each case (id, edit, place) in each stage."""
    parameters = []
    for stage in stages:
        for name, edit, place in table:
            parameters.append(pytest.param(stage, edit, place, id=f"{name}: {stage}"))
    return pytest.mark.parametrize(("stage", "edit", "place"), parameters)


# ---- changes ----


def text(name: str, content: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def replaced(name: str, old: str, new: str) -> Edit:
    def edit(folder: Path) -> None:
        content = (folder / name).read_text()
        assert old in content
        (folder / name).write_text(content.replace(old, new, 1))

    return edit


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def as_folder(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def cut(name: str, keep: float) -> Edit:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return edit


def row(name: str, number: int, **change: object) -> Edit:
    """Change fields of a row of a jsonl file (rows count from 1); `...` takes a field out."""

    def edit(folder: Path) -> None:
        table = lines(folder / name)
        table[number - 1] |= change
        table[number - 1] = {key: value for key, value in table[number - 1].items() if value is not ...}
        write(folder / name, table)

    return edit


def parsed(name: str, change: Callable[[dict], object]) -> Edit:
    """Change what a json file holds."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def alter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[..., None]:
    """Change the tensors of a checkpoint."""

    def edit(folder: Path, name: str = "model") -> None:
        path = folder / name / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def header(change: Callable[[dict], object], length: int = 0) -> Edit:
    """Change the header of a safetensors file, and what it says of its own length."""

    def edit(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        spoilt = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(spoilt) + length) + spoilt + content[8 + size :])

    return edit


# ---- rows: every field of every table, absent, null and of another type ----

TABLES = {
    "data/forget/forget.jsonl": ("complete", ["id", "input", "output", "task"]),
    "data/retain/retain.jsonl": ("complete", ["id", "input", "output", "task"]),
    "mia/member.jsonl": ("membership", ["id", "document"]),
    "mia/nonmember.jsonl": ("membership", ["id", "document"]),
    "raw/forget_validation.jsonl": ("split", ["id", "input", "output", "task"]),
    "raw/mia/member.jsonl": ("split", ["id", "document"]),
    "raw/general.jsonl": ("split", ["id", "text"]),
    "original/completions.jsonl": (
        "score",
        ["id", "task", "split", "input", "expected_output", "model_output", "nll"],
    ),
    "original/membership.jsonl": ("score", ["id", "set", "nll"]),
    "original/mmlu.jsonl": ("score", ["subject", "index", "answer", "probs"]),
    "unlearned/completions.jsonl": ("package", ["model_output", "nll"]),
}
VALUES = {"absent": ..., "null": None, "a list": ["x"], "an object": {"x": 1}, "a truth value": True}
NULL_IS_LEGAL = {"nll in original/completions.jsonl", "nll in unlearned/completions.jsonl"}
FIELDS = [
    pytest.param(stage, name, field, value, id=f"{field} {what} in {name}")
    for name, (stage, fields) in TABLES.items()
    for field in fields
    for what, value in VALUES.items()
    if not (value is None and f"{field} in {name}" in NULL_IS_LEGAL)
]


@pytest.mark.parametrize(("stage", "name", "field", "value"), FIELDS)
def test_a_field_that_is_not_as_it_must_be(folder: Path, stage: str, name: str, field: str, value: object):
    place = "general text" if name == "raw/general.jsonl" else Path(name).name
    refuse(stage, folder, row(name, 3, **{field: value}), rf"{place}: row 3: .*{field}")


C, M, Q = "original/completions.jsonl", "original/membership.jsonl", "original/mmlu.jsonl"
D, N = "data/forget/forget.jsonl", "mia/nonmember.jsonl"


@cases(
    ("an id without a kind", "score", row(C, 2, id="Task1n0"), r"row 2: field 'id'"),
    ("an id that ends in a line break", "score", row(C, 2, id="Task1n0qa0\n"), r"row 2: field 'id'"),
    ("an id whose number is a line break", "score", row(C, 2, id="Task1n0qa\n"), r"row 2: field 'id'"),
    ("an empty id", "score", row(C, 2, id=""), r"row 2: field 'id'"),
    ("a task of another name", "score", row(C, 2, task="Task4"), r"row 2: field 'task': 'Task4'"),
    ("a task in small letters", "score", row(C, 2, task="task1"), r"row 2: field 'task': 'task1'"),
    ("a split of another name", "score", row(C, 2, split="test"), r"row 2: field 'split': 'test'"),
    ("a row twice", "score", row(C, 3, id="forgetTask1n0sc1"), r"row 3: same key .* as row 1"),
    ("a loss below zero", "score", row(C, 2, nll=-0.5), r"row 2: field 'nll': -0.5"),
    ("a loss that is text", "score", row(C, 2, nll="1.0"), r"row 2: field 'nll'"),
    ("an integer past floating point", "score", row(C, 2, nll=10**400), r"row 2: field 'nll'"),
    ("a membership loss below zero", "score", row(M, 2, nll=-1), r"membership.*row 2: field 'nll'"),
    ("a huge negative membership loss", "score", row(M, 2, nll=-(10**400)), r"membership.*row 2: field 'nll'"),
    ("a membership loss of 1e9", "score", row(M, 2, nll=1e9), r"membership.*row 2: field 'nll'"),
    ("a set of another name", "score", row(M, 2, set="members"), r"membership.*row 2: field 'set'"),
    ("a membership row twice", "score", row(M, 2, id="d0"), r"membership.*row 2: same key"),
    ("an answer in small letters", "score", row(Q, 2, answer="b"), r"mmlu.*row 2: field 'answer'"),
    ("five probabilities", "score", row(Q, 2, probs=[0.1] * 5), r"mmlu.*row 2: field 'probs'"),
    ("a probability above one", "score", row(Q, 2, probs=[0.1, 0.1, 0.1, 1.1]), r"mmlu.*row 2: field 'probs'"),
    ("a negative probability", "score", row(Q, 2, probs=[0.1, 0.1, 0.1, -0.1]), r"mmlu.*row 2: field 'probs'"),
    ("a null among probabilities", "score", row(Q, 2, probs=[0.1, 0.1, 0.1, None]), r"mmlu.*row 2: field 'probs'"),
    ("a negative index", "score", row(Q, 2, index=-1), r"mmlu.*row 2: field 'index'"),
    ("half an index", "score", row(Q, 2, index=1.5), r"mmlu.*row 2: field 'index'"),
    ("a question twice", "score", row(Q, 2, index=0), r"mmlu.*row 2: same key .* as row 1"),
    ("a question twice, spelt 0.0", "score", row(Q, 2, index=0.0), r"mmlu.*row 2: same key .* as row 1"),
    ("a blank input", "complete", row(D, 2, input=" \n"), r"forget.jsonl: row 2: field 'input'"),
    ("a blank output", "complete", row(D, 2, output=""), r"forget.jsonl: row 2: field 'output'"),
    ("half a surrogate pair in an input", "complete", row(D, 2, input="x \ud800"), r"row 2: field 'input'"),
    ("half a surrogate pair in an output", "complete", row(D, 2, output="\udfff"), r"row 2: field 'output'"),
    ("half a surrogate pair in an id", "complete", row(D, 2, id="\udfffqa0"), r"row 2: field 'id'"),
    ("half a surrogate pair in a document", "membership", row(N, 2, document="x \ud800"), r"row 2: field 'document'"),
    ("half a surrogate pair in a general text", "split", row("raw/general.jsonl", 2, text="\ud800"), r"row 2: .*text"),
    ("half a surrogate pair to split", "split", row("raw/retain_validation.jsonl", 2, input="\ud800"), r"row 2: .*inp"),
    ("half a surrogate pair to pack", "package", row("unlearned/completions.jsonl", 2, input="\ud800"), r"completions"),
    ("a blank document", "membership", row(N, 2, document="\t"), r"nonmember.jsonl: row 2: field 'document'"),
    ("a document of one token", "membership", row(N, 2, document="x"), r"nonmember.*'nonmember1'"),
    ("a document twice", "membership", row(N, 2, id="nonmember0"), r"nonmember.jsonl: row 2: same key"),
    ("a row of the other side", "split", row("raw/forget_validation.jsonl", 2, split="retain"),
     r"row 2: field 'split'"),
    ("a validation row in train", "split", row("raw/forget_validation.jsonl", 2, id="forgetTask1n0qa0"), r"also in"),
    ("a non-member that is a row", "split", row("raw/mia/nonmember.jsonl", 2, id="retainTask3n0"), r"nonmember.*row 2"),
    ("a general text that is a member",
     "split", row("raw/general.jsonl", 2, text="member number 0 was born in the city"),
     r"row 2: the text of 'member0'"),
)  # fmt: skip
def test_a_value_that_is_not_as_it_must_be(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


def only(name: str, keep: Callable[[dict], bool]) -> Edit:
    return lambda folder: write(folder / name, [entry for entry in lines(folder / name) if keep(entry)])


@cases(
    ("no member", "score", only(M, lambda entry: entry["set"] != "member"), r"membership.jsonl: .*member"),
    ("no non-member", "score", only(M, lambda entry: entry["set"] != "nonmember"), r"membership.jsonl: .*nonmember"),
    ("no forget row", "score", only(C, lambda entry: entry["split"] != "forget"), r"completions.jsonl: no sc row of"),
    ("no question", "score", text(Q, ""), r"mmlu.jsonl: no rows"),
    *(
        (f"no {kind} row of {task}", "score", only(C, lambda entry, task=task, kind=kind: not (
            entry["task"] == task and entry["id"][-3:-1] == kind and entry["split"] == "retain"
        )), rf"completions.jsonl: no {kind} row of {task} on the retain side")
        for task in TASKS for kind in ("sc", "qa")
    ),
    *(
        (f"no {task} to split", "split", only("raw/retain_validation.jsonl", lambda entry, task=task:
            entry["task"] != task), rf"retain_validation.jsonl: no sc row of {task}")
        for task in TASKS
    ),
)  # fmt: skip
def test_a_table_that_lacks_a_part(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


# ---- jsonl as text ----

SPOILT = {
    "not there": (without, "no such file"),
    "a folder": (as_folder, "no such file"),
    "empty": (lambda name: text(name, ""), "no rows"),
    "blank lines": (lambda name: text(name, "\n \n\t\n"), "no rows"),
    "cut inside a row": (lambda name: cut(name, 0.63), r"line \d+: not JSON"),
    "not UTF-8": (lambda name: text(name, b'{"id": "\xff"}\n'), "byte 8: not UTF-8"),
    "UTF-16": (lambda name: text(name, '{"id": "x"}'.encode("utf-16")), "byte 0: not UTF-8"),
    "a byte order mark": (lambda name: text(name, b'\xef\xbb\xbf{"id": "x"}'), "line 1: not JSON"),
    "zero bytes": (lambda name: text(name, b"\0" * 100), "line 1: not JSON"),
    "a parquet file": (lambda name: text(name, b"PAR1\x15\x04\x15"), r"line 1: not JSON|not UTF-8"),
    "a web page": (lambda name: text(name, "<!doctype html>\n<p>Sign in"), "line 1: not JSON"),
    "a git-lfs pointer": (lambda name: text(name, "version https://git-lfs.github.com/spec/v1\n"), "line 1: not JSON"),
    "a JSON list": (lambda name: text(name, '[{"id": "x"}]\n'), "line 1: a row must be an object"),
    "a text": (lambda name: text(name, '"id"\n'), "line 1: a row must be an object"),
    "a number": (lambda name: text(name, "7\n"), "line 1: a row must be an object"),
    "null": (lambda name: text(name, "null\n"), "line 1: a row must be an object"),
    "NaN": (lambda name: text(name, '{"id": NaN}\n'), "line 1: not JSON: NaN"),
    "Infinity": (lambda name: text(name, '{"id": -Infinity}\n'), "line 1: not JSON: -Infinity"),
    "a comma too many": (lambda name: text(name, '{"id": "x",}\n'), "line 1: not JSON"),
    "two rows on a line": (lambda name: text(name, '{"id": "x"}{"id": "y"}\n'), "line 1: not JSON"),
    "single quotes": (lambda name: text(name, "{'id': 'x'}\n"), "line 1: not JSON"),
    "a key twice": (lambda name: text(name, '{"id": "x", "id": "y"}\n'), "line 1: not JSON: .*twice"),
    "a line break in a text": (lambda name: text(name, '{"id": "x\ny"}\n'), "line 1: not JSON"),
    "a number of 5000 digits": (lambda name: text(name, '{"id": ' + "7" * 5000 + "}\n"), "line 1: not JSON"),
    "100,000 brackets": (lambda name: text(name, '{"id": ' + "[" * 100_000 + "\n"), "line 1: not JSON"),
    "columns of two lengths": (lambda name: text(name, '{"id": ["x", "y"], "input": ["z"]}'), "line 1: columns"),
    "columns of two kinds": (lambda name: text(name, '{"id": ["x", "y"], "input": {"0": "z"}}'), "line 1: columns"),
    "columns with other keys": (lambda name: text(name, '{"id": {"0": "x"}, "input": {"1": "z"}}'), "line 1: columns"),
    "a column that is a text": (lambda name: text(name, '{"id": ["x"], "input": "z"}'), "line 1: columns"),
    "empty columns": (lambda name: text(name, '{"id": []}'), "no rows"),
}


SPOILT_IN = {"score": [C, M, Q], "complete": [D], "membership": [N], "split": ["raw/forget_validation.jsonl"]}


@pytest.mark.parametrize(
    ("stage", "name", "what"),
    [
        pytest.param(stage, name, what, id=f"{name}: {what}")
        for stage, names in SPOILT_IN.items()
        for name in names
        for what in SPOILT
        if not (stage == "split" and what in ("not there", "a folder"))  # it would look for a parquet file
    ],
)
def test_a_file_that_is_not_json_lines(folder: Path, stage: str, name: str, what: str):
    make, place = SPOILT[what]
    refuse(stage, folder, make(name), rf"{Path(name).name}: {place}")


@pytest.mark.parametrize("what", ["not there", "cut inside a row", "not UTF-8", "a JSON list", "NaN", "empty"])
@pytest.mark.parametrize("side", ["forget", "retain"])
def test_rows_for_unlearning_that_are_not_json_lines(folder: Path, side: str, what: str):
    """The judge's folder without its parquet file: then the lines are read."""
    (folder / "data" / side / f"{side}.parquet").unlink()
    refuse("unlearn", folder, SPOILT[what][0](f"data/{side}/{side}.jsonl"), side)


# ---- parquet ----

P = "raw/forget_train.parquet"


def table(change: Callable[[pyarrow.Table], pyarrow.Table], name: str = P) -> Edit:
    def edit(folder: Path) -> None:
        pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(folder / name)), folder / name)

    return edit


def column(name: str, values: Callable[[int], list], kind: pyarrow.DataType | None = None) -> Callable:
    def change(found: pyarrow.Table) -> pyarrow.Table:
        return found.set_column(
            found.column_names.index(name), name, pyarrow.array(values(len(found)), type=kind)
        )  # fmt: skip

    return change


def not_utf8(found: pyarrow.Table) -> pyarrow.Table:
    broken = pyarrow.array([b"\xff\xfe"] * len(found), type=pyarrow.binary()).view(pyarrow.string())
    return found.set_column(found.column_names.index("input"), "input", broken)


@cases(
    ("empty", text(P, ""), r"not a readable parquet"),
    ("garbage", text(P, "PAR1 not at all PAR1"), r"not a readable parquet"),
    ("json lines", text(P, '{"id": "x"}\n'), r"not a readable parquet"),
    ("cut in half", cut(P, 0.5), r"not a readable parquet"),
    ("cut by a byte", cut(P, 0.9999), r"not a readable parquet"),
    ("no rows", table(lambda found: found.slice(0, 0)), r"no rows"),
    ("no column input", table(lambda found: found.drop_columns(["input"])), r"row 1: 'input' is a required"),
    ("no columns at all", table(lambda found: pyarrow.table({})), r"no rows"),
    ("columns in capitals", table(lambda found: found.rename_columns([n.upper() for n in found.column_names])),
     r"row 1"),
    ("a null", table(column("output", lambda n: [*["x"] * (n - 1), None])), r"row 18: field 'output'"),
    ("numbers", table(column("input", lambda n: list(range(n)))), r"row 1: field 'input'"),
    ("bytes", table(column("input", lambda n: [b"x"] * n)), r"row 1: field 'input'"),
    ("lists", table(column("input", lambda n: [["x"]] * n)), r"row 1: field 'input'"),
    ("lists as ids", table(column("id", lambda n: [["x"]] * n)), r"row 1: field 'id'"),
    ("lists as splits", table(column("split", lambda n: [["x"]] * n)), r"row 1: .*split"),
    ("one id", table(column("id", lambda n: ["a1sc1"] * n)), r"row 2: same key"),
    ("a date", table(column("task", lambda n: [2**60] * n, pyarrow.timestamp("us"))), r"readable"),
    ("not UTF-8", table(not_utf8), r"not a readable parquet"),
    ("a column twice", table(lambda found: found.append_column("input", found["input"])), r"input|readable"),
)  # fmt: skip
def test_a_parquet_file_that_is_not_as_it_must_be(folder: Path, edit: Edit, place: str):
    refuse("split", folder, edit, rf"forget_train.parquet: .*{place}")


FOR_UNLEARNING = [
    ("empty", text("data/forget/forget.parquet", ""), "forget.parquet"),
    ("cut in half", cut("data/forget/forget.parquet", 0.5), "forget.parquet"),
    ("no column task", table(lambda found: found.drop_columns(["task"]), "data/forget/forget.parquet"), "task"),
    ("no rows", table(lambda found: found.slice(0, 0), "data/forget/forget.parquet"), "forget.parquet: no rows"),
    ("a null", table(column("output", lambda n: [*["x"] * (n - 1), None]), "data/retain/retain.parquet"), "row 18"),
    ("numbers", table(column("input", lambda n: list(range(n))), "data/retain/retain.parquet"), "row 1"),
    ("lists", table(column("task", lambda n: [["x"]] * n), "data/retain/retain.parquet"), "row 1"),
    ("one id", table(column("id", lambda n: ["a1sc1"] * n), "data/retain/retain.parquet"), "a1sc1"),
    ("text not in UTF-8", table(not_utf8, "data/retain/retain.parquet"), "retain.parquet"),
    ("the same rows", lambda folder: shutil.copy(folder / "data/forget/forget.parquet",
                                               folder / "data/retain/retain.parquet"), "forgetTask1n0sc1"),
]  # fmt: skip


@crossed(["unlearn"], FOR_UNLEARNING)
def test_a_parquet_file_for_unlearning_that_is_not_as_it_must_be(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


# ---- multiple choice ----

T, V = "questions/test/anatomy_test.csv", "questions/dev/anatomy_dev.csv"


@cases(
    ("no file", without(T), r"questions/test: no \*_test.csv"),
    ("no shots", without(V), r"anatomy_dev.csv: not a readable csv"),
    ("empty", text(T, ""), r"anatomy_test.csv: not a readable csv"),
    ("empty shots", text(V, ""), r"anatomy_dev.csv: not a readable csv"),
    ("blank", text(T, "\n\n"), r"anatomy_test.csv: not a readable csv"),
    ("not UTF-8", text(T, b"caf\xe9,a,b,c,d,A\n"), r"anatomy_test.csv: not a readable csv"),
    ("UTF-16", text(T, "q,a,b,c,d,A\n".encode("utf-16")), r"anatomy_test.csv: not a readable csv"),
    ("five columns", text(T, "q,a,b,c,A\n"), r"anatomy_test.csv: 5 columns"),
    ("seven columns", text(T, "q,a,b,c,d,A,x\n"), r"anatomy_test.csv: 7 columns"),
    ("a row too long", text(T, "q,a,b,c,d,A\nq,a,b,c,d,A,x\n"), r"anatomy_test.csv: not a readable csv"),
    ("a row too short", text(T, "q,a,b,c,d,A\nq,a,b,A\n"), r"anatomy_test.csv: row 2: answer 'nan'"),
    ("a header", text(T, "question,A,B,C,D,answer\nq,a,b,c,d,A\n"), r"anatomy_test.csv: row 1: answer 'answer'"),
    ("a number as an answer", text(T, "q,a,b,c,d,0\n"), r"anatomy_test.csv: row 1: answer '0'"),
    ("no answer", text(T, "q,a,b,c,d,\n"), r"anatomy_test.csv: row 1: answer 'nan'"),
    ("an answer in small letters", text(T, "q,a,b,c,d,a\n"), r"anatomy_test.csv: row 1: answer 'a'"),
    ("an open quotation", text(T, '"q,a,b,c,d,A\n'), r"anatomy_test.csv: (not a readable csv|1 columns)"),
    ("semicolons", text(T, "q;a;b;c;d;A\n"), r"anatomy_test.csv: 1 columns"),
    ("a folder", as_folder(V), r"anatomy_dev.csv: not a readable csv"),
    ("a zero byte", text(T, b"\0\0\0\n"), r"anatomy_test.csv: "),
)  # fmt: skip
def test_questions_that_are_not_as_they_must_be(folder: Path, edit: Edit, place: str):
    refuse("mmlu", folder, edit, place)


@pytest.mark.parametrize(
    ("stage", "extra", "place"),
    [
        ("mmlu", ["--subjects", "anatomi"], "no subject 'anatomi'"),
        ("mmlu", ["--questions", 0], ": 0 questions"),
        ("mmlu", ["--questions", -1], ": -1 questions"),
        ("complete", ["--max-new-tokens", 0], "max-new-tokens.* 0"),
        ("complete", ["--max-new-tokens", -3], "max-new-tokens.* -3"),
        ("split", ["--documents-per-task", 4], "documents of Task1: 4 asked for, there are 3"),
        ("split", ["--documents-per-task", 1, "--nonmembers", 1], "none of its 4 members is in the forget sample"),
        ("split", ["--raw", "nowhere"], "nowhere: no such folder"),
        ("leaderboard", ["--published", "nowhere.csv"], "nowhere.csv: no such file"),
        ("fetch_model", ["--local", "nowhere"], "nowhere: no such model folder"),
        ("fetch_data", ["--local", "nowhere"], "nowhere: no such folder"),
        ("unlearn", ["--trained", 6], "block 6 is not in a model of 6 blocks"),
        ("unlearn", ["--trained", -1, 0], "block -1 is not in a model of 6 blocks"),
        ("unlearn", ["--trained", 2, 1], r"trained blocks must be in order .*\(2, 1\)"),
    ],
)
def test_an_option_that_fits_nothing(folder: Path, stage: str, extra: list[object], place: str):
    refuse(stage, folder, lambda _: None, place, extra)


REQUIRED = {
    "complete": ["--model", "--forget", "--retain", "--output"],
    "membership": ["--model", "--mia", "--output"],
    "mmlu": ["--model", "--data", "--output"],
    "score": ["--completions", "--output"],
    "split": ["--raw", "--output"],
    "leaderboard": ["--results", "--control", "--name", "--size", "--output"],
}


@pytest.mark.parametrize("stage", REQUIRED)
def test_an_option_that_is_left_out_is_named(stage: str):
    code, said = call(stage, [])
    assert code == 2
    assert said.endswith(f": error: the following arguments are required: {', '.join(REQUIRED[stage])}\n")


@pytest.mark.parametrize(
    ("stage", "output"),
    [
        ("score", "out/file/below"),  # under a file
        ("score", "out/folder"),  # in the place of a folder
        ("split", "out/file"),  # in the place of a file
        ("split", "out/file/below"),
        ("split", "raw"),  # onto its own input
        ("split", "raw/below"),
        ("split", "."),
        ("fetch_model", "model"),
        ("fetch_model", "."),
    ],
)
def test_an_output_that_cannot_be(folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, output: str):
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if path.suffix != ".lock"}
    refuse(stage, folder, lambda _: None, output.partition("/")[0], ["--output", output])
    assert {path for path in folder.rglob("*") if path.suffix != ".lock"} == before


@pytest.mark.parametrize("output", [".", ".."])
def test_an_output_without_a_name_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str):
    """`..` replaced as a whole would take everything beside it along."""
    (folder / "out" / "elsewhere" / "here").mkdir(parents=True)
    monkeypatch.chdir(folder / "out" / "elsewhere" / "here")
    refuse("split", folder, lambda _: None, "name", ["--output", output])
    assert (folder / "out" / "elsewhere" / "here").is_dir()


# ---- weights ----

W = "model/model.safetensors"
DOWN = "model.layers.3.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"


def not_finite(value: float, name: str = DOWN) -> Edit:
    return alter(lambda tensors: tensors[name].view(-1)[7:8].fill_(value))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / W), folder / "model" / "pytorch_model.bin")
    (folder / W).unlink()


def offsets(change: Callable[[list[int]], list[int]]) -> Edit:
    return header(lambda entries: entries[DOWN].update(data_offsets=change(entries[DOWN]["data_offsets"])))


CONTAINERS = [
    ("not there", without(W), "model.*safetensors"),
    ("a pickle in their place", pickled, "safetensors"),
    ("empty", text(W, ""), "model"),
    ("a folder", as_folder(W), "model"),
    ("seven bytes", text(W, b"\1\0\0\0\0\0\0"), "model"),
    ("text", text(W, "version https://git-lfs.github.com/spec/v1\n"), "model"),
    ("cut in the header", cut(W, 0.002), "model"),
    ("cut in the data", cut(W, 0.7), "model"),
    ("cut by a byte", cut(W, 0.99999), "model"),
    ("a longer header than there is", header(lambda entries: None, 1 << 40), "model"),
    ("a header a byte too long", header(lambda entries: None, 1), "model"),
    ("a header a byte too short", header(lambda entries: None, -1), "model"),
    ("a header that is a list", text(W, struct.pack("<Q", 2) + b"[]"), "model"),
    ("a header that is not JSON", text(W, struct.pack("<Q", 4) + b"{{{{"), "model"),
    ("an unknown type", header(lambda entries: entries[DOWN].update(dtype="F7")), "model"),
    ("a shape of more than the bytes", header(lambda entries: entries[DOWN].update(shape=[32, 97])), "model"),
    ("a negative shape", header(lambda entries: entries[DOWN].update(shape=[-32, -96])), "model"),
    ("offsets behind the end", offsets(lambda pair: [pair[0] + (1 << 30), pair[1] + (1 << 30)]), "model"),
    ("offsets backwards", offsets(lambda pair: pair[::-1]), "model"),
    ("offsets that overlap", offsets(lambda pair: [pair[0] - 4, pair[1] - 4]), "model"),
    ("no offsets", header(lambda entries: entries[DOWN].pop("data_offsets")), "model"),
    ("bytes behind the end", lambda folder: (folder / W).open("ab").write(b"more"), "model"),
]


@crossed(["membership", "fetch_model", "package", "unlearn"], CONTAINERS)
def test_a_weight_file_that_is_not_whole(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


TENSORS = [
    ("not a number", not_finite(float("nan")), DOWN),
    ("infinite", not_finite(float("inf")), DOWN),
    ("no number among the embeddings", not_finite(float("nan"), EMBED), EMBED),
    ("a tensor too few", alter(lambda tensors: tensors.pop(DOWN)), "layers.3.mlp.down_proj"),
    ("no block 3", alter(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".3." in name]), r"layers\.3"),
    ("a tensor of block 6", alter(lambda tensors: tensors.update({DOWN.replace("3", "6"): tensors[DOWN].clone()})),
     r"layers\.6"),
    ("transposed", alter(lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()})),
     "layers.3.mlp.down_proj"),
    ("a row too few", alter(lambda tensors: tensors.update({EMBED: tensors[EMBED][:-1].clone()})), "embed_tokens"),
    ("flat", alter(lambda tensors: tensors.update({DOWN: tensors[DOWN].flatten()})), "layers.3.mlp.down_proj"),
    ("no tensor", alter(lambda tensors: tensors.clear()), "model"),
    ("other names", alter(lambda found: [found.update({f"x.{name}": found.pop(name)}) for name in list(found)]),
     "embed_tokens|lm_head"),
]  # fmt: skip


@crossed(["complete", "unlearn"], TENSORS)
def test_tensors_that_do_not_fit(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


def test_weights_so_large_that_the_loss_is_no_number(folder: Path):
    alter(lambda tensors: tensors["lm_head.weight"].fill_(3e38))(folder)
    for stage in ("membership", "mmlu"):
        refuse(stage, folder, lambda _: None, "row 1")


# ---- model folder ----


def configured(**change: object) -> Edit:
    return parsed("model/config.json", lambda config: config.update(change))


CONFIGS = [
    ("not there", without("model/config.json"), r"config.json"),
    ("not JSON", text("model/config.json", "{"), r"config.json|model"),
    ("empty", text("model/config.json", ""), r"config.json|model"),
    ("a list", text("model/config.json", "[]"), r"config.json|model"),
    ("a text", text("model/config.json", '"olmo"'), r"config.json|model"),
    ("an empty object", text("model/config.json", "{}"), r"model"),
    ("not UTF-8", text("model/config.json", b"\xff\xfe"), r"config.json|model"),
    ("an unknown architecture", configured(model_type="no such model"), r"model"),
    ("no causal language model", configured(model_type="vit"), r"model"),
    ("an encoder and decoder", configured(model_type="t5"), r"model"),
    ("another architecture", configured(model_type="gpt2"), r"model"),
    ("one with norms", configured(model_type="llama"), r"norm"),
    ("no blocks", configured(num_hidden_layers=0), r"model|trained blocks"),
    ("a block too few", configured(num_hidden_layers=5), r"layers\.5"),
    ("a block too many", configured(num_hidden_layers=7), r"layers\.6"),
    ("fewer than no blocks", configured(num_hidden_layers=-1), r"model|trained blocks"),
    ("blocks as text", configured(num_hidden_layers="six"), r"model"),
    ("another width", configured(hidden_size=64), r"model"),
    ("another intermediate width", configured(intermediate_size=95), r"layers\.0.*mlp"),
    ("another vocabulary", configured(vocab_size=500), r"embed_tokens|lm_head"),
    ("heads that do not divide the width", configured(num_attention_heads=5), r"model"),
    ("no heads", configured(num_attention_heads=0), r"model"),
    ("no width", configured(hidden_size=0), r"model"),
    ("code of its own", configured(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
                                   model_type="evil"), r"model"),
]  # fmt: skip


@crossed(["membership", "unlearn"], CONFIGS)
def test_a_model_config_that_does_not_fit(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


J = "model/tokenizer.json"


def one_token_more(folder: Path) -> None:
    def change(content: dict) -> None:
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 314, "content": " the"})

    parsed(J, change)(folder)


def without_end(folder: Path) -> None:
    parsed("model/tokenizer_config.json", lambda content: content.pop("eos_token"))(folder)
    parsed("model/generation_config.json", lambda content: content.pop("eos_token_id", None))(folder)
    configured(eos_token_id=None)(folder)


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "model").glob("*token*"):
        path.unlink()


TOKENIZERS = [
    ("no tokenizer", no_tokenizer, "model"),
    ("an empty tokenizer", text(J, ""), "model"),
    ("a tokenizer cut in half", cut(J, 0.5), "model"),
    ("a tokenizer that is a list", text(J, "[]"), "model"),
    ("a tokenizer of nothing", text(J, "{}"), "model"),
    ("an unknown kind", parsed(J, lambda content: content["model"].update(type="Telepathy")), "model"),
    ("no vocabulary", parsed(J, lambda content: content["model"].pop("vocab")), "model"),
    ("merges of unknown pieces", parsed(J, lambda content: content["model"]["merges"].append(["qqq", "zzz"])), "model"),
    ("a token without an embedding", one_token_more, "a token 314"),
    ("no end-of-text token", without_end, "end-of-text"),
]  # fmt: skip


@crossed(["complete", "membership", "unlearn"], TOKENIZERS)
def test_a_tokenizer_that_does_not_fit(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


# ---- an index of shards ----

INDEX = "model/model.safetensors.index.json"


def index(content: object) -> Edit:
    return text(INDEX, content if isinstance(content, str) else json.dumps(content))


@cases(
    ("not JSON", index("{"), "index of weights|index.json"),
    ("a list", index([]), "index of weights"),
    ("no map", index({"metadata": {}}), "index of weights"),
    ("a map that is a list", index({"weight_map": []}), "index of weights"),
    ("numbers for names", index({"weight_map": {DOWN: 7}}), "index of weights"),
    ("a shard that is not there", index({"weight_map": {DOWN: "gone.safetensors"}}), "gone.safetensors is missing"),
    ("a shard outside", index({"weight_map": {DOWN: "../x.safetensors"}}), "outside the folder"),
    ("not UTF-8", text(INDEX, b"\xff"), "index of weights"),
)  # fmt: skip
def test_an_index_of_shards_that_does_not_fit(folder: Path, edit: Edit, place: str):
    refuse("fetch_model", folder, edit, place)


# ---- results, published rows, runs ----

R = "unlearned/evaluation_results.jsonl"
X = "unlearned/run.json"


@cases(
    ("no result", "leaderboard", without(R), "evaluation_results.jsonl: no such file"),
    ("an empty result", "leaderboard", text(R, ""), "not JSON"),
    ("two results", "leaderboard", lambda folder: text(R, (folder / R).read_text() * 2)(folder),
     "not JSON: Extra data"),
    ("a result that is a list", "leaderboard", text(R, "[]"), "evaluation_results.jsonl"),
    ("a result that is null", "leaderboard", text(R, "null"), "evaluation_results.jsonl"),
    ("a result that is not UTF-8", "leaderboard", text(R, b"\xff"), "evaluation_results.jsonl"),
    ("a result without an end", "leaderboard", text(R, '{"a": ' * 50_000), "evaluation_results.jsonl"),
    ("no aggregate", "leaderboard", parsed(R, lambda found: found.pop("aggregate-score")), "aggregate-score"),
    ("no Task2", "leaderboard", parsed(R, lambda found: found["forget-set"].pop("Task2")), "forget-set.*Task2"),
    ("a text for a number", "leaderboard", parsed(R, lambda found: found.update(mmlu_average="0.5")), "mmlu_average"),
    ("null for a number", "leaderboard", parsed(R, lambda found: found.update(mia_final_score=None)),
     "mia_final_score"),
    ("NaN", "leaderboard", parsed(R, lambda found: found.update({"aggregate-score": float("nan")})), "NaN"),
    ("1e999", "leaderboard", lambda folder: text(R, re.sub(r'("mmlu_average": )[\d.]+', r"\g<1>1e999", (folder / R)
        .read_text()))(folder), "mmlu_average"),
    ("an accuracy of 85 percent", "leaderboard", parsed(R, lambda found: found.update(mmlu_average=85)),
     "mmlu_average"),
    ("a final score below -1", "leaderboard", parsed(R, lambda found: found.update({"aggregate-score": -3})),
     "aggregate"),
    ("no published rows", "leaderboard", without("leaderboard.csv"), "leaderboard.csv: no such file"),
    ("an empty file of published rows", "leaderboard", text("leaderboard.csv", ""), "leaderboard.csv: line 1"),
    ("another header", "leaderboard", text("leaderboard.csv", "a,b\n1,2\n"), "leaderboard.csv: line 1"),
    ("published rows not in UTF-8", "leaderboard", text("leaderboard.csv", b"size,\xff\n"), "leaderboard.csv"),
    ("a published number of words", "leaderboard", replaced("leaderboard.csv", ".706", ".seven"),
     "leaderboard.csv: row"),
    ("a published size of 3B", "leaderboard", replaced("leaderboard.csv", "7B,", "3B,"), "leaderboard.csv: row 1"),
    ("a published row cut", "leaderboard", cut("leaderboard.csv", 0.97), "leaderboard.csv: row"),
    ("no run", "package", without(X), "run.json: no such file"),
    ("a run cut", "package", cut(X, 0.5), "run.json: not JSON"),
    ("a run that is a list", "package", text(X, "[]"), "run.json"),
    ("a run not in UTF-8", "package", text(X, b"\xff"), "run.json"),
    ("a run without settings", "package", parsed(X, lambda found: found.pop("settings")), "run.json.*settings"),
    ("hardware that is a number", "package", parsed(X, lambda found: found.update(hardware=7)), "run.json.*hardware"),
    ("NaN among the settings", "package", parsed(X, lambda found: found["settings"].update(beta=float("nan"))),
     "run.json"),
    ("results of nothing to pack", "package", without("original/evaluation_results.jsonl"), "evaluation_results.jsonl"),
    ("no tensor changed", "package", lambda folder: shutil.copy(folder / W, folder / "unlearned"),
     "nothing was unlearned"),
    ("a tensor more after unlearning", "package", lambda folder: alter(lambda tensors: tensors.update(
        x=torch.zeros(1)))(folder, "unlearned"), "tensor x"),
    ("no data", "package", lambda folder: shutil.rmtree(folder / "data"), "data: none of"),
)  # fmt: skip
def test_results_and_runs_that_are_not_as_they_must_be(folder: Path, stage: str, edit: Edit, place: str):
    refuse(stage, folder, edit, place)


# ---- a zip to verify ----

Z = "x.zip"


def members(change: Callable[[dict[str, bytes]], object]) -> Edit:
    """Write the zip anew, with other members."""

    def edit(folder: Path) -> None:
        with zipfile.ZipFile(folder / Z) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        change(content)
        with zipfile.ZipFile(folder / Z, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)

    return edit


@cases(
    ("not there", without(Z), "x.zip: no such file"),
    ("a folder", as_folder(Z), "x.zip: no such file"),
    ("empty", text(Z, ""), "x.zip: not a readable zip"),
    ("text", text(Z, "not a zip"), "x.zip: not a readable zip"),
    ("cut in half", cut(Z, 0.5), "x.zip: not a readable zip"),
    ("cut by a byte", cut(Z, 0.99999), "x.zip: not a readable zip"),
    ("without a member", members(lambda found: found.pop("mmlu.jsonl")), "x.zip"),
    ("without a manifest", members(lambda found: found.pop("manifest.json")), "x.zip"),
    ("with one member more", members(lambda found: found.update({"more.txt": b""})), "x.zip"),
    ("with a member above the folder", members(lambda found: found.update({"../x": b""})), "leaves the folder"),
    ("with a member at the root", members(lambda found: found.update({"/x": b""})), "absolute path"),
    ("with no members", members(lambda found: found.clear()), "x.zip"),
    ("with bytes before", lambda folder: text(Z, b"#!" + (folder / Z).read_bytes())(folder), "x.zip"),
    ("with bytes behind", lambda folder: text(Z, (folder / Z).read_bytes() + b"x")(folder), "x.zip"),
)  # fmt: skip
def test_a_zip_that_is_not_as_packed(folder: Path, edit: Edit, place: str):
    refuse("verify", folder, edit, place)


@pytest.mark.parametrize("number", range(40))
def test_a_zip_with_one_bit_turned(folder: Path, number: int):
    """No bit of the file is free: neither of the contents, nor of the headers."""
    dice = random.Random(number)
    content = bytearray((folder / Z).read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    refuse("verify", folder, text(Z, bytes(content)), "x.zip")


# ---- configuration ----


def put(*path: object, value: object) -> Callable[[dict], None]:
    """Set config[path[0]][path[1]]...; `...` takes the key out."""

    def change(config: dict) -> None:
        for key in path[:-1]:
            config = config[key]
        if value is ...:
            del config[path[-1]]
        else:
            config[path[-1]] = value

    return change


TINY = ("targets", "tiny")
WRONG = {
    "an unknown key": (put("dtaa", value="x"), "dtaa"),
    "a number for a folder": (put("data", value=7), "7"),
    "a list for a folder": (put("mmlu", value=["x"]), "x"),
    "no data": (put("data", value=...), "data"),
    "no targets": (put("targets", value=...), "targets"),
    "targets in a list": (put("targets", value=[]), "object"),
    "a target that is null": (put(*TINY, value=None), "None"),
    "a target that is text": (put(*TINY, value="1b"), "1b"),
    "an unknown key of a target": (put(*TINY, "beta", value=2.0), "beta"),
    "stand_in absent": (put(*TINY, "stand_in", value=...), "stand_in"),
    "stand_in as text": (put(*TINY, "stand_in", value="yes"), "yes"),
    "a checkpoint without a model": (put("targets", "1b", "model", value=...), "model"),
    "a stand-in with a model": (put(*TINY, "model", value={"repo": "a/b", "revision": "main"}), "model"),
    "a checkpoint with a base": (put("targets", "1b", "base", value=True), "base"),
    "a checkpoint with a vocabulary": (put("targets", "1b", "vocabulary", value=400), "vocabulary"),
    "a base with a vocabulary": (put("targets", "135m", "vocabulary", value=400), "vocabulary"),
    "a base that is false": (put(*TINY, "base", value=False), "base|False"),
    "a vocabulary of ten": (put(*TINY, "vocabulary", value=10), "10"),
    "half a token": (put(*TINY, "vocabulary", value=1024.5), "1024.5"),
    "a vocabulary that is no number": (put(*TINY, "vocabulary", value=float("nan")), "nan"),
    "a size of 13B": (put(*TINY, "published_size", value="13B"), "13B"),
    "an unknown source of questions": (put(*TINY, "multiple_choice", "source", value="arc"), "arc"),
    "no subject": (put(*TINY, "multiple_choice", "subjects", value=[]), r"\[\]"),
    "a subject of two words": (put(*TINY, "multiple_choice", "subjects", value=["anatomy; rm -r x"]), "anatomy; rm"),
    "a subject that is a number": (put(*TINY, "multiple_choice", "subjects", value=[7]), "7"),
    "subjects as text": (put(*TINY, "multiple_choice", "subjects", value="anatomy"), "anatomy"),
    "no question": (put(*TINY, "multiple_choice", "questions", value=0), "0"),
    "a dataset that is a number": (put(*TINY, "dataset", value=7), "7"),
    "no memory": (put(*TINY, "resources", "memory_mb", value=0), "0"),
    "negative gpus": (put(*TINY, "resources", "gpus", value=-1), "-1"),
    "minutes absent": (put(*TINY, "resources", "minutes", value=...), "minutes"),
    "an unknown resource": (put(*TINY, "resources", "disk", value=1), "disk"),
    "an unknown source of data": (put("datasets", "synthetic", "source", value="pile"), "pile"),
    "no documents": (put("datasets", "sample", "documents_per_task", value=0), "0"),
    "a seed below zero": (put("datasets", "sample", "seed", value=-1), "-1"),
    "documents as text": (put("datasets", "sample", "documents_per_task", value="6"), "6"),
    "texts as a number": (put("datasets", "sample", "texts", value=0), "0"),
    "non-members without a sample": (put("datasets", "semeval25", "nonmembers", value=4), "documents_per_task"),
    "a target named after a path": (put("targets", "../x", value={}), r"\.\./x"),
    "a target with a blank": (put("targets", "a b", value={}), "a b"),
    "a dataset named after a path": (put("datasets", "a/b", value={"source": "synthetic"}), "a/b"),
    "a repository with a blank": (put("targets", "1b", "model", "repo", value="a/b; rm -r x"), "a/b; rm"),
    "a revision that is null": (put("targets", "1b", "model", "revision", value=None), "None"),
    "a revision with a blank": (put("targets", "1b", "model", "revision", value="main $(x)"), "main"),
    "no repository": (put("targets", "1b", "model", "repo", value=...), "repo"),
}


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


@pytest.mark.parametrize("what", WRONG)
def test_a_configuration_that_is_refused(config: dict, what: str):
    change, named = WRONG[what]
    spoilt = copy.deepcopy(config)
    change(spoilt)
    with pytest.raises(WorkflowError, match="Error validating config file") as caught:
        validate(spoilt, str(ROOT / "config" / "schema.yaml"))
    assert re.search(named, str(caught.value))


def test_the_configuration_itself_is_accepted_and_left_as_it_is(config: dict):
    checked = copy.deepcopy(config)
    validate(checked, str(ROOT / "config" / "schema.yaml"))
    assert checked == config


# ---- what is legal, though unusual ----


def scored(folder: Path) -> dict:
    code, said = call("score", arguments("score", folder))
    assert code == 0, said
    return json.loads((folder / "out" / "file").read_text())


def as_columns(of: Callable[[list], object]) -> Edit:
    def edit(folder: Path) -> None:
        table = lines(folder / C)
        (folder / C).write_text(json.dumps({name: of([entry[name] for entry in table]) for name in table[0]}))

    return edit


def each(name: str, change: Callable[[dict], dict]) -> Edit:
    return lambda folder: write(folder / name, [change(entry) for entry in lines(folder / name)])


def reencoded(change: Callable[[str], str]) -> Edit:
    return lambda folder: (folder / C).write_bytes(change((folder / C).read_text()).encode())


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(reencoded(lambda content: content.replace("\n", "\r\n")), id="Windows line ends"),
        pytest.param(reencoded(lambda content: content.replace("\n", "\n\n \n")), id="blank lines"),
        pytest.param(reencoded(lambda content: content.rstrip("\n")), id="no last line end"),
        pytest.param(reencoded(lambda content: content.replace(", ", " ,\t")), id="white space in rows"),
        pytest.param(as_columns(lambda values: values), id="columns as lists"),
        pytest.param(as_columns(lambda values: {str(n): v for n, v in enumerate(values)}), id="columns as objects"),
        pytest.param(each(C, lambda entry: dict(reversed(entry.items()))), id="fields in another order"),
        pytest.param(each(C, lambda entry: entry | {"more": [1, {"x": None}]}), id="a field more"),
        pytest.param(each(C, lambda entry: entry | {"subject": ["x"], "index": {}}), id="fields of other tables"),
        pytest.param(each(C, lambda entry: entry | {"nll": None}), id="no losses"),
        pytest.param(each(C, lambda entry: entry | {"input": ""}), id="empty inputs"),
        pytest.param(each(Q, lambda entry: entry | {"index": float(entry["index"])}), id="indices as 1.0"),
        pytest.param(lambda folder: write(folder / C, lines(folder / C)[::-1]), id="rows in another order"),
    ],
)
def test_rows_that_are_legal_score_as_before(sound: Path, folder: Path, edit: Edit):
    edit(folder)
    expected = json.loads((sound / "original" / "evaluation_results.jsonl").read_text())
    found = scored(folder)
    assert found["aggregated-terms"] == pytest.approx(expected["aggregated-terms"], rel=1e-12)
    assert {key: found[key] for key in ("mia_loss_acc", "mmlu_average")} == {
        key: expected[key] for key in ("mia_loss_acc", "mmlu_average")
    }


def losses(folder: Path) -> list[float]:
    code, said = call("membership", arguments("membership", folder))
    assert code == 0, said
    return [entry["nll"] for entry in lines(folder / "out" / "file")]


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / W)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for shard in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == shard}
        save_file(part, folder / "model" / shard, metadata={"format": "pt"})
    index({"metadata": {}, "weight_map": places})(folder)
    (folder / W).unlink()


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(in_shards, id="two shards"),
        pytest.param(without("model/generation_config.json"), id="no generation config"),
        pytest.param(alter(lambda found: [found.update({n: t.double()}) for n, t in found.items()]), id="float64"),
        pytest.param(each(N, lambda entry: entry | {"split": ["x"], "index": {}}), id="fields of other tables"),
        pytest.param(text("model/pytorch_model.bin", b"\x80\x04never read"), id="a pickle beside the weights"),
        pytest.param(text("model/evil.py", "raise SystemExit(7)"), id="code beside the weights"),
    ],
)  # fmt: skip
def test_model_folders_that_are_legal_give_the_same_losses(sound: Path, folder: Path, tmp_path: Path, edit: Edit):
    expected = losses(shutil.copytree(sound, tmp_path / "as it was"))
    edit(folder)
    assert losses(folder) == expected


# ---- the same from a shell ----


@pytest.mark.parametrize(
    ("stage", "edit", "place"),
    [
        ("score", text(C, b'{"id": "\xff"}\n'), "completions.jsonl: byte 8: not UTF-8"),
        ("verify", cut(Z, 0.5), "x.zip: not a readable zip"),
        ("membership", not_finite(float("nan")), DOWN),
    ],
)
def test_from_the_command_line_the_exit_code_is_2(folder: Path, stage: str, edit: Edit, place: str):
    edit(folder)
    words = map(str, arguments(stage, folder))
    command = [sys.executable, "-m", f"pipeline.{stage}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_refused(done.returncode, done.stderr, folder, place)


def test_so_many_cases_were_tried():
    """Last in the file: what did not run cannot have passed."""
    assert len(set(tried)) >= LEAST
