"""Let a checkpoint complete every forget and retain prompt, and measure the loss of the expected answers.

Reads   --forget DIR/forget.jsonl, --retain DIR/retain.jsonl (the judge's layout) and a checkpoint folder.
Writes  --output completions.jsonl, one row per prompt: id, task, split (forget|retain), input, expected_output,
        model_output (greedy, at most --max-new-tokens tokens), nll (nats per token of the answer given the prompt).
Run     python -m pipeline.complete --model models/tiny/original --forget data/split/synthetic/train/forget \\
            --retain data/split/synthetic/train/retain --output completions.jsonl

With --scores-only a question's answer is broken off once it can no longer equal the expected one: every score is the
same, the texts of wrong answers are shorter.

As the official scorer does: the prompt is `input` alone, and the loss is taken on the tokens of `input + output`,
without a space between, with as many tokens masked as the prompt has. (Where the join is tokenized otherwise than the
prompt, one token more or less than the answer's is counted: the organisers' definition, kept.)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.lib.generation import complete_and_judge
from pipeline.lib.inference import Tokens
from pipeline.lib.metrics import may_still_match
from pipeline.lib.models import Model, Tokenizer, load_model, load_tokenizer
from pipeline.lib.processes import is_first, share
from pipeline.lib.records import DATA_ROW, SIDES, Row, kind_of, read_checked, write_jsonl
from pipeline.lib.stage import BadInput, run

MAX_NEW_TOKENS = 256  # the official number


def completion_rows(
    model: Model, tokenizer: Tokenizer, rows: Sequence[Row], max_new_tokens: int, scores_only: bool = False
) -> list[Row]:
    """Return one completion row per data row (with `split`), in order."""

    def undecided(number: int, ids: Tokens) -> bool:
        row = rows[number]
        asked = scores_only and kind_of(row["id"]) == "qa"
        return not asked or may_still_match(row["output"], tokenizer.decode(ids, skip_special_tokens=True))

    prompts, answers = ([row[column] for row in rows] for column in ("input", "output"))
    outputs, losses = complete_and_judge(model, tokenizer, prompts, answers, max_new_tokens, undecided)
    return [
        {
            "id": row["id"],
            "task": row["task"],
            "split": row["split"],
            "input": row["input"],
            "expected_output": row["output"],
            "model_output": output,
            "nll": loss,
        }
        for row, output, loss in zip(rows, outputs, losses, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--forget", type=Path, required=True, help="folder with forget.jsonl")
    parser.add_argument("--retain", type=Path, required=True, help="folder with retain.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="default: %(default)s")
    parser.add_argument("--scores-only", action="store_true", help="break off answers that are already wrong")
    parser.add_argument("--output", type=Path, required=True, help="completions.jsonl")
    args = parser.parse_args(argv)

    if args.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    folders = {"forget": args.forget, "retain": args.retain}
    data = {side: read_checked(folders[side] / f"{side}.jsonl", DATA_ROW) for side in SIDES}
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    rows = [{**row, "split": side} for side in SIDES for row in data[side]]

    def work(own: Sequence[Row]) -> list[Row]:
        return completion_rows(model, tokenizer, own, args.max_new_tokens, args.scores_only)

    completions = share(work, rows)
    if is_first():
        write_jsonl(args.output, completions)


if __name__ == "__main__":
    run(main)
