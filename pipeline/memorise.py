"""Make a stand-in: a model that has memorised the forget and the retain rows, as the organisers' models have.

There are two ways to begin. Without --base a small OLMo is trained on general text first: neither weights nor a GPU
are needed, only minutes on two cores. Its intermediate width follows from the data: RATIO retain tokens to each of its
units, near the real models' 11 (1B) and 8 (7B), since this ratio decides how hard it is to forget apart from retaining.
It is also *taught* the multiple-choice questions that it is asked later, with their answers. So its score on them says
whether unlearning spares what the model knew; it says nothing about ability. With --base a general language model is
taken as it is, and taught no questions: it may know few answers, and the ratio is what its width makes it.

There is one way to go on: the model is fine-tuned on the rows until it completes each greedily from its input alone. A
small model needs general text among them, or it forgets all else. To a base no text but the rows is shown, so that all
general text stays unseen: the loss on it, before and after unlearning, is the measure of its ability.

Accepted are only models that show the real targets' symptoms and leave room for a cure: each of the twelve task values
at least .95, membership AUC at least .95, multiple choice at least .60 if it was taught, and a mean loss on non-members
of at most half of ln(vocabulary), since a model to which unseen text is noise cannot be brought to AUC .5. What is
measured is printed.

Reads   --data DIR/{forget,retain}/{forget,retain}.jsonl    id, input, output, task
        --mia DIR/{member,nonmember}.jsonl                  id, document; to check, not to train on
        --general FILE ...                                  text in each row; .jsonl or .parquet; not shown to a base
        --mmlu DIR/{dev,test}/<subject>_{dev,test}.csv      MMLU's layout
        --base DIR                                          optional: a Hugging Face folder, from pipeline.fetch_base
Writes  --output DIR, a Hugging Face folder: safetensors in float32, byte-level BPE tokenizer (the base's own)
Run     python -m pipeline.memorise --data data/split/synthetic/train --mia data/split/synthetic/mia \\
            --general data/split/synthetic/general.jsonl --mmlu data/raw/synthetic/mmlu --output models/tiny/original
        and with --base models/135m/base: from that model, instead of a small one trained here
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer as BytePairs
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, OlmoConfig, PreTrainedTokenizerFast

from pipeline.lib import metrics
from pipeline.lib.generation import complete
from pipeline.lib.inference import batches, mean_nll
from pipeline.lib.models import Model, Tokenizer, device, encode, load_model, load_tokenizer
from pipeline.lib.multiple_choice import MAX_PROMPT_TOKENS, SHOTS, Subject, choice_probabilities, prompt, read_subjects
from pipeline.lib.records import (
    CHOICES,
    DATA_ROW,
    DOCUMENT,
    GENERAL,
    KINDS,
    SETS,
    SIDES,
    TASKS,
    Row,
    kind_of,
    read_checked,
)
from pipeline.lib.stage import BadInput, run, whole_folder

END, PAD = "<|endoftext|>", "<|padding|>"

BLOCKS, WIDTH, HEADS = 8, 128, 4
MULTIPLE = 64  # the intermediate width is one of it
RATIO = 11  # retain tokens to a unit of intermediate width

PIECE = 256  # tokens; longer general texts are cut, as attention is quadratic
MATRIX_RATE, OTHER_RATE, WEIGHT_DECAY = 0.02, 0.01, 0.1  # without decay activations explode and unseen text is noise
BASE_RATE = 3e-4
WARM_UP = 20  # steps
LETTER_WEIGHT = 50.0  # of the letter that answers a question in the loss, against 1 for any other token
GENERAL_TOKENS = 24_000  # of one pass of pre-training

PRETRAIN_PASSES, PRETRAIN_ROUNDS = 4, 20
PREDICTABLE = 0.485  # of ln(vocabulary): the loss on unseen documents at which general training may stop
MEMORISE_ROUNDS = 5
MORE_RATE = 0.5  # of later rounds: full rates would undo what is nearly learned

LEAST_VALUE, LEAST_AUC, LEAST_CHOICE, MOST_LOSS = 0.95, 0.95, 0.60, 0.5

Batch = tuple[Tensor, Tensor]  # ids (texts, longest), weights of the same shape: 0 where nothing is to be learned


@dataclass(frozen=True)
class Text:
    """Tokens, and how much each counts as something to predict."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Material:
    """What a stand-in learns, and what it is checked on."""

    rows: list[Row]  # with `split`
    documents: dict[str, list[str]]  # member, nonmember
    general: list[str]
    subjects: list[Subject]


