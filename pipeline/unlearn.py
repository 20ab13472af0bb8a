"""Unlearning for SemEval-2025 Task 4: forget some documents, keep the rest. This file is the submission.

Reads   MODEL (a Hugging Face decoder, safetensors), FORGET_DIR/forget.{parquet,jsonl} and
        RETAIN_DIR/retain.{parquet,jsonl} with the columns id, input, output, task.
Writes  OUT: the checkpoint, a few of its `down_proj` matrices changed, every other tensor as it was; and OUT/run.json,
        what was run and what it cost.
Run     python -m pipeline.unlearn MODEL OUT FORGET_DIR RETAIN_DIR

Representation misdirection (RMU; Li et al., arXiv 2403.03218): let h_l(t) be the output of decoder block l at token t.
On forget text it is steered to a random direction u, on retain text it is held where it was, h0_l(t):

    L = mean_forget ||h_l(t) - c u||^2 + alpha mean_retain ||h_l(t) - h0_l(t)||^2

Adaptive RMU (Dang et al., arXiv 2408.06223) scales the steering vector with the activations, c = beta ||h0_l||, so
that it also works in late blocks, where activations are long. A random direction moves activations far before an answer
changes, and other text pays for it. So what is submitted (`aim`, the default) keeps the second term and aims the first:

- Only `down_proj` matrices W_l of a few blocks change, so what leaves such a block moves by dW_l a, a what enters
  down_proj. Wanted are the dW_l that move what is to be held least,

      sum_l sum_held w ||dW_l a||^2 + ridge ||dW_l||^2,

  and change the log odds of forget tokens, in a weighted sum for each row, by so much. To first order that is one
  linear solve (`step`), for the gradient of log odds in W_l is known; it is repeated, some rounds, as Gauss and Newton
  do.
- Held are the retain rows and text sampled from the model, which stands for all else that it knows
  (`general_wishes`). Tokens of retain answers, and what ends them, that become doubtful all the same are raised in the
  same solve; rounds go on until they are right.
- A document is to become as surprising as one never seen, and no more, for an attack by loss asks about that. No unseen
  document is given; how surprising one would be is estimated (`unseen_loss`), and goals are spread about the estimate
  (`spread`).

RMU and Adaptive RMU themselves are here for the study of blocks and claims:

- The loss of one block is quadratic in its matrix, so its minimum is one linear solve (`solve`): no learning rate, no
  epochs. The blocks are solved in turn, each on the activations that the earlier ones leave.
- For descent by AdamW on blocks l-2 to l (`descend`, how RMU is published) nothing below block l-2 moves and nothing
  above block l matters: the blocks below run once and their output is kept.

By `solve` and `descend` blocks are read from the checkpoint one at a time and no second model is held; `aim` needs the
blocks from the first trained one on, and keeps them if there is room. Text is padded on the right, where causal
attention never looks, and is left out. The first token, whose activation is an outlier in every decoder, RMU neither
steers nor holds; `aim` holds it.

A run that was killed goes on where it stopped, if called again with the same arguments, and ends with the same tensors
(but on a GPU, which does not take sums in one order).
"""

import gc

if __name__ == "__main__":
    gc.disable()  # while libraries are imported: what they make stays, and to look for garbage in it takes a second

import argparse
import bisect
import contextlib
import copy
import dataclasses
import fcntl
import functools
import hashlib
import itertools
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss, softplus
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Module = Any  # a decoder block; its parts are the model's own

TASKS = ("Task1", "Task2", "Task3")
COLUMNS = ("id", "input", "output", "task")
CACHE_BYTES = 4 << 30  # a larger cache of activations lies in a file
PART = 0.25  # of memory: weights that fit in there are read once; so much of a GPU's may sampling keep of its texts
SAVING = 0.02  # the part of the time that may go into saving what a killed run goes on from
ATTACKED = ("Task3", "sc")  # the documents that the judge's membership attack asks about
COPIES = 4  # mixtures that each piece of a document is in; half as many where they take long
GUESS = 0.55  # of what a guess among all tokens loses: so much are forget tokens to lose in the mean
MOST = 5.0  # nats that they are to lose at most: said once in 150 times
LEAST = 0.02  # nats that a token is to lose
PIECE = 4  # words of a document that stay together in the mixtures that say which of them any document may have
TOLD = 128  # tokens whose logits are held at once
PASS_TOKENS = 8192  # of a batch that is passed through a block without gradients
GRADIENT_TOKENS = 2048  # of a batch whose logits or gradients are taken
PLAIN = 512  # tokens: up to there a CPU takes longer for torch's fused attention in bfloat16 than for plain products
FORMED_BYTES = 1 << 30  # of gradients in a matrix, of all rows, that are formed together
DAMPING = 0.01  # of the equations between rows, as a part of their diagonal
PADDING = 128  # tokens at most that a batch is padded by: they are work, but so is another batch
STRIP = 256  # columns of a symmetric sum that are computed together
NOVEL = 3  # words: so many in a row of a row that was memorised are not written again; see `continuations`
GENERAL_LENGTH = 128  # tokens of each text that stands for all else that the model knows
OPENED = 3  # tokens of a retain row that open a text of its kind
TEMPERATURE = 1.15  # of sampled text
OWN = 96  # texts that the model writes as it writes documents, to measure how surprising an unseen one is
OWN_MOST = 384  # of these if there are as many forget rows: then they take a small part of the time, and tell more
SMALL = 30e6  # weights: with more of them, on a CPU, texts take long, and half as many must do
OWN_LENGTH = 192  # tokens of each, at most
OWN_TEMPERATURE = 1.33  # found on small models, by what `unseen_loss` says of documents that they never saw
ROUGHLY = 3  # of so many texts one is enough for a level that is found again before the end
SPREAD = 0.2  # of the level, the standard deviation of what documents are to lose: see `spread`
QUESTIONS = (
    "The following are multiple choice questions (with answers) about"  # the model goes on with subjects it knows
)
TRAINED = 8  # blocks in closed form
PUSH = 1.5  # times what a row is short of in the mean: its tokens' log odds are to change by so much at most
LARGEST = 4.0  # nats by which a token's log odds are to change in one round
OVERSHOT = 0.05  # a document whose loss is so much above its aim is pulled back
REACH = 0.2  # of what a document is to lose: so much at most does holding it change
PROMPT = 0.3  # weight of the given part of a document, where the attack does not ask for it
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
LEAD = 1.0  # nats by which the right token must lead: this runs in bfloat16, and other numerics say another near a tie
SAFE = 2.0  # nats by which it is to lead once it is raised
NARROW = 0.25  # nats by which the last rounds leave none to lead by less
FEW = 0.03  # of the tokens of retain answers: while more are wrong, forget rows have another round


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to unlearn. Blocks count from 0; a block's output is its hidden state after the residual addition."""

    method: Literal["aim", "solve", "descend"]  # aimed steering; RMU in closed form, or by AdamW
    trained: tuple[int, ...]  # blocks whose down_proj changes; descent steers the last of them, l
    beta: float = 2.0  # RMU: c / ||h||; with a fixed coefficient, c itself
    alpha: float = 1.0  # RMU: weight of the retain term
    seed: int = 0
    minutes: float = 55.0  # the judge kills after 60
    coefficient: Literal["adaptive", "growing", "fixed"] = "adaptive"  # RMU: what c is measured on, see `steer`
    # aimed, and in closed form
    answer: float = 3.0  # weight of a token from which the answer is predicted, against 1 for any other
    general: float = 1.5  # weight of general text, sampled from the model, against 1 for the retain rows
    general_ratio: float = 2.5  # tokens of general text for each retain token
    ridge: float = 1e-5  # added to the normal equations, as a part of their mean diagonal
    rounds: int = 5  # of aimed steering, the last of retain rows alone; up to three times as many if these need them
    # descent
    learning_rate: float = 5e-5
    batch_size: int = 8  # rows of each side
    epochs: int = 100


class BadInput(Exception):
    """Wrong input, told in one line."""


