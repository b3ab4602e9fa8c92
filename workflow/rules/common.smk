"""What the rules share: the checked config, the lists that wildcards run over, and the params that decide reruns."""

import os
import re
import sys
from hashlib import sha256
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

# A Snakemake that is not the project's own (--sdm conda) finds the package in the repository, and the shell commands
# find `sdtp` beside the Python that runs Snakemake, whether or not its environment was activated.
ROOT = Path(workflow.basedir).parent if Path(workflow.basedir).name == "workflow" else Path(workflow.basedir)
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

from sdtp.errors import UserError
from sdtp.pipeline import schema, tracking
from sdtp.pipeline.codehash import code_hash
from sdtp.pipeline.devices import visible_gpus
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.files import canonical_json
from sdtp.pipeline.mlflow_store import tracking_uri
from sdtp.pipeline.sources import own_files

try:
    SCHEMA = schema.load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    schema.check_sources(workflow.config_settings.overwrite_config, SCHEMA)
    config.update(schema.resolve(config, SCHEMA))
    VARIANTS = schema.resolve_variants(config, SCHEMA)
    RESULTS = f"results/{config['run']}"
    LOGS = f"logs/{config['run']}"
    tracking_uri(Path(RESULTS), config["tracking"]["uri"])
    MODEL_FILES = own_files(config["model"]["source"], "model.source")
    DATA_FILES = [
        file
        for split in ("train", "test")
        for file in own_files(config["data"][split]["source"], f"data.{split}.source")
    ]
    GPUS = len(visible_gpus())
except UserError as error:
    raise WorkflowError(str(error))

# Text as paths show it: 0.9, 0.85, 1.0.
KEEP_RATIOS = [str(ratio) for ratio in config["pruning"]["keep_ratios"]]
UNPRUNED_RATIO = "1.0"
METHODS = config["evaluation"]["methods"]
# What the variants of an ablation are compared with; each of them has a pruner of its own in place of the run's.
REFERENCES = [method for method in METHODS if method != "sdtp"]
SHARDS = [str(shard) for shard in range(config["saliency"]["shards"])]

