"""The measures of the competition, one function each. Texts, losses and rows in, numbers out; no model, no file.

ROUGE and the ROC curve are taken from the libraries that the organisers' evaluation uses, so that a number of ours can
be set beside a published one. The harmonic mean is the standard library's: 0 as soon as one value is 0.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from pipeline.lib.records import KINDS, SIDES, TASKS, kind_of

Cell = tuple[str, str, str]  # side, task, kind


@cache
def _rouge_l() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l_recall(expected: str, output: str) -> float:
    """Return the share (0 to 1) of the expected text's words that the output holds in the same order.

    A word is a run of a-z and 0-9 after lower-casing, stemmed if longer than three letters. All else separates words:
    "Zoë" is the word "zo", and a text in another script has no words. Without words on either side the recall is 0.
    """
    return float(_rouge_l().score(expected, output)["rougeL"].recall)


def exact_match(expected: str, output: str) -> int:
    """Return 1 if the texts are equal apart from their case and the white space around them, else 0."""
    return int(expected.strip().lower() == output.strip().lower())


def may_still_match(expected: str, beginning: str) -> bool:
    """Tell whether an output that begins with `beginning` can still be an `exact_match`.

    White space is not looked at, since the clean-up after decoding takes some out; nor is a last character of which
    only some bytes are written.
    """
    return _folded(expected).startswith(_folded(beginning.rstrip("\ufffd")))


def _folded(text: str) -> str:
    return "".join(text.split()).lower().replace("\N{GREEK SMALL LETTER FINAL SIGMA}", "\N{GREEK SMALL LETTER SIGMA}")


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / (1/v1 + ... + 1/vn) of values in [0, 1], which is 0 if any value is 0."""
    return float(statistics.harmonic_mean(values))


def auc(member_nll: Sequence[float], nonmember_nll: Sequence[float]) -> float:
    """Return the area under the ROC curve of the attack that calls low-loss documents members.

    Arguments: mean NLL per document, nats per token, finite. The area is the chance that a random member has a lower
    loss than a random non-member, ties counting half: 1 means members are still known, .5 that they look unseen, 0
    that they look stranger than unseen text. Empty sides and losses that are not finite raise `ValueError`.
    """
    import sklearn.metrics  # here, for it takes over a second, and most that use this file never come here

    if not member_nll or not nonmember_nll:
        raise ValueError("a side has no loss")
    confidence = [-loss for loss in (*member_nll, *nonmember_nll)]
    is_member = [1] * len(member_nll) + [0] * len(nonmember_nll)
    false_positive, true_positive, _ = sklearn.metrics.roc_curve(is_member, confidence)
    return float(sklearn.metrics.auc(false_positive, true_positive))


def mia_score(auc: float) -> float:
    """Return 1 - 2|AUC - .5|: 1 if members cannot be told from non-members, 0 if always, either way round."""
    return 1 - 2 * abs(auc - 0.5)


def unseen_mia_score(members: int, nonmembers: int) -> tuple[float, float]:
    """Return mean and standard deviation of the MIA score of members that are no other than non-members.

    What perfect forgetting has: below 1, for few documents differ by chance. The area is then Mann and Whitney's
    statistic without a difference, mean 1/2, variance (m + n + 1) / (12 m n), taken to be normal.
    """
    spread = math.sqrt((members + nonmembers + 1) / (12 * members * nonmembers))
    return 1 - 2 * spread * math.sqrt(2 / math.pi), 2 * spread * math.sqrt(1 - 2 / math.pi)


def row_value(row: Mapping[str, Any]) -> float:
    """Return a completion row's score, 0 to 1: ROUGE-L recall of a sentence completion, exact match of an answer."""
    measure = rouge_l_recall if kind_of(row["id"]) == "sc" else exact_match
    return float(measure(row["expected_output"], row["model_output"]))


def cell_scores(rows: Iterable[Mapping[str, Any]]) -> dict[Cell, list[float]]:
    """Return the scores of completion rows by cell (side, task, kind), kind "sc" (regurgitation) or "qa" (knowledge).

    Nothing is inverted: a memorising model scores 1 everywhere. Raises `ValueError` naming the first of the twelve
    cells that has no row, since a mean over no rows would leave the aggregate undefined.
    """
    cells: dict[Cell, list[float]] = {}
    for row in rows:
        cells.setdefault((row["split"], row["task"], kind_of(row["id"])), []).append(row_value(row))
    for side, task, kind in product(SIDES, TASKS, KINDS):
        if (side, task, kind) not in cells:
            raise ValueError(f"no {kind} row of {task} on the {side} side")
    return cells


def task_values(cells: Mapping[Cell, Sequence[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return the twelve means of what `cell_scores` returns, as `values[side][task][kind]`."""
    return {
        side: {task: {kind: statistics.fmean(cells[side, task, kind]) for kind in KINDS} for task in TASKS}
        for side in SIDES
    }


def terms(values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[float]:
    """Return the twelve terms of the task aggregate: 1 - value on the forget side, value on the retain side.

    `values` as `task_values` returns them. The official order: forget first, by task, regurgitation before knowledge.
    """
    forget, retain = values["forget"], values["retain"]
    return [1 - forget[task][kind] for task, kind in product(TASKS, KINDS)] + [
        retain[task][kind] for task, kind in product(TASKS, KINDS)
    ]
