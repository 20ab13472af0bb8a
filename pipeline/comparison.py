"""Compare ours with the peers' methods and the controls, on stand-ins that none of them was tuned on.

Reads   --draws DIR ...  results/<target>-<draw>: evaluation_results.jsonl and fluency.json of original, retrained,
                         unlearned, methods/random_weights.1 and methods/<method>.<strength> (fields in score, fluency)
        --tuned          tuned.json, the strength chosen for each method
Writes  --output         comparison.json: [{"system", "strength", "values": {part: [one a draw]}, "fluency": {measure:
                         [one a draw]}, "p", "p_holm"}]; of fluency and of the last two some may be null
        --table          comparison.md: mean and standard deviation over the draws (of fluency the mean), by final score
Run     python -m pipeline.comparison --draws results/tiny-11 results/tiny-12 --methods npo sugd \\
            --tuned results/tiny/methods/tuned.json --name tiny --output comparison.json --table comparison.md

p is that of a two-sided paired t-test of ours against a system's final scores over the draws; p_holm the same,
corrected for the number of methods (Holm 1979), each of which counts once, with the better of its two settings.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jsonschema import Draft202012Validator
from scipy.stats import ttest_rel

from pipeline.lib.published import parts, read_results
from pipeline.lib.records import FLUENCY, read_json
from pipeline.lib.stage import BadInput, run, whole_file

CONTROLS = {
    "untouched": "original",
    "random weights": "methods/random_weights.1",
    "memorised without the forget rows": "retrained",
}
OURS = "aimed steering (ours)"
PARTS = {"final": "final", "task_aggregate": "task aggregate", "mia": "MIA", "mmlu": "multiple choice"}
FLUENT = {"repetition": "repetition", "log_likelihood": "likelihood", "held_out": "held-out loss"}
TUNED = Draft202012Validator(
    {"type": "object", "additionalProperties": {"type": "object", "required": ["strength"]}},
)

Line = dict[str, Any]


def systems(methods: Sequence[str], tuned: dict[str, Any], place: Path) -> list[tuple[str, str, str]]:
    """Return (system, strength, folder of its results in a draw) of all that is compared; ours is first."""
    found = [(OURS, "-", "unlearned"), *((name, "-", folder) for name, folder in CONTROLS.items())]
    for method in methods:
        if method not in tuned:
            raise BadInput(f"{place}: no {method!r} in it")
        best = str(tuned[method]["strength"])
        if float(best) == 1:
            found.append((method, "as published, tuned", f"methods/{method}.1"))
            continue
        found.append((method, "as published", f"methods/{method}.1"))
        found.append((method, f"tuned: x {best}", f"methods/{method}.{best}"))
    return found


def values_of(draws: Sequence[Path], folder: str) -> dict[str, list[float]]:
    """Return the four parts of a system's results, a value a draw."""
    found = [parts(read_results(draw / folder / "evaluation_results.jsonl")) for draw in draws]
    for draw, part in zip(draws, found, strict=True):
        if part.final is None:
            raise BadInput(f"{draw / folder}: no final score: membership or multiple choice is missing")
    return {name: [getattr(part, name) for part in found] for name in PARTS}


def fluency_of(draws: Sequence[Path], folder: str) -> dict[str, list[float | None]]:
    """Return what the score does not see of a system: whether it still writes language, a value a draw."""
    found = [read_json(draw / folder / "fluency.json", FLUENCY) for draw in draws]
    rows = [{**one["forget"], "held_out": one["held_out"]["loss"]} for one in found]
    return {name: [row[name] for row in rows] for name in FLUENT}


def compare(draws: Sequence[Path], named: Sequence[tuple[str, str, str]]) -> list[Line]:
    """Return a line a system, highest mean final score first, with the p value of ours against it."""
    lines: list[Line] = [
        {
            "system": system,
            "strength": strength,
            "values": values_of(draws, folder),
            "fluency": fluency_of(draws, folder),
        }
        for system, strength, folder in named
    ]
    ours = lines[0]["values"]["final"]
    for line in lines:
        theirs = line["values"]["final"]
        line["p"] = None if line["system"] == OURS or theirs == ours else float(ttest_rel(ours, theirs).pvalue)
    lines.sort(key=lambda line: -fmean(line["values"]["final"]))
    better: dict[str, Line] = {}
    for line in lines:
        if line["system"] not in (OURS, *CONTROLS):
            better.setdefault(line["system"], line)
    corrected = holm([line["p"] for line in better.values()])
    for line in lines:
        line["p_holm"] = None
    for line, p in zip(better.values(), corrected, strict=True):
        line["p_holm"] = p
    return lines


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for their number: the smallest times all of them, the next times one less, and so on.

    None is one that cannot be told from ours, and counts as 1.
    """
    order = sorted(range(len(values)), key=lambda place: _one(values[place]))
    found: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * _one(values[place])))
        found[place] = largest
    return found


def _one(p: float | None) -> float:
    return 1.0 if p is None else p


def markdown(lines: Sequence[Line], name: str, draws: int) -> str:
    """Return the table; what is not a peer is in bold."""
    text = [
        f"# Systems compared on {draws} draws of {name}",
        "",
        f"| system | setting | {' | '.join(PARTS.values())} | p | p, corrected | {' | '.join(FLUENT.values())} |",
        f"|---|---|{'---:|' * (len(PARTS) + 2 + len(FLUENT))}",
    ]
    for line in lines:
        cells = [
            f"{fmean(values):.3f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stdev(values):.3f}"
            for values in line["values"].values()
        ]
        p = " | ".join("" if line[name] is None else f"{line[name]:.2g}" for name in ("p", "p_holm"))
        own = line["system"] in (OURS, *CONTROLS)
        system = f"**{line['system']}**" if own else line["system"].replace("_", " ")
        fluency = " | ".join(_mean(values) for values in line["fluency"].values())
        text.append(f"| {system} | {line['strength']} | {' | '.join(cells)} | {p} | {fluency} |")
    notes = [
        f"Mean ± standard deviation over {draws} stand-ins made of different documents; a stand-in's numbers are not"
        " leaderboard numbers. Bold: ours and the controls.",
        "p: two-sided paired t-test of our final scores against the system's; corrected: by Holm, for the number of"
        " methods, each of which counts once, with its better setting.",
        "Fluency, which the score does not see, in the mean: the share of repeated 4-grams in what is written to forget"
        " prompts; its log-likelihood under the untouched model, and the loss on general text, in nats a token.",
    ]
    return "\n".join([*text, *(f"\n{note}" for note in notes)]) + "\n"


def _mean(values: Sequence[float | None]) -> str:
    """Return the mean, or a dash where a draw has no value: it wrote nothing there."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" if len(known) == len(values) else "-"


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=Path, nargs="+", required=True, metavar="DIR", help="at least two")
    parser.add_argument("--methods", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--tuned", type=Path, required=True, help="tuned.json")
    parser.add_argument("--name", required=True, help="name of the target")
    parser.add_argument("--output", type=Path, required=True, help="comparison.json")
    parser.add_argument("--table", type=Path, required=True, help="comparison.md")
    args = parser.parse_args(argv)

    if len(args.draws) < 2:
        raise BadInput(f"--draws {args.draws[0]}: expected at least two")
    lines = compare(args.draws, systems(args.methods, read_json(args.tuned, TUNED), args.tuned))
    table = markdown(lines, args.name, len(args.draws))
    with whole_file(args.table) as temporary:
        temporary.write_text(table, encoding="utf-8")
    with whole_file(args.output) as temporary:
        temporary.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    run(main)
