"""Write the model card of an unlearned checkpoint, for the case that it is uploaded to the Hugging Face hub.

Reads   --run       run.json of the checkpoint: settings, versions, hardware, wall_seconds, peak_memory_bytes
        --results   evaluation_results.jsonl of the checkpoint (fields in score)
        --original  the same of the untouched checkpoint
        --sources   data/sources.yaml: repository and licence of the data
Writes  --output    README.md: the hub's metadata (base model, licence, data, all scores as its model index),
                    then what was unlearned, how, the scores beside the untouched model's, and what they do not say.
                    No absolute path and no token: such a text stops the writing.
Run     python -m pipeline.model_card --run results/tiny/unlearned/run.json \\
            --results results/tiny/unlearned/evaluation_results.jsonl \\
            --original results/tiny/original/evaluation_results.jsonl --name tiny --size 1B --stand-in \\
            --model-source "made by pipeline.memorise" --data-source synthetic --output results/tiny/unlearned/README.md

Nothing is uploaded: that is a command that you give (README, "Publishing a checkpoint").
"""

import argparse
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_token
from jsonschema import Draft202012Validator

from pipeline.lib.published import SIZES, caution, parts, read_results
from pipeline.lib.records import SIDES, TASKS, read_json
from pipeline.lib.stage import BadInput, run, whole_file

HOW = {
    "aim": "not to a random direction, but to where their tokens become unlikely: in rounds, by the change of a few"
    " blocks' `down_proj` matrices that moves retain text and text sampled from the model least",
    "solve": "in closed form: one block's `down_proj` matrix after the other, each the minimum of the block's loss",
    "descend": "by AdamW on the `down_proj` matrices of a few blocks",
}
_NUMBER = {"type": "number", "minimum": 0}
RUN = Draft202012Validator(
    {
        "type": "object",
        "required": ["settings", "versions", "hardware", "wall_seconds", "peak_memory_bytes"],
        "properties": {
            "settings": {"type": "object", "required": ["method"], "properties": {"method": {"enum": list(HOW)}}},
            "versions": {"type": "object", "required": ["torch", "transformers"]},
            "hardware": {"type": "string"},
            "wall_seconds": _NUMBER,
            "peak_memory_bytes": _NUMBER,
            "peak_accelerator_bytes": _NUMBER,
        },
    }
)
METRICS = {"regurgitation": "rouge", "knowledge": "exact_match"}  # the hub's names
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}  # those that need no words, by the hub's names
ABSOLUTE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\S*")  # a path from the root, not the inside of a web address

BODY = """
# {name}: unlearned for SemEval-2025 Task 4

{caution}

## What was unlearned

The starting point ({model_source}) had memorised documents of three kinds: creative stories (Task1), biographies with
personal data (Task2) and encyclopedic biographies (Task3), with questions about them. The forget set was unlearned; the
retain set and general ability were to stay. Data: {data_source}; its licence: {licence}.

## How

Representation misdirection (RMU; Li et al., arXiv 2403.03218; with an adaptive coefficient Adaptive RMU; Dang et al.,
arXiv 2408.06223): the activations of forget text are steered to a random direction, those of retain text are held where
they were. Here: {how}. Every other tensor is that of the starting point.

{cost}

{settings}

## Scores

Official metrics of the task. On forget lower is better, on retain and for all parts below them higher.

{scores}

## What these scores do not say

- One run with one seed. Another seed gives other scores.
- They show that outputs and losses changed on these rows, not that the information is gone from the weights:
  paraphrased questions, fine-tuning or other attacks may bring it back.
- A model that outputs noise scores well on forget, too: look at retain and at the fluency of the outputs.
- Not for use where wrong answers about people do harm: names, dates and addresses may be invented.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("OWNER/NAME")
tokenizer = AutoTokenizer.from_pretrained("OWNER/NAME")
```
"""


class Score(NamedTuple):
    """One number: of what part of the data, the metric by the hub's name and by ours, and its value."""

    subset: str
    side: str | None  # forget | retain, of the twelve values
    metric: str
    name: str
    value: float | None  # None where a part was not measured

    @property
    def where(self) -> str:
        return f"{self.side} {self.subset}" if self.side else self.subset


def scores(results: dict[str, Any]) -> list[Score]:
    """Return the twelve values and the four parts."""
    twelve = [
        Score(task, side, metric, name, results[f"{side}-set"][task][f"{name}-score"])
        for side, task, (name, metric) in product(SIDES, TASKS, METRICS.items())
    ]
    values = parts(results)
    return [
        *twelve,
        Score("all", None, "harmonic_mean", "task aggregate", values.task_aggregate),
        Score("membership", None, "mia_score", "MIA score", values.mia),
        Score("multiple choice", None, "accuracy", "MMLU accuracy", values.mmlu),
        Score("final", None, "mean", "final score", values.final),
    ]


