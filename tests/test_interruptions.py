"""Interrupted in the middle of writing: nothing half-written, and the next run goes on. The quick part.

A writer in a process of its own stops where the test wants it: it says so on stdout and waits for a line. The long
part, kills of the whole workflow at random moments, is `python -m tests.trust kills`.
"""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from pipeline.lib.stage import BadInput, whole_file, whole_folder
from tests.conftest import ROOT
from tests.trust.checkout import JOBS, Check, downstream

# Writes "new" in two halves, and waits between them.
PROGRAM = """
import signal, sys
from pathlib import Path
from pipeline.lib.stage import whole_file, whole_folder
kind, path = {"file": whole_file, "folder": whole_folder}[sys.argv[1]], Path(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
print("begins", flush=True)
with kind(path) as temporary:
    place = temporary / "part" if sys.argv[1] == "folder" else temporary
    with place.open("w") as stream:
        stream.write("n")
        stream.flush()
        print("half", flush=True)
        sys.stdin.readline()
        stream.write("ew")
"""
KINDS = ("file", "folder")


@contextmanager
def writer(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, kind, str(path)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout.readline() == "begins\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def half_way(process: subprocess.Popen[str]) -> None:
    assert process.stdout.readline() == "half\n"


def let_go(process: subprocess.Popen[str]) -> int:
    process.communicate("\n")
    return process.returncode


def content(kind: str, path: Path) -> str:
    return (path / "part" if kind == "folder" else path).read_text()


def write(kind: str, path: Path, text: str) -> None:
    with {"file": whole_file, "folder": whole_folder}[kind](path) as temporary:
        (temporary / "part" if kind == "folder" else temporary).write_text(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_the_old_output_stays_and_the_next_run_makes_the_new(tmp_path: Path, kind: str, number: int):
    path = tmp_path / "out"
    write(kind, path, "old")
    with writer(kind, path) as process:
        half_way(process)
        process.send_signal(number)
        assert process.wait() != 0
    assert content(kind, path) == "old"
    left = path.with_name(".out.partial")
    assert left.exists() == (number != signal.SIGINT)  # the others end Python at once, so something is left to clear
    with writer(kind, path) as process:
        half_way(process)
        assert let_go(process) == 0
    assert content(kind, path) == "new"
    assert not left.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rerun_waits_for_the_orphan_and_writes_after_it(tmp_path: Path, kind: str):
    path = tmp_path / "out"
    with writer(kind, path) as orphan:
        half_way(orphan)
        with writer(kind, path) as rerun:
            assert content(kind, tmp_path / ".out.partial") == "n"  # of the orphan, untouched
            assert not path.exists()
            assert let_go(orphan) == 0
            half_way(rerun)  # only now
            assert content(kind, path) == "new"  # the orphan's, whole, while the rerun is half-way
            assert let_go(rerun) == 0
    assert content(kind, path) == "new"


def test_when_the_orphan_is_killed_the_waiting_rerun_goes_on(tmp_path: Path):
    path = tmp_path / "out"
    with writer("file", path) as orphan:
        half_way(orphan)
        with writer("file", path) as rerun:
            orphan.kill()
            half_way(rerun)
            assert let_go(rerun) == 0
    assert content("file", path) == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_fails_leaves_the_old_output_and_nothing_else(tmp_path: Path, kind: str):
    path = tmp_path / "out"
    write(kind, path, "old")
    with pytest.raises(ZeroDivisionError), {"file": whole_file, "folder": whole_folder}[kind](path) as temporary:
        (temporary / "part" if kind == "folder" else temporary).write_text("half")
        raise ZeroDivisionError
    assert content(kind, path) == "old"
    assert {one.name for one in tmp_path.iterdir()} <= {"out", ".out.lock"}


def test_a_folder_around_the_place_of_the_call_or_the_home_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "mine"))
    for place in ("../here", "../../work", tmp_path / "home" / "mine", tmp_path / "home"):
        with pytest.raises(BadInput, match="would be replaced"), whole_folder(Path(place)):
            pytest.fail("went on")
    assert (tmp_path / "work" / "here").is_dir()


def test_a_write_that_the_system_refuses_is_told_in_one_line(tmp_path: Path):
    """A limit on the size of files stands for a full disk, which takes root to make."""
    table = tmp_path / "table.jsonl"
    program = "from pipeline.lib.stage import run\nfrom pipeline.lib.records import write_jsonl\nimport pathlib, sys\n"
    program += "run(lambda argv: write_jsonl(pathlib.Path(argv[0]), ({'n': 'x' * 2**10} for _ in range(2**12))))"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
    command = [sys.executable, "-c", program, str(table)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {table}: cannot be made: [Errno 27] File too large\n"
    assert not table.exists() and not table.with_name(".table.jsonl.partial").exists()


def test_a_place_that_cannot_be_written_to_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInput, match=r"^[^\n]*file/out: cannot be made: [^\n]*$"):
        write("file", tmp_path / "file" / "out", "new")


# ---- what the long part counts with ----


def test_a_check_that_tried_nothing_has_not_passed():
    check = Check("nothing")
    assert not check.passed
    check.count(True)
    assert check.passed
    check.count(False)
    assert not check.passed and (check.tried, check.good) == (2, 1)


def test_what_is_made_of_a_job_is_of_its_own_checkpoint():
    assert downstream({"report"}) == {"report"}
    after = {"membership.original", "score.original", "package", "leaderboard", "report"}
    assert downstream({"membership.original"}) == after
    unlearned = {job for job in JOBS if job.endswith(".unlearned")}
    assert downstream({"unlearn"}) == unlearned | {"unlearn", "package", "leaderboard", "report"}
    assert downstream({"fetch_data.synthetic"}) == set(JOBS)
