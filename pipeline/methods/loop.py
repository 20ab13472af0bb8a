"""What the peers' methods share: command line, answers and their losses, the descent, scaling of published settings.

CE is the mean negative log likelihood (nats) of the answer's tokens given the prompt; a row is read as input + " " +
output. Text is padded on the right, where causal attention never looks, and only answer tokens go through the head.

The rule that scales published settings. They are those of the competition's 7B model and its 1112 forget rows; on
another model and other data

- the learning rate is the published one x 4096 / hidden size (AdamW, as in muP, arXiv 2203.03466), x --strength, the
  only knob that is tuned, the same for all methods;
- the rows a step are as published x forget rows / 1112, at least one and at most as published: as many steps an epoch
  as there, for AdamW goes a distance of about the learning rate x the steps;
- a LoRA rank is as published, but at most an eighth of the hidden size;
- a number of blocks is the published part of the depth;
- the epochs are as published. Where --minutes is too short for them (the time of a step is measured first), they are
  cut evenly, so that every chunk is visited and a decaying learning rate comes to its end.

All use AdamW without weight decay (none, or .01 as published: too little to matter in so few steps), and gradients cut
to norm 1, as the trainer of most peers does unless told otherwise. Masters are float32. On an accelerator a pass is in
bfloat16; on a CPU in float32, where bfloat16, also if the processor has it, took twice the time (the backward pass of
attention ten times).
"""

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from pipeline import unlearn
from pipeline.lib.models import CONSTANT, Model, device, load_model, load_tokenizer
from pipeline.lib.stage import BadInput, keep_apart, whole_folder
from pipeline.unlearn import Checkpoint, Text, batches, check_disjoint, read_texts

HIDDEN_SIZE, FORGET_ROWS = 4096, 1112  # of the 7B model and the competition's data
PROBED = 6  # steps whose time is measured; the first is slow, it allocates


