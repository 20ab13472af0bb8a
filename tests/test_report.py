"""The report: its numbers are those of the files, no text becomes markup; a browser can filter, search and sort."""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline import report
from pipeline.lib.records import kind_of, write_jsonl
from pipeline.lib.stage import BadInput
from pipeline.score import evaluation_results

HOSTILE = [
    "<script>window.executed = 1</script>",
    "</script><script>window.executed = 2</script><!--",
    "<img src=x onerror='window.executed = 3'>",
    "{{ 7 * 7 }} & \"Quotes\" 'too' &lt; \N{SNOWMAN} \u2028 end",
]
MEMBERS = {"original": [0.1, 0.1, 0.2, 0.3], "unlearned": [1.9, 2.4, 2.0, 1.1]}
NONMEMBERS = {"original": [2.0, 2.5, 1.5], "unlearned": [2.1, 2.6, 1.6]}
AREAS = {"original": 1.0, "unlearned": 0.75}  # of 12 pairs, in how many the member's loss is lower: 12 and 9


def completion(row: dict[str, str], output: str) -> dict[str, Any]:
    named = {name: row[name] for name in ("id", "task", "split", "input")}
    return {**named, "expected_output": row["output"], "model_output": output, "nll": 1.5}


def write_checkpoint(folder: Path, name: str, completions: list[dict[str, Any]], repetition: float) -> None:
    write_jsonl(folder / "completions.jsonl", completions)
    tables = {"member": MEMBERS[name], "nonmember": NONMEMBERS[name]}
    losses = [{"id": str(n), "set": kind, "nll": v} for kind, values in tables.items() for n, v in enumerate(values)]
    write_jsonl(folder / "membership.jsonl", losses)
    write_jsonl(folder / "evaluation_results.jsonl", [evaluation_results(completions, AREAS[name], 0.625)])
    forget = {"outputs": 18, "empty": 2, "repetition": repetition, "log_likelihood": -3.25}
    held_out = {"source": "generated, seed 1", "texts": 200, "tokens": 9, "loss": 2.125}
    (folder / "fluency.json").write_text(json.dumps({"forget": forget, "held_out": held_out, "rows": []}))


@pytest.fixture
def results(tmp_path: Path, rows: dict[str, list[dict[str, str]]]) -> Path:
    """Results of both checkpoints. The untouched one recites all; the unlearned one writes hostile texts on forget."""
    everything = [row for side in ("forget", "retain") for row in rows[side]]
    before = [completion(row, row["output"]) for row in everything]
    after = [
        completion(row, HOSTILE[n % len(HOSTILE)] if row["split"] == "forget" else row["output"])
        for n, row in enumerate(everything)
    ]
    write_checkpoint(tmp_path / "original", "original", before, 0.0625)
    write_checkpoint(tmp_path / "unlearned", "unlearned", after, 0.4375)
    run = {"settings": {"beta": "<b>2</b>"}, "wall_seconds": 35.4, "peak_memory_bytes": 3 * 2**30}
    (tmp_path / "run.json").write_text(json.dumps(run))
    table = "| place | system | final |\n|---|---|---:|\n| **1** | **t\\_x <i>markup</i>** | **0.5** |\n"
    (tmp_path / "leaderboard.md").write_text(f"# t among <i>published</i> rows\n\n{table}\nA note.\n")
    (tmp_path / "benchmarks").mkdir()
    for name, seconds, memory in (("unlearn", "42.0800", "697.49"), ("score.original", "0.01", "NA")):
        (tmp_path / "benchmarks" / f"{name}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:42\t{memory}\n")
    return tmp_path


def make(folder: Path, *words: str, stand_in: bool = True) -> str:
    paths = [f"--{name}={folder / name}" for name in ("original", "unlearned", "benchmarks")]
    paths += [f"--settings={folder / 'run.json'}", f"--leaderboard={folder / 'leaderboard.md'}"]
    sources = ["--model-source=made <b>here</b>", "--data-source=synthetic"]
    flags = ["--name=t", "--size=1B", *(["--stand-in"] if stand_in else []), *words]
    report.main([*paths, *sources, *flags, f"--output={folder / 'report.html'}"])
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would make of the page: elements, the cells of each table, the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.styles = ""
        self.words = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attrs).get("id") or "unnamed", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
            return
        if self.inside == "style":
            self.styles += data
            return
        self.words += data
        if self.inside in ("td", "th", "small", "strong") and self.tables:
            self.rows[-1][-1] += data.strip()

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_scores_are_those_of_the_result_files(results: Path):
    table = Page(make(results)).tables["score-table"]
    found = [json.loads((results / c / "evaluation_results.jsonl").read_text()) for c in ("original", "unlearned")]
    keys = ["aggregate-score", "harmonic-mean-task-aggregate", "mia_final_score", "mia_loss_acc", "mmlu_average"]
    assert [row[0] for row in table[1:]] == ["final", "task aggregate", "MIA score", "MIA AUC", "multiple choice"]
    assert [row[1:] for row in table[1:]] == [[f"{result[key]:.3f}" for result in found] for key in keys]


