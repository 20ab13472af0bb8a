"""A killed run of the submission goes on where it stopped, and ends with the tensors of an undisturbed one.

The kill is a real SIGKILL that the process sends to itself just before it renames a file: always in the same place.
"""

import dataclasses
import itertools
import math
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline import unlearn as submission
from pipeline.lib.models import load_tokenizer
from pipeline.unlearn import BadInput, Decoder, Progress, Settings, identity, read_texts, unlearn
from tests.conftest import ROOT, snakemake

AIMED = Settings("aim", (2, 3, 4), general_ratio=5.0, rounds=4)
END = 0  # the end-of-text token of the checkpoint in conftest
SOLVED = Settings("solve", (2, 3, 4), beta=3.0, alpha=5.0, general_ratio=5.0)
DESCENDED = Settings("descend", (2, 3, 4), beta=3.0, alpha=10.0, epochs=5, batch_size=4, learning_rate=0.1)
SETTINGS = {"aim": AIMED, "solve": SOLVED, "descend": DESCENDED}
# Which renaming does not happen any more: that of the state after three rounds or epochs, or of block 4.
KILLED_AT = {
    "aim": ("rounds.safetensors", 3),
    "solve": ("block-4.safetensors", 1),
    "descend": ("descent.safetensors", 3),
}
KILLED = """
import math, os, signal, sys
from pipeline import unlearn

name, times, *arguments = sys.argv[1:]
seen = 0

def kill(event, values):
    global seen
    if event == "os.rename" and str(values[1]).endswith(name):
        seen += 1
        if seen == int(times):
            os.kill(os.getpid(), signal.SIGKILL)

unlearn.SAVING = math.inf  # save whenever there is something to save
sys.addaudithook(kill)
unlearn.main(arguments)
"""