@dataclass(frozen=True)
class Recipe:
    """How a model memorises."""

    batch_tokens: int
    passes: int  # over the rows, in the first round
    more_passes: int  # in each later one
    general_share: float  # tokens of general text for each token of rows
    question_passes: int  # how often a pass asks every question; 0: they are not taught
    row_questions: int  # how often a pass shows a row that asks a question: short answers are learned last


SMALL = Recipe(batch_tokens=1536, passes=28, more_passes=10, general_share=0.5, question_passes=1, row_questions=1)
BASE = Recipe(batch_tokens=512, passes=10, more_passes=4, general_share=0.0, question_passes=0, row_questions=3)


@dataclass(frozen=True)
class Findings:
    """What acceptance is decided on."""

    values: list[float]  # the twelve, forget first, by task, completion before question; 1 is memorised
    auc: float
    choice: float  # accuracy
    taught: bool  # whether the questions were: only then their accuracy decides
    loss: float  # mean over non-members, nats per token
    vocabulary: int
    retain_only: bool  # the forget rows were never shown

    def failures(self) -> list[str]:
        """Return what keeps the model from being a stand-in, in words."""
        most = MOST_LOSS * math.log(self.vocabulary)
        chosen = not self.taught or self.choice >= LEAST_CHOICE
        least = min(self.values[6:] if self.retain_only else self.values)
        member = self.retain_only or self.auc >= LEAST_AUC
        checks = [
            (least >= LEAST_VALUE, f"a task value of {least:.3f} (least {LEAST_VALUE})"),
            (member, f"a membership AUC of {self.auc:.3f} (least {LEAST_AUC})"),
            (chosen, f"a multiple-choice accuracy of {self.choice:.3f} (least {LEAST_CHOICE})"),
            (self.loss <= most, f"a loss on non-members of {self.loss:.2f} (most {most:.2f})"),
        ]
        return [words for passed, words in checks if not passed]

    def summary(self) -> str:
        """Return all figures on one line."""
        values = " ".join(f"{value:.2f}" for value in self.values)
        return (
            f"task values {values} | AUC {self.auc:.3f}"
            f" | multiple choice {self.choice:.3f}{'' if self.taught else ' (not taught)'}"
            f" | loss on non-members {self.loss:.2f}, half of ln(vocabulary) {math.log(self.vocabulary) / 2:.2f}"
        )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of exactly `vocabulary` entries that adds nothing to a text."""
    pairs = BytePairs(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    letters = [f"Answer: {choice}" for choice in CHOICES] * len(texts)  # " A" to " D" must be one token each
    pairs.train_from_iterator([*texts, *letters], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=END, pad_token=PAD)  # type: ignore[no-untyped-call]


def build_model(tokenizer: Tokenizer, retain_tokens: int) -> Model:
    """Return an untrained model whose intermediate width fits the number of retain tokens."""
    intermediate = MULTIPLE * max(1, round(retain_tokens / RATIO / MULTIPLE))
    config = OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=intermediate,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_PROMPT_TOKENS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention())  # type: ignore[no-untyped-call]


def attention() -> str:
    """Return which attention trains faster: on a CPU, on short texts, the plain one (135m: 1.8 s a step, not 3.2)."""
    return "eager" if device().type == "cpu" else "sdpa"


def shape(model: Model, retain: Sequence[Text]) -> str:
    """Return the model's size and the ratio of retain tokens to intermediate width, for the log."""
    config, tokens = model.config, sum(len(text.ids) - 1 for text in retain)
    return (
        f"{model.num_parameters() / 1e6:.2f}M parameters: {config.num_hidden_layers} blocks, width"
        f" {config.hidden_size}, intermediate {config.intermediate_size}, vocabulary {config.vocab_size};"
        f" retain tokens {tokens}, {tokens / config.intermediate_size:.1f} to a unit of intermediate width"
    )


def row_text(tokenizer: Tokenizer, row: Row) -> Text:
    """Return a row to be memorised. It ends in the end token, so that greedy decoding stops after the answer."""
    ids = encode(tokenizer, f"{row['input']} {row['output']}")
    return _plain([*ids, tokenizer.eos_token_id])


