"""Greedy completions, in batches.

In float32 every row was written as it would be alone, whatever shares its batch, in all that was compared (`bench`). In
bfloat16, on an accelerator, near-ties are decided by rounding: recited texts stay the same, but of an unlearned model's
a batch changes about as many as another attention kernel does on one prompt at a time (30 and 33 of 64; LOG.md).

A draft is what a row may be expected to be. One pass over prompt and draft tells how much of it the model writes
itself, token by token: a row that recites its text costs one pass and no step. (Verification as in speculative
decoding, arXiv 2211.17192, here greedy, with a known text in the place of a small model's.) Where the loss of an answer
is asked for, too, it is taken behind the same prompt's keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache

from pipeline.lib.cache import empty_rooms, rooms, states_of
from pipeline.lib.inference import Tokens, batches, continued_nll, pad_right, spare_memory, usual_batch
from pipeline.lib.models import Model, Tokenizer, encode
from pipeline.lib.stage import BadInput

PADDING_BYTES = 32 << 20  # of padding, read in a step, take a CPU about as long as the calls that a step makes
CACHE_BYTES = 1 << 30  # keys and values of the rows written together; on a GPU, a quarter of what the weights leave
SEARCH: dict[
    str, object
] = {  # what changes a greedy search, where a generation_config.json has another value than this
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}


@dataclass(frozen=True)
class Row:
    """A row that goes on: its number, what is written so far, and what the model keeps of all but the last token."""

    number: int
    tokens: Tokens
    states: Tensor  # (2 blocks, heads, positions, head width), in the order of `states_of`

    @property
    def length(self) -> int:
        """The positions that the model has seen."""
        return self.states.shape[2]


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 256,
    batch_tokens: int | None = None,
    undecided: Callable[[int, Tokens], bool] = lambda _number, _ids: True,
    expected: Sequence[str] | None = None,
) -> list[str]:
    """Return what the model writes greedily after each prompt, decoded as the official scorer decodes it.

    Writing goes on only while `undecided` of a prompt's number and the tokens so far. `expected` texts change nothing
    but the time that it takes.
    """
    check_search(model)
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    drafts = None if expected is None else _drafts(tokenizer, prompts, encoded, expected)
    stop = _stop_tokens(model, tokenizer)
    written, _ = greedy(model, encoded, max_new_tokens, stop, undecided, drafts, batch_tokens)
    return [decode(tokenizer, ids) for ids in written]


def complete_and_judge(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    answers: Sequence[str],
    max_new_tokens: int,
    undecided: Callable[[int, Tokens], bool],
) -> tuple[list[str], list[float | None]]:
    """Return what `complete` does, and the mean loss (nats a token) of each answer right behind its prompt."""
    check_search(model)
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    wholes = [encode(tokenizer, prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    drafts, stop = _drafts(tokenizer, prompts, encoded, answers), _stop_tokens(model, tokenizer)
    written, losses = greedy(model, encoded, max_new_tokens, stop, undecided, drafts, wholes=wholes)
    return [decode(tokenizer, ids) for ids in written], losses


def _drafts(
    tokenizer: Tokenizer, prompts: Sequence[str], encoded: Sequence[Tokens], expected: Sequence[str]
) -> list[Tokens]:
    """Return the tokens that expected texts add to their prompts, none where the join is tokenized otherwise."""
    # A space between, as the rows are memorised (the official loss has none).
    wholes = [encode(tokenizer, f"{prompt} {text}") for prompt, text in zip(prompts, expected, strict=True)]
    return [whole[len(ids) :] if whole[: len(ids)] == ids else [] for ids, whole in zip(encoded, wholes, strict=True)]


def decode(tokenizer: Tokenizer, ids: Tokens) -> str:
    """Return the text of generated tokens as the official scorer gets it: special tokens dropped, spaces cleaned up.

    Trap: the organisers ask `decode` for the clean-up (" ." to ".", " 's" to "'s", ...). transformers 4 did it,
    transformers 5 ignores the wish for byte-pair tokenizers such as OLMo's, so it is asked for by name.
    """
    return str(tokenizer.clean_up_tokenization(tokenizer.decode(ids, skip_special_tokens=True)))


def check_search(model: Model) -> None:
    """Raise `BadInput` if a checkpoint asks for more than plain greedy search, as the official scorer would do it."""
    for name, plain in SEARCH.items():
        value = getattr(model.generation_config, name, None)
        if value not in (None, plain):
            raise BadInput(f"generation_config.json: {name} is {value!r}: only plain greedy search is done here")


def _stop_tokens(model: Model, tokenizer: Tokenizer) -> set[int]:
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = tokenizer.eos_token_id
    return set(stop) if isinstance(stop, list) else {stop}


@torch.inference_mode()
def greedy(
    model: Model,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    stop: set[int],
    undecided: Callable[[int, Tokens], bool] = lambda _number, _ids: True,
    drafts: Sequence[Tokens] | None = None,
    batch_tokens: int | None = None,
    wholes: Sequence[Tokens] | None = None,
) -> tuple[list[Tokens], list[float | None]]:
    """Return the greedy continuation of each prompt, up to `max_new_tokens` or with a stop token as its last.

    `undecided`, asked with a prompt's number and what is written, may end a row earlier. Beside it, the mean loss
    (nats) of each of `wholes` but for as many first tokens as its prompt has, as `mean_nll` has it.
    """
    given = [draft[:max_new_tokens] for draft in drafts or [[]] * len(prompts)]
    room, spared = spare_memory(model) / 4, inf
    if model.device.type == "cpu":
        # To write rows apart costs the steps' calls and another reading of the weights: padding may take as long.
        room, spared = CACHE_BYTES, PADDING_BYTES + sum(weight.nbytes for weight in model.parameters())
    found: list[Tokens] = [[] for _ in prompts]
    losses: list[float | None] = [None] * len(prompts)
    judged = wholes or [[]] * len(prompts)
    kept = [_shared(prompt, whole) for prompt, whole in zip(prompts, judged, strict=True)]
    group: list[Row] = []

    def ended(number: int, tokens: Tokens) -> bool:
        return tokens[-1] in stop or len(tokens) >= max_new_tokens or not undecided(number, tokens)

    def fits(row: Row) -> bool:
        """Say whether `row` may be written together with the group."""
        rows, position = [*group, row], row.states[:, :, 0].nbytes
        start = max(one.length for one in rows)
        end = start + max(max_new_tokens - len(one.tokens) for one in rows)
        padding = sum(start - one.length for one in rows)
        return not group or (len(rows) * end * position <= room and padding * position <= spared)

    def write() -> None:
        for row, tokens in zip(group, finish(model, group, max_new_tokens, ended), strict=True):
            found[row.number] = tokens
        progress.update(len(group))
        group.clear()

    with tqdm(total=len(prompts), desc="completions", mininterval=2) as progress:
        rows = zip(prompts, given, judged, strict=True)
        sizes = [max(len(prompt) + len(draft), len(whole)) for prompt, draft, whole in rows]
        for numbers in batches(sizes, batch_tokens or usual_batch(model)):
            size = max(
                sizes[numbers[0]], max(kept[n] for n in numbers) + max(len(judged[n]) - kept[n] for n in numbers)
            )
            begun, cache = read(model, [prompts[n] for n in numbers], [given[n] for n in numbers], size)
            states = states_of(cache)
            for place, (number, chosen) in enumerate(zip(numbers, begun, strict=True)):
                tokens = chosen[:max_new_tokens]
                last = next((n for n, token in enumerate(tokens) if token in stop), len(tokens) - 1)
                found[number] = tokens[: last + 1]
                if ended(number, found[number]):
                    progress.update()
                    continue
                seen = len(prompts[number]) + len(tokens) - 1
                row = Row(number, tokens, torch.stack([part[place, :, :seen] for part in states]))
                if not fits(row):
                    write()
                group.append(row)
            answers = ([kept[n] for n in numbers], [judged[n] for n in numbers], [len(prompts[n]) for n in numbers])
            for number, loss in zip(numbers, continued_nll(model, cache, *answers), strict=True):
                losses[number] = loss
        if group:
            write()
    return found, losses


def _shared(prompt: Tokens, whole: Tokens) -> int:
    """Return how many first tokens are the same; the prompt's last, which predicts the next, is not counted."""
    pairs = list(zip(prompt[:-1], whole, strict=False))
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))


