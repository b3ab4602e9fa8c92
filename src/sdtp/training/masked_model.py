"""Has an unmodified model attend through key masks: by transformers' interface, or inside attention that has none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdtp.errors import UserError
from sdtp.pruning.adapter import architecture, attention_of
from sdtp.training.attention import AdditiveMasks, masked_key_attention, masked_softmax

NAME = "sdtp_masked_keys"

# The window of each attention module that was masked: not every family tells the attention function.
_WINDOWS: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()

# What the layers that run now share of their key mask.
_MASKS = AdditiveMasks()


@contextlib.contextmanager
def masked_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a decoder layer that is handed a key mask for its attention mask attends through it; others as before.

    Key masks are [1, 1, 1, tokens], see `masked_key_attention`; the layer's causal mask and window apply as well.
    Blocks may be nested. Backward passes that recompute layers have to run inside. What layers with the same key mask
    share, [1, 1, tokens, tokens], is made for the first of them and gone when one has another, and after the block.

    Models whose attention transformers can replace get one of its interface's attention functions. In others (BLOOM,
    Falcon) the one call of softmax or scaled_dot_product_attention is replaced while a layer's attention runs.

    Args:
        model: a causal LM that pruning supports.
    """
    parts = architecture(model)
    attentions: list[Any] = [attention_of(layer) for layer in parts.layers]
    with contextlib.ExitStack() as undo:
        undo.callback(_MASKS.clear)
        # Asked first: setting it where it cannot be set warns, each time.
        if model._can_set_attn_implementation():
            _WINDOWS.update(zip(attentions, parts.windows, strict=True))
            undo.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(NAME)
        else:
            for attention in attentions:
                _intercept(attention, undo)
        yield


def is_key_mask(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether an attention mask is one of ours: a number for each key, where transformers' have one for each pair."""
    return mask is not None and mask.ndim == 4 and mask.shape[2] == 1 and mask.is_floating_point()


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls: a key mask weighs keys, anything else is sdpa's."""
    softcap, sink = kwargs.get("softcap"), kwargs.get("s_aux")
    if kwargs.get("position_bias") is not None:
        raise UserError(f"{type(module).__name__} cannot be trained through: it adds a position_bias to its scores")
    if module not in _WINDOWS:
        raise UserError(f"{type(module).__name__} cannot be trained through: no decoder layer has it for its attention")
    window = _WINDOWS[module]
    plain = softcap is None and sink is None
    if plain and not is_key_mask(attention_mask):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = attention_mask if is_key_mask(attention_mask) else query.new_ones(1, 1, 1, key.shape[2])
    if plain:
        result = masked_key_attention(query, key, value, mask, scaling, window, _MASKS)
    else:
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        result = masked_softmax(scores, mask, window, sink) @ value
    return result.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _intercept(module: Any, undo: contextlib.ExitStack) -> None:
    """Wrap the forward of an attention module; `undo` unwraps it."""
    before = vars(module).get("forward")
    inner: Callable[..., Any] = module.forward

    @functools.wraps(inner)  # with its signature, by which a model's kind is known
    def forward(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if not is_key_mask(mask):
            return inner(*args, **kwargs)
        with _MaskedKernels(mask) as kernels:
            # The kernels know what is in the future; the module adds what it is given to its scores.
            output = inner(*args, **{**kwargs, "attention_mask": mask.new_zeros(())})
        if kernels.calls != 1:
            raise UserError(
                f"{type(module).__name__} cannot be trained through: its attention takes {kernels.calls} softmaxes, "
                "one is accepted"
            )
        return output

    def unwrap() -> None:
        del module.forward  # over the class's
        vars(module).update({} if before is None else {"forward": before})

    module.forward = forward
    undo.callback(unwrap)


class _MaskedKernels(TorchFunctionMode):
    """While active, what computes attention weights from scores does so under a key mask.

    Attributes:
        calls: how often it did.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.calls = 0
        self._replaced: dict[Any, Callable[..., torch.Tensor]] = {
            functional.softmax: self._softmax,
            torch.softmax: self._softmax,
            torch.Tensor.softmax: self._softmax,
            functional.scaled_dot_product_attention: self._attention,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or its replacement."""
        replacement = self._replaced.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return replacement(*args, **(kwargs or {}))

    def _softmax(self, scores: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), scores.dtype)
        if torch.promote_types(scores.dtype, dtype) != dtype:
            scores = scores.to(dtype)
        return masked_softmax(scores, self.mask, dtype=dtype)

    def _attention(self, *args: Any, scale: float | None = None, **kwargs: Any) -> torch.Tensor:
        query, key, value = args[:3]
        groups = query.shape[1] // key.shape[1]
        scaling = query.shape[-1] ** -0.5 if scale is None else scale
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return masked_key_attention(query, key, value, self.mask, scaling, masks=_MASKS)
