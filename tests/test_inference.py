"""Batched losses and probabilities against transformers, one prompt at a time."""

import math
from pathlib import Path

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from pipeline.lib import inference
from pipeline.lib.inference import batches, mean_nll, next_token_probabilities
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.stage import BadInput

PROMPTS = [
    "the city",
    "What of forgetTask1n0?",
    "a",
    "the river of the writer was born in the city on a story",
    "who is",
]


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return load_tokenizer(checkpoint)


def test_mean_nll_equals_the_loss_of_transformers(model, tokenizer):
    sequences = [encode(tokenizer, prompt + " born in the city") for prompt in PROMPTS]
    masked = [len(encode(tokenizer, prompt)) for prompt in PROMPTS]
    for given in (masked, None):
        found = mean_nll(model, sequences, given, batch_tokens=40)
        for number, (ids, loss) in enumerate(zip(sequences, found, strict=True)):
            labels = torch.tensor([ids]).clone()
            labels[:, : given[number] if given else 0] = -100
            assert loss == pytest.approx(model(torch.tensor([ids]), labels=labels).loss.item(), rel=1e-5)


def test_mean_nll_of_nothing_is_none(model):
    assert mean_nll(model, [[5], [5, 6]], [0, 2]) == [None, None]


def test_a_batch_of_empty_rows_alone_has_no_loss_either(model):
    assert mean_nll(model, [[], []]) == [None, None]


def test_next_token_probabilities_equal_a_full_forward(model, tokenizer):
    head = encode(tokenizer, "the river and the city and the writer. ")
    for prompts in ([head + encode(tokenizer, p) for p in PROMPTS], [encode(tokenizer, p) for p in PROMPTS], [head]):
        found = next_token_probabilities(model, prompts, [7, 9, 300], batch_tokens=80)
        for ids, probabilities in zip(prompts, found, strict=True):
            expected = model(torch.tensor([ids])).logits[0, -1].softmax(-1)[[7, 9, 300]]
            assert probabilities == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize(("gigabytes", "tokens"), [(math.inf, 16384), (80, 16384), (24, 2560), (12, 1)])
def test_a_batch_on_a_gpu_is_as_large_as_its_memory_beside_the_weights(monkeypatch, gigabytes: float, tokens: int):
    """7B in bfloat16: a token's keys and values are 32 x 2 x 4096 numbers, half a MiB; of weights there are 14 GiB."""
    with torch.device("meta"):
        config = OlmoConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=64)
        model = OlmoForCausalLM(config).to(torch.bfloat16)
    assert inference.token_bytes(model) == 2**19
    monkeypatch.setattr(inference, "spare_memory", lambda _model: (gigabytes - 14) * 2**30)
    assert inference.usual_batch(model) == tokens


def test_batches_hold_every_row_once_within_the_limit():
    sizes = [3, 9, 1, 4, 4, 20, 2, 4]
    plan = list(batches(sizes, 12))
    assert sorted(i for batch in plan for i in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or max(sizes[i] for i in batch) * len(batch) <= 12 for batch in plan)


def test_a_prompt_never_ends_in_an_appended_end_of_text(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    plain = encode(tokenizer, "the city")
    from tokenizers.processors import TemplateProcessing

    eos = ("<|endoftext|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[eos])
    assert tokenizer("the city").input_ids == [*plain, tokenizer.eos_token_id]
    assert encode(tokenizer, "the city") == plain
    assert encode(tokenizer, "the city<|endoftext|>") == [*plain, tokenizer.eos_token_id]
    assert encode(tokenizer, "<|endoftext|>") == [tokenizer.eos_token_id]
    assert encode(tokenizer, "") == []


def test_a_folder_without_safetensors_is_refused(checkpoint: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="no \\*.safetensors"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_a_weight_is_refused(checkpoint: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(BadInput, match="1 weights missing .* model.layers.3.mlp.up_proj.weight"):
        load_model(tmp_path)
