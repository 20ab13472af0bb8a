"""The zip: its members, its hashes, its bytes, and what it refuses to hold."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy
import pandas
import pytest
from safetensors.numpy import save_file

from pipeline import package, score
from pipeline.lib.stage import BadInput
from tests.conftest import ROOT

MEMBERS = {
    "submission.py",
    "README.md",
    "manifest.json",
    *(
        prefix + name
        for prefix in ("", "original/")
        for name in (
            "evaluation_results.jsonl",
            "mmlu.jsonl",
            "forget_0.csv",
            "retain_0.csv",
            "mia_results/member_0.csv",
            "mia_results/nonmember_0.csv",
        )
    ),
}
AWKWARD = [
    "",
    "NA",
    "None",
    'a "quoted", text',
    "two\nlines",
    "a\rreturn",
    "a\r\nboth",
    "東京 émigré",
    "  spaces  ",
    "007",
]
FIXED = {"settings": {"block": 5, "beta": 3.0}, "versions": {"torch": "2.0"}, "hardware": "a machine", "threads": 1}
MEASURED = {"wall_seconds": 12.5, "peak_memory_bytes": 1000}
RUN = FIXED | MEASURED
WEIGHTS = {"kept": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "changed": numpy.ones(4, dtype=numpy.float32)}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_rows(folder: Path, forgotten: bool) -> None:
    """Write the four row files of a checkpoint that repeats every text, or none of those to forget."""
    folder.mkdir(parents=True)
    cells = [(side, task, kind) for side in ("forget", "retain") for task in (1, 2, 3) for kind in ("sc", "qa")]
    completions = [
        {
            "id": f'"doc{number}"{kind}1',
            "task": f"Task{task}",
            "split": side,
            "input": text or "prompt",
            "expected_output": "word",
            "model_output": text if forgotten and side == "forget" else "word",
            "nll": None if text == "NA" else 1 / 3,
        }
        for side, task, kind in cells
        for number, text in enumerate(AWKWARD, start=10 * task)
    ]
    write(folder / "completions.jsonl", completions)
    loss, step = (2.0, 1.0) if forgotten else (0.1, 0.1)
    membership = [{"id": f"m{n}", "set": "member", "nll": loss + n * step} for n in range(4)]
    membership += [{"id": f"n{n}", "set": "nonmember", "nll": 2.5 + n} for n in range(4)]
    write(folder / "membership.jsonl", membership)
    questions = [
        {"subject": "anatomy", "index": n, "answer": "AB"[n % 2], "probs": [0.5, 0.2, 0.1, 0.1]} for n in range(4)
    ]
    write(folder / "mmlu.jsonl", questions)
    files = {name: str(folder / f"{name}.jsonl") for name in ("completions", "membership", "mmlu")}
    flags = [word for name, file in files.items() for word in (f"--{name}", file)]
    score.main([*flags, "--output", str(folder / "evaluation_results.jsonl")])


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a zip is made of, away from any real token."""
    monkeypatch.setenv("HF_TOKEN", "hf_canaryCANARYcanary")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_rows(tmp_path / "results/tiny/original", forgotten=False)
    make_rows(tmp_path / "results/tiny/unlearned", forgotten=True)
    for folder in ("models/tiny/original", "results/tiny/unlearned"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "config.json").write_text("{}")
        save_file(WEIGHTS, tmp_path / folder / "model.safetensors")
    save_file(WEIGHTS | {"changed": 2 * WEIGHTS["changed"]}, tmp_path / "results/tiny/unlearned/model.safetensors")
    (tmp_path / "results/tiny/unlearned/run.json").write_text(json.dumps(RUN))
    forget = tmp_path / "data/split/small/train/forget"
    forget.mkdir(parents=True)
    (forget / "forget.jsonl").write_text('{"id": "x"}\n')
    (forget / ".snakemake_timestamp").write_text("")
    (tmp_path / "unlearn.py").write_bytes(b"# the file that ran\r\nprint('\xc3\xa9')\n")
    return tmp_path


