"""Score against depth: RMU and Adaptive RMU at every block, over seeds of the steering directions.

Reads   --original  evaluation_results.jsonl of the untouched checkpoint (fields in score)
        --sweep     DIR/{rmu,adaptive}.<block>.<seed>/evaluation_results.jsonl, blocks from 2, seeds from 0
Writes  --output    layers.json: {"untouched": values, "rows": [values, method, block, seed], "best": {method: block}};
                    values: final, task_aggregate, mia, multiple_choice, terms (the twelve, forget first, as 1 - value)
        --picture   layers.svg: mean and standard deviation of the final score and its parts against the block
Run     python -m pipeline.layers --original results/tiny/original/evaluation_results.jsonl \\
            --sweep results/tiny/layers --blocks 8 --seeds 5 --output layers.json --picture layers.svg

Both methods change down_proj of blocks l-2 to l (arXiv 2403.03218), so the first is block 2; here at the minimum of
their loss, block after block. They differ in the coefficient alone: fixed, or a multiple of the activations' norm
(arXiv 2408.06223).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.lib.pictures import BLUE, GREY, ORANGE, svg
from pipeline.lib.published import WINDOW, parts, read_results
from pipeline.lib.stage import BadInput, run, whole_file

METHODS = {"rmu": ("RMU, fixed coefficient", ORANGE), "adaptive": ("Adaptive RMU", BLUE)}
VALUES = {
    "final": "final score",
    "task_aggregate": "task aggregate",
    "mia": "MIA score",
    "multiple_choice": "multiple choice",
}
FIRST = WINDOW - 1  # the first block with a whole window
SUBMITTED = 14 / 16  # relative depth of the block that arXiv 2506.16548 steered on OLMo 1B; 26 of 32 on 7B is near

Row = dict[str, Any]


def values(path: Path) -> Row:
    """Return the final score of an evaluation_results.jsonl, its parts and the twelve terms."""
    results = read_results(path)
    found = parts(results)
    return {
        "final": found.final,
        "task_aggregate": found.task_aggregate,
        "mia": found.mia,
        "multiple_choice": found.mmlu,
        "terms": results["aggregated-terms"],
    }


def sweep_rows(folder: Path, blocks: range, seeds: int) -> list[Row]:
    """Return the values of every method, block and seed."""
    return [
        {"method": method, "block": block, "seed": seed}
        | values(folder / f"{method}.{block}.{seed}" / "evaluation_results.jsonl")
        for method in METHODS
        for block in blocks
        for seed in range(seeds)
    ]


def spread(rows: Sequence[Row], method: str, block: int, name: str) -> tuple[float, float]:
    """Return mean and standard deviation over the seeds."""
    found = [row[name] for row in rows if (row["method"], row["block"]) == (method, block)]
    return fmean(found), stdev(found)


def best_blocks(rows: Sequence[Row], blocks: range) -> dict[str, int]:
    """Return by method the block with the highest mean final score."""
    return {method: max(blocks, key=lambda block: spread(rows, method, block, "final")[0]) for method in METHODS}


def picture(rows: Sequence[Row], untouched: Row, blocks: range) -> bytes:
    """Return an SVG of four panels, a value each, against the steered block."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for panel, (name, label) in zip(panels.flat, VALUES.items(), strict=True):
        for method, (words, colour) in METHODS.items():
            means, deviations = zip(*(spread(rows, method, block, name) for block in blocks), strict=True)
            panel.errorbar(blocks, means, deviations, color=colour, marker="o", markersize=4, capsize=3, label=words)
        panel.axhline(untouched[name], color=GREY, linestyle="--", linewidth=1, label="untouched")
        panel.axvline(
            SUBMITTED * blocks[-1], color=GREY, linestyle=":", linewidth=1, label="depth of the 2025 submission"
        )
        panel.set(title=label, ylim=(-0.03, 1.03))
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[1]:
        panel.set(xlabel="steered block")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return svg(figure)


def table(rows: Sequence[Row], blocks: range) -> Table:
    """Return the final scores for the terminal."""
    made = Table("block", *(words for words, _ in METHODS.values()), title="final score, mean and standard deviation")
    for block in blocks:
        cells = ["{:.3f} ± {:.3f}".format(*spread(rows, method, block, "final")) for method in METHODS]
        made.add_row(str(block), *cells)
    return made


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="evaluation_results.jsonl, untouched")
    parser.add_argument("--sweep", type=Path, required=True, help="folder of the sweep's results")
    parser.add_argument("--blocks", type=int, required=True, help="blocks of the model")
    parser.add_argument("--seeds", type=int, required=True, help="at least 2")
    parser.add_argument("--output", type=Path, required=True, help="layers.json")
    parser.add_argument("--picture", type=Path, required=True, help="layers.svg")
    args = parser.parse_args(argv)

    if args.blocks <= FIRST or args.seeds < 2:
        raise BadInput(f"--blocks {args.blocks} --seeds {args.seeds}: expected at least {FIRST + 1} and 2")
    blocks = range(FIRST, args.blocks)
    untouched, rows = values(args.original), sweep_rows(args.sweep, blocks, args.seeds)
    found = {"untouched": untouched, "rows": rows, "best": best_blocks(rows, blocks)}
    with whole_file(args.picture) as temporary:
        temporary.write_bytes(picture(rows, untouched, blocks))
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(table(rows, blocks))


if __name__ == "__main__":
    run(main)
