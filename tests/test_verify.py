"""A zip is checked against itself and against the model: sound ones pass, each kind of change is named."""

import io
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from pipeline import fetch_model, package, score, unlearn, verify
from pipeline.lib import models
from pipeline.lib.provenance import sha256_of
from pipeline.lib.stage import BadInput
from pipeline.lib.submission import manifest_json
from tests.conftest import ROOT

ROWS = 2 * 12 * 3 + 2 * 10 + 2 * 8  # of both checkpoints: completions, membership, multiple choice
NUMBERS = 2 * (4 + 12 + 12 + 5)  # overall, values, terms; the aggregate, AUC, its score, the accuracy, the final
RUN = {
    "settings": {"beta": 3.0},
    "versions": {"torch": "2.0"},
    "hardware": "a machine",
    "threads": 3,
    "wall_seconds": 1.5,
}
# A submission in the judge's form, small enough to run a dozen times. It fails if the user's token or input reach it.
SUBMISSION = """import json, os, pathlib, shutil, sys
from safetensors.numpy import load_file, save_file
model, out, forget, retain = map(pathlib.Path, sys.argv[1:])
assert "CANARY" not in str(os.environ) and not sys.stdin.read()
assert os.environ["OMP_NUM_THREADS"] == "3"
shutil.copytree(model, out)
tensors = load_file(model / "model.safetensors")
tensors["second"] = tensors["second"] + len((forget / "forget.jsonl").read_text())
save_file(tensors, out / "model.safetensors")
(out / "run.json").write_text(json.dumps({"settings": {"beta": 3.0}}))
"""


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_rows(folder: Path, seed: int) -> None:
    """Write a checkpoint's rows, whose scores are all kinds of fractions, and their official result."""
    dice = random.Random(seed)
    completions = []
    for side in ("forget", "retain"):
        for task in ("Task1", "Task2", "Task3"):
            for n in range(6):
                words = [f"word{k}" for k in range(7 + n)]
                said = [word for word in words if dice.random() < 0.6] or words
                kind = "sc" if n < 3 else "qa"
                output = " ".join(said) if kind == "sc" else words[n % 5 and 1]
                completions.append(
                    {
                        "id": f"{side}{task}{n}{kind}1",
                        "task": task,
                        "split": side,
                        "input": f"a question, the {n}th:\nof {task}",
                        "expected_output": " ".join(words) if kind == "sc" else words[1],
                        "model_output": output,
                        "nll": None if n == 2 else dice.random(),
                    }
                )
    write(folder / "completions.jsonl", completions)
    losses = [{"id": f"m{n}", "set": "member" if n < 5 else "nonmember", "nll": dice.random() * 3} for n in range(10)]
    write(folder / "membership.jsonl", losses)
    questions = []
    for n in range(8):
        probs = [dice.random() / 4 for _ in range(4)]
        questions.append({"subject": "anatomy", "index": n, "answer": "ABCD"[n % 4], "probs": probs})
    write(folder / "mmlu.jsonl", questions)
    flags = [word for name in ("completions", "membership", "mmlu") for word in (f"--{name}", f"{folder}/{name}.jsonl")]
    score.main([*flags, "--output", str(folder / "evaluation_results.jsonl")])


