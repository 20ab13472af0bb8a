"""What every stage does alike: fail in one clear line, and write its output whole or not at all."""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


class BadInput(Exception):
    """Wrong input. The message is one line that names the file, the place in it and the value."""


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call a stage's `main(argv)`; `BadInput` becomes one line on stderr and exit code 2."""
    try:
        main(sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, and rename it to `path` when the block ends well."""
    with _alone(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, and rename it to `path` when the block ends well.

    What was there before goes. So `path` may not be where the stage was called, the user's home, or around one of them.
    """
    for place in (Path.cwd(), Path.home()):
        if path.resolve() in (place, *place.parents):
            raise BadInput(f"{path}: cannot be made: all that is in {path.resolve()} would be replaced")
    with _alone(path) as temporary:
        temporary.mkdir()
        yield temporary
        for lock in temporary.rglob(".*.lock"):  # left by `whole_file` within; never part of an output
            lock.unlink()
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)


def keep_apart(source: Path, output: Path) -> None:
    """Raise `BadInput` if writing the folder `output` whole, which replaces it, would touch what is read."""
    first, second = source.resolve(), output.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise BadInput(f"{output}: must lie apart from the input folder {source}, it is replaced as a whole")


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Hold the lock of `path`, with its temporary name cleared of what a killed run may have left.

    The lock keeps an orphan of a killed workflow and its rerun from writing the same output. A block that fails
    leaves nothing behind; one that is killed leaves a temporary, which the next run clears. A full disk, or a place
    that cannot be written to, is told in one line.
    """
    if path.name in ("", ".."):  # replacing `.` or `..` as a whole would take along what else is there
        raise BadInput(f"{path}: cannot be made: give it a name of its own")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        with FileLock(path.with_name(f".{path.name}.lock")):
            _remove(temporary)
            try:
                yield temporary
            finally:
                _remove(temporary)
    except OSError as error:
        raise BadInput(f"{path}: cannot be made: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
