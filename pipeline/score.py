"""Turn the rows of a checkpoint into the official result file. Arithmetic only: scoring again needs no model.

Reads   --completions  completions.jsonl: id, task, split (forget|retain), input, expected_output, model_output, nll
        --membership   membership.jsonl:  id, set (member|nonmember), nll (nats per token)                  [optional]
        --mmlu         mmlu.jsonl:        subject, index, answer (A-D), probs [4]                           [optional]
Writes  --output       evaluation_results.jsonl: one line with the official keys; all values are shares of 1 but
        `aggregate-score`, which is -1 while membership or mmlu is missing. As in the official file, `mia_loss_acc`
        (the AUC) and `mmlu_average` are left out where their rows are, and `mia_final_score` where either is.
        --categories   the accuracy and the number of questions of each of MMLU's 4 categories, 17 sub-categories and
        subjects: {"categories": {name: {"accuracy", "questions"}}, "subcategories": ..., "subjects": ...}  [optional]
Run     python -m pipeline.score --completions completions.jsonl --membership membership.jsonl --mmlu mmlu.jsonl \\
            --output evaluation_results.jsonl

Where the official evaluation can differ from this: it passes its texts through a csv file, where pandas takes an empty
text, "NA", "N/A", "None", "null", "nan" and the like for a missing value, which is then scored as the word "nan". So an
empty output counts as a right answer there where the expected one is "None", and a silent model as repeating the word
"nan". A column of numbers only is read as numbers ("007" as 7). Here a text is scored as it was generated. It also
means that a row whose texts are ordinary is scored alike, to the last digit but for the order of a sum. Shared among
several processes, the official evaluation gives each as many rows, and scores those twice that it repeats for it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.lib.metrics import Cell, auc, cell_scores, harmonic_mean, mia_score, task_values, terms
from pipeline.lib.mmlu_categories import CATEGORIES
from pipeline.lib.records import (
    CHOICES,
    COMPLETION,
    KINDS,
    MEMBERSHIP,
    MMLU,
    SETS,
    SIDES,
    TASKS,
    Row,
    read_checked,
    write_jsonl,
)
from pipeline.lib.stage import BadInput, run, whole_file

KIND_NAMES = {"sc": "regurgitation", "qa": "knowledge"}  # as the official keys call them


def evaluation_results(completions: list[Row], area: float | None, accuracy: float | None) -> dict[str, Any]:
    """Return the official result of completion rows, an attack's AUC and an MMLU accuracy, keys in the official order.

    Raises `ValueError` where one of the twelve cells (side, task, kind) has no row.
    """
    cells = cell_scores(completions)
    values = task_values(cells)
    results: dict[str, Any] = {f"{side}-set": _side(cells, side, values[side]) for side in SIDES}
    if area is not None:
        results["mia_loss_acc"] = area
    if accuracy is not None:
        results["mmlu_average"] = accuracy
    results["aggregated-terms"] = terms(values)
    task_aggregate = harmonic_mean(results["aggregated-terms"])
    results["harmonic-mean-task-aggregate"] = task_aggregate
    results["aggregate-score"] = -1
    if area is not None and accuracy is not None:
        results["mia_final_score"] = mia_score(area)
        results["aggregate-score"] = fmean([task_aggregate, accuracy, mia_score(area)])
    return results


def _side(cells: dict[Cell, list[float]], side: str, values: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return a side's part of the result. Its overall scores are means over rows, so large tasks weigh more."""
    scores: dict[str, Any] = {}
    for kind in KINDS:
        scores[f"overall-{KIND_NAMES[kind]}-score"] = fmean(s for task in TASKS for s in cells[side, task, kind])
    for task in TASKS:
        scores[task] = {f"{KIND_NAMES[kind]}-score": values[task][kind] for kind in KINDS}
    return scores


def membership_auc(rows: list[Row]) -> float:
    """Return the AUC of the membership attack. `ValueError` if a set is empty or a loss is not finite."""
    member, nonmember = ([row["nll"] for row in rows if row["set"] == name] for name in SETS)
    return auc(member, nonmember)


def mmlu_accuracy(rows: Sequence[Row]) -> float:
    """Return the share of questions whose most probable option is the answer; of equal ones the first counts."""
    return fmean(CHOICES[row["probs"].index(max(row["probs"]))] == row["answer"] for row in rows)


def mmlu_categories(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracy and number of questions by category, sub-category and subject, of those that have a question.

    Each is over questions, not over subjects. A subject that is not MMLU's is in no category.
    """
    subjects: dict[str, list[Row]] = {}
    for row in rows:
        subjects.setdefault(row["subject"], []).append(row)
    categories: dict[str, list[Row]] = {}
    subcategories: dict[str, list[Row]] = {}
    for category, parts in CATEGORIES.items():
        for subcategory, names in parts.items():
            subcategories[subcategory] = [row for name in names for row in subjects.get(name, [])]
            categories.setdefault(category, []).extend(subcategories[subcategory])
    return {
        title: {
            name: {"accuracy": mmlu_accuracy(members), "questions": len(members)}
            for name, members in groups.items()
            if members
        }
        for title, groups in (("categories", categories), ("subcategories", subcategories), ("subjects", subjects))
    }


def score_table(results: dict[str, Any]) -> Table:
    """Return the twelve values and the parts of the score as a table for the terminal."""
    table = Table("", *TASKS, title="regurgitation / knowledge (before 1 - value on forget)", title_justify="left")
    for side in SIDES:
        cells = [[results[f"{side}-set"][task][f"{KIND_NAMES[kind]}-score"] for kind in KINDS] for task in TASKS]
        table.add_row(side, *(" / ".join(f"{value:.3f}" for value in cell) for cell in cells))
    table.add_section()
    table.add_row("task aggregate", f"{results['harmonic-mean-task-aggregate']:.3f}")
    for name, key in (("AUC", "mia_loss_acc"), ("MIA", "mia_final_score"), ("MMLU", "mmlu_average")):
        table.add_row(name, f"{results[key]:.3f}" if key in results else "missing")
    table.add_row("final", f"{results['aggregate-score']:.3f}")
    return table


def _read_membership(path: Path) -> float:
    rows = read_checked(path, MEMBERSHIP)
    if {row["set"] for row in rows} != set(SETS):
        raise BadInput(f"{path}: no row of one of the sets {', '.join(SETS)}")
    return membership_auc(rows)


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=Path, required=True, help="completions.jsonl")
    parser.add_argument("--membership", type=Path, help="membership.jsonl (without it aggregate-score is -1)")
    parser.add_argument("--mmlu", type=Path, help="mmlu.jsonl (without it aggregate-score is -1)")
    parser.add_argument("--output", type=Path, required=True, help="evaluation_results.jsonl")
    parser.add_argument("--categories", type=Path, help="also write MMLU by category to this json file (needs --mmlu)")
    args = parser.parse_args(argv)
    if args.categories and not args.mmlu:
        parser.error("--categories needs --mmlu")

    completions = read_checked(args.completions, COMPLETION)
    area = _read_membership(args.membership) if args.membership else None
    questions = read_checked(args.mmlu, MMLU) if args.mmlu else []
    try:
        results = evaluation_results(completions, area, mmlu_accuracy(questions) if questions else None)
    except ValueError as error:
        raise BadInput(f"{args.completions}: {error}") from None
    if args.categories:
        with whole_file(args.categories) as temporary:
            temporary.write_text(json.dumps(mmlu_categories(questions), indent=2) + "\n", encoding="utf-8")
    write_jsonl(args.output, [results])
    Console().print(score_table(results))


if __name__ == "__main__":
    run(main)
