"""What the sweep's runs share: the same tensors with it as without, and nothing of another model taken."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoConfig, OlmoForCausalLM

from pipeline import layer_inputs
from pipeline import unlearn as submission
from pipeline.lib.models import load_model, load_tokenizer
from pipeline.lib.stage import BadInput
from pipeline.unlearn import Settings, read_texts, unlearn
from tests.conftest import ROOT
from tests.test_unlearn import refuse

WINDOW = Settings("solve", (2, 3, 4), beta=2.0, alpha=1.5)


def make(model: Path, data: Path, folder: Path) -> Path:
    words = ["--model", model, "--forget", data / "forget", "--retain", data / "retain", "--output", folder]
    layer_inputs.main([str(word) for word in words])
    return folder


@pytest.fixture(scope="module")
def inputs(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(checkpoint, data, tmp_path_factory.mktemp("shared") / "inputs")


def weights(checkpoint: Path, data: Path, output: Path, settings: Settings, inputs: Path | None) -> bytes:
    shared = str(inputs) if inputs else None
    unlearn(str(checkpoint), str(output), str(data / "forget"), str(data / "retain"), settings, shared)
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("trained", [(0,), (0, 1), (1, 2, 3), (3, 4, 5)])
@pytest.mark.parametrize("coefficient", ["adaptive", "fixed"])
def test_a_run_from_the_inputs_ends_with_the_tensors_of_one_without(
    checkpoint: Path, data: Path, inputs: Path, tmp_path: Path, trained: tuple[int, ...], coefficient: str
):
    settings = dataclasses.replace(WINDOW, trained=trained, coefficient=coefficient)
    alone = weights(checkpoint, data, tmp_path / "alone", settings, None)
    assert weights(checkpoint, data, tmp_path / "shared", settings, inputs) == alone
    assert alone != (checkpoint / "model.safetensors").read_bytes()


def test_the_seed_varies_the_directions_and_not_the_general_text(
    checkpoint: Path, data: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With another seed, a run from the inputs is one that samples its general text with seed 0 all the same."""
    other = dataclasses.replace(WINDOW, seed=3)
    shared = weights(checkpoint, data, tmp_path / "shared", other, inputs)
    assert shared != weights(checkpoint, data, tmp_path / "own text", other, None)
    assert shared != weights(checkpoint, data, tmp_path / "seed 0", WINDOW, inputs)
    sample = submission.sample_texts
    monkeypatch.setattr(submission, "sample_texts", lambda *texts: sample(*texts[:-1], WINDOW))
    assert shared == weights(checkpoint, data, tmp_path / "text of seed 0", other, None)


