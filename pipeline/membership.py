"""Measure the loss of whole documents that were (member) or were not (nonmember) in the training data.

Reads   --mia DIR/{member,nonmember}.jsonl with `id` and `document`, and a checkpoint folder.
Writes  --output membership.jsonl, one row per document: id, set (member|nonmember), nll (nats per token).
Run     python -m pipeline.membership --model models/tiny/original --mia data/split/synthetic/mia \\
            --output membership.jsonl
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pipeline.lib.inference import mean_nll
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.processes import is_first, share
from pipeline.lib.records import DOCUMENT, SETS, read_checked, write_jsonl
from pipeline.lib.stage import BadInput, run


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--mia", type=Path, required=True, help="folder with member.jsonl and nonmember.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="membership.jsonl")
    args = parser.parse_args(argv)

    documents = [{**row, "set": name} for name in SETS for row in read_checked(args.mia / f"{name}.jsonl", DOCUMENT)]
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    losses = share(partial(mean_nll, model), [encode(tokenizer, row["document"]) for row in documents])
    for row, loss in zip(documents, losses, strict=True):
        if loss is None:
            raise BadInput(f"{args.mia}: {row['set']} {row['id']!r}: a document of one token has no loss")
    rows = [{"id": row["id"], "set": row["set"], "nll": loss} for row, loss in zip(documents, losses, strict=True)]
    if is_first():
        write_jsonl(args.output, rows)


if __name__ == "__main__":
    run(main)
