"""Stage 2: fits the learned scorers on the frozen model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.agreement import stage_agreement
from sdtp.training.checkpoints import Checkpoints, restore, snapshot
from sdtp.training.label_fit import fit_labels, stage_states
from sdtp.training.losses import pairwise_ranking, response_cross_entropy, standardise, standardised_mse
from sdtp.training.policy import MaskingPolicy, PolicyTrace, gumbel_noise

Log = Callable[[dict[str, float], int, str], None]

_WARMUP = 0.1  # of the steps, in which the learning rate rises linearly
_GRADIENT_CLIP = 1.0  # a single hidden key that attention wants badly can have an enormous gradient


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        id: names it in messages and keys its noise.
        prompt_ids: LongTensor [prompt_tokens].
        response_ids: LongTensor [response_tokens], at least one.
        saliency: [stages, prompt_tokens] float32, of the unpruned model.
    """

    id: str
    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    saliency: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the losses; a loss of weight zero is not computed.

    Attributes:
        ce: cross-entropy of the response under pruning.
        mse: squared error to standardised saliency, mean over stages.
        rank: pairwise ranking against saliency, mean over stages.
    """

    ce: float
    mse: float
    rank: float


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
        inputs: anything that identifies the inputs; a checkpoint made with other inputs, settings or shapes is ignored.
        on_checkpoint: called with the folder of every checkpoint once it is whole.

    Returns:
        The last held-out metrics: `tau`, `overlap` and `ce` (see `evaluate`).

    Raises:
        UserError: nothing to train on, or a loss that is not finite, naming the example and the stage.
    """
    if not train:
        raise UserError("there is no training example: data.train.examples must be at least 1")
    accelerator = Accelerator(
        cpu=model.device.type == "cpu", mixed_precision="no", gradient_accumulation_steps=options.batch_size
    )
    # The states a scorer reads and its loss stay in float32 whatever the model's dtype, so weights do too.
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=options.learning_rate, weight_decay=0.01)
    rates = get_cosine_schedule_with_warmup(optimizer, math.ceil(_WARMUP * options.steps), options.steps)
    module, optimizer, rates = accelerator.prepare(scorer, optimizer, rates)
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
                losses = _losses(model, policy, example, options, epoch)
                weights = dataclasses.asdict(options.weights)
                total = sum((weights[name] * loss for name, loss in losses.items()), torch.zeros(()))
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(module.parameters(), _GRADIENT_CLIP)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            for name, loss in {**losses, "loss": total}.items():
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
        [example.saliency for example in chosen],
        epochs=options.label_epochs,
        learning_rate=options.learning_rate,
        mse=weights.mse,
        rank=weights.rank,
        seed=options.seed,
        log=lambda loss, epoch: report({"loss": loss}, epoch, "labels"),
    )


def epoch_order(seed: int, epoch: int, examples: int) -> list[int]:
    """The order of the examples in one epoch: a permutation that depends on (seed, epoch) alone."""
    key = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    return torch.randperm(examples, generator=generator).tolist()


@torch.no_grad()
def evaluate(model: PreTrainedModel, policy: MaskingPolicy, examples: Sequence[Example]) -> dict[str, float]:
    """How a scorer does without noise, mean over the examples.

    Returns:
        `tau`: Kendall rank correlation of scores and saliency over the tokens a stage decides on, mean over stages;
        `overlap`: the share of a stage's free choices that saliency would have made too; `ce`: cross-entropy of the
        response under pruning, nats a token.
    """
    sums = {"tau": 0.0, "overlap": 0.0, "ce": 0.0}
    for example in tqdm(examples, desc="held-out", unit="example", leave=False):
        logits, trace = _forward(model, policy, example, None)
        tau, overlap = stage_agreement(trace, example.saliency)
        ce = response_cross_entropy(logits, example.response_ids.to(logits.device)).item()
        for name, value in {"tau": tau, "overlap": overlap, "ce": ce}.items():
            sums[name] += value / len(examples)
    return sums


def _forward(
    model: PreTrainedModel,
    policy: MaskingPolicy,
    example: Example,
    epoch: tuple[int, int] | None,
    gradient: bool = True,
) -> tuple[torch.Tensor, PolicyTrace]:
    """Logits [response_tokens, vocabulary] that predict the response under the masks, and what the stages decided."""
    noise = None
    if epoch is not None:
        seed, number = epoch

        def noise(stage: int, tokens: int) -> torch.Tensor:
            return gumbel_noise(seed, number, example.id, stage, tokens)

    # The last response token predicts nothing and need not run.
    ids = torch.cat([example.prompt_ids, example.response_ids[:-1]])[None].to(model.device)
    try:
        with policy(model, len(example.prompt_ids), noise, gradient) as trace:
            output = model(input_ids=ids, use_cache=False, logits_to_keep=len(example.response_ids))
    except UserError as error:
        raise UserError(f"example {example.id!r}: {error}") from error
    return output.logits[0], trace


def _losses(
    model: PreTrainedModel, policy: MaskingPolicy, example: Example, options: Options, epoch: int
) -> dict[str, torch.Tensor]:
    """The losses of non-zero weight for one example, by name.

    Raises:
        UserError: a label, score or loss that is not finite.
    """
    weights = options.weights
    layers = policy.schedule.layers
    for stage, label in enumerate(example.saliency):
        if not label.isfinite().all():
            where = f"stage {stage} (layer {layers[stage]})"
            raise UserError(f"saliency of example {example.id!r} at {where} is not finite")
    logits, trace = _forward(model, policy, example, (options.seed, epoch), gradient=weights.ce > 0)
    parts: dict[str, list[torch.Tensor]] = {}
    if weights.ce:
        parts["ce"] = [response_cross_entropy(logits, example.response_ids.to(logits.device))]
    for stage, (scores, entering) in enumerate(zip(trace.scores, trace.entering, strict=True)):
        label = example.saliency[stage].to(scores.device)
        if weights.mse:
            # Standardised over the whole prompt: a token's label does not depend on which others are left.
            loss = standardised_mse(scores[entering], standardise(label)[entering])
            parts.setdefault("mse", []).append(loss)
        if weights.rank:
            parts.setdefault("rank", []).append(pairwise_ranking(scores[entering], label[entering]))
    for name, values in parts.items():
        for stage, value in enumerate(values):
            if not value.isfinite():
                where = "" if name == "ce" else f" at stage {stage} (layer {layers[stage]})"
                raise UserError(f"loss {name} of example {example.id!r}{where} is {value.item()}: training stopped")
    return {name: torch.stack(values).mean() for name, values in parts.items()}


def _fingerprint(options: Options, schedule: PruningSchedule, scorer: Learned, inputs: str) -> str:
    # How often to evaluate and checkpoint changes the history's rows, hence counts as well.
    described = {
        "options": dataclasses.asdict(options),
        "schedule": schedule.to_dict(),
        "scorer": {name: list(value.shape) for name, value in scorer.state_dict().items()},
        "inputs": inputs,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