def test_what_enters_a_block_is_transformers_own_hidden_state(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One file for each block at which a window of three can start, each with all rows of the three kinds."""
    monkeypatch.setattr(submission, "fast_dtype", lambda: torch.float32)
    made = make(checkpoint, data, tmp_path / "inputs")
    assert sorted(path.name for path in made.iterdir()) == [f"block-{index}.safetensors" for index in range(4)]
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    for index in range(4):
        found = load_file(made / f"block-{index}.safetensors")
        rows = {side: [t.tokens for t in read_texts(data / side, side, tokenizer)] for side in ("forget", "retain")}
        rows["general"] = found.pop("tokens").tolist()
        assert found.keys() == rows.keys() and len(rows["general"]) > 5
        for side, tokens in rows.items():
            with torch.no_grad():
                states = [
                    model(torch.tensor([row]), output_hidden_states=True).hidden_states[index][0] for row in tokens
                ]
            torch.testing.assert_close(found[side], torch.cat(states), rtol=1e-4, atol=1e-4)


def test_a_run_from_the_inputs_runs_no_block_below_and_samples_nothing(
    checkpoint: Path, data: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    block = submission.Decoder.block
    monkeypatch.setattr(submission.Decoder, "block", lambda self, index: read.append(index) or block(self, index))
    monkeypatch.setattr(submission, "sample_texts", lambda *_: pytest.fail("text was sampled"))
    weights(checkpoint, data, tmp_path / "out", WINDOW, inputs)
    assert read == [2, 2, 3, 4]  # the first once more, for what it is assumed to do


REFUSED = "block-2.safetensors: missing, damaged, or of another model, other rows or another precision"


def test_the_inputs_of_another_model_are_refused(checkpoint: Path, data: Path, inputs: Path, tmp_path: Path):
    """Another model of the same shapes: only the hash can tell."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: -value for name, value in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    options = ["--trained", "2", "3", "4", "--method", "solve", "--inputs", str(inputs)]
    assert refuse(other, data, tmp_path / "out", *options) == f"error: {inputs}/{REFUSED}"


@pytest.mark.parametrize("case", ["other rows", "missing", "half", "no hash", "descent"])
def test_inputs_that_do_not_fit_are_refused(case: str, checkpoint: Path, data: Path, inputs: Path, tmp_path: Path):
    folder, rows, settings = shutil.copytree(inputs, tmp_path / "inputs"), data, WINDOW
    path = folder / "block-2.safetensors"
    if case == "other rows":
        rows = shutil.copytree(data, tmp_path / "data")
        (rows / "forget" / "forget.parquet").unlink()
        lines = (rows / "forget" / "forget.jsonl").read_text().splitlines(keepends=True)
        (rows / "forget" / "forget.jsonl").write_text("".join(lines[::-1]))
    elif case == "missing":
        path.unlink()
    elif case == "half":
        path.write_bytes(path.read_bytes()[:-9])
    elif case == "no hash":
        save_file(load_file(path), path)
    else:
        settings = dataclasses.replace(WINDOW, method="descend", epochs=1)
    message = "only the closed form" if case == "descent" else REFUSED
    with pytest.raises(submission.BadInput, match=message):
        weights(checkpoint, rows, tmp_path / "out", settings, folder)
    assert not (tmp_path / "out").exists()


def test_wrong_rows_leave_no_folder(checkpoint: Path, data: Path, tmp_path: Path):
    words = [
        "--model",
        checkpoint,
        "--forget",
        data / "retain",
        "--retain",
        data / "retain",
        "--output",
        tmp_path / "o",
    ]
    with pytest.raises(BadInput, match="neither forget.parquet nor forget.jsonl"):
        layer_inputs.main([str(word) for word in words])
    assert not (tmp_path / "o").exists()


def test_the_files_are_in_the_precision_that_unlearning_computes_in(inputs: Path):
    with safe_open(inputs / "block-0.safetensors", framework="pt") as file:
        assert file.get_tensor("forget").dtype == submission.fast_dtype()


# ---- the plan for 7B, in LOG.md ----


def planned() -> dict[str, float]:
    """The figures of the plan's table, in jobs, seconds and bytes, by the first word of a line."""
    text = (ROOT / "LOG.md").read_text().partition("| part | takes |")[2].partition("\n\n")[0]
    units = {"": 1, "min": 60, "h": 3600, "GB": 1e9, "TB": 1e12}
    rows = re.findall(r"^\| \**([\w ]+).*?\| \**([\d.,]+) ?(\w*)\** \|$", text, re.MULTILINE)
    return {name.split()[0]: float(number.replace(",", "")) * units[unit] for name, number, unit in rows}


def test_the_plan_for_7b_is_right():
    """Weights and operations counted by torch on a 7B without values; the rest from the plan's assumptions."""
    config = OlmoConfig(vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = OlmoForCausalLM(config)
        block, rows = model.model.layers[0], torch.empty(1, 100, 4096)
        with FlopCounterMode(display=False) as one_pass:
            block(rows, position_embeddings=model.model.rotary_emb(rows, torch.arange(100)[None]))
        with FlopCounterMode(display=False) as equations:
            entering = torch.empty(100, 11008)
            _ = entering.T @ entering, rows[0].T @ entering
    stored = 4 * sum(weight.numel() for weight in model.state_dict().values())
    of_block = 4 * sum(weight.numel() for weight in block.state_dict().values())
    read = (stored - 4 * model.model.embed_tokens.weight.numel()) / 2  # at each step, in bfloat16
    tokens, disk, memory = 180_000 + 227_500, 1e9, 1555e9 / 2
    forward = one_pass.get_total_flops() / 100 / 156e12  # seconds a token and block
    windows = [range(max(0, last - 2), last + 1) for last in range(32)]
    solved, below = 10 * sum(map(len, windows)), 10 * sum(window[0] for window in windows)
    assert (solved, below) == (930, 4350)
    factor = (11008**3 / 3 + 2 * 11008**2 * 4096) / 4.85e12
    inputs = tokens * 4096 * 2
    keys = 2 * 32 * 4096 * 2  # bytes of keys and values a token
    sampling = 7 * 127 * (read + 256 * 64 * keys) / memory  # 1,777 texts by 256, on average 64 tokens long
    expected = {
        "jobs": 320 + 1 + 4 * 321 + 1 + 4,
        "shared": stored / disk + sampling + 29 * (tokens * forward + of_block / disk) + 30 * inputs / disk,
        "solving": solved * (tokens * (2 * forward + equations.get_total_flops() / 100 / 9.75e12) + factor),
        "reading": (320 * (2 * stored + inputs) + solved * of_block) / disk,
        "loading": 321 * 3 * stored / disk,
        "completions": 321 * 200 * 256 * read / memory,
        "multiple": 321 * (2.2e6 + 80e3 + 180e3) * 32 * forward,
        "starting": 1284 * 20,
    }
    expected["GPU"] = sum(seconds for name, seconds in expected.items() if name != "jobs")
    expected["saved"] = below * (tokens * forward + of_block / disk) + 320 * (stored / disk + sampling)
    expected["saved"] += 640 * 32 * of_block / disk
    expected |= {"inputs": 30 * inputs, "a": stored, "all": 320 * stored}
    assert planned() == pytest.approx(expected, rel=0.02)