def pack(folder: Path, *extra: str, name: str = "tiny.zip") -> Path:
    paths = {
        "submission": "unlearn.py",
        "model": "models/tiny/original",
        "original": "results/tiny/original",
        "unlearned": "results/tiny/unlearned",
        "data": "data/split/small",
    }
    flags = [word for flag, path in paths.items() for word in (f"--{flag}", str(folder / path))]
    flags += ["--published", str(Path(__file__).parents[1] / "data" / "leaderboard.csv"), "--name", "tiny"]
    flags += ["--size", "1B", "--model-source", "some/model@abc", "--data-source", "some/data@def"]
    flags += ["--output", str(folder / name), "--cost", str(folder / name.replace(".zip", ".cost.json"))]
    package.main([*flags, *extra])
    return folder / name


def content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def test_members_and_the_hash_of_each(inputs):
    members = content(pack(inputs))
    assert set(members) == MEMBERS
    manifest = json.loads(members["manifest.json"])
    assert set(manifest["members"]) == MEMBERS - {"manifest.json"}
    for name, digest in manifest["members"].items():
        assert hashlib.sha256(members[name]).hexdigest() == digest, name
    for name in ("evaluation_results.jsonl", "mmlu.jsonl"):
        assert members[name] == (inputs / "results/tiny/unlearned" / name).read_bytes()
        assert members["original/" + name] == (inputs / "results/tiny/original" / name).read_bytes()
    assert members["submission.py"] == (inputs / "unlearn.py").read_bytes()


def test_manifest_identifies_models_data_and_run(inputs):
    manifest = json.loads(content(pack(inputs, "--stand-in"))["manifest.json"])
    assert (manifest["target"], manifest["stand_in"]) == ("tiny", True)
    for checkpoint, folder in (("original", "models/tiny/original"), ("unlearned", "results/tiny/unlearned")):
        weights = hashlib.sha256((inputs / folder / "model.safetensors").read_bytes()).hexdigest()
        assert manifest["model"][checkpoint] == {
            "config.json": hashlib.sha256(b"{}").hexdigest(),
            "model.safetensors": weights,
        }
    digest = hashlib.sha256(numpy.full(4, 2, dtype="<f4").tobytes()).hexdigest()  # the tensor alone, without a header
    assert manifest["model"]["changed"] == {"changed": {"dtype": "F32", "shape": [4], "sha256": digest}}
    data = {"train/forget/forget.jsonl": hashlib.sha256(b'{"id": "x"}\n').hexdigest()}
    assert manifest["data"] == {"source": "some/data@def", "files": {"small": data}}
    assert manifest["unlearning"] == FIXED
    assert manifest["scoring"]["versions"]["rouge-score"]


def test_what_was_measured_lies_beside_the_zip(inputs):
    """Wall time and peak memory differ from run to run: two runs must still give one zip."""
    first = pack(inputs)
    again = RUN | {"wall_seconds": 99.25, "peak_memory_bytes": 7}
    (inputs / "results/tiny/unlearned/run.json").write_text(json.dumps(again))
    second = pack(inputs, name="again.zip")
    assert first.read_bytes() == second.read_bytes()
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    for name, run in (("tiny", RUN), ("again", again)):
        cost = json.loads((inputs / f"{name}.cost.json").read_text())
        measured = {key: run[key] for key in MEASURED}
        assert cost == {"zip": f"{name}.zip", "sha256": digest, "hardware": "a machine"} | measured
    assert not any(text in b"".join(content(first).values()) for text in (b"12.5", b"wall_seconds", b"peak_memory"))


