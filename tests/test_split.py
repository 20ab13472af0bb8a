"""split: what it refuses, what it writes, and that a sample's general text shares nothing with the sample."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pandas
import pytest

from pipeline import fetch_data, split
from pipeline.lib.stage import BadInput

ROOT = Path(__file__).resolve().parents[1]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(side: str, fold: str = "train", documents: int = 3) -> list[dict]:
    """Return a sc and a qa row of so many documents of each task; `text` differs from row to row."""
    return [
        {
            "id": f"{side}{fold}{task}{number}{kind}",
            "input": f"{side} {fold} {task} {number} {kind} in",
            "output": "out",
            "task": task,
            "split": side,
        }
        for task in ("Task1", "Task2", "Task3")
        for number in range(documents)
        for kind in ("sc1", "qa0")
    ]


def documents_of(name: str, ids: list[str]) -> list[dict]:
    return [{"id": number, "document": f"{name} document {number}"} for number in ids]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A small source with both folds, and MIA documents that repeat Task3 rows as the real ones do."""
    folder = tmp_path / "raw"
    for fold in ("train", "validation"):
        for side in ("forget", "retain"):
            jsonl(folder / f"{side}_{fold}.jsonl", rows_of(side, fold))
    members = [
        {"id": f"forgettrainTask3{n}", "document": f"forget train Task3 {n} sc in out", "more": "dropped"}
        for n in range(3)
    ]
    for member in members:
        member["document"] = member["document"].replace(" sc in", " sc1 in")
    jsonl(folder / "mia" / "member.jsonl", members)
    jsonl(folder / "mia" / "nonmember.jsonl", documents_of("non", ["1", "2", "3", "4"]))
    jsonl(
        folder / "mia" / "validation" / "member.jsonl",
        [
            {"id": f"forgetvalidationTask3{n}sc1", "document": f"forget validation Task3 {n} sc1 in out"}
            for n in range(3)
        ],
    )
    # Non-members of before, one under another id and one in other words: neither ids nor texts alone give them away.
    others = [{"id": "22", "document": "non document 2"}, {"id": "3", "document": "non document 3, revised"}]
    jsonl(folder / "mia" / "validation" / "nonmember.jsonl", others)
    return folder


def run(raw: Path, output: Path, *options: str) -> Path:
    split.main(["--raw", str(raw), "--output", str(output), *options])
    return output


def refusal(raw: Path, *options: str) -> str:
    """Return the message of the refusal; it must be one line, and nothing may have been written."""
    output = raw.parent / "split"
    with pytest.raises(BadInput) as caught:
        run(raw, output, *options)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(raw: Path, name: str, edit) -> Path:
    path = raw / name
    rows = lines(path)
    edit(rows)
    return jsonl(path, rows)


def test_layout_is_the_judges(raw, tmp_path):
    output = run(raw, tmp_path / "out")
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {
        f"{fold}/{side}/{side}.{end}"
        for fold in ("train", "validation")
        for side in ("forget", "retain")
        for end in ("jsonl", "parquet")
    } | {"mia/member.jsonl", "mia/nonmember.jsonl"}
    for fold in ("train", "validation"):
        for side in ("forget", "retain"):
            table = pandas.read_parquet(output / fold / side / f"{side}.parquet")
            assert list(table.columns) == ["id", "input", "output", "task", "split"]
            assert table.to_dict("records") == lines(output / fold / side / f"{side}.jsonl") == rows_of(side, fold)
    assert [set(row) for row in lines(output / "mia" / "member.jsonl")] == [{"id", "document"}] * 3


def test_the_datasets_library_reads_what_was_written(raw, tmp_path):
    """The organisers' scorer reads the jsonl files with it."""
    train = run(raw, tmp_path / "out") / "train"
    cache = str(tmp_path / "cache")
    for side in ("forget", "retain"):
        paths = {kind: str(train / side / f"{side}.{kind}") for kind in ("jsonl", "parquet")}
        from_lines = datasets.load_dataset("json", data_files=paths["jsonl"], split="train", cache_dir=cache)
        from_parquet = datasets.load_dataset("parquet", data_files=paths["parquet"], split="train", cache_dir=cache)
        assert from_lines.to_list() == from_parquet.to_list() == lines(train / side / f"{side}.jsonl")


