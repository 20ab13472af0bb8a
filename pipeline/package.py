"""Pack a submission: the file that ran, what it did, and everything its score can be recomputed from.

Reads   --submission   pipeline/unlearn.py
        --model        the original checkpoint; only hashed
        --original     folder with the rows of the original: completions.jsonl, membership.jsonl, mmlu.jsonl and
                       evaluation_results.jsonl (fields in complete, membership, mmlu and score)
        --unlearned    the same four of the unlearned checkpoint, beside the checkpoint itself and its run.json:
                       settings, versions (objects), hardware (text), and what was measured on the way
        --data         folders whose .jsonl, .parquet and .csv files are hashed
        --published    the published rows, for the README in the zip
Writes  --output       a zip. Of each checkpoint, the original's under original/: evaluation_results.jsonl,
                       {forget,retain}_0.csv (id, task, input, expected_output, model_output, nll),
                       mia_results/{member,nonmember}_0.csv (id, nll), mmlu.jsonl. Once: submission.py (the submission,
                       byte for byte), manifest.json (sha256 of every other member, identity of models and data, run),
                       README.md. No weights, no absolute path, no token: such a text stops the packing.
                       --without-texts: in place of {forget,retain}_0.csv, {forget,retain}_scores.csv (id, task, score
                       0 to 1, nll, texts_sha256: one hash over the row's three texts).
        --cost         what the run was measured to cost: the rest of run.json (wall_seconds, peak_memory_bytes), the
                       hardware, and the sha256 of the zip that it belongs to
Run     python -m pipeline.package --submission pipeline/unlearn.py --model models/tiny/original \\
            --original results/tiny/original --unlearned results/tiny/unlearned --data data/split/synthetic \\
            --name tiny --size 1B --stand-in --model-source "made by pipeline.memorise" \\
            --data-source "synthetic, seed 0" --output submissions/tiny.zip --cost submissions/tiny.cost.json

The same inputs give the same bytes: no date, no user, no setting of the machine enters. Wall time and peak memory
differ from run to run, so they lie beside the zip, not in it. Traps of the csv form: pandas reads an empty text, "NA"
or "None" as missing unless told `keep_default_na=False`, and an absent nll is an empty field.
"""

import argparse
import csv
import io
import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from jsonschema import Draft202012Validator

from pipeline.lib.metrics import row_value
from pipeline.lib.provenance import MODEL_FILES, changed_tensors, identity, sha256, sha256_of, versions
from pipeline.lib.published import SIZES, parts, read_published, read_results, would_be
from pipeline.lib.records import COMPLETION, MEMBERSHIP, MMLU, SETS, SIDES, Row, read_checked, read_json
from pipeline.lib.stage import BadInput, run, whole_file
from pipeline.lib.submission import (
    DATE,
    MEMBERSHIP_COLUMNS,
    MODE,
    ORIGINAL,
    SCORE_COLUMNS,
    TEXT_COLUMNS,
    UNIX,
    manifest_json,
    readme,
    table_name,
    texts_sha256,
)

DATA_FILES = ("**/*.jsonl", "**/*.parquet", "**/*.csv")
FIXED = ("settings", "versions", "hardware", "threads")  # of run.json: the same in every run; the rest was measured
RUN = Draft202012Validator(
    {
        "type": "object",
        "required": list(FIXED),
        "properties": {
            "settings": {"type": "object"},
            "versions": {"type": "object"},
            "hardware": {"type": "string"},
            "threads": {"type": "integer", "minimum": 1},
        },
    }
)

Members = dict[str, bytes]  # name in the zip -> content


def csv_table(place: Path, columns: Sequence[str], rows: Iterable[Row]) -> bytes:
    """Return the rows, read from `place`, as csv in the form that pandas writes, None as an empty field.

    Trap: with a bare line feed as line end, the csv module leaves a carriage return unquoted, and a reader breaks the
    row there (the official files have that fault). So it is given both, which makes it quote either.
    """
    lines = []
    for values in [columns, *([row[name] for name in columns] for row in rows)]:
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\r\n").writerow(values)
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    try:
        return "".join(lines).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise BadInput(f"{place}: {error.object[error.start]!r} is no character") from None


def checkpoint_members(folder: Path, prefix: str, texts: bool) -> Members:
    """Return what the zip holds of one checkpoint, from the four row files of its folder. Rows keep their order."""
    completions = read_checked(folder / "completions.jsonl", COMPLETION)
    membership = read_checked(folder / "membership.jsonl", MEMBERSHIP)
    read_checked(folder / "mmlu.jsonl", MMLU)  # packed as it is, but not unread
    members = {name: (folder / name).read_bytes() for name in ("evaluation_results.jsonl", "mmlu.jsonl")}
    columns = TEXT_COLUMNS if texts else SCORE_COLUMNS
    for side in SIDES:
        rows = [row if texts else without_texts(row) for row in completions if row["split"] == side]
        members[table_name(side, texts)] = csv_table(folder / "completions.jsonl", columns, rows)
    for name in SETS:
        rows = [row for row in membership if row["set"] == name]
        members[f"mia_results/{name}_0.csv"] = csv_table(folder / "membership.jsonl", MEMBERSHIP_COLUMNS, rows)
    return {prefix + name: content for name, content in members.items()}


