"""The workflow on a real Slurm of one node: what is submitted, the bytes of a local run, what goes wrong on clusters.

tests/slurm/start runs Slurm's own daemons. A job is held in the middle by the lock of its output, which a stage takes
before it writes: a held job takes no CPU, and is let go when the test has done its harm.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.conftest import ROOT, snakemake
from tests.test_snakefile import planned

pytestmark = pytest.mark.slow


PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun"]
ZIP = "submissions/tiny.zip"
CHEAP = "results/tiny/original/membership.jsonl"  # the output whose job is harmed: seconds of work
MODEL_RULES = {"unlearn": 1, "complete": 2, "membership": 2, "mmlu": 2}  # jobs of tiny, once its model is there


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a running Slurm, which the environment points at."""
    search = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=search)]:
        pytest.skip(f"NOT RUN: no Slurm here, {', '.join(missing)} not found (apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}/bin:{Path(sys.executable).parent}:{search}")
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        try:
            subprocess.run([ROOT / "tests" / "slurm" / "start", folder], check=True)
            yield folder
        finally:
            subprocess.run([ROOT / "tests" / "slurm" / "stop", folder], check=True)


@pytest.fixture(scope="module")
def submitted(cluster: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the data and the model of `made`, in which Slurm made all that follows, membership on its GPU."""
    folder = tmp_path_factory.mktemp("submitted") / "checkout"
    shutil.copytree(made, folder, symlinks=True)
    shutil.rmtree(folder / "results" / "tiny")
    for path in (folder / "submissions").glob("tiny.*"):
        path.unlink()
    run = Run(folder, ZIP, "--set-resources", "membership:gpu=1")
    assert run.finished() == 0, run.output()
    return folder


class Run:
    """A `snakemake --profile profiles/slurm` in the background."""

    def __init__(self, folder: Path, *words: str):
        self.log = folder / "snakemake.log"
        often = ["--slurm-init-seconds-before-status-checks", "5", "--max-jobs-per-timespan", "1000/1s"]
        command = [sys.executable, "-m", "snakemake", "--profile", "profiles/slurm", *often, *words]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    def finished(self) -> int:
        """The exit status, once it is there."""
        try:
            return self.process.wait(timeout=900)
        finally:
            self.process.kill()

    def output(self) -> str:
        return self.log.read_text()


def jobs(**wanted: str) -> list[dict[str, str]]:
    """Slurm's own record of its jobs, of those with the wanted values; a finished job is known for five minutes."""
    text = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True).stdout
    records = [dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in text.splitlines()]
    return [record for record in records if wanted.items() <= record.items()]


def rule_of(job: dict[str, str]) -> str:
    return job["Comment"].removeprefix("rule_").partition("_")[0]


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"not within two minutes: {what}"
        time.sleep(0.2)


def inner_steps() -> list[str]:
    """The srun calls within jobs that run, as JOB.0."""
    text = subprocess.run(["squeue", "--steps", "--noheader", "--format=%i"], capture_output=True, text=True).stdout
    return [step for step in text.split() if step.endswith(".0")]