@pytest.fixture
def study(results: Path) -> Path:
    """The files of a study, with markup in them."""
    folder = results / "study"
    (folder / "claims").mkdir(parents=True)
    (folder / "layers.json").write_text(json.dumps({"best": {"rmu": 1, "adaptive": 5}}))
    for name in ("layers.svg", "claims/noise.svg"):
        (folder / name).write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    claims = [
        {
            "claim": name,
            "statement": f"statement {name} <i>",
            "verdict": verdict,
            "figure": "noise.svg",
            "conditions": [{"condition": "<b>first</b>", "holds": holds, "evidence": "p = .01"}],
        }
        for name, verdict, holds in (("C1", "reproduced", True), ("C4", "not reproduced", False))
    ]
    (folder / "claims.json").write_text(json.dumps(claims))
    return folder


def test_without_a_study_the_page_has_none_of_its_sections(results: Path):
    assert not {"layers", "peers", "claims"} & {attributes.get("id") for _, attributes in Page(make(results)).elements}


def test_the_study_is_shown_and_its_markup_is_text(results: Path, study: Path):
    (study / "comparison.md").write_text("# Systems compared\n\n| system | final |\n|---|---|\n| npo <u>x</u> | .5 |\n")
    page = Page(make(results, f"--study={study}"))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {"layers", "peers", "claims"} <= ids and "Systems compared" in page.words
    assert "RMU at block 1, Adaptive RMU at block 5" in page.words
    assert "holds: <b>first</b>. p = .01" in page.words and "does not hold: <b>first</b>" in page.words
    assert [row[-1] for row in page.tables["claims-table"][1:]] == ["reproduced", "not reproduced"]
    assert not {"i", "u"} & {tag for tag, _ in page.elements}
    sources = [image["src"] for image in page.named("img")]
    assert sum("data:image/svg+xml" in source for source in sources) == 4  # two of losses, layers, claims


def test_a_study_without_a_comparison_shows_the_rest(results: Path, study: Path):
    ids = {attributes.get("id") for _, attributes in Page(make(results, f"--study={study}")).elements}
    assert "claims" in ids and "peers" not in ids


def test_a_missing_picture_of_the_study_is_named(results: Path, study: Path):
    (study / "claims" / "noise.svg").unlink()
    with pytest.raises(BadInput, match=r"claims/noise\.svg: no such file"):
        make(results, f"--study={study}")


def test_a_score_that_was_not_measured_is_missing(results: Path):
    for checkpoint in ("original", "unlearned"):
        path = results / checkpoint / "evaluation_results.jsonl"
        result = json.loads(path.read_text())
        del result["mia_final_score"], result["mia_loss_acc"], result["mmlu_average"]
        write_jsonl(path, [{**result, "aggregate-score": -1}])
    table = {row[0]: row[1:] for row in Page(make(results)).tables["score-table"]}
    assert table["final"] == table["MIA score"] == table["MIA AUC"] == table["multiple choice"] == ["missing"] * 2
    assert table["task aggregate"] != ["missing"] * 2


def test_the_twelve_values_stand_apart_by_side_and_checkpoint(results: Path):
    table = Page(make(results)).tables["task-table"]
    # The untouched model recites all; of the unlearned one every forget answer is hostile, every retain one right.
    assert [row[1:] for row in table[2:]] == [["1.00", "0.00", "1.00", "1.00"]] * 6
    kinds = ("regurgitation", "knowledge")
    assert [row[0] for row in table[2:]] == [f"Task{n} {kind}3 + 3 rows" for n in (1, 2, 3) for kind in kinds]


@pytest.mark.parametrize("stand_in", [True, False])
def test_a_stand_in_is_said_to_be_one(results: Path, stand_in: bool):
    words = " ".join(Page(make(results, stand_in=stand_in)).words.split())
    assert ("A stand-in's number is never a leaderboard number." in words) == stand_in
    assert ("not leaderboard numbers" in words) == stand_in
    assert ("Measured by this project on the organisers' 1B model" in words) != stand_in


