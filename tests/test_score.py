"""The official result file: by hand, by an independent computation over csv files, and on wrong input."""

import json
import random
import re
from pathlib import Path
from statistics import fmean

import pandas
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean

from pipeline.lib.mmlu_categories import CATEGORIES
from pipeline.lib.stage import BadInput
from pipeline.score import main, mmlu_accuracy

# (side, task, kind) -> (expected, output) of each row, and its mean, worked out by hand
BY_HAND = {
    ("forget", "Task1", "sc"): ([("one two three four", "two four"), ("a b", "x")], 0.25),  # 2/4, 0
    ("forget", "Task1", "qa"): ([("Ann", "ann "), ("Bob", "Rob")], 0.5),
    ("forget", "Task2", "sc"): ([("a b c d e", "a b c d")], 0.8),
    ("forget", "Task2", "qa"): ([("1", "1"), ("2", "2"), ("3", "3"), ("4", "5")], 0.75),
    ("forget", "Task3", "sc"): ([("a b c d", "d c b a")], 0.25),
    ("forget", "Task3", "qa"): ([("x", "y")], 0),
    ("retain", "Task1", "sc"): ([("a b", "a b"), ("a b", "b c")], 0.75),
    ("retain", "Task1", "qa"): ([("x", "x")], 1),
    ("retain", "Task2", "sc"): ([("a b c d e", "e")], 0.2),
    ("retain", "Task2", "qa"): ([("x", "X"), ("y", "z"), ("y", ""), ("w", "w")], 0.5),
    ("retain", "Task3", "sc"): ([("a b c d", "a x b y c")], 0.75),
    ("retain", "Task3", "qa"): ([("x", "x"), ("y", "z")], 0.5),
}