@pytest.fixture(scope="module")
def zips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a zip is packed from, and the zips: texts.zip, bare.zip (without texts)."""
    folder = tmp_path_factory.mktemp("zips")
    make_rows(folder / "original_rows", 1)
    make_rows(folder / "unlearned", 2)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "olmo"}')
    first, second = numpy.arange(6, dtype=numpy.float32).reshape(2, 3), numpy.ones(4, dtype=numpy.float32)
    save_file({"first": first, "second": second}, folder / "model" / "model.safetensors")
    for side in ("forget", "retain"):
        write(folder / "data" / side / f"{side}.jsonl", [{"id": side}])
    (folder / "unlearn.py").write_text(SUBMISSION)
    paths = [str(folder / name) for name in ("model", "judged", "data/forget", "data/retain")]
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    command = [sys.executable, "unlearn.py", *paths]
    subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / "judged" / name, folder / "unlearned" / name)
    (folder / "unlearned" / "run.json").write_text(json.dumps(RUN))
    pack(folder, "texts")
    pack(folder, "bare", "--without-texts")
    return folder


def pack(folder: Path, name: str, *extra: str) -> None:
    paths = {"submission": "unlearn.py", "model": "model", "original": "original_rows", "unlearned": "unlearned"}
    paths |= {"data": "data", "output": f"{name}.zip", "cost": f"{name}.cost.json"}
    flags = [word for flag, path in paths.items() for word in (f"--{flag}", str(folder / path))]
    flags += ["--published", str(ROOT / "data" / "leaderboard.csv"), "--name", "tiny", "--size", "1B"]
    package.main([*flags, "--model-source", "some/model@abc", "--data-source", "some/data@def", *extra])


def check(path: Path, *flags: str) -> None:
    verify.main([str(path), "--published", str(ROOT / "data" / "leaderboard.csv"), *flags])


def content(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repack(path: Path, members: dict[str, bytes], rehash: bool) -> Path:
    """Write a zip; with `rehash` as a careful forger does, who mends every hash."""
    if rehash:
        manifest = json.loads(members["manifest.json"])
        others = {name: data for name, data in members.items() if name != "manifest.json"}
        manifest["members"] = {name: sha256_of(data) for name, data in sorted(others.items())}
        members = others | {"manifest.json": manifest_json(manifest).encode()}
    package.write_zip(path, members)
    return path


def refused(path: Path, *flags: str) -> str:
    with pytest.raises(BadInput) as caught:
        check(path, *flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- sound zips ----


@pytest.mark.parametrize("name", ["texts", "bare"])
def test_a_sound_zip_passes_and_the_summary_counts_what_was_checked(zips, name, capsys):
    check(zips / f"{name}.zip")
    assert capsys.readouterr().out.startswith(f"{zips}/{name}.zip: 15 files, {ROWS} rows, {NUMBERS} numbers: all")


def test_from_the_command_line_the_exit_code_tells(zips, tmp_path):
    members = content(zips / "texts.zip")
    broken = repack(tmp_path / "x.zip", members | {"README.md": members["README.md"] + b"."}, rehash=False)
    command = [sys.executable, "-m", "pipeline.verify"]
    runs = [
        subprocess.run([*command, str(path), *inputs(zips)], cwd=ROOT, capture_output=True, text=True, input="yes\n")
        for path in (zips / "texts.zip", broken)
    ]
    assert [done.returncode for done in runs] == [0, 2]
    assert runs[1].stdout == "" and runs[1].stderr.count("\n") == 1
    assert runs[1].stderr.startswith(f"error: {broken}: README.md was changed")


# ---- a changed digit, row or file ----


@pytest.mark.parametrize("name", ["texts", "bare"])
def test_a_changed_byte_of_any_member_is_named(zips, tmp_path, name):
    members = content(zips / f"{name}.zip")
    for number, (member, data) in enumerate(members.items()):
        digits = [match.start() for match in re.finditer(rb"\d", data)] or [0]  # the README's target has none
        place = digits[number % len(digits)]
        other = bytes([data[place] ^ 1])  # of a digit, another digit
        forged = repack(tmp_path / "x.zip", members | {member: data[:place] + other + data[place + 1 :]}, rehash=False)
        assert refused(forged).startswith(f"{forged}: {member}")
    assert number == 14


def test_every_digit_of_the_manifest_counts(zips, tmp_path):
    members = content(zips / "texts.zip")
    text = members["manifest.json"]
    places = [match.start() for match in re.finditer(rb"\d", text)]
    assert len(places) > 500
    for place in random.Random(0).sample(places, 60):
        changed = text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :]
        forged = repack(tmp_path / "x.zip", members | {"manifest.json": changed}, rehash=False)
        assert refused(forged).startswith(f"{forged}: manifest.json")


@pytest.mark.parametrize("prefix", ["", "original/"])
@pytest.mark.parametrize("name", ["texts", "bare"])
def test_every_number_of_a_result_follows_from_the_rows(zips, tmp_path, name, prefix):
    """Each number in turn gets another last digit, and all hashes are mended."""
    members = content(zips / f"{name}.zip")
    member = prefix + "evaluation_results.jsonl"
    text = members[member].decode()
    places = [match.end() - 1 for match in re.finditer(r"[-\d.e]*\d(?=[,\]}])", text)]
    assert len(places) == NUMBERS // 2
    named = set()
    for place in places:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        forged = repack(tmp_path / "x.zip", members | {member: changed.encode()}, rehash=True)
        message = refused(forged)
        assert message.startswith(f"{forged}: {member}: ")
        named.add(message.split(": ")[2].split(" is ")[0])
    # now and then the last of 17 digits has no weight: then the place in the file is named
    assert len({name for name in named if not name.startswith("byte ")}) >= 0.8 * len(places)
    assert len(named) == len(places)


@pytest.mark.parametrize("name", ["texts", "bare"])
def test_a_lost_row_of_any_table_is_named(zips, tmp_path, name):
    """A row that is lost on both sides, with all hashes mended, changes a number; on one side it has no partner."""
    members = content(zips / f"{name}.zip")
    tables = [member for member in members if member.endswith(".csv") or member.endswith("mmlu.jsonl")]
    assert len(tables) == 10
    for member in tables:
        kept = re.findall(rb'(?:[^\n"]|"[^"]*")*\n', members[member])  # a line feed in a quoted text ends no row
        assert b"".join(kept) == members[member]
        forged = repack(tmp_path / "x.zip", members | {member: b"".join(kept[:-1])}, rehash=True)
        assert re.search(r"its rows give|row \d+: \w+ of unlearned and original differ", refused(forged))
        head = kept[:1] if member.endswith(".csv") else []
        emptied = repack(tmp_path / "x.zip", members | {member: b"".join(head)}, rehash=True)
        assert refused(emptied) == f"{emptied}: {member}: no rows"


CHANGES = {
    "a better answer": ("forget_0.csv", b",word0,", b",word1,", "forget-set/overall-knowledge-score is"),
    "a member's loss": ("mia_results/member_0.csv", b"m1,", b"m1,9", "mia_loss_acc is"),
    "another task": ("forget_0.csv", b"sc1,Task1", b"sc1,Task2", "is .*, its rows give"),
    "an answer of mmlu": ("mmlu.jsonl", b'"answer": "A"', b'"answer": "B"', "mmlu_average is|answer of unlearned"),
    "a row twice": ("retain_0.csv", b"retainTask20sc1", b"retainTask21sc1", "row 8: same key"),
    "a question": ("retain_0.csv", b"the 4th:\nof Task3", b"the 5th:\nof Task3", "row 35: input of unlearned and"),
    "a loss that is text": ("forget_0.csv", b",word1,0.", b",word1,x0.", "forget_0.csv: row 4: nll: not JSON"),
    "a loss that is not finite": ("mia_results/member_0.csv", b"m1,", b"m1,-1e999\nm9,", "row 2: field 'nll': -inf"),
    "a loss that is nan": ("mia_results/member_0.csv", b"m1,", b"m1,NaN\nm9,", "row 2: nll: not JSON: NaN is"),
    "a field more": ("mia_results/member_0.csv", b"\nm1,", b"\nm1,,", "row 2: 3 fields, expected 2"),
    "a column's name": ("forget_0.csv", b"model_output", b"modeloutput", "line 1: the columns are"),
    "a key twice": ("evaluation_results.jsonl", b'{"forget', b'{"mmlu_average": 1, "forget', "a key twice"),
    "a number more": ("evaluation_results.jsonl", b'{"forget', b'{"rank": 1, "forget', "rank is no number of"),
    "true for one": (
        "evaluation_results.jsonl",
        b'"mmlu_average": ',
        b'"mmlu_average": true, "x": ',
        "mmlu_average: True is not",
    ),
    "true for another": (
        "evaluation_results.jsonl",
        b'"mia_loss_acc": ',
        b'"mia_loss_acc": true, "x": ',
        "acc is true",
    ),
    "not text": ("forget_0.csv", b"question", b"quest\xffion", "not csv: 'utf-8'"),
    "the place": ("README.md", b"would be ", b"would be 1", "README.md: line 13 is"),
    "a value": ("README.md", b"| unlearned | 0.", b"| unlearned | 1.", "README.md: line 9 is"),
    "a line more": ("README.md", b"manifest.json holds", b"\nmanifest.json holds", "README.md: line 28 is ''"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_with_all_hashes_mended_is_named(zips, tmp_path, change):
    member, before, after, message = CHANGES[change]
    members = content(zips / "texts.zip")
    assert before in members[member], members[member].decode()
    forged = repack(tmp_path / "x.zip", members | {member: members[member].replace(before, after, 1)}, rehash=True)
    assert re.search(message, refused(forged))


def test_a_changed_score_or_hash_of_a_zip_without_texts(zips, tmp_path):
    members = content(zips / "bare.zip")
    table = members["forget_scores.csv"]
    for before, after, message in (
        (b",1.0,", b",0.5,", "forget-set/.* is .*, its rows give"),
        (b",1.0,", b",1.5,", r"forget_scores.csv: row \d+: field 'score': 1.5 is greater"),
        (b"\n", b"0\n", "forget_scores.csv: line 1"),
    ):
        forged = repack(tmp_path / "x.zip", members | {"forget_scores.csv": table.replace(before, after, 1)}, True)
        assert re.search(message, refused(forged))
    short = repack(tmp_path / "x.zip", members | {"forget_scores.csv": table[:-9] + b"\n"}, rehash=True)
    assert "row 18: field 'texts_sha256'" in refused(short)


def test_a_cell_without_rows_is_named(zips, tmp_path):
    members = content(zips / "texts.zip")
    table = members["forget_0.csv"].replace(b"sc1,Task2", b"qa1,Task2")
    forged = repack(tmp_path / "x.zip", members | {"forget_0.csv": table}, rehash=True)
    assert refused(forged).endswith("evaluation_results.jsonl: no sc row of Task2 on the forget side")


# ---- the container ----


def test_a_missing_or_foreign_member_is_named(zips, tmp_path):
    members = content(zips / "texts.zip")
    for member in members:
        rest = {name: data for name, data in members.items() if name != member}
        missing = repack(tmp_path / "x.zip", rest, rehash=member != "manifest.json")
        assert refused(missing) == f"{missing}: {member} is missing"
    for member in ("weights.bin", "original/forget_1.csv", "forget_scores.csv"):
        foreign = repack(tmp_path / "x.zip", members | {member: b""}, rehash=True)
        assert refused(foreign) == f"{foreign}: {member} does not belong here"
    manifest = json.loads(members["manifest.json"])
    del manifest["members"]["forget_0.csv"]
    unlisted = repack(tmp_path / "x.zip", members | {"manifest.json": manifest_json(manifest).encode()}, rehash=False)
    assert "manifest.json: forget_0.csv is listed and not there, or" in refused(unlisted)


def with_entry(source: Path, path: Path, name: str, mode: int = 0o100644, **fields: object) -> Path:
    """Copy a zip and add an entry."""
    shutil.copy(source, path)
    entry = zipfile.ZipInfo("x" if "\\" in name else name, (1980, 1, 1, 0, 0, 0))
    entry.filename = name
    entry.create_system = 3
    entry.external_attr = mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    for field, value in fields.items():
        setattr(entry, field, value)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, b"/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../escape", "leaves the folder"),
        ("original/../../escape", "leaves the folder"),
        ("original\\..\\..\\escape", "leaves the folder"),
        ("/etc/escape", "has an absolute path"),
        ("\\\\host\\share\\escape", "has an absolute path"),
        ("C:escape", "has an absolute path"),
        ("folder/", "part of its header|does not belong here"),
        ("submission.py\0.txt", "is there twice|part of its header|does not belong here"),
    ],
)
def test_a_name_that_could_land_elsewhere_is_refused(zips, tmp_path, name, message):
    evil = with_entry(zips / "texts.zip", tmp_path / "x.zip", name)
    assert re.search(message, refused(evil))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_links_doubles_and_odd_entries_are_refused(zips, tmp_path):
    path = tmp_path / "x.zip"
    link = with_entry(zips / "texts.zip", path, "link", stat.S_IFLNK | 0o777)
    assert refused(link).endswith("member 'link' is a link")
    double = with_entry(zips / "texts.zip", path, "forget_0.csv")
    assert refused(double).endswith("member 'forget_0.csv' is there twice")
    device = with_entry(zips / "texts.zip", path, "device", stat.S_IFCHR | 0o644)
    assert "member 'device': date, mode or another part" in refused(device)
    for field, value in (("date_time", (2024, 1, 1, 0, 0, 0)), ("comment", b"x"), ("extra", b"\x99\x99\x00\x00")):
        odd = with_entry(zips / "texts.zip", path, "odd", **{field: value})
        assert "member 'odd': date, mode or another part" in refused(odd)


def test_bytes_that_belong_to_no_member_are_refused(zips, tmp_path):
    data = (zips / "texts.zip").read_bytes()
    path = tmp_path / "x.zip"
    for other in (b"#!/bin/sh\n" + data, data + b"more", data + data, data[:-22] + b"!" + data[-22:]):
        path.write_bytes(other)
        assert re.search("part of its header|belong to no member|not a readable zip", refused(path))
    shutil.copy(zips / "texts.zip", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a word"
    assert "belong to no member" in refused(path)


def test_bytes_hidden_behind_the_end_of_a_compressed_text_are_refused(zips, tmp_path):
    """Every reader of zips passes over them: the sizes are right, and the text ends before."""
    data = bytearray((zips / "texts.zip").read_bytes())
    with zipfile.ZipFile(zips / "texts.zip") as archive:
        last, start = archive.infolist()[-1], archive.start_dir
    record = data.rindex(b"PK\1\2")
    for place in (last.header_offset + 18, record + 20):  # the compressed size, in header and directory
        data[place : place + 4] = (last.compress_size + 6).to_bytes(4, "little")
    data[-6:-2] = (start + 6).to_bytes(4, "little")
    path = tmp_path / "x.zip"
    path.write_bytes(data[:start] + b"hidden" + data[start:])
    assert content(path) == content(zips / "texts.zip")
    assert refused(path).endswith("submission.py is damaged: bytes behind its end")


def test_a_zip_that_grows_when_unpacked_is_not_unpacked(zips, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "LARGEST", 10_000)
    assert re.search(r"\d+ bytes when unpacked, more than 10000", refused(zips / "texts.zip"))


def test_no_file_an_empty_one_and_another_kind(tmp_path):
    assert refused(tmp_path / "x.zip").endswith("x.zip: no such file")
    for data in (b"", b"PK", b"not a zip" * 100, b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.zip").write_bytes(data)
        assert re.search("not a readable zip|manifest.json is missing", refused(tmp_path / "x.zip"))


def test_any_flipped_bit_of_the_file_is_noticed(zips, tmp_path):
    """Of the raw zip, headers and directory included. (A compressed text can be spelled in more than one way.)"""
    data = (zips / "texts.zip").read_bytes()
    path = tmp_path / "x.zip"
    dice = random.Random(0)
    directory = data.index(b"PK\x01\x02")
    places = [*dice.sample(range(len(data)), 150), *dice.sample(range(directory, len(data)), 250)]
    spared = 0
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :])
        try:
            check(path)
        except BadInput:
            continue
        assert place < directory and content(path) == content(zips / "texts.zip")
        spared += 1
    assert spared < 5
    for length in dice.sample(range(len(data)), 40):
        path.write_bytes(data[:length])
        with pytest.raises(BadInput):
            check(path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"members": 1}', b"[" * 100_000, b"\xff", b'{"a": NaN}', b'{"a": 1, "a": 2}']
)
def test_a_manifest_that_is_none_is_refused(zips, tmp_path, text):
    members = content(zips / "texts.zip") | {"manifest.json": text}
    assert "x.zip: manifest.json: " in refused(repack(tmp_path / "x.zip", members, rehash=False))


# ---- the submission, run again ----


def inputs(folder: Path) -> list[str]:
    paths = {"model": "model", "forget": "data/forget", "retain": "data/retain"}
    return [word for flag, path in paths.items() for word in (f"--{flag}", str(folder / path))]


def test_the_submission_run_again_gives_the_recorded_tensors(zips, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY")
    before = sorted(zips.rglob("*"))
    check(zips / "texts.zip", *inputs(zips))
    captured = capfd.readouterr()
    assert "submission.py run again on 4 files: 1 changed tensors, all as recorded" in captured.out
    assert "CANARY" not in captured.out + captured.err
    assert sorted(zips.rglob("*")) == before  # the checkpoint went to the temporary folder, and is gone


def forged_manifest(zips: Path, path: Path, change) -> Path:
    members = content(zips / "texts.zip")
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    return repack(path, members | {"manifest.json": manifest_json(manifest).encode()}, rehash=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["model"]["changed"]["second"].update(sha256="0" * 64), "tensor second is another.*torch 2.0 then"),
        (
            lambda m: (
                m["model"]["changed"]["second"].update(sha256="0" * 64),
                m["unlearning"].update(hardware="a card"),
            ),
            "tensor second is another.*hardware a card then, ",
        ),
        (lambda m: m["model"]["changed"].update(first=m["model"]["changed"]["second"]), "tensor first is another"),
        (lambda m: m["model"]["unlearned"].update({"config.json": "0" * 64}), "config.json of the checkpoint is"),
        (lambda m: m["unlearning"]["settings"].update(beta=2.0), "unlearning/settings are not .*{'beta': 3.0}"),
        (lambda m: m["model"]["original"].update({"config.json": "0" * 64}), "model/config.json: not the file"),
        (lambda m: m["model"]["original"].update({"more.safetensors": "0" * 64}), "more.safetensors: not the file"),
        (lambda m: m["data"]["files"]["data"].pop("retain/retain.jsonl"), "retain/retain.jsonl: not a file that"),
    ],
)
def test_what_a_second_run_gives_otherwise_is_named(zips, tmp_path, change, message):
    """The manifest's own hash is mended: only the run can tell."""
    forged = forged_manifest(zips, tmp_path / "x.zip", change)
    check(forged)
    assert re.search(message, refused(forged, *inputs(zips)))


