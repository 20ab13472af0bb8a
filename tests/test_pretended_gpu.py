"""Stages as on a machine with a GPU: what they compute there, and that nothing is left on the wrong device."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from pipeline import unlearn as submission
from pipeline.claims import CLAIMS
from pipeline.lib import models
from pipeline.lib.records import read_table, write_jsonl
from pipeline.unlearn import Settings, unlearn
from tests.conftest import ROOT
from tests.test_methods import METHODS

REFUSED = {
    "an operation on both": "torch.ones(2, device='cuda') + torch.ones(2)",
    "a matrix product of both": "torch.ones(2, 2, device='cuda') @ torch.ones(2, 2)",
    "parts of both": "torch.cat([torch.ones(2, device='cuda'), torch.ones(2)])",
    "a value from the CPU put in": "torch.zeros(3, device='cuda')[[1, 2]] = torch.ones(2)",
    "a module's weights": "torch.nn.Linear(2, 2).to('cuda')(torch.ones(2))",
    "an index on the GPU, into the CPU": "torch.ones(3)[torch.tensor([1], device='cuda')]",
    "a generator of the CPU": "torch.rand(2, device='cuda', generator=torch.Generator())",
    "a generator of the GPU": "torch.rand(2, generator=torch.Generator('cuda'))",
    "its memory": "torch.ones(2, device='cuda').numpy()",
}
TAKEN = {
    "a number": "torch.ones(2, device='cuda') + torch.tensor(1.0)",
    "an index from the CPU": "torch.ones(3, device='cuda')[torch.tensor([1])]",
    "a copy of the other": "torch.ones(2, device='cuda').copy_(torch.ones(2))",
    "a copy on the CPU": "torch.ones(2, device='cuda').cpu() + torch.ones(2)",
    "a generator of its own": "torch.rand(2, device='cuda', generator=torch.Generator('cuda').manual_seed(1)).add_(1)",
    "the gradient of a module": "torch.nn.Linear(2, 1).to('cuda')(torch.ones(2, device='cuda')).sum().backward()",
    "what a list says": "torch.tensor([1, 2], device='cuda').add_(1).tolist() == [2, 3] or 1 / 0",
}


def tried(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that sees a GPU."""
    whole = f"import torch\nfrom tests import pretended_gpu\npretended_gpu.install()\n{code}"
    return subprocess.run([sys.executable, "-c", whole], cwd=ROOT, capture_output=True, text=True)


def test_the_pretended_gpu_refuses_what_cuda_refuses_and_takes_what_cuda_takes():
    lines = []
    for what, code in (REFUSED | TAKEN).items():
        lines += [
            f"try:\n    {code}\nexcept Exception:\n    print('refused', {what!r})\nelse:\n    print('taken', {what!r})"
        ]
    said = tried("\n".join(lines))
    wanted = [f"refused {what}" for what in REFUSED] + [f"taken {what}" for what in TAKEN]
    assert said.stdout.splitlines() == wanted, said.stderr


def check(done: subprocess.CompletedProcess[str]) -> None:
    """Fail unless a process went well, and computed on the GPU."""
    assert done.returncode == 0, done.stderr
    (operations,) = re.findall(r"(\d+) operations on the pretended GPU", done.stderr)
    assert int(operations) > 200


def on_gpu(*words: str | Path) -> None:
    """Run a stage."""
    command = [sys.executable, "-m", "tests.pretended_gpu", *map(str, words)]
    check(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))


SETTINGS = {
    "aim": Settings("aim", (1, 2, 3, 4), general_ratio=1.0, rounds=2),
    "solve": Settings("solve", (2, 3, 4), beta=3.0, alpha=5.0, general=1.0, general_ratio=1.0),
    "descend": Settings("descend", (2, 3, 4), beta=3.0, alpha=10.0, epochs=3, batch_size=4, learning_rate=1e-3),
}


@pytest.mark.parametrize(("method", "closeness"), [("aim", 0.2), ("solve", 1e-4), ("descend", 1e-4)])
def test_unlearning_on_a_gpu_changes_the_matrices_as_on_a_cpu_in_bfloat16(
    memorised: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, closeness: float
):
    """In the norm of the change; rounds of aimed steering make more of the last bits than one solution does."""
    settings = SETTINGS[method]
    monkeypatch.setattr(submission, "fast_dtype", lambda: torch.bfloat16)
    # Attention is torch's own on both: of plain products in bfloat16 sampled text would tell the last bits.
    monkeypatch.setitem(AttentionInterface._global_mapping, "causal", submission.FUSED)
    with sdpa_kernel(SDPBackend.MATH):
        unlearn(memorised, tmp_path / "cpu", data / "forget", data / "retain", settings)
    folders = [str(folder) for folder in (memorised, tmp_path / "gpu", data / "forget", data / "retain")]
    done = tried(
        "from pathlib import Path\nfrom pipeline.unlearn import FUSED, AttentionInterface, Settings, unlearn\n"
        "AttentionInterface.register('causal', FUSED)\n"
        f"unlearn(*map(Path, {folders}), {settings})"
    )
    check(done)
    assert "cannot be kept" not in done.stderr  # what a killed run goes on from
    before, cpu, gpu = (
        load_file(folder / "model.safetensors") for folder in (memorised, tmp_path / "cpu", tmp_path / "gpu")
    )
    changed = {name for name in before if not torch.equal(before[name], cpu[name])}
    assert changed == {f"model.layers.{index}.mlp.down_proj.weight" for index in settings.trained}
    for name, tensor in before.items():
        assert (gpu[name] - cpu[name]).norm() <= closeness * (cpu[name] - tensor).norm()