def options(settings: Settings) -> list[str]:
    """All settings as words of the command line."""
    words = []
    for name, value in dataclasses.asdict(settings).items():
        values = value if isinstance(value, tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def kill(model: Path, data: Path, output: Path, place: tuple[str, int], *words: str) -> None:
    """Run the submission up to a renaming."""
    arguments = [model, output, data / "forget", data / "retain", *words]
    done = subprocess.run([sys.executable, "-c", KILLED, place[0], str(place[1]), *map(str, arguments)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def run(model: Path, data: Path, output: Path, settings: Settings) -> bytes:
    unlearn(str(model), str(output), str(data / "forget"), str(data / "retain"), settings)
    return (output / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def left(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a killed run of each method has left."""
    folders = {}
    for method, settings in SETTINGS.items():
        folders[method] = tmp_path_factory.mktemp("killed") / method
        kill(checkpoint, data, folders[method], KILLED_AT[method], *options(settings))
    return folders


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights that an undisturbed run of each method writes."""
    folder = tmp_path_factory.mktemp("whole")
    return {method: run(checkpoint, data, folder / method, settings) for method, settings in SETTINGS.items()}


@pytest.fixture(params=list(SETTINGS))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def output(left: dict[str, Path], method: str, tmp_path: Path) -> Path:
    """A copy of what was left, to go on in."""
    return shutil.copytree(left[method], tmp_path / "output")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_kill_leaves_what_was_done_and_no_result(output: Path, method: str):
    assert not (output / "run.json").exists()
    saved = sorted(name for name in names(output / ".unfinished") if name[0] != ".")
    assert (
        saved
        == {
            "aim": ["general.safetensors", "kept.safetensors", "own.safetensors", "rounds.safetensors"],
            "solve": ["block-2.safetensors", "block-3.safetensors", "general.safetensors", "own.safetensors"],
            "descend": ["descent.safetensors", "kept.safetensors"],
        }[method]
    )


def test_a_killed_run_ends_with_the_tensors_of_an_undisturbed_one(
    checkpoint: Path, data: Path, output: Path, method: str, whole, capsys: pytest.CaptureFixture[str]
):
    assert run(checkpoint, data, output, SETTINGS[method]) == whole[method]
    assert "goes on where a killed run stopped" in capsys.readouterr().err
    assert names(output) == {*names(checkpoint), "run.json"}  # nothing of the state, nothing half-written


def sides_of(checkpoint: Path, data: Path) -> list[list[submission.Text]]:
    return [read_texts(data / side, side, load_tokenizer(checkpoint)) for side in ("forget", "retain")]


def test_a_solved_block_is_not_solved_again(checkpoint: Path, data: Path, left, tmp_path: Path):
    """The saved change of block 2 is replaced by nothing: then block 2 must end as it was, and the others must not."""
    folder = shutil.copytree(left["solve"] / ".unfinished", tmp_path / "unfinished")
    path = folder / "block-2.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path, metadata)
    sides = sides_of(checkpoint, data)
    progress = Progress(folder, identity(checkpoint, SOLVED, *sides, None))
    matrices = submission.solve(Decoder(checkpoint), *sides, progress.texts("general"), SOLVED, progress)
    before = load_file(checkpoint / "model.safetensors")
    same = {
        index: torch.equal(before[f"model.layers.{index}.mlp.down_proj.weight"], matrices[index]) for index in matrices
    }
    assert same == {2: True, 3: False, 4: False}


def test_aimed_steering_goes_on_after_the_last_saved_round(
    checkpoint: Path, data: Path, left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two rounds were saved; without their state all are run again, the later ones as they were."""
    monkeypatch.setattr(submission, "SAVING", math.inf)  # every round, on however slow a disk
    asked: list[set[int]] = []
    pulls_of = submission.pulls_of
    monkeypatch.setattr(submission, "pulls_of", lambda *args: (asked.append(args[3]), pulls_of(*args))[1])
    folder = shutil.copytree(left["aim"] / ".unfinished", tmp_path / "unfinished")
    sides = sides_of(checkpoint, data)

    def rounds() -> list[float]:
        progress = Progress(folder, identity(checkpoint, AIMED, *sides, None))
        general, own = progress.texts("general"), progress.texts("own")
        own = [submission.in_words(load_tokenizer(checkpoint), text) for text in own]
        found = submission.aim(Decoder(checkpoint), *sides, general, own, END, AIMED, math.inf, progress)
        return [rounds_left for rounds_left, _ in found]

    most = 3 * AIMED.rounds
    later = rounds()
    assert later[0] == most - 3 and int(load_file(folder / "rounds.safetensors")["done"]) == most
    gone_on = asked.copy()
    assert rounds() == [0.0]  # killed after the last one
    (folder / "rounds.safetensors").unlink()
    asked.clear()
    assert rounds() == [most - 1, most - 2, *later]
    assert gone_on == asked[-len(gone_on) :] and len({frozenset(rows) for rows in gone_on}) > 1


def test_a_run_killed_after_any_round_ends_with_the_same_matrices(
    memorised: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever side a round is of; the state of each is copied when it has been yielded."""
    monkeypatch.setattr(submission, "SAVING", math.inf)
    monkeypatch.setattr(submission, "FEW", 0.02)
    sides = sides_of(memorised, data)
    asked: list[int] = []
    pulls_of = submission.pulls_of

    def record(upper, rows, asks, likely, among):
        if len(among) == len(rows.texts):  # not those that look again at the rows that ask
            asked.append(len(asked))
        return pulls_of(upper, rows, asks, likely, among)

    monkeypatch.setattr(submission, "pulls_of", record)

    def run(folder: Path):
        decoder = Decoder(memorised, torch.float32)
        found = submission.aim(decoder, *sides, [], [], END, AIMED, math.inf, Progress(folder, "run"))
        return ({n: matrix.clone() for n, matrix in matrices.items()} for _, matrices in found)

    looks = []
    matrices: dict[int, torch.Tensor] = {}
    for number, found in enumerate(run(tmp_path / "whole")):
        matrices = found
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        looks.append(len(asked))
    sizes = [after - before for before, after in itertools.pairwise(looks)]
    assert {1, 2} == set(sizes)  # retain rows alone, and both
    for killed in range(number):
        *_, last = run(tmp_path / str(killed))
        assert all(torch.equal(last[n], matrix) for n, matrix in matrices.items())


def test_a_run_that_was_killed_when_all_had_lost_enough_runs_no_round_more(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sides = sides_of(checkpoint, data)
    monkeypatch.setattr(submission, "pulls_of", lambda *_: {})
    left_over = []
    for _ in range(2):
        progress = Progress(tmp_path / "unfinished", "run")
        found = submission.aim(Decoder(checkpoint), *sides, [], [], END, AIMED, math.inf, progress)
        left_over.append([rounds_left for rounds_left, _ in found])
        monkeypatch.setattr(submission, "pulls_of", lambda *_: pytest.fail("a round more"))
    assert left_over == [[3.0 * AIMED.rounds - 1], [0.0]]


@pytest.mark.parametrize("size", [100, 200_000], ids=["not even the state", "the state, not the model"])
def test_where_the_disk_is_full_a_run_ends_in_one_line_and_the_next_one_goes_on(
    checkpoint: Path, data: Path, tmp_path: Path, size: int, whole
):
    """A limit on the size of files stands for a full disk, which takes root to make. The model has 400 kB."""
    output = tmp_path / "output"
    arguments = [checkpoint, output, data / "forget", data / "retain", *options(SOLVED)]
    command = [sys.executable, ROOT / "pipeline" / "unlearn.py", *map(str, arguments)]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large")
    assert ("cannot be kept" in done.stderr) is (size == 100)
    assert not [path for path in output.rglob("*.partial") if path.is_file()]
    assert not (output / "model.safetensors").exists()
    assert run(checkpoint, data, output, SOLVED) == whole["solve"]


def test_descent_goes_on_after_the_last_saved_epoch(checkpoint: Path, data: Path, left, tmp_path: Path):
    """Two of five epochs were saved: the best of them comes first, then the other three."""
    output = shutil.copytree(left["descend"], tmp_path / "output")
    sides = sides_of(checkpoint, data)

    def epochs(progress: Progress | None) -> list[tuple[float, torch.Tensor]]:
        decoder = Decoder(checkpoint, torch.float32)
        found = submission.descend(decoder, *sides, DESCENDED, float("inf"), progress)
        return [(loss, matrices[3].clone()) for loss, matrices in found]

    undisturbed = epochs(None)
    gone_on = epochs(Progress(output / ".unfinished", identity(checkpoint, DESCENDED, *sides, None)))
    assert undisturbed[0][0] < undisturbed[1][0]  # so the best is not the last saved
    for (loss, matrix), (expected_loss, expected) in zip(gone_on, [undisturbed[0], *undisturbed[2:]], strict=True):
        assert loss == expected_loss
        assert torch.equal(matrix, expected)


def test_a_state_of_other_settings_is_not_used(
    checkpoint: Path, data: Path, output: Path, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = dataclasses.replace(SETTINGS[method], seed=7, general=3.0)
    expected = run(checkpoint, data, tmp_path / "expected", other)
    assert run(checkpoint, data, output, other) == expected
    assert f"{output / '.unfinished'}: not used" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "no run"])
def test_a_damaged_state_is_removed(
    damage: str, checkpoint: Path, data: Path, left, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(left["solve"] / ".unfinished", tmp_path / "unfinished")
    path = folder / "block-2.safetensors"
    content = path.read_bytes()
    if damage == "no run":
        save_file(load_file(path), path)
    else:
        path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "noise": bytes(range(256)) * 9}[damage])
    Progress(folder, identity(checkpoint, SOLVED, *sides_of(checkpoint, data), None))
    assert not folder.exists()
    assert f"{folder}: not used" in capsys.readouterr().err


def test_identity_tells_apart_what_decides_a_result(checkpoint: Path, data: Path, tmp_path: Path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    texts = read_texts(data / "forget", "forget", load_tokenizer(checkpoint))
    first = identity(model, SOLVED, texts)
    assert identity(model, SOLVED, texts) == first
    assert identity(model, dataclasses.replace(SOLVED, seed=1), texts) != first
    assert identity(model, SOLVED, texts[::-1]) != first
    weights = load_file(model / "model.safetensors")
    with safe_open(model / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    save_file({name: -value for name, value in weights.items()}, model / "model.safetensors", metadata)
    assert (model / "model.safetensors").stat().st_size == (checkpoint / "model.safetensors").stat().st_size
    assert identity(model, SOLVED, texts) != first


def test_a_refused_run_leaves_nothing(checkpoint: Path, data: Path, tmp_path: Path):
    with pytest.raises(BadInput, match="not finite"):
        run(checkpoint, data, tmp_path / "output", dataclasses.replace(SOLVED, beta=1e38))
    assert not (tmp_path / "output").exists()


def test_saving_takes_a_small_part_of_the_time(tmp_path: Path):
    """What comes at once after a saving that took some time is left out."""
    progress = Progress(tmp_path / "state", "a run")
    progress.save("first", {"value": torch.ones(1000, 1000)})
    progress.save("second", {"value": torch.ones(1)})
    assert torch.equal(progress.load("first")["value"], torch.ones(1000, 1000))
    assert progress.load("second") == {}


@pytest.mark.slow
def test_a_workflow_goes_on_after_a_kill(made: Path, tmp_path: Path):
    """Snakemake removes a failed job's declared output, run.json, and nothing else of the folder."""
    folder = shutil.copytree(made, tmp_path / "checkout")
    unlearned = folder / "results" / "tiny" / "unlearned"
    expected = (unlearned / "model.safetensors").read_bytes()
    shutil.rmtree(unlearned)
    model, rows = folder / "models" / "tiny" / "original", folder / "data" / "split" / "synthetic" / "train"
    kill(model, rows, unlearned, ("rounds.safetensors", 3))
    done = snakemake(folder, "results/tiny/unlearned/run.json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "goes on where a killed run stopped" in (folder / "results" / "tiny" / "logs" / "unlearn.log").read_text()
    assert (unlearned / "model.safetensors").read_bytes() == expected