def read(model: Model, prompts: Sequence[Tokens], drafts: Sequence[Tokens], size: int) -> tuple[list[Tokens], Cache]:
    """Return after one pass as much of each draft as the model writes itself, and the token that it writes next.

    Beside it the keys and values, in room for `size` positions. Rows are padded on the right, where causal attention
    never looks.
    """
    ids = pad_right([prompt + draft for prompt, draft in zip(prompts, drafts, strict=True)], model.device)
    cache = empty_rooms(model.config.num_hidden_layers, size)
    hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    begun = []
    for prompt, draft, states in zip(prompts, drafts, hidden, strict=True):
        logits = model.get_output_embeddings()(states[len(prompt) - 1 : len(prompt) + len(draft)])
        chosen: Tokens = logits.argmax(-1).tolist()
        same = next((n for n, token in enumerate(draft) if token != chosen[n]), len(draft))
        begun.append(chosen[: same + 1])
    return begun, cache


def finish(
    model: Model, group: Sequence[Row], max_new_tokens: int, ended: Callable[[int, Tokens], bool]
) -> list[Tokens]:
    """Return all that is written on each row, a token a step on all rows together.

    The rows' keys and values are moved flush right, so that each step writes at one place. Rows that have ended stay in
    the batch, unheard, until they are a quarter of it: taking them out copies the others.
    """
    written = [list(row.tokens) for row in group]
    start = max(row.length for row in group)
    end = start + max(max_new_tokens - len(row.tokens) for row in group)
    blocks, heads, _, width = group[0].states.shape
    states = [group[0].states.new_empty(len(group), heads, end, width) for _ in range(blocks)]
    hidden = states[0].new_zeros(len(group), 1, 1, end)
    for place, row in enumerate(group):
        hidden[place, :, :, : start - row.length] = torch.finfo(hidden.dtype).min
        for part, own in zip(states, row.states, strict=True):
            part[place, :, : start - row.length] = 0.0  # hidden, but memory may hold anything, and 0 times NaN is NaN
            part[place, :, start - row.length : start] = own
    padded = any(row.length < start for row in group)
    batch, over = list(range(len(group))), set[int]()
    cache = rooms(states, start)
    while True:
        filled = cache.get_seq_length()
        logits = model(
            input_ids=torch.tensor([[written[n][-1]] for n in batch], device=model.device),
            attention_mask=hidden[..., : filled + 1] if padded else None,
            position_ids=torch.tensor([[group[n].length + filled - start] for n in batch], device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        for n, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
            if n not in over:
                written[n].append(token)
                if ended(group[n].number, written[n]):
                    over.add(n)
        going = [place for place, n in enumerate(batch) if n not in over]
        if not going:
            return written
        if len(going) <= 0.75 * len(batch):
            batch, hidden = [batch[place] for place in going], hidden[going]
            for part in states:
                part[: len(going), :, : filled + 1] = part[going, :, : filled + 1]
            states = [part[: len(going)] for part in states]
            cache = rooms(states, filled + 1)
