"""fetch_model: which files make a model folder, and which folders are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from hub_server import serve
from huggingface_hub import constants
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import OlmoConfig, OlmoForCausalLM

from pipeline import fetch_model
from pipeline.lib.stage import BadInput

ROOT = Path(__file__).resolve().parents[1]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model of one file, with things beside it that must not come along."""
    folder = tmp_path / "in"
    (folder / "original").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    save_file({"w": numpy.arange(6.0)}, folder / "model.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "modeling_evil.py", "original/model.safetensors", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same with two weight files and their index."""
    (model / "model.safetensors").unlink()
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": numpy.full(3, number)}, model / name)
    weights = {f"w{number}": name for number, name in enumerate(SHARDS)}
    (model / fetch_model.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return model


def fetch(local: Path, output: Path) -> set[str]:
    fetch_model.main(["--local", str(local), "--output", str(output)])
    return {path.name for path in output.iterdir()}


def refusal(local: Path) -> str:
    output = local.parent / "out"
    with pytest.raises(BadInput) as caught:
        fetch(local, output)
    assert not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_files_only(model, tmp_path):
    names = fetch(model, tmp_path / "out")
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_shards_and_index(sharded, tmp_path):
    assert fetch(sharded, tmp_path / "out") >= {*SHARDS, fetch_model.INDEX}


def test_weights_that_no_index_names_stay_where_they_are(model, tmp_path):
    save_file({"w": numpy.arange(6.0)}, model / "consolidated.safetensors")
    assert "consolidated.safetensors" not in fetch(model, tmp_path / "out")


def test_a_file_that_two_folders_have_is_the_second_ones_and_the_first_keeps_its_own(model, tmp_path):
    """As where a model has a tokenizer's settings, but no vocabulary, and another repository has both."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer_config.json").write_text("[1]")
    (tmp_path / "out").mkdir()
    for source in (model, tmp_path / "words"):
        fetch_model.place(source, fetch_model.TOKENIZER, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "[1]"
    assert (model / "tokenizer_config.json").read_text() == "{}"


def test_links_are_hard_never_symbolic(model, tmp_path):
    """As in the hub's cache, where names are symbolic links to blobs; the output must live on without them."""
    (tmp_path / "blob").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "blob")
    fetch(model, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert os.path.samefile(tmp_path / "out" / "model.safetensors", tmp_path / "blob")
    expected = (tmp_path / "blob").read_bytes()
    (tmp_path / "blob").unlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_copy_where_links_are_impossible(model, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)  # another file system cannot be had in a test
    fetch(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not os.path.samefile(tmp_path / "out" / "model.safetensors", model / "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_alone(model, name):
    for path in model.glob("*.safetensors"):
        path.unlink()
    for other in {"pytorch_model.bin", "model.pt"} - {name}:
        (model / other).unlink()
    assert "in: no *.safetensors" in refusal(model)


def test_missing_config_and_folder(model):
    (model / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(model)
    (model / "config.json").unlink()
    assert "config.json: no such file" in refusal(model)
    assert "gone: no such model folder" in refusal(model.parent / "gone")


def test_missing_tokenizer(model):
    (model / "tokenizer.json").unlink()
    assert "in: no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json" in refusal(model)


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert f"in: {SHARDS[1]} is missing, one of 2 weight files" in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"w": 1}}'])
def test_broken_index(sharded, text):
    (sharded / fetch_model.INDEX).write_text(text)
    assert "model.safetensors.index.json: not an index of weights" in refusal(sharded)


def test_index_that_leads_elsewhere(sharded):
    (sharded / fetch_model.INDEX).write_text('{"weight_map": {"w": "original/model.safetensors"}}')
    assert "weights outside the folder: original/model.safetensors" in refusal(sharded)


def test_shards_without_their_index(sharded):
    (sharded / fetch_model.INDEX).unlink()
    assert "in: model.safetensors is missing" in refusal(sharded)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", b""])
def test_file_that_is_no_safetensors(model, content):
    (model / "model.safetensors").write_bytes(content)
    assert "model.safetensors: not a whole safetensors file" in refusal(model)


def test_file_cut_short(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "model.safetensors: not a whole safetensors file" in refusal(model)


def test_output_over_the_users_folder_is_refused(model):
    for output in (model, model.parent):
        with pytest.raises(BadInput, match="must lie apart"):
            fetch(model, output)
    assert (model / "model.safetensors").is_file()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, and no hub: port 9 (discard) on loopback is closed."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    return tmp_path / "cache"


def test_hub_out_of_reach(cache, tmp_path):
    with pytest.raises(BadInput) as caught:
        fetch_model.main(["--repo", "some/model", "--output", str(tmp_path / "out")])
    message = str(caught.value)
    assert message.startswith("some/model: not in the cache, and the hub is out of reach (")
    assert "\n" not in message
    for way_out in ("--local", "hf auth login", "HF_TOKEN"):
        assert way_out in message
    assert not (tmp_path / "out").exists()


def test_name_that_is_no_repository(cache, tmp_path):
    with pytest.raises(BadInput, match="not/a/repo: not the name of a repository"):
        fetch_model.main(["--repo", "not/a/repo", "--output", str(tmp_path / "out")])


@pytest.fixture(params=[(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in ("50GB", "100KB")])
def checkpoint_of(request, tmp_path: Path) -> tuple[Path, torch.dtype]:
    """The organisers' 1B layout at a thirty-second of its width, in one file or in shards; no tokenizer."""
    dtype, size = request.param
    config = OlmoConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "checkpoint"
    OlmoForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=size)
    assert (folder / fetch_model.INDEX).exists() == (size == "100KB")
    return folder, dtype


def test_layouts_of_the_organisers(checkpoint_of, model, tmp_path):
    """Every file arrives as it is; the number of weights is that of the architecture."""
    folder, dtype = checkpoint_of
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    assert fetch(folder, tmp_path / "out") == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    weights = {name: w for path in (tmp_path / "out").glob("*.safetensors") for name, w in load_file(path).items()}
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert sum(weight.numel() for weight in weights.values()) == 2 * 512 * 64 + 16 * (4 * 64**2 + 3 * 64 * 256)


def stage(address: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": ""}
    command = [sys.executable, "-m", "pipeline.fetch_model", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **own})


@pytest.mark.slow
def test_model_and_tokenizer_of_two_repositories(sharded, tmp_path):
    """From a hub; the checkpoint's own repository has no tokenizer. What is not wanted is not asked for."""
    vocabulary, home = b'{"from": "the other"}', tmp_path / "home"
    names = {"config.json", fetch_model.INDEX, *SHARDS}
    with serve() as hub:
        hub.commit(
            "models/some/model",
            {
                **{name: (sharded / name).read_bytes() for name in names},
                **{name: b"unwanted" * 200 for name in ("pytorch_model.bin", "README.md", "step-1/model.safetensors")},
            },
        )
        words = hub.commit(
            "models/some/words", {"tokenizer.json": vocabulary, "config.json": b"?", "m.safetensors": b"?"}
        )
        done = stage(hub.address, home, "--repo", "some/model", "--output", str(tmp_path / "out"))
        assert done.returncode == 2 and "no tokenizer" in done.stderr and not (tmp_path / "out").exists()
        options = ["--repo", "some/model", "--tokenizer-repo", "some/words", "--tokenizer-revision", words]
        done = stage(hub.address, home, *options, "--output", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr
        asked = [path for path in hub.requests("hub", "HEAD") if "/resolve/" in path]
        assert {path.rpartition("/")[2] for path in asked} == {*names, "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == vocabulary
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (sharded / name).read_bytes()