def completions(texts: dict) -> list[dict]:
    return [
        {
            "id": f"{task}{number}{kind}1",
            "task": task,
            "split": side,
            "input": "?",
            "expected_output": expected,
            "model_output": output,
            "nll": 1.5,
        }
        for (side, task, kind), pairs in texts.items()
        for number, (expected, output) in enumerate(pairs)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def score(folder: Path, *extra: object) -> dict:
    main([*map(str, ("--completions", folder / "completions.jsonl", "--output", folder / "out.jsonl", *extra))])
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    """A folder with the rows of `BY_HAND` in mixed order, an attack of AUC 5/6, and multiple choice of 3 in 5."""
    rows = completions({cell: pairs for cell, (pairs, _) in BY_HAND.items()})
    random.Random(0).shuffle(rows)
    write(tmp_path / "completions.jsonl", rows)
    losses = {"member": [1.0, 2.0, 3.0], "nonmember": [2.5, 4.0]}  # of six pairs, all but (3, 2.5) in order
    membership = [{"id": f"{name}{n}", "set": name, "nll": v} for name, vs in losses.items() for n, v in enumerate(vs)]
    write(tmp_path / "membership.jsonl", membership)
    questions = [
        ("anatomy", "A", [0.5, 0.2, 0.2, 0.1]),  # right
        ("anatomy", "B", [0.1, 0.2, 0.3, 0.1]),  # wrong
        ("virology", "D", [0.1, 0.2, 0.3, 0.35]),  # right
        ("astronomy", "C", [0.0, 0.4, 0.4, 0.1]),  # a tie, the first counts: wrong
        ("marine knots", "B", [0.0, 0.4, 0.4, 0.1]),  # a tie: right; no subject of MMLU
    ]
    mmlu = [{"subject": s, "index": i, "answer": a, "probs": p} for i, (s, a, p) in enumerate(questions)]
    write(tmp_path / "mmlu.jsonl", mmlu)
    return tmp_path


def test_the_whole_file_by_hand(by_hand):
    results = score(by_hand, "--membership", by_hand / "membership.jsonl", "--mmlu", by_hand / "mmlu.jsonl")
    values = {cell: value for cell, (_, value) in BY_HAND.items()}
    for (side, task, kind), value in values.items():
        key = {"sc": "regurgitation-score", "qa": "knowledge-score"}[kind]
        assert results[f"{side}-set"][task][key] == pytest.approx(value, abs=1e-12)
    terms = [1 - value if cell[0] == "forget" else value for cell, value in values.items()]
    assert results["aggregated-terms"] == pytest.approx(terms, abs=1e-12)
    # overall: over rows, not over tasks
    assert results["forget-set"]["overall-regurgitation-score"] == pytest.approx((0.5 + 0 + 0.8 + 0.25) / 4)
    assert results["forget-set"]["overall-knowledge-score"] == pytest.approx((1 + 0 + 3 + 0) / 7)
    assert results["retain-set"]["overall-regurgitation-score"] == pytest.approx((1 + 0.5 + 0.2 + 0.75) / 4)
    assert results["retain-set"]["overall-knowledge-score"] == pytest.approx((1 + 2 + 1) / 7)
    assert results["mia_loss_acc"] == pytest.approx(5 / 6)
    assert results["mia_final_score"] == pytest.approx(1 / 3)
    assert results["mmlu_average"] == pytest.approx(3 / 5)
    task_aggregate = 12 / sum(1 / term for term in terms)
    assert results["harmonic-mean-task-aggregate"] == pytest.approx(task_aggregate)
    assert results["aggregate-score"] == pytest.approx((task_aggregate + 1 / 3 + 3 / 5) / 3)


def test_keys_and_their_order_are_the_official_ones(by_hand):
    results = score(by_hand, "--membership", by_hand / "membership.jsonl", "--mmlu", by_hand / "mmlu.jsonl")
    assert list(results) == [
        "forget-set",
        "retain-set",
        "mia_loss_acc",
        "mmlu_average",
        "aggregated-terms",
        "harmonic-mean-task-aggregate",
        "aggregate-score",
        "mia_final_score",
    ]
    side = ["overall-regurgitation-score", "overall-knowledge-score", "Task1", "Task2", "Task3"]
    assert list(results["forget-set"]) == list(results["retain-set"]) == side
    assert list(results["forget-set"]["Task2"]) == ["regurgitation-score", "knowledge-score"]


def printed(text: str) -> tuple[str, list[list[str]]]:
    """The title of a table in the terminal, and its cells, line by line."""
    title, *lines = text.splitlines()
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
    return title.rstrip(), cells


def test_the_printed_table_by_hand(by_hand, capsys):
    score(by_hand, "--membership", by_hand / "membership.jsonl", "--mmlu", by_hand / "mmlu.jsonl")
    title, rows = printed(capsys.readouterr().out)
    assert title == "regurgitation / knowledge (before 1 - value on forget)"
    # task aggregate: 12 terms, 1/(3/4) + 1/(1/2) + ... = 82/3
    assert rows == [
        ["", "Task1", "Task2", "Task3"],
        ["forget", "0.250 / 0.500", "0.800 / 0.750", "0.250 / 0.000"],
        ["retain", "0.750 / 1.000", "0.200 / 0.500", "0.750 / 0.500"],
        ["task aggregate", "0.439", "", ""],
        ["AUC", "0.833", "", ""],
        ["MIA", "0.333", "", ""],
        ["MMLU", "0.600", "", ""],
        ["final", "0.457", "", ""],  # (18/41 + 1/3 + 3/5) / 3
    ]


def test_the_printed_table_says_what_is_missing(by_hand, capsys):
    score(by_hand)
    rows = printed(capsys.readouterr().out)[1]
    missing = [[name, "missing", "", ""] for name in ("AUC", "MIA", "MMLU")]
    assert rows[3:] == [["task aggregate", "0.439", "", ""], *missing, ["final", "-1.000", "", ""]]


@pytest.mark.parametrize("given", ["membership", "mmlu", None])
def test_without_attack_or_multiple_choice_there_is_no_final_score(by_hand, given):
    results = score(by_hand, *([f"--{given}", by_hand / f"{given}.jsonl"] if given else []))
    assert results["aggregate-score"] == -1
    assert "mia_final_score" not in results
    assert ("mia_loss_acc" in results) == (given == "membership")
    assert ("mmlu_average" in results) == (given == "mmlu")
    assert results["harmonic-mean-task-aggregate"] > 0


def test_one_perfectly_remembered_cell_makes_the_aggregate_zero(tmp_path):
    texts = {cell: [("right", "right" if cell[0] == "retain" else "wrong")] for cell in BY_HAND}
    write(tmp_path / "completions.jsonl", completions(texts))
    assert score(tmp_path)["harmonic-mean-task-aggregate"] == 1
    texts["forget", "Task3", "qa"] = [("right", "right")]
    write(tmp_path / "completions.jsonl", completions(texts))
    assert score(tmp_path)["harmonic-mean-task-aggregate"] == 0


def through_csv(rows: list[dict], folder: Path) -> dict:
    """Score as the organisers do: rows written and read as csv, pandas' group means, a missing text taken as "nan"."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    results, terms = {}, []
    for side in ("forget", "retain"):
        frame = pandas.DataFrame([row for row in rows if row["split"] == side])
        frame.to_csv(folder / f"{side}.csv", index=False)
        frame = pandas.read_csv(folder / f"{side}.csv")
        frame["expected_output"] = [str(text) for text in frame["expected_output"].tolist()]
        frame["model_output"] = [str(text) for text in frame["model_output"].tolist()]
        is_text = frame["id"].str[:-1].str.endswith("sc")
        pairs = list(zip(frame["expected_output"], frame["model_output"], strict=True))
        frame["recall"] = [scorer.score(*pair)["rougeL"].recall for pair in pairs]
        frame["match"] = [float(a.strip().lower() == b.strip().lower()) for a, b in pairs]
        by_task = pandas.DataFrame(
            {"r": frame[is_text].groupby("task")["recall"].mean(), "k": frame[~is_text].groupby("task")["match"].mean()}
        )
        results[side] = [
            frame[is_text]["recall"].mean(),
            frame[~is_text]["match"].mean(),
            *by_task.to_numpy().flatten(),
        ]
        terms += [1 - v if side == "forget" else v for v in by_task.to_numpy().flatten()]
    return {**results, "terms": terms, "aggregate": hmean(terms) if min(terms) > 0 else 0.0}


def flat(side: dict) -> list[float]:
    return [
        side["overall-regurgitation-score"],
        side["overall-knowledge-score"],
        *(value for task in ("Task1", "Task2", "Task3") for value in side[task].values()),
    ]


def test_ordinary_texts_score_as_through_the_official_csv_files(tmp_path):
    draw = random.Random(4)
    words = [
        "the",
        "running",
        "cats,",
        '"quoted"',
        "café",
        "12",
        "March\n1990",
        "émigré",
        "—",
        "line\ttab",
        "東京",
        "don't",
    ]
    texts = {}
    for cell in BY_HAND:
        pairs = []
        for _ in range(draw.randint(3, 9)):
            expected = " ".join(draw.choices(words, k=draw.randint(2, 12)))
            kept = " ".join(word for word in expected.split(" ") if draw.random() < 0.6) or "x"
            pairs.append((expected, draw.choice([expected, expected.upper(), kept])))
        texts[cell] = pairs
    rows = completions(texts)
    write(tmp_path / "completions.jsonl", rows)
    ours, official = score(tmp_path), through_csv(rows, tmp_path)
    for side in ("forget", "retain"):
        assert flat(ours[f"{side}-set"]) == pytest.approx(official[side], rel=1e-12)
    assert ours["aggregated-terms"] == pytest.approx(official["terms"], rel=1e-12)
    assert ours["harmonic-mean-task-aggregate"] == pytest.approx(official["aggregate"], rel=1e-12)


@pytest.mark.parametrize(
    ("expected", "output", "kind", "here", "there"),
    [
        ("None", "", "qa", 0, 1),  # both are missing in the csv, and "nan" equals "nan"
        ("NA", "null", "qa", 0, 1),
        ("nan", "", "qa", 0, 1),
        ("None", "None", "qa", 1, 1),
        ("N/A", "n/a.", "qa", 0, 0),
        ("!?", "!?", "qa", 1, 1),
        ("Émile", "émile", "qa", 1, 1),
        ("NA", "NA was here", "sc", 1, 0),
        ("their nan bread", "", "sc", 0, 1 / 3),  # a silent model says "nan" there
        ("NA", "", "sc", 0, 1),
        ("...", "...", "sc", 0, 0),
        ("東京", "東京", "sc", 0, 0),
    ],
)
def test_awkward_texts_here_and_through_the_official_csv_files(tmp_path, expected, output, kind, here, there):
    texts = {cell: [("word", "word"), ("word", "word")] for cell in BY_HAND}
    texts["retain", "Task2", kind] = [(expected, output)] * 2
    rows = completions(texts)
    write(tmp_path / "completions.jsonl", rows)
    place = {"sc": 0, "qa": 1}[kind]
    assert list(score(tmp_path)["retain-set"]["Task2"].values())[place] == pytest.approx(here)
    assert through_csv(rows, tmp_path)["retain"][4 + place] == pytest.approx(there)


def test_mmlu_average_weighs_questions_not_subjects():
    right, wrong = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]
    rows = [{"subject": "a", "answer": "A", "probs": right}] * 1 + [{"subject": "b", "answer": "A", "probs": wrong}] * 3
    assert mmlu_accuracy(rows) == 0.25


def test_categories_file(by_hand):
    score(by_hand, "--mmlu", by_hand / "mmlu.jsonl", "--categories", by_hand / "categories.json")
    text = (by_hand / "categories.json").read_text(encoding="utf-8")
    table = json.loads(text)
    assert text == json.dumps(table, indent=2) + "\n"
    assert table["subjects"]["anatomy"] == {"accuracy": 0.5, "questions": 2}
    assert table["subjects"]["marine knots"] == {"accuracy": 1, "questions": 1}
    assert table["subcategories"] == {
        "physics": {"accuracy": 0, "questions": 1},
        "health": {"accuracy": pytest.approx(2 / 3), "questions": 3},
    }
    assert table["categories"] == {
        "STEM": {"accuracy": 0, "questions": 1},
        "other (business, health, misc.)": {"accuracy": pytest.approx(2 / 3), "questions": 3},
    }


def test_mmlu_has_57_subjects_in_17_subcategories_of_4_categories():
    subcategories = [name for parts in CATEGORIES.values() for name in parts]
    subjects = [subject for parts in CATEGORIES.values() for names in parts.values() for subject in names]
    assert (len(subjects), len(subcategories), len(CATEGORIES)) == (57, 17, 4)
    assert len(set(subjects)) == 57 and len(set(subcategories)) == 17
    # subjects by category, as the MMLU paper's table counts them
    assert [sum(map(len, parts.values())) for parts in CATEGORIES.values()] == [18, 13, 12, 14]


def test_the_categories_know_every_real_subject(real_mmlu):
    files = {path.name.removesuffix("_test.csv") for path in (real_mmlu / "test").glob("*_test.csv")}
    assert files == {subject for parts in CATEGORIES.values() for names in parts.values() for subject in names}


def test_copying_the_expected_real_outputs_scores_one(real_data, tmp_path):
    """Real rows, answered perfectly: knowledge is 1; regurgitation is 1 but for texts without a-z and 0-9."""
    rows = []
    for side in ("forget", "retain"):
        frame = pandas.read_parquet(next(real_data.glob(f"{side}_validation*.parquet")))
        rows += [
            {**row, "split": side, "expected_output": row["output"], "model_output": row["output"], "nll": 0.1}
            for row in frame.drop(columns=["split"], errors="ignore").to_dict("records")
        ]
    write(tmp_path / "completions.jsonl", rows)
    results = score(tmp_path)
    assert len(rows) == 254 + 278
    assert fmean(results["aggregated-terms"][6:]) == 1
    assert results["harmonic-mean-task-aggregate"] == 0


def broken(rows: list[dict], number: int, **change: object) -> list[dict]:
    return [{**row, **change} if index == number - 1 else row for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("completions", {"task": "Task4"}, r"completions.jsonl: row 3: field 'task': 'Task4'"),
        ("completions", {"split": "forgotten"}, r"completions.jsonl: row 3: field 'split': 'forgotten'"),
        ("completions", {"id": "Task1-7"}, r"completions.jsonl: row 3: field 'id'"),
        ("completions", {"model_output": None}, r"completions.jsonl: row 3: field 'model_output'"),
        ("membership", {"nll": None}, r"membership.jsonl: row 3: field 'nll'"),
        ("membership", {"nll": float("inf")}, r"membership.jsonl: .*"),
        ("membership", {"set": "other"}, r"membership.jsonl: row 3: field 'set': 'other'"),
        ("mmlu", {"answer": "E"}, r"mmlu.jsonl: row 3: field 'answer': 'E'"),
        ("mmlu", {"probs": [0.1, 0.2, 0.3]}, r"mmlu.jsonl: row 3: field 'probs'"),
    ],
)
def test_wrong_rows_are_named_and_nothing_is_written(by_hand, file, change, message):
    path = by_hand / f"{file}.jsonl"
    write(path, broken([json.loads(line) for line in path.read_text().splitlines()], 3, **change))
    with pytest.raises(BadInput, match=message):
        score(by_hand, "--membership", by_hand / "membership.jsonl", "--mmlu", by_hand / "mmlu.jsonl")
    assert not (by_hand / "out.jsonl").exists()


def test_a_loss_beyond_floating_point_is_named(by_hand):
    path = by_hand / "membership.jsonl"
    path.write_text(path.read_text().replace("4.0", "1e999"), encoding="utf-8")
    with pytest.raises(BadInput, match=r"membership.jsonl: row 5: field 'nll': inf is greater than the maximum"):
        score(by_hand, "--membership", path)


def test_a_missing_cell_or_set_is_named(by_hand):
    path = by_hand / "membership.jsonl"
    write(path, [row for row in map(json.loads, path.read_text().splitlines()) if row["set"] == "member"])
    with pytest.raises(BadInput, match=r"membership.jsonl: no row of one of the sets member, nonmember"):
        score(by_hand, "--membership", path)
    path = by_hand / "completions.jsonl"
    write(path, [row for row in map(json.loads, path.read_text().splitlines()) if "Task3" not in row["id"]])
    with pytest.raises(BadInput, match=r"completions.jsonl: no sc row of Task3 on the forget side"):
        score(by_hand)


def test_categories_without_mmlu_is_a_usage_error(by_hand, capsys):
    with pytest.raises(SystemExit) as stop:
        score(by_hand, "--categories", by_hand / "categories.json")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --categories needs --mmlu\n")


@pytest.mark.parametrize("flag", ["--completions", "--output"])
def test_what_is_read_and_written_must_be_named(by_hand, capsys, flag):
    words = {"--completions": "completions.jsonl", "--output": "out.jsonl"}
    with pytest.raises(SystemExit) as stop:
        main([word for name, file in words.items() if name != flag for word in (name, str(by_hand / file))])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: the following arguments are required: {flag}\n")