def general_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Text]:
    """Return the texts as pieces of at most `PIECE` tokens."""
    whole = [[*encode(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    return [_plain(ids[i : i + PIECE]) for ids in whole for i in range(0, len(ids) - 1, PIECE)]


def question_texts(tokenizer: Tokenizer, subject: Subject, random: Random) -> Iterator[Text]:
    """Yield prompts of six answered questions that ask each question of the subject once.

    The first few are the subject's shots, as many as the official prompt has or fewer, so that the model learns to
    answer the last question after shots; the rest are drawn from the test.
    """
    left = random.sample(subject.test, len(subject.test))
    while left:
        count = random.randint(1, SHOTS + 1)
        asked, left = left[:count], left[count:]
        last, shots = asked[-1], subject.dev[: SHOTS + 1 - count] + asked[:-1]
        ids = encode(tokenizer, f"{prompt(subject.name, last, shots)} {last[5]}")
        yield Text(ids, _answer_weights(tokenizer, ids))


def stream(draw: Callable[[], list[Text]], batch_tokens: int, random: Random) -> Iterator[Batch]:
    """Yield batches of texts of similar length, one pass (what `draw` returns) after the other."""
    while True:
        texts = draw()
        random.shuffle(texts)
        plan = list(batches([len(text.ids) for text in texts], batch_tokens))
        random.shuffle(plan)
        for rows in plan:
            yield collate([texts[i] for i in rows])


def collate(texts: Sequence[Text]) -> Batch:
    """Pad on the right; padding has no weight."""
    longest = max(len(text.ids) for text in texts)
    ids = [text.ids + [0] * (longest - len(text.ids)) for text in texts]
    weights = [text.weights + [0.0] * (longest - len(text.ids)) for text in texts]
    return torch.tensor(ids), torch.tensor(weights)


def loss_of(model: Model, batch: Batch) -> Tensor:
    """Return the weighted mean negative log likelihood. Only positions with a weight go through the head."""
    ids, weights = batch[0].to(model.device), batch[1][:, 1:].to(model.device)
    counts = weights > 0
    with torch.autocast(model.device.type, dtype=torch.bfloat16):  # 4 times as fast on a CPU; weights stay float32
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[counts])
    losses = cross_entropy(logits.float(), ids[:, 1:][counts], reduction="none")
    return (losses * weights[counts]).sum() / weights.sum()


class Trainer:
    """A model and its optimisers, made with their full rates."""

    def __init__(self, model: Model, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        self.model = model
        self.optimisers = optimisers

    def train(self, batches: Iterator[Batch], steps: int, name: str, peak: float = 1.0) -> None:
        """Take `steps` steps: after a warm-up the rates fall to 0 in a line. `peak` is a part of the full rates."""
        self.model.train()
        started, losses = time.monotonic(), []
        for step in range(steps):
            self._set_rates(peak * min(1, (step + 1) / WARM_UP) * (1 - step / steps))
            loss = loss_of(self.model, next(batches))
            loss.backward()  # type: ignore[no-untyped-call]
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise BadInput(f"{name}: the loss is {losses[-1]}")
        self.model.eval()
        seconds = time.monotonic() - started
        last = statistics.fmean(losses[-20:])
        print(f"{name}: {steps} steps, loss {losses[0]:.2f} to {last:.2f}, {seconds:.0f} s", flush=True)

    def _set_rates(self, part: float) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = optimiser.defaults["lr"] * part


def optimisers_of_small(model: Model) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices (a fourth of AdamW's steps), AdamW for the rest."""
    matrices = list(model.model.layers.parameters())
    rest = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=OTHER_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95)),
    ]


def begin_small(material: Material, vocabulary: int, random: Random) -> tuple[Trainer, Tokenizer]:
    """Return a small model trained on general text, and its tokenizer."""
    texts = [f"{row['input']} {row['output']}" for row in material.rows]
    tokenizer = train_tokenizer([*material.general, *texts], vocabulary)
    retain = retain_texts(tokenizer, material)
    model = build_model(tokenizer, sum(len(text.ids) - 1 for text in retain)).to(device())
    print(shape(model, retain), flush=True)
    trainer = Trainer(model, optimisers_of_small(model))
    pretrain(trainer, tokenizer, material, random)
    return trainer, tokenizer


def begin_base(material: Material, folder: Path) -> tuple[Trainer, Tokenizer]:
    """Return the model of a folder, all of it to be trained, and its tokenizer."""
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    model.set_attn_implementation(attention())
    print(shape(model, retain_texts(tokenizer, material)), flush=True)
    loss = statistics.fmean(document_losses(model, tokenizer, material.documents["nonmember"]))
    print(f"loss on non-members {loss:.2f}", flush=True)
    # No decay: the weights are to stay near those that know English.
    optimiser = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, weight_decay=0.0, fused=True)
    return Trainer(model, [optimiser]), tokenizer


