"""Which jobs of tiny `snakemake -n` plans after an edit: every job against every source file, setting and made file.

The edits are tried in a checkout whose outputs are a few bytes each, recorded as up to date by `snakemake --touch`:
planning looks at names, times, checksums, settings and the text of rules, never into an output. What is expected
comes by another route than the workflow's own: `READERS` and the tables here, and for modules the compiled code, as
the standard library's modulefinder follows it.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import GOALS, ROOT
from tests.trust.checkout import JOBS, READERS, Check, clean_copy, downstream, planned_jobs, rule_of, said, start

CONFIG = "config/config.yaml"
ALSO = {"pipeline/unlearn.py": {"package"}}  # it is packed
TABLES = {"data/sources.yaml": {"fetch_data"}, "data/leaderboard.csv": {"package", "leaderboard"}}
IDLE = ["Snakefile", "README.md", "data/README.md", "submissions/README.md"]  # a comment more in them changes nothing
FOLDERS = [name for names in JOBS.values() for name in names if not Path(name).suffix]

# Settings: where in the configuration, the new value, the rules of tiny that it is for.
SETTINGS: dict[str, tuple[str, Any, set[str]]] = {
    "data folder": ("data", "elsewhere", set()),
    "mmlu folder": ("mmlu", "elsewhere", set()),
    "documents a task": ("datasets.synthetic.documents_per_task", 2, {"split"}),
    "seed of the sample": ("datasets.synthetic.seed", 3, {"split"}),
    "no texts in the zip": ("datasets.synthetic.texts", False, {"package"}),
    "vocabulary": ("targets.tiny.vocabulary", 900, {"memorise"}),
    "subjects": ("targets.tiny.multiple_choice.subjects", ["miscellaneous"], {"memorise", "mmlu"}),
    "questions": ("targets.tiny.multiple_choice.questions", 3, {"memorise", "mmlu"}),
    "published size": ("targets.tiny.published_size", "7B", {"package", "leaderboard", "report"}),
    "memory": ("targets.tiny.resources.memory_mb", 5000, set()),
    "minutes": ("targets.tiny.resources.minutes", 31, set()),
    "threads": ("targets.tiny.resources.threads", 2, set()),
    "another target's data": ("targets.lume.dataset", "semeval25", set()),
    "another target's vocabulary": ("targets.lume.vocabulary", 400, set()),
}


def fake_checkout(folder: Path) -> Path:
    """A clean copy, in which each job of tiny has left a few bytes and is up to date."""
    clean_copy(folder)
    for names in JOBS.values():
        for name in names:
            path = folder / name / "file" if name in FOLDERS else folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{name}\n", encoding="utf-8")
    settle(folder)
    return folder


def settle(folder: Path) -> None:
    """Record all that is there as made from what is there."""
    if start(folder, "--touch", "--forceall", *GOALS).wait() != 0:
        raise RuntimeError(said(folder)[-3000:])


def source_files(folder: Path) -> list[str]:
    """All that a user may edit, but for the configuration."""
    code = [*(folder / "pipeline").rglob("*.py"), *(folder / "pipeline" / "assets").iterdir()]
    return [*sorted(path.relative_to(folder).as_posix() for path in code), *TABLES, *IDLE]


@cache
def modules_of(rule: str) -> set[str]:
    """The files of ours that `python -m pipeline.<rule>` loads, imports within functions included."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.import_hook(f"pipeline.{rule}")
    files = [Path(module.__file__) for module in finder.modules.values() if module.__file__]
    return {path.relative_to(ROOT).as_posix() for path in files}


def jobs_of(rules: set[str]) -> set[str]:
    """The jobs of some rules, and all that reads what they write."""
    return downstream({job for job in JOBS if rule_of(job) in rules})


def expected(name: str) -> set[str]:
    """The jobs that an edit of a source file must rerun."""
    users = {rule for rule in READERS if name in modules_of(rule)}
    users |= ALSO.get(name, set()) | TABLES.get(name, set())
    users |= {"report"} if name.startswith("pipeline/assets/") else set()
    return jobs_of(users)


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Put back a file and its times, those of the folder around it included."""
    content, times = path.read_bytes(), [(one, one.stat()) for one in (path, path.parent)]
    yield path
    path.write_bytes(content)
    for one, status in times:
        os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def all_kept(folder: Path) -> Iterator[None]:
    """Put back the times of all source files."""
    with ExitStack() as stack:
        for name in source_files(folder):
            stack.enter_context(kept(folder / name))
        yield


def after_edit(folder: Path, name: str) -> set[str]:
    """The jobs planned when a line is added to a file."""
    with kept(folder / name) as path:
        add_a_line(path)
        return planned_jobs(folder)


def add_a_line(path: Path) -> None:
    end = b" \n" if path.suffix in {".csv", ".json"} else b"\n# edited\n"
    path.write_bytes(path.read_bytes() + end)


def after_setting(folder: Path, place: str, value: Any) -> set[str]:
    """The jobs planned when a setting is another."""
    with kept(folder / CONFIG):
        change(folder, {place: value})
        return planned_jobs(folder)


def change(folder: Path, values: dict[str, Any]) -> None:
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    for place, value in values.items():
        *path, last = place.split(".")
        part = config
        for key in path:
            part = part[key]
        part[last] = value
    (folder / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")


def after_swap(folder: Path) -> set[str]:
    """The jobs planned when two settings of one rule are swapped: Snakemake compares params as a set of values."""
    two, three = "datasets.synthetic.documents_per_task", "datasets.synthetic.seed"
    with kept(folder / CONFIG):
        change(folder, {two: 2, three: 3})
        settle(folder)
        change(folder, {two: 3, three: 2})
        planned = planned_jobs(folder)
    settle(folder)
    return planned


def after_loss(folder: Path, plan: Callable[[], set[str]]) -> set[str]:
    """What is planned without .snakemake, in which Snakemake keeps what it knows of earlier runs."""
    (folder / ".snakemake").rename(folder / "lost")
    try:
        return plan()
    finally:
        shutil.rmtree(folder / ".snakemake", ignore_errors=True)
        (folder / "lost").rename(folder / ".snakemake")


def matrix(work: Path) -> list[Check]:
    """The whole matrix; a cell is a job and an edit, good if it is planned as expected."""
    folder = fake_checkout(work / "edited")
    checks = [files, settings, lost] = [Check("edits of files"), Check("settings"), Check(".snakemake lost, edits")]
    for name in source_files(folder):
        count(files, name, JOBS, after_edit(folder, name), expected(name))
        planned = after_loss(folder, lambda name=name: after_edit(folder, name))
        count(lost, name, JOBS, planned, expected(name))
    for name, (place, value, rules) in SETTINGS.items():
        count(settings, name, JOBS, after_setting(folder, place, value), jobs_of(rules))
    count(settings, "swapped", JOBS, after_swap(folder), jobs_of({"split"}))
    for check in checks:
        check.note = f"{check.tried // len(JOBS)} edits x {len(JOBS)} jobs"
    return checks


def count(check: Check, what: str, jobs: Iterable[str], planned: set[str], wanted: set[str]) -> None:
    """A cell for each job that there is, and for each that nobody knows of and is planned all the same."""
    for job in {*jobs, *planned, *wanted}:
        check.count((job in planned) == (job in wanted))
    if planned != wanted:
        print(f"FAILED: {check.name}: {what}: planned in vain {planned - wanted}, not planned {wanted - planned}")
