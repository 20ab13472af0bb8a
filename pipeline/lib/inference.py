"""Losses and next-token probabilities, in batches: rows are sorted by length and padded on the right."""

from collections.abc import Iterator, Sequence
from math import inf

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache
from transformers.cache_utils import Cache

from pipeline.lib.cache import rooms, show, states_of
from pipeline.lib.models import Model

Tokens = list[int]

BATCH_TOKENS = 2048  # small enough for a core's cache, and rows of a batch are alike: less padding
ACCELERATOR_BATCH_TOKENS = 16384


def usual_batch(model: Model) -> int:
    """Return how many padded tokens go through the model at once, unless said otherwise.

    On a GPU their keys and values may take an eighth of the memory that the weights leave: `greedy` takes room for up
    to twice as many, where long prompts with short answers share a batch with short ones with long answers.
    """
    if model.device.type == "cpu":
        return BATCH_TOKENS
    return max(1, int(min(ACCELERATOR_BATCH_TOKENS, spare_memory(model) / 8 / token_bytes(model))))


def spare_memory(model: Model) -> float:
    """Return the bytes of a GPU's memory beside the weights. All of them: what else runs there must decide no batch."""
    if model.device.type != "cuda":
        return inf
    weights = sum(int(one.nbytes) for one in model.parameters())
    return torch.cuda.mem_get_info(model.device)[1] - weights


def token_bytes(model: Model) -> int:
    """Return the bytes of a token's keys and values in all blocks."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize)


def batches(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield index lists, longest first, each of at most `limit` padded tokens or of one row."""
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and sizes[batch[0]] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def mean_nll(
    model: Model, sequences: Sequence[Tokens], masked: Sequence[int] | None = None, batch_tokens: int | None = None
) -> list[float | None]:
    """Return the mean negative log likelihood (nats a token) of each sequence, None where nothing is predicted.

    The first token and the first `masked[i]` tokens are given, not predicted. Rows are padded on the right: under
    causal attention no real token sees the padding. Only predicted positions go through the head, and the loss is
    taken in float32, as transformers does.
    """
    first = [max(1, n) for n in (masked or [0] * len(sequences))]
    losses: list[float | None] = [None] * len(sequences)
    for rows in batches([len(ids) for ids in sequences], batch_tokens or usual_batch(model)):
        if not sequences[rows[0]]:
            continue  # the longest is empty, and so are all
        ids = pad_right([sequences[i] for i in rows], model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for row, states in zip(rows, hidden, strict=True):
            losses[row] = _mean_loss(model, states, sequences[row], first[row])
    return losses


@torch.inference_mode()
def continued_nll(
    model: Model, cache: Cache, kept: Sequence[int], sequences: Sequence[Tokens], masked: Sequence[int]
) -> list[float | None]:
    """Return what `mean_nll` does, of sequences whose first `kept[i]` tokens the model has seen: row i of the cache.

    They are at most `masked[i] - 1`, for the last given token predicts the first other. `cache` is of rooms, and what
    it holds behind those tokens is lost.
    """
    rests = [ids[count:] for ids, count in zip(sequences, kept, strict=True)]
    start, width = max(kept), max(map(len, rests))
    if not width:
        return [None] * len(sequences)
    show(cache, start)
    seen = torch.arange(start, device=model.device) < torch.tensor(kept, device=model.device)[:, None]
    mask = _behind(start, width, model).repeat(len(sequences), 1, 1, 1)
    mask[..., :start].masked_fill_(~seen[:, None, None], torch.finfo(model.dtype).min)
    hidden = model.base_model(
        input_ids=pad_right(rests, model.device),
        attention_mask=mask,
        position_ids=torch.tensor([range(count, count + width) for count in kept], device=model.device),
        past_key_values=cache,
    ).last_hidden_state
    rows = zip(hidden, sequences, masked, kept, strict=True)
    return [_mean_loss(model, states, ids, max(1, given), count) for states, ids, given, count in rows]


def _mean_loss(model: Model, states: torch.Tensor, ids: Tokens, first: int, kept: int = 0) -> float | None:
    """Return the mean loss of `ids` from the `first` on; `states` (tokens, hidden) begin with that of token `kept`."""
    targets = torch.tensor(ids[first:], device=model.device)
    if not len(targets):
        return None
    logits = model.get_output_embeddings()(states[first - 1 - kept : len(ids) - 1 - kept])
    return cross_entropy(logits.float(), targets).item()


@torch.inference_mode()
def next_token_probabilities(
    model: Model, prompts: Sequence[Tokens], candidates: Sequence[int], batch_tokens: int | None = None
) -> list[list[float]]:
    """Return the probability of each candidate as the next token of each prompt.

    What all prompts begin with is computed once; its keys and values are in place before each batch, behind which that
    writes its own. Only the last position of a prompt goes through the head.
    """
    shared = _common_prefix(prompts)
    rests = [ids[shared:] for ids in prompts]
    plan = list(batches([len(ids) for ids in prompts], batch_tokens or usual_batch(model)))
    prefix = _prefix(model, prompts[0][:shared], max(map(len, plan)), max(map(len, rests))) if shared else []
    found: list[list[float]] = [[] for _ in prompts]
    for rows in plan:
        ids = pad_right([rests[i] for i in rows], model.device)
        cache = rooms([part[: len(rows)] for part in prefix], shared) if shared else None
        hidden = model.base_model(
            input_ids=ids,
            attention_mask=_behind(shared, ids.shape[1], model) if shared else None,
            past_key_values=cache,
        ).last_hidden_state
        last = torch.tensor([len(rests[i]) - 1 for i in rows], device=model.device)
        logits = model.get_output_embeddings()(hidden[torch.arange(len(rows), device=model.device), last])
        for row, probabilities in zip(rows, logits.float().softmax(-1)[:, list(candidates)].tolist(), strict=True):
            found[row] = probabilities
    return found


def _prefix(model: Model, ids: Tokens, rows: int, more: int) -> list[torch.Tensor]:
    """Return the keys and values of `ids`, as `states_of`, for `rows` rows, with room for `more` positions."""
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache)
    states = []
    for part in states_of(cache):
        room = part.new_zeros(rows, part.shape[1], len(ids) + more, part.shape[3])
        room[:, :, : len(ids)] = part
        states.append(room)
    return states


def _behind(shared: int, width: int, model: Model) -> torch.Tensor:
    """Return the attention mask of `width` positions behind `shared` ones, (1, 1, width, shared + width).

    The same for all rows, as they are padded on the right. Made here, once and of the model's type: of a mask of rows
    transformers makes one of truth values, which each block converts anew (a fifth of the time on a small model).
    """
    mask = torch.full((width, shared + width), torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device)
    return mask.triu(shared + 1)[None, None]


def _common_prefix(prompts: Sequence[Tokens]) -> int:
    """Return how many first tokens all prompts share, at least one token being left to each."""
    shortest = min(len(ids) for ids in prompts)
    differs = (n for n in range(shortest - 1) if any(ids[n] != prompts[0][n] for ids in prompts))
    return next(differs, shortest - 1)


def pad_right(rows: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    """Return ids (rows, longest)."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
