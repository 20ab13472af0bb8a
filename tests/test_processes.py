"""Evaluation shared among processes: what two write together is what one writes alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.lib.records import read_table, write_jsonl
from tests.conftest import ROOT
from tests.test_measure import QUESTIONS, write_csv

pytestmark = pytest.mark.slow


def run(processes: int, *words: object) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_each_process_does_every_nth_item_and_the_first_one_writes(tmp_path: Path):
    """Also with fewer items than processes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.lib.processes import is_first, share
rank = os.environ["RANK"]
done = [share(lambda own: [f"{{item}} by {{rank}}" for item in own], range(count)) for count in (5, 1, 0)]
(pathlib.Path(sys.argv[1]) / f"rank-{{rank}}").write_text(repr((done, is_first())))
"""
    )
    run(2, script, tmp_path)
    done = [["0 by 0", "1 by 1", "2 by 0", "3 by 1", "4 by 0"], ["0 by 0"], []]
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}").read_text() == repr((done, rank == 0))


@pytest.mark.parametrize("stage", ["complete", "membership", "mmlu"])
def test_two_processes_write_what_one_writes(stage: str, checkpoint: Path, data: Path, tmp_path: Path):
    for name, words in (("member", "the river of the city"), ("nonmember", "who was born in the story")):
        documents = [
            {"id": str(n), "document": f"{words} {n}"} for n in range(3)
        ]  # three: two processes share unevenly
        write_jsonl(tmp_path / f"{name}.jsonl", documents)
    write_csv(write_csv(write_csv(tmp_path, QUESTIONS), QUESTIONS[::-1], "virology"), QUESTIONS, "nutrition")
    options = {
        "complete": ["--forget", data / "forget", "--retain", data / "retain", "--max-new-tokens", 8],
        "membership": ["--mia", tmp_path],
        "mmlu": ["--data", tmp_path],
    }[stage]
    for processes in (1, 2):
        run(
            processes,
            "-m",
            f"pipeline.{stage}",
            "--model",
            checkpoint,
            *options,
            "--output",
            tmp_path / f"{processes}.jsonl",
        )
    alone, together = (read_table(tmp_path / f"{processes}.jsonl") for processes in (1, 2))
    assert len(alone) == {"complete": 36, "membership": 6, "mmlu": 6}[stage]
    for one, other in zip(alone, together, strict=True):
        numbers = [(row.pop("nll", None), row.pop("probs", None)) for row in (one, other)]
        assert one == other
        assert numbers[0] == (pytest.approx(numbers[1][0]), pytest.approx(numbers[1][1]))