def update_node(state: str) -> None:
    name = subprocess.run(["sinfo", "--noheader", "--format=%n"], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scontrol", "update", f"nodename={name.strip()}", f"state={state}", "reason=test"], check=True)


@contextmanager
def held(folder: Path, *outputs: str) -> Iterator[None]:
    """No job can write these outputs; what was there is removed."""
    locks = [FileLock((folder / output).with_name(f".{Path(output).name}.lock")) for output in outputs]
    for lock, output in zip(locks, outputs, strict=True):
        lock.acquire()
        (folder / output).unlink()
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


# ---- what is submitted ----


def test_a_run_through_slurm_gives_the_bytes_of_the_local_run(made: Path, submitted: Path):
    assert (submitted / ZIP).read_bytes() == (made / ZIP).read_bytes()


def test_every_stage_with_a_model_is_a_slurm_job_and_no_other(submitted: Path):
    records = jobs(WorkDir=str(submitted))
    assert Counter(map(rule_of, records)) == MODEL_RULES
    assert {record["JobState"] for record in records} == {"COMPLETED"}


def test_a_local_call_finds_nothing_left_to_do(submitted: Path):
    assert planned(submitted, goals=[ZIP]) == set()


def test_the_jobs_of_7b_ask_for_the_memory_time_and_gpus_of_its_target(submitted: Path):
    for made_of, name in {
        "models/tiny/original": "models/7b/original",
        "data/raw/synthetic": "data/raw/semeval25",
        "data/split/synthetic": "data/split/semeval25",
        "data/raw/synthetic/": "data/raw/mmlu",
    }.items():
        shutil.copytree(submitted / made_of, submitted / name)
    touched = snakemake(submitted, "--touch", "models/7b/original", "data/split/semeval25", "data/raw/mmlu")
    assert touched.returncode == 0, touched.stderr
    needs = yaml.safe_load((submitted / "config" / "config.yaml").read_text())["targets"]["7b"]["resources"]

    update_node("drain")
    run = Run(submitted, "submissions/7b.zip")
    try:
        until(lambda: len(jobs(JobState="PENDING")) == 4, "four jobs wait")
        waiting = {rule_of(job): job for job in jobs(JobState="PENDING")}
    finally:
        run.process.send_signal(signal.SIGINT)
        assert run.finished() != 0
        update_node("resume")
    assert set(waiting) == set(MODEL_RULES)
    hours, minutes = divmod(needs["minutes"], 60)
    for job in waiting.values():
        assert job["MinMemoryNode"] == f"{needs['memory_mb'] / 1024:.2f}G"
        assert job["TimeLimit"] == f"{hours:02}:{minutes:02}:00"
        assert job["TresPerJob"] == f"gres:gpu:{needs['gpus']}"
        assert job["CPUs/Task"] == str(needs["threads"])
    assert {job["JobState"] for job in jobs() if job["JobId"] in {one["JobId"] for one in waiting.values()}} == {
        "CANCELLED"  # by the interrupted snakemake
    }


# ---- what goes wrong on clusters ----


def test_a_job_killed_by_its_time_limit_is_made_by_the_next_call(submitted: Path):
    before = (submitted / CHEAP).read_bytes()
    with held(submitted, CHEAP):
        run = Run(submitted, CHEAP, "--set-resources", "membership:runtime=1")
        assert run.finished() != 0
    assert "'TIMEOUT'" in run.output()
    assert not (submitted / CHEAP).exists()
    run = Run(submitted, CHEAP)
    assert run.finished() == 0, run.output()
    assert (submitted / CHEAP).read_bytes() == before


def test_a_drained_node_ends_its_job_and_takes_the_next_when_it_is_back(submitted: Path):
    outputs = [CHEAP, CHEAP.replace("membership", "mmlu")]
    before = [(submitted / output).read_bytes() for output in outputs]
    with held(submitted, *outputs):
        # the one GPU that there is: one after the other; two threads would do so too, but change the last digits
        run = Run(submitted, *outputs, "--set-resources", "membership:gpu=1", "mmlu:gpu=1")
        until(lambda: jobs(JobState="RUNNING") and jobs(JobState="PENDING"), "a job runs and one waits")
        (running,) = jobs(JobState="RUNNING")
        update_node("drain")
    until(lambda: jobs(JobId=running["JobId"], JobState="COMPLETED"), "the job ends on the drained node")
    assert len(jobs(JobState="PENDING")) == 1
    update_node("resume")
    assert run.finished() == 0, run.output()
    assert [(submitted / output).read_bytes() for output in outputs] == before


def test_after_a_restart_of_the_controller_the_next_call_goes_on(cluster: Path, submitted: Path):
    """Without accounting, the plugin (2.8.0) forgets its jobs if it asks in the outage, and waits until interrupted."""
    before = (submitted / CHEAP).read_bytes()
    with held(submitted, CHEAP):
        lost = Run(submitted, CHEAP, "--verbose")
        until(inner_steps, "the stage itself runs: to start it, the job asks the controller once more")
        (running,) = jobs(JobState="RUNNING")
        subprocess.run(["scontrol", "shutdown", "slurmctld"], check=True)
        try:
            until(lambda: "(final attempt)" in lost.output(), "the plugin gives up")
        finally:
            subprocess.run(["slurmctld"], check=True)
    until(lambda: jobs(JobId=running["JobId"], JobState="COMPLETED"), "the job ends well")
    lost.process.send_signal(signal.SIGINT)
    assert lost.finished() != 0
    run = Run(submitted, CHEAP)
    assert run.finished() == 0, run.output()
    assert (submitted / CHEAP).read_bytes() == before


def test_after_a_kill_of_snakemake_the_next_call_gets_along_with_the_orphaned_job(submitted: Path):
    before = (submitted / CHEAP).read_bytes()
    with held(submitted, CHEAP):
        killed = Run(submitted, CHEAP)
        until(lambda: jobs(JobState="RUNNING"), "the job runs")
        killed.process.kill()
        killed.process.wait()
        assert snakemake(submitted, "--unlock").returncode == 0
        run = Run(submitted, CHEAP)
        until(lambda: len(jobs(JobState="RUNNING")) == 2, "the orphan and the new job run")
    assert run.finished() == 0, run.output()
    assert (submitted / CHEAP).read_bytes() == before
