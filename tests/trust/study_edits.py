"""Which jobs of the study `snakemake -n` plans after an edit: every job against every source file, setting and result.

As edit_matrix.py, in a made-up checkout, with a study of two draws, seeds, blocks, methods and strengths, and a report
of all of it. A job goes by the first file that it writes; what it reads is written down here, apart from the Snakefile.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.trust.checkout import Check, clean_copy, planned_outputs, said, start
from tests.trust.edit_matrix import CONFIG, add_a_line, change, count, kept, modules_of, source_files

STUDY: dict[str, Any] = {
    "study.draws": [1, 2],
    "study.seeds": 2,
    "study.minutes": {"tiny": 5},
    "study.methods": ["npo_low_rank", "sugd"],
    "study.strengths": [1, 4],
    "targets.tiny.sweep.blocks": 4,
    "targets.tiny.sweep.beta": 5,
    "targets.tiny.sweep.coefficient": 225,
    "targets.tiny.sweep.alpha": 1.5,
    "full_report": True,
}
TUNED = {"npo_low_rank": "4", "sugd": "1"}  # the strengths chosen; a draw has a method's jobs as published (1), too
GOALS = ["results/tiny/report.html", "results/tiny/unlearned/README.md"]
TUNE = "results/tiny/methods/tuned.json"
INPUTS = "results/tiny/layers/inputs"

FOLDERS = {"fetch_data", "split", "memorise", "retrain", "layer_inputs", "layer"}  # rules that write one
BESIDE = {  # what a rule writes beside the file that its jobs go by
    "score": ["mmlu_categories.json"],
    "layers": ["layers.svg"],
    "comparison": ["comparison.md"],
    "claims": ["claims/file"],
}
READ = {"results/tiny/comparison.json": "results/tiny/comparison.md"}  # of several outputs, the one that is read
TABLES = {"data/sources.yaml": {"fetch_data", "model_card"}, "data/leaderboard.csv": {"leaderboard"}}

# Settings: where in the configuration, the new value, the rules whose settings it is among, and a part of the names of
# those jobs that have it. Jobs that there are only with it are found in the table.
SETTINGS: dict[str, tuple[str, Any, set[str], str]] = {
    "another draw": ("study.draws", [1, 2, 3], {"comparison"}, ""),
    "another seed": ("study.seeds", 3, {"layers", "claims"}, ""),
    "minutes": ("study.minutes", {"tiny": 6}, {"method"}, ""),
    "another target's minutes": ("study.minutes", {"tiny": 5, "lume": 6}, set(), ""),
    "another method": ("study.methods", ["npo_low_rank", "sugd", "random_answer"], {"tune", "comparison"}, ""),
    "a method less": ("study.methods", ["npo_low_rank"], {"tune", "comparison"}, ""),
    "another strength": ("study.strengths", [0.25, 1, 4], {"tune"}, ""),
    "a strength less": ("study.strengths", [1], {"tune"}, ""),
    "another block": ("targets.tiny.sweep.blocks", 5, {"layers"}, ""),
    "Adaptive RMU's beta": ("targets.tiny.sweep.beta", 6, {"layer"}, "/adaptive."),
    "RMU's coefficient": ("targets.tiny.sweep.coefficient", 47, {"layer"}, "/rmu."),
    "the sweep's retain term": ("targets.tiny.sweep.alpha", 2, {"layer", "claims"}, ""),
    "a report without the study": ("full_report", False, {"report"}, ""),
    "another target's blocks": ("targets.lume.sweep.blocks", 9, set(), ""),
}


@dataclass
class Job:
    rule: str
    module: str  # whose code it runs
    reads: list[str]  # the jobs that it reads from


@dataclass
class Study:
    """The jobs with some settings, in an order in which they can run."""

    settings: dict[str, Any]
    jobs: dict[str, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        methods, strengths = self.settings["study.methods"], self.settings["study.strengths"]
        raw, split, model, original, ours = self.target("tiny", "synthetic")
        blocks, seeds = range(2, self.settings["targets.tiny.sweep.blocks"]), range(self.settings["study.seeds"])
        self.add(INPUTS, "layer_inputs", model, split)
        sweep = [
            self.layer(f"results/tiny/layers/{method}.{block}.{seed}", model, split)
            for method in ("rmu", "adaptive")
            for block in blocks
            for seed in seeds
        ]
        trials = [self.method("tiny", name, strength, "synthetic") for name in methods for strength in strengths]
        compared = [self.add(TUNE, "tune", *trials)]
        for draw in self.settings["study.draws"]:
            target, data = f"tiny-{draw}", f"synthetic-{draw}"
            results = self.target(target, data)[-2:]
            retrained = self.add(f"models/{target}/retrained", "retrain", *self.data(data), module="memorise")
            results.append(self.evaluated(f"results/{target}/retrained", retrained, data))
            results.append(self.method(target, "random_weights", "1", data))
            results += [
                self.method(target, name, strength, data)
                for name in methods
                for strength in sorted({"1", TUNED.get(name, "1")})
            ]
            compared += results
            for folder in map(os.path.dirname, results):
                weights = self.jobs[f"{folder}/completions.jsonl"].reads[0]
                compared.append(self.fluency(folder, weights, f"models/{target}/original", self.data(data)[1]))
        shown = [
            self.add("results/tiny/layers.json", "layers", *sweep, original),
            self.add("results/tiny/comparison.json", "comparison", *compared),
            self.add("results/tiny/claims.json", "claims", raw, split, model),
            self.add("results/tiny/leaderboard.md", "leaderboard", original, ours),
        ]
        run = "results/tiny/unlearned/run.json"
        self.add("results/tiny/unlearned/README.md", "model_card", run, original, ours)
        for checkpoint, weights in (("original", model), ("unlearned", run)):
            folder = f"results/tiny/{checkpoint}"
            rows = [f"{folder}/completions.jsonl", f"{folder}/membership.jsonl"]
            shown += [*rows, self.fluency(folder, weights, model, split)]
        self.add("results/tiny/report.html", "report", *shown, run, original, ours)

    def add(self, output: str, rule: str, *reads: str, module: str = "") -> str:
        self.jobs[output] = Job(rule, module or rule, list(reads))
        return output

    def data(self, name: str) -> tuple[str, str]:
        return f"data/raw/{name}", f"data/split/{name}"

    def target(self, target: str, data: str) -> list[str]:
        """A stand-in and ours on it; its data, its model and both results."""
        raw, split = self.data(data)
        self.add(raw, "fetch_data")
        self.add(split, "split", raw)
        model = self.add(f"models/{target}/original", "memorise", raw, split)
        original = self.evaluated(f"results/{target}/original", model, data)
        return [raw, split, model, original, self.unlearned(target, "unlearned", "unlearn", "unlearn", data)]

    def method(self, target: str, name: str, strength: object, data: str) -> str:
        return self.unlearned(target, f"methods/{name}.{strength}", "method", f"methods.{name}", data)

    def layer(self, folder: str, model: str, split: str) -> str:
        """A run of the sweep, whose checkpoint has a folder of its own."""
        run = self.add(f"{folder}/checkpoint", "layer", model, split, INPUTS, module="layer_inputs")
        return self.evaluated(folder, run, "synthetic")

    def unlearned(self, target: str, name: str, rule: str, module: str, data: str) -> str:
        folder, split = f"results/{target}/{name}", self.data(data)[1]
        run = self.add(f"{folder}/run.json", rule, f"models/{target}/original", split, module=module)
        return self.evaluated(folder, run, data)

    def evaluated(self, folder: str, weights: str, data: str) -> str:
        raw, split = self.data(data)
        completions = self.add(f"{folder}/completions.jsonl", "complete", weights, split)
        membership = self.add(f"{folder}/membership.jsonl", "membership", weights, split)
        mmlu = self.add(f"{folder}/mmlu.jsonl", "mmlu", weights, raw)
        return self.add(f"{folder}/evaluation_results.jsonl", "score", completions, membership, mmlu)

    def fluency(self, folder: str, weights: str, model: str, split: str) -> str:
        return self.add(f"{folder}/fluency.json", "fluency", weights, model, split, f"{folder}/completions.jsonl")

    def downstream(self, jobs: set[str]) -> set[str]:
        """The jobs and all that, directly or not, read what they write.

        A checkpoint of the sweep goes when it has been measured: whatever reads it again needs it made again.
        """
        gone = {read for name in jobs for read in self.jobs[name].reads if self.jobs[read].rule == "layer"}
        reached = jobs | gone
        for name, job in self.jobs.items():
            if reached.intersection(job.reads):
                reached.add(name)
        return reached

    def files(self) -> list[str]:
        """All that the jobs write."""
        names = []
        for name, job in self.jobs.items():
            names.append(f"{name}/file" if job.rule in FOLDERS else name)
            names += [str(Path(name).parent / other) for other in BESIDE.get(job.rule, [])]
        return names


BASE = Study(STUDY)
DRAWN = [name for name, job in BASE.jobs.items() if job.rule in ("score", "fluency") and "tiny-" in name]


def fake_study(folder: Path) -> Path:
    """A clean copy, in which each job of a small study has left a few bytes and is up to date."""
    clean_copy(folder)
    change(folder, STUDY)
    for name in BASE.files():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n", encoding="utf-8")
    (folder / TUNE).write_text(json.dumps({name: {"strength": strength} for name, strength in TUNED.items()}))
    if start(folder, "--touch", "--forceall", *GOALS, *DRAWN).wait() != 0:
        raise RuntimeError(said(folder)[-3000:])
    return folder


def planned(folder: Path, wanted: set[str]) -> set[str]:
    """The jobs planned. Before strengths are chosen again no one knows what the comparison reads: it is asked for."""
    return planned_outputs(folder, *GOALS, *(DRAWN if TUNE in wanted else []))


def expected(name: str) -> set[str]:
    """The jobs that an edit of a source file must rerun."""
    rules = TABLES.get(name, {"report"} if name.startswith("pipeline/assets/") else set())
    users = {output for output, job in BASE.jobs.items() if name in modules_of(job.module) or job.rule in rules}
    return BASE.downstream(users)


def expected_with(setting: str) -> set[str]:
    """The jobs that another setting must rerun, or make for the first time."""
    place, value, rules, part = SETTINGS[setting]
    study = Study(STUDY | {place: value})
    changed = {name for name, job in study.jobs.items() if job.rule in rules and part in name}
    wanted = study.downstream(changed | (study.jobs.keys() - BASE.jobs.keys()))
    hidden = study.jobs.keys() - BASE.jobs.keys() if TUNE in wanted else set()
    return wanted - {name for name in hidden if "tiny-" in name}


def results() -> dict[str, set[str]]:
    """A file for each pair of rules of which one reads from the other, folders left out; what it must rerun."""
    pairs = {(job.rule, BASE.jobs[read].rule): read for job in BASE.jobs.values() for read in job.reads}
    found = {}
    for name in sorted(set(pairs.values())):
        readers = {reader for reader, job in BASE.jobs.items() if name in job.reads}
        if BASE.jobs[name].rule not in FOLDERS:
            found[READ.get(name, name)] = BASE.downstream(readers)
    return found


def after_edit(folder: Path, name: str, wanted: set[str]) -> set[str]:
    """The jobs planned when a line is added to a file."""
    with kept(folder / name) as path:
        add_a_line(path)
        return planned(folder, wanted)


def after_setting(folder: Path, setting: str) -> set[str]:
    """The jobs planned when a setting is another."""
    place, value, *_ = SETTINGS[setting]
    with kept(folder / CONFIG):
        change(folder, {place: value})
        return planned(folder, expected_with(setting))


def study_matrix(work: Path) -> list[Check]:
    """The whole matrix; a cell is a job and an edit, good if it is planned as expected."""
    folder = fake_study(work / "studied")
    checks = [files, settings, made] = [
        Check(f"the study: {what}") for what in ("edits of files", "settings", "results")
    ]
    for name in source_files(folder):
        count(files, name, BASE.jobs, after_edit(folder, name, expected(name)), expected(name))
    for setting in SETTINGS:
        count(settings, setting, BASE.jobs, after_setting(folder, setting), expected_with(setting))
    for name, wanted in results().items():
        count(made, name, BASE.jobs, after_edit(folder, name, wanted), wanted)
    for check, edits in zip(checks, (source_files(folder), SETTINGS, results()), strict=True):
        check.note = f"{len(edits)} edits x {len(BASE.jobs)} jobs"
    settings.note += ", and those that a setting adds"
    return checks
