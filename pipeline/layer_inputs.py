"""What the runs of the sweep over blocks have in common, computed once: general text, and what enters each block.

Reads   --model   checkpoint folder
        --forget, --retain  the judge's folders, each with {forget,retain}.{parquet,jsonl}
Writes  --output  DIR/block-<n>.safetensors, one for each block that a window of three blocks can start at:
                  "tokens": general text, sampled from the model with seed 0, (texts, tokens)
                  "forget", "retain", "general": what enters block n at every token, all rows one after the other,
                  (tokens, hidden), in the precision that unlearning computes in
                  metadata "run": a hash of model, rows and precision, without which `unlearn --inputs` refuses it
Run     python -m pipeline.layer_inputs --model models/tiny/original --forget data/split/synthetic/train/forget \\
            --retain data/split/synthetic/train/retain --output inputs

Nothing below the first trained block changes, whatever the method and the steering directions. The general text of all
runs is the same, that of seed 0; a run without these files samples its own, with its own seed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pipeline import unlearn
from pipeline.lib.stage import BadInput, keep_apart, run, whole_folder

SIDES = ("forget", "retain", "general")


def joined(rows: list[Tensor], decoder: unlearn.Decoder) -> Tensor:
    """Return all rows, (tokens, hidden) each, as one tensor; also where there is no row."""
    none = torch.empty(0, decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
    return torch.cat([none, *rows])


def save_inputs(model: Path, forget_folder: Path, retain_folder: Path, output: Path) -> None:
    """Write the files of all blocks into the folder `output`."""
    decoder = unlearn.Decoder(model)
    tokenizer = unlearn.read_tokenizer(model, decoder.config.vocab_size)
    forget = unlearn.read_texts(forget_folder, "forget", tokenizer)
    retain = unlearn.read_texts(retain_folder, "retain", tokenizer)
    settings = unlearn.settings_for(decoder.depth, "solve")
    general, _ = unlearn.sample_texts(
        lambda: unlearn.whole_model(model, retain[-1]), tokenizer, forget, retain, settings
    )
    tokens = torch.tensor([text.tokens for text in general])
    metadata = {"run": unlearn.origin(model, forget, retain, decoder.dtype)}
    states = {name: decoder.embed(texts) for name, texts in zip(SIDES, (forget, retain, general), strict=True)}
    for index in tqdm(range(max(1, decoder.depth - 2)), desc="blocks", mininterval=2):
        if index:
            block = decoder.block(index - 1)
            states = {name: decoder.advance(block, rows) for name, rows in states.items()}
        tensors = {name: joined(rows, decoder) for name, rows in states.items()}
        save_file({"tokens": tokens, **tensors}, output / f"block-{index}.safetensors", metadata)


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--forget", type=Path, required=True, help="folder with forget.{parquet,jsonl}")
    parser.add_argument("--retain", type=Path, required=True, help="folder with retain.{parquet,jsonl}")
    parser.add_argument("--output", type=Path, required=True, help="folder of the blocks' files")
    args = parser.parse_args(argv)

    keep_apart(args.model, args.output)
    try:
        with whole_folder(args.output) as folder:
            save_inputs(args.model, args.forget, args.retain, folder)
    except unlearn.BadInput as error:
        raise BadInput(str(error)) from None


if __name__ == "__main__":
    run(main)
