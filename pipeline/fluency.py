"""Measure what the official score does not see: whether a checkpoint that forgot still writes language.

All three parts of the score reward collapse on the forget side: "6 6 6 ..." repeats no answer and looks unseen.

Reads   --completions    completions.jsonl of a checkpoint (fields in complete); its forget rows are looked at
        --original       checkpoint folder of the untouched model, which judges those texts; its tokens are counted
        --model          checkpoint folder of the checkpoint itself (the same folder for the untouched one)
        --held-out       a .jsonl or .parquet with `id` and `text` or `document`: general text that neither model was
                         trained on; at most 200 of its texts are taken, at random by a fixed seed; or
        --held-out-seed  200 texts of the built-in corpus with this seed, which must not be the data's
Writes  --output         fluency.json:
        "forget": {"outputs", "empty": how many of them have no token, "repetition": share of repeated 4-grams, a mean
        over outputs of at least 4 tokens, "log_likelihood": nats per token of an output given its prompt under the
        untouched model, a mean over outputs that have a token}; a mean over nothing is null
        "held_out": {"source", "texts", "tokens", "loss": nats per token, all texts as one}
        "rows": [{"id", "tokens", "repetition", "log_likelihood"}], one to a forget row, null where not defined
Run     python -m pipeline.fluency --completions results/tiny/unlearned/completions.jsonl \\
            --original models/tiny/original --model results/tiny/unlearned --held-out-seed 1 --output fluency.json

The repetition rate is seq-rep-4 of Welleck et al., "Neural text generation with unlikelihood training" (arXiv
1908.04319): 1 - (different 4-grams) / (all 4-grams) of an output's tokens. Tokens, not words: a model that collapses
often writes no spaces. What sound text has depends on the vocabulary (small pieces repeat more), so compare with the
untouched model's own outputs. A log-likelihood has the loss on held-out text, with its sign turned, to compare with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from pipeline.lib import corpus
from pipeline.lib.inference import Tokens, mean_nll
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.records import COMPLETION, DOCUMENT, GENERAL, Row, check, read_checked, read_table
from pipeline.lib.stage import BadInput, run, whole_file

LENGTH = 4  # of the n-grams
HELD_OUT_TEXTS = 200


def repetition(tokens: Tokens, length: int = LENGTH) -> float | None:
    """Return the share of n-grams that repeat an earlier one: 0 if all differ; None if there is no n-gram."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def judged_rows(original: Path, completions: Sequence[Row]) -> list[Row]:
    """Return for each completion its tokens' number, repetition and log-likelihood under the model of a folder.

    Prompt and output are tokenized apart, so that just the output's tokens are judged wherever the two would merge.
    """
    model, tokenizer = load_model(original), load_tokenizer(original)
    prompts = [encode(tokenizer, row["input"]) for row in completions]
    outputs = [encode(tokenizer, row["model_output"], special=False) for row in completions]
    joined = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    losses = mean_nll(model, joined, [len(prompt) for prompt in prompts])
    return [
        {
            "id": row["id"],
            "tokens": len(output),
            "repetition": repetition(output),
            "log_likelihood": None if loss is None else -loss,
        }
        for row, output, loss in zip(completions, outputs, losses, strict=True)
    ]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the means over rows as `judged_rows` returns them."""
    return {
        "outputs": len(rows),
        "empty": sum(row["tokens"] == 0 for row in rows),
        "repetition": _mean([row["repetition"] for row in rows]),
        "log_likelihood": _mean([row["log_likelihood"] for row in rows]),
    }


def corpus_loss(folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Return the loss of a folder's model on the texts, all tokens counting alike, and how many there are.

    A text's first token is given, not predicted, and not counted.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    sequences = [encode(tokenizer, text) for text in texts]
    sizes = [max(0, len(ids) - 1) for ids in sequences]
    losses = mean_nll(model, sequences)
    if not any(size > 0 for size in sizes):
        raise BadInput(f"{folder}: none of {len(texts)} held-out texts has two tokens: there is nothing to predict")
    total = sum(loss * size for loss, size in zip(losses, sizes, strict=True) if loss is not None)
    return {"texts": len(texts), "tokens": sum(sizes), "loss": total / sum(sizes)}


def read_texts(path: Path) -> list[str]:
    """Return the `document` of each row, or the `text`, as the first row has it."""
    rows = read_table(path)
    field, schema = ("document", DOCUMENT) if rows and "document" in rows[0] else ("text", GENERAL)
    check(rows, schema, path)
    return [row[field] for row in rows]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=Path, required=True, help="completions.jsonl of the checkpoint")
    parser.add_argument("--original", type=Path, required=True, help="folder of the untouched model")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument("--held-out", type=Path, metavar="FILE", help="general text not trained on")
    held_out.add_argument("--held-out-seed", type=int, metavar="N", help="of general text made by the built-in corpus")
    parser.add_argument("--output", type=Path, required=True, help="fluency.json")
    args = parser.parse_args(argv)

    completions = [row for row in read_checked(args.completions, COMPLETION) if row["split"] == "forget"]
    if not completions:
        raise BadInput(f"{args.completions}: no row with split 'forget'")
    if args.held_out:
        texts, source = read_texts(args.held_out), args.held_out.name
    else:
        texts = [row["text"] for row in corpus.general(args.held_out_seed, HELD_OUT_TEXTS)]
        source = f"built-in corpus, seed {args.held_out_seed}"
    chosen = Random(0).sample(texts, min(len(texts), HELD_OUT_TEXTS))
    rows = judged_rows(args.original, completions)
    forget, loss = summary(rows), {"source": source, **corpus_loss(args.model, chosen)}
    try:
        text = json.dumps({"forget": forget, "held_out": loss, "rows": rows}, indent=2, allow_nan=False)
    except ValueError as error:  # a model can compute NaN of finite weights
        raise BadInput(f"{args.output}: cannot be written: {error}") from None
    with whole_file(args.output) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(*(f"{name} {value}" for name, value in {**forget, **loss}.items()), sep="\n")


if __name__ == "__main__":
    run(main)
