"""What one example asks of the scorers: a forward of the frozen model under their masks, and its losses."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse
from sdtp.training.policy import MaskingPolicy, PolicyTrace, gumbel_noise
from sdtp.training.response import response_cross_entropy, response_logits


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the losses; a loss of weight zero is not computed.

    Attributes:
        ce: cross-entropy of the response under pruning.
        mse: squared error to standardised saliency, mean over stages.
        rank: pairwise ranking against saliency, mean over stages.

    Raises:
        UserError: a negative weight, or none above 0.
    """

    ce: float
    mse: float
    rank: float

    def __post_init__(self) -> None:
        weights = dataclasses.asdict(self)
        if not all(weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise UserError(f"training.weights is {weights}: numbers >= 0 are accepted, at least one of them above 0")


def masked_logits(
    model: PreTrainedModel,
    policy: MaskingPolicy,
    example: Example,
    noise_key: tuple[int, int] | None,
    gradient: bool = True,
) -> tuple[torch.Tensor, PolicyTrace]:
    """The model's prediction of the response under the policy's masks.

    Args:
        model: frozen causal LM.
        policy: decides and masks.
        example: its labels are not used.
        noise_key: (seed, epoch) of the Gumbel noise; None takes the highest scores.
        gradient: whether the logits are on the graph of the scores (see `MaskingPolicy`).

    Returns:
        Logits [response_tokens, vocabulary] that predict the response, and what the stages decided.

    Raises:
        UserError: what the policy raises, naming the example.
    """
    noise = None
    if noise_key is not None:
        seed, epoch = noise_key

        def noise(stage: int, tokens: int) -> torch.Tensor:
            return gumbel_noise(seed, epoch, example.id, stage, tokens)

    try:
        with policy(model, len(example.prompt_ids), noise, gradient) as trace:
            return response_logits(model, example.prompt_ids, example.response_ids), trace
    except UserError as error:
        raise UserError(f"example {example.id!r}: {error}") from error


def example_losses(
    model: PreTrainedModel, policy: MaskingPolicy, example: Example, weights: Weights, noise_key: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """The losses of one example under noise.

    Args:
        model, policy, example, noise_key: see `masked_logits`.
        weights: of the losses.

    Returns:
        Scalars by name: those of non-zero weight, and `loss`, their weighted sum, which is on the graph of the scores
        also where no stage has a choice.

    Raises:
        UserError: a score or loss that is not finite, naming example and stage.
    """
    logits, trace = masked_logits(model, policy, example, noise_key, gradient=weights.ce > 0)
    parts: dict[str, list[torch.Tensor]] = {}
    if weights.ce:
        parts["ce"] = [response_cross_entropy(logits, example.response_ids)]
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
                where = "" if name == "ce" else f" at stage {stage} (layer {policy.schedule.layers[stage]})"
                raise UserError(f"loss {name} of example {example.id!r}{where} is {value.item()}: training stopped")
    losses = {name: torch.stack(values).mean() for name, values in parts.items()}
    total = sum((getattr(weights, name) * loss for name, loss in losses.items()), torch.zeros(()))
    # Cross-entropy alone reaches no score where nothing was masked: a sum of zeros keeps the backward pass possible.
    return {**losses, "loss": total + sum((0.0 * scores).sum() for scores in trace.scores)}