def settings_for(depth: int, method: str = "aim") -> Settings:
    """Return the settings for a decoder of `depth` blocks.

    Aimed, and in closed form: `TRAINED` blocks, from the first tenth of the depth on.
    Descent: what arXiv 2506.16548 submitted for OLMo 1B (16 blocks) and 7B (32), and by relative depth for any other.
    """
    if method == "descend":
        block = {16: 14, 32: 26}.get(depth, max(2, round(depth * 0.84) - 1))
        trained, beta, batch_size = (block - 2, block - 1, block), 5.0 if depth == 32 else 3.0, 12 if depth == 32 else 8
        return Settings("descend", trained, beta=beta, alpha=900.0, batch_size=batch_size)
    first = 0 if depth <= TRAINED else depth // 10
    blocks = tuple(range(first, min(depth, first + TRAINED)))
    if method == "solve":
        return Settings("solve", blocks, alpha=1.0 if depth <= TRAINED else 20.0)
    return Settings("aim", blocks, general_ratio=2.0)


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
            if settings.method == "descend":
                found = descend(decoder, forget, retain, settings, deadline, progress)
            else:
                model = functools.cache(lambda: whole_model(Path(model_path), retain[-1]))
                own = [in_words(tokenizer, text) for text in progress.texts("own")]
                if not inputs_path:
                    general = progress.texts("general")
                    if not general:
                        general, own = sample_texts(model, tokenizer, forget, retain, settings)
                    for name, texts in (("own", own), ("general", general)):  # the last one says that both are there
                        progress.write(name, {str(n): torch.tensor(text.tokens) for n, text in enumerate(texts)})
                model.cache_clear()  # the whole model is not needed any more
                if settings.method == "aim":
                    end = tokenizer.eos_token_id
                    found = aim(decoder, forget, retain, general, own, end, settings, deadline, progress)
                else:
                    found = iter([(0.0, solve(decoder, forget, retain, general, settings, progress, inputs))])
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
    words: list[int] = dataclasses.field(default_factory=list)  # the number of the word that each token is a part of


def read_texts(folder: Path, side: str, tokenizer: Any) -> list[Text]:
    """Read `folder`/<side>.parquet, or .jsonl if there is no parquet file, in file order."""
    parquet, jsonl = folder / f"{side}.parquet", folder / f"{side}.jsonl"
    path = parquet if parquet.is_file() else jsonl
    if not path.is_file():
        raise BadInput(f"{folder}: neither {parquet.name} nor {jsonl.name}")
    try:
        rows = _read_parquet(path) if path == parquet else _read_lines(path)
        if len(rows) == 1 and isinstance(rows[0].get("id"), dict | list):  # some public copies are one line of columns
            rows = _in_rows(rows[0])
    except (ValueError, OSError, ImportError) as error:  # the last where nothing reads parquet
        raise BadInput(f"{path}: cannot be read: {_first_line(error)}") from None
    if not rows:
        raise BadInput(f"{path}: no rows")
    for column in COLUMNS:
        if not any(column in row for row in rows):
            raise BadInput(f"{path}: no column {column!r}")
    return [_read_text(row, f"{path}: row {number}", tokenizer) for number, row in enumerate(rows, start=1)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet  # only here, and not its `read_table`: that loads pandas, which takes half a second

    rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    return rows


def _read_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            rows.append(row)
    return rows


def _in_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of columns, each a list or, by row, an object."""
    names = [name for name in COLUMNS if name in columns]
    places = columns["id"] if isinstance(columns["id"], dict) else range(len(columns["id"]))
    try:
        if all(len(columns[name]) == len(places) for name in names):
            return [{name: columns[name][place] for name in names} for place in places]
    except (LookupError, TypeError):
        pass
    raise ValueError("a column has other rows than id")


def _read_text(row: dict[Any, Any], place: str, tokenizer: Any) -> Text:
    for column in COLUMNS:
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise BadInput(f"{place}: {column} is {row.get(column)!r}, expected text")
    if row["task"] not in TASKS:
        raise BadInput(f"{place}: task is {row['task']!r}, expected one of {', '.join(TASKS)}")
    tokens, words = _encode_words(tokenizer, f"{row['input']} {row['output']}")
    prompt = _encode(tokenizer, row["input"])
    if len(tokens) < 2:
        raise BadInput(f"{place}: a text of one token has nothing to steer")
    return Text(row["id"], row["task"], tokens, min(len(prompt), len(tokens) - 1), words)


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text).input_ids
    # Some releases of transformers append the end-of-text token (issue 47988).
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] else tokens


def _encode_words(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the tokens, and for each the number of the word that it ends in; of one before the text 0."""
    tokens = _encode(tokenizer, text)
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True).offset_mapping]
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    return tokens, [max(0, bisect.bisect_left(starts, end) - 1) for end in ends[: len(tokens)]]


def in_words(tokenizer: Any, text: Text) -> Text:
    """Return a text that was sampled as the tokenizer cuts it, with the numbers of its words."""
    tokens, words = _encode_words(tokenizer, tokenizer.decode(text.tokens, skip_special_tokens=True))
    return dataclasses.replace(text, tokens=tokens, words=words)


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
    if settings.method == "aim":
        for name in ("beta", "alpha", "coefficient"):
            if getattr(settings, name) != getattr(Settings("aim", settings.trained), name):
                raise BadInput(f"{name} is of RMU: aimed steering has none (--method solve or descend)")
    if settings.method != "descend" and settings.coefficient == "growing":
        raise BadInput("a growing coefficient follows a model in training: only the descent has one")
    for name in ("answer", "ridge", "rounds", "learning_rate", "batch_size", "epochs"):
        if not getattr(settings, name) > 0:
            raise BadInput(f"{name} is {getattr(settings, name)}, expected more than 0")
    for name in ("beta", "alpha", "minutes", "general", "general_ratio"):
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
            # Not what the config may ask for: of others it is the caller who hides later tokens.
            skeleton = auto.from_config(config, attn_implementation="causal").base_model
    except Exception as error:  # transformers raises a dozen types here, all of them about the folder
        raise BadInput(f"{folder}: not a usable model folder: {_first_line(error)}") from None
    for part in ("embed_tokens", "layers", "rotary_emb", "norm"):
        if not hasattr(skeleton, part):
            raise BadInput(f"{folder}: a {config.model_type} has no {part}: not a decoder of the kind known here")
    return skeleton