def test_another_submission_or_one_that_fails_is_named(zips, tmp_path):
    members = content(zips / "texts.zip")
    for text, message in (
        (SUBMISSION.replace("+ len(", "+ 1 + len("), "tensor second is another"),
        ("raise SystemExit(3)", "submission.py: ended with exit code 3"),
    ):
        forged = repack(tmp_path / "x.zip", members | {"submission.py": text.encode()}, rehash=True)
        assert re.search(message, refused(forged, *inputs(zips)))


def test_another_model_is_refused_before_anything_runs(zips, tmp_path):
    shutil.copytree(zips / "model", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["first"][0, 0] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    flags = inputs(zips)
    flags[1] = str(tmp_path / "model")
    assert "model.safetensors: not the file that the zip was made from" in refused(zips / "texts.zip", *flags)
    with pytest.raises(SystemExit):
        check(zips / "texts.zip", "--model", str(tmp_path / "model"))


@pytest.mark.slow
def test_our_own_submission_run_again_gives_its_tensors(zips, checkpoint, data, tmp_path):
    folder = tmp_path / "real"
    shutil.copytree(zips / "original_rows", folder / "original_rows")
    shutil.copytree(zips / "original_rows", folder / "unlearned")
    shutil.copytree(checkpoint, folder / "model")
    shutil.copytree(data, folder / "data")
    shutil.copy(ROOT / "pipeline" / "unlearn.py", folder / "unlearn.py")
    paths = [str(folder / name) for name in ("model", "unlearned", "data/forget", "data/retain")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "unlearn.py", *paths]
    subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=True)
    pack(folder, "texts")
    check(folder / "texts.zip", *inputs(folder))


