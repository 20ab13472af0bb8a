"""Memorising model + forget and retain rows -> submissions/<target>.zip. Rules in pipeline order, one module each.

`python -m` hides a rule's code from Snakemake, so every rule takes its module and all local modules that this one imports as
inputs (`code=`), and its settings as one string of flags. One locked environment (requirements.lock) serves all rules,
so the one thing that `snakemake --lint` finds is that no rule names an environment of its own.
"""

import json
import os
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from pipeline.lib.provenance import local_modules
from pipeline.lib.published import WINDOW


configfile: "config/config.yaml"


validate(config, "config/schema.yaml")

# Jobs share the cores: a waiting thread must sleep, not spin (measured: 27 s against 140 s beside another job).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TARGETS = config["targets"]
DATASETS = config["datasets"]
STUDY = config["study"]
DRAWS = STUDY["draws"]
for name, target in TARGETS.items():
    if target["dataset"] not in DATASETS:
        raise WorkflowError(f"config: targets.{name}.dataset is {target['dataset']}, not one of {', '.join(DATASETS)}")

# A draw is a stand-in made of other documents: tiny-16, tiny-17, ... What was tuned on `tiny` is reported on its draws.
DRAWN = [name for name, target in TARGETS.items() if target["stand_in"] and "-" not in name]
drawn = {}
for draw in DRAWS:
    for name in DRAWN:
        target, new = TARGETS[name], f"{TARGETS[name]['dataset']}-{draw}"
        if f"{name}-{draw}" in TARGETS or new in config["datasets"]:
            raise WorkflowError(f"config: {name}-{draw} and {new} are the names of a draw: choose others")
        other = {"source": f"synthetic-{draw}"}
        dataset, questions = DATASETS[target["dataset"]], target["multiple_choice"]
        drawn[new] = dataset | (other if dataset["source"] == "synthetic" else {"seed": draw})
        TARGETS[f"{name}-{draw}"] = target | {
            "dataset": new,
            "multiple_choice": questions | (other if questions["source"] == "synthetic" else {}),
        }
DATASETS |= drawn

STAND_INS = [name for name, target in TARGETS.items() if target["stand_in"]]
CHECKPOINTS = [name for name in TARGETS if name not in STAND_INS]
for key, folder in config.items():
    if key.startswith("model_") and folder and key.removeprefix("model_") not in CHECKPOINTS:
        raise WorkflowError(
            f"config: {key} is the folder of no target's checkpoint, only model_{', model_'.join(CHECKPOINTS)}"
        )
MEMORISED = ["original", "retrained"]
BASED = [name for name in STAND_INS if "base" in TARGETS[name]]


wildcard_constraints:
    target="|".join(TARGETS),
    dataset="|".join(DATASETS),
    source=r"synthetic(-\d+)?|semeval25|mmlu",
    checkpoint=r"original|unlearned|retrained|layers/[\w.-]+|methods/[\w.-]+",


def code(stage):
    """The files whose change must rerun a stage."""
    return [str(path) for path in local_modules(f"pipeline/{stage}.py")]


def flags(**values):
    """Command line flags; a value of None is left out."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def target_of(wildcards):
    return TARGETS[wildcards.target]


def dataset_of(wildcards):
    return f"data/split/{target_of(wildcards)['dataset']}"


def raw_of(wildcards):
    return f"data/raw/{DATASETS[wildcards.dataset]['source']}"


def questions_of(wildcards):
    return f"data/raw/{target_of(wildcards)['multiple_choice']['source']}"


def weights_of(wildcards):
    """What stands for a checkpoint: a folder made in one piece, or the record that unlearning writes last."""
    folder = folder_of(wildcards)
    whole = wildcards.checkpoint in MEMORISED or wildcards.checkpoint.startswith("layers/")
    return folder if whole else f"{folder}/run.json"


def folder_of(wildcards):
    """A checkpoint's folder; one of the sweep has a folder of its own beside its results, which goes when measured."""
    folder = f"{'models' if wildcards.checkpoint in MEMORISED else 'results'}/{wildcards.target}/{wildcards.checkpoint}"
    return f"{folder}/checkpoint" if wildcards.checkpoint.startswith("layers/") else folder