@pytest.mark.parametrize(("new", "positions"), [(1, 9), (9, 9)])
def test_attention_on_a_gpu_is_that_of_the_cpu(new: int, positions: int):
    code = (
        "from types import SimpleNamespace\nfrom pipeline.unlearn import causal_attention\n"
        f"parts = [torch.randn(2, heads, at, 8) for heads, at in ((4, {new}), (2, {positions}), (2, {positions}))]\n"
        "module = SimpleNamespace(is_causal=True, num_key_value_groups=2)\n"
        "here, there = (causal_attention(module, *(part.to(name) for part in parts), None, scaling=0.3)[0]"
        " for name in ('cpu', 'cuda'))\n"
        "assert there.is_cuda\ntorch.testing.assert_close(there.cpu(), here)"
    )
    done = tried(code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def words(memorised: Path, data: Path, tmp_path: Path) -> dict[str, list[str]]:
    """By stage its command line, but for the output."""
    for name in ("member", "nonmember"):
        rows = [{"id": str(n), "document": f"{name} {n} was born in the city" + " on a river" * n} for n in range(4)]
        write_jsonl(tmp_path / "mia" / f"{name}.jsonl", rows)
    for part in ("dev", "test"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        (tmp_path / "mmlu" / part / f"anatomy_{part}.csv").write_text("Who is it?,a,b,c,d,A\nWhat is it?,a,b,c,d,C\n")
    sides = ["--forget", str(data / "forget"), "--retain", str(data / "retain")]
    return {
        "complete": ["--model", str(memorised), *sides, "--max-new-tokens", "24"],
        "membership": ["--model", str(memorised), "--mia", str(tmp_path / "mia")],
        "mmlu": ["--model", str(memorised), "--data", str(tmp_path / "mmlu")],
    }


@pytest.mark.parametrize("stage", ["complete", "membership", "mmlu"])
def test_a_checkpoint_is_measured_on_a_gpu_as_on_a_cpu_in_bfloat16(
    words: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    """Texts to the letter, numbers as bfloat16 keeps them: batches may be others."""
    monkeypatch.setattr(models, "default_dtype", lambda: torch.bfloat16)
    with sdpa_kernel(SDPBackend.MATH):
        importlib.import_module(f"pipeline.{stage}").main([*words[stage], "--output", str(tmp_path / "cpu.jsonl")])
    on_gpu(f"pipeline.{stage}", *words[stage], "--output", tmp_path / "gpu.jsonl")
    cpu, gpu = (read_table(tmp_path / name) for name in ("cpu.jsonl", "gpu.jsonl"))
    assert len(cpu) == len(gpu) > 1
    for here, there in zip(cpu, gpu, strict=True):
        for key, value in here.items():
            numbers = isinstance(value, float | list)
            assert there[key] == (pytest.approx(value, rel=0.05, abs=0.01) if numbers else value)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_peers_method_changes_the_weights_on_a_gpu(checkpoint: Path, data: Path, tmp_path: Path, method: str):
    folders = [checkpoint, tmp_path / "out", data / "forget", data / "retain"]
    on_gpu(f"pipeline.methods.{method}", *folders, "--seed", "7", "--minutes", "0.15")
    before, after = (load_file(folder / "model.safetensors") for folder in folders[:2])
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_claims_are_judged_on_a_gpu(words: dict[str, list[str]], memorised: Path, data: Path, tmp_path: Path):
    """With the least of everything."""
    paths = {"original": memorised, "forget": data / "forget", "retain": data / "retain"}
    paths |= {"mia": tmp_path / "mia", "mmlu": tmp_path / "mmlu"}
    paths |= {"output": tmp_path / "claims.json", "figures": tmp_path / "figures"}
    line = ["--target-name", "random", "--alpha", "1.5", "--seeds", "2"]
    line += [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    done = tried(
        "from pipeline import claims\nfrom pipeline.lib import probes\n"
        "claims.RATIOS, claims.EPOCHS, claims.MEASURED = (1.0, 5.0), 2, 6\n"
        "claims.SEARCH = probes.Search(steps=2, width=4, top=8)\n"
        f"claims.main({line})"
    )
    check(done)
    assert [entry["claim"] for entry in json.loads((tmp_path / "claims.json").read_text())] == list(CLAIMS)
