"""What a training is told: how long, how fast, on what."""

from __future__ import annotations

import dataclasses

from sdtp.training.objective import Weights


@dataclasses.dataclass(frozen=True)
class Options:
    """How long and how fast to train.

    Attributes:
        label_epochs: passes over stored states before the first step, on saliency alone (see `label_fit`); 0 for none.
        label_examples: the first so many examples take part in these; their states are held in the host's memory.
        steps: optimizer steps through the masked model, at most.
        batch_size: examples an optimizer step averages over, on all processes together; each runs its share one by one.
        learning_rate: peak of the cosine schedule with linear warm-up.
        temperature: of the relaxed masks and their noise, see `MaskingPolicy`.
        weights: of the losses.
        evaluate_every, checkpoint_every: in optimizer steps.
        patience: evaluations in a row without a lower held-out `kl` after which training stops; the scorer is then
            that of the best evaluation. 0 never stops and keeps the last.
        autocast: whether the model's matrix products run in bfloat16 whatever its dtype.
        gradient_checkpointing: whether decoder layers recompute their activations in the backward pass.
        seed: keys the order of the examples and the noise.
        sampler: how noise decides what stays, see `MaskingPolicy`.
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
    patience: int
    autocast: bool
    gradient_checkpointing: bool
    seed: int
    sampler: str
