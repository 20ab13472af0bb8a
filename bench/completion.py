"""Completions and answer losses: this project's batches against the official scorer's loop, one prompt at a time."""

from pathlib import Path
from typing import Any

import torch

from bench.measure import Measurement, Side, alone, relative
from pipeline.complete import MAX_NEW_TOKENS, completion_rows
from pipeline.lib.generation import decode
from pipeline.lib.metrics import exact_match, rouge_l_recall
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.records import DATA_ROW, SIDES, Row, kind_of, read_checked


def read(data: Path, rows_per_side: int | None) -> list[Row]:
    """Return the rows of both sides, with `split`: all, or some spread evenly over the file."""
    rows = []
    for side in SIDES:
        table = read_checked(data / side / f"{side}.jsonl", DATA_ROW)
        chosen = table[:: max(1, len(table) // rows_per_side)][:rows_per_side] if rows_per_side else table
        rows += [{**row, "split": side} for row in chosen]
    return rows


def ours(model_folder: Path, data: Path, rows_per_side: int | None, dtype: torch.dtype, threads: int) -> Side:
    """Run the stage's own function, in full and for the scores only."""
    side = Side()
    torch.set_num_threads(threads)
    model, tokenizer = load_model(model_folder, dtype), load_tokenizer(model_folder)
    for name, scores_only in (("full", False), ("scores", True)):
        with side.timed(name):
            rows = completion_rows(model, tokenizer, read(data, rows_per_side), MAX_NEW_TOKENS, scores_only)
        side.values[name] = rows
    return side


def reference(model_folder: Path, data: Path, rows_per_side: int | None, dtype: torch.dtype, threads: int) -> Side:
    """Run transformers' generate and loss, a row at a time, as the official scorer does."""
    side = Side()
    torch.set_num_threads(threads)
    model, tokenizer = load_model(model_folder, dtype), load_tokenizer(model_folder)
    with side.timed("full"):
        side.values["full"] = [plain_row(model, tokenizer, row) for row in read(data, rows_per_side)]
    return side


@torch.no_grad()
def plain_row(model: Any, tokenizer: Any, row: Row) -> Row:
    """Return one completion row."""
    prompt = torch.tensor([encode(tokenizer, row["input"])], device=model.device)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    whole = torch.tensor([encode(tokenizer, row["input"] + row["output"])], device=model.device)
    labels = whole.clone()
    labels[:, : prompt.shape[1]] = -100
    return {
        "id": row["id"],
        "task": row["task"],
        "split": row["split"],
        "input": row["input"],
        "expected_output": row["output"],
        "model_output": decode(tokenizer, ids[0, prompt.shape[1] :].tolist()),
        "nll": model(whole, labels=labels).loss.item(),
    }


def score(row: Row) -> float:
    """Return a row's official score."""
    measure_of = rouge_l_recall if kind_of(row["id"]) == "sc" else exact_match
    return measure_of(row["expected_output"], row["model_output"])


def measure(
    name: str, model_folder: Path, data: Path, goal: str, rows_per_side: int | None, dtype: torch.dtype, threads: int
) -> list[Measurement]:
    """Measure both sides on one checkpoint."""
    arguments = (model_folder, data, rows_per_side, dtype, threads)
    plain, fast = alone(reference, *arguments), alone(ours, *arguments)
    full, scores, expected = fast.values["full"], fast.values["scores"], plain.values["full"]
    pairs = list(zip(full, expected, strict=True))
    other = sum(a["model_output"] != b["model_output"] for a, b in pairs)
    losses = relative([a["nll"] for a in full], [b["nll"] for b in expected])
    same = [score(row) for row in scores] == [score(row) for row in full]
    seconds = plain.seconds["full"]
    equal = f"{other} of {len(pairs)} texts differ, nll {losses:.0e}"
    shape = f"{len(pairs)} rows, {str(dtype).removeprefix('torch.')}"
    peaks = fast.peak, plain.peak
    return [
        Measurement(f"completion: {name}", shape, fast.seconds["full"], seconds, goal, equal, *peaks),
        Measurement(
            f"completion: {name}, scores only",
            shape,
            fast.seconds["scores"],
            seconds,
            "-",
            "all scores equal" if same else "SCORES DIFFER",
            *peaks,
        ),
    ]