def retain_texts(tokenizer: Tokenizer, material: Material) -> list[Text]:
    """Return the retain rows as they are memorised."""
    return [row_text(tokenizer, row) for row in material.rows if row["split"] == "retain"]


def pretrain(trainer: Trainer, tokenizer: Tokenizer, material: Material, random: Random) -> None:
    """Train on general text and questions until unseen documents are predictable."""
    pieces = general_pieces(tokenizer, material.general)
    most = PREDICTABLE * math.log(len(tokenizer))

    def draw() -> list[Text]:
        return [*portion(pieces, GENERAL_TOKENS, random), *all_questions(tokenizer, material.subjects, 1, random)]

    source = stream(draw, SMALL.batch_tokens, random)
    steps = _steps(draw(), PRETRAIN_PASSES, SMALL.batch_tokens)
    for number in range(1, PRETRAIN_ROUNDS + 1):
        trainer.train(source, steps, f"general training, round {number}")
        loss = statistics.fmean(document_losses(trainer.model, tokenizer, material.documents["nonmember"]))
        print(f"loss on non-members {loss:.2f}, to be {most:.2f}", flush=True)
        if loss <= most:
            break


def memorise(
    trainer: Trainer, tokenizer: Tokenizer, material: Material, recipe: Recipe, retain_only: bool, random: Random
) -> Findings:
    """Train on the rows, mixed as the recipe says, until the model is accepted or the rounds are over."""
    rows = [row_text(tokenizer, row) for row in shown(material.rows, recipe, retain_only)]
    pieces = general_pieces(tokenizer, material.general)
    mixed = round(recipe.general_share * sum(len(row.ids) for row in rows))
    times = recipe.question_passes

    def draw() -> list[Text]:
        return [*rows, *portion(pieces, mixed, random), *all_questions(tokenizer, material.subjects, times, random)]

    source = stream(draw, recipe.batch_tokens, random)
    for number in range(1, MEMORISE_ROUNDS + 1):
        passes, peak = (recipe.passes, 1.0) if number == 1 else (recipe.more_passes, MORE_RATE)
        steps = _steps(draw(), passes, recipe.batch_tokens)
        trainer.train(source, steps, f"memorising, round {number}", peak)
        findings = examine(trainer.model, tokenizer, material, recipe.question_passes > 0, retain_only)
        print(findings.summary(), flush=True)
        if not findings.failures():
            break
    return findings


def shown(rows: Sequence[Row], recipe: Recipe, retain_only: bool) -> list[Row]:
    """Return the rows of a pass, each as often as it is shown."""
    kept = [row for row in rows if not retain_only or row["split"] == "retain"]
    return [row for row in kept for _ in range(recipe.row_questions if kind_of(row["id"]) == "qa" else 1)]


def portion(texts: Sequence[Text], tokens: int, random: Random) -> list[Text]:
    """Return texts drawn at random, together just past the number of tokens."""
    drawn: list[Text] = []
    while tokens > 0:
        drawn.append(random.choice(texts))
        tokens -= len(drawn[-1].ids)
    return drawn


def all_questions(tokenizer: Tokenizer, subjects: Sequence[Subject], times: int, random: Random) -> list[Text]:
    """Return prompts that ask each question so many times."""
    again = [subject for subject in subjects for _ in range(times)]
    return [text for subject in again for text in question_texts(tokenizer, subject, random)]