def test_without_texts_scores_and_hashes_are_packed(inputs):
    kept, members = content(pack(inputs)), content(pack(inputs, "--without-texts", name="bare.zip"))
    tables = {prefix + side for prefix in ("", "original/") for side in ("forget", "retain")}
    assert set(members) == (MEMBERS - {f"{table}_0.csv" for table in tables}) | {f"{t}_scores.csv" for t in tables}
    assert json.loads(kept["manifest.json"])["texts"] is True
    assert json.loads(members["manifest.json"])["texts"] is False
    same = MEMBERS - {f"{table}_0.csv" for table in tables} - {"manifest.json"}
    assert all(members[name] == kept[name] for name in same)
    rows = [json.loads(line) for line in (inputs / "results/tiny/unlearned/completions.jsonl").open(encoding="utf-8")]
    for side in ("forget", "retain"):
        (inputs / "table.csv").write_bytes(members[f"{side}_scores.csv"])
        read = pandas.read_csv(inputs / "table.csv", keep_default_na=False, dtype=str)
        assert list(read.columns) == ["id", "task", "score", "nll", "texts_sha256"]
        expected = [row for row in rows if row["split"] == side]
        assert len(read) == len(expected) == 6 * len(AWKWARD)
        for got, row in zip(read.to_dict("records"), expected, strict=True):
            texts = [row["input"], row["expected_output"], row["model_output"]]
            assert got["texts_sha256"] == hashlib.sha256(json.dumps(texts).encode()).hexdigest()
            assert (got["id"], got["task"]) == (row["id"], row["task"])
            # the expected answer is "word": right on retain, and on forget never
            assert float(got["score"]) == (side == "retain")
    everything = b"".join(members.values()).decode()
    assert not any(text in everything for text in (*(t for t in AWKWARD if len(t) > 5), "prompt", ",word,"))


def test_half_a_surrogate_pair_is_refused(inputs):
    path = inputs / "results/tiny/unlearned/completions.jsonl"
    path.write_text(path.read_text().replace('"word"', r'"wo\ud800rd"', 1))
    with pytest.raises(BadInput, match=r"unlearned/completions.jsonl: '\\ud800' is no character"):
        pack(inputs)


def test_an_unchanged_checkpoint_is_refused(inputs):
    save_file(WEIGHTS, inputs / "results/tiny/unlearned/model.safetensors")
    with pytest.raises(BadInput, match="all 2 tensors are those of .*original: nothing was unlearned"):
        pack(inputs)
    assert not list(inputs.glob("*.zip"))


def test_extracted_members_stay_in_the_folder(inputs):
    with zipfile.ZipFile(pack(inputs)) as archive:
        archive.extractall(inputs / "outside" / "folder")
    written = {path for path in (inputs / "outside").rglob("*") if path.is_file() or path.is_symlink()}
    assert {path.relative_to(inputs / "outside/folder").as_posix() for path in written} == MEMBERS
    assert not any(path.is_symlink() for path in written)


def test_the_token_of_the_environment_appears_nowhere(inputs):
    """Zip, its members, cost file, locks, output: as a user runs it, in a process of its own."""
    canary = "hf_canaryCANARYcanary"
    paths = ["--model", "models/tiny/original", "--original", "results/tiny/original", "--data", "data/split/small"]
    paths += ["--unlearned", "results/tiny/unlearned", "--output", "out/tiny.zip", "--cost", "out/tiny.cost.json"]
    flags = ["--published", str(ROOT / "data" / "leaderboard.csv"), "--name", "tiny", "--size", "1B"]
    flags += ["--submission", "unlearn.py", "--model-source", "m", "--data-source", "d"]
    environment = {**os.environ, "HF_TOKEN": canary, "HUGGING_FACE_HUB_TOKEN": canary, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.package", *paths, *flags]
    done = subprocess.run(command, cwd=inputs, env=environment, capture_output=True, check=True)
    read = [done.stdout, done.stderr, *content(inputs / "out/tiny.zip").values()]
    read += [path.read_bytes() for path in inputs.rglob("*") if path.is_file()]
    assert len(read) >= 2 + len(MEMBERS) + 10
    assert not any(canary.encode() in data for data in read)


def test_same_inputs_same_bytes_later_and_elsewhere(inputs, monkeypatch):
    first = pack(inputs).read_bytes()
    os.utime(inputs / "unlearn.py", (time.time() + 1e6,) * 2)
    (inputs / "unlearn.py").chmod(0o700)
    old_mask = os.umask(0o077)
    try:
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        copy = inputs / "a longer name"
        shutil.copytree(inputs, copy, ignore=shutil.ignore_patterns("a longer name", "*.zip"))
        monkeypatch.chdir(copy)
        assert pack(inputs, name="again.zip").read_bytes() == first
        assert pack(Path()).read_bytes() == first
    finally:
        os.umask(old_mask)
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "file",
    [
        "unlearn.py",
        "results/tiny/unlearned/completions.jsonl",
        "results/tiny/original/membership.jsonl",
        "results/tiny/unlearned/run.json",
        "results/tiny/unlearned/model.safetensors",
        "models/tiny/original/config.json",
        "data/split/small/train/forget/forget.jsonl",
    ],
)
def test_any_other_input_gives_another_manifest(inputs, file):
    before = content(pack(inputs))["manifest.json"]
    path = inputs / file
    if path.suffix == ".safetensors":
        save_file(WEIGHTS | {"changed": 3 * WEIGHTS["changed"]}, path)
    else:
        path.write_bytes(path.read_bytes().replace(b"0.3333", b"0.3334").replace(b"2.5", b"2.25") + b" ")
        path.write_bytes(path.read_bytes().replace(b"# the", b"# another").replace(b'"x"', b'"y"'))
        path.write_bytes(path.read_bytes().replace(b"3.0", b"3.5"))  # beta in run.json
    assert content(pack(inputs))["manifest.json"] != before


