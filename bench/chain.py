"""The chain on an accelerator, at the size of the real models and on all real rows: unlearning and every evaluation.

Opt-in: it needs a GPU, the real rows (data/split/semeval25), MMLU (data/raw/mmlu) and a tokenizer (models/135m/base).

`chain`: 7B's shape with random weights. Its texts mean nothing and never end, so each has its 256 tokens: the longest
that it can take; but it knows no answer, so there is less to lower and raise, and a round is shorter than it may be.
`scale`: 1B's shape, trained from nothing until it recites the rows. It knows nothing else: unseen text is noise to it,
so neither membership nor MMLU says anything. But its task aggregate is that of the method on all rows, at the size and
with the 11 retain tokens to a unit of intermediate width that the real 1B has.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench import completion, questions, seven
from bench.measure import Measurement, Side, alone, olmo
from pipeline import unlearn
from pipeline.complete import MAX_NEW_TOKENS, completion_rows
from pipeline.lib.inference import mean_nll
from pipeline.lib.metrics import cell_scores, harmonic_mean, task_values, terms
from pipeline.lib.models import device, encode, load_model, load_tokenizer
from pipeline.lib.multiple_choice import choice_probabilities, read_subjects
from pipeline.lib.records import DOCUMENT, SETS, Row, read_checked
from pipeline.memorise import WARM_UP, loss_of, row_text, stream

TOKENIZER = Path("models/135m/base")
DATA = Path("data/split/semeval25")
MMLU = Path("data/raw/mmlu")
HOUR = 3600  # seconds that the judge gives unlearning

REFERENCE_ROWS = 2  # of each side, a row at a time; its time for all rows is this, times their number
REFERENCE_QUESTIONS = 100  # of one subject

BLOCKS, WIDTH, INTERMEDIATE, HEADS, VOCABULARY = 16, 2048, 8192, 16, 50304  # 1B's
BATCH_TOKENS, RATE, QUESTIONS_SHOWN = 2048, 3e-4, 3  # to memorise; a row that asks is shown so often in a pass
MEMORISING = 200.0  # seconds, in which the rate falls to 0


def tokenizer_into(folder: Path) -> None:
    """Put a tokenizer beside a checkpoint: OLMo's is not at hand."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)


def unlearning(folder: Path, output: Path) -> Side:
    """Run the submission as the judge does."""
    side = Side()
    with side.timed("all"):
        unlearn.unlearn(str(folder), str(output), str(DATA / "train/forget"), str(DATA / "train/retain"))
    side.values = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return side