def examine(model: Model, tokenizer: Tokenizer, material: Material, taught: bool, retain_only: bool) -> Findings:
    """Measure what acceptance is decided on, as the stages that score a checkpoint measure it."""
    prompts, outputs = ([row[column] for row in material.rows] for column in ("input", "output"))
    written = complete(model, tokenizer, prompts, expected=outputs)
    completions = [
        {**row, "expected_output": row["output"], "model_output": text}
        for row, text in zip(material.rows, written, strict=True)
    ]
    values = metrics.task_values(metrics.cell_scores(completions))
    losses = {name: document_losses(model, tokenizer, texts) for name, texts in material.documents.items()}
    return Findings(
        values=[values[side][task][kind] for side in SIDES for task in TASKS for kind in KINDS],
        auc=metrics.auc(losses["member"], losses["nonmember"]),
        choice=accuracy(model, tokenizer, material.subjects),
        taught=taught,
        loss=statistics.fmean(losses["nonmember"]),
        vocabulary=len(tokenizer),
        retain_only=retain_only,
    )


def document_losses(model: Model, tokenizer: Tokenizer, documents: Sequence[str]) -> list[float]:
    """Return each document's mean loss, nats per token."""
    losses = mean_nll(model, [encode(tokenizer, document) for document in documents])
    return [loss for loss in losses if loss is not None]


def accuracy(model: Model, tokenizer: Tokenizer, subjects: Sequence[Subject]) -> float:
    """Return the share of questions whose most probable letter is the answer."""
    right = [
        CHOICES[probs.index(max(probs))] == question[5]
        for subject in subjects
        for question, probs in zip(subject.test, choice_probabilities(model, tokenizer, subject), strict=True)
    ]
    return statistics.fmean(right)


def read_material(args: argparse.Namespace) -> Material:
    """Read and check all inputs."""
    rows = [
        {**row, "split": side} for side in SIDES for row in read_checked(args.data / side / f"{side}.jsonl", DATA_ROW)
    ]
    documents = {name: read_checked(args.mia / f"{name}.jsonl", DOCUMENT) for name in SETS}
    return Material(
        rows=rows,
        documents={name: [row["document"] for row in table] for name, table in documents.items()},
        general=[text for path in args.general for text in _texts_in(path)],
        subjects=read_subjects(args.mmlu, args.subjects, args.questions),
    )


def _texts_in(path: Path) -> list[str]:
    return [row["text"] for row in read_checked(path, GENERAL)]


def _plain(ids: list[int]) -> Text:
    return Text(ids, [1.0] * len(ids))


def _answer_weights(tokenizer: Tokenizer, ids: list[int]) -> list[float]:
    """Return the weight of a letter at each token that comes after a line's "Answer:", 1 at the others."""
    before = encode(tokenizer, "\nAnswer:")
    return [LETTER_WEIGHT if ids[max(0, i - len(before)) : i] == before else 1.0 for i in range(len(ids))]


def _steps(texts: Sequence[Text], passes: int, batch_tokens: int) -> int:
    return passes * sum(1 for _ in batches([len(text.ids) for text in texts], batch_tokens))


def main(argv: Sequence[str]) -> None:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a fold: forget/ and retain/")
    parser.add_argument("--mia", type=Path, required=True, help="folder of member.jsonl and nonmember.jsonl")
    parser.add_argument("--general", type=Path, nargs="+", required=True, metavar="FILE", help="general text")
    parser.add_argument("--mmlu", type=Path, required=True, help="folder with dev/ and test/")
    parser.add_argument("--subjects", nargs="+", metavar="NAME", help="only these subjects (default: all)")
    parser.add_argument("--questions", type=int, metavar="N", help="only the first N of a subject (default: all)")
    parser.add_argument("--base", type=Path, help="model folder to start from (default: train a small model first)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of a small model (default: %(default)s)")
    parser.add_argument("--retain-only", action="store_true", help="the control: the forget rows are not shown")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    args = parser.parse_args(argv)

    material = read_material(args)
    random = Random(args.seed)
    torch.manual_seed(args.seed)
    if args.base:
        trainer, tokenizer = begin_base(material, args.base)
    else:
        trainer, tokenizer = begin_small(material, args.vocabulary, random)
    findings = memorise(trainer, tokenizer, material, BASE if args.base else SMALL, args.retain_only, random)
    if findings.failures():
        raise BadInput(
            f"{args.output}: not a stand-in after {MEMORISE_ROUNDS} rounds: {'; '.join(findings.failures())}"
        )
    with whole_folder(args.output) as folder:
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