def origin_of(wildcards):
    name, _, seed = wildcards.source.partition("-")
    return flags(source=name, seed=seed or None, local=local_of(name))


def local_of(source):
    """The user's folder with the files of a source, if they are not to come from the hub."""
    folder = {"semeval25": config["data"], "mmlu": config["mmlu"]}.get(source)
    return folder and str(Path(folder).expanduser())


def files_of(folder):
    """The data files in a user's folder and in the folders in it: one that was edited must be read again."""
    ends = {".parquet", ".jsonl", ".json", ".csv"}
    found = [path for pattern in ("*", "*/*", "*/*/*") for path in Path(folder).glob(pattern)] if folder else []
    return sorted(str(path) for path in found if path.suffix in ends and path.is_file())


def checkpoint_origin_of(wildcards):
    local = config.get(f"model_{wildcards.target}")
    return flags(local=Path(local).expanduser()) if local else flags(**target_of(wildcards)["model"])


def sample_of(wildcards):
    dataset = DATASETS[wildcards.dataset]
    return flags(**{name: dataset.get(name) for name in ("documents_per_task", "nonmembers", "seed")})


def questions_asked_of(wildcards):
    chosen = target_of(wildcards)["multiple_choice"]
    return flags(subjects=chosen.get("subjects"), questions=chosen.get("questions"))


def base_of(wildcards):
    """The model that a stand-in starts from, if it starts from one; a draw's is its target's."""
    return f"models/{wildcards.target.split('-')[0]}/base" if wildcards.target in BASED else []


def start_of(wildcards):
    return flags(base=base_of(wildcards) or None, vocabulary=target_of(wildcards).get("vocabulary"))


def multiple_choice_of(wildcards):
    """The folder with dev/ and test/."""
    source = target_of(wildcards)["multiple_choice"]["source"]
    return f"data/raw/{source}" if source == "mmlu" else f"data/raw/{source}/mmlu"


def size_of(wildcards):
    return flags(name=wildcards.target, size=target_of(wildcards)["published_size"]) + (
        " --stand-in" if target_of(wildcards)["stand_in"] else ""
    )


def origins_of(wildcards):
    target = target_of(wildcards)
    if wildcards.target in BASED:
        model = "SmolLM2-135M-Instruct (Apache-2.0), fine-tuned by pipeline.memorise"
    elif target["stand_in"]:
        model = "made by pipeline.memorise"
    elif config.get(f"model_{wildcards.target}"):
        model = "a local folder"
    else:
        model = "{repo} at {revision}".format(**target["model"])
    return flags(model_source=model, data_source=DATASETS[target["dataset"]]["source"].partition("-")[0])


def texts_of(wildcards):
    return "" if DATASETS[target_of(wildcards)["dataset"]].get("texts", True) else "--without-texts"


def held_out_of(wildcards):
    """General text that neither checkpoint was trained on: generated; all general text of a base; else the non-members."""
    dataset = target_of(wildcards)["dataset"]
    if DATASETS[dataset]["source"].startswith("synthetic"):
        return flags(held_out_seed=1000)  # the data are generated with 0, a draw's with its number
    rest = "general" if wildcards.target in BASED else "mia/nonmember"
    return flags(held_out=f"data/split/{dataset}/{rest}.jsonl")


def memory_of(wildcards):
    return target_of(wildcards)["resources"]["memory_mb"]


def threads_of(wildcards):
    return target_of(wildcards)["resources"]["threads"]


def minutes_of(wildcards):
    return target_of(wildcards)["resources"]["minutes"]


def minutes_of_method(wildcards):
    """A draw's are its target's; without an entry the method's own."""
    return flags(minutes=STUDY["minutes"].get(wildcards.target.partition("-")[0]))


