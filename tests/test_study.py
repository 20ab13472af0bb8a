"""The study over many results: the sweep over blocks, the strengths of the peers, the comparison."""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from pipeline import comparison, layers, tune
from pipeline.lib.stage import BadInput
from tests.test_leaderboard import result


def write(folder: Path, task: float, mia: float | None, mmlu: float | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = result(task, mia, mmlu) | {"aggregated-terms": [task] * 12}
    (folder / "evaluation_results.jsonl").write_text(json.dumps(values) + "\n")


# ---- tune ----


def tuned(folder: Path, *strengths: str) -> dict:
    tune.main(
        ["--folder", str(folder), "--methods", "npo", "--strengths", *strengths, "--output", str(folder / "tuned.json")]
    )
    return json.loads((folder / "tuned.json").read_text())


def test_the_best_final_score_decides_the_strength(tmp_path: Path):
    for strength, task in (("0.25", 0.3), ("1", 0.6), ("4", 0.9)):
        write(tmp_path / f"npo.{strength}", task, 0.0, 0.0)
    found = tuned(tmp_path, "0.25", "1", "4")["npo"]
    assert found["strength"] == "4"
    assert found["finals"] == {"0.25": pytest.approx(0.1), "1": pytest.approx(0.2), "4": pytest.approx(0.3)}


def test_of_equal_strengths_the_published_one_is_chosen(tmp_path: Path):
    for strength in ("0.25", "1", "4"):
        write(tmp_path / f"npo.{strength}", 0.3, 0.3, 0.3)
    assert tuned(tmp_path, "0.25", "1", "4")["npo"]["strength"] == "1"


def test_a_trial_without_a_final_score_is_refused(tmp_path: Path):
    write(tmp_path / "npo.1", 0.3, None, 0.3)
    with pytest.raises(BadInput, match=r"npo\.1/evaluation_results\.jsonl: no final score"):
        tuned(tmp_path, "1")
    assert not (tmp_path / "tuned.json").exists()


# ---- comparison ----

# final scores by draw; the test of the difference is worked out by hand below
OURS = [0.9, 0.8, 0.85]
PEER = [0.6, 0.7, 0.5]


@pytest.fixture
def draws(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"tiny-{draw}" for draw in (1, 2, 3)]
    for folder, ours, peer in zip(folders, OURS, PEER, strict=True):
        for name, final in (
            ("unlearned", ours),
            ("original", 0.2),
            ("retrained", 0.95),
            ("methods/random_weights.1", 0.4),
            ("methods/npo.1", 0.3),
            ("methods/npo.4", peer),
        ):
            write(folder / name, final, final, final)
            written = {"outputs": 4, "empty": 0, "repetition": 1 - final, "log_likelihood": -final}
            if name.endswith("weights.1"):
                written |= {"empty": 4, "repetition": None, "log_likelihood": None}
            held_out = {"source": "corpus", "texts": 2, "loss": 2 + final}
            (folder / name / "fluency.json").write_text(json.dumps({"forget": written, "held_out": held_out}))
    (tmp_path / "tuned.json").write_text(json.dumps({"npo": {"strength": "4"}}))
    return folders


def compare(draws: list[Path], method: str = "npo") -> tuple[list[dict], str]:
    folder = draws[0].parent
    comparison.main(
        [
            *("--draws", *map(str, draws), "--methods", method, "--tuned", str(folder / "tuned.json")),
            *("--name", "tiny", "--output", str(folder / "c.json"), "--table", str(folder / "c.md")),
        ]
    )
    return json.loads((folder / "c.json").read_text()), (folder / "c.md").read_text()


def test_all_systems_are_compared_and_sorted_by_their_mean(draws: list[Path]):
    lines, table = compare(draws)
    order = ["memorised without the forget rows", comparison.OURS, "npo", "random weights", "npo", "untouched"]
    assert [line["system"] for line in lines] == order
    assert [line["strength"] for line in lines if line["system"] == "npo"] == ["tuned: x 4", "as published"]
    assert lines[1]["values"]["final"] == pytest.approx(OURS)
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert re.sub(r"\W+", " ", rows[1]).startswith(" aimed steering ours 0 850 0 050 0 850 0 050")
    assert len(rows) == 6 and "not leaderboard numbers" in " ".join(table.split())


def test_a_method_that_is_best_as_published_has_one_line(draws: list[Path]):
    (draws[0].parent / "tuned.json").write_text(json.dumps({"npo": {"strength": "1"}}))
    lines, _ = compare(draws)
    assert [line["strength"] for line in lines if line["system"] == "npo"] == ["as published, tuned"]


def test_what_the_score_does_not_see_stands_beside_it(draws: list[Path]):
    lines, table = compare(draws)
    ours = next(line for line in lines if line["system"] == comparison.OURS)["fluency"]
    assert ours["repetition"] == pytest.approx([0.1, 0.2, 0.15])
    assert ours["log_likelihood"] == pytest.approx([-0.9, -0.8, -0.85])
    assert ours["held_out"] == pytest.approx([2.9, 2.8, 2.85])
    rows = {row.split(" | ")[0]: row for row in table.splitlines()}
    assert rows[f"| **{comparison.OURS}**"].endswith("| 0.15 | -0.85 | 2.85 |")
    assert rows["| **random weights**"].endswith("| - | - | 2.40 |")  # it wrote nothing
    (draws[0] / "unlearned" / "fluency.json").write_text("{}")
    with pytest.raises(BadInput, match=r"unlearned/fluency\.json"):
        compare(draws)


def test_p_is_that_of_the_paired_t_test(draws: list[Path]):
    """Differences .3, .1, .35: t = mean / (sd / sqrt 3); for 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)."""
    lines, _ = compare(draws)
    differences = [a - b for a, b in zip(OURS, PEER, strict=True)]
    t = fmean(differences) / (stdev(differences) / 3**0.5)
    by_name = {(line["system"], line["strength"]): line["p"] for line in lines}
    assert by_name["npo", "tuned: x 4"] == pytest.approx(1 - t / (2 + t * t) ** 0.5, rel=1e-6)
    assert by_name[comparison.OURS, "-"] is None


def test_p_values_are_corrected_by_holm():
    """By hand: .01 x 4, then .02 x 3, .03 x 2 (no less than the one before), 1."""
    assert comparison.holm([0.03, None, 0.01, 0.02]) == pytest.approx([0.06, 1.0, 0.04, 0.06])
    assert comparison.holm([0.4, 0.9, 0.01]) == pytest.approx([0.8, 0.9, 0.03])


def test_each_method_counts_once_in_the_correction(draws: list[Path]):
    lines, _ = compare(draws)
    npo = [line for line in lines if line["system"] == "npo"]
    assert [line["p_holm"] for line in npo] == [
        pytest.approx(npo[0]["p"]),
        None,
    ]  # the only method, at its better setting
    assert all(line["p_holm"] is None for line in lines if line["system"] in (comparison.OURS, *comparison.CONTROLS))
    with pytest.raises(BadInput, match="expected at least two"):
        compare(draws[:1])


def test_a_method_that_was_not_tuned_is_refused(draws: list[Path]):
    with pytest.raises(BadInput, match=r"tuned\.json: no 'sugd' in it"):
        compare(draws, "sugd")


def test_a_draw_without_a_final_score_is_refused(draws: list[Path]):
    write(draws[1] / "retrained", 0.9, None, 0.9)
    with pytest.raises(BadInput, match=r"tiny-2/retrained: no final score"):
        compare(draws)
    assert not (draws[0].parent / "c.json").exists()


# ---- layers ----


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of blocks 2 to 4; RMU is best at block 2, Adaptive RMU at block 4."""
    write(tmp_path / "original", 0.0, 0.0, 0.9)
    for seed in (0, 1):
        for n, block in enumerate((2, 3, 4)):
            write(tmp_path / "sweep" / f"rmu.{block}.{seed}", 0.6 - 0.2 * n + 0.1 * seed, 0.5, 0.5)
            write(tmp_path / "sweep" / f"adaptive.{block}.{seed}", 0.6 + 0.1 * n + 0.1 * seed, 0.5, 0.5)
    return tmp_path


def swept(folder: Path, blocks: int = 5) -> dict:
    layers.main(
        [
            *("--original", str(folder / "original" / "evaluation_results.jsonl"), "--sweep", str(folder / "sweep")),
            *("--blocks", str(blocks), "--seeds", "2", "--output", str(folder / "layers.json")),
            *("--picture", str(folder / "layers.svg")),
        ]
    )
    return json.loads((folder / "layers.json").read_text())


def test_the_sweep_holds_every_method_block_and_seed(sweep: Path):
    found = swept(sweep)
    assert found["best"] == {"rmu": 2, "adaptive": 4}
    assert len(found["rows"]) == 12
    (row,) = [row for row in found["rows"] if (row["method"], row["block"], row["seed"]) == ("adaptive", 4, 1)]
    assert row["task_aggregate"] == pytest.approx(0.9) and row["final"] == pytest.approx((0.9 + 0.5 + 0.5) / 3)
    assert layers.spread(found["rows"], "rmu", 2, "task_aggregate") == (
        pytest.approx(0.65),
        pytest.approx(0.1 / 2**0.5),
    )


def test_the_picture_names_both_methods_and_the_submitted_depth(sweep: Path):
    swept(sweep)
    text = (sweep / "layers.svg").read_text()
    for words in (
        "RMU, fixed coefficient",
        "Adaptive RMU",
        "untouched",
        "depth of the 2025 submission",
        "steered block",
    ):
        assert words in text


def test_a_missing_result_is_named(sweep: Path):
    with pytest.raises(BadInput, match=r"rmu\.5\.0/evaluation_results\.jsonl: no such file"):
        swept(sweep, blocks=6)
    with pytest.raises(BadInput, match="--blocks 2 --seeds 2: expected at least 3 and 2"):
        swept(sweep, blocks=2)