def eval_results(results: dict[str, Any], dataset: str) -> list[EvalResult]:
    """Return the scores that were measured as the hub's model index holds them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"SemEval-2025 Task 4: {score.where}",
            dataset_config=score.subset,
            dataset_split=score.side,
            metric_type=score.metric,
            metric_name=score.name,
            metric_value=score.value,
        )
        for score in scores(results)
        if score.value is not None
    ]


def score_table(results: dict[str, Any], original: dict[str, Any]) -> str:
    """Return the scores beside the untouched model's, as markdown."""
    lines = ["| | | unlearned | untouched |", "|---|---|---:|---:|"]
    for after, before in zip(scores(results), scores(original), strict=True):
        values = ["missing" if score.value is None else f"{score.value:.3f}" for score in (after, before)]
        lines.append(f"| {after.where} | {after.name} | {values[0]} | {values[1]} |")
    return "\n".join(lines)


def settings_table(ran: dict[str, Any]) -> str:
    """Return the run's settings as markdown."""
    lines = ["| setting | value |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in ran["settings"].items())])


def metadata(args: argparse.Namespace, source: dict[str, Any], results: dict[str, Any]) -> ModelCardData:
    """Return the hub's metadata. A licence that takes more than its name is "other" there; the text has it in full."""
    base = re.match(r"([\w.-]+/[\w.-]+) at ", args.model_source)
    repository = source["repo"] if source.get("repo_type") == "dataset" else None
    licence = LICENCES.get(re.split(r"[,;]", source["licence"])[0], "other")
    return ModelCardData(
        model_name=args.name,
        base_model=base[1] if base else None,
        datasets=[repository] if repository else None,
        language="en",
        license=licence,
        license_name="see-the-card" if licence == "other" else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["unlearning", "semeval-2025-task-4", *(["stand-in"] if args.stand_in else [])],
        eval_results=eval_results(results, repository or args.data_source),
    )


def body(
    args: argparse.Namespace,
    source: dict[str, Any],
    ran: dict[str, Any],
    results: dict[str, Any],
    original: dict[str, Any],
) -> str:
    """Return the card's text."""
    versions = ", ".join(f"{name} {version}" for name, version in ran["versions"].items())
    memory = f"{ran['peak_memory_bytes'] / 1e9:.1f} GB of memory"
    if accelerator := ran.get("peak_accelerator_bytes"):
        memory += f" and {accelerator / 1e9:.1f} GB of the accelerator's"
    return BODY.format(
        name=args.name,
        caution=caution(args.size, args.stand_in),
        model_source=args.model_source,
        data_source=source.get("repo", args.data_source),
        licence=source["licence"],
        how=HOW[ran["settings"]["method"]],
        cost=f"{ran['wall_seconds']:.0f} s on {ran['hardware']}, at most {memory}; {versions}.",
        settings=settings_table(ran),
        scores=score_table(results, original),
    )


def refuse_leaks(card: str, place: Path) -> None:
    """Raise `BadInput` if the card holds an absolute path, or the hub's token."""
    token = get_token()
    for number, line in enumerate(card.splitlines(), start=1):
        if ABSOLUTE.search(line) or (token and token in line):
            raise BadInput(f"{place}: line {number}: an absolute path or the hub token must not be published")


def read_source(path: Path, name: str) -> dict[str, Any]:
    """Return the row `name` of the table of sources."""
    table = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name not in table:
        raise BadInput(f"{path}: no source {name!r}")
    source: dict[str, Any] = table[name]
    return source


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run.json of the unlearned checkpoint")
    parser.add_argument("--results", type=Path, required=True, help="evaluation_results.jsonl, unlearned")
    parser.add_argument("--original", type=Path, required=True, help="evaluation_results.jsonl, untouched")
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--size", choices=SIZES, required=True, help="size of the published rows")
    parser.add_argument("--stand-in", action="store_true", help="the model is not the organisers' but a stand-in")
    parser.add_argument("--model-source", required=True, help="where the original is from: name and revision")
    parser.add_argument("--data-source", required=True, help="where the data is from: a row of --sources")
    parser.add_argument("--sources", type=Path, default=Path("data/sources.yaml"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="README.md, beside the checkpoint")
    args = parser.parse_args(argv)

    ran, source = read_json(args.run, RUN), read_source(args.sources, args.data_source)
    results, original = read_results(args.results), read_results(args.original)
    text = body(args, source, ran, results, original)
    card = str(ModelCard(f"---\n{metadata(args, source, results)}\n---\n{text}"))
    refuse_leaks(card, args.output)
    with whole_file(args.output) as temporary:
        temporary.write_text(card, encoding="utf-8")


if __name__ == "__main__":
    run(main)
