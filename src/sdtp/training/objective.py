"""What one example asks of the scorers: a forward of the frozen model under their masks, and its losses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse
from sdtp.training.policy import MaskingPolicy, PolicyTrace
from sdtp.training.response import response_cross_entropy, response_kl, response_logits
from sdtp.training.samplers import gumbel_noise


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the losses; a loss of weight zero is not computed.

    Attributes:
        ce: cross-entropy of the response under pruning.
        mse: squared error to standardised saliency, mean over stages.
        rank: pairwise ranking against saliency, mean over stages.
        kl: divergence of the response's distributions under pruning from the unpruned model's; costs one forward more.

    Raises:
        UserError: a negative weight, or none above 0.
    """

    ce: float
    mse: float
    rank: float
    kl: float = 0.0

    def __post_init__(self) -> None:
        weights = dataclasses.asdict(self)
        if not all(weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise UserError(f"training.weights is {weights}: numbers >= 0 are accepted, at least one of them above 0")


def masked_logits(
    model: PreTrainedModel, policy: MaskingPolicy, example: Example, noise_key: tuple[int, int] | None
) -> tuple[torch.Tensor, PolicyTrace]:
    """The model's prediction of the response under the policy's masks.

    Args:
        model: frozen causal LM.
        policy: decides and masks.
        example: its labels are not used.
        noise_key: (seed, epoch) of the Gumbel noise; None takes the highest scores.

    Returns:
        Logits [response_tokens, vocabulary] that predict the response, on the graph of the scores, and what the stages
        decided.

    Raises:
        UserError: what the policy raises, naming the example.
    """
    with _masked(model, policy, example, noise_key, gradient=True) as trace:
        return response_logits(model, example.prompt_ids, example.response_ids), trace


def masked_scores(
    model: PreTrainedModel, policy: MaskingPolicy, example: Example, noise_key: tuple[int, int] | None
) -> PolicyTrace:
    """What the stages decide, in a forward of the prompt without head and graph; as `masked_logits` in all else."""
    with _masked(model, policy, example, noise_key, gradient=False) as trace:
        decoder(model)(input_ids=example.prompt_ids[None].to(model.device), use_cache=False)
        return trace


@contextlib.contextmanager
def _masked(
    model: PreTrainedModel,
    policy: MaskingPolicy,
    example: Example,
    noise_key: tuple[int, int] | None,
    gradient: bool,
) -> Iterator[PolicyTrace]:
    """The policy on the model, under the example's noise; what it raises names the example."""
    noise = None
    if noise_key is not None:
        seed, epoch = noise_key

        def noise(stage: int, tokens: int) -> torch.Tensor:
            return gumbel_noise(seed, epoch, example.id, stage, tokens)

    try:
        with policy(model, len(example.prompt_ids), noise, gradient) as trace:
            yield trace
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
    parts: dict[str, list[torch.Tensor]] = {}
    if weights.ce or weights.kl:
        logits, trace = masked_logits(model, policy, example, noise_key)
        if weights.ce:
            parts["ce"] = [response_cross_entropy(logits, example.response_ids)]
        if weights.kl:
            with torch.no_grad():  # the same weights, without the masks
                unpruned = response_logits(model, example.prompt_ids, example.response_ids)
            parts["kl"] = [response_kl(logits, unpruned)]
    else:
        trace = masked_scores(model, policy, example, noise_key)
    for stage, (estimates, entering) in enumerate(zip(trace.estimates, trace.entering, strict=True)):
        label = example.saliency[stage].to(estimates.device)
        if weights.mse:
            # Standardised over the whole prompt: a token's label does not depend on which others are left.
            loss = standardised_mse(estimates[entering], standardise(label)[entering])
            parts.setdefault("mse", []).append(loss)
        if weights.rank:
            parts.setdefault("rank", []).append(pairwise_ranking(estimates[entering], label[entering]))
    for name, values in parts.items():
        for stage, value in enumerate(values):
            if not value.isfinite():
                where = "" if name in ("ce", "kl") else f" at stage {stage} (layer {policy.schedule.layers[stage]})"
                raise UserError(f"loss {name} of example {example.id!r}{where} is {value.item()}: training stopped")
    losses = {name: torch.stack(values).mean() for name, values in parts.items()}
    total = sum((getattr(weights, name) * loss for name, loss in losses.items()), torch.zeros(()))
    # The response's losses alone reach no score where nothing was masked: a sum of zeros keeps the backward possible.
    return {**losses, "loss": total + sum((0.0 * scores).sum() for scores in trace.scores)}