# For steps that use the whole machine. Without --cores (on a cluster) a profile sets their threads, and `workflow.cores`
# would raise.
ALL_CORES = workflow.resource_settings.cores or 1
# For the long step that is not timed: on the CPU the whole machine, on a GPU that one's share, so that the others work.
GPU_SHARE = max(1, ALL_CORES // max(1, GPUS))

# The network fails now and then; a file on this machine does not.
MODEL_RETRIES = 2 if config["model"]["source"]["kind"] == "hub" else 0
DATA_RETRIES = 2 if "hub" in [config["data"][split]["source"]["kind"] for split in ("train", "test")] else 0

# Read by every step (sdtp.pipeline.tracking); in the environment, since nothing about tracking may rerun a step.
PARENT_RUN_FILE = f"{RESULTS}/{tracking.PARENT_FILE}"
os.environ.update(
    SDTP_RUN=config["run"],
    SDTP_EXPERIMENT=config["tracking"]["experiment"],
    SDTP_TRACKING_URI=config["tracking"]["uri"] or "",
    SDTP_PARENT_RUN_FILE=PARENT_RUN_FILE,
)


def configuration(wildcards):
    """The configuration a job is made from: the run's. The modules of ablation.smk have others, by their wildcards."""
    return config


def selected(source, keys):
    """The values of a configuration under dotted keys, nested as there."""
    chosen = {}
    for key in keys:
        *blocks, leaf = key.split(".")
        below, target = source, chosen
        for block in blocks:
            below, target = below[block], target.setdefault(block, {})
        target[leaf] = below[leaf]
    return chosen


def settings(*keys):
    """The config values under dotted keys, as one canonical JSON text: a rule names exactly what its step uses."""
    return lambda wildcards: canonical_json(selected(configuration(wildcards), keys))


def one_of(values):
    """A wildcard constraint: exactly these values."""
    return "|".join(re.escape(value) for value in values)


def evaluate_settings(wildcards):
    """Settings of one evaluation: what a method does not use is not passed, and so reruns nothing."""
    keys = ["model.dtype", "model.attention", "evaluation.batch_tokens"]
    if wildcards.method != "unpruned":
        keys += SCHEDULE
    if wildcards.method == "random":
        keys += ["evaluation.seeds"]
    if wildcards.method == "oracle":
        keys += ["saliency.reduction", "saliency.target"]
    return settings(*keys)(wildcards)


# Where tokens are removed and which are protected; the ratios themselves are wildcards.
SCHEDULE = [
    "pruning.start",
    "pruning.step",
    "pruning.sinks",
    "pruning.local",
    "pruning.min_local",
]


def evaluated_pruner(wildcards):
    """The trained pruner, for the one method that uses it."""
    return "<results>/pruner" if wildcards.method == "sdtp" else []


def pruner_option(wildcards, input):
    """The command-line option for it."""
    return f"--pruner {input.pruner}" if wildcards.method == "sdtp" else ""


def evaluations(methods):
    """The files of evaluations: the unpruned model, and each of `methods` at each keep ratio."""
    cells = [("unpruned", UNPRUNED_RATIO)] + [(method, ratio) for method in methods for ratio in KEEP_RATIOS]
    return [f"<results>/evaluation/{method}-{ratio}.jsonl" for method, ratio in cells]


# All that decides what training gives; the number of GPUs only says how fast.
TRAINING = [f"training.{key}" for key in config["training"] if key != "gpus"]


def training_checkpoints(wildcards, output):
    """Where an interrupted training resumes from: declared outputs are deleted before a rerun, so this is none."""
    return str(Path(output.pruner).parent / "checkpoints" / "train")


def saliency_checkpoints(wildcards, output):
    """Where an interrupted shard resumes from; no output, for the same reason."""
    return str(Path(output.shard).parents[1] / "checkpoints" / "saliency" / wildcards.shard)


def training_gpus(wildcards):
    """GPUs of the training job. Snakemake gives it no more than `--resources gpu=` allows, and so it always starts."""
    return configuration(wildcards)["training"]["gpus"]


def training_threads(wildcards):
    """The share of the cores that belongs to these; Snakemake gives no more than there are."""
    return GPU_SHARE * training_gpus(wildcards)


def labels_part(variant):
    """What the saliency of a variant is made from beyond what all of them share."""
    return selected(VARIANTS[variant], ["pruning.start", "pruning.step", "saliency"])


def labels_of(variant):
    """A name for the saliency of a variant, by content: variants that need the same share it."""
    return sha256(canonical_json(labels_part(variant)).encode()).hexdigest()[:12]


def variant_index(wildcards):
    """The index of a variant's saliency."""
    return f"{RESULTS}/ablation/labels/{labels_of(wildcards.variant)}/saliency/index.json"


def variant_shards(wildcards):
    """Its shards."""
    return [
        f"{RESULTS}/ablation/labels/{labels_of(wildcards.variant)}/saliency/shard-{shard}.safetensors"
        for shard in SHARDS
    ]


def ablation_files(wildcards):
    """What `snakemake ablation` makes."""
    if not VARIANTS:
        raise WorkflowError(
            "nothing to compare: the key `variants` of the configuration is empty; "
            "try `--configfile config/ablations/saliency.yaml`"
        )
    return ["<results>/checked.json", *(f"<results>/ablation/{name}" for name in ABLATION_FILES)]


# A table to read with a program, one to read, and a figure.
ABLATION_FILES = ["ablation.csv", "ablation.md", "ablation.svg", "ablation.png"]


def announce():
    """Names every step before Snakemake decides which have to run: where none has, it says no more than that."""
    if workflow.is_main_process:
        steps = [rule.name for rule in workflow.rules if not rule.norun]
        logger.info(f"Checking the {len(steps)} steps of run {config['run']}: {', '.join(steps)}")


def start_tracking():
    """Opens the MLflow run that the steps' runs belong to."""
    tracking.start_pipeline(
        Path(RESULTS),
        config,
        config["tracking"]["experiment"],
        config["tracking"]["uri"],
    )


def finish_tracking(status):
    """Closes it."""
    tracking.finish_pipeline(Path(RESULTS), status)
