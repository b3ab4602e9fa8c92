"""What the rules share: the checked config, the lists that wildcards run over, and the params that decide reruns."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

# A Snakemake that is not the project's own (--sdm conda) finds the package in the repository, and the shell commands
# find `sdtp` beside the Python that runs Snakemake, whether or not its environment was activated.
ROOT = Path(workflow.basedir).parent if Path(workflow.basedir).name == "workflow" else Path(workflow.basedir)
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

from sdtp.errors import UserError
from sdtp.evaluation import names
from sdtp.pipeline import invocation, schema, tracking
from sdtp.pipeline.codehash import code_hash
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.devices import visible_gpus
from sdtp.pipeline.doctor.services import check_shared
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.files import canonical_json, digest
from sdtp.pipeline.mlflow_store import tracking_uri, without_password
from sdtp.pipeline.multiple_choice import LOCAL_TASKS
from sdtp.pipeline.paper.names import ABLATIONS, PARTS
from sdtp.pipeline.placement import Placement
from sdtp.pipeline.sources import own_files
from sdtp.pipeline.sweep_cells import count_cells, position_cells
from sdtp.pipeline.target_settings import SweepSettings

try:
    SCHEMA = schema.load_schema(ROOT / "workflow" / "schemas" / "config.schema.yaml")
    schema.check_sources(workflow.config_settings.overwrite_config, SCHEMA)
    config.update(schema.resolve(config, SCHEMA))
    VARIANTS = schema.resolve_variants(config, SCHEMA)
    PAPER_VARIANTS = schema.resolve_variants({**config, "variants": ABLATIONS}, SCHEMA)
    RESULTS = f"results/{config['run']}"
    LOGS = f"logs/{config['run']}"
    tracking_uri(Path(RESULTS), config["tracking"]["uri"])
    MODEL_FILES = own_files(config["model"]["source"], "model.source.ref")
    TRAIN_FILES = own_files(config["data"]["train"]["source"], "data.train.source.ref")
    TEST_FILES = own_files(config["data"]["test"]["source"], "data.test.source.ref")
    RULER_FILES = own_files(config["suites"]["ruler"]["source"], "suites.ruler.source.ref")
    if PASSAGES := config["suites"]["ruler"]["passages"]:
        RULER_FILES += own_files({"kind": "jsonl", "ref": PASSAGES}, "suites.ruler.passages")
    LONGBENCH = config["suites"]["longbench"]
    LONGBENCH_FILES = [
        file
        for file in (own_files(LONGBENCH["source"], "suites.longbench.source.ref") if LONGBENCH["source"] else [])
        if Path(file).stem in LONGBENCH["tasks"]
    ]
    if LONGBENCH["templates"]:
        LONGBENCH_FILES += own_files({"kind": "local", "ref": LONGBENCH["templates"]}, "suites.longbench.templates")
    HARNESS = config["harness"]
    HARNESS_FILES = own_files(HARNESS["local"]["source"], "harness.local.source.ref")
    # Without what Python leaves there as lm-eval imports the tasks' functions.
    INCLUDED = [
        file
        for file in (
            own_files({"kind": "local", "ref": HARNESS["include"]}, "harness.include") if HARNESS["include"] else []
        )
        if "__pycache__" not in Path(file).parts
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
# What decides nothing of the run that `all` makes.
OF_OTHER_TARGETS = ("variants", "tracking", "suites", "sweep", "harness", "peers", "serving", "paper")
SHARDS = [str(shard) for shard in range(config["saliency"]["shards"])]

# Snakemake looks for the file in the bucket, where it is not yet: without the check it gets there.
if workflow.storage_settings.default_storage_provider is not None:

    def ensure(path, non_empty):
        """In place of Snakemake's own: the path, unchecked."""
        return path


