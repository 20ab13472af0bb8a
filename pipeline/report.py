"""Make one page of a target that a person reads in two minutes: what it is, its scores, and the rows behind them.

Reads   --original, --unlearned  a checkpoint's results each: completions.jsonl, membership.jsonl,
                                 evaluation_results.jsonl, fluency.json (fields in those stages)
        --settings               run.json of the unlearning: its settings, wall seconds and peak memory
        --leaderboard            leaderboard.md, shown as it is
        --benchmarks             folder of Snakemake's <stage>[.<checkpoint>].tsv; a stage without one is not shown
        --study                  folder of layers.{json,svg}, claims.json and claims/*.svg, and, for a stand-in,
                                 comparison.md [optional]
        pipeline/assets          the page's template, its style, and the table library
Writes  --output                 report.html: everything is in it, it asks the network for nothing
Run     python -m pipeline.report --original results/tiny/original --unlearned results/tiny/unlearned \\
            --settings results/tiny/unlearned/run.json --leaderboard results/tiny/leaderboard.md \\
            --benchmarks results/tiny/benchmarks --name tiny --size 1B --stand-in \\
            --model-source "made by pipeline.memorise" --data-source synthetic --output results/tiny/report.html

The page shows the data's texts, so it may be passed on only where those may. They reach it as data: the template
escapes what it is given, the table library what it shows. A section is a function here, whose value goes to the
template by name, and a <section> in pipeline/assets/report.html.
"""

import argparse
import base64
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jsonschema import Draft202012Validator
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.lib.metrics import row_value, unseen_mia_score
from pipeline.lib.pictures import BLUE, ORANGE, svg
from pipeline.lib.published import SIZES, caution, parts, read_results
from pipeline.lib.records import (
    COMPLETION,
    FLUENCY,
    KINDS,
    MEMBERSHIP,
    SETS,
    SIDES,
    TASKS,
    Row,
    json_object,
    kind_of,
    read_checked,
    read_json,
)
from pipeline.lib.stage import BadInput, run, whole_file

ASSETS = Path(__file__).resolve().parent / "assets"
CHECKPOINTS = ("original", "unlearned")
KIND_KEYS = {"sc": "regurgitation-score", "qa": "knowledge-score"}
STAGES = ("fetch_base", "fetch_model", "memorise", "unlearn", "complete", "membership", "mmlu", "score", "fluency")
BINS = 30
COLOURS = {"member": BLUE, "nonmember": ORANGE}
SET_NAMES = {"member": "members (forget documents)", "nonmember": "non-members"}

_NUMBER = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_CONDITION = json_object(condition=_TEXT, holds={"type": "boolean"}, evidence=_TEXT)
CLAIMS = Draft202012Validator(
    {
        "type": "array",
        "items": json_object(
            claim=_TEXT, statement=_TEXT, verdict=_TEXT, figure=_TEXT, conditions={"type": "array", "items": _CONDITION}
        ),
    }
)
LAYERS = Draft202012Validator(json_object(best=json_object(rmu={"type": "integer"}, adaptive={"type": "integer"})))
RUN = Draft202012Validator(json_object(settings={"type": "object"}, wall_seconds=_NUMBER, peak_memory_bytes=_NUMBER))


def score_values(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[float | None]]]:
    """Return the score and its parts, each with a value to a result; None where it was not measured."""
    found = [parts(result) for result in results]
    return [
        ("final", [part.final for part in found]),
        ("task aggregate", [part.task_aggregate for part in found]),
        ("MIA score", [part.mia for part in found]),
        ("MIA AUC", [result.get("mia_loss_acc") for result in results]),
        ("multiple choice", [part.mmlu for part in found]),
    ]