def test_fluency_and_cost_are_those_of_the_files(results: Path):
    tables = Page(make(results)).tables
    assert [row[1:] for row in tables["fluency-table"][1:]] == [
        ["0.062", "0.438"],
        ["2", "2"],
        ["-3.25", "-3.25"],
        ["2.12", "2.12"],
    ]
    assert tables["cost-table"][1:] == [
        ["unlearn", "", "42.1", "697"],
        ["score", "untouched", "0.0", "too short"],
        ["sum", "42.1", ""],
    ]


def test_a_benchmark_without_numbers_is_named(results: Path):
    (results / "benchmarks" / "unlearn.tsv").write_text("s\th:m:s\nfast\t0:00\n")
    with pytest.raises(BadInput, match=r"unlearn\.tsv: not Snakemake's benchmark"):
        make(results)


def test_the_leaderboard_is_shown_as_it_was_written(results: Path):
    page = Page(make(results))
    assert page.tables["unnamed"] == [["place", "system", "final"], ["1", "t_x <i>markup</i>", "0.5"]]
    assert "t among <i>published</i> rows" in page.words
    assert page.named("i") == []


def test_without_a_leaderboard_there_is_no_page(results: Path):
    (results / "leaderboard.md").unlink()
    with pytest.raises(BadInput, match=r"leaderboard\.md: no such file"):
        make(results)


def test_rows_reach_the_page_letter_by_letter_and_none_as_markup(results: Path):
    text = make(results)
    page = Page(text)
    shown = json.loads(page.scripts[0])
    completions = [
        [json.loads(line) for line in (results / c / "completions.jsonl").read_text("utf-8").split("\n") if line]
        for c in ("original", "unlearned")
    ]
    for row, before, after in zip(shown, *completions, strict=True):
        assert (row["id"], row["task"], row["side"]) == (before["id"], before["task"], before["split"])
        assert (row["prompt"], row["expected"]) == (before["input"], before["expected_output"])
        assert (row["original"], row["unlearned"]) == (before["model_output"], after["model_output"])
    assert {row["unlearned"] for row in shown} >= set(HOSTILE)
    # The data, the library and our settings of it; two pictures; no bold text but ours.
    assert len(page.scripts) == 3
    assert [bool(picture["src"].startswith("data:image/svg+xml;base64,")) for picture in page.named("img")] == [
        True
    ] * 2
    assert "<b>2</b>" in page.words
    assert "made <b>here</b>" in page.words
    assert "executed" not in page.scripts[1] + page.scripts[2] + page.words
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_a_row_has_the_score_of_its_kind(results: Path):
    rows = []
    for number, (kind, expected, output) in enumerate(
        [
            ("sc", "one two three four", "four one two"),  # in order: one two
            ("sc", "one two", "two\none two"),
            ("qa", "One Two", " one two\n"),
            ("qa", "one two", "one two three"),
        ]
    ):
        row = {"id": f"x{number}{kind}1", "task": "Task1", "split": "forget", "input": "?", "output": expected}
        rows.append(completion(row, output))
    before = [{**row, "model_output": row["expected_output"]} for row in rows]
    shown = report.examples(before, rows, results)
    assert [(row["kind"], row["before"], row["after"]) for row in shown] == [
        ("sc", 1, 0.5),
        ("sc", 1, 1),
        ("qa", 1, 1),
        ("qa", 1, 0),
    ]


def test_rows_of_other_prompts_are_refused(results: Path):
    path = results / "unlearned" / "completions.jsonl"
    lines = path.read_text("utf-8").split("\n")
    for changed, message in ((lines[1:], "row 1: "), (lines[:-2], "35 rows, the original has 36")):
        path.write_text("\n".join(changed), "utf-8")
        with pytest.raises(BadInput, match=rf"unlearned.completions\.jsonl: {message}"):
            make(results)


def test_a_set_without_a_loss_is_refused(results: Path):
    write_jsonl(results / "original" / "membership.jsonl", [{"id": "0", "set": "member", "nll": 1.0}])
    with pytest.raises(BadInput, match=r"membership\.jsonl: no row with set 'nonmember'"):
        make(results)


def test_a_fluency_file_without_its_values_is_refused(results: Path):
    (results / "original" / "fluency.json").write_text('{"forget": {"outputs": 1}, "held_out": {}}')
    with pytest.raises(BadInput, match=r"fluency\.json: \$\.(forget|held_out)"):
        make(results)


# ---- the pictures ----