# ---- strangers: code in the place of weights ----


class Payload:
    """A pickle that creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def hostile(zips: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model folder of code, in each of the forms that a loader might run; and the file that the code would create."""
    folder, trace = tmp_path / "hostile", tmp_path / "it ran"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    code = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": code}))
    tokenizer = {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["stranger.Stranger", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "stranger.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'stranger'\nModel = Stranger = Config\n"
    )
    return folder, trace


def with_weights(folder: Path) -> Path:
    save_file({"one": numpy.ones(1, dtype=numpy.float32)}, folder / "model.safetensors")
    return folder


def readers(zips: Path, folder: Path, output: Path) -> dict:
    """All that reads a model folder."""
    shutil.copytree(zips / "unlearned", output / "unlearned")
    packed = {"submission": zips / "unlearn.py", "model": folder, "original": zips / "original_rows"}
    packed |= {"unlearned": zips / "unlearned", "data": zips / "data", "output": output / "x.zip", "cost": output / "c"}
    flags = [word for flag, path in packed.items() for word in (f"--{flag}", str(path))]
    flags += ["--published", str(ROOT / "data" / "leaderboard.csv"), "--name", "x", "--size", "1B"]
    judged = [str(folder), str(output / "judged"), str(zips / "data" / "forget"), str(zips / "data" / "retain")]
    return {
        "package": lambda: package.main([*flags, "--model-source", "m", "--data-source", "d"]),
        "verify": lambda: check(zips / "texts.zip", "--model", str(folder), *inputs(zips)[2:]),
        "load_model": lambda: models.load_model(folder),
        "load_tokenizer": lambda: models.load_tokenizer(folder),
        "fetch_model": lambda: fetch_model.main(["--local", str(folder), "--output", str(output / "fetched")]),
        "unlearn": lambda: unlearn.main(judged),
    }


READERS = ("package", "verify", "load_model", "load_tokenizer", "fetch_model", "unlearn")


@pytest.mark.parametrize("weights", [False, True], ids=["pickles alone", "safetensors beside them"])
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_model_folder_is_never_run(zips, hostile, tmp_path, monkeypatch, reader, weights):
    """Whoever sits at the terminal answers yes to every question."""
    folder, trace = hostile
    if weights:
        with_weights(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "output").mkdir()
    call = readers(zips, folder, tmp_path / "output")[reader]
    try:
        call()
        assert reader == "fetch_model" and weights  # which copies the plain files only
        assert not any(path.suffix in {".py", ".bin", ".pt"} for path in (tmp_path / "output/fetched").iterdir())
    except (BadInput, unlearn.BadInput) as error:
        assert "\n" not in str(error)
    assert not trace.exists()
    assert not list((tmp_path / "output").glob("*.zip")) and not (tmp_path / "output/judged").exists()


def test_the_code_would_run_if_it_were_let(hostile, tmp_path, monkeypatch):
    """Or the test above would show nothing."""
    folder, trace = hostile
    with pytest.raises(RuntimeError, match="corrupt file"):  # having run it
        torch.load(folder / "model.pt", weights_only=False)
    assert trace.exists()
    trace.unlink()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert trace.exists()
