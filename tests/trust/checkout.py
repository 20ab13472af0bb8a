"""A copy of the checkout in which `tiny` is made, harmed and made again."""

import csv
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import GOALS, ROOT

ZIP = Path("submissions/tiny.zip")
LOCKED = "cannot be locked"  # what a `snakemake` call says that asks for --unlock
MODEL = ["config.json", "model.safetensors", "run.json", "tokenizer.json"]  # that unlearning writes into a folder

# The jobs of tiny, by the name of their benchmark, in an order in which they can run; what each writes. Written down
# here, apart from the Snakefile.
JOBS = {
    "fetch_data.synthetic": ["data/raw/synthetic"],
    "split.synthetic": ["data/split/synthetic"],
    "memorise": ["models/tiny/original"],
    "unlearn": [f"results/tiny/unlearned/{name}" for name in MODEL],
    **{
        f"{rule}.{checkpoint}": [f"results/tiny/{checkpoint}/{name}" for name in names]
        for rule, names in {
            "complete": ["completions.jsonl"],
            "membership": ["membership.jsonl"],
            "mmlu": ["mmlu.jsonl"],
            "fluency": ["fluency.json"],
            "score": ["evaluation_results.jsonl", "mmlu_categories.json"],
        }.items()
        for checkpoint in ("original", "unlearned")
    },
    "package": ["submissions/tiny.zip", "submissions/tiny.cost.json"],
    "leaderboard": ["results/tiny/leaderboard.md"],
    "report": ["results/tiny/report.html"],
}

# Which rules read what a rule of tiny writes; written down here, too.
READERS = {
    "fetch_data": {"split", "memorise", "mmlu", "package"},  # the multiple-choice questions, and all through split
    "split": {"memorise", "unlearn", "complete", "membership", "fluency", "package"},
    "memorise": {"unlearn", "complete", "membership", "mmlu", "fluency", "package"},
    "unlearn": {"complete", "membership", "mmlu", "fluency", "package", "report"},
    "complete": {"fluency", "score", "package", "report"},
    "membership": {"score", "package", "report"},
    "mmlu": {"score", "package"},
    "fluency": {"report"},
    "score": {"package", "leaderboard", "report"},
    "package": set(),
    "leaderboard": {"report"},
    "report": set(),
}


@dataclass
class Check:
    """A line of the table. A check that tried nothing has not passed."""

    name: str
    tried: int = 0
    good: int = 0
    note: str = ""
    not_run: str = ""  # why this machine cannot do it

    @property
    def passed(self) -> bool:
        return self.tried > 0 and self.good == self.tried

    def count(self, good: bool) -> None:
        self.tried += 1
        self.good += good


def clean_copy(folder: Path) -> Path:
    """The files of the checkout itself, without anything made, set to make the report without the study of hours."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    config = folder / "config" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("full_report: true", "full_report: false"))
    return folder


def copy(made: Path, folder: Path) -> Path:
    """A copy of a checkout with all that was made in it, times of files included."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(made, folder, symlinks=True)
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Begin `snakemake --cores 2 ...`, in a process group of its own. What it says is in `said`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)  # the workflow gives each job its own
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *words]
    with (folder / "said.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def said(folder: Path) -> str:
    """What the last call said."""
    return (folder / "said.log").read_text(encoding="utf-8", errors="replace")


def go_on(folder: Path, *goals: str) -> tuple[bool, bool]:
    """The next command as the README has it: the same call, `snakemake --unlock` first if it asks. (done, asked)."""
    goals = goals or tuple(GOALS)
    done, asked = start(folder, *goals).wait() == 0, False
    if not done and LOCKED in said(folder):
        asked = unlock(folder)
        done = start(folder, *goals).wait() == 0
    return done, asked


def unlock(folder: Path) -> bool:
    return start(folder, "--unlock").wait() == 0


def rule_of(job: str) -> str:
    return job.partition(".")[0]


def downstream(jobs: set[str]) -> set[str]:
    """The jobs and all that, directly or not, read what they write. Each checkpoint has jobs of its own."""
    reached = set(jobs)
    for job in JOBS:  # they are in order
        for reader in JOBS:
            apart = {side for side in ("original", "unlearned") for name in (job, reader) if name.endswith(side)}
            apart |= {"unlearned"} if job == "unlearn" and reader.endswith("original") else set()
            if job in reached and rule_of(reader) in READERS[rule_of(job)] and len(apart) < 2:
                reached.add(reader)
    return reached


def remove(folder: Path, job: str) -> None:
    """Take away what a job has written, and what was made of it: a missing part alone is no reason to make it again."""
    for name in (name for one in downstream({job}) for name in JOBS[one]):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def seconds_of(folder: Path, job: str) -> float:
    """What a job took, from the workflow's own benchmark of it."""
    places = [folder / "results" / part / "benchmarks" / f"{job}.tsv" for part in (".", "tiny")]
    with next(path for path in places if path.is_file()).open(encoding="utf-8") as stream:
        return float(next(csv.DictReader(stream, delimiter="\t"))["s"])


def stage_process(parent: int, job: str) -> psutil.Process | None:
    """The running `python -m pipeline.<rule>` of a job, among the descendants of a snakemake."""
    output = JOBS[job][0]
    for process in descendants(parent):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if f"pipeline.{rule_of(job)}" in words and {output, str(Path(output).parent)} & set(words):
            return process
    return None


def descendants(parent: int) -> list[psutil.Process]:
    try:
        return psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []


def temporaries(folder: Path) -> list[Path]:
    """What a killed stage may leave half-written, or, of unlearning, to go on from: nothing, when all is made."""
    made = [folder / name for name in ("data", "models", "results", "submissions")]
    return [path for top in made for name in (".*.partial", ".unfinished") for path in top.rglob(name)]


def planned_jobs(folder: Path, *words: str) -> set[str]:
    """The jobs of tiny that `snakemake -n` would run, by the names in `JOBS`."""
    return {job_of(output) for output in planned_outputs(folder, *GOALS, *words)}


def planned_outputs(folder: Path, *words: str) -> set[str]:
    """The first output of each job that `snakemake -n` would run."""
    process = start(folder, "-n", *words)
    assert process.wait() == 0, said(folder)[-2000:]
    return {outputs.split(", ")[0] for outputs in re.findall(r"^    output: (.+)$", said(folder), re.MULTILINE)}


def job_of(output: str) -> str:
    """The job that writes a file; an error if no job is known to."""
    return next(job for job, names in JOBS.items() if output in names)
