"""Adaptive RMU for SemEval-2025 Task 4: forget some documents, keep the rest. This file is the submission.

Reads   MODEL (a Hugging Face decoder, safetensors), FORGET_DIR/forget.{parquet,jsonl} and
        RETAIN_DIR/retain.{parquet,jsonl} with the columns id, input, output, task.
Writes  OUT: the checkpoint, a few of its `down_proj` matrices changed, every other tensor as it was; and OUT/run.json,
        what was run and what it cost.
Run     python -m pipeline.unlearn MODEL OUT FORGET_DIR RETAIN_DIR

Representation misdirection (RMU; Li et al., arXiv 2403.03218): let h_l(t) be the output of decoder block l at token t.
On forget text it is steered to a random direction u, on retain text it is held where it was, h0_l(t):

    L = mean_forget ||h_l(t) - c u||^2 + alpha mean_retain ||h_l(t) - h0_l(t)||^2

Adaptive RMU (Dang et al., arXiv 2408.06223) scales the steering vector with the activations, c = beta ||h0_l||, so
that it also works in late blocks, where activations are long. Only `down_proj` matrices change, so two things are true:

- The loss of one block is quadratic in its matrix, so its minimum is one linear solve (`solve`, the default): no
  learning rate, no epochs. The blocks are solved in turn, each on the activations that the earlier ones leave. Every
  task and kind of row weighs the same, answers more; text sampled from the model stands for all else that it knows; the
  last blocks steer nothing and repair, first of all the answers that came out wrong (`repair`). That is repeated with
  other weights of the forget documents until an attack by loss cannot tell these from mixtures of them, which stand for
  documents that the model never saw (`calibrate`).
- For descent by AdamW on blocks l-2 to l (`descend`, how RMU is published) nothing below block l-2 moves and nothing
  above block l matters: the blocks below run once and their output is kept.

Either way blocks are read from the checkpoint one at a time and no second model is held. Text is padded on the right,
where causal attention never looks, and neither padding nor the first token (its activation is an outlier in every
decoder) enters the loss.

A run that was killed goes on where it stopped, if called again with the same arguments, and ends with the same tensors
(but by descent on a GPU, where sums of gradients are not taken in one order).
"""

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import platform
import re
import resource
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Module = Any  # a decoder block; its parts are the model's own

TASKS = ("Task1", "Task2", "Task3")
COLUMNS = ("id", "input", "output", "task")
CACHE_BYTES = 4 << 30  # a larger cache of activations lies in a file
KEPT_BYTES = 1 << 30  # of the untouched model's activations, kept from one pass of calibration to the next
PART = 0.25  # of a GPU's memory: weights that fit in there are read once; so much may sampling keep of its texts
SAVING = 0.02  # the part of the time that may go into saving what a killed run goes on from
PIECE = 4  # words of a forget document that stay together in a mixture
COHERENCE = 0.79  # the loss of an unseen document over that of a mixture: its words belong together; see `calibrate`
ALIKE = 0.8  # the shortest row of a batch over the longest: padding is work
STRIP = 256  # columns of a symmetric sum that are computed together
NEAR = 0.5  # standard errors from .5 at which the estimated AUC is as good as .5
MIXTURES = 64  # at most 4 for each document, and one in any case
USUAL_SLOPE = -1.3  # of the AUC's probit against the log weight of the documents, as seen on small models
NOVEL = 3  # words: so many in a row of a row that was memorised are not written again; see `continuations`
OPENED = 3  # tokens of a retain row that open a text of its kind
TEMPERATURE = 1.15  # of sampled text
QUESTIONS = (
    "The following are multiple choice questions (with answers) about"  # the model goes on with subjects it knows
)
STEERED = 7  # blocks in turn, in closed form
HOLD = 300.0  # alpha of blocks that only repair: steered text weighs nothing against what is held
ROUNDS = 6  # of a repair, at most, each with more weight for the tokens that the one before got wrong
RAISED = 3.0  # that much more
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FEW = 0.002  # of the answers' tokens: so few may stay wrong
LEAD = 1.0  # nats by which the right token must lead: this runs in bfloat16, and other numerics say another near a tie


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to unlearn. Blocks count from 0; a block's output is its hidden state after the residual addition."""

    method: Literal["solve", "descend"]  # closed form, one block after the other; or AdamW
    trained: tuple[int, ...]  # blocks whose down_proj changes; descent steers the last of them, l
    beta: float  # c / ||h||; with a fixed coefficient, c itself
    alpha: float  # weight of the retain term
    seed: int = 0
    minutes: float = 55.0  # the judge kills after 60
    coefficient: Literal["adaptive", "growing", "fixed"] = "adaptive"  # what c is measured on: see `steer`
    # closed form
    repaired: int = 1  # this many of the trained blocks, the last, steer nothing: they only hold what is to be kept
    answer: float = 3.0  # weight of a token from which the answer is predicted, against 1 for any other
    creative: float = 1.0  # weight of the creative documents to forget, Task1's completions
    documents: float = 1.0  # weight of the documents that the judge's attack asks about, see `calibrate`; its start
    passes: int = 5  # solved at most so often, with a new weight of the documents
    general: float = 1.0  # weight of general text, sampled from the model, as a part of alpha
    general_ratio: float = 2.5  # tokens of general text for each retain token
    ridge: float = 1e-5  # added to the normal equations, as a part of their mean diagonal
    # descent
    learning_rate: float = 5e-5
    batch_size: int = 8  # rows of each side
    epochs: int = 100


class BadInput(Exception):
    """Wrong input, told in one line."""


