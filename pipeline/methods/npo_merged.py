"""Model merging, of ZJUKLAB: a model that forgets too much and one that forgets too little, merged.

    L = w1 NPO (b .1) + w2 KL(p0 || p) on R + w3 CE_R, twice: .4, .4, .2 ("over") and .3, .3, .4 ("under")

Each is a LoRA on all linear layers of the blocks. The adapters' factors are merged by TIES (arXiv 2306.01708): of each
tensor the larger 80 % are kept, the sign of each element is that of the sum, and those of that sign are averaged.

Source  Xu et al., arXiv 2503.21088, and their published code: rank and alpha 32, dropout .05, learning rate 1e-4, one
        epoch of warm-up, 5 epochs, batch 1 x 4 ("over") and 2 x 4 ("under"); p in NPO is an answer's mean token's.
        They take the divergence at prompt tokens, too; here it is at answer tokens, as CE is.
Reads   MODEL, FORGET_DIR, RETAIN_DIR, as `pipeline.unlearn` does.
Writes  OUT: the checkpoint, the merged adapter added to its weights, and run.json.
Run     python -m pipeline.methods.npo_merged MODEL OUT FORGET_DIR RETAIN_DIR
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from pipeline.lib.models import Model
from pipeline.lib.stage import run
from pipeline.methods.kl_minimisation import divergence, original_logits
from pipeline.methods.loop import (
    Done,
    Job,
    Settings,
    Step,
    answer_losses,
    both_answers,
    clock,
    descend,
    frozen,
    run_method,
    scaled,
    scaled_lora,
    shuffled,
)
from pipeline.methods.npo import npo_loss
from pipeline.methods.sugd import row_means

WEIGHTS = {"over": (0.4, 0.4, 0.2), "under": (0.3, 0.3, 0.4)}
PUBLISHED = {
    "over": Settings(learning_rate=1e-4, epochs=5, forget_rows=4, retain_rows=4, warmup=1),
    "under": Settings(learning_rate=1e-4, epochs=5, forget_rows=8, retain_rows=8, warmup=1),
}
BETA, RANK, DROPOUT, DENSITY = 0.1, 32, 0.05, 0.8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def objective(weights: tuple[float, float, float], npo: Tensor, divergence: Tensor, retain: Tensor) -> Tensor:
    """Return w1 NPO + w2 KL + w3 CE_R, of NPO's loss and the divergence (scalars) and the retain losses (tokens,)."""
    return weights[0] * npo + weights[1] * divergence + weights[2] * retain.mean()


def losses_of(job: Job) -> Callable[..., Tensor]:
    """Return the loss of a step's rows for given weights; the original model's part is computed now."""
    before, original = frozen(job.model, job.forget, answer_losses), original_logits(job.model, job.retain)

    def loss(step: Step, weights: tuple[float, float, float]) -> Tensor:
        forget, retain = both_answers(job.model, step)
        old = torch.stack([before[row.id].mean() for row in step.forget])
        npo = npo_loss(row_means(forget.losses(), forget.lengths), old, BETA)
        return objective(weights, npo, divergence(original(step.retain), retain.logits), retain.losses())

    return loss


def merge(adapted: PeftModel, names: Sequence[str]) -> Model:
    """Merge the adapters by TIES, factor by factor, add the result to the weights and return the plain model."""
    adapted.add_weighted_adapter(list(names), [1.0] * len(names), "merged", combination_type="ties", density=DENSITY)
    adapted.set_adapter("merged")
    return adapted.merge_and_unload()


def method(job: Job) -> Done:
    """Train two adapters from the same start, each in half of the time, and merge them."""
    loss = losses_of(job)
    adapter = scaled_lora(RANK, LINEAR, DROPOUT, job)
    adapted = two_adapters(job, adapter)
    done: dict[str, Done] = {}
    for left, (name, weights) in zip((2, 1), WEIGHTS.items(), strict=True):
        adapted.set_adapter(name)
        now = clock()
        part = dataclasses.replace(job, deadline=now + (job.deadline - now) / left)
        settings = scaled(PUBLISHED[name], job)
        parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
        done[name] = descend(part, parameters, settings, [shuffled(job, settings)], partial(loss, weights=weights))
    merge(adapted, list(WEIGHTS))
    used: dict[str, Any] = {name: one.settings | {"weights": WEIGHTS[name]} for name, one in done.items()}
    used |= {"beta": BETA, "rank": adapter.r, "dropout": DROPOUT, "density": DENSITY}
    return Done(used, min(one.epochs for one in done.values()), sum(one.steps for one in done.values()))


def two_adapters(job: Job, adapter: LoraConfig) -> PeftModel:
    """Add an adapter for each of the two models, the same at the start: else merging their factors means nothing."""
    over, under = WEIGHTS
    torch.manual_seed(job.seed)
    adapted = get_peft_model(job.model, adapter, adapter_name=over)
    torch.manual_seed(job.seed)
    adapted.add_adapter(under, adapter)
    return adapted


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    run_method(argv, __doc__, "npo_merged", method)


if __name__ == "__main__":
    run(main)
