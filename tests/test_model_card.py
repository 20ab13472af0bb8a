"""The model card: what the hub reads from it, what a reader does, and what must never be in it."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pipeline.lib.stage import BadInput
from pipeline.model_card import main
from tests.conftest import ROOT

RUN = {
    "settings": {"method": "solve", "beta": 2.0, "trained": [0, 1]},
    "versions": {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": "a machine",
    "wall_seconds": 61.4,
    "peak_memory_bytes": 2_500_000_000,
}
# Of the unlearned model each of the twelve values is another one, so that none can stand in the place of another.
VALUES = {
    (side, task, kind): round(0.01 + 0.05 * n, 2)
    for n, (side, task, kind) in enumerate(
        (side, task, kind)
        for side in ("forget", "retain")
        for task in ("Task1", "Task2", "Task3")
        for kind in ("regurgitation", "knowledge")
    )
}
PARTS = {"harmonic-mean-task-aggregate": 0.7, "mia_final_score": 0.8, "mmlu_average": 0.42, "aggregate-score": 0.64}
METRIC = {"regurgitation": "rouge", "knowledge": "exact_match"}
TASK_MODEL = ["--model-source", "owner/memorised at main", "--data-source", "semeval25"]
STAND_IN = ["--stand-in", "--model-source", "made by pipeline.memorise", "--data-source", "synthetic"]


def results(values: dict[tuple[str, str, str], float], **rest: float) -> dict:
    found: dict = dict(rest)
    for (side, task, kind), value in values.items():
        found.setdefault(f"{side}-set", {}).setdefault(task, {})[f"{kind}-score"] = value
    return found


def card(folder: Path, *words: str, run: dict = RUN, parts: dict = PARTS, name: str = "mine") -> str:
    """Run the stage and return the text of the card."""
    untouched = results(dict.fromkeys(VALUES, 1.0), **{"harmonic-mean-task-aggregate": 0.0, "aggregate-score": -1})
    for file, value in (("run.json", run), ("after", results(VALUES, **parts)), ("before", untouched)):
        (folder / file).write_text(json.dumps(value) + "\n")
    files = ["--run", folder / "run.json", "--results", folder / "after", "--original", folder / "before"]
    options = ["--name", name, "--size", "7B", "--sources", ROOT / "data" / "sources.yaml"]
    main([str(word) for word in (*files, *options, "--output", folder / "README.md", *words)])
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_hub_reads_every_score(tmp_path: Path):
    card(tmp_path, *TASK_MODEL)
    found = {
        (one.dataset_split, one.dataset_config, one.metric_name): (one.metric_type, one.metric_value)
        for one in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    expected = {key: (METRIC[key[2]], value) for key, value in VALUES.items()}
    expected[None, "all", "task aggregate"] = ("harmonic_mean", 0.7)
    expected[None, "membership", "MIA score"] = ("mia_score", 0.8)
    expected[None, "multiple choice", "MMLU accuracy"] = ("accuracy", 0.42)
    expected[None, "final", "final score"] = ("mean", 0.64)
    assert found == expected


def test_the_hub_reads_where_the_model_is_from(tmp_path: Path):
    card(tmp_path, *TASK_MODEL)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "owner/memorised"
    assert data.datasets == ["llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"]
    assert (data.language, data.library_name, data.pipeline_tag) == ("en", "transformers", "text-generation")
    assert (data.license, data.license_name) == ("other", "see-the-card")  # not stated by the organisers
    assert "stand-in" not in data.tags


def test_a_stand_in_is_called_one(tmp_path: Path):
    text = card(tmp_path, *STAND_IN)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None
    assert (data.license, data.datasets) == ("mit", None)
    assert "stand-in" in data.tags
    assert "Its numbers are not leaderboard numbers" in text


def test_the_table_sets_each_score_beside_the_untouched_one(tmp_path: Path):
    text = card(tmp_path, *TASK_MODEL)
    rows = dict(re.findall(r"^\| (.*? \| .*?) \| (.*? \| .*?) \|$", text, re.MULTILINE))
    for (side, task, kind), value in VALUES.items():
        assert rows[f"{side} {task} | {kind}"] == f"{value:.3f} | 1.000"
    assert rows["membership | MIA score"] == "0.800 | missing"
    assert rows["all | task aggregate"] == "0.700 | 0.000"
    assert "61 s on a machine, at most 2.5 GB of memory; python 3.12.1, torch 2.13.0, transformers 5.23.0." in text


def test_of_a_gpu_its_own_memory_is_told(tmp_path: Path):
    text = card(tmp_path, *TASK_MODEL, run={**RUN, "peak_accelerator_bytes": 41_230_000_000})
    assert "at most 2.5 GB of memory and 41.2 GB of the accelerator's; python" in text


def test_a_part_that_was_not_measured_is_no_result(tmp_path: Path):
    text = card(tmp_path, *TASK_MODEL, parts={"harmonic-mean-task-aggregate": 0.7, "aggregate-score": -1})
    named = {one.metric_name for one in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert named == {"regurgitation", "knowledge", "task aggregate"}
    assert "| final | final score | missing | missing |" in text


@pytest.mark.parametrize("secret", ["/home/someone/models", "hf_secret"])
def test_a_path_or_the_token_is_refused(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    run = {**RUN, "settings": {**RUN["settings"], "folder": secret}}
    with pytest.raises(BadInput, match=r"README.md: line \d+: an absolute path or the hub token"):
        card(tmp_path, *TASK_MODEL, run=run)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("words", "run", "message"),
    [
        (["--model-source", "x", "--data-source", "nowhere"], RUN, "sources.yaml: no source 'nowhere'"),
        (TASK_MODEL, {**RUN, "settings": {"method": "guess"}}, r"run.json: \$.settings.method: 'guess' is not one of"),
        (TASK_MODEL, {"settings": RUN["settings"]}, "run.json: .*'versions' is a required property"),
    ],
)
def test_wrong_input_is_refused(words: list[str], run: dict, message: str, tmp_path: Path):
    with pytest.raises(BadInput, match=message):
        card(tmp_path, *words, run=run)
    assert not (tmp_path / "README.md").exists()
