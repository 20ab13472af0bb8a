"""Get a model folder: the hub's or one of the user's, the plain files only, checked before anything is written.

Reads   --repo R --revision REV from the hub (into its own cache: a run that was cut off goes on with the files that
        are missing), or --local FOLDER.
Writes  --output DIR: config.json, generation_config.json, the tokenizer's files, *.safetensors and their index.
        Files are hard links where the file system allows it, copies elsewhere: the 7B checkpoint has 27 GB, and a
        second copy may not fit. Never symbolic links: the folder must outlive the cache. No stage writes into an
        existing file, so the two names of a file cannot harm each other.
Run     python -m pipeline.fetch_model --repo llmunlearningsemeval2025organization/olmo-1B-model-semeval25-unlearning \\
            --revision main --tokenizer-repo allenai/OLMo-1B-0724-hf --output models/1b/original
        python -m pipeline.fetch_model --local my/checkpoint --output models/1b/original
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.lib.hub import snapshot
from pipeline.lib.models import check_checkpoint
from pipeline.lib.stage import BadInput, keep_apart, run, whole_folder

INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", INDEX)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these makes a tokenizer
CONFIGS = ("config.json", "generation_config.json")
PLAIN = (*CONFIGS, *WEIGHTS, *TOKENIZER)


def check_weights(folder: Path) -> None:
    """Raise `BadInput` unless the folder has whole safetensors files, and all that its index names."""
    check_checkpoint(folder)
    shards = _shards(folder)
    for name in shards:
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{folder}: {name} is missing, one of {len(shards)} weight files")
        try:
            with safe_open(path, framework="numpy"):
                pass  # opening checks the header against the file's length: a cut file or a git-lfs pointer fails here
        except SafetensorError as error:
            raise BadInput(f"{path}: not a whole safetensors file: {error}") from None


def _shards(folder: Path) -> list[str]:
    """Return the names of the weight files: those of the index, or model.safetensors alone."""
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elsewhere = [name for name in shards if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{index}: not an index of weights: no JSON object with a weight_map of file names") from None
    if elsewhere:
        raise BadInput(f"{index}: weights outside the folder: {elsewhere[0]}")
    return shards


def has_tokenizer(folder: Path) -> bool:
    """Tell whether the folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def place(source: Path, patterns: Sequence[str], folder: Path) -> None:
    """Put the files directly in `source` that match a pattern into `folder`, without symbolic links.

    A file of that name that is there already is replaced: to write into it would write into what it is linked to.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            (folder / path.name).unlink(missing_ok=True)
            _link_or_copy(path.resolve(), folder / path.name)  # in the hub's cache names are links to blobs


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links, or a file that is not ours to link
        shutil.copyfile(source, target)


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--repo", help="repository on the hub; the token is that of HF_TOKEN or of `hf auth login`")
    origin.add_argument("--local", type=Path, help="model folder here, used instead of the hub")
    parser.add_argument("--revision", default="main", help="commit, tag or branch of --repo (default: main)")
    parser.add_argument("--tokenizer-repo", help="repository whose tokenizer is taken if the model's folder has none")
    parser.add_argument("--tokenizer-revision", default="main", help="of --tokenizer-repo (default: main)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced as a whole")
    args = parser.parse_args(argv)

    if args.local:
        keep_apart(args.local, args.output)
    model = args.local or snapshot(args.repo, "model", args.revision, PLAIN)
    check_weights(model)
    tokenizer = model
    if not has_tokenizer(model) and args.tokenizer_repo:
        tokenizer = snapshot(args.tokenizer_repo, "model", args.tokenizer_revision, TOKENIZER)
    if not has_tokenizer(tokenizer):
        raise BadInput(f"{tokenizer}: no tokenizer: none of {', '.join(VOCABULARIES)}")
    with whole_folder(args.output) as folder:
        place(model, (*CONFIGS, INDEX, *_shards(model), *TOKENIZER), folder)
        if tokenizer != model:
            place(tokenizer, TOKENIZER, folder)
    print(f"{args.repo or args.local.name}: {sum(1 for _ in args.output.iterdir())} files in {args.output}")


if __name__ == "__main__":
    run(main)