SVG = {"svg": "http://www.w3.org/2000/svg"}


def pictures(text: str) -> list[ElementTree.Element]:
    addresses = [str(picture["src"]).partition(",")[2] for picture in Page(text).named("img")]
    return [ElementTree.fromstring(base64.b64decode(address)) for address in addresses]


def words_of(picture: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()).strip() for text in picture.iterfind(".//svg:text", SVG)]


def test_both_pictures_have_the_same_axes_and_say_how_many_documents(results: Path):
    before, after = (words_of(picture) for picture in pictures(make(results)))
    assert before == after
    assert {"members (forget documents): 4", "non-members: 3", "share of documents"} <= set(before)


def tops(picture: ElementTree.Element, colour: str) -> set[float]:
    """The heights, in points above the axis, of the filled steps of a colour."""
    found = [path for path in picture.iterfind(".//svg:path", SVG) if f"fill: {colour}" in (path.get("style") or "")]
    assert len(found) == 1
    heights = [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", found[0].get("d") or "")]
    return {round(max(heights) - height, 2) for height in heights}


def test_the_steps_are_as_high_as_the_shares(results: Path):
    before = pictures(make(results))[0]
    # Bins are (2.6 - .1) / 30 wide: of 4 members two are in the first, the others alone; non-members are all apart.
    half, quarter = sorted(tops(before, "#0072b2"), reverse=True)[:2]
    assert quarter == pytest.approx(half / 2, abs=0.02)
    assert max(tops(before, "#d55e00")) == pytest.approx(half * 2 / 3, abs=0.02)


def test_medians_and_areas_stand_beside_the_pictures(results: Path):
    words = " ".join(Page(make(results)).words.split())
    assert "untouched: AUC 1.00. Median loss: members 0.15, non-members 2.00" in words
    assert "unlearned: AUC 0.75. Median loss: members 1.95, non-members 2.10" in words
    # Of 4 and 3 documents: the area has the variance 8 / 144, and the mean of |x| is sqrt(2 / pi) of its deviation.
    assert "4 of them among 3 would have a MIA score of 0.62 ± 0.28" in words


# ---- one file, whole in itself ----


def test_the_page_asks_the_network_for_nothing(results: Path):
    text = make(results)
    page = Page(text)
    addresses = [value or "" for _, attributes in page.elements for name, value in attributes.items()
                 if name in ("src", "href", "action", "srcset", "data")]  # fmt: skip
    assert len(addresses) >= 8
    assert [address for address in addresses if not address.startswith(("#", "data:image/svg+xml;base64,"))] == []
    assert page.named("link") == page.named("iframe") == page.named("base") == []
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in str(policies[0])
    assert len(page.styles) > 10_000
    assert not re.search(r"url\(|@import", page.styles)
    assert "sourceMappingURL" not in text


def test_every_link_leads_to_a_section(results: Path):
    page = Page(make(results))
    sections = {section["id"] for section in page.named("section")}
    links = {str(link["href"]).removeprefix("#") for link in page.named("a")}
    assert links
    assert links == sections - {"what"}


def test_the_same_files_give_the_same_page(results: Path):
    assert make(results) == make(results)


def test_the_table_library_is_the_one_that_its_readme_names(results: Path):
    readme = (report.ASSETS / "README.md").read_text()
    version = re.search(r"Tabulator\]\(https://tabulator\.info\) ([\d.]+)", readme)
    assert version
    assert f"Tabulator v{version[1]} " in (report.ASSETS / "tabulator.min.js").read_text()[:60]
    for name in ("tabulator.min.js", "tabulator_simple.min.css"):
        assert hashlib.sha256((report.ASSETS / name).read_bytes()).hexdigest()[:8] + "…" in readme
    assert "Permission is hereby granted, free of charge" in make(results)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="NOT RUN: playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("NOT RUN: no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def many_rows() -> list[dict[str, str]]:
    """As many rows as a real target has, long ones among them; each has its number in its prompt."""
    return [
        {
            "id": f"d{n}{'sc1' if n % 3 else 'qa0'}",
            "task": f"Task{n % 3 + 1 if n % 2 else 2}",
            "split": "forget" if n % 4 < 2 else "retain",
            "input": f"prompt number {n} with{' more words' * (n % 40)}",
            "output": " ".join(f"w{k}" for k in range(1 + n % 90)),
        }
        for n in range(2800)
    ]


@pytest.fixture
def opened(results: Path, browser: Any) -> Iterator[Any]:
    """The page of 2,800 rows, opened from its file; whatever it complains about or asks for is kept."""
    everything = many_rows()
    before = [completion(row, row["output"]) for row in everything]
    after = [completion(row, " ".join(row["output"].split()[: n % 7])) for n, row in enumerate(everything)]
    for number, text in enumerate(HOSTILE):
        after[number]["model_output"] = text
        before[number]["input"] = after[number]["input"] = f"hostile {text}"
    for name, rows in (("original", before), ("unlearned", after)):
        write_jsonl(results / name / "completions.jsonl", rows)
    make(results)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.noticed = []
    page.on("console", lambda message: page.noticed.append(message.text))
    page.on("pageerror", lambda error: page.noticed.append(str(error)))
    page.on("request", lambda request: page.noticed.append(request.url))
    page.goto((results / "report.html").as_uri())
    page.wait_for_selector(".tabulator-row")
    yield page
    page.close()


def cells(page: Any, field: str) -> list[str]:
    return page.locator(f".tabulator-row .tabulator-cell[tabulator-field='{field}']").all_inner_texts()


def counted(page: Any) -> str:
    return page.locator(".tabulator-page-counter").inner_text()


@pytest.mark.slow
def test_the_page_opens_with_its_first_rows_and_executes_none(opened: Any, results: Path):
    assert opened.noticed == [(results / "report.html").as_uri()]
    assert counted(opened) == "Showing 1-20 of 2800 rows"
    assert [text.split()[0] for text in cells(opened, "prompt")] == ["hostile"] * 4 + ["prompt"] * 16
    assert cells(opened, "unlearned")[:3] == HOSTILE[:3]
    assert opened.evaluate("window.executed") is None


@pytest.mark.slow
def test_rows_are_filtered_by_side_task_and_kind_together(opened: Any):
    chosen = {"side": "retain", "task": "Task3", "kind": "sc"}
    for name, value in chosen.items():
        opened.select_option(f"#controls [name={name}]", value)
    fitting = [
        row for row in many_rows() if (row["split"], row["task"], kind_of(row["id"])) == ("retain", "Task3", "sc")
    ]
    assert 20 < len(fitting) < 2800
    assert counted(opened) == f"Showing 1-20 of {len(fitting)} rows"
    assert cells(opened, "prompt") == [row["input"] for row in fitting[:20]]
    for name, value in chosen.items():
        assert set(cells(opened, name)) == {value}
        opened.select_option(f"#controls [name={name}]", "")
    assert counted(opened) == "Showing 1-20 of 2800 rows"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("needle", "count"),
    [("PROMPT NUMBER 2799 ", 1), ("d2798sc1", 1), ("window.executed = 3", 1), ('"quotes"', 1), ("nowhere at all", 0)],
)
def test_rows_are_searched_in_all_texts_and_ids(opened: Any, needle: str, count: int):
    opened.fill("#controls [name=search]", needle)
    assert len(cells(opened, "prompt")) == count
    assert opened.evaluate("window.executed") is None


