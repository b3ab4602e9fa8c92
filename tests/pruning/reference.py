"""Two independent slow paths: the unpruned graph with removed tokens hidden as keys, and removal one layer at a time.

Imports nothing of sdtp but the schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sdtp.pruning.schedule import PruningSchedule


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


def removal(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    prompt_tokens: int,
    schedule: PruningSchedule,
    score: Callable[[int, torch.Tensor, list[int]], torch.Tensor],
) -> tuple[torch.Tensor, list[list[int]], list[tuple[list[int], torch.Tensor]]]:
    """The meaning of pruning, layer by layer on gathered states: survivors keep position and order.

    Args:
        input_ids: [1, tokens] without padding, of which the first `prompt_tokens` are prompt.
        score: given a stage, the states [present, hidden] of the prompt tokens still present and their positions in
            the prompt, their scores [present].

    Returns:
        The normed states [survivors + rest, hidden] after the last layer, each stage's survivors, and what each stage
        saw: positions and states.
    """
    backbone = model.model
    hidden = backbone.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])
    prompt = list(range(prompt_tokens))
    counts = schedule.surviving(prompt_tokens)
    entering: list[tuple[list[int], torch.Tensor]] = []
    kept: list[list[int]] = []
    for index, layer in enumerate(backbone.layers):
        if index in schedule.layers:
            stage = schedule.layers.index(index)
            n = len(prompt)
            tail = schedule.protected_tail(n)
            values = score(stage, hidden[0, :n], prompt)
            entering.append((list(prompt), hidden[0, :n]))
            forced = [i for i in range(n) if prompt[i] < schedule.sinks or i >= n - tail]
            free = sorted((i for i in range(n) if i not in forced), key=lambda i: (-values[i].item(), i))
            chosen = sorted(forced + free[: counts[stage] - len(forced)])
            columns = torch.tensor(chosen + list(range(n, hidden.shape[1])))
            hidden, positions = hidden[:, columns], positions[columns]
            prompt = [prompt[i] for i in chosen]
            kept.append(prompt)
        length = hidden.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        rope = backbone.rotary_emb(hidden, position_ids=positions[None])
        hidden = layer(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=rope)
    return backbone.norm(hidden)[0], kept, entering
