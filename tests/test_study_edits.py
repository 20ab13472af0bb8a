"""Every job of a small study against every source file, setting and result: edits rerun what they must, no more.

Planned in a checkout with made-up outputs (see tests/trust/study_edits.py), so nothing is trained. `make trust` has
the files that hardly anything reads, too.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.trust import study_edits as edits
from tests.trust.checkout import planned_outputs
from tests.trust.edit_matrix import source_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edits.fake_study(tmp_path_factory.mktemp("studied") / "checkout")


def test_nothing_is_planned_when_nothing_is_touched(checkout: Path):
    assert edits.planned(checkout, set()) == set()


def test_everything_is_planned_when_nothing_is_made(checkout: Path, tmp_path: Path):
    folder = tmp_path / "clean"
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns("raw", "split", "models", "results"))
    assert planned_outputs(folder, *edits.GOALS, *edits.DRAWN) == set(edits.BASE.jobs)


@pytest.mark.parametrize("name", [name for name in source_files(ROOT) if name.endswith((".py", ".yaml", ".csv"))])
def test_an_edited_file_reruns_the_jobs_that_use_it_and_what_reads_them(checkout: Path, name: str):
    assert edits.after_edit(checkout, name, edits.expected(name)) == edits.expected(name)


@pytest.mark.parametrize("setting", edits.SETTINGS)
def test_a_changed_setting_reruns_its_jobs(checkout: Path, setting: str):
    assert edits.after_setting(checkout, setting) == edits.expected_with(setting)


@pytest.mark.parametrize("name", edits.results())
def test_a_changed_result_reruns_what_reads_it(checkout: Path, name: str):
    wanted = edits.results()[name]
    assert wanted
    assert edits.after_edit(checkout, name, wanted) == wanted


def test_the_tables_hold_every_rule_of_the_study():
    """A rule that no table knows would make the matrix blind."""
    study = (ROOT / "Snakefile").read_text().partition("# ---- the study")[2]
    rules = set(re.findall(r"^(?:rule|checkpoint) (\w+):$", study, re.MULTILINE))
    assert len(rules) >= 7
    assert rules | {"retrain"} <= {job.rule for job in edits.BASE.jobs.values()}


def test_the_tables_hold_every_setting_of_the_study():
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    assert {f"study.{key}" for key in config["study"]} <= {place for place, *_ in edits.SETTINGS.values()}
