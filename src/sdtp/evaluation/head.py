"""A causal LM's head alone: from a decoder's last hidden states to logits, by the model's own forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from sdtp.evaluation.shared_prefill import follow, prefill
from sdtp.pruning.adapter import decoder
from sdtp.pruning.overriding import overridden

# Roundings of the dtype, relative to the largest logit, within which two ways to the same logits are taken to agree: a
# product of matrices is summed in another order for another number of rows.
_ROUNDINGS = 4
_LEAST = 1e-5


class Head:
    """What a model makes of its decoder's last hidden states, which are after the final norm.

    The model's own forward does it, with the decoder's replaced for the moment by one that returns the states: whatever
    comes after the output embeddings (soft-capping, a scale of the logits) is done as the model does it. One token is
    run through the whole model first, to know what its decoder returns.

    Args:
        model: causal LM, eval mode, unhooked.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder = decoder(model)
        with recorded(self._decoder) as outputs, torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        self._kind: Any = type(outputs[0])

    @torch.inference_mode()
    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits [positions, vocabulary] in the model's dtype, on its device.

        Args:
            states: [positions, hidden] in the model's dtype, on any device.
        """
        device = self._model.device
        output = self._kind(last_hidden_state=states.to(device)[None])
        ids = torch.zeros(1, len(states), dtype=torch.long, device=device)
        with overridden(self._decoder, "forward", lambda *args, **kwargs: output):
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        return logits

    def check(self, states: torch.Tensor, logits: torch.Tensor) -> None:
        """Whether the head gives the logits that a whole forward gave.

        Args:
            states: [positions, hidden], of the forward.
            logits: [positions, vocabulary], its own.

        Raises:
            TypeError: it does not, so that the model computes its logits from something else too.
        """
        found = self(states)
        largest = float(logits.abs().max())
        off = float((found.float() - logits.float()).abs().max())
        if not off <= max(_LEAST, _ROUNDINGS * torch.finfo(logits.dtype).eps) * largest:
            raise TypeError(
                f"{type(self._model).__name__}: its head makes logits of the decoder's last hidden states that are off "
                f"by {off:.2g} from those of a whole forward, which reach {largest:.2g}: it has no head that can be "
                "run alone"
            )


@contextlib.contextmanager
def recorded(module: torch.nn.Module) -> Iterator[list[Any]]:
    """Inside, every output of the module is appended to the list that this gives."""
    outputs: list[Any] = []
    hook = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


@torch.inference_mode()
def response_states(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The last hidden states of the unpruned model that predict the tokens of each response, and their logits.

    As `teacher_forcing` runs it: one prefill, then the responses fed on its cache.

    Args:
        model: eval mode, unhooked.
        prompts, responses: token ids, at least one each; prompts of one length need no padding, and cost least.

    Returns:
        Of each response [response, hidden] and [response, vocabulary], in the model's dtype, on its device.

    Raises:
        ValueError: an empty prompt or response.
    """
    with recorded(decoder(model)) as outputs:
        prefilled = prefill(model, prompts)
        first = outputs.pop().last_hidden_state[:, -1:].clone()  # of the last token alone, so that the rest can go
        logits = follow(model, prefilled, range(len(prompts)), responses, last=True)
    # Responses of one token need no forward after the prefill.
    states = torch.cat([first, *(output.last_hidden_state for output in outputs)], dim=1)
    return [(own[: len(response)], of) for own, of, response in zip(states, logits, responses, strict=True)]
