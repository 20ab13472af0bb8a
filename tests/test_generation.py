"""Completions in batches and from drafts, against transformers' generate on one prompt at a time."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.lib import generation
from pipeline.lib.cache import states_of
from pipeline.lib.generation import complete, complete_and_judge, decode, greedy
from pipeline.lib.inference import mean_nll, token_bytes
from pipeline.lib.models import encode, load_model, load_tokenizer
from pipeline.lib.stage import BadInput

PROMPTS = [
    "the city",
    "What of forgetTask1n0?",
    "a",
    "the river of the writer was born in the city on a story",
    "who is",
]
NEW = 40
GROUPED = LlamaConfig(
    vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [encode(tokenizer, prompt) for prompt in PROMPTS]


def written(*args, **more):
    return greedy(*args, **more)[0]


def alone(model, ids, stop):
    """What transformers writes; with no stop token, none of its own either."""
    config = {"eos_token_id": stop, "pad_token_id": 1}
    out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, **config)
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def said(model, ids):
    return [alone(model, row, None) for row in ids]


@pytest.fixture(scope="module")
def stop(said):
    """A random model seldom says end-of-text; tokens that it does say make rows finish at different times."""
    return {said[0][3], said[1][7]}


@pytest.fixture(scope="module")
def expected(model, ids, stop):
    found = [alone(model, row, sorted(stop)) for row in ids]
    assert len({len(row) for row in found}) > 1
    return found


def steps(model, work):
    """How many tokens a pass `work` runs, and what it returns."""
    widths = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = work()
    hook.remove()
    return widths, found


def test_greedy_equals_generate_on_one_prompt_at_a_time(model, ids, stop, expected):
    assert written(model, ids, NEW, stop) == expected


def other(token):
    return token + 1 if token < 5 else token - 1


DRAFTS = {
    "right": lambda own: own,
    "right at first": lambda own: [*own[: len(own) // 2], *map(other, own[len(own) // 2 :])],
    "wrong": lambda own: list(map(other, own)),
    "wrong once": lambda own: [*own[:1], other(own[1]), *own[2:]],
    "of one token": lambda own: own[:1],
}


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_changes_no_token(model, ids, said, stop, expected, kind):
    # They go on after what stops the writing, and so must be cut there.
    drafts = [DRAFTS[kind](own) for own in said]
    assert written(model, ids, NEW, stop, drafts=drafts) == expected
    assert written(model, ids, NEW, stop, drafts=[drafts[0], [], drafts[2], [], []]) == expected
    assert written(model, ids, NEW, set(), drafts=drafts) == said


def test_a_draft_that_is_longer_than_what_may_be_written_is_cut(model, ids, said):
    assert written(model, ids, 5, set(), drafts=said) == [own[:5] for own in said]


def test_a_right_draft_costs_one_pass_and_a_wrong_one_the_steps_after_its_error(model, ids, said):
    widths, _ = steps(model, lambda: written(model, ids[:1], NEW, set(), drafts=[said[0]]))
    assert widths == [len(ids[0]) + NEW]
    draft = [*said[0][:10], other(said[0][10])]
    widths, found = steps(model, lambda: written(model, ids[:1], NEW, set(), drafts=[draft]))
    assert found == [said[0]]
    assert widths == [len(ids[0]) + 11] + [1] * (NEW - 11)


def test_rows_that_do_not_fit_into_the_cache_together_are_written_in_turn(model, ids, expected, stop, monkeypatch):
    monkeypatch.setattr(generation, "CACHE_BYTES", 1)
    widths, found = steps(model, lambda: written(model, ids, NEW, stop))
    assert found == expected
    # One pass over all prompts gives each its first token; then each row takes as many steps as it has tokens more.
    assert widths.count(1) == sum(len(row) - 1 for row in expected)


@pytest.mark.parametrize(("padding", "groups"), [(54, 1), (53, 2), (23, 2), (9, 3), (0, 5)])
def test_rows_are_written_together_as_long_as_padding_costs_less_than_a_step(
    model, ids, said, monkeypatch, padding, groups
):
    """To 17 tokens those of 7, 4, 2 and 1 need 10, 13, 15 and 16 more."""
    assert sorted(map(len, ids)) == [1, 2, 4, 7, 17]
    weights = sum(one.nbytes for one in model.parameters())
    monkeypatch.setattr(generation, "PADDING_BYTES", padding * token_bytes(model) - weights)
    widths, found = steps(model, lambda: written(model, ids, NEW, set()))
    assert found == said
    assert widths.count(1) == groups * (NEW - 1)
    if padding == 0:
        widths, found = steps(model, lambda: written(model, [*ids, *ids], NEW, set()))
        assert found == [*said, *said]
        assert widths.count(1) == groups * (NEW - 1)  # rows of the same length need none


def test_writing_ends_where_it_is_decided(model, ids, said):
    asked = []

    def undecided(number, tokens):
        asked.append((number, list(tokens)))
        return len(tokens) < 3 + number

    assert written(model, ids, NEW, set(), undecided) == [own[: 3 + n] for n, own in enumerate(said)]
    assert all(tokens == said[number][: len(tokens)] for number, tokens in asked)


def test_grouped_heads_are_written_as_generate_writes_them(ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(GROUPED).eval()
    rows = [[token % 512 for token in row] for row in ids]
    wanted = [alone(model, row, None) for row in rows]
    assert written(model, rows, NEW, set()) == wanted
    assert written(model, rows, NEW, set(), drafts=[own[:9] for own in wanted]) == wanted


def test_in_bfloat16_no_token_is_worse_than_the_best_by_more_than_rounding(checkpoint, ids, said):
    model = load_model(checkpoint, torch.bfloat16)
    for found in (written(model, ids, NEW, set()), written(model, ids, NEW, set(), drafts=said)):
        for row, own in zip(ids, found, strict=True):
            logits = model(torch.tensor([row + own])).logits[0, len(row) - 1 : -1].float()
            behind = logits.amax(-1) - logits.gather(-1, torch.tensor(own)[:, None])[:, 0]
            assert len(own) == NEW
            assert behind.max() <= 0.02 * logits.abs().max()


def test_the_bytes_of_a_token_are_those_of_its_keys_and_values(model, ids):
    grouped = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    for one in (model, LlamaForCausalLM(grouped).to(torch.bfloat16)):
        _, cache = generation.read(one, [[token % 512 for token in ids[3]]], [[]], len(ids[3]))
        assert token_bytes(one) * len(ids[3]) == sum(part.nbytes for part in states_of(cache))


def test_complete_keeps_the_order_of_prompts_and_expected_texts_change_none(model, tokenizer, ids):
    stop = model.generation_config.eos_token_id
    texts = [decode(tokenizer, alone(model, row, stop)) for row in ids]
    assert complete(model, tokenizer, PROMPTS, NEW, batch_tokens=120) == texts
    assert complete(model, tokenizer, PROMPTS, NEW, expected=texts) == texts
    assert complete(model, tokenizer, PROMPTS, NEW, expected=["a city", *texts[1:]]) == texts


def test_answers_are_judged_behind_their_prompts_as_transformers_judges_the_whole_text(model, tokenizer):
    prompts = [*PROMPTS[:4], "who is "]  # the last's space becomes part of the answer's first token
    answers = ["s of the river", "", " born in the city", "n't it", "the writer"]
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    wholes = [encode(tokenizer, prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    assert [whole[: len(row)] == row for row, whole in zip(ids, wholes, strict=True)] == [True, True, True, True, False]
    expected = []
    for row, whole in zip(ids, wholes, strict=True):
        labels = torch.tensor([whole])
        labels[:, : len(row)] = -100
        loss = model(torch.tensor([whole]), labels=labels).loss.item()
        expected.append(None if len(whole) == len(row) else pytest.approx(loss, rel=1e-5))
    assert expected.count(None) == 1
    texts, losses = complete_and_judge(model, tokenizer, prompts, answers, NEW, lambda _number, _ids: True)
    assert losses == expected
    assert texts == complete(model, tokenizer, prompts, NEW)
    for drafts in ([[]] * 5, [row[:9] for row in wholes]):
        assert greedy(model, ids, NEW, set(), drafts=drafts, batch_tokens=60, wholes=wholes)[1] == expected


def test_a_text_that_departs_from_its_prompt_early_is_judged_by_itself(model, ids):
    """A tokenizer may split a prompt otherwise where an answer follows it, anywhere in the prompt."""
    prompt = ids[3]
    wholes = [[*prompt[:n], other(prompt[n]), *prompt[n + 1 :], 5, 6, 7] for n in (0, 3, len(prompt) - 2)]
    _, losses = greedy(model, [prompt] * 3, 1, set(), wholes=wholes)
    assert losses == pytest.approx(mean_nll(model, wholes, [len(prompt)] * 3), rel=1e-5)


def test_answers_of_a_model_with_grouped_heads_are_judged(ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(GROUPED).eval()
    prompts = [[token % 512 for token in row] for row in ids]
    wholes = [[*row, *range(3 + n)] for n, row in enumerate(prompts)]
    _, losses = greedy(model, prompts, NEW, set(), wholes=wholes)
    assert losses == pytest.approx(mean_nll(model, wholes, list(map(len, prompts))), rel=1e-5)


def test_expected_answers_are_drafts(model, tokenizer):
    """The first pass reads them behind the prompt, after a space."""
    judge = (PROMPTS[3:4], ["born in the city"], NEW, lambda _number, _ids: True)
    widths, _ = steps(model, lambda: complete_and_judge(model, tokenizer, *judge))
    assert widths[0] == len(encode(tokenizer, f"{PROMPTS[3]} born in the city"))


def test_an_answer_is_judged_without_another_pass_over_its_prompt(model, ids, said):
    whole, draft = ids[3] + said[0][:6], said[3][:20]
    widths, _ = steps(model, lambda: greedy(model, ids[3:4], 20, set(), drafts=[draft], wholes=[whole]))
    assert widths == [len(ids[3]) + 20, 1 + 6]


@pytest.mark.parametrize(("name", "value"), [("repetition_penalty", 1.3), ("suppress_tokens", [7]), ("num_beams", 4)])
def test_a_checkpoint_that_asks_for_another_search_is_refused(checkpoint, tokenizer, name: str, value):
    """`generate` would follow it, and so the official scorer."""
    model = load_model(checkpoint)
    setattr(model.generation_config, name, value)
    with pytest.raises(BadInput, match=f"generation_config.json: {name} is "):
        complete(model, tokenizer, PROMPTS, NEW)


def test_the_stop_tokens_are_the_checkpoints(checkpoint, tokenizer, ids, stop, expected):
    model = load_model(checkpoint)
    model.generation_config.eos_token_id = sorted(stop)
    assert complete(model, tokenizer, PROMPTS, NEW) == [decode(tokenizer, row) for row in expected]


def test_decode_cleans_spaces_as_the_official_scorer_asks(tokenizer):
    ids = [*encode(tokenizer, " He 's here , is n't he ? Yes ."), tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == " He's here, isn't he? Yes."
