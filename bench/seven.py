"""Descent on a checkpoint of 7B's shape, on this machine's CPU: does it fit? Opt-in: 14 GB are written, twice."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.descent import END, texts
from bench.measure import Measurement, Side, alone, olmo
from pipeline import unlearn
from pipeline.unlearn import Checkpoint, Decoder, Settings, Text, device

BLOCKS, WIDTH, INTERMEDIATE, VOCABULARY = 32, 4096, 11008, 50304
SETTINGS = Settings("descend", (24, 25, 26), beta=5.0, alpha=900.0, coefficient="growing", batch_size=12, epochs=2)
ROWS = 4  # of each task and side, two of them completions: 24 rows


def prepare(folder: Path) -> None:
    """Write random weights in bfloat16, one block a shard, without ever holding the model."""
    folder.mkdir()
    config = olmo(VOCABULARY, WIDTH, INTERMEDIATE, BLOCKS, 32, END)
    config.save_pretrained(folder)
    generator = torch.Generator(device()).manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (INTERMEDIATE, WIDTH), "mlp.up_proj": (INTERMEDIATE, WIDTH)}
    shapes |= {"mlp.down_proj": (WIDTH, INTERMEDIATE)}
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, tuple[int, int]]) -> None:
        drawn = {
            key: (torch.randn(shape, generator=generator, device=device()) * 0.02).bfloat16()
            for key, shape in tensors.items()
        }
        save_file(drawn, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(drawn, name))

    for index in range(BLOCKS):
        keys = {f"model.layers.{index}.{key}.weight": shape for key, shape in shapes.items()}
        write(f"model-{index + 1:05}-of-{BLOCKS + 1:05}.safetensors", keys)
    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    write(f"model-{BLOCKS + 1:05}-of-{BLOCKS + 1:05}.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def some(side: str) -> list[Text]:
    """Return the first rows of each task."""
    return [text for task in unlearn.TASKS for text in [text for text in texts(side) if text.task == task][:ROWS]]


def ours(folder: Path) -> Side:
    """Descend on a few rows of the real lengths, and write the checkpoint."""
    side = Side()
    decoder = Decoder(folder, torch.float32)
    forget, retain = some("forget"), some("retain")
    side.values = {"tokens": sum(len(text.tokens) for text in forget + retain)}
    with side.timed("descent"):
        *_, (_, matrices) = unlearn.descend(decoder, forget, retain, SETTINGS, float("inf"))
    with side.timed("save"):
        Checkpoint(folder, folder.parent / "unlearned").save(unlearn.named(decoder, matrices))
    return side


def measure(work: Path) -> list[Measurement]:
    """Measure our side; the reference, two whole models in float32, does not fit and is only counted."""
    folder = work / "seven"
    prepare(folder)
    side = alone(ours, folder)
    matrices = 4 * WIDTH * WIDTH + 3 * WIDTH * INTERMEDIATE
    counted = 2 * 4 * (BLOCKS * matrices + 2 * VOCABULARY * WIDTH)
    shape = f"{BLOCKS} x {WIDTH} x {INTERMEDIATE} x {VOCABULARY}, {side.values['tokens']} tokens, 2 epochs"
    told = f"{side.seconds['descent']:.0f} s, saved in {side.seconds['save']:.0f} s; reference counted: weights alone"
    return [
        Measurement("7B-shaped: memory, GB", shape, side.peak / 1e9, counted / 1e9, "<= 8 GB", told, side.peak, counted)
    ]
