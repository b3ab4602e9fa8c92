"""Stage 2: fits the learned scorers on the frozen model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import torch
import transformers
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.agreement import stage_agreement
from sdtp.training.checkpoints import Checkpoints, restore, snapshot
from sdtp.training.examples import Example, check_examples
from sdtp.training.label_fit import fit_labels, stage_states
from sdtp.training.objective import Weights, example_losses, masked_logits
from sdtp.training.optimizer import GRADIENT_CLIP, adamw
from sdtp.training.policy import MaskingPolicy
from sdtp.training.response import response_cross_entropy
from sdtp.training.seeding import keyed_generator

Log = Callable[[dict[str, float], int, str], None]

# Another version may compute other numbers: a checkpoint belongs to the one it was made with.
_LIBRARIES = {"torch": torch.__version__, "transformers": transformers.__version__}


@dataclasses.dataclass(frozen=True)
class Options:
    """How long and how fast to train.

    Attributes:
        label_epochs: passes over stored states before the first step, on saliency alone (see `label_fit`); 0 for none.
        label_examples: the first so many examples take part in these; their states are held in memory.
        steps: optimizer steps through the masked model.
        batch_size: examples an optimizer step averages over; they run one by one.
        learning_rate: peak of the cosine schedule with linear warm-up.
        temperature: of the relaxed masks and their noise, see `MaskingPolicy`.
        weights: of the losses.
        evaluate_every, checkpoint_every: in optimizer steps.
        seed: keys the order of the examples and the noise.
    """

    label_epochs: int
    label_examples: int
    steps: int
    batch_size: int
    learning_rate: float
    temperature: float
    weights: Weights
    evaluate_every: int
    checkpoint_every: int
    seed: int


def fit(
    model: PreTrainedModel,
    scorer: Learned,
    schedule: PruningSchedule,
    train: Sequence[Example],
    heldout: Sequence[Example],
    options: Options,
    log: Log,
    checkpoints: Path | None = None,
    inputs: str = "",
    on_checkpoint: Callable[[Path], None] | None = None,
) -> dict[str, float]:
    """Train the scorer in place; the model stays as it is.

    Every sample comes once an epoch, in an order that depends on (seed, epoch) alone. A run that was interrupted goes
    on from its newest checkpoint and, on the CPU, ends with the same bits as one that was not.

    Args:
        model: frozen causal LM in eval mode.
        scorer: initialised by the caller from a fixed seed.
        schedule: what pruning is trained for.
        train, heldout: examples; held-out ones may be none.
        options: see `Options`.
        log: `log(metrics, step, split)` with split "train" or "heldout", or "labels" where the step is an epoch; what a
            resumed run did before it was interrupted is logged again, so that the curve is whole.
        checkpoints: folder of the resume state; None keeps none.
        inputs: identifies the model, the examples with their labels, and the code; a checkpoint made with other inputs,
            settings, shapes or library versions is ignored.
        on_checkpoint: called with the folder of every checkpoint once it is whole.

    Returns:
        The last held-out metrics: `tau`, `overlap` and `ce` (see `evaluate`).

    Raises:
        UserError: nothing to train on; an example that `check_examples` refuses; a loss that is not finite, naming the
            example and the stage; a gradient that is not finite, naming the example and the step; or what `evaluate`
            raises.
    """
    if not train:
        raise UserError("there is no training example: data.train.examples must be at least 1")
    for examples in (train, heldout):
        check_examples(examples, schedule.layers, model.config.get_text_config().vocab_size)
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", mixed_precision="no", gradient_accumulation_steps=options.batch_size
    )
    # The states a scorer reads and its loss stay in float32 whatever the model's dtype, so weights do too.
    module, optimizer, rates = accelerator.prepare(scorer, *adamw(scorer, options.learning_rate, options.steps))
    policy = MaskingPolicy(schedule, module, options.temperature)

    history: list[tuple[dict[str, float], int, str]] = []

    def report(metrics: dict[str, float], step: int, split: str) -> None:
        history.append((metrics, step, split))
        log(metrics, step, split)

    def save() -> None:
        if store is not None:
            tensors, state = snapshot(scorer, optimizer, rates)
            saved = store.save(step, tensors, {**state, "history": history})
            if on_checkpoint is not None:
                on_checkpoint(saved)

    store = None if checkpoints is None else Checkpoints(checkpoints, _fingerprint(options, schedule, scorer, inputs))
    step = 0
    if store is not None and (found := store.load()) is not None:
        tensors, state = found
        step = state["step"]
        restore(scorer, optimizer, rates, tensors, state)
        for metrics, at, split in state["history"]:
            report(metrics, at, split)
    else:
        if store is not None:
            store.clear()
        _fit_labels(model, scorer, schedule, train, options, report)
        if heldout:
            report(evaluate(model, policy, heldout), 0, "heldout")
        save()
    progress = tqdm(initial=step, total=options.steps, desc="training", unit="step")
    while step < options.steps:
        sums: dict[str, float] = {}
        for sample in range(step * options.batch_size, (step + 1) * options.batch_size):
            epoch, index = divmod(sample, len(train))
            example = train[epoch_order(options.seed, epoch, len(train))[index]]
            with accelerator.accumulate(module):
                losses = example_losses(model, policy, example, options.weights, (options.seed, epoch))
                accelerator.backward(losses["loss"])
                _check_gradient(module, example, step + 1)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(module.parameters(), GRADIENT_CLIP)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item() / options.batch_size
        step += 1
        report({**sums, "gradient_norm": float(norm), "learning_rate": rates.get_last_lr()[0]}, step, "train")
        progress.update()
        progress.set_postfix(loss=f"{sums['loss']:.3f}")
        if heldout and (step % options.evaluate_every == 0 or step == options.steps):
            report(evaluate(model, policy, heldout), step, "heldout")
        if step % options.checkpoint_every == 0 or step == options.steps:
            save()
    progress.close()
    return next((metrics for metrics, _, split in reversed(history) if split == "heldout"), {})


def _fit_labels(
    model: PreTrainedModel,
    scorer: Learned,
    schedule: PruningSchedule,
    train: Sequence[Example],
    options: Options,
    report: Log,
) -> None:
    """The label epochs, if there are any and a loss that uses labels has a weight."""
    weights = options.weights
    if not options.label_epochs or not (weights.mse or weights.rank):
        return
    chosen = [train[index] for index in range(min(len(train), options.label_examples))]
    progress = tqdm(chosen, desc="states for saliency", unit="example")
    fit_labels(
        scorer,
        [stage_states(model, example.prompt_ids, schedule.layers) for example in progress],
        chosen,
        epochs=options.label_epochs,
        learning_rate=options.learning_rate,
        mse=weights.mse,
        rank=weights.rank,
        seed=options.seed,
        log=lambda loss, epoch: report({"loss": loss}, epoch, "labels"),
    )


def epoch_order(seed: int, epoch: int, examples: int) -> list[int]:
    """The order of the examples in one epoch: a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(examples, generator=keyed_generator(seed, epoch)).tolist()


