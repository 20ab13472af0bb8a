"""Check a zip: that every number in it follows from its rows, and every file is the one that was packed.

Reads   ZIP            submissions/<target>.zip, with or without texts
        --published    the published rows, for the README in the zip
        --model, --forget, --retain   the original checkpoint and the judge's two folders: with these three the zipped
                       submission.py is run again, and its tensors are compared with those in the manifest  [optional]
Writes  nothing but a summary: how many numbers, rows and files were checked. (Running the submission again needs room
        for a checkpoint in the temporary folder, TMPDIR, and as long as unlearning took.)
Run     python -m pipeline.verify submissions/tiny.zip
        python -m pipeline.verify submissions/tiny.zip --model models/tiny/original \\
            --forget data/split/synthetic/train/forget --retain data/split/synthetic/train/retain

The first thing that is wrong is named in one line, with exit code 2. The numbers are put together anew from the
measures in lib.metrics, not by calling score: a fault in the one shows against the other. Nothing is extracted under a
name from the zip, and nothing in it is executed, unless --model asks for it: **that runs submission.py as you**, so
read the file of a stranger first.

What this cannot see: rows, results and hashes that were all changed together. Running the submission again ties the
tensors to the model and data; that the rows were measured on them shows only when they are measured again.
"""

import argparse
import csv
import io
import itertools
import json
import os
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from statistics import fmean
from typing import Any

from jsonschema import Draft202012Validator

from pipeline.lib.metrics import Cell, auc, harmonic_mean, mia_score, row_value, task_values, terms
from pipeline.lib.provenance import MODEL_FILES, changed_tensors, identity, sha256_of, versions
from pipeline.lib.published import RESULTS, parts, read_published, would_be
from pipeline.lib.records import (
    CHOICES,
    COMPLETION,
    KINDS,
    MEMBERSHIP,
    MMLU,
    SETS,
    SIDES,
    TASKS,
    Row,
    check,
    kind_of,
    parse_json,
)
from pipeline.lib.stage import BadInput, run
from pipeline.lib.submission import (
    DATE,
    MANIFEST,
    MEMBERSHIP_COLUMNS,
    MODE,
    ORIGINAL,
    SCORE,
    SCORE_COLUMNS,
    TEXT_COLUMNS,
    UNIX,
    manifest_json,
    member_names,
    readme,
    table_name,
)

KIND_NAMES = {"sc": "regurgitation", "qa": "knowledge"}  # as the official keys call them
NUMBERS = ("score", "nll")  # columns that are not text
LARGEST = 1 << 30  # bytes, of all members together: a zip of rows is far smaller
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # kept from the zipped code
VERSION = 20  # of the zip format: deflate

Members = dict[str, bytes]  # name in the zip -> content


@dataclass(frozen=True)
class Rows:
    """The rows that one checkpoint's result is computed from."""

    completions: list[Row]  # with "score", with or without texts
    membership: list[Row]
    mmlu: list[Row]


# ---- the container ----


def read_zip(path: Path) -> Members:
    """Return the content of every member, after all that its entries say has been checked. Nothing is extracted."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            check_entries(path, archive.infolist())
            check_layout(path, archive)
            return {entry.filename: archive.read(entry) for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadInput(f"{path}: not a readable zip: {error}") from None


def check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Raise `BadInput` at a member that is there twice, could land outside a folder, or is more than a plain file."""
    seen = set()
    for entry in entries:
        fault = "is there twice" if entry.orig_filename in seen else _fault(entry)
        if fault:
            raise BadInput(f"{path}: member {entry.orig_filename!r} {fault}")
        seen.add(entry.orig_filename)
    size = sum(max(entry.file_size, entry.compress_size) for entry in entries)
    if size > LARGEST:
        raise BadInput(f"{path}: {size} bytes when unpacked, more than {LARGEST}")


def _fault(entry: zipfile.ZipInfo) -> str | None:
    """Return what is wrong with a member, in words."""
    name = entry.orig_filename  # `filename` ends at a zero byte
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        return "has an absolute path"
    if ".." in PureWindowsPath(name).parts:  # which splits at both kinds of slash
        return "leaves the folder"
    return None