def gpus_of(wildcards):
    return target_of(wildcards)["resources"]["gpus"]


def steering_of(wildcards):
    """RMU's published window, the down_proj of blocks l-2 to l; all tokens alike.

    Not as published: solved in closed form, each of the three blocks steered; general text held as well; kinds alike.
    """
    fixed = wildcards.method == "rmu"
    sweep = target_of(wildcards)["sweep"]
    return flags(
        method="solve",
        trained=list(range(int(wildcards.block) - WINDOW + 1, int(wildcards.block) + 1)),
        coefficient="fixed" if fixed else None,
        beta=sweep["coefficient"] if fixed else sweep["beta"],
        alpha=sweep["alpha"],
        answer=1,
        general=1,
        seed=wildcards.seed,
    )


def layers_of(wildcards):
    return expand(
        "results/{target}/layers/{method}.{block}.{seed}/evaluation_results.jsonl",
        target=wildcards.target,
        method=["rmu", "adaptive"],
        block=range(WINDOW - 1, target_of(wildcards)["sweep"]["blocks"]),  # those with a whole window
        seed=range(STUDY["seeds"]),
    )


def trials_of(wildcards):
    return expand(
        "results/{target}/methods/{method}.{strength}/evaluation_results.jsonl",
        target=wildcards.target,
        method=STUDY["methods"],
        strength=STUDY["strengths"],
    )


def compared_of(wildcards):
    """Every draw's results: controls, ours, each method as published (strength 1) and as tuned."""
    with checkpoints.tune.get(target=wildcards.target).output[0].open() as stream:
        tuned = json.load(stream)
    names = {
        f"methods/{method}.{strength}" for method in STUDY["methods"] for strength in (1, tuned[method]["strength"])
    }
    return [
        f"results/{wildcards.target}-{draw}/{name}/{table}"
        for draw in DRAWS
        for name in ("original", "retrained", "methods/random_weights.1", "unlearned", *sorted(names))
        for table in ("evaluation_results.jsonl", "fluency.json")
    ]


def study_of(wildcards):
    """What the page shows of the study; only a stand-in can be drawn again for a comparison."""
    if not config["full_report"]:
        return []
    parts = ["layers.json", "claims.json", *(["comparison.md"] if wildcards.target in DRAWN else [])]
    return [f"results/{wildcards.target}/{part}" for part in parts]


localrules:
    all,
    fetch_data,
    fetch_model,
    fetch_base,
    split,
    score,
    package,
    leaderboard,
    layers,
    tune,
    comparison,
    model_card,
    report,


rule all:
    input:
        "submissions/tiny.zip",
        "results/tiny/leaderboard.md",


rule fetch_data:
    input:
        "data/sources.yaml",
        lambda wildcards: files_of(local_of(wildcards.source)),
        code=code("fetch_data"),
    output:
        directory("data/raw/{source}"),
    log:
        "results/logs/fetch_data.{source}.log",
    benchmark:
        "results/benchmarks/fetch_data.{source}.tsv"
    params:
        flags=origin_of,
    shell:
        "python -m pipeline.fetch_data {params.flags} --output {output} 2>&1 | tee {log}"


rule split:
    input:
        raw=raw_of,
        code=code("split"),
    output:
        directory("data/split/{dataset}"),
    log:
        "results/logs/split.{dataset}.log",
    benchmark:
        "results/benchmarks/split.{dataset}.tsv"
    params:
        flags=sample_of,
    shell:
        "python -m pipeline.split --raw {input.raw} {params.flags} --output {output} 2>&1 | tee {log}"


rule fetch_model:
    input:
        code=code("fetch_model"),
    output:
        directory("models/{target}/original"),
    log:
        "results/{target}/logs/fetch_model.log",
    benchmark:
        "results/{target}/benchmarks/fetch_model.tsv"
    wildcard_constraints:
        target="|".join(CHECKPOINTS),
    params:
        flags=checkpoint_origin_of,
    shell:
        "python -m pipeline.fetch_model {params.flags} --output {output} 2>&1 | tee {log}"