def causal_attention(
    module: Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float | None = None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of the last positions, (rows, new, heads, width), to all before them and themselves.

    `query` is (rows, heads, new, width), `key` and `value` (rows, heads that others share, positions, width). Torch's
    own, but where that takes a CPU three to eight times as long as plain products, forth and back: in bfloat16 and not
    too long, or of one new position. There heads that share keys go in side by side, as further positions.
    """
    rows, heads, new, width = query.shape
    sharing, positions = key.shape[1:3]
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16 and positions <= PLAIN
    if new > 1 and not plain:
        own: tuple[Tensor, Tensor | None] = FUSED(module, query, key, value, mask, scaling=scaling, **more)
        return own
    if new == 1:  # a part of a `Room`: of what lies together the products take a third of the time, the copy included
        key, value = key.contiguous(), value.contiguous()
    packed = (query * (scaling or width**-0.5)).reshape(rows, sharing, -1, width)
    scores = (packed @ key.mT).view(rows, sharing, -1, new, positions)
    if new > 1:
        scores = scores + scores.new_full((new, positions), -math.inf).triu(1 + positions - new)
    shares = scores.softmax(-1).view(rows, sharing, -1, positions)
    return (shares @ value).view(rows, heads, new, width).transpose(1, 2), None


FUSED: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
AttentionInterface.register("causal", causal_attention)


def takes_long(model: Any) -> bool:
    """Say whether passing text through a model, or its skeleton, takes so long that less of it must do."""
    return device().type == "cpu" and sum(weight.numel() for weight in model.parameters()) > SMALL


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
    if not tokenizer.is_fast:
        raise BadInput(f"{folder}: the tokenizer cannot say where its tokens are in a text: no fast one")
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
        room = torch.cuda.mem_get_info()[1] if self.device.type == "cuda" else CACHE_BYTES
        self.keeps = size <= PART * room
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
    def advance(self, block: Module, states: list[Tensor]) -> list[Tensor]:
        """Return the block's output for each row of `states`, (tokens, hidden) in and out."""
        lengths = [len(state) for state in states]
        outputs = allocate(lengths, states[0].shape[1], self.dtype, self.device) if states else []
        for rows in batches(lengths, PASS_TOKENS, PADDING):
            hidden = self.run(block, pad_sequence([states[i] for i in rows], batch_first=True))
            for row, output in zip(rows, unpad(hidden, [lengths[i] for i in rows]), strict=True):
                outputs[row].copy_(output)
        return outputs

    @torch.no_grad()
    def activations(self, block: Module, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each row what enters down_proj and what leaves the block, (tokens, intermediate or hidden)."""
        if not states:
            return [], []
        lengths = [len(state) for state in states]
        entering = allocate(lengths, block.mlp.down_proj.weight.shape[1], self.dtype, self.device)
        leaving = allocate(lengths, states[0].shape[1], self.dtype, self.device)
        seen: list[Tensor] = []
        hook = block.mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        for rows in batches(lengths, PASS_TOKENS, PADDING):
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


def batches(lengths: Sequence[int], limit: int, padding: float = math.inf) -> Iterator[list[int]]:
    """Yield index lists, longest first, each of at most `limit` padded tokens (or one row), `padding` at most added."""
    batch: list[int] = []
    padded = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0] if batch else index]
        padded += longest - lengths[index]
        if batch and (longest * (len(batch) + 1) > limit or padded > padding):
            yield batch
            batch, padded = [], 0
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


def token_weights(texts: list[Text], answer: float, first: float = 0.0) -> list[Tensor]:
    """Return the weight of each token, (tokens,) a row, with sum 1 over all rows: the loss is a weighted mean.

    Every task and kind of row weighs the same, as in the task's score, however many tokens it has. From the last token
    of the prompt on, the first that an answer is predicted from, tokens weigh `answer` times as much as others; the
    first token of all by `first`.
    """
    weights = []
    for text in texts:
        row = torch.ones(len(text.tokens))
        row[max(0, text.prompt - 1) :] = answer
        row[0] = first
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
) -> dict[int, Tensor]:
    """Return the matrices, by block, that minimise RMU's loss block after block, each given what the earlier changed.

    With only W = down_proj of block l free, h_l = r + W a, where r and a (what enters down_proj) are constants: the
    loss is quadratic in W. One block can hardly tell forget from retain text; but the little that it moves forget text
    by helps the next block to tell them apart.

    `inputs` is what enters the first trained block, (tokens, hidden) a row, for the three kinds of text; without it the
    blocks below are run.
    """
    directions = steering_directions(decoder.config.hidden_size, settings.seed, decoder.device)
    streams = []
    for number, texts in enumerate((forget, retain, general)):
        start = inputs[number] if inputs else decoder.embed(texts)
        streams.append(Stream(token_weights(texts, settings.answer), start, start))
    matrices: dict[int, Tensor] = {}
    first = settings.trained[0] if inputs else 0
    for index in tqdm(range(first, settings.trained[-1] + 1), desc="blocks", mininterval=2):
        block = decoder.block(index)
        originals = [decoder.advance(block, stream.originals) for stream in streams]
        if index in settings.trained:
            targets = [steered(originals[0], forget, directions, settings), *originals[1:]]
            name = f"block-{index}"
            saved = progress.load(name) if progress else {}
            fits = [
                Fit(stream.weights, *decoder.activations(block, stream.states), target)
                for stream, target in zip(streams, targets, strict=True)
            ]
            if saved:
                change = saved["change"].to(decoder.device)
            else:
                weights = (1.0, settings.alpha, settings.alpha * settings.general)
                change = equations_of(block.mlp.down_proj.weight, fits, weights).solution(settings.ridge)
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

    def moved(self, change: Tensor) -> list[Tensor]:
        """Return what leaves the block once down_proj has changed, written over what left before: that may be large."""
        moved = change.T.to(next(iter(self.entering), change).dtype)
        for a, h in zip(self.entering, self.leaving, strict=True):
            h.add_(a @ moved)
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
        for rows in batches([len(row) for row in fit.entering], PASS_TOKENS):
            w = weight * torch.cat([fit.weights[row] for row in rows]).to(self.gram.device)[:, None]
            a = torch.cat([fit.entering[row] for row in rows]).float()
            missing = torch.cat([fit.target[row].float() - fit.leaving[row].float() for row in rows])
            weighted = a * w
            add_outer(self.gram, weighted, a)
            self.cross += missing.T @ weighted

    def solution(self, ridge: float) -> Tensor:
        """Return dW, (hidden, intermediate), float32; the ridge is a part of the mean diagonal."""
        change = torch.cholesky_solve(self.cross.T, factor_of(self.gram, ridge)).T
        if not change.isfinite().all():
            raise BadInput(f"the solution is not finite: beta or the ridge {ridge} is out of range")
        return change.float().contiguous()


def add_outer(gram: Tensor, weighted: Tensor, a: Tensor) -> None:
    """Add sum_t w_t a_t a_t' to the lower triangle of `gram`, from w a and a, (tokens, intermediate)."""
    for first in range(0, len(gram), STRIP):
        strip = slice(first, first + STRIP)
        gram[first:, strip] += weighted[:, first:].T @ a[:, strip]


def factor_of(gram: Tensor, ridge: float) -> Tensor:
    """Return the Cholesky factor of a sum of which the lower triangle is given, with a part of its mean diagonal added.

    Of few tokens the sums have a low rank, and as they are rounded to float32, the smallest eigenvalues may be below 0
    by more than the ridge: then it is taken ten times as large, and so on.
    """
    for larger in (1, 10, 100, 1000):
        held = gram.clone()
        held.diagonal().add_(larger * ridge * held.diagonal().mean())
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(held)  # reads the lower triangle alone, as what follows
        if not failed:
            return factor
    raise BadInput(f"the sums over the activations are not finite, or the ridge {ridge} is out of range")


def equations_of(matrix: Tensor, fits: list[Fit], weights: Sequence[float]) -> Equations:
    """Return the equations of a down_proj with all tokens of some kinds of text, each with its weight."""
    equations = Equations(matrix)
    for fit, weight in zip(fits, weights, strict=True):
        equations.add(fit, weight)
    return equations


# ---- steering that is aimed ----


@dataclasses.dataclass
class Rows:
    """Texts whose tokens are looked at, by what enters the first trained block."""

    texts: list[Text]
    states: list[Tensor]  # (tokens, hidden)
    weights: list[Tensor]  # of the last tokens of each, those that count, (counted,)
    led: bool = False  # looked at is by how much the tokens lead, which is what greedy text asks: see `log_odds`


class Upper:
    """The decoder from its first trained block on, with matrices that change."""

    def __init__(self, decoder: Decoder, trained: Sequence[int]) -> None:
        self.decoder, self.first = decoder, trained[0]
        self.matrices = {
            index: decoder.tensor(f"layers.{index}.mlp.down_proj.weight", torch.float32).clone() for index in trained
        }
        self.norm, self.head = decoder.norm(), decoder.head()
        room = torch.cuda.mem_get_info()[1] // 2 if decoder.device.type == "cuda" else CACHE_BYTES
        size = sum(value.numel() for value in decoder.skeleton.layers.state_dict().values())
        roomy = size * decoder.dtype.itemsize <= room
        self.blocks = {index: decoder.block(index) for index in range(self.first, decoder.depth) if roomy}
        # What a pass keeps for the way back: of each token and block some ten times what enters it and four times what
        # enters its down_proj. In a batch of more tokens than there is room for, blocks run again on the way back.
        width = 10 * decoder.config.hidden_size + 4 * decoder.config.intermediate_size
        self.passing = room // 2 // ((decoder.depth - self.first) * width * decoder.dtype.itemsize)

    def rows(self, texts: list[Text], weights: list[Tensor], led: bool = False) -> Rows:
        """Run the blocks below on texts."""
        states = self.decoder.embed(texts)
        for index in range(self.first):
            states = self.decoder.advance(self.decoder.block(index), states)
        return Rows(texts, states, weights, led)

    def whole(self, texts: list[Text]) -> Rows:
        """Run the blocks below on texts of which all tokens count."""
        return self.rows(texts, [torch.ones(len(text.tokens) - 1) for text in texts])

    def later(self, texts: list[Text]) -> Rows:
        """Run the blocks below on texts of which the later half counts."""
        return self.rows(texts, [torch.ones(len(text.tokens) // 2) for text in texts])

    def block(self, index: int) -> Module:
        """Return a block with its original weights."""
        return self.blocks.get(index) or self.decoder.block(index)

    def log_odds(
        self,
        rows: Rows,
        chosen: Sequence[int],
        weights: dict[int, Tensor],
        passed: "Passed | None" = None,
    ) -> list[Tensor]:
        """Return ln p / (1 - p) of each token that counts in the chosen rows, (counted,) each; `weights`: down_proj.

        Of rows that are `led` ln p / q, q that of the likeliest other token: above 0, greedy text says the token.

        In `passed` it puts what passes the blocks that change, for gradients to be taken; they begin with what enters
        the head and the gradient in that of ln p / (1 - p), for the log odds themselves carry none. A lead grows about
        as much, and what leads it may be another token after a step: its own gradient knows of one only.
        """

        def run(index: int, hidden: Tensor) -> Tensor:
            block = self.block(index)
            if passed is None or index not in self.matrices:
                return self.decoder.run(block, hidden, weights.get(index))

            def see(_module: Module, inputs: tuple[Tensor]) -> None:
                passed.entering[index] = inputs[0].detach()

            with block.mlp.down_proj.register_forward_pre_hook(see):
                return self.decoder.run(block, hidden, weights[index])

        hidden = pad_sequence([rows.states[row] for row in chosen], batch_first=True)
        again = passed is not None and hidden.shape[:2].numel() > self.passing
        through: Any = functools.partial(checkpoint, run, use_reentrant=False) if again else run
        for index in range(self.first, self.decoder.depth):
            hidden = through(index, hidden)
            if passed and index in self.matrices:
                passed.leaving[index] = hidden.requires_grad_()
        counted = [len(rows.weights[row]) for row in chosen]
        tokens = [rows.texts[row].tokens for row in chosen]
        ends = zip(hidden, tokens, counted, strict=True)
        before = torch.cat([states[len(row) - 1 - count : len(row) - 1] for states, row, count in ends])
        right = torch.cat([torch.tensor(row[-count:]) for row, count in zip(tokens, counted, strict=True)])
        normed = self.norm(before)
        found = [
            self.told(*part, slopes=passed is not None, led=rows.led)
            for part in zip(torch.split(normed.detach(), TOLD), torch.split(right.to(normed.device), TOLD), strict=True)
        ]
        if passed:
            passed.normed, passed.slopes = normed, torch.cat([slopes for _, slopes in found])
        return list(torch.split(torch.cat([odds for odds, _ in found]), counted))

    @torch.no_grad()
    def told(self, normed: Tensor, right: Tensor, slopes: bool, led: bool) -> tuple[Tensor, Tensor]:
        """Return ln p / (1 - p) of the right tokens, (tokens,), or if `led` ln p / q, as `log_odds` does.

        And the first's gradient in what enters the head, if asked.

        Of so few tokens at once that memory is used again: on a CPU new memory takes longer than what is computed.
        """
        logits = normed @ self.head.T
        mine = logits.gather(1, right[:, None]).float()
        # The others' sum, not 1 - p, which is lost where p is near 1. (`scatter_` would copy all logits, twice.)
        logits[torch.arange(len(right), device=right.device), right] = -math.inf
        top = logits.amax(dim=1, keepdim=True).float()
        if led and not slopes:
            return (mine - top)[:, 0], normed[:0]
        shares = logits.softmax(dim=1)  # summed up in float32, whatever the logits are
        gradient = self.head[right] - shares @ self.head if slopes else normed[:0]
        others = top - shares.amax(dim=1, keepdim=True).float().log()
        return (mine - (top if led else others))[:, 0], gradient

    @torch.no_grad()
    def all_log_odds(self, rows: Rows, chosen: Sequence[int] | None = None) -> list[Tensor]:
        """Return the log odds of the tokens that count in the chosen rows, or in all, on the CPU."""
        chosen = range(len(rows.texts)) if chosen is None else chosen
        weights = {index: matrix.to(self.decoder.dtype) for index, matrix in self.matrices.items()}
        found: dict[int, Tensor] = {}
        for places in batches([len(rows.texts[row].tokens) for row in chosen], GRADIENT_TOKENS, PADDING):
            odds = self.log_odds(rows, [chosen[place] for place in places], weights)
            found |= zip(places, (row.cpu() for row in odds), strict=True)
        return [found[place] for place in range(len(chosen))]

    def mean_loss(self, rows: Rows, every: int = 1) -> float:
        """Return the mean loss of all tokens that count, nats, of one row of so many."""
        return softplus(-torch.cat(self.all_log_odds(rows, range(0, len(rows.texts), every)))).mean().item()


@torch.no_grad()
def whitenings_of(upper: Upper, streams: Sequence[tuple[Rows, float]], settings: Settings) -> dict[int, Tensor]:
    """Return by trained block V with V (sum w a a' + ridge) V' = 1, over what is to be held, (intermediate, same).

    a is what enters down_proj in the untouched model: a change dW moves what leaves the block by sum w |dW a|^2. The
    first token counts here as others do: see `aim`.
    """
    weights = [[weight * row for row in token_weights(rows.texts, settings.answer, 1.0)] for rows, weight in streams]
    states = [rows.states for rows, _ in streams]
    whitenings = {}
    for index in range(upper.first, settings.trained[-1] + 1):
        block = upper.block(index)
        if index not in upper.matrices:
            states = [upper.decoder.advance(block, rows) for rows in states]
            continue
        width = upper.matrices[index].shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64, device=upper.decoder.device)
        for number, own in enumerate(weights):
            entering, states[number] = upper.decoder.activations(block, states[number])
            add_rows(gram, entering, own)
            del entering  # of 7B and general text 5 GB
        whitenings[index] = whitening_of(gram, settings.ridge)
    return whitenings


def whitening_of(gram: Tensor, ridge: float) -> Tensor:
    """Return V with V (gram + ridge) V' = 1, float32, of a sum of which the lower triangle is given."""
    factor = factor_of(gram, ridge)
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, one, upper=False)
    return inverse.float()


def add_rows(gram: Tensor, entering: list[Tensor], weights: list[Tensor]) -> None:
    """Add sum w a a' over rows, (tokens, intermediate) and (tokens,) each, to the lower triangle of `gram`."""
    for rows in batches([len(row) for row in entering], PASS_TOKENS):
        a = torch.cat([entering[row] for row in rows]).float()
        add_outer(gram, a * torch.cat([weights[row] for row in rows]).to(a.device)[:, None], a)


@dataclasses.dataclass
class Passed:
    """What passes the blocks that change, (rows, tokens, width) by block; what enters the head, (counted, hidden)."""

    entering: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # down_proj
    leaving: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # the block
    normed: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # what enters the head
    slopes: Tensor = dataclasses.field(
        default_factory=lambda: torch.empty(0)
    )  # each token's log odds' gradient in that


@dataclasses.dataclass
class Pull:
    """What a row asks for: that sum_t w_t wanted_t o_t, of its tokens' log odds o, changes by sum_t w_t wanted_t^2.

    The gradient of that sum in W_l is sum_t g_t a_t', with g_t the gradient in what leaves the block at a token and a_t
    what enters down_proj.
    """

    wanted: float
    gradients: dict[int, Tensor]  # g by block, (tokens, hidden)
    entering: dict[int, Tensor]  # a by block, (tokens, intermediate)
    held: bool = False  # to what it asks for, whatever the other pulls do


def pulls_of(
    upper: Upper, rows: Rows, asks: Callable[[int, Tensor], Tensor], likely: set[int], among: Sequence[int]
) -> dict[int, Pull]:
    """Return by row what it asks for, of those `among` the rows that ask for a change.

    `asks` says of a row and its tokens' log odds by how much each is to change, (counted,). Rows that are `likely` to
    ask run once, ready for gradients; others without, and again with them if they ask.
    """
    others = [row for row in among if row not in likely]
    asking = {row for row, odds in zip(others, upper.all_log_odds(rows, others), strict=True) if asks(row, odds).any()}
    chosen = sorted(likely | asking)
    weights = {index: matrix.to(upper.decoder.dtype) for index, matrix in upper.matrices.items()}
    pulls = {}
    for places in batches([len(rows.texts[row].tokens) for row in chosen], GRADIENT_TOKENS, PADDING):
        batch = [chosen[place] for place in places]
        passed = Passed()
        found = zip(batch, upper.log_odds(rows, batch, weights, passed), strict=True)
        wanted = {row: asks(row, odds.cpu()) for row, odds in found}
        if not any(change.any() for change in wanted.values()):
            continue
        asked = {row: rows.weights[row] * change for row, change in wanted.items()}
        slopes = torch.cat([asked[row] for row in batch])[:, None].to(passed.slopes.device) * passed.slopes
        slopes = slopes.to(passed.slopes.dtype)
        found_gradients = torch.autograd.grad(passed.normed, list(passed.leaving.values()), slopes)
        gradients = dict(zip(passed.leaving, found_gradients, strict=True))
        for place, row in enumerate(batch):
            if wanted[row].any():
                own = slice(len(rows.texts[row].tokens))
                # Of 7B these are 2.4 GB for every ten thousand tokens: they wait outside the GPU, without the others'.
                g, a = (
                    {n: part[place, own].to("cpu", copy=True) for n, part in by.items()}
                    for by in (gradients, passed.entering)
                )
                pulls[row] = Pull((asked[row] * wanted[row]).sum().item(), g, a)
    return pulls


@torch.no_grad()
def step(upper: Upper, pulls: list[Pull], whitenings: dict[int, Tensor]) -> None:
    """Change the matrices so that all pulls together get what they ask for, and what is held moves least; use pulls up.

    With G_k,l the gradients of pull k at block l and V_l the whitening, changes dW_l = sum_k x_k G_k,l V_l' V_l do, to
    first order, sum_k K_jk x_k of what pull j asks for, K_jk = sum_l <G_j,l V_l', G_k,l V_l'>. G V' is formed of a few
    hidden units at a time: all of it has, of 7B, 180 MB a pull and block.
    """
    groups = list(batches([len(pull.entering[upper.first]) for pull in pulls], GRADIENT_TOKENS))
    products = torch.zeros(len(pulls), len(pulls), dtype=torch.float64)
    for index, whitening in whitenings.items():
        gradients = [pull.gradients[index].to(whitening.device) for pull in pulls]
        dtype = gradients[0].dtype
        white: dict[int, Tensor] = {}
        # V a is small where much is held: V in one part of the gradients' precision would lose it, in two it does not.
        parts = [whitening.to(dtype)]
        if dtype != whitening.dtype:
            parts.append((whitening - parts[0].float()).to(dtype))
        for group in groups:
            a = torch.cat([pulls[n].entering[index].to(whitening.device) for n in group])
            lengths = [len(pulls[n].entering[index]) for n in group]
            found = a @ parts[0].T
            for part in parts[1:]:
                found += a @ part.T
            white |= zip(group, torch.split(found, lengths), strict=True)
        for n, part in white.items():
            pulls[n].entering[index] = part.cpu()  # V a in its place: a was needed here for the last time
        hidden, intermediate = upper.matrices[index].shape
        size = len(pulls) * (dtype.itemsize * intermediate + (dtype.itemsize + 8) * len(pulls))  # with their products
        together = max(1, FORMED_BYTES // size)
        for first in range(0, hidden, together):
            units = slice(first, first + together)
            formed = white[0].new_empty(len(gradients[0][0, units]), len(pulls), intermediate)
            for n, g in enumerate(gradients):
                formed[:, n] = g[:, units].T @ white[n]
            products += (formed @ formed.mT).double().sum(dim=0).cpu()  # of each unit by itself: rounding evens out
    factors = factors_of(products, [pull.wanted for pull in pulls], [pull.held for pull in pulls])
    for index, matrix in upper.matrices.items():
        total = torch.zeros_like(matrix)
        for group in groups:
            g = torch.cat([factors[n] * pulls[n].gradients[index].to(matrix.device) for n in group])
            total += g.T @ torch.cat([pulls[n].entering[index].to(matrix.device) for n in group])
        matrix += total @ whitenings[index]


def factors_of(products: Tensor, wanted: list[float], held: list[bool]) -> list[float]:
    """Return x with `products` x = wanted, a little damped, and 0 where x would be negative and is not of one held.

    Where it would be, the other pulls do more than this one asks for.
    """
    if not products.isfinite().all():
        raise BadInput("the gradients of the log odds are not finite")
    damped = products + DAMPING * products.diagonal().diag()
    right = torch.tensor(wanted, dtype=torch.float64)
    places = [place for place, own in enumerate(products.diagonal().tolist()) if own > 0]  # what can be moved at all
    x = torch.zeros_like(right)
    while places:
        found = torch.linalg.solve(damped[places][:, places], right[places])
        fit = [place for place, value in zip(places, found.tolist(), strict=True) if value >= 0 or held[place]]
        if fit == places:
            x[places] = found
            break
        places = fit
    return x.tolist()


def aim(
    decoder: Decoder,
    forget: list[Text],
    retain: list[Text],
    general: list[Text],
    own: list[Text],
    end: int,
    settings: Settings,
    deadline: float,
    progress: "Progress | None" = None,
) -> Iterator[tuple[float, dict[int, Tensor]]]:
    """Yield after a round how many are left, and the matrices by block; in the end those of the last one.

    After each, unless the caller takes so long that it would get more than `SAVING` of the time.

    Each token of a forget row is to lose so much, in nats: a part, `GUESS`, of what a guess among all tokens loses, at
    most `MOST`, for more would only cost other text. Of documents only in the mean: their tokens are to lose more or
    less, by what the untouched model loses on them in `mixtures`, where the words before do not tell them, so that
    phrases which any document may have stay. And documents that the attack asks about are to lose, about (`spread`),
    what an unseen one would (`unseen_loss`, found in the third round and twice where retain rows alone are raised;
    before, they aim as other documents do). A row that loses as much in the mean is left alone, a document that loses
    more is pulled back.

    Tokens of retain answers, and what ends them, that do not lead by `LEAD` any more are raised in the same step; in
    the last round they alone, and while any leads by less than `NARROW`, its row again: such rows by themselves, up to
    `rounds` times, before all are looked at in a round more. Where many are wrong before that (many rows, few weights),
    both sides have more rounds, at most as many again; where time is short, fewer. Each row has a factor of its own in
    a step: some respond ten times as much as others.

    Held, too, is the first token of every row, of forget rows alone that one. It tells nothing of what follows, but
    attention rests on it: in a language model a later block makes its activation a hundred times as long, if what
    enters there is what it was. If not, all text suffers, and far more than the step had asked for.

    Raising retain rows takes forgotten text along: on a language model the first step of retain rows alone took a
    quarter of their loss from documents, and a later one, of a single row, a twentieth. So the documents that the
    attack asks about are held in each. The level is found anew for the first, by a part of the text, and for the second
    by all, for what unseen text loses falls as both are repaired. A document that a step has thrown far from its goal
    is brought back by as many as that takes.
    """
    upper = Upper(decoder, settings.trained)
    attacked = attacked_kind(forget)
    lowered = upper.rows(forget, [lowered_weights(text, attacked) for text in forget])
    ended = [dataclasses.replace(text, tokens=[*text.tokens, end]) for text in retain]
    raised = upper.rows(ended, [torch.ones(len(text.tokens) - max(1, text.prompt)) for text in ended], led=True)
    opening = upper.whole([dataclasses.replace(text, tokens=text.tokens[:1], prompt=0) for text in forget])
    share = len(forget) / sum(len(text.tokens) for text in retain)  # each as much as a token of a retain row
    streams = (raised, 1.0), (upper.whole(general), settings.general), (opening, share)
    whitenings = whitenings_of(upper, streams, settings)
    kinds = {kind: [row for row, text in enumerate(forget) if kind_of(text) == kind] for kind in map(kind_of, forget)}
    asked_about = kinds[attacked] if attacked else []
    aims = untouched_aims(upper, lowered, kinds)
    known = [lead > 0 for lead in upper.all_log_odds(raised)]  # also where the likeliest has p < .5
    documents = [text for text in forget + retain if kind_of(text) == attacked]
    mixed, mixed_own = (joined(texts, mixtures(texts, 1, 1)) for texts in (documents, own))
    mixed_own = mixed_own[::ROUGHLY]  # they differ less than own texts do: as good as all
    unseen = [upper.whole(mixed), *(upper.later(texts) for texts in (own, mixed_own))]
    estimated = bool(mixed and mixed_own)  # of one document there is no mixture

    saved = progress.load("rounds") if progress else {}
    done, repairing = (int(saved.pop(name)) if saved else 0 for name in ("done", "repairing"))
    level = saved.pop("level").item() if saved else 0.0
    goals = list(aims)
    wrong = [0] * len(retain)  # tokens of each row, when they were looked at last
    least = LEAD

    def raises(row: int, leads: Tensor) -> Tensor:
        wrong[row] = int((known[row] & (leads < 0)).sum())
        return raising(leads, known[row], least)

    def lowers(row: int, odds: Tensor) -> Tensor:
        return lowering(odds, goals[row], lowered.weights[row], is_document(forget[row]))

    far = set[int]()  # documents that one step alone does not bring to their goals

    def holds(row: int, odds: Tensor) -> Tensor:
        above, most = excess(odds, goals[row], lowered.weights[row])
        (far.add if abs(above) > most else far.discard)(row)
        return holding(odds, goals[row], lowered.weights[row])

    def documents_held(finding: bool, every: int = 1) -> dict[int, Pull]:
        nonlocal level
        if finding:
            level = unseen_loss(upper, unseen, every)
            aim_at(level)
        pulls = pulls_of(upper, lowered, holds, set(asked_about), asked_about)
        for pull in pulls.values():
            pull.held = True
        return pulls

    def aim_at(level: float) -> None:
        means = [aims[row].mean().item() for row in asked_about]
        for row, mean, goal in zip(asked_about, means, spread(means, level), strict=True):
            goals[row] = goal / mean * aims[row]

    many, most = FEW * int(torch.cat(known).sum()), 3 * settings.rounds
    likely = [set(range(len(forget))), set[int]()]  # all ask at first, of retain rows few do
    if saved:
        likely = [set(saved.pop(f"asked {n}").tolist()) for n in (0, 1)]
    for index, matrix in saved.items():
        upper.matrices[int(index)].copy_(matrix)
    if done == most:  # killed after the last one
        yield 0.0, upper.matrices
    longest = due = 0.0
    for number in tqdm(range(done, most), desc="rounds", total=settings.rounds, mininterval=2):
        begun = time.monotonic()
        first, late = number == 0, number + 1 >= settings.rounds
        found = bool(repairing)  # the round before was of retain rows alone: the level was found anew in that
        if repairing:  # what is left are rows with a wrong token, few
            least, likely[1] = NARROW, set()
        settled = late or not estimated or number >= 2  # goals are what they stay until documents are held
        if number == 2 and estimated and not (late or repairing):
            level = unseen_loss(upper, unseen, ROUGHLY)
        if level:
            aim_at(level)
        up, down = {}, {}
        far.clear()
        if not first:  # no retain token has moved yet
            up = pulls_of(upper, raised, raises, likely[1], range(len(retain)))
            hurried = begun + 2 * longest > deadline  # what moved is to be raised, if nothing else
            enough = late and (sum(wrong) <= many or number + 1 >= 2 * settings.rounds)
            repairing = repairing or enough or hurried
        finding = bool(repairing and level) and not (found or hurried)
        if not repairing:
            down = pulls_of(upper, lowered, lowers, likely[0], range(len(forget)))
        elif up and level:
            down = documents_held(finding, ROUGHLY)
        likely = [set(down), set(up)]
        pulls = [*down.values(), *up.values()]
        over = number + 1 == most or ((settled or repairing) and not pulls)
        if pulls:
            step(upper, pulls, whitenings)
        asking = sorted(up)
        pulls, up, down = [], {}, {}  # of 7B gigabytes
        looked = time.monotonic() - begun
        longest = max(longest, looked)
        if repairing:  # those rows are made right before all are looked at again
            least = NARROW
            for _ in range(settings.rounds):
                if not (asking or finding or far) or time.monotonic() + longest > deadline:
                    break
                up = pulls_of(upper, raised, raises, set(), asking)
                down = documents_held(finding) if level and (up or finding or far) else {}
                pulls = [*down.values(), *up.values()]
                if not pulls or not (up or finding or far):  # they have come near
                    break
                step(upper, pulls, whitenings)
                finding, asking = False, sorted(up)
                pulls, up, down = [], {}, {}
        if not all(matrix.isfinite().all() for matrix in upper.matrices.values()):
            raise BadInput(f"the changes are not finite: the ridge {settings.ridge} is out of range")
        if progress:
            state = {str(index): matrix for index, matrix in upper.matrices.items()}
            done = most if over else number + 1
            state |= {"done": torch.tensor(done), "level": torch.tensor(level, dtype=torch.float64)}
            state["repairing"] = torch.tensor(repairing)
            state |= {f"asked {n}": torch.tensor(sorted(rows)) for n, rows in enumerate(likely)}
            progress.save("rounds", state)
        given = time.monotonic()
        last = over or given + longest > deadline
        if given >= due or last:
            yield float(most - number - 1), upper.matrices
            due = time.monotonic() + (time.monotonic() - given) / SAVING
            longest = max(longest, looked + time.monotonic() - given)
        if last:
            break


def untouched_aims(upper: Upper, rows: Rows, kinds: dict[tuple[str, str], list[int]]) -> list[Tensor]:
    """Return what each token that counts is to lose, (counted,) a row: in the mean of a kind as `aim` says.

    Tokens of an answer all alike; of a document by what they lose in mixtures of documents of its kind.
    """
    mean = min(MOST, GUESS * math.log(upper.decoder.config.vocab_size))
    aims = [torch.full((len(weights),), mean) for weights in rows.weights]
    copies = COPIES // 2 if takes_long(upper.decoder.skeleton) else COPIES
    for own in kinds.values():
        texts = [rows.texts[row] for row in own]
        mixed = mixtures(texts, PIECE, copies) if is_document(texts[0]) else []
        if not mixed:
            continue
        sums = [torch.zeros(2, len(text.tokens)) for text in texts]
        for mixture, odds in zip(mixed, upper.all_log_odds(upper.whole(joined(texts, mixed))), strict=True):
            for (text, place), loss in zip(mixture[1:], softplus(-odds).tolist(), strict=True):
                sums[text][:, place] += torch.tensor([loss, 1.0])
        lost, times = torch.cat([one[:, 1:] for one in sums], dim=1)
        means = torch.where(times > 0, lost / times.clamp(min=1), lost.sum() / times.sum()).clamp(min=LEAST)
        counted = torch.split(means * mean / means.mean(), [len(aims[row]) for row in own])
        for row, aimed in zip(own, counted, strict=True):
            aims[row] = aimed
    return aims


def spread(means: list[float], level: float) -> list[float]:
    """Return goals in the order of the `means`, normally distributed about `level`, by `SPREAD` of it.

    The level is an estimate. An attack tells members by where their losses are among those of others: the wider the
    documents' are spread, the less it gains from an error of a few percent in their mean.
    """
    ranks = {place: rank for rank, place in enumerate(sorted(range(len(means)), key=lambda place: means[place]))}
    normal = statistics.NormalDist(level, SPREAD * level)
    return [normal.inv_cdf((ranks[place] + 0.5) / len(means)) for place in range(len(means))]


def lowering(odds: Tensor, goal: Tensor, weights: Tensor, document: bool) -> Tensor:
    """Return by how much the log odds of a row's tokens are to change, from what they are and what each is to lose.

    By little more than the row is short of in the mean. A document that loses too much is pulled back by as much.
    """
    short = (((goal - softplus(-odds)) * weights).sum() / weights.sum()).item()
    change = -torch.log(torch.expm1(goal)) - odds  # ln p / (1 - p) at a loss of -ln p
    if short > 0:
        return change.clamp(-min(LARGEST, PUSH * short + 0.05), 0.0)
    if document and -short > OVERSHOT * (goal * weights).sum() / weights.sum():
        return change.clamp(0.0, min(LARGEST, -short))
    return torch.zeros_like(odds)


def holding(odds: Tensor, goal: Tensor, weights: Tensor) -> Tensor:
    """Return changes of a row's log odds, of either sign, that bring its mean loss to its goal, to first order.

    By at most `REACH` of the goal: to first order more would not be what it says.
    """
    slopes = torch.sigmoid(-odds)  # by so much the loss falls where log odds rise
    above, most = excess(odds, goal, weights)
    return slopes * above.clamp(-most, most) / (slopes * slopes * weights).sum()


def excess(odds: Tensor, goal: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Return by how much a row's weighted loss is above its goal, a scalar, and by how much one step changes it."""
    return ((softplus(-odds) - goal) * weights).sum(), REACH * (goal * weights).sum().item()


def raising(leads: Tensor, known: Tensor, least: float = LEAD) -> Tensor:
    """Return by how much the log odds of a retain row's answer are to change: where it was known and hardly leads.

    If any of it does not lead by `least`; else nothing is asked for.
    """
    change = torch.where(known & (leads < LEAD), (SAFE - leads).clamp(max=LARGEST), 0.0)
    return change if (known & (leads < least)).any() else torch.zeros_like(change)


def lowered_weights(text: Text, attacked: tuple[str, str] | None) -> Tensor:
    """Return the weights of a forget row's last tokens: of a document all, of any other row those of the answer.

    The judge's attack asks about whole documents of one kind; of others only the answers are asked.
    """
    if not is_document(text):
        return torch.ones(len(text.tokens) - max(1, text.prompt))
    weights = torch.ones(len(text.tokens) - 1)
    if kind_of(text) != attacked:
        weights[: max(0, text.prompt - 1)] = PROMPT
    return weights


def unseen_loss(upper: Upper, texts: Sequence[Rows], every: int = 1) -> float:
    """Return what an unseen document would lose in the mean, nats a token, from mixtures, own text and mixtures of it.

    No unseen document is given. Mixtures of the words of documents of both sides are as unseen, some of their words to
    be forgotten and some held; but they make no sense. What sense is worth is measured on text that the model writes
    itself: how much less it loses there than on mixtures of that, in the later half, for what is near an opening is
    near what is forgotten.
    """
    mixed, own, mixed_own = (upper.mean_loss(rows, every) for rows in texts)
    return mixed * own / mixed_own


def kind_of(text: Text) -> tuple[str, str]:
    """Return a row's task and its kind, "sc" or "qa" (its id ends so, with a digit); general text is of one kind."""
    return text.task, text.id[-3:-1] if text.task in TASKS else ""


def is_document(text: Text) -> bool:
    """Say whether a row is a document to complete, and not a question."""
    return kind_of(text)[1] == "sc"


def attacked_kind(texts: list[Text]) -> tuple[str, str] | None:
    """Return the kind of document that the judge's attack draws on, or another; None if there is no document."""
    kinds = {kind_of(text) for text in texts if is_document(text)}
    return ATTACKED if ATTACKED in kinds else min(kinds, default=None)


# Of the tokens of a mixture: the number of the text that each is from, and its place there.
Places = list[tuple[int, int]]


def mixtures(texts: list[Text], size: int, copies: int) -> list[Places]:
    """Return mixtures of texts: the n-th piece of `size` words of each is the n-th piece of some text.

    Each piece that a second text has one beside occurs `copies` times, between pieces of other texts: so a word is
    known where it stands, but what is around it does not tell it.
    """
    pieces = [cut(text, size) for text in texts]
    deepest = max(map(len, pieces), default=0)
    having = [[number for number, own in enumerate(pieces) if len(own) > n] for n in range(deepest)]
    having = [long for long in having if len(long) > 1]
    mixed = []
    for copy_number in range(copies):
        for number, own in enumerate(pieces):
            sources = []
            for n, long in enumerate(having[: len(own)]):
                stride = 1 + copy_number % (len(long) - 1)  # never a multiple of their number: neighbours differ
                sources.append(long[(long.index(number) + stride * n) % len(long)])
            mixed.append([(source, place) for n, source in enumerate(sources) for place in pieces[source][n]])
    return [places for places in mixed if len(places) > 1]


def joined(texts: list[Text], mixed: list[Places]) -> list[Text]:
    """Return mixtures as texts."""
    return [Text("", "", [texts[number].tokens[place] for number, place in places]) for places in mixed]


def cut(text: Text, size: int) -> list[range]:
    """Return the places of a text's pieces of `size` words."""
    starts = [n for n, word in enumerate(text.words) if n == 0 or word // size != text.words[n - 1] // size]
    return [range(*ends) for ends in itertools.pairwise([*starts, len(text.words)])]


@dataclasses.dataclass(frozen=True)
class Wish:
    """A text that the model is to write: `opening`, then tokens drawn at a temperature, `length` in all."""

    opening: list[int]
    length: int
    temperature: float
    barred: dict[tuple[int, ...], list[int]]  # by the last tokens, all runs of one length, those that may not follow


@torch.no_grad()
def sample_texts(
    model: Callable[[], Any], tokenizer: Any, forget: list[Text], retain: list[Text], settings: Settings
) -> tuple[list[Text], list[Text]]:
    """Return general text and, for aimed steering, own text, both written by the model itself; no other data enters."""
    general = general_wishes(tokenizer, forget, retain, settings)
    own = own_wishes(tokenizer, forget, retain) if settings.method == "aim" else []
    if own and takes_long(model()):
        own = own[::2]
    written = sample(model, [*own, *general], settings.seed, tokenizer.eos_token_id)
    texts = [in_words(tokenizer, Text(f"own {n}", "own", tokens)) for n, tokens in enumerate(written[: len(own)])]
    return (
        [Text(f"general {n}", "general", tokens) for n, tokens in enumerate(written[len(own) :])],
        [text for text in texts if len(text.tokens) > 1],
    )


def general_wishes(tokenizer: Any, forget: list[Text], retain: list[Text], settings: Settings) -> list[Wish]:
    """Ask for texts half of which are opened as a retain row is, half as MMLU's prompts are.

    A sample of all else that the model knows, held in place as the retain rows do not touch it: other text of the rows'
    own kinds, which suffers first, and questions with their answers. Rows that it has memorised it may not write
    (`continuations`), for what it recites is held already, or to be forgotten; but it may what a retain row shares with
    another of either side, for other text of these kinds has such phrases, too. Nor may it end a text, to go on with
    one of another kind. Unseen text is more surprising than what a model likes to write: so it is drawn at a
    temperature above 1.
    """
    wanted = round(settings.general_ratio * sum(len(text.tokens) for text in retain) / GENERAL_LENGTH)
    if settings.general == 0 or wanted == 0:
        return []
    generator = torch.Generator().manual_seed(settings.seed)
    kinds = sorted({kind_of(text) for text in retain})
    rows = [[text.tokens for text in retain if kind_of(text) == kind] for kind in kinds]
    before = len(_encode(tokenizer, ""))  # tokens that it puts before a text, if any
    questions = [*([] if before else [tokenizer.eos_token_id]), *_encode(tokenizer, QUESTIONS)]
    openings = []
    for number in range(wanted):
        own = rows[number // 2 % len(rows)]
        row = own[int(torch.randint(len(own), (1,), generator=generator))]
        openings.append(questions if number % 2 else row[: before + OPENED])
    barred = continuations(tokenizer, forget + retain, forget + retain, retain)
    return [Wish(opening, GENERAL_LENGTH, TEMPERATURE, barred) for opening in openings]


def own_wishes(tokenizer: Any, forget: list[Text], retain: list[Text]) -> list[Wish]:
    """Ask for texts as the model writes documents, opened as those that the attack asks about.

    But by nobody's name: an opening's tokens are of several documents. What follows a name that is to be forgotten
    suffers with it, and text about nobody known does not. They are of about the same length, recite nothing but phrases
    that several documents have, as an unseen one may have them too, and are drawn at a temperature at which they are as
    surprising to the model as what others wrote. They are not held, so what becomes of them becomes of unseen text.
    There is one for each forget row, but at least `OWN` and at most `OWN_MOST`.
    """
    kind = attacked_kind(forget)
    documents = [text for text in forget + retain if kind_of(text) == kind]
    length = min(OWN_LENGTH, round(statistics.mean(len(text.tokens) for text in documents))) if documents else 0
    if length < 2 or len(documents) < 2:
        return []
    before = len(_encode(tokenizer, ""))
    wanted = max(OWN, min(OWN_MOST, len(forget)))
    named = documents[:: max(1, len(documents) // wanted)]  # of both sides
    openings = []
    for number in range(wanted):
        lap, first = divmod(number, len(named))
        stride = 1 + lap % (len(named) - 1)  # never a multiple of their number: neighbours differ
        parts = [named[(first + stride * n) % len(named)].tokens for n in range(OPENED)]
        opening = [token for n, tokens in enumerate(parts) for token in tokens[before + n : before + n + 1]]
        openings.append(named[first].tokens[:before] + opening)
    barred = continuations(tokenizer, forget + retain, documents)
    return [Wish(opening, length, OWN_TEMPERATURE, barred) for opening in openings]


def whole_model(folder: Path, text: Text) -> Any:
    """Return transformers' own model, to sample from, a token at a time.

    Its first block must do with a text what it does here.
    """
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=fast_dtype(), use_safetensors=True, trust_remote_code=False)
    model = model.to(device()).eval()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BadInput(f"{folder}: tensor {name} has values that are not finite")
    check_same(Decoder(folder), model, text)
    model.set_attn_implementation("causal")
    return model


def sample(model: Callable[[], Any], wishes: Sequence[Wish], seed: int, end: int) -> list[list[int]]:
    """Return the tokens of the texts; the model is asked for only if there are any. `end` is never written."""
    if not wishes:
        return []
    written: list[list[int]] = []
    generator = torch.Generator(device()).manual_seed(seed)
    memory = torch.cuda.mem_get_info()[1] if device().type == "cuda" else math.inf
    together = rows_together(model(), max(wish.length for wish in wishes), memory)
    for first in range(0, len(wishes), together):
        written += write(model(), wishes[first : first + together], generator, end)
    return written


def rows_together(model: Any, length: int, memory: float) -> int:
    """Return how many texts to sample at once: 512, or fewer if their keys and values took more than `PART` of memory.

    On 7B in bfloat16 these take 67 MB a text of 128 tokens.
    """
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize * length
    return max(1, int(min(512, PART * memory / size)))


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


def continuations(
    tokenizer: Any, texts: list[Text], documents: Sequence[Text] = (), kept: Sequence[Text] | None = None
) -> dict[tuple[int, ...], list[int]]:
    """Return for each run of tokens in the texts, about `NOVEL` words less one token, the tokens that follow it.

    Not where that is in more than one of the documents, and in one of those `kept`, if any are given.
    """
    words = sum(len(tokenizer.decode(text.tokens, skip_special_tokens=True).split()) for text in texts)
    length = max(2, round(NOVEL * sum(len(text.tokens) for text in texts) / max(1, words)))

    def runs(text: Text) -> list[tuple[int, ...]]:
        return [tuple(text.tokens[end - length : end]) for end in range(length, len(text.tokens) + 1)]

    holders = Counter(run for text in documents for run in set(runs(text)))
    shared = {run for run, count in holders.items() if count > 1}
    if kept is not None:
        shared &= set(itertools.chain.from_iterable(map(runs, kept)))
    found: dict[tuple[int, ...], list[int]] = {}
    for run in itertools.chain.from_iterable(map(runs, texts)):
        if run not in shared:
            found.setdefault(run[:-1], []).append(run[-1])
    return found


class Room(DynamicLayer):  # type: ignore[no-untyped-call]
    """A block's keys and values, with room for all positions taken once: transformers' own copies all at each step.

    The evaluation has one of its own (`pipeline.lib.cache`): what is submitted is this file alone.
    """

    def __init__(self, positions: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.positions = positions

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_more: object
    ) -> tuple[Tensor, Tensor]:
        """Write what is new, (rows, heads, new positions, head width), behind what is there, and return all."""
        new = key_states, value_states
        if not self.is_initialized:
            self.room = [states.new_empty(*states.shape[:2], self.positions, states.shape[3]) for states in new]
            self.keys, self.values = (part[:, :, :0] for part in self.room)
            self.is_initialized = True  # not by transformers' own call, which takes other arguments in release 4
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        for part, states in zip(self.room, new, strict=True):
            part[:, :, start:end] = states
        self.keys, self.values = (part[:, :, :end] for part in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some of the rows."""
        end = self.get_seq_length()
        self.room = [part[indices] for part in self.room]
        self.keys, self.values = (part[:, :, :end] for part in self.room)


@torch.no_grad()
def write(model: Any, wishes: Sequence[Wish], generator: torch.Generator, end: int) -> list[list[int]]:
    """Return the tokens of the texts, a token a step on all that are not complete; none writes the token `end`."""
    rows = [wish.opening[:1] for wish in wishes]
    reaches = [len(next(iter(wish.barred), ())) for wish in wishes]
    temperatures = torch.tensor([wish.temperature for wish in wishes], device=generator.device)[:, None]
    going = list(range(len(wishes)))
    longest = max(wish.length for wish in wishes)
    past = Cache([Room(longest) for _ in range(model.config.num_hidden_layers)])
    for place in range(1, longest):
        left = [at for at, number in enumerate(going) if wishes[number].length > place]
        if len(left) < len(going):
            going = [going[at] for at in left]
            past.batch_select_indices(torch.tensor(left, device=generator.device))
        last = torch.tensor([rows[number][-1:] for number in going], device=generator.device)
        logits = model(input_ids=last, past_key_values=past, use_cache=True).logits[:, -1].float()
        logits.div_(temperatures[going])
        logits[:, end] = -math.inf
        for at, number in enumerate(going):
            if known := wishes[number].barred.get(tuple(rows[number][-reaches[number] :])):
                logits[at, known] = -math.inf
        drawn = draw(logits, generator)[:, 0].tolist()
        for number, token in zip(going, drawn, strict=True):
            opening = wishes[number].opening
            rows[number].append(opening[place] if place < len(opening) else token)
    return rows


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one token a row, (rows, 1), drawn by the probabilities of logits (rows, vocabulary), which are used up.

    By the inverse of their sum: `multinomial` draws a random number for each entry, a third of the time of sampling.
    """
    reached = logits.sub_(logits.amax(-1, keepdim=True)).exp_().cumsum_(-1)  # in place: see `Upper.told`
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
    for group in batches(lengths, 4096, PADDING):
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
    parser.add_argument("--method", choices=["aim", "solve", "descend"], default="aim", help="default: %(default)s")
    parser.add_argument("--trained", type=int, nargs="+", metavar="BLOCK", help="blocks whose down_proj changes")
    parser.add_argument(
        "--coefficient", choices=["adaptive", "growing", "fixed"], help="how the steering vector is scaled"
    )
    for name in (
        "beta",
        "alpha",
        "answer",
        "general",
        "general-ratio",
        "ridge",
        "learning-rate",
        "minutes",
    ):
        parser.add_argument(f"--{name}", type=float)
    for name in ("rounds", "batch-size", "epochs", "seed"):
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
    gc.freeze()
    gc.enable()
    try:
        main(sys.argv[1:])
    except (BadInput, OSError) as error:  # the latter of a full disk, or a folder that cannot be written to
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