# For steps that use the whole machine. Without --cores (on a cluster) a profile sets their threads, and `workflow.cores`
# would raise. There a job is called with all cores of its node, and has to ask for what was submitted all the same.
ALL_CORES = (not workflow.remote_exec and workflow.resource_settings.cores) or 1
# For the long step that is not timed: on the CPU the whole machine, on a GPU that one's share, so that the others work.
GPU_SHARE = max(1, ALL_CORES // max(1, GPUS))

# The network fails now and then; a file on this machine does not.
MODEL_RETRIES = 2 if config["model"]["source"]["kind"] == "hub" else 0
LONGBENCH_RETRIES = 2 if (LONGBENCH["source"] or {}).get("kind") == "hub" else 0
TRAIN_RETRIES = 2 if config["data"]["train"]["source"]["kind"] == "hub" else 0
TEST_RETRIES = 2 if config["data"]["test"]["source"]["kind"] == "hub" else 0

# Read by every step (sdtp.pipeline.tracking); in the environment, since nothing about tracking may rerun a step.
os.environ.update(
    SDTP_RUN=config["run"],
    SDTP_EXPERIMENT=config["tracking"]["experiment"],
    SDTP_TRACKING_URI=config["tracking"]["uri"] or "",
)
# `start_tracking` says which it is; a job that a cluster runs inherits it.
os.environ.setdefault("SDTP_PARENT_RUN_FILE", f"{RESULTS}/{tracking.PARENT_FILE}")
# What the page of the paper names in its commands; where a configuration was read from reruns nothing either.
os.environ.update(
    SDTP_CONFIGURED=without_password(
        canonical_json(
            {
                "files": [os.path.relpath(path) for path in workflow.config_settings.configfiles],
                "overrides": dict(workflow.config_settings.config),
            }
        )
    )
)


def own_python(peer):
    """The Python of a peer that has an environment of its own: Snakemake's with `--sdm conda`, else that of `make PEER`.

    It goes into the environment of the jobs, since it must not rerun any.
    """
    by_snakemake = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    return "python" if by_snakemake else str(ROOT / f".venv-{peer}" / "bin" / "python")


def own_python_found(variable, name, peer):
    """A shell command that fails where the Python that `variable` names is not there, and says what makes it."""
    missing = f"{name} has an environment of its own, which is not there yet: make {peer}"
    return f'command -v "${variable}" > /dev/null || {{ echo "{missing}"; exit 1; }}'


def check_own_pythons():
    """Fails before hours of work that would end at a job whose environment of its own is not there."""
    if workflow.non_local_exec:
        return  # what a job finds where it runs, it says itself
    jobs = [job for job in workflow.dag.needrun_jobs() if "found" in job.rule.params.keys()]
    for command in sorted({job.params.found for job in jobs}):
        done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise WorkflowError(done.stdout.strip())


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
    return settings(*keys, *needed_keys([wildcards.method]))(wildcards)


def needed_keys(methods):
    """The keys of what methods are made from, beside the pruner: of all of them together, each once."""
    needed = frozenset().union(*map(names.needs, methods))
    return [key for need, keys in NEEDED_KEYS.items() if need in needed for key in keys]


# Where tokens are removed and which are protected; the ratios themselves are wildcards.
SCHEDULE = [
    "pruning.start",
    "pruning.step",
    "pruning.sinks",
    "pruning.local",
    "pruning.min_local",
]
# What `names.needs` names, as keys of the configuration.
NEEDED_KEYS = {
    "schedule": SCHEDULE,
    "seed": ["evaluation.seeds"],
    "labels": ["saliency.reduction", "saliency.target"],
    "layer": ["peers.layer"],
    "cache_keep": ["peers.cache_keep"],
}


def evaluated_pruner(wildcards):
    """The trained pruner, for the methods that use it: for `sdtp-tuned` the one tuned for the keep ratio."""
    if wildcards.method == names.TUNED:
        return f"<results>/tuned/{wildcards.keep_ratio}"
    return "<results>/pruner" if "pruner" in names.needs(wildcards.method) else []


# Keep ratios that `sdtp-tuned` can be asked for.
TUNED_RATIOS = sorted(
    {*KEEP_RATIOS, *(str(ratio) for block in ("suites", "harness") for ratio in config[block]["keep_ratios"])}
)


def tuning_checkpoint(wildcards, output):
    """What was measured so far, which a rerun takes over, and the tuning for another keep ratio what they share."""
    return str(Path(output.pruner).parents[1] / "checkpoints" / "tune" / f"{wildcards.keep_ratio}.jsonl")


def pruner_option(wildcards, input):
    """The command-line option for it."""
    return f"--pruner {input.pruner}" if input.get("pruner") else ""


def tuned_option(wildcards, input):
    """The command-line option of a timing job for the tuned pruner, which stands beside the trained one there."""
    return f"--tuned {input.tuned}" if input.get("tuned") else ""


def cells(methods, ratios):
    """Names of files of a kind, without suffix: of the unpruned model, and of each method at each keep ratio."""
    return [f"unpruned-{UNPRUNED_RATIO}", *(f"{method}-{ratio}" for method in methods for ratio in ratios)]


def evaluations(methods):
    """The files of evaluations: the unpruned model, and each of `methods` at each keep ratio."""
    return [f"<results>/evaluation/{cell}.jsonl" for cell in cells(methods, KEEP_RATIOS)]


# Of the trade-off: what one would use instead of the run's methods.
PEERS = [method for method in config["peers"]["methods"] if method not in METHODS]
# What a cache is compressed on top of is what that is compared with, whether or not the run has it.
if "sdtp" not in METHODS + PEERS and any(method.startswith("sdtp+") for method in METHODS + PEERS):
    PEERS.append("sdtp")
PRESSES = config["peers"]["kvpress"]
# At every keep ratio; the oracle's choice takes a backward pass, and no time is its own.
TIMED = [method for method in METHODS + PEERS if method != "oracle"]
# What compresses a cache on top of another method, and does so on top of the unpruned model too, to compare.
COMPRESSING = [f"unpruned+{rule}" for rule in names.RULES if f"sdtp+{rule}" in TIMED]


def timed_settings(methods):
    """Settings of a timing job: what none of its methods uses is not passed, and so reruns nothing."""
    keys = ["model.source", "model.dtype", "model.attention", "peers.prompt_tokens"]
    keys += [f"benchmark.{key}" for key in ("new_tokens", "repeats", "warmup")]
    return settings(*keys, *(key for key in needed_keys(methods) if key != "evaluation.seeds"))


def timed_files(wildcards):
    """The timings of all methods, each at each of its keep ratios."""
    arms = [(method, ratio) for method in [*TIMED, *(f"kvpress-{press}" for press in PRESSES)] for ratio in KEEP_RATIOS]
    arms += [(method, UNPRUNED_RATIO) for method in COMPRESSING]
    return [f"<results>/timings/{method}-{ratio}.json" for method, ratio in arms]


def tradeoff_evaluations(wildcards):
    """The evaluations of all methods, the oracle's too where the run has it."""
    found = evaluations(METHODS + PEERS + [f"kvpress-{press}" for press in PRESSES])
    return found + [f"<results>/evaluation/{method}-{UNPRUNED_RATIO}.jsonl" for method in COMPRESSING]


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


def training_launcher(wildcards, resources):
    """What starts the training once on each of several nodes, where a profile gives it some: `mpi: srun ...`."""
    return f"{resources.mpi} " if resources.get("mpi") else ""


def labels_part(variant):
    """What the saliency of a variant is made from beyond what all of them share."""
    return selected(VARIANTS[variant], ["pruning.start", "pruning.step", "saliency"])


def labels_of(variant):
    """A name for the saliency of a variant, by content: variants that need the same share it."""
    return digest(labels_part(variant))[:12]


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


def llmlingua_checkpoint(wildcards, output):
    """As `prediction_checkpoint`, of the prompts that LLMLingua-2 shortened."""
    name = f"{wildcards.suite}/llmlingua2-{wildcards.keep_ratio}.jsonl"
    return str(Path(output.rows).parents[2] / "checkpoints" / "predictions" / name)


def paper_inputs(wildcards):
    """What the page of the paper shows beside the run's own tables, as far as this configuration has it."""
    tables = [*SUITES, "harness", "stage-position", "stage-count", "tradeoff"]
    tables += ["cache-compression"] if COMPRESSING else []
    figures = ["tradeoff-suites", "tradeoff-suites-memory", *(one for suite in SUITES for one in SUITE_FIGURES[suite])]
    found = {table.replace("-", "_"): f"<results>/tables/{table}.csv" for table in tables}
    found["suite_scores"] = [f"<results>/suites/{suite}/scores/unpruned-{UNPRUNED_RATIO}.jsonl" for suite in SUITES]
    if config["paper"]["llmlingua"]:
        ratios = config["suites"]["keep_ratios"]
        found["llmlingua"] = [
            f"<results>/llmlingua/{suite}/scores-{ratio}.jsonl" for suite in SUITES for ratio in ratios
        ]
        found["llmlingua_examples"] = [
            f"<results>/llmlingua/{suite}/examples-{ratio}.jsonl" for suite in SUITES for ratio in ratios
        ]
        found["llmlingua_speeds"] = [f"<results>/llmlingua/speed-{ratio}.json" for ratio in ratios]
    return {**found, "figures": [f"<results>/figures/{figure}.svg" for figure in figures]}


def paper_options(wildcards, input):
    """The command-line options for them."""
    named = ("ruler", "longbench", "harness", "stage_position", "stage_count", "cache_compression", "tradeoff")
    several = ("suite_scores", "llmlingua", "llmlingua_examples", "llmlingua_speeds", "figures")
    return " ".join(f"--{name.replace('_', '-')} {input.get(name)}" for name in (*named, *several) if input.get(name))


# Tables to read with a program, a page to read, and a figure.
ABLATION_FILES = ["ablation.csv", "targets.csv", "ablation.md", "ablation.svg", "ablation.png"]


def scores(suite):
    """The scores of a suite: of the unpruned model, and of each method at each keep ratio."""
    own = cells(config["suites"]["methods"], config["suites"]["keep_ratios"])
    return [f"<results>/suites/{suite}/scores/{cell}.jsonl" for cell in own]


def predict_settings(wildcards):
    """Settings of one method's predictions: what it does not use is not passed, and so reruns nothing."""
    keys = ["model.dtype", "model.attention", "suites.batch_tokens"]
    return settings(*keys, *needed_keys([wildcards.method]))(wildcards)


def prediction_checkpoint(wildcards, output):
    """The predictions as they are made, which a rerun takes over: no output, since those are deleted before it."""
    suite, name = Path(output.rows).parents[1].name, Path(output.rows).name
    return str(Path(output.rows).parents[3] / "checkpoints" / "predictions" / suite / name)


def suite_files(wildcards):
    """What `snakemake suites` makes: LongBench only where its data are named."""
    tables = [f"<results>/tables/{suite}.csv" for suite in SUITES]
    figures = [figure for suite in SUITES for figure in SUITE_FIGURES[suite]]
    return [*tables, *(f"<results>/figures/{figure}.{kind}" for figure in figures for kind in ("svg", "png"))]


SUITES = ["ruler"] + (["longbench"] if LONGBENCH["source"] else [])
# The map of depth and length needs the one task whose fact stands at a chosen depth.
SUITE_FIGURES = {
    "ruler": ["suite-ruler"] + (["ruler-heatmap"] if "single" in config["suites"]["ruler"]["tasks"] else []),
    "longbench": ["suite-longbench"],
}


def heat_map_option(wildcards, output):
    """The command-line option of the second figure of the RULER-style tasks."""
    return f"--heat-map {output.svg[1]}" if len(output.svg) > 1 else ""


# The project's own tasks of lm-eval, and the tries at others, whose data may be on a hub.
OWN_TASKS = [task for task in HARNESS["tasks"] if task in LOCAL_TASKS]
HARNESS_RETRIES = 2 if len(OWN_TASKS) < len(HARNESS["tasks"]) else 0


def harness_settings(wildcards):
    """Settings of one method's answers: what it does not use is not passed, and so reruns nothing."""
    keys = [f"harness.{key}" for key in ("tasks", "fewshot", "limit", "batch_size")]
    return settings("model.dtype", "model.attention", *keys, *needed_keys([wildcards.method]))(wildcards)


def harness_checkpoint(wildcards, output):
    """As `prediction_checkpoint`, of the answers to multiple-choice questions."""
    return str(Path(output.rows).parents[1] / "checkpoints" / "harness" / Path(output.rows).name)


def own_tasks(wildcards):
    """The folder of the project's own tasks, where some of them are asked for."""
    return "<results>/harness/tasks" if OWN_TASKS else []


def task_folders(wildcards, input):
    """The command-line option for it and for the user's own folder."""
    folders = [*filter(None, [input.get("tasks")]), *filter(None, [HARNESS["include"]])]
    return f"--tasks {shlex.join(folders)}" if folders else ""


def harness_cells(wildcards):
    """The answers of the unpruned model, and of each method at each keep ratio."""
    return [f"<results>/harness/{cell}.jsonl" for cell in cells(HARNESS["methods"], HARNESS["keep_ratios"])]


def in_paths(swept_cells):
    """Cells of the sweeps as paths show them: layers of the stages, joined by dashes, and keep ratio."""
    return [("-".join(map(str, layers)), str(ratio)) for layers, ratio in swept_cells]


SWEEP = SweepSettings.from_mapping(config["sweep"])
POSITIONS = in_paths(position_cells(SWEEP))
COUNTS = in_paths(count_cells(SWEEP, PruningSettings.from_mapping(config["pruning"])))
# What decides the scorers of the sweeps: saliency is all they learn from.
SWEEP_TRAINING = [
    *(f"saliency.{key}" for key in config["saliency"] if key != "shards"),
    "training.label_epochs",
    "training.label_examples",
    "training.learning_rate",
    "training.width",
    "training.position",
    "training.question_rank",
    "training.neighbours",
    "training.recency",
    "training.weights.mse",
    "training.weights.rank",
    "sweep.layers",
    "sweep.counts",
]


def swept(swept_cells):
    """The evaluations of cells of the sweeps, none twice."""
    own = dict.fromkeys(swept_cells)
    return [f"<results>/sweep/evaluation/layers-{layers}-ratio-{ratio}.jsonl" for layers, ratio in own]


def swept_stages(wildcards):
    """The layers of a cell as arguments."""
    return wildcards.layers.replace("-", " ")


def placement_gpus(wildcards):
    """GPUs of a placement of the model; Snakemake gives no more than `--resources gpu=` allows."""
    return Placement.parse(wildcards.placement).devices


def announce():
    """Names every step before Snakemake decides which have to run: where none has, it says no more than that."""
    if workflow.is_main_process:
        steps = [rule.name for rule in workflow.rules if not rule.norun]
        logger.info(f"Checking the {len(steps)} steps of run {config['run']}: {', '.join(steps)}")


def start_tracking():
    """Opens the MLflow run that the steps' runs belong to."""
    if workflow.non_local_exec:
        try:
            check_shared(tracking_uri(Path(RESULTS), config["tracking"]["uri"]))
        except UserError as error:
            raise WorkflowError(str(error))
    parent_file = tracking.start_pipeline(
        Path(RESULTS),
        config,
        config["tracking"]["experiment"],
        config["tracking"]["uri"],
    )
    os.environ.update(SDTP_PARENT_RUN_FILE=str(parent_file))


def finish_tracking(status):
    """Closes it."""
    tracking.finish_pipeline(Path(RESULTS), status)
