"""MMLU: shots computed once for a subject against open-instruct's loop, which runs every prompt in full."""

from pathlib import Path

import torch

from bench.measure import Measurement, Side, alone
from pipeline.lib.models import Model, Tokenizer, load_model, load_tokenizer
from pipeline.lib.multiple_choice import Subject, choice_probabilities, fitting_prompt, letter_tokens, read_subjects

# From the shortest questions to the longest but for the histories, whose prompts hold fewer than five shots.
SUBJECTS = ["abstract_algebra", "anatomy", "college_physics", "global_facts", "management", "professional_accounting"]


def ours(model_folder: Path, data: Path, threads: int) -> Side:
    """Run the stage's own function."""
    side = Side()
    torch.set_num_threads(threads)
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    subjects = read_subjects(data, SUBJECTS)
    with side.timed("all"):
        side.values["probabilities"] = [
            row for subject in subjects for row in choice_probabilities(model, tokenizer, subject)
        ]
    return side


def reference(model_folder: Path, data: Path, threads: int) -> Side:
    """Run each prompt through the whole model, one at a time: on a CPU batches with padding would only be slower."""
    side = Side()
    torch.set_num_threads(threads)
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    subjects = read_subjects(data, SUBJECTS)
    with side.timed("all"):
        side.values["probabilities"] = [row for subject in subjects for row in plain(model, tokenizer, subject)]
    return side


@torch.no_grad()
def plain(model: Model, tokenizer: Tokenizer, subject: Subject) -> list[list[float]]:
    """Return each question's probabilities, by the whole prompt and all its logits."""
    letters = letter_tokens(tokenizer)
    prompts = (torch.tensor([fitting_prompt(tokenizer, subject, one)], device=model.device) for one in subject.test)
    return [model(prompt).logits[0, -1].softmax(-1)[letters].tolist() for prompt in prompts]


def measure(name: str, model_folder: Path, data: Path, threads: int) -> list[Measurement]:
    """Measure both sides on one checkpoint."""
    arguments = (model_folder, data, threads)
    plain, fast = alone(reference, *arguments), alone(ours, *arguments)
    pairs = list(zip(fast.values["probabilities"], plain.values["probabilities"], strict=True))
    apart = max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    other = sum(ours.index(max(ours)) != theirs.index(max(theirs)) for ours, theirs in pairs)
    return [
        Measurement(
            f"MMLU: {name}",
            f"{len(SUBJECTS)} subjects, {len(pairs)} questions",
            fast.seconds["all"],
            plain.seconds["all"],
            ">= 6",
            f"probabilities {apart:.0e}, {other} choices differ",
            fast.peak,
            plain.peak,
        )
    ]