rule fetch_base:
    input:
        code=code("fetch_base"),
    output:
        directory("models/{target}/base"),
    log:
        "results/{target}/logs/fetch_base.log",
    benchmark:
        "results/{target}/benchmarks/fetch_base.tsv"
    wildcard_constraints:
        target="|".join(name for name in BASED if name in DRAWN),
    shell:
        "python -m pipeline.fetch_base --output {output} 2>&1 | tee {log}"


rule memorise:
    input:
        data=dataset_of,
        questions=questions_of,
        base=base_of,
        code=code("memorise"),
    output:
        directory("models/{target}/original"),
    log:
        "results/{target}/logs/memorise.log",
    benchmark:
        "results/{target}/benchmarks/memorise.tsv"
    wildcard_constraints:
        target="|".join(STAND_INS),
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        questions=multiple_choice_of,
        asked=questions_asked_of,
        start=start_of,
    shell:
        "python -m pipeline.memorise --data {input.data}/train --mia {input.data}/mia --general {input.data}/general.jsonl"
        " --mmlu {params.questions} {params.asked} {params.start} --output {output} 2>&1 | tee {log}"


# The control that perfect unlearning would give: memorised as above, but for the forget rows.
rule retrain:
    input:
        data=dataset_of,
        questions=questions_of,
        base=base_of,
        code=code("memorise"),
    output:
        directory("models/{target}/retrained"),
    log:
        "results/{target}/logs/retrain.log",
    benchmark:
        "results/{target}/benchmarks/retrain.tsv"
    wildcard_constraints:
        target="|".join(STAND_INS),
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        questions=multiple_choice_of,
        asked=questions_asked_of,
        start=start_of,
    shell:
        "python -m pipeline.memorise --data {input.data}/train --mia {input.data}/mia --general {input.data}/general.jsonl"
        " --retain-only --mmlu {params.questions} {params.asked} {params.start} --output {output} 2>&1 | tee {log}"


rule unlearn:
    input:
        model="models/{target}/original",
        data=dataset_of,
        code=code("unlearn"),
    output:
        "results/{target}/unlearned/run.json",
    log:
        "results/{target}/logs/unlearn.log",
    benchmark:
        "results/{target}/benchmarks/unlearn.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python -m pipeline.unlearn {input.model} {params.folder} {input.data}/train/forget {input.data}/train/retain"
        " 2>&1 | tee {log}"


rule complete:
    input:
        weights_of,
        data=dataset_of,
        code=code("complete"),
    output:
        "results/{target}/{checkpoint}/completions.jsonl",
    log:
        "results/{target}/logs/complete.{checkpoint}.log",
    benchmark:
        "results/{target}/benchmarks/complete.{checkpoint}.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        model=folder_of,
    shell:
        "python -m pipeline.complete --model {params.model} --forget {input.data}/train/forget"
        " --retain {input.data}/train/retain --output {output} 2>&1 | tee {log}"


rule membership:
    input:
        weights_of,
        data=dataset_of,
        code=code("membership"),
    output:
        "results/{target}/{checkpoint}/membership.jsonl",
    log:
        "results/{target}/logs/membership.{checkpoint}.log",
    benchmark:
        "results/{target}/benchmarks/membership.{checkpoint}.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        model=folder_of,
    shell:
        "python -m pipeline.membership --model {params.model} --mia {input.data}/mia --output {output} 2>&1 | tee {log}"


rule mmlu:
    input:
        weights_of,
        questions=questions_of,
        code=code("mmlu"),
    output:
        "results/{target}/{checkpoint}/mmlu.jsonl",
    log:
        "results/{target}/logs/mmlu.{checkpoint}.log",
    benchmark:
        "results/{target}/benchmarks/mmlu.{checkpoint}.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        model=folder_of,
        questions=multiple_choice_of,
        asked=questions_asked_of,
    shell:
        "python -m pipeline.mmlu --model {params.model} --data {params.questions} {params.asked} --output {output}"
        " 2>&1 | tee {log}"