def test_parquet_and_columns_are_read_like_lines(raw, tmp_path):
    expected = run(raw, tmp_path / "lines")
    rows = lines(raw / "forget_train.jsonl")
    (raw / "forget_train.jsonl").unlink()
    pandas.DataFrame(rows).to_parquet(raw / "forget_train.parquet")
    columns = pandas.DataFrame(lines(raw / "retain_train.jsonl"))
    columns.to_json(raw / "retain_train.jsonl")  # one line {"id": {"0": ...}, ...}, as some public copies have it
    assert len((raw / "retain_train.jsonl").read_text().splitlines()) == 1
    output = run(raw, tmp_path / "others")
    for name in ("forget/forget.jsonl", "retain/retain.jsonl"):
        assert (output / "train" / name).read_bytes() == (expected / "train" / name).read_bytes()


def test_split_is_filled_in_where_the_source_has_none(raw, tmp_path):
    change(raw, "retain_train.jsonl", lambda rows: [row.pop("split") for row in rows])
    output = run(raw, tmp_path / "out")
    assert {row["split"] for row in lines(output / "train" / "retain" / "retain.jsonl")} == {"retain"}


def test_missing_column(raw):
    change(raw, "forget_train.jsonl", lambda rows: rows[4].pop("output"))
    assert "forget_train.jsonl: row 5: 'output' is a required property" in refusal(raw)


def test_empty_text(raw):
    change(raw, "retain_train.jsonl", lambda rows: rows[2].update(input=" \n"))
    assert "retain_train.jsonl: row 3: field 'input':" in refusal(raw)


def test_unknown_task_and_kind(raw):
    change(raw, "retain_train.jsonl", lambda rows: rows[2].update(task="Task4"))
    assert "row 3: field 'task': 'Task4'" in refusal(raw)
    change(raw, "retain_train.jsonl", lambda rows: rows[2].update(task="Task1", id="x-xx1"))
    assert "row 3: field 'id': 'x-xx1'" in refusal(raw)


def test_duplicate_id(raw):
    change(raw, "forget_train.jsonl", lambda rows: rows[3].update(id=rows[0]["id"]))
    message = refusal(raw)
    assert "forget_train.jsonl: row 4:" in message
    assert "row 1" in message
    assert "forgettrainTask10sc1" in message


@pytest.mark.parametrize("other", ["retain_train", "retain_validation", "forget_validation"])
def test_overlap_by_document(raw, other):
    def edit(rows):  # another row of the document, so that only the prefix of the id is shared
        rows[3]["id"] = "forgettrainTask10qa4"

    change(raw, f"{other}.jsonl", edit)
    message = refusal(raw)
    assert f"{other}.jsonl: row 4: document 'forgettrainTask10' is also in" in message
    assert "forget_train.jsonl" in message


def test_files_of_the_sides_exchanged(raw):
    (raw / "forget_train.jsonl").rename(raw / "x")
    (raw / "retain_train.jsonl").rename(raw / "forget_train.jsonl")
    (raw / "x").rename(raw / "retain_train.jsonl")
    assert "forget_train.jsonl: row 1: field 'split': 'retain' in a file of forget rows" in refusal(raw)


def test_a_task_without_questions(raw):
    rows = [row for row in rows_of("retain") if row["task"] != "Task2" or "qa" not in row["id"]]
    jsonl(raw / "retain_train.jsonl", rows)
    assert "retain_train.jsonl: no qa row of Task2" in refusal(raw)


def test_empty_missing_and_broken_files(raw):
    good = (raw / "forget_train.jsonl").read_text()
    (raw / "forget_train.jsonl").write_text("\n")
    assert "forget_train.jsonl: no rows" in refusal(raw)
    (raw / "forget_train.jsonl").write_text(good.replace("}\n", "}\n{broken\n", 1))
    assert "forget_train.jsonl: line 2: not JSON" in refusal(raw)
    (raw / "forget_train.jsonl").unlink()
    assert "forget_train.jsonl: no such file" in refusal(raw)
    (raw / "forget_train.parquet").write_bytes(b"PAR1 nonsense")
    assert "forget_train.parquet: not a readable parquet file" in refusal(raw)


