"""Looks inside a model and attacks on it: confidence, sensitivity to noise, gradients, GCG, relearning.

A text is `(tokens, given)`: the first `given` tokens are the prompt, the rest is the answer. Any decoder will do whose
base model has `layers`, each with `mlp.down_proj`, as Hugging Face's OLMo and LLaMA have.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from pipeline.lib.generation import greedy
from pipeline.lib.inference import Tokens, batches
from pipeline.lib.models import Model

Answered = tuple[Tokens, int]
BATCH_TOKENS = 8192


@contextmanager
def changed(model: Model, matrices: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the block, the model has these `down_proj` matrices, by decoder block; then its own again."""
    weights = {index: model.base_model.layers[index].mlp.down_proj.weight for index in matrices}
    kept = {index: weight.detach().clone() for index, weight in weights.items()}
    with torch.no_grad():
        for index, weight in weights.items():
            weight.copy_(matrices[index])
    try:
        yield
    finally:
        with torch.no_grad():
            for index, weight in weights.items():
                weight.copy_(kept[index])


# ---- what the model says ----


def answer_logits(model: Model, hidden: Tensor, text: Answered) -> tuple[Tensor, Tensor]:
    """Return the logits (answer, vocabulary) that predict the answer's tokens, in float32, and those tokens."""
    tokens, given = text
    first = max(1, given)
    targets = torch.tensor(tokens[first:], device=hidden.device)
    return model.get_output_embeddings()(hidden[first - 1 : len(tokens) - 1]).float(), targets


@torch.inference_mode()
def answer_accuracy(model: Model, texts: Sequence[Answered]) -> list[float]:
    """Return for each text the share of the answer's tokens that are the likeliest, given all tokens before them."""
    shares = [0.0] * len(texts)
    for rows in batches([len(tokens) for tokens, _ in texts], BATCH_TOKENS):
        hidden = model.base_model(input_ids=_pad(model, [texts[row][0] for row in rows])).last_hidden_state
        for row, states in zip(rows, hidden, strict=True):
            logits, targets = answer_logits(model, states, texts[row])
            shares[row] = (logits.argmax(-1) == targets).float().mean().item()
    return shares


@torch.inference_mode()
def max_logits(model: Model, prompts: Sequence[Tokens], stop: set[int], count: int = 16) -> list[list[float]]:
    """Return for each prompt MaxLogit, the largest logit, at each of up to `count` greedily written tokens.

    Source: Dang et al., arXiv 2408.06223, who read a token's confidence from it.
    """
    written, _ = greedy(model, prompts, count, stop)
    found: list[list[float]] = [[] for _ in prompts]
    for rows in batches([len(prompt) + count for prompt in prompts], BATCH_TOKENS):
        hidden = model.base_model(input_ids=_pad(model, [prompts[row] + written[row] for row in rows]))
        for row, states in zip(rows, hidden.last_hidden_state, strict=True):
            logits, _ = answer_logits(model, states, (prompts[row] + written[row], len(prompts[row])))
            found[row] = logits.max(-1).values.tolist()
    return found


@torch.inference_mode()
def block_outputs(model: Model, texts: Sequence[Tokens], block: int) -> list[Tensor]:
    """Return h_l, the output of a decoder block, for each text but its first token: (tokens - 1, hidden)."""
    outputs: list[Tensor] = [torch.empty(0)] * len(texts)
    seen: list[Tensor] = []
    hook = model.base_model.layers[block].register_forward_hook(lambda _module, _inputs, out: seen.append(_first(out)))
    try:
        for rows in batches([len(tokens) for tokens in texts], BATCH_TOKENS):
            model.base_model(input_ids=_pad(model, [texts[row] for row in rows]))
            for row, states in zip(rows, seen.pop(), strict=True):
                outputs[row] = states[1 : len(texts[row])].float().clone()
    finally:
        hook.remove()
    return outputs


# ---- noise ----


@torch.inference_mode()
def noise_sensitivity(
    model: Model, texts: Sequence[Tokens], block: int, size: float, relative: bool, generator: torch.Generator
) -> float:
    """Return ||g(h + xi) - g(h)||^2 / ||g(h)||^2, averaged over the tokens of each text but its first, then over texts.

    g is the rest of the network, from the output h of a block to the logits. xi is Gaussian; the root mean square of
    its norm is `size`, times the token's ||h|| if `relative`. Source: Dang et al., arXiv 2408.06223.
    """

    def add_noise(_module: object, _inputs: object, output: "Tensor | tuple[Tensor, ...]") -> object:
        h = _first(output)
        xi = torch.randn(h.shape, generator=generator).to(h) * size / math.sqrt(h.shape[-1])
        if relative:
            xi = xi * h.norm(dim=-1, keepdim=True)
        xi[:, 0] = 0.0  # an outlier in every decoder, and in no measurement here
        return (h + xi, *output[1:]) if isinstance(output, tuple) else h + xi

    shares = [0.0] * len(texts)
    for rows in batches([len(tokens) for tokens in texts], BATCH_TOKENS // 4):
        ids = _pad(model, [texts[row] for row in rows])
        clean = model(input_ids=ids, use_cache=False).logits.float()
        hook = model.base_model.layers[block].register_forward_hook(add_noise)
        try:
            noisy = model(input_ids=ids, use_cache=False).logits.float()
        finally:
            hook.remove()
        ratio = (noisy - clean).square().sum(-1) / clean.square().sum(-1)
        for row, values in zip(rows, ratio, strict=True):
            shares[row] = values[1 : len(texts[row])].mean().item()
    return sum(shares) / len(shares)


# ---- gradients, and GCG ----


def input_gradient(model: Model, text: Answered) -> Tensor:
    """Return the gradient of the answer's mean loss with respect to the prompt's one-hot tokens, (given, vocabulary).

    A one-hot row times the embedding table is the token's embedding, so it is the embedding's gradient times the table.
    """
    tokens, given = text
    table = model.get_input_embeddings().weight.detach()
    embedded = table[torch.tensor(tokens, device=table.device)].requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0]
    loss = cross_entropy(*answer_logits(model, hidden, text))
    (gradient,) = torch.autograd.grad(loss, embedded)
    by_token: Tensor = gradient[:given].float() @ table.float().T
    return by_token


