"""Trainings for one process or several: `torchrun several.py OUT_FOLDER SCENARIO...`.

`test_several_processes.py` starts it, and calls `train` itself for what one process gives.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import checkpoints, trainer
from sdtp.training.backbone import shard
from sdtp.training.examples import Example
from sdtp.training.objective import Weights
from sdtp.training.options import Options
from sdtp.training.processes import Processes
from sdtp.training.saliency import saliency
from tests.conftest import FAMILIES, TINY

SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)
OPTIONS = {
    "label_epochs": 0,
    "label_examples": 5,
    "steps": 4,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "temperature": 0.5,
    "weights": Weights(ce=1.0, mse=1.0, rank=1.0),
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "patience": 0,
    "autocast": False,
    "gradient_checkpointing": False,
    "seed": 1,
    "sampler": "gumbel_topk",
}
CE = Weights(ce=1.0, mse=0.0, rank=0.0)
# The losses of the default configuration, and every part that a scorer can have, with fewer channels to compare.
DEFAULT: dict[str, Any] = {
    "scorer": {"position": True, "question_rank": 8, "neighbours": 2, "recency": 0.25},
    "weights": Weights(ce=0.0, mse=0.1, rank=0.1, kl=1.0),
    "label_epochs": 2,
    "learning_rate": 5e-4,
    "temperature": 0.3,
    "batch_size": 3,
}
# What differs from OPTIONS; "sharded", "short" and "scorer" are about the model, the examples and the scorer. Five
# examples, three held out.
SCENARIOS: dict[str, dict[str, Any]] = {
    "even batches": {},
    "uneven batches": {"batch_size": 3},
    "fewer examples than processes": {"batch_size": 1, "steps": 6},
    "mixed precision": {"autocast": True, "batch_size": 3, "label_epochs": 1},
    "labels alone": {"label_epochs": 3, "steps": 1, "learning_rate": 1e-3},
    "patience": {"patience": 1, "evaluate_every": 1, "learning_rate": 0.3, "steps": 12},
    "sharded": {"sharded": True, "batch_size": 3, "label_epochs": 1},
    "sharded, mixed precision": {"sharded": True, "autocast": True, "batch_size": 3, "label_epochs": 1},
    "sharded, recomputing": {"sharded": True, "gradient_checkpointing": True, "batch_size": 3},
    # One of the two processes has a prompt that no stage prunes, and whose loss no score reaches.
    "sharded, cross-entropy": {"sharded": True, "short": True, "batch_size": 2, "weights": CE},
    "default losses and scorer": DEFAULT,
    "sharded, default losses and scorer": {**DEFAULT, "sharded": True},
}

# From which of its checkpoints a training goes on.
RESUMED = {"uneven batches": "step-00000002", "labels alone": "labels-00000002", "sharded": "labels-00000001"}


def make_model() -> Any:
    """A tiny Llama, frozen."""
    config_class, model_class, extra = FAMILIES["llama"]
    torch.manual_seed(1234)
    model = model_class(config_class(**{**TINY, **extra}, attn_implementation="sdpa"))
    return model.eval().requires_grad_(False)


def make_examples(model: Any, count: int, prefix: str) -> list[Example]:
    """Examples with prompts of 20 tokens and more."""
    generator = torch.Generator().manual_seed(len(prefix))
    examples = []
    for index in range(count):
        prompt = torch.randint(3, 128, (20 + index,), generator=generator)
        response = torch.randint(3, 128, (3,), generator=generator)
        labels = saliency(model, prompt, response, SCHEDULE.layers)
        examples.append(Example(f"{prefix}-{index}", prompt, response, labels))
    return examples


def cut(example: Example, tokens: int = 3) -> Example:
    """An example with the first tokens of its prompt alone, which the schedule protects whole."""
    labels = example.saliency[:, :tokens].contiguous()
    return Example(example.id, example.prompt_ids[:tokens], example.response_ids, labels)


def digest(model: Any) -> str:
    """Of all weights, whole ones."""
    values = (getattr(value, "full_tensor", lambda value=value: value)() for value in model.state_dict().values())
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def train(
    scenario: str, folder: Path | None = None, change: Callable[[Any, list[Example]], None] | None = None
) -> dict[str, Any]:
    """One training: the scorer it ends with, what it logged, and what became of the model."""
    changes = dict(SCENARIOS[scenario])
    sharded, short, inputs = changes.pop("sharded", False), changes.pop("short", False), changes.pop("scorer", {})
    model = make_model()
    examples, heldout = make_examples(model, 5, "train"), make_examples(model, 3, "held")
    if short:
        examples = [cut(examples[0]), *examples[1:4]]
    before = digest(model)
    processes = Processes(cpu=True)
    if sharded and processes.count > 1:
        if not processes.main:
            model.to("meta")  # as the train step loads it, where it has only the layers' shapes
        shard(model, processes)
    if change is not None:
        change(model, examples)
    torch.manual_seed(3)
    scorer = Learned(32, SCHEDULE.stages, width=8, **inputs)
    optimizers: list[torch.optim.Optimizer] = []
    make = trainer.adamw
    trainer.adamw = lambda *args: (optimizers.append((pair := make(*args))[0]), pair)[1]
    rows: list[Any] = []
    try:
        final = trainer.fit(
            model, scorer, SCHEDULE, examples, heldout, Options(**{**OPTIONS, **changes}),
            lambda metrics, step, split: rows.append((step, split, metrics)), folder,
        )  # fmt: skip
    finally:
        trainer.adamw = make
    held = {id(weight) for weight in scorer.parameters()}
    trained = [weight for one in optimizers for group in one.param_groups for weight in group["params"]]
    return {
        "scorer": scorer.state_dict(),
        "rows": rows,
        "final": final,
        "unchanged": digest(model) == before,
        "gradients": [name for name, weight in model.named_parameters() if weight.grad is not None],
        "foreign": len([weight for weight in trained if id(weight) not in held]),
        "optimizers": [sum(len(group["params"]) for group in one.param_groups) for one in optimizers],
        "layer_bytes": sum(
            getattr(weight, "to_local", lambda weight=weight: weight)().nbytes
            for weight in model.model.layers.parameters()
        ),
    }


def resumed(folder: Path, scenario: str, checkpoint: str) -> dict[str, Any]:
    """A training once more, from one of its checkpoints on, all of which are kept for once."""
    checkpoints._KEPT, trainer._SAVING = 99, 1e9
    train(scenario, folder)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (own,) = folder.iterdir()
        for path in checkpoints.Checkpoints(folder, own.name)._newest_first():
            if path.name == checkpoint:
                break
            shutil.rmtree(path)
    torch.distributed.barrier()
    return train(scenario, folder)


def refusal() -> str:
    """What each process raises where no held-out prompt leaves a stage a choice; the examples are all alike on both."""
    model = make_model()
    heldout = [cut(example) for example in make_examples(model, 3, "held")]
    try:
        trainer.fit(
            model, Learned(32, SCHEDULE.stages, width=8), SCHEDULE, make_examples(model, 2, "train"), heldout,
            Options(**OPTIONS), lambda metrics, step, split: None,
        )  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failure(rank: int) -> str:
    """What each process raises where the model of one gives NaN from the second example of its first batch on."""
    forwards = []
    # Two of each held-out example of its share, of which the first process has two and the other one; then the first.
    sound = 2 * (2 - rank) + 1

    def spoil(module: Any, args: Any, output: Any) -> Any:
        forwards.append(None)
        return output * torch.nan if len(forwards) > sound else None

    def change(model: Any, examples: list[Example]) -> None:
        if torch.distributed.get_rank() == rank:
            model.lm_head.register_forward_hook(spoil)

    try:
        train("even batches", change=change)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(out_folder: str, *scenarios: str) -> None:
    """Write what each scenario gave on this process."""
    rank = PartialState(cpu=True).process_index
    found: dict[str, Any] = {scenario: train(scenario) for scenario in scenarios}
    for scenario, checkpoint in RESUMED.items():
        found[f"{scenario}, resumed"] = resumed(Path(out_folder) / checkpoint, scenario, checkpoint)
    found["failures"] = [failure(0), failure(1)]
    found["refusal"] = refusal()
    torch.save(found, Path(out_folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
