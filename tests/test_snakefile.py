"""The workflow: what is planned after which edit, what a wrong configuration says, and a real run of `tiny`.

The edits are tried in a copy of the checkout in which `tiny` has been made for real; planning is `snakemake -n`.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors.torch import load_file

from pipeline import claims, unlearn
from tests.conftest import GOALS, ROOT, snakemake
from tests.trust.checkout import clean_copy

pytestmark = pytest.mark.slow

FIRST_DRAW, SECOND_DRAW, *_ = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["study"]["draws"]

# Which rules read what a rule writes; written down here, apart from the Snakefile.
READERS = {
    "fetch_data": {"split", "memorise", "mmlu", "package"},  # the multiple-choice questions, and all through split
    "split": {"memorise", "unlearn", "complete", "membership", "fluency", "package"},
    "fetch_base": {"memorise"},
    "memorise": {"unlearn", "complete", "membership", "mmlu", "fluency", "package"},
    "fetch_model": {"unlearn", "complete", "membership", "mmlu", "fluency", "package"},
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
OF_TINY = set(READERS) - {"fetch_base", "fetch_model"}  # and without the study, which report.html may be made without


def downstream(rules: set[str]) -> set[str]:
    """The rules and all that, directly or not, read what they write."""
    reached = set(rules)
    while True:
        wider = reached.union(*(READERS[rule] for rule in reached))
        if wider == reached:
            return reached
        reached = wider


def planned(folder: Path, *words: str, goals: list[str] = GOALS) -> set[str]:
    """The rules that `snakemake -n` would run."""
    done = snakemake(folder, "-n", *goals, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.findall(r"^(\w+) +\d+$", done.stdout + done.stderr, re.MULTILINE)
    return set(counts) - {"total"}


@pytest.fixture
def edited(made: Path):
    """The made checkout, whose source files and configuration are put back afterwards."""
    kept = {path: (path.read_bytes(), path.stat()) for path in sources(made)}
    yield made
    for path, (content, status) in kept.items():
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def sources(folder: Path) -> list[Path]:
    tables = [folder / "data" / "sources.yaml", folder / "data" / "leaderboard.csv", folder / "config" / "config.yaml"]
    return [*sorted((folder / "pipeline").rglob("*.py")), *tables]


def test_nothing_is_planned_when_nothing_is_touched(made: Path):
    assert planned(made) == set()


def test_a_touch_without_a_change_plans_nothing(edited: Path):
    for path in sources(edited):
        path.touch()
    assert planned(edited) == set()


@pytest.mark.parametrize("stage", sorted(OF_TINY))
def test_an_edited_stage_reruns_itself_and_what_reads_it(edited: Path, stage: str):
    path = edited / "pipeline" / f"{stage}.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert planned(edited) == downstream({stage, "package"} if stage == "unlearn" else {stage})


def users_of(module: str) -> set[str]:
    """The stages of tiny that import a module of lib, by importing them."""
    script = "import sys, importlib; importlib.import_module(f'pipeline.{sys.argv[1]}'); print(*sys.modules)"
    found = set()
    for stage in OF_TINY:
        command = [sys.executable, "-c", script, stage]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        if f"pipeline.lib.{module}" in done.stdout.split():
            found.add(stage)
    return found


@pytest.mark.parametrize("module", ["metrics", "corpus", "inference", "stage"])
def test_an_edited_lib_module_reruns_the_stages_that_import_it(edited: Path, module: str):
    users = users_of(module)
    assert users
    path = edited / "pipeline" / "lib" / f"{module}.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert planned(edited) == downstream(users)


CHANGES = {
    "subjects of mmlu": (("targets", "tiny", "multiple_choice", "subjects"), ["miscellaneous"], {"memorise", "mmlu"}),
    "sample of split": (("datasets", "synthetic", "documents_per_task"), 2, {"split"}),
    "size of the leaderboard": (("targets", "tiny", "published_size"), "7B", {"package", "leaderboard"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_reruns_its_rules(edited: Path, change: str):
    (*path, last), value, rules = CHANGES[change]
    config = yaml.safe_load((edited / "config" / "config.yaml").read_text())
    place = config
    for key in path:
        place = place[key]
    place[last] = value
    (edited / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    assert planned(edited) == downstream(rules)


def test_two_settings_swapped_rerun_their_rule(edited: Path):
    """Snakemake compares params as a set of values without names: two swapped ones must not look the same."""
    config = yaml.safe_load((edited / "config" / "config.yaml").read_text())
    for first, second, rules in ((2, 3, None), (3, 2, {"split"})):
        config["datasets"]["swapped"] = {"source": "synthetic", "documents_per_task": first, "seed": second}
        (edited / "config" / "config.yaml").write_text(yaml.safe_dump(config))
        if rules is None:
            assert snakemake(edited, "data/split/swapped").returncode == 0
            assert planned(edited, goals=["data/split/swapped"]) == set()
        else:
            assert planned(edited, goals=["data/split/swapped"]) == rules


@pytest.mark.parametrize("target", ["1b", "7b"])
def test_the_real_targets_can_be_planned_without_network_token_or_gpu(made: Path, target: str):
    rules = planned(made, goals=[f"submissions/{target}.zip"])
    assert rules == set(READERS) - {"fetch_base", "memorise", "fluency", "leaderboard", "report"}


def test_the_runs_of_a_sweep_share_one_job_and_leave_no_checkpoint(tmp_path: Path):
    """2 methods x 30 of 32 blocks x 5 seeds, each run measured, and the untouched model; what they share, once.

    Each of the 300 checkpoints is as large as the model.
    """
    done = snakemake(clean_copy(tmp_path / "checkout"), "-n", "results/7b/layers.json")
    assert done.returncode == 0, done.stderr[-2000:]
    counts = {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)}
    measured = dict.fromkeys(("complete", "membership", "mmlu", "score"), 2 * 30 * 5 + 1)
    once = dict.fromkeys(("fetch_model", "split", "layer_inputs", "layers"), 1)
    total = 2 * 30 * 5 + sum(measured.values()) + 2 + len(once)
    assert counts == {"layer": 2 * 30 * 5, **measured, **once, "fetch_data": 2, "total": total}
    removed = re.findall(r"^Would remove temporary output (results/7b/layers/\S+[^.\s])", done.stdout, re.MULTILINE)
    runs = [f"{method}.{block}.{seed}" for method in ("rmu", "adaptive") for block in range(2, 32) for seed in range(5)]
    assert sorted(removed) == sorted(f"results/7b/layers/{run}/checkpoint" for run in runs)


def test_the_runs_of_a_sweep_are_what_the_claims_call_a_window(made: Path):
    """One window, all tokens alike; what a run does not name comes from the settings of the method it names."""
    done = snakemake(made, "-n", "results/tiny/layers.json")
    commands = re.findall(r"python -m pipeline\.unlearn (.+) --inputs", done.stdout)
    sweep = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["targets"]["tiny"]["sweep"]
    decoder = SimpleNamespace(depth=sweep["blocks"])
    study = SimpleNamespace(decoder=decoder, alpha=sweep["alpha"])
    runs = set()
    for command in commands:
        (method, block, seed), flags = re.search(r"layers/(\w+)\.(\d+)\.(\d+)/", command).groups(), flags_of(command)
        beta, coefficient = (sweep["coefficient"], "fixed") if method == "rmu" else (sweep["beta"], "adaptive")
        window = claims.window(study, int(block), int(seed), coefficient, beta)
        assert dataclasses.replace(unlearn.settings_for(sweep["blocks"], flags["method"]), **flags) == window
        runs.add((method, block, seed))
    assert len(runs) == len(commands) == 2 * (sweep["blocks"] - 2) * 5


def flags_of(command: str) -> dict:
    """The settings that a command line of `pipeline.unlearn` names, as their fields' types."""
    kinds = {field.name: field.type for field in dataclasses.fields(unlearn.Settings)}
    found = {}
    for flag, words in re.findall(r"--([\w-]+) ((?:(?!--)\S+ ?)+)", command):
        name, values = flag.replace("-", "_"), words.split()
        kind = kinds[name] if kinds[name] in (int, float) else str
        found[name] = tuple(map(int, values)) if name == "trained" else kind(*values)
    return found