@dataclass(frozen=True)
class Attack:
    """What GCG found: the suffix with the lowest loss, that loss (nats a token), all losses from the start's on."""

    suffix: Tokens
    loss: float
    losses: list[float]
    said: bool  # whether each of the answer's tokens became the likeliest


@dataclass(frozen=True)
class Search:
    """How GCG searches: `width` candidates a step, each one swap of a token for one of the `top` by gradient."""

    steps: int
    width: int
    top: int


def gcg(
    model: Model,
    prompt: Tokens,
    answer: Tokens,
    suffix: Tokens,
    search: Search,
    allowed: Tensor,
    generator: torch.Generator,
    keeps: Callable[[Tokens], bool] = lambda _suffix: True,
) -> Attack:
    """Look for a suffix of the prompt after which the model says the answer; stop when it does.

    Greedy coordinate gradient (Zou et al., arXiv 2307.15043, algorithm 1). `suffix` is where it starts, `allowed` are
    the tokens that may enter it, (vocabulary,) true or false; a candidate for which `keeps` is false is not tried: one
    that another tokenization would replace could never be typed.
    """
    start, hit = answer_losses(model, [prompt + suffix], answer)
    best, lowest, said = suffix, start.item(), bool(hit)
    losses = [lowest]
    for _ in range(0 if said else search.steps):
        gradient = input_gradient(model, (prompt + suffix + answer, len(prompt + suffix)))[len(prompt) :]
        gradient = gradient.masked_fill(~allowed.to(gradient.device), math.inf)
        likely = (-gradient).topk(search.top, dim=1).indices.cpu()
        candidates = [tried for tried in _swaps(suffix, likely, search.width, generator) if keeps(tried)]
        if not candidates:
            continue
        tried_losses, hits = answer_losses(model, [prompt + tried for tried in candidates], answer)
        place = int(tried_losses.argmin())
        suffix = candidates[place]
        losses.append(tried_losses[place].item())
        if losses[-1] < lowest:
            best, lowest, said = suffix, losses[-1], bool(hits[place])
        if said:
            break
    return Attack(best, lowest, losses, said)


def _swaps(suffix: Tokens, likely: Tensor, width: int, generator: torch.Generator) -> Iterator[Tokens]:
    """Yield `width` copies of the suffix with one token, at a random place, replaced by a random one of `likely`."""
    places = torch.randint(len(suffix), (width,), generator=generator).tolist()
    ranks = torch.randint(likely.shape[1], (width,), generator=generator).tolist()
    for place, rank in zip(places, ranks, strict=True):
        yield [*suffix[:place], int(likely[place, rank]), *suffix[place + 1 :]]


@torch.inference_mode()
def answer_losses(model: Model, prompts: Sequence[Tokens], answer: Tokens) -> tuple[Tensor, Tensor]:
    """Return the answer's mean loss after each prompt (of one length), and whether all of its tokens are likeliest."""
    ids = torch.tensor([prompt + answer for prompt in prompts], device=model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -len(answer) - 1 : -1]
    logits, targets = model.get_output_embeddings()(states).float(), ids[:, -len(answer) :]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    return losses, (logits.argmax(-1) == targets).all(1)


# ---- relearning ----


def fine_tune(
    model: Model, texts: Sequence[Answered], rate: float, epochs: int, known: float = 2.0, batch_size: int = 8
) -> int:
    """Train all weights on the texts' answers with AdamW, in place; return the epochs that it took.

    It ends after `epochs`, or as soon as the mean `answer_accuracy` on the texts reaches `known`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for epoch in range(1, epochs + 1):
        for first in range(0, len(texts), batch_size):
            batch = texts[first : first + batch_size]
            hidden = model.base_model(input_ids=_pad(model, [tokens for tokens, _ in batch]), use_cache=False)
            said = [
                answer_logits(model, states, text) for states, text in zip(hidden.last_hidden_state, batch, strict=True)
            ]
            cross_entropy(torch.cat([logits for logits, _ in said]), torch.cat([ids for _, ids in said])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        accuracies = answer_accuracy(model, texts)
        if sum(accuracies) / len(accuracies) >= known:
            return epoch
    return epochs


def _first(output: "Tensor | tuple[Tensor, ...]") -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # a block returns a tuple in some architectures


def _pad(model: Model, rows: Sequence[Tokens]) -> Tensor:
    """Return ids (rows, longest), padded on the right, where causal attention never looks."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)
