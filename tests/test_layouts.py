"""The organisers' two checkpoints, thirty-two times narrower and otherwise as they are: fetched, unlearned, evaluated.

What may differ between copies of one checkpoint may not be seen in any result: one file or shards with an index, a
tokenizer that appends the end-of-text token (transformers issue 47988) or one that does not.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import OlmoConfig, OlmoForCausalLM

from pipeline import complete, fetch_model, membership, mmlu, unlearn
from pipeline.lib.models import load_model, load_tokenizer
from pipeline.lib.records import write_jsonl
from tests.test_measure import QUESTIONS, write_csv

# Blocks and heads are real, and so are the ratios of widths: 2048 : 8192 on 1B, 4096 : 11008 on 7B. Which of the two
# clips its attention was not looked up; both ways must do.
SIZES = {
    "1B": {
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_size": 64,
        "intermediate_size": 256,
        "clip_qkv": None,
    },
    "7B": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 128,
        "intermediate_size": 344,
        "clip_qkv": 8.0,
    },
}
# What each size is unlearned with: aimed and in closed form eight blocks, by descent what arXiv 2506.16548 submitted.
SETTINGS = {
    ("1B", "aim"): {"trained": [*range(1, 9)], "method": "aim"},
    ("7B", "aim"): {"trained": [*range(3, 11)], "method": "aim"},
    ("1B", "solve"): {"trained": [*range(1, 9)], "beta": 2.0, "alpha": 20.0},
    ("7B", "solve"): {"trained": [*range(3, 11)], "beta": 2.0, "alpha": 20.0},
    ("1B", "descend"): {"trained": [12, 13, 14], "beta": 3.0, "alpha": 900.0, "batch_size": 8},
    ("7B", "descend"): {"trained": [24, 25, 26], "beta": 5.0, "alpha": 900.0, "batch_size": 12},
}
# One round or epoch, by descent with a rate that also shows in bfloat16; general text, slow to sample through so many
# blocks, on 1B alone.
QUICK = {
    ("1B", "aim"): ["--rounds", "1", "--general-ratio", "0.5"],
    ("7B", "aim"): ["--rounds", "1", "--general", "0"],
    ("1B", "solve"): ["--method", "solve", "--general-ratio", "0.5"],
    ("7B", "solve"): ["--method", "solve", "--general", "0"],
    ("1B", "descend"): ["--method", "descend", "--epochs", "1", "--learning-rate", "0.05"],
    ("7B", "descend"): ["--method", "descend", "--epochs", "1", "--learning-rate", "0.05"],
}


def save_tokenizer(source: Path, folder: Path, appends: bool) -> None:
    """A copy of a checkpoint's tokenizer, which may append the end-of-text token."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    if appends:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        end = "<|endoftext|>"
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    ids = load_tokenizer(folder)("the city").input_ids
    assert (ids[-1] == load_tokenizer(folder).eos_token_id) is appends


@pytest.fixture(scope="module", params=[(size, dtype) for size in SIZES for dtype in ("float32", "bfloat16")])
def layouts(request, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, torch.dtype, list[Path]]:
    """A size, a precision, and two copies of a checkpoint, fetched from local folders."""
    size, dtype = request.param[0], getattr(torch, request.param[1])
    tokenizer, folder = load_tokenizer(checkpoint), tmp_path_factory.mktemp(f"{size}-{request.param[1]}")
    config = OlmoConfig(
        **SIZES[size],
        vocab_size=len(tokenizer) + 50304 - 50280,  # embeddings that no token has
        max_position_embeddings=4096,
        rope_theta=10000.0,
        attention_bias=False,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = OlmoForCausalLM(config).to(dtype)
    copies = []
    for name, largest, appends in (("whole", "5GB", False), ("shards", "500KB", True)):
        model.save_pretrained(folder / name, max_shard_size=largest)
        assert (folder / name / fetch_model.INDEX).exists() == (name == "shards")
        save_tokenizer(checkpoint, folder / name, appends)
        copies.append(folder / f"{name}-fetched")
        fetch_model.main(["--local", str(folder / name), "--output", str(copies[-1])])
    return size, dtype, copies


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """By tensor its dtype and bytes; by file all that lies before its tensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        start = 8 + length
        found[path.name] = ("header", content[:start])
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], content[start + first : start + last])
    return found


@pytest.mark.parametrize("method", ["aim", "solve", "descend"])
def test_each_copy_ends_with_the_same_tensors(layouts, method: str, data: Path, tmp_path: Path):
    """Settings by depth, the input's precision kept, and every byte but the trained matrices'."""
    size, dtype, copies = layouts
    ends = []
    for number, copy in enumerate(copies):
        output = tmp_path / str(number)
        words = [str(word) for word in (copy, output, data / "forget", data / "retain")]
        unlearn.main([*words, *QUICK[size, method]])
        settings = json.loads((output / "run.json").read_text())["settings"]
        assert {name: settings[name] for name in SETTINGS[size, method]} == SETTINGS[size, method]
        before, after = stored(copy), stored(output)
        assert {kind for kind, _ in after.values()} == {
            "header",
            {"float32": "F32", "bfloat16": "BF16"}[str(dtype)[6:]],
        }
        assert before.keys() == after.keys()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {f"model.layers.{index}.mlp.down_proj.weight" for index in settings["trained"]}
        others = {path.name for path in copy.iterdir() if path.suffix != ".safetensors"}
        assert {path.name for path in output.iterdir() if path.suffix != ".safetensors"} == {*others, "run.json"}
        assert all((output / name).read_bytes() == (copy / name).read_bytes() for name in others)
        assert load_model(output, dtype).config.num_hidden_layers == SIZES[size]["num_hidden_layers"]
        ends.append({name: value for name, value in after.items() if value[0] != "header"})
    assert ends[0] == ends[1]


def test_each_copy_is_evaluated_alike(layouts, rows, data: Path, tmp_path: Path):
    """Completions, document losses and multiple choice: the same rows, and the losses of transformers' own model."""
    _, _, copies = layouts
    for side, part in (("forget", rows["forget"][:4]), ("retain", rows["retain"][:4])):
        write_jsonl(tmp_path / side / f"{side}.jsonl", part)
    documents = {"member": "the river of the city", "nonmember": "who was born in the story"}
    for name, text in documents.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "1", "document": text}])
    questions = write_csv(tmp_path / "mmlu", QUESTIONS)
    stages = {
        complete: ["--forget", tmp_path / "forget", "--retain", tmp_path / "retain", "--max-new-tokens", "4"],
        membership: ["--mia", tmp_path],
        mmlu: ["--data", questions],
    }
    written = []
    for copy in copies:
        for stage, options in stages.items():
            words = ["--model", copy, *options, "--output", tmp_path / "out.jsonl"]
            stage.main([str(word) for word in words])
            written.append((tmp_path / "out.jsonl").read_bytes())
    assert written[:3] == written[3:]
    model, tokenizer = load_model(copies[0]), load_tokenizer(copies[0])
    losses = [json.loads(line)["nll"] for line in written[1].splitlines()]
    for loss, text in zip(losses, documents.values(), strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
