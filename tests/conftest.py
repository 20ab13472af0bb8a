"""Fixtures shared by the tests."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if begun in the background, by children too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads only wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import tokenizers
import torch
from filelock import FileLock
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

from pipeline.lib.models import load_model, load_tokenizer
from pipeline.lib.records import write_jsonl, write_parquet
from pipeline.unlearn import read_texts

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"NOT RUN: {what} is not here ({path.name} beside the checkout, under shared/data)")
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The competition's four parquet files and mia/."""
    return _folder(SHARED / "semeval25", "the competition data")


@pytest.fixture(scope="session")
def real_mmlu() -> Path:
    """MMLU's dev/ and test/ csv files, 57 subjects each."""
    return _folder(SHARED / "mmlu", "MMLU")


WORDS = ["the", "of", "a", "was", "born", "in", "on", "and", "is", "city", "writer", "river", "what", "who", "where"]


def make_rows(side: str, documents: int = 3) -> list[dict[str, str]]:
    """Rows in the competition's format: per task some documents, each with one sc and one qa row."""
    rows = []
    for task in ("Task1", "Task2", "Task3"):
        for number in range(documents):
            words = [WORDS[(number * 5 + n * n + len(side) + int(task[-1])) % len(WORDS)] for n in range(30)]
            name = f"{side}{task}n{number}"
            sc = {
                "id": f"{name}sc1",
                "input": f"{name} {' '.join(words[: 9 + number])}",
                "output": " ".join(words[12:]),
            }
            qa = {"id": f"{name}qa0", "input": f"What of {name}?", "output": f"{words[0]} {number}"}
            rows += [{**row, "task": task, "split": side} for row in (sc, qa)]
    return rows


@pytest.fixture(scope="session")
def rows() -> dict[str, list[dict[str, str]]]:
    """A few rows of each side."""
    return {side: make_rows(side) for side in ("forget", "retain")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[dict[str, str]]]) -> Path:
    """The rows in the judge's layout: {forget,retain}/{forget,retain}.{jsonl,parquet}."""
    folder = tmp_path_factory.mktemp("data")
    for side in rows:
        write_jsonl(folder / side / f"{side}.jsonl", rows[side])
        write_parquet(folder / side / f"{side}.parquet", rows[side])
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[dict[str, str]]]) -> Path:
    """A random OLMo of six blocks with a byte-level tokenizer. Its weights are large, so that its choices differ."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{row['input']} {row['output']}" for side in rows for row in rows[side]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    OlmoForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def memorised(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, trained until it knows all rows by heart, with their ends."""
    folder = tmp_path_factory.mktemp("memorised") / "model"
    shutil.copytree(checkpoint, folder)
    model, tokenizer = load_model(checkpoint).train(), load_tokenizer(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    texts = [text for side in ("forget", "retain") for text in read_texts(data / side, side, tokenizer)]
    rows = [torch.tensor([*text.tokens, tokenizer.eos_token_id]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    for _ in range(1500):
        loss = model(ids.clamp(min=0), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.15:
            break
    assert loss < 0.15  # the first tokens of a row nothing can tell
    model.save_pretrained(folder)
    return folder


GOALS = ["submissions/tiny.zip", "results/tiny/leaderboard.md", "results/tiny/report.html"]


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which tiny has been made: once for all workers of `-n 2`, each of which gets a copy of its own."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(shared / "original.lock"):
        if not (shared / "original").exists():
            make_tiny(shared / "unfinished")
            (shared / "unfinished").rename(shared / "original")
    return shutil.copytree(shared / "original", tmp_path_factory.mktemp("made") / "checkout", symlinks=True)


def make_tiny(folder: Path) -> None:
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    config = folder / "config" / "config.yaml"  # the study takes hours
    config.write_text(config.read_text().replace("full_report: true", "full_report: false"))
    done = snakemake(folder, *GOALS)
    assert done.returncode == 0, done.stderr[-4000:]