def without_texts(row: Row) -> Row:
    """Return a completion row with its score and one hash in the place of its texts."""
    kept = {name: row[name] for name in ("id", "task", "nll")}
    return kept | {"score": row_value(row), "texts_sha256": texts_sha256(row)}


def refuse_leaks(members: Members, paths: Iterable[Path]) -> None:
    """Raise `BadInput` if a member holds one of the paths in full, the current or home folder, or the hub's token."""
    folders = sorted({str(path.resolve()) for path in (*paths, Path.cwd(), Path.home())} - {"/"})
    secrets = [(_path_pattern(folder), f"the path {folder}") for folder in folders]
    token = get_token()
    if token:
        secrets.append((re.compile(re.escape(token)), "the hub token"))
    for name, content in members.items():
        text = content.decode(errors="replace")
        for pattern, what in secrets:
            found = pattern.search(text)
            if found:
                line = text.count("\n", 0, found.start()) + 1
                raise BadInput(f"{name}: line {line}: {what} must not be packed")


def _path_pattern(folder: str) -> re.Pattern[str]:
    """Match a path as itself or the start of a longer one. "/root", of one part, may stand in any text by chance."""
    end = "/" if folder.count("/") == 1 else r"(?![\w-])"
    return re.compile(rf"(?<![\w.]){re.escape(folder)}{end}")


def write_zip(path: Path, members: Members) -> None:
    """Write the members, sorted by name, so that the bytes of the zip depend on names and contents only."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(members):
            entry = zipfile.ZipInfo(name, DATE)
            entry.create_system = UNIX
            entry.external_attr = MODE << 16
            archive.writestr(entry, members[name], zipfile.ZIP_DEFLATED, compresslevel=9)


def write_cost(path: Path, archive: Path, ran: dict[str, Any]) -> None:
    """Write what run.json has measured, and of which zip."""
    cost = {"zip": archive.name, "sha256": sha256(archive), "hardware": ran["hardware"]}
    cost |= {name: value for name, value in ran.items() if name not in FIXED}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(cost, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _target(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "target": args.name,
        "stand_in": args.stand_in,
        "published_size": args.size,
        "texts": not args.without_texts,
    }


def _manifest(args: argparse.Namespace, members: Members, ran: dict[str, Any]) -> dict[str, Any]:
    return _target(args) | {
        "members": {name: sha256_of(content) for name, content in sorted(members.items())},
        "model": {
            "source": args.model_source,
            "original": identity(args.model, MODEL_FILES),
            "unlearned": identity(args.unlearned, MODEL_FILES),
            "changed": changed_tensors(args.model, args.unlearned),
        },
        "data": {
            "source": args.data_source,
            "files": {folder.name: identity(folder, DATA_FILES) for folder in args.data},
        },
        "unlearning": {name: ran[name] for name in FIXED},
        "scoring": {"versions": versions()},
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--submission", type=Path, required=True, help="the file that ran, pipeline/unlearn.py")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder of the original")
    parser.add_argument("--original", type=Path, required=True, help="folder with the rows of the original")
    parser.add_argument("--unlearned", type=Path, required=True, help="unlearned checkpoint, its rows and run.json")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of the data that was used")
    parser.add_argument("--name", required=True, help="name of the target")
    parser.add_argument("--size", choices=SIZES, required=True, help="size whose published rows to compare with")
    parser.add_argument("--stand-in", action="store_true", help="the model is not the organisers' but a stand-in")
    parser.add_argument("--model-source", required=True, help="where the original is from: name and revision")
    parser.add_argument("--data-source", required=True, help="where the data is from: name and revision")
    parser.add_argument("--published", type=Path, default=Path("data/leaderboard.csv"), help="default: %(default)s")
    parser.add_argument("--without-texts", action="store_true", help="pack scores and hashes in the place of texts")
    parser.add_argument("--output", type=Path, required=True, help="the zip")
    parser.add_argument("--cost", type=Path, required=True, help="json file for the measured cost, not in the zip")
    args = parser.parse_args(argv)
    if len({folder.name for folder in args.data}) < len(args.data):
        parser.error(f"--data {' '.join(map(str, args.data))}: two folders of one name")
    return args


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    args = _arguments(argv)
    if not args.submission.is_file():
        raise BadInput(f"{args.submission}: no such file")
    ran = read_json(args.unlearned / "run.json", RUN)
    results, control = (read_results(folder / "evaluation_results.jsonl") for folder in (args.unlearned, args.original))
    where = would_be(parts(results), args.size, args.stand_in, read_published(args.published, args.size))
    members = {
        "submission.py": args.submission.read_bytes(),
        "README.md": readme(_target(args), results, control, where).encode(),
        **checkpoint_members(args.unlearned, "", not args.without_texts),
        **checkpoint_members(args.original, ORIGINAL, not args.without_texts),
    }
    members["manifest.json"] = manifest_json(_manifest(args, members, ran)).encode()
    measured = {args.cost.name: json.dumps(ran, ensure_ascii=False).encode()}
    refuse_leaks(members | measured, (args.submission, args.model, args.original, args.unlearned, *args.data))
    write_zip(args.output, members)
    write_cost(args.cost, args.output, ran)
    print(f"{args.output}: {len(members)} members, sha256 {sha256(args.output)}")


if __name__ == "__main__":
    run(main)
