"""The independent slow path: the unpruned graph with removed tokens hidden as keys. Imports nothing of sdtp."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def masked_logits(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, layers: tuple[int, ...], kept: list[torch.Tensor],
    prompt: int,
) -> torch.Tensor:  # fmt: skip
    """Logits [batch, tokens, vocabulary] of a forward over all tokens in which removed ones are hidden as keys.

    `ids` [batch, tokens] holds the padded prompt (its first `prompt` columns) and what followed; `real` [batch, tokens]
    is 1 at real tokens; `kept` is a trace: per stage [batch, max_kept] indices into the row's real prompt tokens,
    -1 = none.
    """
    batch, tokens = ids.shape
    positions = (real.cumsum(1) - 1).clamp_min(0)
    visible = [real.bool()] * model.config.num_hidden_layers
    for stage, layer in enumerate(layers):
        keys = real.bool().clone()
        for row in range(batch):
            survivors = set(kept[stage][row].tolist())
            for column in range(prompt):
                keys[row, column] &= positions[row, column].item() in survivors
        for later in range(layer, model.config.num_hidden_layers):
            visible[later] = keys
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    lowest = torch.finfo(model.dtype).min

    def hide(layer: int):  # type: ignore[no-untyped-def]
        def hook(module, args, kwargs):  # type: ignore[no-untyped-def]
            allowed = (causal & visible[layer][:, None, :])[:, None]
            kwargs["attention_mask"] = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, lowest)
            return args, kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(hide(layer), with_kwargs=True)
        for layer, module in enumerate(model.model.layers)
    ]
    implementation = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # eager takes its softmax in float32, whatever the dtype
    try:
        with torch.no_grad():
            return model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    finally:
        model.set_attn_implementation(implementation)
        for handle in handles:
            handle.remove()