def settings_for(depth: int, method: str = "solve") -> Settings:
    """Return the settings for a decoder of `depth` blocks.

    Closed form: `STEERED` blocks in turn, from the first tenth of the depth on, and one that repairs. What each does to
    other text adds up: of 30 blocks steered, unseen text lost all sense. So a deep decoder is also held more firmly.
    Creative documents weigh more: they are long, and much of their wording is that of documents that are kept.
    Descent: what arXiv 2506.16548 submitted for OLMo 1B (16 blocks) and 7B (32), and by relative depth for any other.
    """
    if method == "solve":
        first, alpha = (0, 1.0) if depth <= STEERED + 1 else (depth // 10, 20.0)
        blocks = tuple(range(first, min(depth, first + STEERED + 1)))
        return Settings("solve", blocks, repaired=min(1, depth - 1), beta=2.0, alpha=alpha, creative=3.0, general=1.5)
    block = {16: 14, 32: 26}.get(depth, max(2, round(depth * 0.84) - 1))
    trained = (block - 2, block - 1, block)
    return Settings(
        "descend", trained, beta=5.0 if depth == 32 else 3.0, alpha=900.0, batch_size=12 if depth == 32 else 8
    )


def unlearn(
    model_path: str,
    output_path: str,
    forget_path: str,
    retain_path: str,
    settings: Settings | None = None,
    inputs_path: str | None = None,
) -> None:
    """Write to `output_path` the model at `model_path` without what the forget rows taught it.

    Runs on the same model and rows can share what they have in common, in a folder `inputs_path`: see `read_inputs`.
    """
    started = time.monotonic()
    output = Path(output_path).resolve()
    if output == Path(model_path).resolve():
        raise BadInput(f"{output_path} is the model's own folder, which stays as it is")
    settings = settings or settings_for(depth_of(Path(model_path)))
    decoder = Decoder(Path(model_path), torch.float32 if settings.method == "descend" else None)
    check_settings(settings, decoder.depth)
    tokenizer = read_tokenizer(Path(model_path), decoder.config.vocab_size)
    forget = read_texts(Path(forget_path), "forget", tokenizer)
    retain = read_texts(Path(retain_path), "retain", tokenizer)
    check_disjoint(forget, retain)
    decoder.check_sum(settings.trained[0], forget[0])
    general: list[Text] = []
    inputs = None
    if inputs_path:
        general, inputs = read_inputs(Path(inputs_path), Path(model_path), decoder, forget, retain, settings)
    torch.manual_seed(settings.seed)

    checkpoint = Checkpoint(Path(model_path), output)
    deadline = started + settings.minutes * 60
    run = identity(Path(model_path), settings, forget, retain, inputs_path)
    with alone(output):
        progress = Progress(output / ".unfinished", run)
        try:
            if settings.method == "solve":
                if not inputs_path:
                    general = progress.texts("general")
                if not inputs_path and not general:
                    general = sample_general(Path(model_path), tokenizer, forget, retain, settings)
                    progress.save("general", {str(n): torch.tensor(text.tokens) for n, text in enumerate(general)})
                found = calibrate(decoder, tokenizer, forget, retain, general, settings, deadline, progress, inputs)
            else:
                found = descend(decoder, forget, retain, settings, deadline, progress)
            kept = progress.load("kept") if checkpoint.written() else {}
            lowest = kept["distance"].item() if kept else math.inf
            # To a target that grows from epoch to epoch losses do not compare: arXiv 2506.16548 submitted the last one.
            last = settings.coefficient == "growing"
            for distance, matrices in found:
                if distance < lowest or last:
                    lowest = distance
                    checkpoint.save(named(decoder, matrices))
                    progress.write("kept", {"distance": torch.tensor(distance, dtype=torch.float64)})
        except BadInput:
            progress.clear()  # nothing half-written
            raise
        checkpoint.record(settings, time.monotonic() - started)
        progress.clear()


def named(decoder: "Decoder", matrices: dict[int, Tensor]) -> dict[str, Tensor]:
    """Return the blocks' down_proj matrices by the checkpoint's keys."""
    return {decoder.key(f"layers.{index}.mlp.down_proj.weight"): matrix for index, matrix in matrices.items()}


# ---- texts ----


@dataclasses.dataclass(frozen=True)
class Text:
    """A row as the model reads it."""

    id: str
    task: str
    tokens: list[int]
    prompt: int = 0  # how many of the tokens are given; the rest is the answer


def read_texts(folder: Path, side: str, tokenizer: Any) -> list[Text]:
    """Read `folder`/<side>.parquet, or .jsonl if there is no parquet file, in file order."""
    parquet, jsonl = folder / f"{side}.parquet", folder / f"{side}.jsonl"
    path = parquet if parquet.is_file() else jsonl
    if not path.is_file():
        raise BadInput(f"{folder}: neither {parquet.name} nor {jsonl.name}")
    try:
        table = pandas.read_parquet(path) if path == parquet else pandas.read_json(path, lines=True, dtype=False)
        if len(table) == 1 and "id" in table and isinstance(table["id"][0], dict | list):
            table = pandas.DataFrame(table.iloc[0].to_dict())  # some public copies hold one line of columns
        rows = table.to_dict("records")
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read: {_first_line(error)}") from None
    for column in COLUMNS:
        if column not in table:
            raise BadInput(f"{path}: no column {column!r}")
    if table.empty:
        raise BadInput(f"{path}: no rows")
    return [_read_text(row, f"{path}: row {number}", tokenizer) for number, row in enumerate(rows, start=1)]


def _read_text(row: dict[Any, Any], place: str, tokenizer: Any) -> Text:
    for column in COLUMNS:
        if not isinstance(row[column], str) or not row[column].strip():
            raise BadInput(f"{place}: {column} is {row[column]!r}, expected text")
    if row["task"] not in TASKS:
        raise BadInput(f"{place}: task is {row['task']!r}, expected one of {', '.join(TASKS)}")
    tokens, prompt = (_encode(tokenizer, text) for text in (f"{row['input']} {row['output']}", row["input"]))
    if len(tokens) < 2:
        raise BadInput(f"{place}: a text of one token has nothing to steer")
    return Text(row["id"], row["task"], tokens, min(len(prompt), len(tokens) - 1))


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text).input_ids
    # Some releases of transformers append the end-of-text token (issue 47988).
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def check_disjoint(forget: list[Text], retain: list[Text]) -> None:
    """Raise `BadInput` if an id is on both sides, or twice on one."""
    seen = set()
    for text in forget + retain:
        if text.id in seen:
            raise BadInput(f"id {text.id!r} occurs twice in the forget and retain rows")
        seen.add(text.id)


def check_settings(settings: Settings, depth: int) -> None:
    """Raise `BadInput` where the model has no such block."""
    for block in settings.trained:
        if not 0 <= block < depth:
            raise BadInput(f"block {block} is not in a model of {depth} blocks (0 to {depth - 1})")
    if not settings.trained or list(settings.trained) != sorted(set(settings.trained)):
        raise BadInput(f"the trained blocks must be in order and at least one, not {settings.trained}")
    if settings.method == "solve":
        if not 0 <= settings.repaired < len(settings.trained):
            raise BadInput(f"of {len(settings.trained)} trained blocks {settings.repaired} repair: none is to steer")
        if settings.coefficient == "growing":
            raise BadInput("a growing coefficient follows a model in training: only the descent has one")
    for name in ("documents", "ridge", "learning_rate", "passes", "batch_size", "epochs"):
        if not getattr(settings, name) > 0:
            raise BadInput(f"{name} is {getattr(settings, name)}, expected more than 0")
    for name in ("beta", "alpha", "minutes", "answer", "creative", "general", "general_ratio"):
        if not getattr(settings, name) >= 0:
            raise BadInput(f"{name} is {getattr(settings, name)}, expected 0 or more")


# ---- the model, a block at a time ----


def device() -> torch.device:
    """Return the accelerator if there is one that computes in float64 (Apple's does not), else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found and found.type != "mps" else torch.device("cpu")


def hardware() -> str:
    """Return the name of the GPU, or the processor's kind."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the device computes in it (on a CPU some three times as fast), else float32."""
    if device().type != "cpu":
        return torch.bfloat16
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()  # not in every release
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32


def read_skeleton(folder: Path) -> Any:
    """Return the base model of a checkpoint without its weights (on the meta device)."""
    auto: Any = AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            # Not what the config may ask for: of the plain implementation it is the caller who hides later tokens.
            skeleton = auto.from_config(config, attn_implementation="sdpa").base_model
    except Exception as error:  # transformers raises a dozen types here, all of them about the folder
        raise BadInput(f"{folder}: not a usable model folder: {_first_line(error)}") from None
    for part in ("embed_tokens", "layers", "rotary_emb", "norm"):
        if not hasattr(skeleton, part):
            raise BadInput(f"{folder}: a {config.model_type} has no {part}: not a decoder of the kind known here")
    return skeleton


def depth_of(folder: Path) -> int:
    """Return the number of decoder blocks."""
    return len(read_skeleton(folder).layers)


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Return the checkpoint's tokenizer; each of its tokens must have one of `vocabulary` embeddings."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise BadInput(f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        raise BadInput(f"{folder}: no usable tokenizer: {_first_line(error)}") from None
    if not len(tokenizer):
        raise BadInput(f"{folder}: no usable tokenizer: it has no tokens")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: the tokenizer has no end-of-text token")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary:
        raise BadInput(f"{folder}: the tokenizer has a token {largest}, the model {vocabulary} embeddings")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