def clock() -> float:
    """Return seconds: of work on a CPU, so that a method gets the same time on a busy machine; else on the wall."""
    return time.process_time() if device().type == "cpu" else time.monotonic()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a method descends, as published (7B, the competition's data) or, by `scaled`, as it is used."""

    learning_rate: float
    epochs: int  # passes over the forget rows
    forget_rows: int  # a step
    retain_rows: int  # a step
    warmup: int = 0  # epochs in which the learning rate rises from 0
    decay: bool = True  # linear, to 0


# Of the organisers' four baselines only the scores are known here. These are the settings of TOFU (Maini et al.,
# arXiv 2401.06121, section 4), whose gradient ascent, gradient difference and KL minimisation they are.
TOFU = Settings(learning_rate=1e-5, epochs=5, forget_rows=32, retain_rows=32, warmup=1)


@dataclasses.dataclass(frozen=True)
class Step:
    """The rows of one optimiser step."""

    forget: list[Text]
    retain: list[Text]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a method is given. It changes the weights of `model`, which is in float32."""

    model: Model
    vocabulary: int  # tokens of the tokenizer
    forget: list[Text]
    retain: list[Text]
    seed: int
    strength: float
    deadline: float  # of the last step, by `clock`


@dataclasses.dataclass(frozen=True)
class Done:
    """What a method did: the settings that it used, the passes over the forget rows and the steps that it made."""

    settings: dict[str, Any]
    epochs: float
    steps: int


# ---- the scaling rule ----


def scaled(published: Settings, job: Job) -> Settings:
    """Return the settings for this model and data."""
    part = min(1.0, len(job.forget) / FORGET_ROWS)
    return dataclasses.replace(
        published,
        learning_rate=published.learning_rate * HIDDEN_SIZE / job.model.config.hidden_size * job.strength,
        forget_rows=max(1, round(published.forget_rows * part)),
        retain_rows=max(min(1, published.retain_rows), round(published.retain_rows * part)),
    )


def scaled_blocks(published: int, depth: int, job: Job) -> int:
    """Return the number of blocks that is the same part of this model's depth as `published` is of `depth`."""
    own: int = job.model.config.num_hidden_layers
    return max(1, round(published * own / depth))


def scaled_lora(rank: int, targets: Sequence[str], dropout: float, job: Job) -> LoraConfig:
    """Return a low-rank adapter on the linear layers named `targets`, with alpha = rank: it is added unscaled."""
    rank = max(1, min(rank, job.model.config.hidden_size // 8))
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(targets))


# ---- answers ----


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model predicts at the answer tokens of some rows, one row after the other."""

    logits: Tensor  # (tokens, vocabulary), float32
    targets: Tensor  # (tokens,)
    lengths: list[int]  # tokens of each row's answer

    def losses(self) -> Tensor:
        """Return the negative log likelihood of each answer token, (tokens,)."""
        return cross_entropy(self.logits, self.targets, reduction="none")


def answer_lengths(rows: Sequence[Text]) -> list[int]:
    """Return the number of answer tokens of each row; a first token is never predicted."""
    return [len(row.tokens) - max(1, row.prompt) for row in rows]


def answer_states(model: Model, rows: Sequence[Text]) -> Tensor:
    """Return what enters the head where the rows' answer tokens are predicted, (answer tokens of all rows, hidden)."""
    ids = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True).to(model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    places = zip(states, rows, answer_lengths(rows), strict=True)
    return torch.cat([state[len(row.tokens) - 1 - length : len(row.tokens) - 1] for state, row, length in places])


def answers(model: Model, rows: Sequence[Text]) -> Answers:
    """Run the rows through the model."""
    targets = torch.cat([torch.tensor(row.tokens[max(1, row.prompt) :]) for row in rows]).to(model.device)
    logits = model.get_output_embeddings()(answer_states(model, rows)).float()
    return Answers(logits, targets, answer_lengths(rows))


def both_answers(model: Model, step: Step) -> tuple[Answers, Answers]:
    """Run a step's forget and retain rows through the model, in one batch."""
    run = answers(model, step.forget + step.retain)
    middle, count = sum(answer_lengths(step.forget)), len(step.forget)
    return (
        Answers(run.logits[:middle], run.targets[:middle], run.lengths[:count]),
        Answers(run.logits[middle:], run.targets[middle:], run.lengths[count:]),
    )


def precision(model: Model) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 on an accelerator."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu")


@torch.no_grad()
def frozen(model: Model, rows: Sequence[Text], values: Callable[[Model, Sequence[Text]], Tensor]) -> dict[str, Tensor]:
    """Return, by row id, what `values` gives at the row's answer tokens (tokens, ...) before anything is trained."""
    kept = {}
    with precision(model):
        for numbers in batches([len(row.tokens) for row in rows], 8192):
            group = [rows[number] for number in numbers]
            for row, value in zip(group, torch.split(values(model, group), answer_lengths(group)), strict=True):
                kept[row.id] = value.clone()
    return kept


def answer_losses(model: Model, rows: Sequence[Text]) -> Tensor:
    """Return the negative log likelihood of each answer token, (answer tokens of all rows,)."""
    return answers(model, rows).losses()


# ---- which rows, when ----


def shuffled(job: Job, settings: Settings) -> list[list[Step]]:
    """Return each epoch's steps: every forget row once, in a new order; retain rows one after the other, endlessly."""
    random = Random(job.seed)
    retain = _endless(job.retain, random)
    epochs = []
    for _ in range(settings.epochs):
        order = random.sample(job.forget, len(job.forget))
        cut = [order[n : n + settings.forget_rows] for n in range(0, len(order), settings.forget_rows)]
        epochs.append([Step(rows, list(islice(retain, settings.retain_rows))) for rows in cut])
    return epochs


def _endless(rows: Sequence[Text], random: Random) -> Iterator[Text]:
    while True:
        yield from random.sample(rows, len(rows))


# ---- the descent ----


def train_only(model: Model, wanted: Callable[[str], bool]) -> list[Parameter]:
    """Let the parameters with a wanted name be trained, no other, and return them."""
    chosen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def descend(
    job: Job,
    parameters: Sequence[Parameter],
    settings: Settings,
    phases: Sequence[Sequence[Sequence[Step]]],
    objective: Callable[[Step], Tensor],
) -> Done:
    """Minimise `objective`, a loss of a step's rows, by AdamW; stop between two steps at the deadline.

    `phases[p][e]` holds the steps of epoch e of phase p. A phase has an optimiser and a learning rate schedule of its
    own; all phases are cut to the same number of epochs.
    """
    job.model.train()
    an_epoch = seconds_a_step(job, parameters, phases[0][0]) * sum(len(phase[0]) for phase in phases)
    epochs = epochs_within(settings.epochs, an_epoch, job.deadline - clock())
    done, moved = 0, False
    for phase in tqdm(phases, desc="phases", mininterval=2, disable=len(phases) == 1):
        steps = [step for epoch in phase[:epochs] for step in epoch]
        optimizer = AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        schedule = schedule_of(optimizer, settings, len(phase[0]), len(steps))
        for step in tqdm(steps, desc="steps", mininterval=2, leave=False):
            if clock() > job.deadline:
                break
            with precision(job.model):
                loss = objective(step)
            if not loss.isfinite():
                raise BadInput(f"the loss is {loss.item()} at step {done + 1}: --strength {job.strength} is too large")
            moved = moved or schedule.get_last_lr()[0] > 0  # a warm-up's first step is of length 0
            update(loss, optimizer, parameters)
            schedule.step()
            done += 1
    if not moved:
        raise BadInput("--minutes is too short for a single step")
    used = {"phases": len(phases), "epochs": epochs, "gradient_norm": 1.0}
    return Done(dataclasses.asdict(settings) | used, done / sum(len(phase[0]) for phase in phases), done)


def update(loss: Tensor, optimizer: AdamW, parameters: Sequence[Parameter]) -> None:
    """Make one step down the gradient, which is cut to norm 1."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def schedule_of(optimizer: AdamW, settings: Settings, steps_an_epoch: int, steps: int) -> Any:
    """Return the learning rate's schedule: a rise from 0, if any, then linear to 0 at the last step, or constant."""
    rise = min(settings.warmup * steps_an_epoch, steps // 2)
    if settings.decay:
        return get_linear_schedule_with_warmup(optimizer, rise, steps)  # type: ignore[no-untyped-call]
    return get_constant_schedule_with_warmup(optimizer, rise)


def seconds_a_step(job: Job, parameters: Sequence[Parameter], steps: Sequence[Step]) -> float:
    """Return the time of a step, measured on the first few with a learning rate of 0: the weights stay as they are."""
    optimizer = AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    times = []
    for step in steps[:PROBED]:
        begun = clock()
        with precision(job.model):
            loss = answer_losses(job.model, step.forget + step.retain).mean()
        update(loss, optimizer, parameters)
        loss.item()  # an accelerator is waited for
        times.append(clock() - begun)
    return statistics.median(times[1:] or times)


def epochs_within(published: int, seconds_an_epoch: float, seconds: float) -> int:
    """Return how many epochs fit, one at least and the published number at most."""
    return max(1, min(published, int(seconds / seconds_an_epoch)))


# ---- the command line ----


def run_method(argv: Sequence[str], text: str | None, name: str, method: Callable[[Job], Done]) -> None:
    """Read the command line that all methods share, run `method` and write OUT, whole or not at all."""
    started = time.monotonic()
    args = _arguments(argv, text)
    for folder in (args.model, args.forget, args.retain):
        keep_apart(folder, args.output)
    job = begin(args, clock() + args.minutes * 60)
    done = method(job)
    with whole_folder(args.output) as folder:
        save(job.model, args.model, folder)
        cost = {
            "wall_seconds": round(time.monotonic() - started, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        settings = {"seed": args.seed, "minutes": args.minutes, "strength": args.strength} | done.settings
        run = {
            "method": name,
            "settings": settings,
            "epochs": done.epochs,
            "steps": done.steps,
            **surroundings(),
            **cost,
        }
        (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _arguments(argv: Sequence[str], text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder, with its tokenizer")
    parser.add_argument("output", type=Path, help="checkpoint folder to write")
    parser.add_argument("forget", type=Path, help="folder with forget.parquet or forget.jsonl")
    parser.add_argument("retain", type=Path, help="folder with retain.parquet or retain.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=55.0,
        help="of training, see `clock` (default: %(default)s)",
    )
    parser.add_argument("--strength", type=float, default=1.0, help="times the learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    for flag in ("minutes", "strength"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise BadInput(f"--{flag} is {getattr(args, flag)}, expected a number above 0")
    return args


def begin(args: argparse.Namespace, deadline: float) -> Job:
    """Read the model, in float32, and the rows of both sides."""
    model, tokenizer = load_model(args.model, torch.float32), load_tokenizer(args.model)
    try:
        forget, retain = read_texts(args.forget, "forget", tokenizer), read_texts(args.retain, "retain", tokenizer)
        check_disjoint(forget, retain)
    except unlearn.BadInput as error:  # the submission stands alone and has an exception of its own
        raise BadInput(str(error)) from None
    torch.manual_seed(args.seed)
    return Job(model, len(tokenizer), forget, retain, args.seed, args.strength, deadline)


def save(model: Model, source: Path, folder: Path) -> None:
    """Write the files of the checkpoint `source` to `folder`, with the model's weights in their places."""
    checkpoint, weights = Checkpoint(source, folder), model.state_dict()
    for key in checkpoint.shards:
        if key not in weights and not key.endswith(CONSTANT):
            raise BadInput(f"{source}: the model calls no tensor {key}, it cannot be put back")
    checkpoint.save({key: weights[key] for key in checkpoint.shards if key in weights})
    (folder / ".snakemake_timestamp").unlink(missing_ok=True)  # the workflow's mark on `source`, copied with the rest


def surroundings() -> dict[str, Any]:
    """Return the versions and the hardware, as `pipeline.unlearn` records them."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"versions": versions, "hardware": unlearn.hardware()}
