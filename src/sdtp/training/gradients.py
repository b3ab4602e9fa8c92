"""The gradient of one batch of examples, which all processes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.training.backbone import is_sharded
from sdtp.training.examples import Example
from sdtp.training.objective import Weights, example_losses
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from sdtp.training.seeding import keyed_generator


def batch_gradient(
    gradients: torch.Tensor,
    model: PreTrainedModel,
    policy: MaskingPolicy,
    examples: Sequence[Example],
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
        weights: of the losses.
        step: optimizer steps done before this batch.
        batch_size: samples of the batch, on all processes together.
        seed: keys the order of the examples and the noise.
        processes: that share the batch.

    Returns:
        The losses of non-zero weight by name, and `loss`, their weighted sum; each the mean over the batch.

    Raises:
        UserError: a loss that is not finite, naming the example and the stage; or a gradient, naming example and step.
    """
    names = [*(name for name, weight in dataclasses.asdict(weights).items() if weight), "loss"]
    # A row a sample, filled in by the process that has it: a sum with zeros is exact, whatever the shares.
    table = torch.zeros(batch_size, len(names), dtype=torch.float64)
    gradients.zero_()
    lockstep = is_sharded(model)
    with processes.together(lockstep):
        for place, counts in processes.share(batch_size, lockstep):
            epoch, index = divmod(step * batch_size + place, len(examples))
            example = examples[epoch_order(seed, epoch, len(examples))[index]]
            losses = example_losses(model, policy, example, weights, (seed, epoch))
            (losses["loss"] / batch_size if counts else 0 * losses["loss"]).backward()
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


def epoch_order(seed: int, epoch: int, examples: int) -> list[int]:
    """The order of the examples in one epoch: a permutation that depends on (seed, epoch) alone."""
    return torch.randperm(examples, generator=keyed_generator(seed, epoch)).tolist()
