"""Independent slow paths: what peers keep, found from the attention of plain forwards, and what decoding sees of it.

Imports nothing of sdtp. Everything is one full forward in which dropped keys are hidden by a mask of each layer and
head; nothing is ever cached, compressed or removed.
"""

from __future__ import annotations

import contextlib

import torch

from tests.pruning.reference import additive, decoder_layers


def causal(tokens):
    """Bool [tokens, tokens]: the keys each query sees."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def run(model, ids, visible):
    """Logits [tokens, vocabulary] and per layer probabilities [heads, tokens, tokens] of a forward in eager attention.

    `visible`: per layer bool [heads or 1, tokens, tokens], True at keys that a query sees.
    """

    def before(mask):
        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": mask}

        return hook

    implementation = model.config._attn_implementation
    with contextlib.ExitStack() as cleanup:
        model.set_attn_implementation("eager")
        cleanup.callback(model.set_attn_implementation, implementation)
        for layer, allowed in zip(decoder_layers(model), visible, strict=True):
            mask = additive(allowed, model.dtype).transpose(0, 1)  # [1, heads or 1, queries, keys]
            cleanup.callback(layer.register_forward_pre_hook(before(mask), with_kwargs=True).remove)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True)
    return output.logits[0], [attention[0] for attention in output.attentions]


def choose(scores, keep, latest, kernel):
    """The columns to keep of a list of scores: the latest, and the best of the others, averaged over neighbours."""
    if keep >= len(scores):
        return list(range(len(scores)))
    before = len(scores) - latest
    reach = kernel // 2
    means = [sum(scores[max(0, i - reach) : min(before, i + reach + 1)]) / kernel for i in range(before)]
    best = sorted(range(before), key=lambda i: (-means[i], i))[: keep - latest]
    return sorted(best + list(range(before, len(scores))))


def received(probabilities, present, queries):
    """Per head a list of what each present key received from the last `queries` present tokens (None: all)."""
    asking = present if queries is None else present[-queries:]
    return [[sum(head[q, k].item() for q in asking) for k in present] for head in probabilities]


def mean_of(lists):
    """The mean of several lists of numbers, place by place."""
    return [sum(values) / len(values) for values in zip(*lists, strict=True)]


def hidden_but(model, tokens, present):
    """Per layer the causal mask [1, tokens, tokens] without the keys that are not in `present[layer]`."""
    masks = []
    for layer in range(model.config.num_hidden_layers):
        keys = torch.zeros(tokens, dtype=torch.bool)
        keys[present[layer]] = True
        masks.append((causal(tokens) & (keys | torch.eye(tokens, dtype=torch.bool)))[None])
    return masks


def compression(model, prompt, response, keep, latest, kernel, queries, present=None):
    """Logits of the response and the positions that each layer and KV head holds, when caches are compressed.

    `keep`, `latest`: of a layer, by the number of tokens it holds. `present`: per layer the tokens of the prompt that
    it holds in prefill; None for all.
    """
    config, length = model.config, len(prompt)
    present = present or [list(range(length))] * config.num_hidden_layers
    group = config.num_attention_heads // config.num_key_value_heads
    prefill = hidden_but(model, length, present)
    _, probabilities = run(model, prompt, prefill)
    held, visible = [], []
    for layer, tokens in enumerate(present):
        heads = received(probabilities[layer], tokens, queries)
        entries = keep(len(tokens))
        columns = [
            choose(mean_of(heads[head : head + group]), entries, latest(entries), kernel)
            for head in range(0, len(heads), group)
        ]
        held.append([[tokens[column] for column in row] for row in columns])
        mask = causal(length + len(response)).repeat(config.num_attention_heads, 1, 1)
        mask[:, :length, :length] = prefill[layer]
        mask[:, length:, :length] = False
        for head in range(config.num_attention_heads):
            mask[head, length:, held[layer][head // group]] = True
        visible.append(mask)
    logits, _ = run(model, prompt + response, visible)
    return logits[length - 1 : -1], held


def propagated(model, prompt, layer, tokens, latest, kernel, queries):
    """The tokens of the prompt that go on beyond a layer, by its attention over all heads."""
    everything = [list(range(len(prompt)))] * model.config.num_hidden_layers
    _, probabilities = run(model, prompt, hidden_but(model, len(prompt), everything))
    return choose(mean_of(received(probabilities[layer], everything[0], queries)), tokens, latest, kernel)


def gemfilter(model, prompt, response, layer, keep):
    """Logits of the response and the tokens selected by the products of the last query in a Llama-like layer."""
    length = len(prompt)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0]
        block = decoder_layers(model)[layer]
        attention, normed = block.self_attn, block.input_layernorm(states)
        dim = attention.head_dim
        theta = model.config.rope_parameters["rope_theta"]
        angles = torch.arange(length)[:, None].double() / theta ** (torch.arange(0, dim, 2).double() / dim)
        cos, sin = angles.cos(), angles.sin()  # [tokens, dim / 2]

        def rotated(projection, norm):
            heads = norm(projection(normed).unflatten(-1, (-1, dim)))  # [tokens, heads, dim]
            a, b = heads.unflatten(-1, (2, dim // 2)).unbind(-2)
            return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], dim=-1)

        norms = [getattr(attention, name, torch.nn.Identity()) for name in ("q_norm", "k_norm")]
        queries, keys = rotated(attention.q_proj, norms[0]), rotated(attention.k_proj, norms[1])
        group = queries.shape[1] // keys.shape[1]
        scores = [
            sum((queries[-1, head] @ keys[token, head // group]).item() for head in range(queries.shape[1]))
            for token in range(length)
        ]
        means = [sum(scores[max(0, i - 2) : i + 3]) / 5 for i in range(length)]
        best = sorted(range(length - 1), key=lambda i: (-means[i], i))[: keep - 1]
        selected = sorted([*best, length - 1])
        ids = [prompt[i] for i in selected] + response
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return logits[keep - 1 : -1], selected