def test_two_data_folders_of_one_name_would_be_one_in_the_manifest(inputs, capsys):
    with pytest.raises(SystemExit) as stop:
        pack(inputs, "--data", "data/split/small", "elsewhere/small")
    assert stop.value.code == 2
    assert "--data data/split/small elsewhere/small: two folders of one name" in capsys.readouterr().err
    assert not list(inputs.glob("*.zip"))


def test_dates_and_permissions_are_fixed(inputs):
    with zipfile.ZipFile(pack(inputs)) as archive:
        entries = archive.infolist()
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.external_attr >> 16 for entry in entries} == {0o100644}
    assert [entry.filename for entry in entries] == sorted(MEMBERS)


def test_csv_files_hold_the_rows_to_the_letter(inputs):
    members = content(pack(inputs))
    rows = [json.loads(line) for line in (inputs / "results/tiny/unlearned/completions.jsonl").open(encoding="utf-8")]
    columns = ["id", "task", "input", "expected_output", "model_output", "nll"]
    for side in ("forget", "retain"):
        (inputs / "table.csv").write_bytes(members[f"{side}_0.csv"])
        read = pandas.read_csv(inputs / "table.csv", keep_default_na=False, dtype=str)
        assert list(read.columns) == columns
        expected = [row for row in rows if row["split"] == side]
        assert len(read) == len(expected) == 6 * len(AWKWARD)
        for got, row in zip(read.to_dict("records"), expected, strict=True):
            assert got == {name: row[name] for name in columns} | {
                "nll": "" if row["nll"] is None else repr(row["nll"])
            }
    (inputs / "table.csv").write_bytes(members["mia_results/member_0.csv"])
    assert pandas.read_csv(inputs / "table.csv").to_dict("list") == {
        "id": ["m0", "m1", "m2", "m3"],
        "nll": [2.0, 3.0, 4.0, 5.0],
    }


def test_csv_form_is_that_of_pandas():
    rows = [{"id": "a", "text": text, "nll": nll} for text, nll in zip(AWKWARD, [None, *range(9)], strict=True)]
    rows = [{**row, "nll": None if row["nll"] is None else row["nll"] / 7e5} for row in rows if "\r" not in row["text"]]
    ours = package.csv_table(Path("rows.jsonl"), ["id", "text", "nll"], rows)
    assert ours == pandas.DataFrame(rows).astype({"nll": float}).to_csv(index=False, lineterminator="\n").encode()


def test_readme_states_the_numbers_the_controls_and_the_label(inputs):
    text = content(pack(inputs, "--stand-in"))["README.md"].decode()
    results = json.loads((inputs / "results/tiny/unlearned/evaluation_results.jsonl").read_text())
    assert "This is a stand-in" in text and "not leaderboard numbers" in text
    assert f"| unlearned | {results['aggregate-score']:.3f} | {results['harmonic-mean-task-aggregate']:.3f} |" in text
    assert "| untouched (control) | 0.167 | 0.000 | 0.000 | 0.500 |" in text  # mean of 0, 0 and .5
    assert "| destroyed (control, by arithmetic) | 0.417 | 0.000 | 1.000 | 0.250 |" in text
    assert text.count("| forget | Task") == text.count("| retain | Task") == 3
    assert "| forget | Task2 | 0.000 | 0.000 | 1.000 | 1.000 |" in text
    assert "| retain | Task2 | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "not comparable" in text and "would be" not in text
    # the final is the mean of 1, 1 - 2|AUC - .5| and .5, above every published 1B row
    own = content(pack(inputs))["README.md"].decode()
    assert results["aggregate-score"] > 0.688 and "would be 1 of 25" in own
    assert "stand-in" not in own