rule fluency:
    input:
        weights_of,
        original="models/{target}/original",
        data=dataset_of,
        completions="results/{target}/{checkpoint}/completions.jsonl",
        code=code("fluency"),
    output:
        "results/{target}/{checkpoint}/fluency.json",
    log:
        "results/{target}/logs/fluency.{checkpoint}.log",
    benchmark:
        "results/{target}/benchmarks/fluency.{checkpoint}.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        model=folder_of,
        held_out=held_out_of,
    shell:
        "python -m pipeline.fluency --completions {input.completions} --original {input.original}"
        " --model {params.model} {params.held_out} --output {output} 2>&1 | tee {log}"


rule score:
    input:
        completions="results/{target}/{checkpoint}/completions.jsonl",
        membership="results/{target}/{checkpoint}/membership.jsonl",
        mmlu="results/{target}/{checkpoint}/mmlu.jsonl",
        code=code("score"),
    output:
        results="results/{target}/{checkpoint}/evaluation_results.jsonl",
        categories="results/{target}/{checkpoint}/mmlu_categories.json",
    log:
        "results/{target}/logs/score.{checkpoint}.log",
    benchmark:
        "results/{target}/benchmarks/score.{checkpoint}.tsv"
    shell:
        "python -m pipeline.score --completions {input.completions} --membership {input.membership} --mmlu {input.mmlu}"
        " --output {output.results} --categories {output.categories} 2>&1 | tee {log}"


rule package:
    input:
        expand(
            "results/{{target}}/{checkpoint}/{rows}",
            checkpoint=["original", "unlearned"],
            rows=["completions.jsonl", "membership.jsonl", "mmlu.jsonl"],
        ),
        "data/leaderboard.csv",
        "results/{target}/unlearned/run.json",
        original="results/{target}/original/evaluation_results.jsonl",
        unlearned="results/{target}/unlearned/evaluation_results.jsonl",
        model="models/{target}/original",
        data=dataset_of,
        questions=questions_of,
        submission="pipeline/unlearn.py",
        code=code("package"),
    output:
        zip="submissions/{target}.zip",
        cost="submissions/{target}.cost.json",
    log:
        "results/{target}/logs/package.log",
    benchmark:
        "results/{target}/benchmarks/package.tsv"
    params:
        original=subpath(input.original, parent=True),
        unlearned=subpath(input.unlearned, parent=True),
        questions=multiple_choice_of,
        size=size_of,
        origins=origins_of,
        texts=texts_of,
    shell:
        "python -m pipeline.package --submission {input.submission} --model {input.model}"
        " --original {params.original} --unlearned {params.unlearned}"
        " --data {input.data} {params.questions} {params.size} {params.origins} {params.texts}"
        " --output {output.zip} --cost {output.cost} 2>&1 | tee {log}"


rule leaderboard:
    input:
        "data/leaderboard.csv",
        unlearned="results/{target}/unlearned/evaluation_results.jsonl",
        original="results/{target}/original/evaluation_results.jsonl",
        code=code("leaderboard"),
    output:
        "results/{target}/leaderboard.md",
    log:
        "results/{target}/logs/leaderboard.log",
    benchmark:
        "results/{target}/benchmarks/leaderboard.tsv"
    params:
        size=size_of,
    shell:
        "python -m pipeline.leaderboard --results {input.unlearned} --control {input.original} {params.size}"
        " --output {output} 2>&1 | tee {log}"


# ---- the study: layers, peers, claims ----


