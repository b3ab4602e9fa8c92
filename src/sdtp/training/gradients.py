"""The gradient of one batch of examples, which all processes share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.training.backbone import is_sharded
from sdtp.training.examples import Example
from sdtp.training.half import loss_scales
from sdtp.training.objective import Weights, example_losses
from sdtp.training.optimizer import flat_gradients
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from sdtp.training.seeding import keyed_generator

# Batches whose examples are sorted by length among them: with more, those of a batch are more alike; with fewer, chance
# has more to say about what comes together.
_WINDOW = 16


def batch_gradient(
    gradients: torch.Tensor,
    model: PreTrainedModel,
    policy: MaskingPolicy,
    examples: Sequence[Example],
    lengths: tuple[int, ...],
    weights: Weights,
    *,
    step: int,
    batch_size: int,
    seed: int,
    processes: Processes,
) -> dict[str, float]:
    """Fill in the gradient of a batch's mean loss; the same on every process.

    Samples are numbered through: the batch of step `s` has the samples `s * batch_size` and on, and sample `i` is in
    epoch `i // len(examples)`. Which processes there are changes no sample, no noise and nothing but rounding.

    Args:
        gradients: [weights], what `flat_gradients` gave for the scorer; what it held is dropped.
        model: frozen causal LM.
        policy: masks by the scorer.
        examples: all there are.
        lengths: tokens of each, prompt and response.
        weights: of the losses.
        step: optimizer steps done before this batch.
        batch_size: samples of the batch, on all processes together.
        seed: keys the order of the examples and the noise.
        processes: that share the batch.

    Returns:
        The losses of non-zero weight by name, and `loss`, their weighted sum; each the mean over the batch.

    Raises:
        UserError: a loss that is not finite, naming the example and the stage; or a gradient, naming example and step;
            or no memory left on the device, naming the example, its tokens and what needs less.
    """
    names = [*(name for name, weight in dataclasses.asdict(weights).items() if weight), "loss"]
    # A row a sample, filled in by the process that has it: a sum with zeros is exact, whatever the shares.
    table = torch.zeros(batch_size, len(names), dtype=torch.float64)
    gradients.zero_()
    lockstep = is_sharded(model)
    with processes.together(lockstep):
        for place, counts in processes.share(batch_size, lockstep):
            epoch, index = divmod(step * batch_size + place, len(examples))
            example = examples[epoch_order(seed, epoch, lengths, batch_size)[index]]
            share = batch_size if counts else None
            losses = _add_gradient(gradients, model, policy, example, weights, (seed, epoch), share, processes)
            # After each example: those before it in the share were found finite, so the fault is this one's.
            norm = gradients.norm()
            if not norm.isfinite():
                raise UserError(
                    f"the gradient of example {example.id!r} in step {step + 1} has norm {norm}: training stopped"
                )
            if counts:
                table[place] = torch.tensor([losses[name].item() for name in names], dtype=torch.float64)
    processes.add_up(gradients)
    table = table.to(processes.device)
    processes.add_up(table)
    return dict(zip(names, table.mean(0).tolist(), strict=True))


def try_longest(
    model: PreTrainedModel,
    policy: MaskingPolicy,
    examples: Sequence[Example],
    lengths: Sequence[tuple[int, int]],
    weights: Weights,
    *,
    seed: int,
    processes: Processes,
) -> None:
    """Compute the gradients that need the most memory once, on every process, and drop them.

    The order of the samples is random: what does not fit would else be met after hours, and again after each resume.
    Nothing that follows is changed, for all noise is keyed.

    Args:
        model, policy, examples, weights, seed, processes: see `batch_gradient`.
        lengths: of each example the tokens of prompt and response; the longest example is tried, and that with the
            longest response, whose logits take memory beside the states.

    Raises:
        UserError: see `batch_gradient`.
    """
    longest = max(range(len(lengths)), key=lambda index: sum(lengths[index]))
    answering = max(range(len(lengths)), key=lambda index: (lengths[index][1], lengths[index][0]))
    gradients = flat_gradients(policy.scorer)
    with processes.together(is_sharded(model)):
        for index in dict.fromkeys((longest, answering)):
            _add_gradient(gradients, model, policy, examples[index], weights, (seed, 0), 1, processes)
    policy.scorer.zero_grad()


def _add_gradient(
    gradients: torch.Tensor,
    model: PreTrainedModel,
    policy: MaskingPolicy,
    example: Example,
    weights: Weights,
    noise_key: tuple[int, int],
    share: int | None,
    processes: Processes,
) -> dict[str, torch.Tensor]:
    """The losses of an example, whose gradient is added to `gradients`: of one in `share`, or zeros for None."""
    scales = loss_scales(model.dtype)
    earlier = gradients.clone() if len(scales) > 1 else None
    try:
        for scale in scales:
            if earlier is not None:
                gradients.zero_()
            losses = example_losses(model, policy, example, weights, noise_key)
            (losses["loss"] * scale / share if share else 0 * losses["loss"]).backward()
            if earlier is None:
                break
            overflows = int(not gradients.div_(scale).isfinite().all())
            # In lockstep all try again or none.
            if not (processes.largest(overflows) if is_sharded(model) else overflows):
                break
    except torch.OutOfMemoryError as error:
        tokens = f"{len(example.prompt_ids)} prompt and {len(example.response_ids)} response tokens"
        less = "" if is_sharded(model) else "training.shard_model: true on several GPUs takes less, or "
        raise UserError(
            f"no memory was left on {model.device} for the forward and backward pass of example {example.id!r}, of "
            f"{tokens}: training.gradient_checkpointing: true takes a fraction of it; where that is set, "
            f"{less}a smaller data.max_tokens"
        ) from error
    if earlier is not None:
        gradients.add_(earlier)
    return losses


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def epoch_order(seed: int, epoch: int, lengths: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
    """The order of the examples in one epoch, a function of the arguments alone: each comes once.

    A step is over when the process with the longest example is, so those of a batch should be of like length. A random
    permutation is cut into windows of some batches, the examples of a window are sorted by length and cut into its
    batches, and these are shuffled. Examples at both ends of an epoch that share a batch with another epoch's stay as
    they were drawn.

    Args:
        seed, epoch: key of all that is random; an epoch begins with sample `epoch * len(lengths)`.
        lengths: tokens of each example.
        batch_size: samples of a batch.

    Returns:
        Places in `lengths`.
    """
    generator = keyed_generator(seed, epoch)
    drawn = torch.randperm(len(lengths), generator=generator).tolist()
    first = min(-epoch * len(drawn) % batch_size, len(drawn))  # those before it end a batch that is begun
    last = first + (len(drawn) - first) // batch_size * batch_size  # those from it on begin one
    order = drawn[:first]
    for start in range(first, last, _WINDOW * batch_size):
        window = sorted(drawn[start : min(start + _WINDOW * batch_size, last)], key=lengths.__getitem__)
        for batch in torch.randperm(len(window) // batch_size, generator=generator).tolist():
            order += window[batch * batch_size : (batch + 1) * batch_size]
    return (*order, *drawn[last:])
