"""Where a result comes from: hashes of files and tensors, versions, the machine, the modules that make a stage.

Nothing here imports torch: the Snakefile calls `local_modules` on every start.
"""

import ast
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from pipeline.lib.stage import BadInput

PACKAGES = (
    "datasets",
    "huggingface-hub",
    "numpy",
    "pandas",
    "pyarrow",
    "rouge-score",
    "safetensors",
    "scikit-learn",
    "tokenizers",
    "torch",
    "transformers",
)  # those that can change a number; the lock file has the rest
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.safetensors",
)  # those that can change what a model says


def sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal. Reads in pieces: weights are larger than memory."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(content: bytes) -> str:
    """Return the sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def identity(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of the files of `folder` that match one of the glob patterns, by relative path, sorted."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise BadInput(f"{folder}: none of {', '.join(patterns)} in it")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def changed_tensors(original: Path, unlearned: Path) -> dict[str, dict[str, Any]]:
    """Return those tensors of the checkpoint `unlearned` that are not as in `original`: as `tensors` describes them.

    Raises `BadInput` unless both folders hold tensors of the same names, and at least one of them differs.
    """
    before, after = tensors(original), tensors(unlearned)
    for name in sorted(before.keys() ^ after.keys()):
        raise BadInput(f"{unlearned}: tensor {name} is in one of this checkpoint and {original}, not in both")
    changed = {name: after[name] for name in sorted(after) if after[name] != before[name]}
    if not changed:
        raise BadInput(f"{unlearned}: all {len(after)} tensors are those of {original}: nothing was unlearned")
    return changed


def tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {"dtype", "shape", "sha256"} of each tensor in the *.safetensors of a folder, by name.

    The hash is that of the tensor's bytes in the file, read in pieces: no tensor is loaded.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with path.open("rb") as stream:
            for name, (dtype, shape, begin, end) in _tensor_places(path, stream).items():
                if name in found:
                    raise BadInput(f"{path}: tensor {name} is in another shard, too")
                found[name] = {"dtype": dtype, "shape": shape, "sha256": _sha256_between(stream, begin, end)}
    if not found:
        raise BadInput(f"{folder}: no tensor in *.safetensors: weights in any other format are not read")
    return found


def _tensor_places(path: Path, stream: BinaryIO) -> dict[str, tuple[str, list[int], int, int]]:
    """Return dtype, shape, first byte and byte after the last of each tensor of a safetensors file.

    The format: 8 bytes, little endian, the length of a JSON header; the header, offsets counted from its end; the data.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks the header against itself and the file's length
    except SafetensorError as error:
        raise BadInput(f"{path}: not a whole safetensors file: {error}") from None
    length = int.from_bytes(stream.read(8), "little")
    header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        places[name] = (entry["dtype"], entry["shape"], begin, end)
    return places


def _sha256_between(stream: BinaryIO, begin: int, end: int, piece: int = 1 << 20) -> str:
    digest = hashlib.sha256()
    stream.seek(begin)
    for place in range(begin, end, piece):
        digest.update(stream.read(min(piece, end - place)))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of python and of the installed `PACKAGES`, from their metadata, without importing them."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def hardware() -> str:
    """Return the machine in one line: processor, logical cores and, where torch is loaded and sees one, the GPU."""
    parts = [f"{_processor()}, {os.cpu_count()} cores"]
    torch = sys.modules.get("torch")  # importing it to ask would cost seconds
    if torch is not None and torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    return "; ".join(parts)


def _processor() -> str:
    """Return the processor's model name; `platform.processor()` is often empty or only the architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def local_modules(module_file: Path | str) -> list[Path]:
    """Return the files of its package that running `module_file` executes: itself, its imports, theirs, `__init__`s.

    Found from the text of the import statements, wherever they stand in a file, so nothing is executed. The paths are
    spelled as the argument is (relative stays relative), sorted. A module imported by a computed name is not seen.
    Raises `BadInput` for an import of a module of the package that is not there.
    """
    start = Path(module_file)
    package = _package_folder(start)
    found: set[Path] = set()
    waiting = {start}
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= set(_imported_files(path, package)) | set(_init_files(path, package))
        waiting -= found
    return sorted(found)


def _package_folder(module_file: Path) -> Path:
    """Return the outermost folder around the module that has an `__init__.py`."""
    if not module_file.is_file():
        raise BadInput(f"{module_file}: no such file")
    packages = [folder for folder in module_file.parents if (folder / "__init__.py").is_file()]
    if not packages:
        raise BadInput(f"{module_file}: in no package, there is no __init__.py beside it")
    return packages[-1]


def _init_files(path: Path, package: Path) -> Iterator[Path]:
    """Yield the `__init__.py` of each folder from `package` down to `path`: python runs them before the module."""
    for folder in (package, *(f for f in path.parents if package in f.parents)):
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"


def _imported_files(path: Path, package: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            modules, names = [alias.name for alias in node.names], []
        elif isinstance(node, ast.ImportFrom):
            modules, names = [_absolute(node, path, package)], [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == package.name:
                yield from _files_of(module, names, package, f"{path}: line {node.lineno}")


def _absolute(node: ast.ImportFrom, path: Path, package: Path) -> str:
    """Return the full name of the module that a `from ... import` names, its leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    here = [package.name, *path.relative_to(package).parent.parts]
    return ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])


def _files_of(module: str, names: list[str], package: Path, place: str) -> Iterator[Path]:
    """Yield the file of a module, and of those among the names imported from it that are modules themselves."""
    base = package.joinpath(*module.split(".")[1:])
    file = _module_file(base)
    if file is None and not base.is_dir():
        raise BadInput(f"{place}: no module {module!r}")
    yield from (found for found in (file, *(_module_file(base / name) for name in names)) if found is not None)


def _module_file(base: Path) -> Path | None:
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)
