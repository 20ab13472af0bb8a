"""Checkpoints and tokenizers: where they run, in which precision, and what is refused.

Only safetensors are read (a pickled weight file can execute code) and no code is taken from a model folder.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.lib.processes import state
from pipeline.lib.records import parse_json
from pipeline.lib.stage import BadInput

# transformers' own classes change from release to release and are built at run time: `Any` is the honest type.
Model = Any
Tokenizer = Any

CONSTANT = "rotary_emb.inv_freq"  # older checkpoints carry it; models compute it


def device() -> torch.device:
    """Return this process's accelerator if there is one, else the CPU. The only place where a device is chosen."""
    chosen: torch.device = state().device
    return chosen


def default_dtype() -> torch.dtype:
    """Return bfloat16 on an accelerator, as the organisers run; float32 on a CPU, where batches then cannot matter."""
    return torch.float32 if device().type == "cpu" else torch.bfloat16


def check_checkpoint(folder: Path) -> None:
    """Raise `BadInput` unless `folder` is a plain Hugging Face checkpoint with safetensors weights."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such model folder")
    config = folder / "config.json"
    if not config.is_file():
        raise BadInput(f"{config}: no such file: not a model folder")
    if not isinstance(parse_json(str(config), config.read_bytes()), dict):
        raise BadInput(f"{config}: not a JSON object")
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        raise BadInput(f"{folder}: no *.safetensors: weights in any other format are not read")


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """Load a causal language model in evaluation mode on `device()`.

    Every weight must come from the checkpoint, be of the shape that its config says and finite; and the config must
    have a place for each.
    """
    check_checkpoint(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or default_dtype(),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # transformers raises a dozen types here, all of them about the folder
        raise BadInput(f"{folder}: cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise BadInput(f"{folder}: {len(wrong)} weights missing or of the wrong shape, the first is {wrong[0]}")
    surplus = sorted(key for key in info["unexpected_keys"] if not key.endswith(CONSTANT))
    if surplus:
        raise BadInput(f"{folder}: config.json has no place for {len(surplus)} weights, the first is {surplus[0]}")
    model = model.to(device()).eval()  # before its values are checked: a GPU does that in no time
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise BadInput(f"{folder}: tensor {name} has values that are not finite")
    return model


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer that lies beside a checkpoint; it must have an end, and no token without an embedding."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise BadInput(f"{folder}: no usable tokenizer: {_first_line(error)}") from error
    if not tokenizer("a").input_ids:  # without its files transformers makes up an empty one
        raise BadInput(f"{folder}: no usable tokenizer: it makes no token of 'a'")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: the tokenizer has no end-of-text token")
    config, last = folder / "config.json", max(tokenizer.get_vocab().values())
    embeddings = parse_json(str(config), config.read_bytes()).get("vocab_size") if config.is_file() else None
    if embeddings is not None and last >= embeddings:
        raise BadInput(f"{folder}: the tokenizer has a token {last}, config.json a vocab_size of {embeddings}")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Return the token ids of `text`, never with an end-of-text token appended.

    Some releases of transformers 5 let OLMo's tokenizer append one (transformers issue 47988); a prompt would
    then end before the model has said a word.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    plain: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    appended = len(ids) > len(plain) and ids[-1 - len(plain) :] == [*plain, tokenizer.eos_token_id]
    return ids[:-1] if appended else ids