# Nothing below the first trained block changes: what enters each block is computed once, as is the general text. So all
# runs of the sweep hold the general text of seed 0 in place, and a seed stands for the steering directions alone. The
# folder stays: were it temporary, one more seed would make it anew, and that would rerun the whole sweep.
rule layer_inputs:
    input:
        model="models/{target}/original",
        data=dataset_of,
        code=code("layer_inputs"),
    output:
        directory("results/{target}/layers/inputs"),
    log:
        "results/{target}/logs/layer_inputs.log",
    benchmark:
        "results/{target}/benchmarks/layer_inputs.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    shell:
        "python -m pipeline.layer_inputs --model {input.model} --forget {input.data}/train/forget"
        " --retain {input.data}/train/retain --output {output} 2>&1 | tee {log}"


# RMU and Adaptive RMU at one block; the number after it is the seed of the steering directions. A checkpoint is as large
# as the model, and the sweep has hundreds: each goes when it has been measured, which has precedence over making another.
rule layer:
    input:
        model="models/{target}/original",
        data=dataset_of,
        inputs="results/{target}/layers/inputs",
        code=code("layer_inputs"),
    output:
        temp(directory("results/{target}/layers/{method}.{block}.{seed}/checkpoint")),
    log:
        "results/{target}/logs/layers/{method}.{block}.{seed}.log",
    benchmark:
        "results/{target}/benchmarks/layers/{method}.{block}.{seed}.tsv"
    wildcard_constraints:
        method="rmu|adaptive",
        block=r"\d+",
        seed=r"\d+",
    priority: -1
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        settings=steering_of,
    shell:
        "python -m pipeline.unlearn {input.model} {output} {input.data}/train/forget {input.data}/train/retain"
        " {params.settings} --inputs {input.inputs} 2>&1 | tee {log}"


rule layers:
    input:
        layers_of,
        original="results/{target}/original/evaluation_results.jsonl",
        code=code("layers"),
    output:
        json="results/{target}/layers.json",
        picture="results/{target}/layers.svg",
    log:
        "results/{target}/logs/layers.log",
    benchmark:
        "results/{target}/benchmarks/layers.tsv"
    params:
        folder="results/{target}/layers",
        blocks=lambda wildcards: target_of(wildcards)["sweep"]["blocks"],
        seeds=STUDY["seeds"],
    shell:
        "python -m pipeline.layers --original {input.original} --sweep {params.folder} --blocks {params.blocks}"
        " --seeds {params.seeds} --output {output.json} --picture {output.picture} 2>&1 | tee {log}"


# A peer's method or a control on one shared loop; the number after the name is the strength, times the learning rate.
rule method:
    input:
        model="models/{target}/original",
        data=dataset_of,
        code=lambda wildcards: code(f"methods/{wildcards.method}"),
    output:
        "results/{target}/methods/{method}.{strength}/run.json",
    log:
        "results/{target}/logs/methods/{method}.{strength}.log",
    benchmark:
        "results/{target}/benchmarks/methods/{method}.{strength}.tsv"
    wildcard_constraints:
        method=r"[a-z_]+",
        strength=r"\d[\d.e-]*",
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        folder=subpath(output[0], parent=True),
        minutes=minutes_of_method,
    shell:
        "python -m pipeline.methods.{wildcards.method} {input.model} {params.folder} {input.data}/train/forget"
        " {input.data}/train/retain --strength {wildcards.strength} {params.minutes} 2>&1 | tee {log}"


# The strength that each method is reported with: the best on the target itself, whose documents no draw shares.
checkpoint tune:
    input:
        trials_of,
        code=code("tune"),
    output:
        "results/{target}/methods/tuned.json",
    log:
        "results/{target}/logs/tune.log",
    wildcard_constraints:
        target="|".join(DRAWN),
    params:
        folder="results/{target}/methods",
        trials=flags(methods=STUDY["methods"], strengths=STUDY["strengths"]),
    shell:
        "python -m pipeline.tune --folder {params.folder} {params.trials} --output {output} 2>&1 | tee {log}"