@pytest.mark.slow
def test_rows_are_sorted_by_a_click_on_a_score_lowest_or_highest_first(opened: Any):
    opened.select_option("#controls [name=side]", "forget")
    title = opened.locator(".tabulator-col[tabulator-field='after'] .tabulator-col-title")
    scores = []
    for _ in range(2):
        title.click()
        scores.append([float(text) for text in cells(opened, "after")])
    assert scores == [[0.0] * 20, [1.0] * 20]
    opened.locator(".tabulator-page[data-page=last]").click()
    assert [float(text) for text in cells(opened, "after")] == [0.0] * len(cells(opened, "after"))


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(opened: Any, width: int):
    opened.set_viewport_size({"width": width, "height": 900})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.locator("#controls [name=sort]").is_visible() == (width == 390)


@pytest.mark.slow
def test_on_a_narrow_window_a_row_is_a_card_and_sorting_a_choice(opened: Any):
    opened.set_viewport_size({"width": 390, "height": 900})
    opened.select_option("#controls [name=sort]", "after desc")
    assert cells(opened, "after") == ["1.00"] * 20
    boxes = [
        opened.locator(f".tabulator-row >> nth=0 >> .tabulator-cell[tabulator-field='{field}']").bounding_box()
        for field in ("prompt", "expected", "original", "unlearned")
    ]
    assert all(upper["y"] + upper["height"] <= lower["y"] + 1 for upper, lower in pairwise(boxes))
    assert all(box["width"] > 300 for box in boxes)
    opened.select_option("#controls [name=sort]", "number asc")
    assert cells(opened, "prompt")[0].startswith("hostile")