def task_values(results: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the six lines of the twelve values: task, kind, rows and values by side, a value to a result."""
    return [
        {
            "task": task,
            "kind": KIND_KEYS[kind].removesuffix("-score"),
            "rows": {side: sum(_cell(row) == (side, task, kind) for row in rows) for side in SIDES},
            "values": {side: [result[f"{side}-set"][task][KIND_KEYS[kind]] for result in results] for side in SIDES},
        }
        for task in TASKS
        for kind in KINDS
    ]


def _cell(row: Row) -> tuple[str, str, str]:
    return row["split"], row["task"], kind_of(row["id"])


def read_losses(path: Path) -> dict[str, list[float]]:
    """Return the losses of membership.jsonl by set."""
    rows = read_checked(path, MEMBERSHIP)
    losses = {kind: [row["nll"] for row in rows if row["set"] == kind] for kind in SETS}
    for kind, values in losses.items():
        if not values:
            raise BadInput(f"{path}: no row with set {kind!r}")
    return losses


def loss_pictures(losses: Sequence[dict[str, list[float]]], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each checkpoint a picture of its losses by set, all on the same axes, their medians and the AUC.

    And what the MIA score of members that nobody has seen would be.
    """
    edges = numpy.histogram_bin_edges([loss for sets in losses for values in sets.values() for loss in values], BINS)
    highest = max(float(_shares(values, edges).max()) for sets in losses for values in sets.values())
    return [
        {
            "source": _data_address(loss_picture(sets, edges, highest)),
            "medians": {kind: median(values) for kind, values in sets.items()},
            "auc": result.get("mia_loss_acc"),
            "counts": {kind: len(values) for kind, values in sets.items()},
            "unseen": unseen_mia_score(len(sets["member"]), len(sets["nonmember"])),
        }
        for sets, result in zip(losses, results, strict=True)
    ]


def loss_picture(losses: dict[str, list[float]], edges: "numpy.ndarray[Any, Any]", highest: float) -> bytes:
    """Return an SVG histogram of the losses of members and of non-members, each as shares of its own number."""
    figure = Figure(figsize=(4.8, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for kind, values in losses.items():
        label = f"{SET_NAMES[kind]}: {len(values)}"
        axes.stairs(_shares(values, edges), edges, fill=True, color=COLOURS[kind], alpha=0.35)
        axes.stairs(_shares(values, edges), edges, color=COLOURS[kind], linewidth=1.5, label=label)
    axes.set(xlabel="mean loss of a document, nats per token", ylabel="share of documents", ylim=(0, 1.05 * highest))
    figure.legend(loc="outside upper center", ncols=len(losses), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def _shares(values: Sequence[float], edges: "numpy.ndarray[Any, Any]") -> "numpy.ndarray[Any, Any]":
    return numpy.histogram(values, edges)[0] / len(values)


def _data_address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def costs(folder: Path) -> list[dict[str, Any]]:
    """Return what each stage's job took: wall seconds and peak resident memory in MiB, None where too short to tell."""
    found = []
    for stage in STAGES:
        for checkpoint in ("", *CHECKPOINTS):
            path = folder / f"{stage}{checkpoint and '.'}{checkpoint}.tsv"
            if path.is_file():
                found.append({"stage": stage, "checkpoint": checkpoint, **_benchmark(path)})
    return found


def _benchmark(path: Path) -> dict[str, float | None]:
    with path.open(encoding="utf-8", newline="") as stream:
        line = next(csv.DictReader(stream, delimiter="\t"), {})
    try:
        unknown = line["max_rss"] in ("NA", "-")  # as Snakemake writes it
        return {"seconds": float(line["s"]), "memory": None if unknown else float(line["max_rss"])}
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: not Snakemake's benchmark: no number in {error}") from None


def examples(original: Sequence[Row], unlearned: Sequence[Row], path: Path) -> list[dict[str, Any]]:
    """Return the completion rows of both checkpoints side by side, with the score of each.

    `path` is that of the unlearned ones, for the message when the prompts or expected texts are not the same.
    """
    keys = [
        [(row["id"], row["split"], row["input"], row["expected_output"]) for row in rows]
        for rows in (original, unlearned)
    ]
    for number, (first, second) in enumerate(zip(*keys, strict=False), start=1):
        if first != second:
            raise BadInput(f"{path}: row {number}: {second[0]!r} where the original has {first[0]!r}, or other texts")
    if len(original) != len(unlearned):
        raise BadInput(f"{path}: {len(unlearned)} rows, the original has {len(original)}")
    return [
        {
            "id": before["id"],
            "task": before["task"],
            "kind": kind_of(before["id"]),
            "side": before["split"],
            "before": row_value(before),
            "after": row_value(after),
            "prompt": before["input"],
            "expected": before["expected_output"],
            "original": before["model_output"],
            "unlearned": after["model_output"],
        }
        for before, after in zip(original, unlearned, strict=True)
    ]


def leaderboard(path: Path) -> dict[str, Any]:
    """Return title and content of leaderboard.md. Markup inside it is shown, not obeyed."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    title, _, rest = path.read_text(encoding="utf-8").partition("\n")
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(rest)
    return {"title": title.removeprefix("# "), "content": Markup(html)}


def study(folder: Path | None) -> dict[str, Any] | None:
    """Return what the study found: pictures of layers and claims, the verdicts, the comparison if there is one."""
    if folder is None:
        return None
    comparison = folder / "comparison.md"
    claims: Any = read_json(folder / "claims.json", CLAIMS)
    return {
        "best": read_json(folder / "layers.json", LAYERS)["best"],
        "layers": _picture(folder / "layers.svg"),
        "claims": claims,
        "figures": {claim["figure"]: _picture(folder / "claims" / claim["figure"]) for claim in claims},
        "comparison": leaderboard(comparison) if comparison.is_file() else None,
    }


def _picture(path: Path) -> str:
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    return _data_address(path.read_bytes())


def page(**values: Any) -> str:
    """Return the page: the template, filled with what its sections show and with the files of pipeline/assets."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(asset=asset, **values)


def asset(name: str) -> Markup:
    """Return the text of a file of ours to stand in the page as it is, without the address of its source map."""
    return Markup(re.sub(r"/[/*]# sourceMappingURL=.*", "", (ASSETS / name).read_text(encoding="utf-8")))


def sections(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the template shows, by name."""
    folders = [args.original, args.unlearned]
    results = [read_results(folder / "evaluation_results.jsonl") for folder in folders]
    before, after = (read_checked(folder / "completions.jsonl", COMPLETION) for folder in folders)
    losses = [read_losses(folder / "membership.jsonl") for folder in folders]
    return {
        "name": args.name,
        "size": args.size,
        "stand_in": args.stand_in,
        "caution": caution(args.size, args.stand_in),
        "model_source": args.model_source,
        "data_source": args.data_source,
        "counts": {side: sum(row["split"] == side for row in before) for side in SIDES},
        "run": read_json(args.settings, RUN),
        "scores": score_values(results),
        "tasks": task_values(results, before),
        "losses": loss_pictures(losses, results),
        "leaderboard": leaderboard(args.leaderboard),
        "fluency": [read_json(folder / "fluency.json", FLUENCY) for folder in folders],
        "study": study(args.study),
        "costs": costs(args.benchmarks),
        "examples": examples(before, after, args.unlearned / "completions.jsonl"),
    }


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="results of the untouched checkpoint")
    parser.add_argument("--unlearned", type=Path, required=True, help="results of the unlearned checkpoint")
    parser.add_argument("--settings", type=Path, required=True, help="run.json")
    parser.add_argument("--leaderboard", type=Path, required=True, help="leaderboard.md")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of the target's benchmarks")
    parser.add_argument("--study", type=Path, help="results of the study (default: the page is made without)")
    parser.add_argument("--name", required=True, help="name of the target")
    parser.add_argument("--size", choices=SIZES, required=True, help="size of the published rows")
    parser.add_argument("--stand-in", action="store_true", help="the model is not the organisers' but a stand-in")
    parser.add_argument("--model-source", required=True, help="where the untouched model comes from")
    parser.add_argument("--data-source", required=True, help="where the data come from")
    parser.add_argument("--output", type=Path, required=True, help="report.html")
    args = parser.parse_args(argv)

    text = page(**sections(args))
    with whole_file(args.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