def check_layout(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise `BadInput` unless headers and directory are, byte for byte, those that package writes for such members.

    So nothing lies before, between or behind the members, and no reader sees another name or size than this one does.
    """
    content = path.read_bytes()
    place, listed = 0, archive.start_dir
    for entry in archive.infolist():
        header, record = _headers(entry, place)
        if content[place : place + len(header)] != header or content[listed : listed + len(record)] != record:
            raise BadInput(
                f"{path}: member {entry.filename!r}: date, mode or another part of its header is not as packed"
            )
        begin, place = place + len(header), place + len(header) + entry.compress_size
        listed += len(record)
        fault = _damage(entry, content[begin:place])
        if fault:
            raise BadInput(f"{path}: {entry.filename} is damaged: {fault}")
    count, size = len(archive.infolist()), listed - archive.start_dir
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, archive.start_dir, 0)
    if place != archive.start_dir or content[listed:] != end:
        raise BadInput(f"{path}: {len(content)} bytes, of which some belong to no member")


def _damage(entry: zipfile.ZipInfo, compressed: bytes) -> str | None:
    """Return what is wrong with a member's compressed content, in words."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(compressed, entry.file_size + 1)
    except zlib.error as error:
        return str(error)
    if len(content) != entry.file_size or zlib.crc32(content) != entry.CRC:
        return "not of its size and checksum"
    return "bytes behind its end" if stream.unused_data or not stream.eof else None


def _headers(entry: zipfile.ZipInfo, place: int) -> tuple[bytes, bytes]:
    """Return a member's header at byte `place` and its record in the directory (PKWARE's APPNOTE, 4.3.7 and 4.3.12)."""
    name = entry.filename.encode()
    year, month, day = DATE[:3]
    date = (year - 1980) << 9 | month << 5 | day
    kind = (VERSION, 0, zipfile.ZIP_DEFLATED, 0, date)  # no flags, midnight
    sizes = (entry.CRC, entry.compress_size, entry.file_size, len(name), 0)
    shared = struct.pack("<5H3L2H", *kind, *sizes)
    record = bytes([VERSION, UNIX]) + shared + struct.pack("<3H2L", 0, 0, 0, MODE << 16, place)
    return b"PK\3\4" + shared + name, b"PK\1\2" + record + name


# ---- the files ----


def obey(schema: Draft202012Validator, place: str, value: Any) -> None:
    """Raise `BadInput` at the first place where a value breaks a schema."""
    for problem in schema.iter_errors(value):
        raise BadInput(f"{place}: {problem.json_path}: {problem.message.splitlines()[0][:200]}")


def read_manifest(path: Path, members: Members) -> dict[str, Any]:
    """Return the manifest, after checking it against itself."""
    place = f"{path}: manifest.json"
    if "manifest.json" not in members:
        raise BadInput(f"{place} is missing")
    manifest: dict[str, Any] = parse_json(place, members["manifest.json"])
    obey(MANIFEST, place, manifest)
    if manifest_json(manifest).encode() != members["manifest.json"]:
        raise BadInput(f"{place}: was changed: its sha256 of itself is not that of its text")
    return manifest


def check_files(path: Path, members: Members, manifest: dict[str, Any]) -> None:
    """Raise `BadInput` unless the members are those that belong into a zip, each with the bytes that were packed."""
    expected = member_names(manifest["texts"])
    for name in sorted(expected - members.keys()):
        raise BadInput(f"{path}: {name} is missing")
    for name in sorted(members.keys() - expected):
        raise BadInput(f"{path}: {name} does not belong here")
    recorded = manifest["members"]
    for name in sorted((expected - {"manifest.json"}) ^ recorded.keys()):
        raise BadInput(f"{path}: manifest.json: {name} is listed and not there, or there and not listed")
    for name, digest in recorded.items():
        if sha256_of(members[name]) != digest:
            raise BadInput(f"{path}: {name} was changed: its sha256 is {sha256_of(members[name])}, packed was {digest}")


# ---- the rows ----


def read_csv(place: str, content: bytes, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a csv file as package writes it; an empty number is None."""
    try:
        table = list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInput(f"{place}: not csv: {error}") from None
    if not table or tuple(table[0]) != tuple(columns):
        raise BadInput(f"{place}: line 1: the columns are {table[:1]}, expected {', '.join(columns)}")
    for number, values in enumerate(table[1:], start=1):
        if len(values) != len(columns):
            raise BadInput(f"{place}: row {number}: {len(values)} fields, expected {len(columns)}")
    return [
        {
            name: _number(f"{place}: row {number}: {name}", value) if name in NUMBERS else value
            for name, value in zip(columns, values, strict=True)
        }
        for number, values in enumerate(table[1:], start=1)
    ]


def _number(place: str, text: str) -> Any:
    return parse_json(place, text.encode()) if text else None


def read_rows(path: Path, members: Members, prefix: str, texts: bool) -> Rows:
    """Return all rows of the checkpoint whose members start with `prefix`, each checked."""
    completions: list[Row] = []
    for side in SIDES:
        name = prefix + table_name(side, texts)
        rows = read_csv(f"{path}: {name}", members[name], TEXT_COLUMNS if texts else SCORE_COLUMNS)
        rows = [row | {"split": side} for row in rows]
        check(rows, COMPLETION if texts else SCORE, Path(f"{path}: {name}"))
        completions += [row | {"score": row_value(row)} for row in rows] if texts else rows
    membership: list[Row] = []
    for group in SETS:
        name = f"{prefix}mia_results/{group}_0.csv"
        rows = [row | {"set": group} for row in read_csv(f"{path}: {name}", members[name], MEMBERSHIP_COLUMNS)]
        check(rows, MEMBERSHIP, Path(f"{path}: {name}"))
        membership += rows
    name = prefix + "mmlu.jsonl"
    lines = [line for line in members[name].split(b"\n") if line.strip()]
    mmlu = [parse_json(f"{path}: {name}: line {number}", line) for number, line in enumerate(lines, start=1)]
    check(mmlu, MMLU, Path(f"{path}: {name}"))
    return Rows(completions, membership, mmlu)


def check_same_questions(path: Path, rows: Rows, control: Rows) -> None:
    """Raise `BadInput` at the first row in which the two checkpoints were not asked the same."""
    asked = ("id", "task", "split", "input", "expected_output")
    tables = (
        ("completion", rows.completions, control.completions, asked),
        ("membership", rows.membership, control.membership, ("id", "set")),
        ("mmlu", rows.mmlu, control.mmlu, ("subject", "index", "answer")),
    )
    nothing: Row = {}
    for what, ours, originals, fields in tables:
        for number, (row, other) in enumerate(itertools.zip_longest(ours, originals, fillvalue=nothing), start=1):
            for field in fields:
                if row.get(field) != other.get(field):
                    values = f"{row.get(field)!r} and {other.get(field)!r}"
                    raise BadInput(f"{path}: {what} row {number}: {field} of unlearned and original differ: {values}")


# ---- the numbers ----


def check_numbers(path: Path, members: Members, prefix: str, rows: Rows) -> int:
    """Raise `BadInput` unless a checkpoint's result is what its rows give, digit by digit. Return how many numbers."""
    name = prefix + "evaluation_results.jsonl"
    place = f"{path}: {name}"
    results = parse_json(place, members[name])
    obey(RESULTS, place, results)
    expected = recomputed(place, rows)
    compare(place, dict(flat(results)), expected)
    text = json.dumps(results).encode() + b"\n"
    if text != members[name]:  # the last digit of many can differ and the number be the same
        pairs = itertools.zip_longest(text, members[name])
        at = next(at for at, (ours, theirs) in enumerate(pairs) if ours != theirs)
        raise BadInput(f"{place}: byte {at} is not as the numbers are written")
    return len(expected)


def recomputed(place: str, rows: Rows) -> dict[str, float]:
    """Return every number of an official result, by its path of keys, from the rows."""
    cells = _cells(place, rows.completions)
    values = task_values(cells)
    numbers: dict[str, float] = {}
    for side, (kind, title) in itertools.product(SIDES, KIND_NAMES.items()):
        scores = [score for task in TASKS for score in cells[side, task, kind]]
        numbers[f"{side}-set/overall-{title}-score"] = fmean(scores)
        for task in TASKS:
            numbers[f"{side}-set/{task}/{title}-score"] = values[side][task][kind]
    numbers |= {f"aggregated-terms/{index}": term for index, term in enumerate(terms(values))}
    numbers["harmonic-mean-task-aggregate"] = harmonic_mean(terms(values))
    numbers["mia_loss_acc"] = _auc(place, rows.membership)
    numbers["mia_final_score"] = mia_score(numbers["mia_loss_acc"])
    chosen = [CHOICES[row["probs"].index(max(row["probs"]))] for row in rows.mmlu]
    numbers["mmlu_average"] = fmean(choice == row["answer"] for choice, row in zip(chosen, rows.mmlu, strict=True))
    thirds = ("harmonic-mean-task-aggregate", "mia_final_score", "mmlu_average")
    numbers["aggregate-score"] = fmean(numbers[name] for name in thirds)
    return numbers


def _cells(place: str, completions: list[Row]) -> dict[Cell, list[float]]:
    cells: dict[Cell, list[float]] = {cell: [] for cell in itertools.product(SIDES, TASKS, KINDS)}
    for row in completions:
        cells[row["split"], row["task"], kind_of(row["id"])].append(row["score"])
    for (side, task, kind), scores in cells.items():
        if not scores:
            raise BadInput(f"{place}: no {kind} row of {task} on the {side} side")
    return cells


def _auc(place: str, membership: list[Row]) -> float:
    member, nonmember = ([row["nll"] for row in membership if row["set"] == name] for name in SETS)
    try:
        return auc(member, nonmember)
    except ValueError as error:
        raise BadInput(f"{place}: no AUC from its losses: {error}") from None


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is neither object nor list in a JSON value, with its path of keys."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def compare(place: str, found: dict[str, Any], expected: dict[str, float]) -> None:
    """Raise `BadInput` unless both hold the same numbers, exactly."""
    for name, number in expected.items():
        if found.get(name) != number:
            raise BadInput(f"{place}: {name} is {json.dumps(found.get(name))}, its rows give {json.dumps(number)}")
    for name in found.keys() - expected.keys():
        raise BadInput(f"{place}: {name} is no number of an official result")


def check_readme(path: Path, members: Members, manifest: dict[str, Any], published: Path) -> None:
    """Raise `BadInput` at the first line of the zip's README that does not follow from its results."""
    results, control = (
        parse_json(name, members[name]) for name in ("evaluation_results.jsonl", ORIGINAL + "evaluation_results.jsonl")
    )
    size = manifest["published_size"]
    where = would_be(parts(results), size, manifest["stand_in"], read_published(published, size))
    lines = readme(manifest, results, control, where).split("\n")
    pairs = itertools.zip_longest(members["README.md"].decode(errors="replace").split("\n"), lines)
    for number, (line, expected) in enumerate(pairs, start=1):
        if line != expected:
            raise BadInput(f"{path}: README.md: line {number} is {line!r}, its results give {expected!r}")


# ---- the submission, once more ----


def check_inputs(model: Path, sides: Sequence[Path], manifest: dict[str, Any]) -> int:
    """Raise `BadInput` unless the model and the rows are those of the manifest. Return how many files there are."""
    found, recorded = identity(model, MODEL_FILES), manifest["model"]["original"]
    for name in sorted(found.keys() | recorded.keys()):
        if found.get(name) != recorded.get(name):
            raise BadInput(f"{model}/{name}: not the file that the zip was made from: sha256 {found.get(name)}")
    known = {digest for files in manifest["data"]["files"].values() for digest in files.values()}
    count = len(found)
    for folder in sides:
        for name, digest in identity(folder, ("*.jsonl", "*.parquet")).items():
            if digest not in known:
                raise BadInput(f"{folder}/{name}: not a file that the zip was made from: sha256 {digest}")
            count += 1
    return count


def run_again(path: Path, submission: bytes, model: Path, sides: Sequence[Path], manifest: dict[str, Any]) -> int:
    """Run the zipped submission as the judge does and compare what it writes. Return the number of tensors compared."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "submission.py").write_bytes(submission)
        judged = [model.resolve(), folder / "judged", *(side.resolve() for side in sides)]
        environment = {key: value for key, value in os.environ.items() if key not in SECRETS}
        environment |= {"HF_HOME": name, "HF_HUB_OFFLINE": "1"}  # no token that lies on the disk, no network
        environment["OMP_NUM_THREADS"] = str(manifest["unlearning"]["threads"])  # another number changes last digits
        command = [sys.executable, "-I", "submission.py", *map(str, judged)]
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise BadInput(f"{path}: submission.py: ended with exit code {done.returncode} when it was run again")
        return compare_checkpoint(path, model, folder / "judged", manifest)


def compare_checkpoint(path: Path, model: Path, judged: Path, manifest: dict[str, Any]) -> int:
    """Raise `BadInput` unless a checkpoint has the manifest's settings, tensors and files. Return how many changed."""
    if not (judged / "run.json").is_file():
        raise BadInput(f"{path}: submission.py: wrote no run.json when it was run again")
    ran = parse_json(f"{path}: run.json", (judged / "run.json").read_bytes())
    settings = ran.get("settings") if isinstance(ran, dict) else ran
    if settings != manifest["unlearning"]["settings"]:
        raise BadInput(f"{path}: manifest.json: unlearning/settings are not those that submission.py runs: {settings}")
    found, recorded = changed_tensors(model, judged), manifest["model"]["changed"]
    for name in sorted(found.keys() | recorded.keys()):
        if found.get(name) != recorded.get(name):
            why = _elsewhere(manifest, ran)
            raise BadInput(f"{path}: tensor {name} is another when submission.py is run again{why}")
    files = identity(judged, MODEL_FILES)
    for name in sorted(files.keys() | manifest["model"]["unlearned"].keys()):
        if files.get(name) != manifest["model"]["unlearned"].get(name):
            raise BadInput(f"{path}: {name} of the checkpoint is another when submission.py is run again")
    return len(found)


def _elsewhere(manifest: dict[str, Any], ran: dict[str, Any]) -> str:
    """Return in words what is not as in the first run, versions or hardware: it may be why the last digits differ."""
    then = {**manifest["unlearning"]["versions"], "hardware": manifest["unlearning"]["hardware"]}
    now = {**versions(), "hardware": ran.get("hardware")}
    other = [f"{name} {then[name]} then, {now.get(name)} now" for name in sorted(then) if then[name] != now.get(name)]
    return f" ({'; '.join(other)})" if other else ""


# ---- the command line ----


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zip", type=Path, metavar="ZIP", help="the zip to check")
    parser.add_argument("--published", type=Path, default=Path("data/leaderboard.csv"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, help="original checkpoint: run the zipped submission.py on it")
    parser.add_argument("--forget", type=Path, help="folder with forget.jsonl or forget.parquet, for --model")
    parser.add_argument("--retain", type=Path, help="folder with retain.jsonl or retain.parquet, for --model")
    args = parser.parse_args(argv)
    if len({value is None for value in (args.model, args.forget, args.retain)}) > 1:
        parser.error("--model, --forget and --retain go together")
    return args


def main(argv: Sequence[str]) -> None:
    """Run the checks."""
    args = _arguments(argv)
    members = read_zip(args.zip)
    manifest = read_manifest(args.zip, members)
    check_files(args.zip, members, manifest)
    tables = {prefix: read_rows(args.zip, members, prefix, manifest["texts"]) for prefix in ("", ORIGINAL)}
    numbers = sum(check_numbers(args.zip, members, prefix, rows) for prefix, rows in tables.items())
    check_same_questions(args.zip, tables[""], tables[ORIGINAL])
    check_readme(args.zip, members, manifest, args.published)
    count = sum(len(rows.completions) + len(rows.membership) + len(rows.mmlu) for rows in tables.values())
    print(f"{args.zip}: {len(members)} files, {count} rows, {numbers} numbers: all as packed, all follow from the rows")
    if args.model:
        sides = (args.forget, args.retain)
        files = check_inputs(args.model, sides, manifest)
        tensors = run_again(args.zip, members["submission.py"], args.model, sides, manifest)
        print(f"{args.zip}: submission.py run again on {files} files: {tensors} changed tensors, all as recorded")


if __name__ == "__main__":
    run(main)