class Decoder:
    """The blocks of a checkpoint, read from its shards one at a time.

    Relies on what Hugging Face's decoders (OLMo, LLaMA, ...) share: a base model with `embed_tokens`, `layers`, `norm`
    and `rotary_emb`, and an MLP with `down_proj`.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.device = device()
        self.dtype = dtype or fast_dtype()
        self.skeleton = read_skeleton(folder)
        self.config = self.skeleton.config
        self.depth = len(self.skeleton.layers)
        self.shards = {key: path for path in sorted(folder.glob("*.safetensors")) for key in _shapes(path)}
        if not self.shards:
            raise BadInput(f"{folder}: no *.safetensors: weights in any other format are not read")
        self._check_shapes()
        size = self.dtype.itemsize * sum(value.numel() for value in self.skeleton.state_dict().values())
        self.keeps = self.device.type == "cuda" and size <= PART * torch.cuda.mem_get_info()[1]
        self.kept: dict[str, Tensor] = {}  # the weights that were read, by name
        with self.device:
            self.rotary = type(self.skeleton.rotary_emb)(config=self.config)

    def key(self, name: str) -> str:
        """Return the checkpoint's key of the base model's parameter `name`."""
        for key in (f"{self.skeleton.base_model_prefix}.{name}", name):
            if key in self.shards:
                return key
        raise BadInput(f"the checkpoint has no tensor {name}")

    def _check_shapes(self) -> None:
        """Raise `BadInput` unless config and checkpoint speak of the same tensors."""
        wanted = {self.key(name): list(value.shape) for name, value in self.skeleton.state_dict().items()}
        for path in sorted(set(self.shards.values())):
            for key, shape in _shapes(path).items():
                if key in wanted and shape != wanted[key]:
                    raise BadInput(f"{path}: tensor {key} has shape {shape}, by the config {wanted[key]}")
                if key not in wanted and "layers." in key and not key.endswith("rotary_emb.inv_freq"):  # of old LLaMAs
                    raise BadInput(f"{path}: tensor {key} has no place in the config's model")

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return one parameter on the device, from its shard. It may be kept for the next time: not to be changed."""
        wanted = dtype or self.dtype
        if wanted == self.dtype and name in self.kept:
            return self.kept[name]
        key = self.key(name)
        with safe_open(self.shards[key], framework="pt") as shard:
            value: Tensor = shard.get_tensor(key).to(self.device)
        if not value.isfinite().all():
            raise BadInput(f"{self.shards[key]}: tensor {key} has values that are not finite")
        value = value.to(wanted)
        if self.keeps and wanted == self.dtype:
            self.kept[name] = value
        return value

    def embed(self, texts: Sequence[Text]) -> list[Tensor]:
        """Return the embeddings of each text, (tokens, hidden)."""
        table = self.tensor("embed_tokens.weight")
        return [table[torch.tensor(text.tokens, device=self.device)] for text in texts]

    def block(self, index: int) -> Module:
        """Return block `index` with its weights, none of them trainable."""
        block = copy.deepcopy(self.skeleton.layers[index])
        weights = {name: self.tensor(f"layers.{index}.{name}") for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        return block.requires_grad_(False).eval()

    def norm(self) -> Module:
        """Return the normalisation after the last block, with its weights if it has any (OLMo's has none)."""
        norm = copy.deepcopy(self.skeleton.norm)
        norm.load_state_dict({name: self.tensor(f"norm.{name}") for name in norm.state_dict()}, assign=True)
        return norm.requires_grad_(False)

    def head(self) -> Tensor:
        """Return the matrix of the output head, (vocabulary, hidden): the embeddings' where the two are tied."""
        return self.tensor("lm_head.weight" if "lm_head.weight" in self.shards else "embed_tokens.weight")

    def run(self, block: Module, hidden: Tensor, down_proj: Tensor | None = None) -> Tensor:
        """Return the block's output on (rows, tokens, hidden), padded on the right; `down_proj` may replace its own."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        places = {"position_ids": positions, "position_embeddings": self.rotary(hidden, positions)}
        replaced = {} if down_proj is None else {"mlp.down_proj.weight": down_proj.to(hidden.dtype)}
        output: Any = functional_call(block, replaced, (hidden,), places)
        first: Tensor = output[0] if isinstance(output, tuple) else output  # a tuple in transformers 4
        return first

    @torch.no_grad()
    def check_sum(self, index: int, text: Text) -> None:
        """Raise `BadInput` unless a block adds what its down_proj gives to what else it gives, as all here assumes.

        Not so where a norm (OLMo 2) or a factor (Granite) comes between. In float32, on a few tokens.
        """
        block, seen = self.block(index).float(), []
        block.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        hidden = torch.stack(self.embed([text]))[:, :8].float()
        weight = block.mlp.down_proj.weight
        added = self.run(block, hidden, 2 * weight) - self.run(block, hidden)
        if (added - seen[0] @ weight.T).norm() > 0.01 * added.norm():
            raise BadInput(
                f"block {index} of a {self.config.model_type} does not just add what its down_proj gives:"
                " not a decoder of the kind known here"
            )

    @torch.no_grad()
    def advance(self, block: Module, states: list[Tensor], batch_tokens: int = 8192) -> list[Tensor]:
        """Return the block's output for each row of `states`, (tokens, hidden) in and out."""
        lengths = [len(state) for state in states]
        outputs = allocate(lengths, states[0].shape[1], self.dtype, self.device) if states else []
        for rows in batches(lengths, batch_tokens, ALIKE):
            hidden = self.run(block, pad_sequence([states[i] for i in rows], batch_first=True))
            for row, output in zip(rows, unpad(hidden, [lengths[i] for i in rows]), strict=True):
                outputs[row].copy_(output)
        return outputs

    @torch.no_grad()
    def activations(
        self, block: Module, states: list[Tensor], batch_tokens: int = 8192
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each row what enters down_proj and what leaves the block, (tokens, intermediate or hidden)."""
        if not states:
            return [], []
        lengths = [len(state) for state in states]
        entering = allocate(lengths, block.mlp.down_proj.weight.shape[1], self.dtype, self.device)
        leaving = allocate(lengths, states[0].shape[1], self.dtype, self.device)
        seen: list[Tensor] = []
        hook = block.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        for rows in batches(lengths, batch_tokens, ALIKE):
            output = self.run(block, pad_sequence([states[i] for i in rows], batch_first=True))
            for place, row in enumerate(rows):
                entering[row].copy_(seen[-1][place, : lengths[row]])
                leaving[row].copy_(output[place, : lengths[row]])
            seen.clear()
        hook.remove()
        return entering, leaving


def unpad(padded: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return the rows of (rows, tokens, width) at their own lengths."""
    return [row[:length] for row, length in zip(padded, lengths, strict=True)]


def allocate(lengths: Sequence[int], width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return uninitialised rows, (tokens, width) each; on a CPU and above CACHE_BYTES in a file, not in memory.

    The file is in the temporary folder (TMPDIR) and has no name: it goes with the process.
    """
    size = sum(lengths) * width
    if device.type == "cpu" and size * dtype.itemsize > CACHE_BYTES:
        with tempfile.NamedTemporaryFile() as file:
            buffer = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    else:
        buffer = torch.empty(size, dtype=dtype, device=device)
    return list(torch.split(buffer.view(-1, width), list(lengths)))


def batches(lengths: Sequence[int], limit: int, alike: float = 0.0) -> Iterator[list[int]]:
    """Yield index lists, longest first, each of at most `limit` padded tokens (or of one row).

    The shortest row of a batch has at least `alike` of the longest one's length.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (longest * (len(batch) + 1) > limit or lengths[index] < alike * longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of a safetensors file's tensors."""
    try:
        with safe_open(path, framework="pt") as shard:
            return {key: shard.get_slice(key).get_shape() for key in shard.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors has an exception type of its own, not exported in every release
        raise BadInput(f"{path}: not a safetensors file: {error}") from None


# ---- the loss, minimised in closed form ----


@dataclasses.dataclass
class Stream:
    """Rows on their way through the blocks, one tensor (tokens, hidden) a row: as they are now, and as they were."""

    weights: list[Tensor]  # of each token in the loss, (tokens,); 0 for the first
    states: list[Tensor]
    originals: list[Tensor]


def token_weights(texts: list[Text], answer: float) -> list[Tensor]:
    """Return the weight of each token, (tokens,) a row, with sum 1 over all rows: the loss is a weighted mean.

    Every task and kind of row weighs the same, as in the task's score, however many tokens it has. A token from which
    a part of the answer is predicted (or its end) weighs `answer` times as much as another; the first token nothing.
    """
    weights = []
    for text in texts:
        row = torch.ones(len(text.tokens))
        row[max(0, text.prompt - 1) :] = answer
        row[0] = 0.0
        weights.append(row)
    kinds = [kind_of(text) for text in texts]
    totals = {
        kind: sum(row.sum() for row, own in zip(weights, kinds, strict=True) if own == kind) for kind in set(kinds)
    }
    return [row / totals[kind] / len(totals) for row, kind in zip(weights, kinds, strict=True)]


@torch.no_grad()
def solve(
    decoder: Decoder,
    forget: list[Text],
    retain: list[Text],
    general: list[Text],
    settings: Settings,
    progress: "Progress | None" = None,
    inputs: list[list[Tensor]] | None = None,
    untouched: dict[int, list[list[Tensor]]] | None = None,
) -> dict[int, Tensor]:
    """Return the matrices, by block, that minimise RMU's loss block after block, each given what the earlier changed.

    With only W = down_proj of block l free, h_l = r + W a, where r and a (what enters down_proj) are constants: the
    loss is quadratic in W. One block can hardly tell forget from retain text; but the little that it moves forget text
    by helps the next block to tell them apart. The last blocks steer nothing: with forget text well apart by then, they
    put back what the steering did to the rest, first of all where an answer would be wrong (`repair`).

    `inputs` is what enters the first trained block, (tokens, hidden) a row, for the three kinds of text; without it the
    blocks below are run. `untouched` is what leaves the original blocks: read where it has a block, and filled for the
    next call on the same texts, up to `KEPT_BYTES`.
    """
    untouched = {} if untouched is None else untouched
    directions = steering_directions(decoder.config.hidden_size, settings.seed, decoder.device)
    streams = []
    for number, texts in enumerate((forget, retain, general)):
        start = inputs[number] if inputs else decoder.embed(texts)
        streams.append(Stream(token_weights(texts, settings.answer), start, start))
    streams[0].weights = [
        row * (settings.documents if is_document(text) else settings.creative if is_creative(text) else 1.0)
        for row, text in zip(streams[0].weights, forget, strict=True)
    ]
    matrices: dict[int, Tensor] = {}
    steering = settings.trained[: len(settings.trained) - settings.repaired]
    first = settings.trained[0] if inputs else 0
    for index in tqdm(range(first, settings.trained[-1] + 1), desc="blocks", mininterval=2):
        block = decoder.block(index)
        originals = untouched.get(index) or [decoder.advance(block, stream.originals) for stream in streams]
        if size_of(originals) * (len(untouched) + 1) <= KEPT_BYTES:
            untouched[index] = originals
        if index in settings.trained:
            targets = [steered(originals[0], forget, directions, settings), *originals[1:]]
            alpha = settings.alpha if index in steering else HOLD
            name = f"documents-{settings.documents!r}-block-{index}"
            saved = progress.load(name) if progress else {}
            fits = [
                Fit(stream.weights, *decoder.activations(block, stream.states), target)
                for stream, target in zip(streams, targets, strict=True)
            ]
            if saved:
                change = saved["change"].to(decoder.device)
            else:
                equations = equations_of(block.mlp.down_proj.weight, fits, (1.0, alpha, alpha * settings.general))
                if index in steering:
                    change = equations.solution(settings.ridge)
                else:
                    change = repair(decoder, index, retain, fits[1], alpha, equations, settings.ridge)
                del equations
                if progress:
                    progress.save(name, {"change": change})
            matrices[index] = decoder.tensor(f"layers.{index}.mlp.down_proj.weight", torch.float32) + change
            for stream, states in zip(streams, [fit.moved(change) for fit in fits], strict=True):
                stream.states = states
            del fits  # what entered down_proj: of the next block there will be as much
        else:
            for stream, original in zip(streams, originals, strict=True):
                stream.states = decoder.advance(block, stream.states) if matrices else original
        for stream, original in zip(streams, originals, strict=True):
            stream.originals = original
    return matrices


def size_of(streams: list[list[Tensor]]) -> int:
    """Return the bytes of the activations of some kinds of text."""
    return sum(row.nbytes for rows in streams for row in rows)


def steered(
    originals: list[Tensor], texts: list[Text], directions: dict[str, Tensor], settings: Settings
) -> list[Tensor]:
    """Return the forget rows' target, c u at every token: c is beta times the mean norm of the row's activations.

    With a fixed coefficient (RMU), c is beta itself.
    """
    fixed = settings.coefficient == "fixed"
    return [
        (settings.beta * (1.0 if fixed else mean_norm([original])) * directions[text.task]).expand_as(original)
        for original, text in zip(originals, texts, strict=True)
    ]


@dataclasses.dataclass
class Fit:
    """Tokens that a block's down_proj is fitted on, one tensor a row."""

    weights: list[Tensor]  # (tokens,)
    entering: list[Tensor]  # what enters down_proj, (tokens, intermediate)
    leaving: list[Tensor]  # what leaves the block, (tokens, hidden)
    target: list[Tensor]  # what should leave it, (tokens, hidden)

    def where(self, chosen: list[Tensor]) -> "Fit":
        """Return the chosen tokens, by a mask (tokens,) a row."""
        fields = (self.weights, self.entering, self.leaving, self.target)
        return Fit(*([row[mask] for row, mask in zip(rows, chosen, strict=True)] for rows in fields))

    def outputs(self, change: Tensor) -> Iterator[Tensor]:
        """Yield what leaves the block once down_proj has changed, (tokens, hidden) a row."""
        moved = change.T.to(next(iter(self.entering), change).dtype)
        for a, h in zip(self.entering, self.leaving, strict=True):
            yield h + a @ moved

    def moved(self, change: Tensor) -> list[Tensor]:
        """Return the same, written over what left the block before: that may be large and lie in a file."""
        for h, changed in zip(self.leaving, self.outputs(change), strict=True):
            h.copy_(changed)
        return self.leaving


class Equations:
    """The normal equations of the change of down_proj that brings a block's outputs closest to their targets.

    With t the target, a what enters and h what leaves at a token, and w its weight:

        dW = [sum w (t - h) a'] [sum w a a' + ridge]^-1

    The sums of a batch are taken in float32; they are added up, and the equations solved, in float64. Of the second
    sum, which is symmetric, only what is needed: the lower triangle, in columns of `STRIP`.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Begin with no tokens; `matrix` is a down_proj, (hidden, intermediate)."""
        self.cross = torch.zeros_like(matrix, dtype=torch.float64)
        self.gram = self.cross.new_zeros(matrix.shape[1], matrix.shape[1])

    def add(self, fit: Fit, weight: float) -> None:
        """Add tokens, their weights times `weight`."""
        for rows in batches([len(row) for row in fit.entering], 8192):
            w = weight * torch.cat([fit.weights[row] for row in rows]).to(self.gram.device)[:, None]
            a = torch.cat([fit.entering[row] for row in rows]).float()
            missing = torch.cat([fit.target[row].float() - fit.leaving[row].float() for row in rows])
            weighted = a * w
            for first in range(0, len(self.gram), STRIP):
                strip = slice(first, first + STRIP)
                self.gram[first:, strip] += weighted[:, first:].T @ a[:, strip]
            self.cross += missing.T @ weighted

    def solution(self, ridge: float) -> Tensor:
        """Return dW, (hidden, intermediate), float32; the ridge is a part of the mean diagonal.

        Of few tokens the sums have a low rank, and as they are rounded to float32, the smallest eigenvalues may be
        below 0 by more than the ridge: then it is taken ten times as large, and so on.
        """
        for larger in (1, 10, 100, 1000):
            gram = self.gram.clone()
            gram.diagonal().add_(larger * ridge * gram.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(gram)  # reads the lower triangle alone, as what follows
            if not failed:
                break
        change = torch.cholesky_solve(self.cross.T, factor).T
        if failed or not change.isfinite().all():
            raise BadInput(f"the solution is not finite: beta or the ridge {ridge} is out of range")
        return change.float().contiguous()


def equations_of(matrix: Tensor, fits: list[Fit], weights: Sequence[float]) -> Equations:
    """Return the equations of a down_proj with all tokens of some kinds of text, each with its weight."""
    equations = Equations(matrix)
    for fit, weight in zip(fits, weights, strict=True):
        equations.add(fit, weight)
    return equations


def repair(
    decoder: Decoder, index: int, texts: list[Text], fit: Fit, weight: float, equations: Equations, ridge: float
) -> Tensor:
    """Return the solution for block `index`, with more weight where an answer to be kept would be wrong.

    An answer is lost with its first wrong token, whatever the mean error is. So tokens from which a wrong one follows,
    or nearly (`LEAD`), weigh `RAISED` times as much, and the block is solved again, until few are; not those where the
    model was wrong from the start. `fit`, times `weight`, is what `texts` have added to the equations; its targets are
    what left the original block.
    """
    fit = dataclasses.replace(fit, weights=[weight * row for row in fit.weights])
    few = FEW * sum(len(text.tokens) - max(1, text.prompt) for text in texts)
    always: dict[int, Tensor] = {}  # by row, where the untouched model is wrong
    for _ in range(ROUNDS):
        change = equations.solution(ridge)
        wrong = mistakes(decoder, index + 1, list(fit.outputs(change)), texts, LEAD)
        new = [row for row, lost in enumerate(wrong) if lost.any() and row not in always]
        if new:
            before = mistakes(decoder, index + 1, [fit.target[row] for row in new], [texts[row] for row in new], 0.0)
            always |= dict(zip(new, before, strict=True))
        for row, never in always.items():
            wrong[row] &= ~never
        if sum(int(lost.sum()) for lost in wrong) <= few:
            return change
        equations.add(fit.where(wrong), RAISED - 1)
        for own, lost in zip(fit.weights, wrong, strict=True):
            own[lost] *= RAISED
    return equations.solution(ridge)


def mistakes(decoder: Decoder, index: int, states: list[Tensor], texts: list[Text], lead: float) -> list[Tensor]:
    """Return for each token, (tokens,) a row, whether a part of the answer follows that the model is not sure to say.

    It is sure of a token whose logit leads all others by more than `lead`. `states` is what enters block `index`; that
    and the blocks above it run here.
    """
    for above in range(index, decoder.depth):
        states = decoder.advance(decoder.block(above), states)
    norm, head = decoder.norm(), decoder.head()
    found = []
    for text, state in zip(texts, states, strict=True):
        start = max(0, text.prompt - 1)
        logits = (norm(state[start:-1]) @ head.T).float()
        right = torch.tensor(text.tokens[start + 1 :], device=logits.device)[:, None]
        led = logits.gather(1, right) - lead  # no other token may reach this
        wrong = torch.zeros(len(text.tokens), dtype=torch.bool)
        wrong[start:-1] = (logits.scatter(1, right, -math.inf).amax(dim=1, keepdim=True) >= led)[:, 0].cpu()
        found.append(wrong)
    return found


def calibrate(
    decoder: Decoder,
    tokenizer: Any,
    forget: list[Text],
    retain: list[Text],
    general: list[Text],
    settings: Settings,
    deadline: float,
    progress: "Progress | None" = None,
    inputs: list[list[Tensor]] | None = None,
) -> Iterator[tuple[float, dict[int, Tensor]]]:
    """Yield, for one weight of the forget documents after the other, how far off it is, and `solve`'s matrices.

    The judge's attack tells members from non-members by their loss, so a forgotten document must end as surprising as
    one never seen, and no more. None of those is given; mixtures of the forget documents (`mix`) stand for them:
    nothing is fitted on one, and its pieces are too short to be recited. It is less coherent than a document, by a
    factor that was much the same on all small models that were tried, COHERENCE. So the attack is tried on the
    documents and on mixtures whose losses are multiplied by it: how far off a weight is, is |AUC - .5|.
    """
    documents = [text for text in forget if is_document(text)]
    near = NEAR / math.sqrt(12 * max(1, len(documents)))  # an AUC of n draws has a variance of 1 / 12 n, or little more
    # With one pass there is nothing to decide, and of one document there is nothing to mix.
    compared = settings.passes > 1 and len(documents) > 1
    mixtures = mix(tokenizer, documents, settings.seed) if compared else []
    tried: list[tuple[float, float]] = []  # log weight, and the estimated AUC
    untouched: dict[int, list[list[Tensor]]] = {}
    longest = 0.0
    for _ in range(settings.passes):
        begun = time.monotonic()
        matrices = solve(decoder, forget, retain, general, settings, progress, inputs, untouched)
        found = attack(decoder, matrices, documents, mixtures) if mixtures else 0.5
        tried.append((math.log(settings.documents), found))
        yield abs(found - 0.5), matrices
        longest = max(longest, time.monotonic() - begun)
        if abs(found - 0.5) < near or time.monotonic() + longest > deadline:
            break
        settings = dataclasses.replace(settings, documents=math.exp(next_weight(tried)))


def attack(decoder: Decoder, matrices: dict[int, Tensor], documents: list[Text], mixtures: list[Text]) -> float:
    """Return the AUC by which the loss would tell the documents from unseen ones, for which mixtures stand."""
    own = losses(decoder, matrices, documents)[:, None]
    unseen = COHERENCE * losses(decoder, matrices, mixtures)[None]
    return ((own < unseen).double() + 0.5 * (own == unseen).double()).mean().item()


def next_weight(tried: list[tuple[float, float]]) -> float:
    """Return the log weight at which the AUC may be .5: by the secant through the last one tried and another.

    That is the last on the other side of .5, or, if there is none, the one before. The secant is that of the AUC's
    probit, which is straighter than the AUC itself: losses are about normal. With one weight tried, and where it is
    flat or rises, which is noise, a usual slope is taken; no step is longer than 1.5.
    """
    probits = [statistics.NormalDist().inv_cdf(min(0.99, max(0.01, found))) for _, found in tried]
    *before, (weight, off) = zip((weight for weight, _ in tried), probits, strict=True)
    across = [other for other in before if other[1] * off < 0] or before
    slope = USUAL_SLOPE
    if across:
        slope = min((off - across[-1][1]) / (weight - across[-1][0]), USUAL_SLOPE / 3)
    return weight - max(-1.5, min(1.5, off / slope))


def kind_of(text: Text) -> tuple[str, str]:
    """Return a row's task and its kind, "sc" or "qa" (its id ends so, with a digit); general text is of one kind."""
    return text.task, text.id[-3:-1] if text.task in TASKS else ""


def is_document(text: Text) -> bool:
    """Say whether a row is one of those documents that the judge's membership attack draws on: Task3's completions."""
    return kind_of(text) == ("Task3", "sc")


def is_creative(text: Text) -> bool:
    """Say whether a row is a creative document, Task1's completions."""
    return kind_of(text) == ("Task1", "sc")


def mix(tokenizer: Any, documents: list[Text], seed: int) -> list[Text]:
    """Return mixtures, some for each document: their n-th piece of `PIECE` words is that of a document drawn anew.

    So they are of the same kind and length, and each word is known where it stands, but they were never seen as such.
    """
    generator = torch.Generator().manual_seed(seed)
    written = [tokenizer.decode(text.tokens, skip_special_tokens=True) for text in documents]
    split = [re.findall(rf"(?:\s*\S+){{1,{PIECE}}}", text) for text in written]
    mixtures = []
    for own in split * max(1, min(4, MIXTURES // max(1, len(split)))):
        drawn = torch.randint(len(split), (len(own),), generator=generator).tolist()
        parts = [split[other][n] if n < len(split[other]) else own[n] for n, other in enumerate(drawn)]
        mixtures.append(Text("", "Task3", _encode(tokenizer, "".join(parts))))
    return [text for text in mixtures if len(text.tokens) > 1]


@torch.no_grad()
def losses(decoder: Decoder, matrices: dict[int, Tensor], texts: list[Text]) -> Tensor:
    """Return each text's mean loss, nats per token, (texts,), with `matrices` for the blocks' own down_proj."""
    states = decoder.embed(texts)
    for index in range(decoder.depth):
        block = decoder.block(index)
        if index in matrices:
            block.mlp.down_proj.weight.data = matrices[index].to(decoder.dtype)
        states = decoder.advance(block, states)
    norm, head = decoder.norm(), decoder.head()
    found = []
    for text, state in zip(texts, states, strict=True):
        logits = (norm(state[:-1]) @ head.T).float()
        found.append(cross_entropy(logits, torch.tensor(text.tokens[1:], device=decoder.device)))
    return torch.stack(found)


@torch.no_grad()
def sample_general(
    folder: Path, tokenizer: Any, forget: list[Text], retain: list[Text], settings: Settings
) -> list[Text]:
    """Return text that the model itself writes, half of it opened as a retain row is, half as MMLU's prompts are.

    A sample of all else that it knows, held in place as the retain rows do not touch it: other text of the rows' own
    kinds, which suffers first, and questions with their answers. Rows that it has memorised it may not write
    (`continuations`), for what it recites is held already, or to be forgotten; nor may it end a text, to go on with one
    of another kind. Unseen text is more surprising than what a model likes to write: so it is drawn at a temperature
    above 1. No data but the model's own enters.
    """
    length = 128
    wanted = round(settings.general_ratio * sum(len(text.tokens) for text in retain) / length)
    if settings.general == 0 or wanted == 0:
        return []
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=fast_dtype(), use_safetensors=True, trust_remote_code=False)
    model = model.to(device()).eval()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BadInput(f"{folder}: tensor {name} has values that are not finite")
    check_same(Decoder(folder), model, retain[0])
    generator = torch.Generator(device()).manual_seed(settings.seed)
    kinds = sorted({kind_of(text) for text in retain})
    rows = [[text.tokens for text in retain if kind_of(text) == kind] for kind in kinds]
    before = len(_encode(tokenizer, ""))  # tokens that it puts before a text, if any
    questions = [*([] if before else [tokenizer.eos_token_id]), *_encode(tokenizer, QUESTIONS)]
    openings = []
    for number in range(wanted):
        own = rows[number // 2 % len(rows)]
        row = own[int(torch.randint(len(own), (1,), generator=generator, device=device()))]
        openings.append(questions if number % 2 else row[: before + OPENED])
    barred = continuations(tokenizer, forget + retain)
    written: list[list[int]] = []
    together = rows_together(model, length, torch.cuda.mem_get_info()[1] if device().type == "cuda" else math.inf)
    for first in range(0, wanted, together):
        part = openings[first : first + together]
        written += write(model, part, length, generator, barred, tokenizer.eos_token_id)
    return [Text(f"general {n}", "general", tokens) for n, tokens in enumerate(written)]


def rows_together(model: Any, length: int, memory: float) -> int:
    """Return how many texts to sample at once: 256, or fewer if their keys and values took more than `PART` of memory.

    On 7B in bfloat16 these take 67 MB a text of 128 tokens.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize * length
    return max(1, int(min(256, PART * memory / size)))


@torch.no_grad()
def check_same(decoder: Decoder, model: Any, text: Text) -> None:
    """Raise `BadInput` unless the first block leaves here what it leaves in transformers' model.

    Not so where embeddings are scaled on their way in (Gemma).
    """
    seen: list[Any] = []
    hook = model.base_model.layers[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(input_ids=torch.tensor([text.tokens], device=decoder.device), use_cache=False)
    hook.remove()
    expected = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0].float()
    found = decoder.advance(decoder.block(0), decoder.embed([text]))[0].float()
    if (found - expected).norm() > 0.05 * expected.norm():  # in bfloat16 some .005
        raise BadInput(
            f"the first block of a {decoder.config.model_type} does not leave what it should:"
            " not a decoder of the kind known here"
        )


def continuations(tokenizer: Any, texts: list[Text]) -> dict[tuple[int, ...], list[int]]:
    """Return for each run of tokens in the texts, about `NOVEL` words less one token, the tokens that follow it."""
    words = sum(len(tokenizer.decode(text.tokens, skip_special_tokens=True).split()) for text in texts)
    length = max(2, round(NOVEL * sum(len(text.tokens) for text in texts) / max(1, words)))
    found: dict[tuple[int, ...], list[int]] = {}
    for text in texts:
        for end in range(length, len(text.tokens) + 1):
            found.setdefault(tuple(text.tokens[end - length : end - 1]), []).append(text.tokens[end - 1])
    return found


@torch.no_grad()
def write(
    model: Any,
    openings: list[list[int]],
    length: int,
    generator: torch.Generator,
    barred: dict[tuple[int, ...], list[int]],
    end: int,
) -> list[list[int]]:
    """Return `length` tokens a row: its opening, and what the model goes on with, sampled.

    No row goes on as `barred` has it, by the last tokens (all runs of one length) those that may not follow; nor with
    the token `end`.
    """
    reach = len(next(iter(barred), ()))
    rows = [opening[:1] for opening in openings]
    past = None
    for place in range(1, length):
        last = torch.tensor([row[-1:] for row in rows], device=generator.device)
        output = model(input_ids=last, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[:, -1].float()
        logits[:, end] = -math.inf
        for number, row in enumerate(rows):
            if known := barred.get(tuple(row[-reach:])):
                logits[number, known] = -math.inf
        drawn = draw(logits / TEMPERATURE, generator)[:, 0].tolist()
        for row, opening, token in zip(rows, openings, drawn, strict=True):
            row.append(opening[place] if place < len(opening) else token)
    return rows


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one token a row, (rows, 1), drawn by the probabilities of logits (rows, vocabulary).

    By the inverse of their sum: `multinomial` draws a random number for each entry, a third of the time of sampling.
    """
    reached = logits.float().softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, device=logits.device) * reached[:, -1:]
    return torch.searchsorted(reached, drawn, right=True).clamp(max=logits.shape[1] - 1)


def read_inputs(
    folder: Path, model: Path, decoder: Decoder, forget: list[Text], retain: list[Text], settings: Settings
) -> tuple[list[Text], list[list[Tensor]]]:
    """Return general text, and what enters the first trained block for each forget, retain and general row.

    Both lie in `folder`, a file a block. Raise `BadInput` if they are of another model, other rows or precision.
    """
    if settings.method != "solve":
        raise BadInput(f"{folder}: only the closed form goes on from the inputs of a block")
    path = folder / f"block-{settings.trained[0]}.safetensors"
    if _run_of(path) != origin(model, forget, retain, decoder.dtype):
        raise BadInput(f"{path}: missing, damaged, or of another model, other rows or another precision")
    with safe_open(path, framework="pt") as file:
        general = [Text(f"general {n}", "general", row) for n, row in enumerate(file.get_tensor("tokens").tolist())]
        sides = {"forget": forget, "retain": retain, "general": general}
        lengths = {name: [len(text.tokens) for text in texts] for name, texts in sides.items()}
        return general, [list(file.get_tensor(name).to(decoder.device).split(lengths[name])) for name in sides]


# ---- the loss, and its descent ----


@dataclasses.dataclass(frozen=True)
class Side:
    """One side's rows around the trained blocks, one tensor a row. All are constant: nothing below is trained.

    The first trained block's output is `around` + W `entering`, with W its down_proj.
    """

    texts: list[Text]
    entering: list[Tensor]  # what enters its down_proj, (tokens, intermediate)
    around: list[Tensor]  # what goes around it, (tokens, hidden), float32
    outputs: list[Tensor]  # h0_l, what left the steered block before training, (tokens, hidden)


def rmu_loss(forget: Tensor, steering: Tensor, retain: Tensor, original: Tensor, alpha: float) -> Tensor:
    """Return RMU's loss for activations (tokens, hidden), as a mean over the hidden dimension too."""
    return mse_loss(forget, steering) + alpha * mse_loss(retain, original)


def steering_directions(hidden: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Return one random unit vector a task, (hidden,), of uniform entries in [0, 1), normalised."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {task: torch.rand(hidden, generator=generator) for task in TASKS}
    return {task: (vector / vector.norm()).to(device) for task, vector in vectors.items()}


def mean_norm(states: Sequence[Tensor]) -> float:
    """Return the norm of the activations, averaged over a row's tokens but the first, then over the rows."""
    return torch.stack([state[1:].float().norm(dim=-1).mean() for state in states]).mean().item()


def plan(forget: list[Text], retain: list[Text], settings: Settings) -> list[tuple[list[int], list[int]]]:
    """Return an epoch's pairs of a forget and a retain batch, each of one task in file order; batches are shuffled."""
    generator = torch.Generator().manual_seed(settings.seed)
    sides = []
    for texts in (forget, retain):
        by_task = [[i for i, text in enumerate(texts) if text.task == task] for task in TASKS]
        cut = [rows[n : n + settings.batch_size] for rows in by_task for n in range(0, len(rows), settings.batch_size)]
        sides.append([cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()])
    forget_batches, retain_batches = sides
    steps = max(map(len, sides))  # the shorter side begins again
    return [(forget_batches[n % len(forget_batches)], retain_batches[n % len(retain_batches)]) for n in range(steps)]


@torch.no_grad()
def cache(decoder: Decoder, texts: list[Text], settings: Settings) -> Side:
    """Run the blocks up to the steered one, once."""
    states = decoder.embed(texts)
    for index in range(settings.trained[0]):
        states = decoder.advance(decoder.block(index), states)
    block = decoder.block(settings.trained[0])
    weight = block.mlp.down_proj.weight.float()
    entering, left = decoder.activations(block, states)
    around = allocate([len(state) for state in states], weight.shape[0], torch.float32, decoder.device)
    for a, h, rest in zip(entering, left, around, strict=True):
        rest.copy_(h.float() - a.float() @ weight.T)
    for index in range(settings.trained[0] + 1, settings.trained[-1] + 1):
        left = decoder.advance(decoder.block(index), left)
    return Side(texts, entering, around, left)


def descend(
    decoder: Decoder,
    forget: list[Text],
    retain: list[Text],
    settings: Settings,
    deadline: float,
    progress: "Progress | None" = None,
) -> Iterator[tuple[float, dict[int, Tensor]]]:
    """Yield after an epoch of AdamW its mean loss and the trained matrices, by block.

    After each one, unless the caller takes so long that it would get more than `SAVING` of the time; but at the end it
    has had the best, or the last one where losses do not compare: see `unlearn`. A run that goes on after a kill first
    yields that of the epochs before.
    """
    sides = cache(decoder, forget, settings), cache(decoder, retain, settings)
    blocks = {index: decoder.block(index) for index in range(settings.trained[0] + 1, settings.trained[-1] + 1)}
    # Masters in float32: in bfloat16 a step of 5e-5 is rounded away on any weight above about 0.016.
    masters = {
        index: decoder.tensor(f"layers.{index}.mlp.down_proj.weight", torch.float32).clone().requires_grad_()
        for index in settings.trained
    }
    optimizer = torch.optim.AdamW(list(masters.values()), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    directions = steering_directions(decoder.config.hidden_size, settings.seed, decoder.device)
    pairs = plan(forget, retain, settings)
    longest = due = 0.0
    told = True
    means, best = restore(progress.load("descent") if progress else {}, masters, optimizer)
    if best:
        yield min(means), best
    for _ in tqdm(range(len(means), settings.epochs), desc="epochs", mininterval=2):
        begun = time.monotonic()
        coefficients: dict[str, float] = {}
        losses = []
        for pair in pairs:
            activations = forward(decoder, blocks, masters, sides, pair)
            steering = steer(sides[0], pair[0], activations[0], directions, coefficients, settings)
            original = torch.cat([sides[1].outputs[row][1:] for row in pair[1]]).float()
            loss = rmu_loss(activations[0], steering, activations[1], original, settings.alpha)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        if not math.isfinite(mean):
            raise BadInput(
                f"the loss is {mean}: the learning rate {settings.learning_rate} or beta {settings.beta} is too large"
            )
        means.append(mean)
        better = mean == min(means) or settings.coefficient == "growing"
        if better:
            best, told = {index: master.detach().clone() for index, master in masters.items()}, False
        given = time.monotonic()
        if given >= due:
            yield mean, {index: master.detach() for index, master in masters.items()}
            told = told or better
            due = time.monotonic() + (time.monotonic() - given) / SAVING
        if progress:
            progress.save("descent", descent_state(means, best, masters, optimizer))
        longest = max(longest, time.monotonic() - begun)
        if time.monotonic() + longest > deadline:
            break
    if not told:
        yield (means[-1] if settings.coefficient == "growing" else min(means)), best


def forward(
    decoder: Decoder,
    blocks: dict[int, Module],
    masters: dict[int, Tensor],
    sides: tuple[Side, Side],
    pair: tuple[list[int], list[int]],
) -> tuple[Tensor, Tensor]:
    """Return h_l at every token but the first of the pair's forget rows and of its retain rows, (tokens, hidden).

    Both sides' rows run together, in batches of similar length: the less padding, the less work.
    """
    rows = [(side, row) for side, numbers in zip(sides, pair, strict=True) for row in numbers]
    lengths = [len(side.around[row]) for side, row in rows]
    entering = torch.cat([side.entering[row] for side, row in rows])
    around = torch.cat([side.around[row] for side, row in rows])
    first = masters[min(masters)]
    states = list(torch.split((around + entering @ first.to(entering.dtype).T).to(entering.dtype), lengths))
    outputs = list(states)
    for group in batches(lengths, 4096, ALIKE):
        hidden = pad_sequence([states[i] for i in group], batch_first=True)
        for index, block in blocks.items():
            hidden = decoder.run(block, hidden, masters.get(index))
        for i, output in zip(group, unpad(hidden, [lengths[i] for i in group]), strict=True):
            outputs[i] = output
    texts = [output[1:].float() for output in outputs]
    return torch.cat(texts[: len(pair[0])]), torch.cat(texts[len(pair[0]) :])


def steer(
    side: Side,
    rows: list[int],
    activations: Tensor,
    directions: dict[str, Tensor],
    coefficients: dict[str, float],
    settings: Settings,
) -> Tensor:
    """Return the steering vector c u at every steered token of a forget batch, (tokens, hidden).

    c is, by `settings.coefficient`: "adaptive", beta times the mean norm of the row's own original activations
    (Adaptive RMU); "growing", beta times the mean norm of the batch under the model in training, measured at the first
    batch of the task in an epoch (the submission of arXiv 2506.16548); "fixed", beta itself (RMU).
    """
    task = side.texts[rows[0]].task
    if settings.coefficient == "growing":
        coefficients.setdefault(task, settings.beta * activations.detach().norm(dim=-1).mean().item())
    vectors = []
    for row in rows:
        own = settings.beta * (mean_norm([side.outputs[row]]) if settings.coefficient == "adaptive" else 1.0)
        vectors.append((coefficients.get(task, own) * directions[task]).expand(len(side.outputs[row]) - 1, -1))
    return torch.cat(vectors)


# ---- what a killed run leaves ----


def origin(model: Path, *inputs: object) -> str:
    """Return a hash of the model's files and the inputs.

    A model file is known by size and time of change: to hash 27 GB could take longer than what it saves.
    """
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir()) if path.name[0] != "."]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr((files, inputs)).encode()).hexdigest()


def identity(model: Path, *inputs: object) -> str:
    """Return a hash of all that decides a result: this file, the model's files, the inputs, versions and device."""
    machine = (torch.__version__, transformers.__version__, hardware(), fast_dtype(), torch.get_num_threads())
    return origin(model, Path(__file__).read_bytes(), inputs, machine)


class Progress:
    """What a run has done so far: a folder of safetensors files, each of which names the run it belongs to.

    What was not saved, as saving had just taken its part of the time, is computed again.
    """

    def __init__(self, folder: Path, run: str) -> None:
        """Take over what `folder` has of the same run; remove it if it is of another one, or damaged."""
        self.folder, self.run, self.due = folder, run, 0.0
        found = [_run_of(path) for path in folder.glob("*.safetensors")]
        if found and set(found) == {run}:
            print(f"{folder}: goes on where a killed run stopped", file=sys.stderr)
        elif folder.exists():
            print(f"{folder}: not used: damaged, or of other inputs or settings", file=sys.stderr)
            shutil.rmtree(folder)

    def load(self, name: str) -> dict[str, Tensor]:
        """Return what was saved under `name`, or nothing."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def texts(self, name: str) -> list[Text]:
        """Return texts whose tokens were saved by their number."""
        saved = self.load(name)
        return [Text(f"{name} {n}", name, saved[str(n)].tolist()) for n in range(len(saved))]

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save `tensors`, unless that is so soon after the last time that saving would take more than `SAVING`."""
        begun = time.monotonic()
        if begun < self.due:
            return
        self.write(name, tensors)
        ended = time.monotonic()
        self.due = ended + (ended - begun) / SAVING

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save `tensors`, whatever time it takes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.folder / f"{name}.safetensors") as temporary:
                save_file(tensors, temporary, {"run": self.run})
        except Exception as error:  # a full disk; safetensors has an exception type of its own, as in `_shapes`
            print(f"{self.folder}: {name} cannot be kept for a run that is killed: {error}", file=sys.stderr)

    def clear(self) -> None:
        """Remove the folder, and the one around it if nothing else is in there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to `path` when the block ends well and removed when it fails."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _run_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("run")
    except Exception:  # as in `_shapes`
        return None


def descent_state(
    means: list[float], best: dict[int, Tensor], masters: dict[int, Tensor], optimizer: torch.optim.AdamW
) -> dict[str, Tensor]:
    """Return all that descent goes on from: the epochs' losses; by block the matrix, the best one, AdamW's moments."""
    state = {"losses": torch.tensor(means, dtype=torch.float64)}
    for index, master in masters.items():
        parts = {"matrix": master.detach(), "best": best[index], **optimizer.state[master]}
        state |= {f"{index}.{name}": value for name, value in parts.items()}
    return state


@torch.no_grad()
def restore(
    state: dict[str, Tensor], masters: dict[int, Tensor], optimizer: torch.optim.AdamW
) -> tuple[list[float], dict[int, Tensor]]:
    """Put the state's matrices and moments in place; return its losses and best matrices, or nothing of no state."""
    if not state:
        return [], {}
    best = {}
    for index, master in masters.items():
        parts = {name: state[f"{index}.{name}"].to(master.device) for name in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[master] = parts
        master.copy_(state[f"{index}.matrix"])
        best[index] = state[f"{index}.best"]
    return state["losses"].tolist(), best


# ---- the checkpoint ----


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Wait until no other process writes `output`: a killed workflow may leave one that goes on.

    The lock is a file beside `output`, as the other stages have it; where none can be made, nobody is waited for.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            output.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(output.with_name(f".{output.name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # it goes with the process
        yield


class Checkpoint:
    """The output folder: the input's files, with some tensors replaced inside their shards.

    A shard is copied, the tensors' bytes are overwritten in the copy, and the copy is renamed into place: whenever the
    process is killed, each file is whole. Weights in other formats than safetensors are left out: nothing in them is
    forgotten.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.shards = {key: path for path in sorted(source.glob("*.safetensors")) for key in _shapes(path)}
        self.files = [path for path in sorted(source.iterdir()) if path.is_file() and path.name[0] != "."]
        self.files = [path for path in self.files if path.suffix not in PICKLED]
        self.begun = False

    def written(self) -> bool:
        """Say whether the output folder has all files, of this run or another."""
        return all((self.target / path.name).exists() for path in self.files)

    def save(self, tensors: dict[str, Tensor]) -> None:
        """Write the checkpoint with `tensors`, by checkpoint key, in the original ones' place and precision.

        The tensors are the same ones at each call. The first writes all files, and removes an earlier run's weights and
        its record; later ones write what changes.
        """
        self.target.mkdir(parents=True, exist_ok=True)
        if not self.begun:
            names = {path.name for path in self.files}
            older = [path for path in self.target.iterdir() if path.name not in names]
            for path in older:
                if path.name == "run.json" or path.name.endswith((".safetensors", ".safetensors.index.json")):
                    path.unlink()
        changed = {self.shards[key] for key in tensors}
        for path in self.files:
            if path in changed or not self.begun:
                with replaced(self.target / path.name) as temporary:
                    shutil.copyfile(path, temporary)
                    if path in changed:
                        overwrite(temporary, {key: value for key, value in tensors.items() if self.shards[key] == path})
        self.begun = True

    def record(self, settings: Settings, seconds: float) -> None:
        """Write run.json: settings, versions, hardware, threads, wall time and peak memory."""
        run = {
            "settings": dataclasses.asdict(settings),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "hardware": hardware(),
            "threads": torch.get_num_threads(),  # on a CPU another number changes the last digits
            "wall_seconds": round(seconds, 2),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_accelerator_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
        with replaced(self.target / "run.json") as temporary:
            temporary.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def overwrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors inside a safetensors file.

    The format: 8 bytes, little endian, the length of a JSON header; the header, with the dtype, shape and byte range of
    each tensor; the bytes.
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for key, value in tensors.items():
            entry = header[key]
            stored = value.to("cpu", dtypes[entry["dtype"]]).contiguous()
            if list(stored.shape) != entry["shape"]:
                raise BadInput(f"{path}: tensor {key} has shape {entry['shape']}, not {list(stored.shape)}")
            file.seek(8 + length + entry["data_offsets"][0])
            file.write(stored.view(torch.uint8).numpy().tobytes())


# ---- the command line ----


def main(argv: Sequence[str]) -> None:
    """Run from the command line: the judge's four arguments, and any setting by its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "output", "forget", "retain"):
        parser.add_argument(name)
    parser.add_argument("--method", choices=["solve", "descend"], default="solve", help="default: %(default)s")
    parser.add_argument("--trained", type=int, nargs="+", metavar="BLOCK", help="blocks whose down_proj changes")
    parser.add_argument(
        "--coefficient", choices=["adaptive", "growing", "fixed"], help="how the steering vector is scaled"
    )
    for name in (
        "beta",
        "alpha",
        "answer",
        "creative",
        "general",
        "general-ratio",
        "documents",
        "ridge",
        "learning-rate",
        "minutes",
    ):
        parser.add_argument(f"--{name}", type=float)
    for name in ("repaired", "passes", "batch-size", "epochs", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--inputs", metavar="FOLDER", help="what enters the trained blocks, from pipeline.layer_inputs")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    model, output, forget, retain = (given.pop(name) for name in ("model", "output", "forget", "retain"))
    inputs = given.pop("inputs", None)
    if "trained" in given:
        given["trained"] = tuple(given["trained"])
    settings = dataclasses.replace(settings_for(depth_of(Path(model)), given["method"]), **given)
    unlearn(model, output, forget, retain, settings, inputs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BadInput, OSError) as error:  # the latter of a full disk, or a folder that cannot be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
