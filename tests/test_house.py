"""The house: data flows one way, rule -> stage of the same name -> lib -> third party."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

STAGES = sorted(path.stem for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__")
METHODS = sorted(path.stem for path in (ROOT / "pipeline" / "methods").glob("*.py") if path.stem != "__init__")
LIB = sorted(path.stem for path in (ROOT / "pipeline" / "lib").glob("*.py") if path.stem != "__init__")
JUDGE = {"torch", "transformers", "datasets", "accelerate", "deepspeed", "pandas", "rouge_score", "tqdm"}
JUDGE |= {"numpy", "pyarrow", "safetensors"}  # what those bring


def imports(path: Path) -> set[str]:
    """The modules that a file names in its import statements."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_there_are_stages_and_lib_modules():
    assert len(STAGES) >= 11
    assert len(LIB) >= 8


@pytest.mark.parametrize("name", LIB)
def test_lib_imports_no_stage(name: str):
    named = imports(ROOT / "pipeline" / "lib" / f"{name}.py")
    assert not {f"pipeline.{stage}" for stage in STAGES} & named


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_imports_no_stage(name: str):
    # What is claimed of the method is tried with it; what its runs have in common is computed with it.
    allowed = {name, "unlearn"} if name in ("claims", "layer_inputs") else {name}
    named = imports(ROOT / "pipeline" / f"{name}.py")
    assert not {f"pipeline.{stage}" for stage in STAGES if stage not in allowed} & named


@pytest.mark.parametrize("name", METHODS)
def test_a_method_imports_no_stage_but_the_submission(name: str):
    named = imports(ROOT / "pipeline" / "methods" / f"{name}.py")
    assert not {f"pipeline.{stage}" for stage in STAGES if stage != "unlearn"} & named


@pytest.mark.parametrize("name", [name for name in STAGES if name != "verify"])  # it checks what a run has made
def test_every_rule_has_a_stage_of_its_name_and_every_stage_a_rule(name: str):
    text = (ROOT / "Snakefile").read_text()
    assert re.search(rf"^(rule|checkpoint) {name}:$", text, re.MULTILINE)
    assert f"python -m pipeline.{name} " in text


def test_the_submission_imports_only_what_the_judge_has():
    named = {module.split(".")[0] for module in imports(ROOT / "pipeline" / "unlearn.py")}
    assert named - set(sys.stdlib_module_names) <= JUDGE


@pytest.mark.parametrize("name", STAGES)
def test_help_says_what_a_stage_reads_and_writes(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"pipeline.{name}").main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for word in ("Reads ", "Writes ", "Run "):
        assert word in text
