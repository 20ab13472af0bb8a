"""Descent on RMU's loss: the submission's cached engine against the loop that arXiv 2506.16548 describes.

The reference holds two whole models, pads fixed batches on the left, runs every block and the head, and lets gradients
flow into every weight. It differs from the submitted loop in one thing: padding and the first token do not enter its
loss and its coefficient, since they do not in ours; so both minimise the same loss on the same batches, and their
losses and matrices must agree.
"""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoForCausalLM

from bench.measure import Measurement, Side, alone, olmo, relative
from pipeline import unlearn
from pipeline.unlearn import Checkpoint, Decoder, Settings, Text

# Tokens of the first 16 rows of each task of the competition's forget_train and retain_train, counted with SmolLM2's
# tokenizer (OLMo's is not at hand): long completions and short questions in turn.
LENGTHS = {
    "forget": {
        "Task1": [217, 19, 220, 27, 222, 19, 213, 16, 233, 28, 236, 16, 220, 15, 216, 17],
        "Task2": [94, 22, 21, 21, 19, 32, 90, 22, 21, 21, 19, 31, 113, 22, 21, 21],
        "Task3": [346, 26, 231, 24, 250, 29, 172, 17, 173, 16, 215, 20, 299, 25, 265, 40],
    },
    "retain": {
        "Task1": [221, 19, 224, 26, 219, 28, 206, 24, 192, 26, 199, 21, 195, 25, 232, 24],
        "Task2": [115, 22, 21, 21, 20, 35, 109, 22, 21, 21, 21, 33, 108, 22, 21, 21],
        "Task3": [276, 21, 286, 27, 171, 34, 187, 14, 215, 20, 255, 33, 224, 27, 299, 25],
    },
}
LIMITS = {"Task1": 256, "Task2": 105, "Task3": 335}  # tokens of a row, at most, in the submission
BLOCKS, WIDTH, INTERMEDIATE, HEADS, VOCABULARY, END = 16, 768, 3072, 12, 50304, 50279
EPOCHS = 10  # ours; the reference's epochs all cost the same, so it runs REFERENCE_EPOCHS
REFERENCE_EPOCHS = 1
SETTINGS = Settings("descend", (12, 13, 14), beta=3.0, alpha=900.0, coefficient="growing", batch_size=8, epochs=EPOCHS)


def prepare(folder: Path) -> None:
    """Write a random OLMo of 1B's depth and vocabulary and a third of its width."""
    torch.manual_seed(0)
    config = olmo(VOCABULARY, WIDTH, INTERMEDIATE, BLOCKS, HEADS, END)
    OlmoForCausalLM(config).save_pretrained(folder)


def texts(side: str) -> list[Text]:
    """Return rows of random tokens, of the real rows' lengths."""
    generator = torch.Generator().manual_seed(1 if side == "forget" else 2)
    lengths = [(task, min(n, LIMITS[task])) for task, table in LENGTHS[side].items() for n in table]
    drawn = [torch.randint(10, 50000, (n,), generator=generator).tolist() for _, n in lengths]
    return [Text(f"{side} {i}", task, drawn[i]) for i, (task, _) in enumerate(lengths)]


def ours(folder: Path) -> Side:
    """Run the submission's descent; time all of it (loading and caching too), an epoch, saving, and the bare blocks."""
    side = Side()
    started = time.perf_counter()
    decoder = Decoder(folder, torch.float32)
    losses, ends = [], []
    for loss, matrices in unlearn.descend(decoder, texts("forget"), texts("retain"), SETTINGS, float("inf")):
        ends.append(time.perf_counter() - started)
        losses.append(loss)
        if len(losses) == REFERENCE_EPOCHS:
            save_file({str(index): matrix for index, matrix in matrices.items()}, folder / "ours.safetensors.out")
    side.seconds = {"all": ends[-1], "epoch": (ends[-1] - ends[0]) / (EPOCHS - 1)}
    side.values = {"losses": losses}
    with side.timed("save"):
        checkpoint = Checkpoint(folder, folder.parent / "patched")
        checkpoint.save({decoder.key(f"layers.{i}.mlp.down_proj.weight"): w for i, w in matrices.items()})
    side.seconds["bare epoch"] = bare_epoch(decoder)
    return side