def test_an_unknown_key_is_refused_by_its_name(made: Path):
    done = snakemake(made, "-n", "--config", "dtaa=somewhere")
    assert done.returncode != 0
    assert "dtaa" in done.stdout + done.stderr


def test_an_unknown_target_is_refused_by_its_name(made: Path):
    done = snakemake(made, "-n", "submissions/13b.zip")
    assert done.returncode != 0
    assert "submissions/13b.zip" in done.stdout + done.stderr


def test_an_unknown_dataset_is_refused_by_its_name(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("targets: {tiny: {dataset: sintetic}}")
    done = snakemake(ROOT, "-n", "submissions/tiny.zip", "--configfile", str(tmp_path / "config.yaml"))
    assert done.returncode != 0
    assert "targets.tiny.dataset is sintetic, not one of synthetic, sample, " in done.stdout + done.stderr


def test_a_checkpoint_of_ones_own_is_a_target(tmp_path: Path):
    target = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["targets"]["7b"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"targets": {"mine": target}}))
    words = ["-n", "submissions/mine.zip", "--configfile", str(tmp_path / "config.yaml")]
    checkout = clean_copy(tmp_path / "checkout")
    assert f"--repo {target['model']['repo']}" in snakemake(checkout, *words).stdout
    assert (
        "fetch_model --local /models/mine" in snakemake(checkout, *words, "--config", "model_mine=/models/mine").stdout
    )