rule comparison:
    input:
        compared_of,
        tuned="results/{target}/methods/tuned.json",
        code=code("comparison"),
    output:
        json="results/{target}/comparison.json",
        table="results/{target}/comparison.md",
    log:
        "results/{target}/logs/comparison.log",
    benchmark:
        "results/{target}/benchmarks/comparison.tsv"
    wildcard_constraints:
        target="|".join(DRAWN),
    params:
        draws=lambda wildcards: [f"results/{wildcards.target}-{draw}" for draw in DRAWS],
        methods=flags(methods=STUDY["methods"]),
    shell:
        "python -m pipeline.comparison --draws {params.draws} {params.methods} --tuned {input.tuned}"
        " --name {wildcards.target} --output {output.json} --table {output.table} 2>&1 | tee {log}"


rule claims:
    input:
        model="models/{target}/original",
        data=dataset_of,
        questions=questions_of,
        code=code("claims"),
    output:
        json="results/{target}/claims.json",
        figures=directory("results/{target}/claims"),
    log:
        "results/{target}/logs/claims.log",
    benchmark:
        "results/{target}/benchmarks/claims.tsv"
    threads: threads_of
    resources:
        mem_mb=memory_of,
        runtime=minutes_of,
        gpu=gpus_of,
    params:
        questions=multiple_choice_of,
        asked=questions_asked_of,
        settings=lambda wildcards: flags(alpha=target_of(wildcards)["sweep"]["alpha"], seeds=STUDY["seeds"]),
    shell:
        "python -m pipeline.claims --target-name {wildcards.target} --original {input.model} {params.settings}"
        " --forget {input.data}/train/forget --retain {input.data}/train/retain --mia {input.data}/mia"
        " --mmlu {params.questions} {params.asked} --output {output.json} --figures {output.figures} 2>&1 | tee {log}"


rule model_card:
    input:
        "data/sources.yaml",
        run="results/{target}/unlearned/run.json",
        results="results/{target}/unlearned/evaluation_results.jsonl",
        original="results/{target}/original/evaluation_results.jsonl",
        code=code("model_card"),
    output:
        "results/{target}/unlearned/README.md",
    log:
        "results/{target}/logs/model_card.log",
    benchmark:
        "results/{target}/benchmarks/model_card.tsv"
    params:
        size=size_of,
        origins=origins_of,
    shell:
        "python -m pipeline.model_card --run {input.run} --results {input.results} --original {input.original}"
        " {params.size} {params.origins} --output {output} 2>&1 | tee {log}"


# What the jobs took is read from their folder, not asked for as inputs: a page is no reason to train a model again.
rule report:
    input:
        expand(
            "results/{{target}}/{checkpoint}/{rows}",
            checkpoint=["original", "unlearned"],
            rows=["completions.jsonl", "membership.jsonl", "evaluation_results.jsonl"],
        ),
        assets=sorted(str(path) for path in Path("pipeline/assets").iterdir()),
        original="results/{target}/original/fluency.json",
        unlearned="results/{target}/unlearned/fluency.json",
        settings="results/{target}/unlearned/run.json",
        leaderboard="results/{target}/leaderboard.md",
        study=study_of,
        code=code("report"),
    output:
        "results/{target}/report.html",
    log:
        "results/{target}/logs/report.log",
    benchmark:
        "results/{target}/benchmarks/report.tsv"
    params:
        original=subpath(input.original, parent=True),
        unlearned=subpath(input.unlearned, parent=True),
        benchmarks="results/{target}/benchmarks",
        size=size_of,
        origins=origins_of,
        study=lambda wildcards, input: flags(study=f"results/{wildcards.target}") if input.study else "",
    shell:
        "python -m pipeline.report --original {params.original} --unlearned {params.unlearned}"
        " --settings {input.settings} --leaderboard {input.leaderboard} --benchmarks {params.benchmarks}"
        " {params.size} {params.origins} {params.study} --output {output} 2>&1 | tee {log}"
