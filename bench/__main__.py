"""Measure our engines beside plain references, in one process tree on this machine.

Reads   models/<target>/original and results/<target>/unlearned of the stand-ins that have been made, their data, and
        MMLU's questions; what is not there is named and left out.
Writes  --output results.jsonl, one line per measurement: name, shape, ours, reference (seconds, but where the name
        says GB), ratio, goal, equality, peak_ours, peak_reference (bytes); and a table.
Run     python -m bench [descent completion mmlu seven chain scale] --output bench/results.jsonl

Measure on a quiet machine: the ratio of two sides that run one after the other is wrong when anything else runs.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from bench import chain, completion, descent, questions, seven
from bench.measure import Measurement

GROUPS = ("descent", "completion", "mmlu")
BY_NAME = {"seven": seven.measure, "chain": chain.measure, "scale": chain.measure_memorised}  # only if asked for
MMLU = Path("data/raw/mmlu")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model folder to measure evaluation on, if it has been made."""

    name: str
    folder: str
    dataset: str
    goal: str
    rows: int | None = None  # of each side; None: all
    mmlu: bool = False  # measured on it, too
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


THREADS = 2  # of both sides, as the goals say; one row at a time gains little by the second, or nothing

CHECKPOINTS = (
    Checkpoint("tiny", "models/tiny/original", "synthetic", ">= 8", mmlu=True),
    Checkpoint(
        "tiny, unlearned", "results/tiny/unlearned", "synthetic", ">= 8", dtypes=(torch.float32, torch.bfloat16)
    ),
    Checkpoint("lume", "models/lume/original", "sample", ">= 8", mmlu=True),
    Checkpoint("lume, unlearned", "results/lume/unlearned", "sample", ">= 8"),
    Checkpoint("135M, base", "models/135m/base", "sample135m", ">= 3", rows=12, mmlu=True),
)


def measurements(groups: Sequence[str]) -> Iterator[Measurement]:
    """Yield all measurements of the groups that can be made here."""
    if "descent" in groups:
        with tempfile.TemporaryDirectory() as work:
            yield from descent.measure(Path(work))
    for name, measure in BY_NAME.items():
        if name in groups:
            with tempfile.TemporaryDirectory() as work:
                yield from measure(Path(work))
    for one in CHECKPOINTS:
        folder, data = Path(one.folder), Path("data/split") / one.dataset / "train"
        if not (folder / "model.safetensors").is_file() or not data.is_dir():
            print(f"NOT RUN: {one.name}: no {folder} or no {data}: snakemake makes them", file=sys.stderr)
            continue
        if "completion" in groups:
            for dtype in one.dtypes:
                goal = one.goal if dtype == torch.float32 else "-"
                yield from completion.measure(one.name, folder, data, goal, one.rows, dtype, THREADS)
        if "mmlu" in groups and one.mmlu:
            if MMLU.is_dir():
                yield from questions.measure(one.name, folder, MMLU, THREADS)
            else:
                print(f"NOT RUN: {one.name}: no {MMLU}: snakemake makes it", file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """Measure, write a line as soon as it is there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: descent completion mmlu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    for group in args.groups:
        if group not in (*GROUPS, *BY_NAME):
            parser.error(f"no group {group!r}: one of {', '.join((*GROUPS, *BY_NAME))}")
    table = []
    with args.output.open("w", encoding="utf-8") as stream:
        for one in measurements(args.groups or GROUPS):
            print(json.dumps({**dataclasses.asdict(one), "ratio": round(one.ratio, 2)}), file=stream, flush=True)
            sizes = [f"{peak / 1e9:.1f}" for peak in (one.peak_ours, one.peak_reference)]
            table.append(
                [one.name, one.shape, f"{one.ratio:.1f}", one.goal, one.ours, one.reference, *sizes, one.equality]
            )
    headers = ["", "shape", "ratio", "goal", "ours, s", "reference, s", "ours, GB", "reference, GB", "equality"]
    print(tabulate(table, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main(sys.argv[1:])
