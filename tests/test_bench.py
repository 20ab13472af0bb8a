"""The measurements: both sides of each, on something small, must give the same results."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import chain, completion, descent, questions, seven
from bench.measure import Side, alone, relative
from pipeline.lib.records import SETS, SIDES, write_jsonl
from tests.conftest import make_rows
from tests.test_measure import QUESTIONS, write_csv


def test_both_descents_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = {"WIDTH": 64, "INTERMEDIATE": 128, "HEADS": 4, "REFERENCE_EPOCHS": 2}
    for name, value in small.items():
        monkeypatch.setattr(descent, name, value)
    rows = {side: {task: lengths[4:6] for task, lengths in table.items()} for side, table in descent.LENGTHS.items()}
    monkeypatch.setattr(descent, "LENGTHS", rows)
    descent.prepare(tmp_path / "olmo")
    plain, fast = descent.reference(tmp_path / "olmo"), descent.ours(tmp_path / "olmo")
    assert relative(fast.values["losses"][:2], plain.values["losses"]) < 1e-5
    ours, theirs = (load_file(tmp_path / "olmo" / f"{name}.safetensors.out") for name in ("ours", "reference"))
    original = load_file(tmp_path / "olmo" / "model.safetensors")
    for key, weight in theirs.items():
        moved = (weight - original[f"model.layers.{key}.mlp.down_proj.weight"]).abs().max()
        assert (ours[key] - weight).abs().max() < 0.02 * moved
    saved, patched = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "patched"))
    assert saved.keys() == patched.keys()


def test_both_completions_give_the_same_rows(checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(completion, "MAX_NEW_TOKENS", 12)
    plain, fast = (side(checkpoint, data, 5, torch.float32, 1) for side in (completion.reference, completion.ours))
    assert len(plain.values["full"]) == 10
    for row, expected in zip(fast.values["full"], plain.values["full"], strict=True):
        assert row.pop("nll") == pytest.approx(expected.pop("nll"), rel=1e-5)
        assert row == expected


def test_both_ways_to_ask_give_the_same_probabilities(checkpoint: Path, tmp_path: Path):
    for subject in questions.SUBJECTS:
        write_csv(tmp_path, QUESTIONS, subject)
    plain, fast = (side(checkpoint, tmp_path, 1) for side in (questions.reference, questions.ours))
    assert len(plain.values["probabilities"]) == 2 * len(questions.SUBJECTS)
    for row, expected in zip(fast.values["probabilities"], plain.values["probabilities"], strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


def test_the_chain_unlearns_and_evaluates_every_row_of_a_model_made_for_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for fold in ("train", "validation"):
        for side in SIDES:
            rows = [{key: row[key] for key in ("id", "input", "output", "task")} for row in make_rows(side)]
            write_jsonl(tmp_path / "data" / fold / side / f"{side}.jsonl", rows)
    for name in SETS:
        write_jsonl(tmp_path / "data" / "mia" / f"{name}.jsonl", [{"id": name, "document": "the city of a river"}])
    for subject in questions.SUBJECTS:
        write_csv(tmp_path / "mmlu", QUESTIONS, subject)
    small = {"BLOCKS": 3, "WIDTH": 64, "INTERMEDIATE": 96}
    for module, more in ((seven, {}), (chain, {"HEADS": 4, "MEMORISING": 1.0, "MAX_NEW_TOKENS": 4})):
        for name, value in (small | more).items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(completion, "MAX_NEW_TOKENS", 4)
    for name, value in {"TOKENIZER": checkpoint, "DATA": tmp_path / "data", "MMLU": tmp_path / "mmlu"}.items():
        monkeypatch.setattr(chain, name, value)
    monkeypatch.setattr(chain, "alone", lambda side, *arguments: side(*arguments))
    for name, measure in (("7B", chain.measure), ("1B", chain.measure_memorised)):
        (tmp_path / name).mkdir()
        found = measure(tmp_path / name)
        assert [one.name for one in found] == [
            f"{what}: {name}'s shape" for what in ("unlearning", "completion", "mmlu")
        ]
        assert [one.shape.split(" rows")[0] for one in found] == ["36", "36", "12"]
        assert all(one.ours > 0 and one.reference > 0 for one in found)
        changed = {
            key
            for key, weight in weights(tmp_path / name / "unlearned").items()
            if not torch.equal(weight, weights(tmp_path / name / ("seven" if name == "7B" else "scale"))[key])
        }
        assert changed == {f"model.layers.{index}.mlp.down_proj.weight" for index in range(3)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_a_side_runs_in_a_process_of_its_own_and_its_peak_is_measured():
    side = alone(allocate, 300)
    assert side.peak > 300 << 20
    assert side.peak > alone(allocate, 1).peak + (250 << 20)


def allocate(megabytes: int) -> Side:
    return Side(values={"sum": int(torch.ones(megabytes << 20, dtype=torch.uint8).sum())})