def test_a_checkpoint_of_no_target_is_refused_by_its_name(made: Path):
    done = snakemake(made, "-n", "--config", "model_13b=/models/13b")
    assert done.returncode != 0
    assert "model_13b is the folder of no target's checkpoint, only model_1b, model_7b" in done.stdout + done.stderr


@pytest.mark.parametrize("target", ["7b", f"tiny-{FIRST_DRAW}"])
def test_what_has_no_draws_is_not_compared(made: Path, target: str):
    done = snakemake(made, "-n", f"results/{target}/comparison.md")
    assert done.returncode != 0
    assert f"No rule to produce results/{target}/comparison.md" in done.stdout + done.stderr


def test_an_edit_in_a_local_folder_is_seen(made: Path, tmp_path: Path):
    shutil.copytree(made / "data" / "raw" / "synthetic", tmp_path / "my data")
    checkout = clean_copy(tmp_path / "checkout")
    words = ["--config", f"data={tmp_path / 'my data'}"]
    done = snakemake(checkout, "data/raw/semeval25", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert planned(checkout, *words, goals=["data/raw/semeval25"]) == set()
    with (tmp_path / "my data" / "retain_train.jsonl").open("a") as file:
        file.write("\n")
    assert planned(checkout, *words, goals=["data/raw/semeval25"]) == {"fetch_data"}


def test_a_draw_asks_the_questions_that_its_target_asks(tmp_path: Path):
    chosen = {"source": "mmlu", "subjects": ["anatomy"], "questions": 3}
    target = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())["targets"]["tiny"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"targets": {"mine": {**target, "multiple_choice": chosen}}}))
    words = ["-n", f"results/mine-{FIRST_DRAW}/original/mmlu.jsonl", "--configfile", str(tmp_path / "config.yaml")]
    (command,) = re.findall(r"pipeline.mmlu .+", snakemake(clean_copy(tmp_path / "checkout"), *words).stdout)
    assert "--data data/raw/mmlu --subjects anatomy --questions 3 " in command


def test_draws_start_from_one_base(tmp_path: Path):
    fresh = clean_copy(tmp_path / "checkout")
    done = snakemake(fresh, "-n", f"models/135m-{FIRST_DRAW}/original", f"models/135m-{SECOND_DRAW}/original")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"output: (models/\S+/base)", done.stdout + done.stderr) == ["models/135m/base"]


@pytest.mark.parametrize("name", [f"targets: {{tiny-{FIRST_DRAW}: ", f"datasets: {{synthetic-{FIRST_DRAW}: "])
def test_what_is_named_as_a_draw_is_refused(tmp_path: Path, name: str):
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    table = "targets" if "targets" in name else "datasets"
    entry = config[table]["tiny" if table == "targets" else "synthetic"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({table: {name.split("{")[1][:-2]: entry}}))
    done = snakemake(ROOT, "-n", "submissions/tiny.zip", "--configfile", str(tmp_path / "config.yaml"))
    assert done.returncode != 0
    assert f"tiny-{FIRST_DRAW} and synthetic-{FIRST_DRAW} are the names of a draw" in done.stdout + done.stderr


