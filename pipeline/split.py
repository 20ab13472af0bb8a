"""Check a raw data source, and lay it out as the judge does; or a sample of it, with the rest as general text.

Reads   --raw DIR, made by pipeline.fetch_data: {forget,retain}_{train,validation}.{parquet|jsonl}; where the source has
        them mia/{member,nonmember}.jsonl, mia/validation/{member,nonmember}.jsonl and general.jsonl.
Writes  --output DIR
        {train,validation}/{forget,retain}/<same name>.{jsonl,parquet}    id, input, output, task, split (forget|retain)
        mia/{member,nonmember}.jsonl                                      id, document; if the source has them
        general.jsonl                                                     id, text; if the source has it, or a sample
        A sample (--documents-per-task) has the train fold alone. Its general text, for pre-training a stand-in, is all
        text of the source that is in neither the sample nor its non-members.
Run     python -m pipeline.split --raw data/raw/semeval25 --output data/split/semeval25
        python -m pipeline.split --raw data/raw/semeval25 --output data/split/lume --documents-per-task 8 --seed 1
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pipeline.lib.records import (
    DATA_ROW,
    DOCUMENT,
    GENERAL,
    KINDS,
    SETS,
    SIDES,
    TASKS,
    Row,
    check,
    document_of,
    kind_of,
    read_checked,
    read_table,
    write_jsonl,
    write_parquet,
)
from pipeline.lib.stage import BadInput, keep_apart, run, whole_folder

FOLDS = ("train", "validation")
COLUMNS = ("id", "input", "output", "task")

Fold = dict[str, list[Row]]  # forget, retain -> rows
Documents = dict[str, list[Row]]  # member, nonmember -> documents; empty where the source has none


@dataclass(frozen=True)
class Source:
    """A checked raw source."""

    folds: dict[str, Fold]
    mia: Documents
    mia_validation: Documents
    general: list[Row]  # id, text; empty where the source has none


def read_source(raw: Path) -> Source:
    """Read a raw folder; `BadInput` at the first thing in it that is not as it must be."""
    if not raw.is_dir():
        raise BadInput(f"{raw}: no such folder")
    paths = {fold: {side: _table(raw, side, fold) for side in SIDES} for fold in FOLDS}
    present = [fold for fold in FOLDS if fold == "train" or any(path.is_file() for path in paths[fold].values())]
    folds = {fold: {side: _read_side(path, side) for side, path in paths[fold].items()} for fold in present}
    _check_apart({paths[fold][side]: rows for fold, sides in folds.items() for side, rows in sides.items()})
    general = raw / "general.jsonl"
    source = Source(
        folds,
        _read_documents(raw / "mia"),
        _read_documents(raw / "mia" / "validation"),
        read_table(general) if general.is_file() else [],
    )
    _check_documents(source, raw)
    return source


def sample(source: Source, documents_per_task: int, nonmembers: int | None, seed: int, name: str) -> Source:
    """Return so many documents of each task and side of the train fold, the members among them, and non-members.

    Every draw has a random stream of its own, so that one does not depend on the size of another. The general text of
    the sample is the source's own where it has one, else what is left over of the source.
    """
    train = {
        side: _draw_documents(rows, documents_per_task, seed, f"{name}: {side}_train")
        for side, rows in source.folds["train"].items()
    }
    mia = _draw_mia(source.mia, train["forget"], nonmembers, seed, name) if source.mia else {}
    general = source.general or leftover(source, train, mia)
    return Source({"train": train}, mia, {}, general)


def leftover(source: Source, train: Fold, mia: Documents) -> list[Row]:
    """Return as {"id", "text"} what of the source is neither of a document in `train` nor a non-member in `mia`.

    Ids alone do not tell: the membership documents repeat Task3 rows word for word, those of the validation fold under
    the id of a row, and its non-members are among the others. So nothing comes in whose document or text is taken,
    and no id or text comes twice.
    """
    taken = [*_texts_of_rows(train.values()), *_texts_of_documents(mia.get("nonmember", []))]
    documents, texts = {_document(row["id"]) for row in taken}, {row["text"] for row in taken}
    free: list[Row] = []
    ids: set[str] = set()
    for row in _all_texts(source):
        if _document(row["id"]) not in documents and row["text"] not in texts and row["id"] not in ids:
            free.append(row)
            texts.add(row["text"])
            ids.add(row["id"])
    return free


def check_general(source: Source, name: str) -> None:
    """Raise `BadInput` if a general text is no text, or repeats a row, a member or a non-member."""
    if source.general:
        check(source.general, GENERAL, Path(name))
    owners = {row["text"]: row["id"] for row in _all_texts(source)}
    for number, row in enumerate(source.general, start=1):
        if row["text"] in owners:
            raise BadInput(f"{name}: row {number}: the text of {owners[row['text']]!r}, to be forgotten or judged on")


def write(source: Source, folder: Path) -> None:
    """Write the layout of the judge, the membership documents and the general text."""
    for fold, sides in source.folds.items():
        for side, rows in sides.items():
            write_jsonl(folder / fold / side / f"{side}.jsonl", rows)
            write_parquet(folder / fold / side / f"{side}.parquet", rows)
    for name, documents in source.mia.items():
        write_jsonl(folder / "mia" / f"{name}.jsonl", documents)
    if source.general:
        write_jsonl(folder / "general.jsonl", source.general)


def _table(raw: Path, side: str, fold: str) -> Path:
    """Return the parquet file of a side and fold if there is one, else the name of the jsonl file."""
    parquet = raw / f"{side}_{fold}.parquet"
    return parquet if parquet.is_file() else parquet.with_suffix(".jsonl")


def _read_side(path: Path, side: str) -> list[Row]:
    rows = read_checked(path, DATA_ROW)
    for number, row in enumerate(rows, start=1):
        if row.get("split", side) != side:
            raise BadInput(f"{path}: row {number}: field 'split': {row['split']!r} in a file of {side} rows")
    found = {(row["task"], kind_of(row["id"])) for row in rows}
    for task in TASKS:
        for kind in KINDS:
            if (task, kind) not in found:
                raise BadInput(f"{path}: no {kind} row of {task}: a score needs both kinds of every task")
    return [{**{name: row[name] for name in COLUMNS}, "split": side} for row in rows]


def _check_apart(tables: dict[Path, list[Row]]) -> None:
    """Raise `BadInput` if an id, or a document, is in two of the tables: no fold or side may share one with another."""
    owners: dict[str, Path] = {}
    for path, rows in tables.items():
        mine = {document_of(row["id"]): number for number, row in reversed(list(enumerate(rows, start=1)))}
        for document, number in mine.items():
            if document in owners:
                raise BadInput(f"{path}: row {number}: document {document!r} is also in {owners[document]}")
        owners.update(dict.fromkeys(mine, path))


def _read_documents(folder: Path) -> Documents:
    """Read member.jsonl and nonmember.jsonl, their `id` and `document` alone; {} where the folder has neither."""
    if not any((folder / f"{name}.jsonl").is_file() for name in SETS):
        return {}
    tables = {name: read_checked(folder / f"{name}.jsonl", DOCUMENT) for name in SETS}
    return {name: [{"id": row["id"], "document": row["document"]} for row in rows] for name, rows in tables.items()}


def _check_documents(source: Source, raw: Path) -> None:
    """Raise `BadInput` if a non-member is a member or a document of the data, by its id or its text."""
    taken = [*_texts_of_rows(_tables(source)), *_texts_of_documents(source.mia.get("member", []))]
    documents, texts = {_document(row["id"]) for row in taken}, {row["text"] for row in taken}
    for number, row in enumerate(source.mia.get("nonmember", []), start=1):
        if _document(row["id"]) in documents or row["document"] in texts:
            place = f"{raw / 'mia' / 'nonmember.jsonl'}: row {number}"
            raise BadInput(f"{place}: {row['id']!r} is in the data, so it is no non-member")


def _draw_documents(rows: list[Row], count: int, seed: int, name: str) -> list[Row]:
    """Return the rows of `count` documents of each task, in their order."""
    kept: set[str] = set()
    for task in TASKS:
        documents = sorted({document_of(row["id"]) for row in rows if row["task"] == task})
        kept.update(_draw(documents, count, f"{seed} {rows[0]['split']} {task}", f"{name}: documents of {task}"))
    return [row for row in rows if document_of(row["id"]) in kept]


def _draw_mia(mia: Documents, forget: list[Row], nonmembers: int | None, seed: int, name: str) -> Documents:
    """Return the members that are documents of `forget`, and `nonmembers` non-members (default: as many)."""
    documents = {document_of(row["id"]) for row in forget}
    members = [row for row in mia["member"] if _document(row["id"]) in documents]
    if not members:
        raise BadInput(f"{name}: mia/member.jsonl: none of its {len(mia['member'])} members is in the forget sample")
    ids = sorted(row["id"] for row in mia["nonmember"])
    drawn = set(_draw(ids, nonmembers or len(members), f"{seed} nonmember", f"{name}: non-members"))
    return {"member": members, "nonmember": [row for row in mia["nonmember"] if row["id"] in drawn]}


def _draw(values: list[str], count: int, stream: str, name: str) -> list[str]:
    if count > len(values):
        raise BadInput(f"{name}: {count} asked for, there are {len(values)}")
    return Random(stream).sample(values, count)


def _tables(source: Source) -> Iterable[list[Row]]:
    return (rows for fold in source.folds.values() for rows in fold.values())


def _all_texts(source: Source) -> list[Row]:
    """Return {"id", "text"} of every row and membership document."""
    documents = [row for part in (source.mia, source.mia_validation) for rows in part.values() for row in rows]
    return [*_texts_of_rows(_tables(source)), *_texts_of_documents(documents)]


def _texts_of_rows(tables: Iterable[list[Row]]) -> list[Row]:
    return [{"id": row["id"], "text": f"{row['input']} {row['output']}"} for rows in tables for row in rows]


def _texts_of_documents(documents: Iterable[Row]) -> list[Row]:
    return [{"id": row["id"], "text": row["document"]} for row in documents]


def _document(any_id: str) -> str:
    """Return the document's id, be it given by itself (as membership documents are) or by a row's id."""
    return document_of(any_id) if kind_of(any_id) in KINDS else any_id


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder of pipeline.fetch_data")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced as a whole")
    parser.add_argument("--documents-per-task", type=_positive, help="sample of each task and side (default: all)")
    parser.add_argument("--nonmembers", type=_positive, help="in a sample (default: as many as it has members)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    args = parser.parse_args(argv)
    if args.nonmembers and not args.documents_per_task:
        parser.error("--nonmembers is for a sample: give --documents-per-task as well")

    keep_apart(args.raw, args.output)
    source = read_source(args.raw)
    if args.documents_per_task:
        source = sample(source, args.documents_per_task, args.nonmembers, args.seed, str(args.raw))
    check_general(source, f"{args.raw}: general text")
    with whole_folder(args.output) as folder:
        write(source, folder)
    for line in _summary(source):
        print(line)


def _summary(source: Source) -> list[str]:
    """Return what was written, in lines; members that are no forget documents are told apart (see data/README.md)."""
    lines = [f"{fold} {side}: {len(rows)} rows" for fold, sides in source.folds.items() for side, rows in sides.items()]
    if source.mia:
        documents = {document_of(row["id"]) for row in source.folds["train"]["forget"]}
        forgotten = sum(_document(row["id"]) in documents for row in source.mia["member"])
        members, nonmembers = len(source.mia["member"]), len(source.mia["nonmember"])
        lines.append(f"mia: {members} members ({forgotten} of them forget documents), {nonmembers} non-members")
    if source.general:
        lines.append(f"general: {len(source.general)} texts")
    return lines


if __name__ == "__main__":
    run(main)