@pytest.mark.parametrize("where", ["answer", "run", "measured", "submission", "source"])
@pytest.mark.parametrize("what", ["token", "home", "folder"])
def test_a_token_or_an_absolute_path_stops_the_packing(inputs, where, what, capsys):
    text = {"token": "hf_canaryCANARYcanary", "home": f"{inputs}/home/x", "folder": str(Path.cwd())}[what]
    extra: list[str] = []
    if where == "answer":
        path = inputs / "results/tiny/unlearned/completions.jsonl"
        path.write_text(path.read_text().replace('"word"', json.dumps(f"see {text}"), 1))
    elif where == "run":
        (inputs / "results/tiny/unlearned/run.json").write_text(json.dumps(RUN | {"settings": {"out": text}}))
    elif where == "measured":
        (inputs / "results/tiny/unlearned/run.json").write_text(json.dumps(RUN | {"note": text}))
    elif where == "submission":
        (inputs / "unlearn.py").write_text(f"print(1)\nOUT = {text!r}\n")
    else:
        extra = ["--model-source", text]
    with pytest.raises(BadInput, match="must not be packed") as refused:
        pack(inputs, *extra)
    assert "hf_canary" not in str(refused.value)
    name = {
        "answer": "forget_0.csv",
        "run": "manifest.json",
        "measured": "tiny.cost.json",
        "submission": "submission.py: line 2",
        "source": "manifest.json",
    }
    assert str(refused.value).startswith(name[where])
    assert not list(inputs.glob("*.zip"))


def test_a_text_that_only_looks_like_a_path_is_packed(inputs, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    path = inputs / "results/tiny/unlearned/completions.jsonl"
    path.write_text(path.read_text().replace('"word"', '"and/or /root of x.org/root/y, /rootless"', 1))
    assert set(content(pack(inputs))) == MEMBERS
    path.write_text(path.read_text().replace("/rootless", "/root/.cache", 1))
    with pytest.raises(BadInput, match=r"forget_0\.csv: line 2: the path /root must not be packed"):
        pack(inputs)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("unlearn.py", None, "unlearn.py: no such file"),
        ("results/tiny/unlearned/run.json", None, "run.json: no such file"),
        ("results/tiny/unlearned/run.json", "{", "run.json: not JSON"),
        (
            "results/tiny/unlearned/run.json",
            '{"settings": 1, "versions": {}, "hardware": "", "threads": 1}',
            r"run.json: \$.settings: 1 is",
        ),
        ("results/tiny/original/mmlu.jsonl", None, "original/mmlu.jsonl: no such file"),
        ("results/tiny/unlearned/model.safetensors", "x", "unlearned/model.safetensors: not a whole safetensors file"),
        ("models/tiny/original/model.safetensors", None, r"original: no tensor in \*.safetensors"),
        ("results/tiny/unlearned/completions.jsonl", "{}\n", "completions.jsonl: row 1: 'id' is a required property"),
        (
            "results/tiny/unlearned/evaluation_results.jsonl",
            "{}\n",
            "evaluation_results.jsonl: .*'forget-set' is a required",
        ),
        (
            "results/tiny/unlearned/evaluation_results.jsonl",
            "{}\n{}\n",
            "evaluation_results.jsonl: not JSON: Extra data",
        ),
        ("data/split/small/train/forget/forget.jsonl", None, r"data/split/small: none of \*\*/\*.jsonl"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(inputs, file, text, message):
    (inputs / file).unlink()
    if text is not None:
        (inputs / file).write_text(text)
    with pytest.raises(BadInput, match=message):
        pack(inputs)
    assert not list(inputs.glob("*.zip"))
