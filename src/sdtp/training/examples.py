"""What the scorers are trained on, checked before anything is computed from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from tqdm.auto import tqdm

from sdtp.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of the training or the held-out split.

    Attributes:
        id: names it in messages and keys its noise.
        prompt_ids: LongTensor [prompt_tokens], at least one.
        response_ids: LongTensor [response_tokens], at least one.
        saliency: [stages, prompt_tokens] float32, of the unpruned model.
    """

    id: str
    prompt_ids: torch.Tensor
    response_ids: torch.Tensor
    saliency: torch.Tensor


def check_examples(
    examples: Iterable[Example], layers: Sequence[int], vocabulary: int, progress: bool = True
) -> list[tuple[int, int]]:
    """Refuse what would train on something else than meant, or fail far from its cause.

    Args:
        examples: each is read once.
        layers: the stages' decoder layers.
        vocabulary: number of token ids the model knows.
        progress: whether to show it.

    Returns:
        Of each example, the tokens of its prompt and of its response.

    Raises:
        UserError: naming the example: no token or one unknown to the model, saliency of other stages or another number
            of tokens, or saliency that is not finite.
    """
    lengths = []
    for example in tqdm(examples, desc="checking", unit="example", leave=False, disable=not progress):
        name = f"example {example.id!r}"
        for field, ids in (("prompt_ids", example.prompt_ids), ("response_ids", example.response_ids)):
            if ids.ndim != 1 or not len(ids):
                raise UserError(f"{name}: {field} has shape {tuple(ids.shape)}: [tokens], at least one, is accepted")
            for token in (int(ids.min()), int(ids.max())):
                if not 0 <= token < vocabulary:
                    raise UserError(f"{name}: {field} has token {token}: 0 to {vocabulary - 1} are accepted")
        found, needed = tuple(example.saliency.shape), (len(layers), len(example.prompt_ids))
        if found != needed:
            raise UserError(f"{name}: saliency has shape {found}: {needed} is accepted, [stages, prompt_tokens]")
        for stage, labels in enumerate(example.saliency):
            if not labels.isfinite().all():
                raise UserError(f"{name}: saliency of stage {stage} (layer {layers[stage]}) is not finite")
        lengths.append((len(example.prompt_ids), len(example.response_ids)))
    return lengths