def bare_epoch(decoder: Decoder) -> float:
    """Return the seconds that the three blocks' forward and backward take on an epoch's tokens, none of them padding.

    The rows are of equal length, the mean of the real ones; gradients go where they must, and nothing else is done.
    """
    pairs = unlearn.plan(texts("forget"), texts("retain"), SETTINGS)
    lengths = [[len(texts(name)[row].tokens) for pair in pairs for row in pair[i]] for i, name in enumerate(LENGTHS)]
    rows, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    blocks = [decoder.block(index) for index in SETTINGS.trained]
    for block in blocks:
        block.mlp.down_proj.weight.requires_grad_()
    step = torch.randn(rows // len(pairs), tokens // rows, WIDTH, device=decoder.device)
    settle()
    started = time.perf_counter()
    for _ in pairs:
        hidden = step
        for block in blocks:
            hidden = decoder.run(block, hidden)
        hidden.square().mean().backward()  # type: ignore[no-untyped-call]
    settle()
    return time.perf_counter() - started


def settle() -> None:
    """Wait for what a GPU has been told to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reference(folder: Path) -> Side:
    """Run the plain loop."""
    side = Side()
    auto: Any = AutoModelForCausalLM
    model, frozen = (auto.from_pretrained(folder, dtype=torch.float32).to(unlearn.device()) for _ in range(2))
    seen: dict[Any, Tensor] = {}
    for one in (model, frozen):
        layer = one.model.layers[SETTINGS.trained[-1]]
        layer.register_forward_hook(lambda _m, _i, output, one=one: seen.__setitem__(one, output))
    trained = {index: model.model.layers[index].mlp.down_proj.weight for index in SETTINGS.trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=SETTINGS.learning_rate, weight_decay=0.0)
    directions = unlearn.steering_directions(WIDTH, SETTINGS.seed, unlearn.device())
    forget, retain = texts("forget"), texts("retain")
    pairs = unlearn.plan(forget, retain, SETTINGS)
    losses = []
    with side.timed("epoch"):
        for _ in range(REFERENCE_EPOCHS):
            coefficients: dict[str, float] = {}
            epoch = []
            for forget_rows, retain_rows in pairs:
                task = forget[forget_rows[0]].task
                ids, mask, counted = padded([forget[row] for row in forget_rows])
                model(input_ids=ids, attention_mask=mask)
                steered = seen[model][counted]
                norm = steered.detach().norm(dim=-1).mean().item()
                coefficients.setdefault(task, SETTINGS.beta * norm)
                ids, mask, counted = padded([retain[row] for row in retain_rows])
                model(input_ids=ids, attention_mask=mask)
                with torch.no_grad():
                    frozen(input_ids=ids, attention_mask=mask)
                steering = (coefficients[task] * directions[task]).expand_as(steered)
                held = torch.nn.functional.mse_loss(seen[model][counted], seen[frozen][counted])
                loss = torch.nn.functional.mse_loss(steered, steering) + SETTINGS.alpha * held
                model.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                epoch.append(loss.item())
            losses.append(sum(epoch) / len(epoch))
    side.seconds["epoch"] /= REFERENCE_EPOCHS
    side.values = {"losses": losses}
    save_file({str(i): weight.detach() for i, weight in trained.items()}, folder / "reference.safetensors.out")
    with side.timed("save"):
        model.save_pretrained(folder.parent / "saved")
    return side


def padded(rows: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and mask (rows, longest), padded on the left, and where a token counts: neither padding nor first."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[END] * (longest - len(row.tokens)) + row.tokens for row in rows], device=unlearn.device())
    mask = torch.tensor(
        [[0] * (longest - len(row.tokens)) + [1] * len(row.tokens) for row in rows], device=unlearn.device()
    )
    return ids, mask, mask.cumsum(1) > 1


def measure(work: Path) -> list[Measurement]:
    """Measure both sides."""
    folder = work / "olmo"
    prepare(folder)
    plain, fast = alone(reference, folder), alone(ours, folder)
    losses = relative(fast.values["losses"][:REFERENCE_EPOCHS], plain.values["losses"])
    ends = [load_file(folder / f"{name}.safetensors.out") for name in ("ours", "reference")]
    apart = max((ends[0][key] - ends[1][key]).abs().max().item() for key in ends[1])
    shape = f"{BLOCKS} x {WIDTH} x {INTERMEDIATE} x {VOCABULARY}, 48 + 48 rows"
    equal = f"loss {losses:.0e} relative, weights {apart:.0e}"
    epoch, whole = plain.seconds["epoch"], EPOCHS * plain.seconds["epoch"]
    peaks = fast.peak, plain.peak
    return [
        Measurement("descent: epoch", shape, fast.seconds["epoch"], epoch, ">= 20", equal, *peaks),
        Measurement("descent: 10 epochs", shape, fast.seconds["all"], whole, ">= 12", equal, *peaks),
        Measurement(
            "descent: of bare", shape, fast.seconds["epoch"], fast.seconds["bare epoch"], ">= 1/1.3", "-", *peaks
        ),
        Measurement("descent: memory, GB", shape, fast.peak / 1e9, plain.peak / 1e9, ">= 4", equal, *peaks),
        Measurement(
            "checkpoint: save", shape, fast.seconds["save"], plain.seconds["save"], "-", "test_unlearn", *peaks
        ),
    ]
