"""The same seed gives the same bytes, and threads and batches change no decision.

Runs from a clean checkout, fetching and memorising included, must give one zip. Then both checkpoints of tiny are
evaluated with 1 and 2 threads and two batch sizes, each in a process of its own: every text and every choice must be
the workflow's; how far the losses and probabilities spread is reported. Unlearning with 2 threads
is compared, too, but need not be the same.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from tests.conftest import GOALS
from tests.trust.checkout import ZIP, Check, clean_copy, said, start

DATA = "data/split/synthetic"
QUESTIONS = "data/raw/synthetic/mmlu"
CHECKPOINTS = {"original": "models/tiny/original", "unlearned": "results/tiny/unlearned"}
BATCHES = (2048, 16384)  # tokens; a completion reserves 256
THREADS = (1, 2)
SPREAD = "losses at most {:.1e} nats apart, probabilities {:.1e}"


def run_from_clean(folder: Path) -> Path:
    """Make all goals of tiny in a fresh copy of the checkout."""
    clean_copy(folder)
    if start(folder, *GOALS).wait() != 0:
        raise RuntimeError(f"{folder}: the undisturbed run failed:\n{said(folder)[-3000:]}")
    return folder


def runs_from_clean(made: Path, work: Path, runs: int) -> Check:
    """`made` is the first; the others are compared with it."""
    check = Check(f"zips of {runs} runs from clean are the same", 1, 1)
    with ThreadPoolExecutor(2) as pool:  # a run uses one core for most of its time
        for again in pool.map(run_from_clean, [work / f"made-{number}" for number in range(2, runs + 1)]):
            check.count((again / ZIP).read_bytes() == (made / ZIP).read_bytes())
    return check


def evaluate(made: Path, folder: Path, batch_tokens: int) -> dict[str, list[Any]]:
    """Texts, choices and losses of one checkpoint. Run in a process of its own, for its number of threads."""
    from pipeline.lib.generation import complete
    from pipeline.lib.inference import mean_nll, next_token_probabilities
    from pipeline.lib.models import encode, load_model, load_tokenizer
    from pipeline.lib.multiple_choice import fitting_prompt, letter_tokens, read_subjects
    from pipeline.lib.records import read_table

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    rows = [row for side in ("forget", "retain") for row in read_table(made / DATA / "train" / side / f"{side}.jsonl")]
    documents = [row for side in ("member", "nonmember") for row in read_table(made / DATA / "mia" / f"{side}.jsonl")]
    found: dict[str, list[Any]] = {
        "texts": complete(model, tokenizer, [row["input"] for row in rows], batch_tokens=batch_tokens),
        "losses": mean_nll(model, [encode(tokenizer, row["document"]) for row in documents], None, batch_tokens),
        "probabilities": [],
    }
    for subject in read_subjects(made / QUESTIONS, None, None):
        prompts = [fitting_prompt(tokenizer, subject, question) for question in subject.test]
        found["probabilities"] += next_token_probabilities(model, prompts, letter_tokens(tokenizer), batch_tokens)
    return found


def measured(made: Path, model: Path, threads: int, batch_tokens: int) -> dict[str, list[Any]]:
    program = (
        "import json, sys, pathlib, tests.trust.same_bytes as s;"
        "print(json.dumps(s.evaluate(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]))))"
    )
    command = [sys.executable, "-c", program, str(made.resolve()), str(model.resolve()), str(batch_tokens)]
    done = subprocess.run(command, env=with_threads(threads), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def with_threads(threads: int) -> dict[str, str]:
    """The environment that Snakemake gives a job."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def recorded(made: Path, checkpoint: str) -> dict[str, list[Any]]:
    """The same, as the workflow wrote it."""

    def column(table: str, field: str) -> list[Any]:
        lines = (made / "results" / "tiny" / checkpoint / table).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)[field] for line in lines]

    return {
        "texts": column("completions.jsonl", "model_output"),
        "losses": column("membership.jsonl", "nll"),
        "probabilities": column("mmlu.jsonl", "probs"),
    }


def choices(probabilities: Iterable[Sequence[float]]) -> list[int]:
    return [max(range(4), key=list(row).__getitem__) for row in probabilities]


def compare(check: Check, first: dict[str, list[Any]], other: dict[str, list[Any]]) -> list[float]:
    """Count the texts and choices that are equal; return by how much losses and probabilities are apart, at most."""
    for one, two in (
        *zip(first["texts"], other["texts"], strict=True),
        *zip(choices(first["probabilities"]), choices(other["probabilities"]), strict=True),
    ):
        check.count(one == two)
    values = [(rows["losses"], [value for row in rows["probabilities"] for value in row]) for rows in (first, other)]
    return [max(abs(a - b) for a, b in zip(one, two, strict=True)) for one, two in zip(*values, strict=True)]


def decisions(made: Path) -> Check:
    """Every text and choice in every setting, against the workflow's."""
    check = Check(f"texts and choices with {THREADS} threads and batches of {BATCHES} tokens")
    spreads = []
    for checkpoint, threads, batch_tokens in product(CHECKPOINTS, THREADS, BATCHES):
        other = measured(made, made / CHECKPOINTS[checkpoint], threads, batch_tokens)
        spreads.append(compare(check, recorded(made, checkpoint), other))
    check.note = SPREAD.format(*map(max, *spreads))
    return check


def unlearned_with_two_threads(made: Path, work: Path) -> str:
    """How much it matters, which nobody promised: sums are then taken in another order, in bfloat16."""
    check = Check("unlearning with 2 threads")
    train, folder = made.resolve() / DATA / "train", work.resolve() / "unlearned-2"
    words = [made.resolve() / CHECKPOINTS["original"], folder, train / "forget", train / "retain"]
    command = [sys.executable, "-m", "pipeline.unlearn", *map(str, words)]
    subprocess.run(command, cwd=made, env=with_threads(2), check=True)
    spread = compare(check, recorded(made, "unlearned"), measured(made, folder, 1, BATCHES[-1]))
    other = check.tried - check.good
    return f"measured, not required: unlearned with 2 threads {other} of {check.tried} differ, {SPREAD.format(*spread)}"


def same_bytes(made: Path, work: Path, runs: int) -> list[Check]:
    checks = [runs_from_clean(made, work, runs), decisions(made)]
    checks[1].note += "; " + unlearned_with_two_threads(made, work)
    return checks