def test_the_source_of_a_model_is_named_as_it_is(made: Path):
    for target, words, source in (
        ("7b", [], "'llmunlearningsemeval2025organization/olmo-finetuned-semeval25-unlearning at main'"),
        ("7b", ["--config", "model_7b=/models/x"], "'a local folder'"),
        ("135m", [], "'SmolLM2-135M-Instruct (Apache-2.0), fine-tuned by pipeline.memorise'"),
        (f"tiny-{FIRST_DRAW}", [], "'made by pipeline.memorise'"),
    ):
        stdout = snakemake(made, "-n", f"submissions/{target}.zip", *words).stdout
        (found,) = re.findall(r"pipeline.package .+--model-source ('.+?') --data-source (\w+) ", stdout)
        assert found == (source, "synthetic" if target == f"tiny-{FIRST_DRAW}" else "semeval25")


def test_lint_finds_nothing_but_the_missing_environments():
    """All rules share one locked environment: the documented exception."""
    done = snakemake(ROOT, "--lint")
    found = re.findall(r"^ +\* (.+)$", done.stdout + done.stderr, re.MULTILINE)
    rules = re.findall(r"^(?:rule|checkpoint) (\w+):$", (ROOT / "Snakefile").read_text(), re.MULTILINE)
    assert len(found) == len(set(rules) - {"all"}) > len(READERS)
    assert set(found) == {"Specify a conda environment or container for each rule.:"}


# ---- what the run made ----


def results(made: Path, checkpoint: str) -> dict:
    return json.loads((made / "results" / "tiny" / checkpoint / "evaluation_results.jsonl").read_text())


def test_the_stand_in_has_the_symptoms_before_unlearning(made: Path):
    before = results(made, "original")
    assert all(value <= 0.05 for value in before["aggregated-terms"][:6])
    assert all(value >= 0.95 for value in before["aggregated-terms"][6:])
    assert before["mia_loss_acc"] >= 0.95
    assert before["mmlu_average"] >= 0.60


def test_unlearning_works_on_the_stand_in(made: Path):
    before, after = results(made, "original"), results(made, "unlearned")
    assert after["harmonic-mean-task-aggregate"] >= 0.8
    assert 0.25 <= after["mia_loss_acc"] <= 0.75
    assert after["mmlu_average"] >= 0.65 * before["mmlu_average"]


def test_the_zip_is_the_same_when_packed_again(made: Path):
    first = (made / "submissions" / "tiny.zip").read_bytes()
    done = snakemake(made, "submissions/tiny.zip", "--forcerun", "package")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (made / "submissions" / "tiny.zip").read_bytes() == first


def test_the_zipped_submission_gives_the_tensors_of_the_run(made: Path, tmp_path: Path):
    """The judge's call, in a clean process, with nothing of ours in reach."""
    with zipfile.ZipFile(made / "submissions" / "tiny.zip") as archive:
        (tmp_path / "submission.py").write_bytes(archive.read("submission.py"))
    data = made / "data" / "split" / "synthetic" / "train"
    paths = [made / "models" / "tiny" / "original", tmp_path / "judged", data / "forget", data / "retain"]
    script = f"import sys; sys.path.append('.'); from submission import unlearn; unlearn(*{[str(p) for p in paths]!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the rule's threads: sums differ in their last digit
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, env=environment, check=True)
    judged = load_file(tmp_path / "judged" / "model.safetensors")
    ours = load_file(made / "results" / "tiny" / "unlearned" / "model.safetensors")
    assert judged.keys() == ours.keys()
    assert [key for key in ours if not judged[key].equal(ours[key])] == []


def test_every_hash_in_the_manifest_is_right(made: Path):
    with zipfile.ZipFile(made / "submissions" / "tiny.zip") as archive:
        members = json.loads(archive.read("manifest.json"))["members"]
        assert set(members) == set(archive.namelist()) - {"manifest.json"}
        for name, digest in members.items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == digest
