"""Rows: what they hold, how they are read and checked, how they are written.

Every table that passes between stages is a list of dicts, one per row, stored as JSON lines. Its fields are given by
one of the schemas below. Texts stay JSON: a csv round trip would turn an empty text or "NA" into a missing value.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from jsonschema import Draft202012Validator

from pipeline.lib.stage import BadInput, whole_file

TASKS = ("Task1", "Task2", "Task3")
KINDS = ("sc", "qa")  # sentence completion, question answering
SIDES = ("forget", "retain")
SETS = ("member", "nonmember")
CHOICES = ("A", "B", "C", "D")

KEY_FIELDS = ("id", "split", "set", "subject", "index")  # those that a table has tell its rows apart

Row = dict[str, Any]

_TEXT = {"type": "string"}
_CHARACTERS = {"pattern": r"^[^\ud800-\udfff]*\Z"}  # JSON can spell half a surrogate pair, UTF-8 cannot
_WORDS = {"type": "string", "allOf": [{"pattern": r"\S"}, _CHARACTERS]}
_ROW_ID = {"type": "string", "pattern": r"(sc|qa).\Z"}  # `$` would let a line break follow
_LARGEST = 1e6  # of a loss: JSON's 1e999 is infinity to Python
# Nats per token; null where there is no token to predict.
_LOSS = {"type": ["number", "null"], "minimum": 0, "maximum": _LARGEST}


def json_object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an object that has these properties, and may have others."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _schema(**fields: Mapping[str, Any]) -> Draft202012Validator:
    return Draft202012Validator(json_object(**fields))


DATA_ROW = _schema(id=_ROW_ID | {"allOf": [_CHARACTERS]}, input=_WORDS, output=_WORDS, task={"enum": list(TASKS)})
DOCUMENT = _schema(id=_TEXT | _CHARACTERS, document=_WORDS)
GENERAL = _schema(id=_TEXT | _CHARACTERS, text=_WORDS)
COMPLETION = _schema(
    id=_ROW_ID,
    task={"enum": list(TASKS)},
    split={"enum": list(SIDES)},
    input=_TEXT,
    expected_output=_TEXT,
    model_output=_TEXT,
    nll=_LOSS,
)
MEMBERSHIP = _schema(id=_TEXT, set={"enum": list(SETS)}, nll=_LOSS | {"type": "number"})
MMLU = _schema(
    subject=_TEXT,
    index={"type": "integer", "minimum": 0},
    answer={"enum": list(CHOICES)},
    probs={"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "minItems": 4, "maxItems": 4},
)
_COUNT = {"type": "integer", "minimum": 0}
_MEAN = {"type": ["number", "null"]}  # null: a mean over nothing
FLUENCY = _schema(
    forget=json_object(outputs=_COUNT, empty=_COUNT, repetition=_MEAN, log_likelihood=_MEAN),
    held_out=json_object(source=_TEXT, texts=_COUNT, loss={"type": "number"}),
)


def kind_of(row_id: str) -> str:
    """Return "sc" or "qa": the two letters before the last character of a row's id."""
    return row_id[-3:-1]


def document_of(row_id: str) -> str:
    """Return what the ids of one document's rows share: all but the kind and the number."""
    return row_id[:-3]


def read_table(path: Path) -> list[Row]:
    """Read a .jsonl or .parquet file. A .jsonl may also hold one line of columns, {"id": {"0": ...} or [...], ...}."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def read_checked(path: Path, schema: Draft202012Validator) -> list[Row]:
    """Read a table and check each row against `schema`, one of this module's; ids must be unique, rows at least one."""
    rows = read_table(path)
    check(rows, schema, path)
    return rows


def check(rows: list[Row], schema: Draft202012Validator, path: Path) -> None:
    """Raise `BadInput` at the first row that breaks `schema`, or that repeats the key of an earlier one."""
    if not rows:
        raise BadInput(f"{path}: no rows")
    required = schema.schema["required"]  # type: ignore[index]  # the schemas of this module are objects
    names = [name for name in KEY_FIELDS if name in required]  # of another field nothing is known
    seen: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, start=1):
        error = next(schema.iter_errors(row), None)
        if error is not None:
            place = "".join(f" field {part!r}:" for part in list(error.path)[:1])
            raise BadInput(f"{path}: row {number}:{place} {_shorten(error.message)}")
        key = tuple(row[name] for name in names)
        if key in seen:
            raise BadInput(f"{path}: row {number}: same key {key!r} as row {seen[key]}")
        seen[key] = number


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line, in UTF-8, whole or not at all. NaN is refused: it is not JSON."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for number, row in enumerate(rows, start=1):
            try:
                stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except ValueError as error:  # a model can compute NaN of finite weights
                raise BadInput(f"{path}: row {number}: cannot be written: {error}") from None


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write the rows as a parquet table, whole or not at all."""
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def parse_json(place: str, text: str | bytes) -> Any:
    """Return a JSON value. NaN, which is not JSON, and a key that is there twice are refused, naming `place`."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place}: not JSON: {_shorten(str(error))}") from None


def read_json(path: Path, schema: Draft202012Validator) -> dict[str, Any]:
    """Read a JSON object and check it."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    value: dict[str, Any] = parse_json(str(path), path.read_bytes())
    for problem in schema.iter_errors(value):
        raise BadInput(f"{path}: {problem.json_path}: {problem.message.splitlines()[0]}")
    return value


def _read_parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text not in UTF-8, a year of 10000
        raise BadInput(f"{path}: not a readable parquet file: {_shorten(str(error))}") from None


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start}: not UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        value = parse_json(f"{path}: line {number}", line)
        if not isinstance(value, dict):
            raise BadInput(f"{path}: line {number}: a row must be an object, this is {_shorten(line)}")
        rows.append(value)
    return _from_columns(rows[0], path) if len(rows) == 1 and _is_columns(rows[0]) else rows


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("an object has a key twice")
    return unique


def _is_columns(value: Row) -> bool:
    return isinstance(value.get("id"), dict | list)


def _from_columns(columns: Row, path: Path) -> list[Row]:
    """Return the rows of columns: all are lists of one length, or objects with the same keys."""
    first = columns["id"]
    for name, column in columns.items():
        size = column.keys() if isinstance(column, dict) else len(column) if isinstance(column, list) else None
        if size != (first.keys() if isinstance(first, dict) else len(first)):
            raise BadInput(f"{path}: line 1: columns 'id' and {name!r} do not fit together")
    places = first if isinstance(first, dict) else range(len(first))
    return [{name: column[place] for name, column in columns.items()} for place in places]


def _shorten(text: str, limit: int = 160) -> str:
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