def evaluation(folder: Path, fold: str, compared: bool) -> Side:
    """Run every evaluation on a checkpoint; if `compared`, plain references on a part of it, too."""
    side = Side()
    with side.timed("load"):
        model, tokenizer = load_model(folder), load_tokenizer(folder)
    rows = completion.read(DATA / fold, None)
    documents = [row["document"] for name in SETS for row in read_checked(DATA / "mia" / f"{name}.jsonl", DOCUMENT)]
    subjects = read_subjects(MMLU, questions.SUBJECTS)
    with side.timed("completion"):
        side.values["rows"] = completion_rows(model, tokenizer, rows, MAX_NEW_TOKENS)
    with side.timed("membership"):
        mean_nll(model, [encode(tokenizer, document) for document in documents])
    with side.timed("mmlu"):
        probabilities = [choice_probabilities(model, tokenizer, subject) for subject in subjects]
    side.values |= {"documents": len(documents), "questions": sum(map(len, probabilities))}
    if compared:
        plain = completion.read(DATA / fold, REFERENCE_ROWS)
        asked = read_subjects(MMLU, questions.SUBJECTS[:1], REFERENCE_QUESTIONS)[0]
        with side.timed("plain completion"):
            for row in plain:
                completion.plain_row(model, tokenizer, row)
        with side.timed("plain mmlu"):
            questions.plain(model, tokenizer, asked)
        side.seconds["plain completion"] *= len(rows) / len(plain)
        side.seconds["plain mmlu"] *= side.values["questions"] / len(asked.test)
    side.values["accelerator"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return side


def memorised(folder: Path) -> Side:
    """Write a model of 1B's shape that was trained from nothing on the rows alone."""
    side = Side()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    config = olmo(VOCABULARY, WIDTH, INTERMEDIATE, BLOCKS, HEADS, tokenizer.eos_token_id)
    auto: Any = AutoModelForCausalLM
    with device():
        model = auto.from_config(config)
    rows = [
        row_text(tokenizer, row)
        for row in completion.read(DATA / "train", None)
        for _ in range(QUESTIONS_SHOWN if row["id"][-3:-1] == "qa" else 1)
    ]
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    started, losses = time.monotonic(), []
    with side.timed("memorise"):
        for step, batch in enumerate(stream(lambda: list(rows), BATCH_TOKENS, Random(0))):
            left = 1 - (time.monotonic() - started) / MEMORISING
            if left <= 0:
                break
            optimiser.param_groups[0]["lr"] = RATE * min(left, (step + 1) / WARM_UP)
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            if step % 100 == 0:
                print(f"step {step}: loss {statistics.fmean(losses[-100:]):.3f}", file=sys.stderr, flush=True)
    side.values = {"steps": len(losses), "loss": statistics.fmean(losses[-100:])}
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer_into(folder)
    return side


def aggregate(rows: list[Row]) -> tuple[float, list[float]]:
    """Return the task aggregate of completion rows, and its twelve terms."""
    found = terms(task_values(cell_scores(rows)))
    return harmonic_mean(found), found


def lines(name: str, ran: Side, evaluated: Side, said: str) -> list[Measurement]:
    """Return a line for unlearning and one for each evaluation that was compared."""
    shape = f"{len(evaluated.values['rows'])} rows"
    used = f"{ran.values['peak_accelerator_bytes'] / 1e9:.1f} GB on {ran.values['hardware']}"
    evaluating = f"{evaluated.values['accelerator'] / 1e9:.1f} GB, {evaluated.seconds['membership']:.1f} s for"
    found = [
        Measurement(f"unlearning: {name}", shape, ran.seconds["all"], HOUR, ">= 1", f"{used}; {said}", ran.peak, 0)
    ]
    for stage, number in (("completion", len(evaluated.values["rows"])), ("mmlu", evaluated.values["questions"])):
        if f"plain {stage}" in evaluated.seconds:
            found.append(
                Measurement(
                    f"{stage}: {name}",
                    f"{number} rows, bfloat16; the reference on a part",
                    evaluated.seconds[stage],
                    evaluated.seconds[f"plain {stage}"],
                    "-",
                    f"{evaluating} {evaluated.values['documents']} documents",
                    evaluated.peak,
                    0,
                )
            )
    return found


def measure(work: Path) -> list[Measurement]:
    """Measure 7B's shape with random weights."""
    folder, output = work / "seven", work / "unlearned"
    seven.prepare(folder)
    tokenizer_into(folder)
    ran = alone(unlearning, folder, output)
    return lines("7B's shape", ran, alone(evaluation, output, "validation", True), "random weights")


def measure_memorised(work: Path) -> list[Measurement]:
    """Measure 1B's shape, trained to recite the rows."""
    folder, output = work / "scale", work / "unlearned"
    made = alone(memorised, folder)
    before = alone(evaluation, folder, "train", False)
    ran = alone(unlearning, folder, output)
    after = alone(evaluation, output, "train", True)
    for name, one in (("untouched", before), ("unlearned", after)):
        whole, found = aggregate(one.values["rows"])
        print(f"{name}: task aggregate {whole:.3f}; terms", " ".join(f"{term:.3f}" for term in found), flush=True)
    said = f"task aggregate {aggregate(after.values['rows'])[0]:.3f}, memorised in {made.values['steps']} steps"
    return lines("1B's shape", ran, after, said)