def test_half_a_fold_and_half_a_mia_set(raw):
    (raw / "retain_validation.jsonl").unlink()
    assert "retain_validation.jsonl: no such file" in refusal(raw)
    (raw / "forget_validation.jsonl").unlink()
    (raw / "mia" / "nonmember.jsonl").unlink()
    assert "nonmember.jsonl: no such file" in refusal(raw)


def test_nonmember_that_is_in_the_data(raw):
    change(raw, "mia/nonmember.jsonl", lambda rows: rows[1].update(id="retaintrainTask31"))
    assert "nonmember.jsonl: row 2: 'retaintrainTask31' is in the data" in refusal(raw)
    change(raw, "mia/nonmember.jsonl", lambda rows: rows[1].update(id="7", document="retain train Task3 1 sc1 in out"))
    assert "nonmember.jsonl: row 2: '7' is in the data" in refusal(raw)


def test_source_without_mia(raw, tmp_path):
    for path in sorted((raw / "mia").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert not (run(raw, tmp_path / "out") / "mia").exists()
    assert not (run(raw, tmp_path / "sample", "--documents-per-task", "1") / "mia").exists()


def test_one_line_and_exit_code_2(raw):
    (raw / "forget_train.jsonl").write_text("[1, 2]\n")
    command = [sys.executable, "-m", "pipeline.split", "--raw", str(raw), "--output", str(raw.parent / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "forget_train.jsonl: line 1: a row must be an object" in done.stderr
    assert not (raw.parent / "out").exists()


def test_output_over_input_is_refused(raw):
    before = sorted(raw.rglob("*"))
    with pytest.raises(BadInput, match="must lie apart"):
        run(raw, raw)
    with pytest.raises(BadInput, match="must lie apart"):
        run(raw, raw.parent)
    assert sorted(raw.rglob("*")) == before


def test_failed_run_leaves_the_former_output(raw, tmp_path):
    output = run(raw, tmp_path / "split")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    change(raw, "forget_train.jsonl", lambda rows: rows[0].pop("id"))
    with pytest.raises(BadInput):
        run(raw, output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def document(any_id: str) -> str:
    return any_id[:-3] if any_id[-3:-1] in ("sc", "qa") else any_id


def check_sample(raw: Path, output: Path, per_task: int, tables: dict[str, list[dict]]) -> None:
    """Recompute from the source what a sample must be. `tables`: name of a raw file without suffix -> its rows."""
    kept = {side: lines(output / "train" / side / f"{side}.jsonl") for side in ("forget", "retain")}
    for side, rows in kept.items():
        names = {row["id"] for row in rows}
        prefixes = {row["id"][:-3] for row in rows}
        whole = [row["id"] for row in tables[f"{side}_train"] if row["id"][:-3] in prefixes]
        assert [row["id"] for row in rows] == whole, "whole documents, in the order of the source"
        assert len(names) == len(rows)
        assert {
            task: len({row["id"][:-3] for row in rows if row["task"] == task}) for task in ("Task1", "Task2", "Task3")
        } == {"Task1": per_task, "Task2": per_task, "Task3": per_task}
    members, nonmembers = (lines(output / "mia" / f"{name}.jsonl") for name in ("member", "nonmember"))
    forget = {row["id"][:-3] for row in kept["forget"]}
    assert [row["id"] for row in members] == [row["id"] for row in tables["mia/member"] if row["id"] in forget]
    assert {row["id"] for row in nonmembers} <= {row["id"] for row in tables["mia/nonmember"]}

    general = lines(output / "general.jsonl")
    texts = {row["text"] for row in general}
    assert len(texts) == len(general) == len({row["id"] for row in general})
    secret = [row["input"] + " " + row["output"] for rows in kept.values() for row in rows]
    secret += [row["document"] for row in members + nonmembers]
    for text in secret:
        assert text not in texts
        assert not any(text in other for other in texts), "nor a part of a general text"
    hidden = forget | {row["id"][:-3] for row in kept["retain"]} | {row["id"] for row in nonmembers}
    assert not hidden & {document(row["id"]) for row in general}

    everything = [
        (row["id"], row["document"] if name.startswith("mia") else row["input"] + " " + row["output"])
        for name, rows in tables.items()
        for row in rows
    ]
    allowed = {(number, text) for number, text in everything if document(number) not in hidden and text not in secret}
    assert {(row["id"], row["text"]) for row in general} <= allowed
    for number, text in allowed:
        assert text in texts or number in {row["id"] for row in general}, "nothing is left out"


def test_sample(raw, tmp_path):
    names = [f"{side}_{fold}" for side in ("forget", "retain") for fold in ("train", "validation")]
    names += ["mia/member", "mia/nonmember", "mia/validation/member", "mia/validation/nonmember"]
    tables = {name: lines(raw / f"{name}.jsonl") for name in names}
    for seed in range(8):  # so that the non-members of validation are now among the chosen, now not
        output = run(raw, tmp_path / "out", "--documents-per-task", "2", "--seed", str(seed))
        check_sample(raw, output, 2, tables)
        assert not (output / "validation").exists()
        assert len(lines(output / "mia" / "nonmember.jsonl")) == len(lines(output / "mia" / "member.jsonl")) == 2


def test_sample_depends_on_the_seed_alone(raw, tmp_path):
    def ids(*options: str) -> list[str]:
        output = run(raw, tmp_path / "out", "--documents-per-task", "1", *options)
        return [row["id"] for path in sorted(output.rglob("*.jsonl")) for row in lines(path)]

    assert ids("--seed", "3") == ids("--seed", "3")
    assert len({tuple(ids("--seed", str(seed))) for seed in range(5)}) > 1

    def forget(*options: str) -> bytes:
        output = run(raw, tmp_path / "out", "--documents-per-task", "1", *options)
        return (output / "train" / "forget" / "forget.parquet").read_bytes()

    assert forget("--nonmembers", "1") == forget("--nonmembers", "4")


def test_members_may_be_named_by_their_row(raw, tmp_path, capsys):
    """As in one public copy."""
    expected = lines(run(raw, tmp_path / "out", "--documents-per-task", "2") / "mia" / "member.jsonl")
    said = capsys.readouterr().out
    change(raw, "mia/member.jsonl", lambda rows: [row.update(id=f"{row['id']}sc1") for row in rows])
    found = lines(run(raw, tmp_path / "out", "--documents-per-task", "2") / "mia" / "member.jsonl")
    assert found == [{**row, "id": f"{row['id']}sc1"} for row in expected]
    assert capsys.readouterr().out == said and "(2 of them forget documents)" in said
    change(raw, "mia/nonmember.jsonl", lambda rows: rows[1].update(id="retaintrainTask31sc1"))
    assert "'retaintrainTask31sc1' is in the data" in refusal(raw)


def test_more_than_there_is(raw):
    assert "forget_train: documents of Task1: 4 asked for, there are 3" in refusal(raw, "--documents-per-task", "4")
    assert "non-members: 5 asked for, there are 4" in refusal(raw, "--documents-per-task", "1", "--nonmembers", "5")


def test_sample_without_a_member(raw):
    jsonl(raw / "mia" / "member.jsonl", documents_of("old", ["retaintrainTask30"]))
    assert "none of its 1 members is in the forget sample" in refusal(raw, "--documents-per-task", "1")


@pytest.mark.parametrize(
    "options",
    [["--nonmembers", "1"], ["--documents-per-task", "0"], ["--documents-per-task", "1", "--nonmembers", "0"]],
)
def test_options_that_make_no_sense(raw, options):
    with pytest.raises(SystemExit) as caught:
        run(raw, raw.parent / "out", *options)
    assert caught.value.code == 2


def test_general_text_of_the_source_goes_through(raw, tmp_path):
    path = jsonl(raw / "general.jsonl", [{"id": "g0", "text": "Something else."}, {"id": "g1", "text": "And more."}])
    for options in ([], ["--documents-per-task", "1"]):
        assert (run(raw, tmp_path / "out", *options) / "general.jsonl").read_bytes() == path.read_bytes()
    jsonl(path, [{"id": "g0", "text": "forget train Task1 0 sc1 in out"}])
    assert "general text: row 1: the text of 'forgettrainTask10sc1'" in refusal(raw)
    jsonl(path, [{"id": "g0", "text": "fine"}, {"id": "g1", "text": " "}])
    assert "general text: row 2: field 'text'" in refusal(raw)


def test_synthetic_source(tmp_path):
    fetch_data.main(["--source", "synthetic", "--output", str(tmp_path / "raw")])
    output = run(tmp_path / "raw", tmp_path / "out")
    assert (output / "general.jsonl").read_bytes() == (tmp_path / "raw" / "general.jsonl").read_bytes()
    forget = lines(output / "train" / "forget" / "forget.jsonl")
    members = {row["id"]: row["document"] for row in lines(output / "mia" / "member.jsonl")}
    completions = {
        row["id"][:-3]: f"{row['input']} {row['output']}"
        for row in forget
        if row["task"] == "Task3" and "sc" in row["id"][-3:]
    }
    assert members == completions


# task.md's table of the public data: rows of (Task1, Task2, Task3) sc + qa.
COUNTS = {
    "train/forget": (1112, {"Task1": (83, 83), "Task2": (107, 535), "Task3": (152, 152)}),
    "train/retain": (1136, {"Task1": (103, 103), "Task2": (102, 510), "Task3": (159, 159)}),
    "validation/forget": (254, {"Task1": (24, 24), "Task2": (23, 115), "Task3": (34, 34)}),
    "validation/retain": (278, {"Task1": (27, 27), "Task2": (25, 125), "Task3": (37, 37)}),
}


def test_real_data(real_data, tmp_path):
    fetch_data.main(["--source", "semeval25", "--local", str(real_data), "--output", str(tmp_path / "raw")])
    output = run(tmp_path / "raw", tmp_path / "out")
    for name, (total, tasks) in COUNTS.items():
        side = name.partition("/")[2]
        rows = lines(output / name / f"{side}.jsonl")
        count = Counter((row["task"], row["id"][-3:-1]) for row in rows)
        assert len(rows) == total
        assert {task: (count[task, "sc"], count[task, "qa"]) for task in tasks} == tasks
        original = pandas.read_parquet(real_data / f"{side}_{name.partition('/')[0]}-00000-of-00001.parquet")
        assert rows == original[["id", "input", "output", "task", "split"]].to_dict("records")
    assert [len(lines(output / "mia" / f"{name}.jsonl")) for name in ("member", "nonmember")] == [150, 150]


def test_real_sample(real_data, tmp_path):
    fetch_data.main(["--source", "semeval25", "--local", str(real_data), "--output", str(tmp_path / "raw")])
    tables = {
        f"{side}_{fold}": pandas.read_parquet(real_data / f"{side}_{fold}-00000-of-00001.parquet").to_dict("records")
        for side in ("forget", "retain")
        for fold in ("train", "validation")
    }
    tables |= {
        f"mia/{part}{name}": lines(real_data / "mia" / part / f"{name}.jsonl")
        for part in ("", "validation/")
        for name in ("member", "nonmember")
    }
    output = run(tmp_path / "raw", tmp_path / "out", "--documents-per-task", "8")
    check_sample(tmp_path / "raw", output, 8, tables)


def test_real_data_is_as_the_readme_says(real_data):
    """The quirks written down in data/README.md."""
    completions = {
        row["id"][:-3]: f"{row['input']} {row['output']}"
        for fold in ("train", "validation")
        for row in pandas.read_parquet(real_data / f"forget_{fold}-00000-of-00001.parquet").to_dict("records")
        if row["task"] == "Task3" and row["id"][-3:-1] == "sc"
    }
    members, others, more_members, more_others = (
        {document(row["id"]): row["document"] for row in lines(real_data / "mia" / name)}
        for name in ("member.jsonl", "nonmember.jsonl", "validation/member.jsonl", "validation/nonmember.jsonl")
    )
    assert members | more_members == {number: completions[number] for number in members | more_members}
    assert set(completions) - set(members | more_members) == {"71401878", "32191780"}
    assert more_others.items() <= others.items()
    assert len(more_others) == 34