def _check_gradient(module: torch.nn.Module, example: Example, step: int) -> None:
    # After each example: those before it in the batch were found finite, so the fault is this one's.
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not norm.isfinite():
        raise UserError(f"the gradient of example {example.id!r} in step {step} has norm {norm}: training stopped")


@torch.no_grad()
def evaluate(model: PreTrainedModel, policy: MaskingPolicy, examples: Sequence[Example]) -> dict[str, float]:
    """How a scorer does without noise.

    Returns:
        `tau`: Kendall rank correlation of scores and saliency over the tokens a stage decides on, mean over stages;
        `overlap`: the share of a stage's free choices that saliency would have made too; both the mean over the
        examples whose prompt leaves a stage a choice. `ce`: cross-entropy of the response under pruning, nats a token,
        the mean over all examples.

    Raises:
        UserError: no prompt leaves a stage a choice, so that there is nothing to agree on.
    """
    ces, taus, overlaps = [], [], []
    for example in tqdm(examples, desc="held-out", unit="example", leave=False):
        logits, trace = masked_logits(model, policy, example, None)
        ces.append(response_cross_entropy(logits, example.response_ids).item())
        tau, overlap = stage_agreement(trace, example.saliency)
        if not math.isnan(tau):
            taus.append(tau)
            overlaps.append(overlap)
    if not taus:
        longest = max(len(example.prompt_ids) for example in examples)
        raise UserError(
            f"no stage has a choice in any of the {len(examples)} held-out prompts, the longest of {longest} tokens: "
            "longer ones are accepted, or fewer protected tokens (pruning.sinks, pruning.local, pruning.min_local)"
        )
    return {"tau": fmean(taus), "overlap": fmean(overlaps), "ce": fmean(ces)}


def _fingerprint(options: Options, schedule: PruningSchedule, scorer: Learned, inputs: str) -> str:
    # How often to evaluate and checkpoint changes the history's rows, hence counts as well.
    described = {
        "options": dataclasses.asdict(options),
        "schedule": schedule.to_dict(),
        "scorer": {name: list(value.shape) for name, value in scorer.state_dict().items()},
        "inputs": inputs,
        "libraries": _LIBRARIES,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
