"""Key masks in models of every kind: by transformers' attention interface, and in attention that has none."""

import logging
import weakref

import pytest
import torch
import yaml
from transformers import FalconConfig, FalconForCausalLM, Gemma2Config, Gemma2ForCausalLM

from sdtp.errors import UserError
from sdtp.pruning.adapter import architecture, attention_of
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import attention
from sdtp.training.backbone import running
from sdtp.training.masked_model import masked_attention
from sdtp.training.policy import MaskingPolicy
from sdtp.training.samplers import gumbel_noise
from tests.conftest import FAMILIES, TINY
from tests.pruning.reference import Float64Throughout, decoder_layers, masked_logits, stepwise_logits
from tests.verification.test_every_architecture import TABLE, make

N, R = 26, 4
SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=2, local=0.1, min_local=3)
TEMPERATURE = 0.5


def ids():
    return torch.randint(3, 128, (1, N + R), generator=torch.Generator().manual_seed(0))


def noise(stage, tokens):
    return gumbel_noise(0, 0, "a", stage, tokens).double()


def make_policy(model, sampler="gumbel_topk"):
    torch.manual_seed(7)
    scorer = Learned(architecture(model).config.hidden_size, 2, width=8).double()
    return MaskingPolicy(SCHEDULE, scorer, TEMPERATURE, sampler)


def falcon(attention="eager", **config):
    torch.manual_seed(1)
    config = FalconConfig(**TINY, new_decoder_architecture=False, alibi=False, attn_implementation=attention, **config)
    return FalconForCausalLM(config).double().eval().requires_grad_(False)


def any_model(tiny_model, family):
    if family.startswith("falcon"):
        _, attention, multi_query = family.split("-")
        return falcon(attention, multi_query=multi_query == "one")
    if family == "gemma2":  # a soft cap on scores, low enough to bite
        torch.manual_seed(1)
        config = Gemma2Config(
            **TINY, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.5, sliding_window=12
        )
        return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").double().eval().requires_grad_(False)
    return tiny_model(family, dtype=torch.float64)


INTERCEPTED = ["bloom", "falcon-eager-one", "falcon-sdpa-one", "falcon-eager-many", "falcon-sdpa-many"]
OWN_SCORES = ["gpt_oss", "gemma2"]  # sinks, a soft cap, and windows shorter than the prompt
WINDOWS = ["mistral_window", "gemma3", "phi3_window"]


@pytest.mark.parametrize("family", [*INTERCEPTED, *OWN_SCORES, *sorted(set(FAMILIES) - {"bloom", "gpt_oss"})])
def test_values_are_those_of_removal_in_every_family(tiny_model, family):
    model = any_model(tiny_model, family)
    with Float64Throughout():
        with make_policy(model)(model, N, noise) as trace:
            found = model(ids(), use_cache=False).logits[0]
        kept = [positions[None] for positions in trace.kept]
        assert [positions.shape[1] for positions in kept] == SCHEDULE.surviving(N)
        everything = torch.ones_like(ids())
        hidden = masked_logits(model, ids(), everything, SCHEDULE.layers, kept, N)[0]
        unpruned = model(ids(), use_cache=False).logits[0]
        rows = torch.tensor([*trace.kept[-1].tolist(), *range(N, N + R)])
        scale = max(1.0, hidden.abs().max().item())
        torch.testing.assert_close(found[rows], hidden[rows], rtol=0, atol=1e-9 * scale)
        if not family.startswith("falcon"):  # whose layers take an alibi of None
            # Keys and values physically gone from the caches, as a cache's reference knows how to.
            removed = stepwise_logits(model, ids(), everything, SCHEDULE.layers, kept, N)[0]
            torch.testing.assert_close(found[N - 1 :], removed, rtol=0, atol=1e-9 * scale)
        assert (found[rows] - unpruned[rows]).abs().max() > 1e-3 * scale


def weighed_loss(model, masks):
    """A loss of the response with token i weighed by masks[layer][i] as a key of that layer, by a bias on scores."""

    def bias(layer):
        row = torch.cat([masks.get(layer, torch.ones(N)).double(), torch.ones(R, dtype=torch.float64)])
        itself = torch.eye(N + R, dtype=torch.bool)
        weight = torch.where(itself, 1.0, row.expand(N + R, N + R))
        future = torch.ones(N + R, N + R, dtype=torch.bool).triu(1)
        return weight.clamp_min(1e-300).log().masked_fill(future, -torch.inf)[None, None]

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: (args, {**kwargs, "attention_mask": bias(layer)}), with_kwargs=True
        )
        for layer, module in enumerate(decoder_layers(model))
    ]
    try:
        return model(ids(), use_cache=False).logits[0, N - 1 :].logsumexp(-1).sum()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", ["bloom", "falcon-eager-one", "falcon-sdpa-many", "llama"])
def test_gradients_are_finite_differences_where_visible_and_slopes_where_hidden(tiny_model, family):
    """d loss / d mask of the last stage, at visible tokens; at hidden ones the loss's change to the first order.

    A single masked layer: bringing a token back changes one attention, whose output the rest of the model sees.
    """
    model = any_model(tiny_model, family)
    schedule = PruningSchedule((3,), (0.6,), sinks=2, local=0.0, min_local=3)
    scorer = Learned(32, 1, width=8).double()
    outputs = []
    with Float64Throughout():
        with MaskingPolicy(schedule, scorer, TEMPERATURE)(model, N, noise) as trace:
            hook = attention_of(decoder_layers(model)[3]).register_forward_hook(
                lambda module, args, output: outputs.append(output[0])
            )
            loss = model(ids(), use_cache=False).logits[0, N - 1 :].logsumexp(-1).sum()
            hook.remove()
        gradient, upstream = torch.autograd.grad(loss, (trace.scores[0], outputs[0]))
        kept, free = trace.kept[0].tolist(), list(range(2, N - 3))
        noisy = (trace.scores[0] + TEMPERATURE * noise(0, N)).detach()
        dropped = [i for i in free if i not in kept]
        cut = (max(noisy[i] for i in dropped) + min(noisy[i] for i in free if i in kept)) / 2
        sigmoid = torch.sigmoid((noisy - cut) / TEMPERATURE)
        straight_through = sigmoid * (1 - sigmoid) / TEMPERATURE
        hard = torch.tensor([float(i in kept) for i in range(N)], dtype=torch.float64)
        torch.testing.assert_close(loss.detach(), weighed_loss(model, {3: hard}), rtol=1e-9, atol=1e-9)
        step = 1e-6
        for token in [i for i in free if i in kept]:
            change = [hard.clone() for _ in range(2)]
            change[0][token] -= step
            change[1][token] += step
            low, high = (weighed_loss(model, {3: mask}) for mask in change)
            expected = (high - low) / (2 * step) * straight_through[token]
            assert gradient[token].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)
        for token in dropped:
            back = hard.clone()
            back[token] = 1
            hook = attention_of(decoder_layers(model)[3]).register_forward_hook(
                lambda module, args, output: outputs.append(output[0])
            )
            weighed_loss(model, {3: back})
            hook.remove()
            expected = ((outputs[-1] - outputs[0]) * upstream).sum() * straight_through[token]
            assert gradient[token].item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
        assert (gradient[dropped].abs() > 1e-6).sum() > len(dropped) // 2


@pytest.mark.parametrize("family", [*INTERCEPTED, *OWN_SCORES, *WINDOWS, "opt", "qwen3_moe"])
def test_the_loss_reaches_every_stage(tiny_model, family):
    model = any_model(tiny_model, family)
    policy = make_policy(model)
    with policy(model, N, lambda stage, n: noise(stage, n).float()) as trace:
        loss = model(ids(), use_cache=False).logits[0, N - 1 :].square().mean()
    for gradient in torch.autograd.grad(loss, trace.scores):
        free = gradient[2 : N - 3]
        assert gradient.isfinite().all()
        assert (free != 0).sum() > (0 if model.config.get_text_config().to_dict().get("sliding_window") else 5)
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("family", ["bloom", "falcon-sdpa-one", "llama", "gpt_oss"])
def test_the_model_is_as_it_was_afterwards_and_nothing_is_logged(tiny_model, family, caplog):
    model = any_model(tiny_model, family)
    before = model.config._attn_implementation
    plain = model(ids(), use_cache=False).logits
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # transformers' own does not reach the root
    try:
        with masked_attention(model), masked_attention(model):
            # Layers that are handed no key mask attend as before.
            torch.testing.assert_close(model(ids(), use_cache=False).logits, plain, rtol=0, atol=1e-6)
        with pytest.raises(ZeroDivisionError), masked_attention(model):
            1 / 0  # noqa: B018
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert model.config._attn_implementation == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(ids(), use_cache=False).logits, plain)


@pytest.mark.parametrize("family", ["bloom", "falcon-eager-many"])
def test_an_attention_forward_that_was_replaced_before_is_put_back(tiny_model, family):
    """As accelerate's offloading does."""
    model = any_model(tiny_model, family)
    module = attention_of(decoder_layers(model)[0])
    own, calls = module.forward, []

    def replaced(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    module.forward = replaced
    with masked_attention(model):
        model(ids(), use_cache=False)
    assert module.forward is replaced
    assert calls == [1]


@pytest.mark.parametrize("family", ["bloom", "falcon-sdpa-one", "llama", "gemma2", "mistral_window"])
def test_layers_computed_again_in_the_backward_pass_are_masked_again(tiny_model, family):
    model = any_model(tiny_model, family)
    gradients = []
    for recompute in (False, True):
        with running(model, 1, autocast=False, recompute=recompute):
            with make_policy(model)(model, N, lambda stage, n: noise(stage, n).float()) as trace:
                loss = model(ids(), use_cache=False).logits[0, N - 1 :].square().mean()
            gradients.append(torch.autograd.grad(loss, trace.scores))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)
        assert plain.any()


@pytest.mark.parametrize("family", ["llama", "falcon-sdpa-one", "gemma3", "mistral_window"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_matrix_of_all_tokens_is_made_once_a_stage_and_gone_after_it(tiny_model, monkeypatch, family, recompute):
    """Once for each window in it; of another stage none is left when it is made. Layers computed again make theirs."""
    model = any_model(tiny_model, family)
    made, left = [], []
    additive = attention._additive

    def watched(*args):
        left.append({id(one[0]) for one in made if one[1]() is not None} - {id(args[0])})
        result = additive(*args)
        made.append((args[0], weakref.ref(result), args[1]))
        return result

    monkeypatch.setattr(attention, "_additive", watched)
    windows = architecture(model).windows
    first, second = SCHEDULE.layers
    with running(model, first, autocast=False, recompute=recompute):
        with make_policy(model)(model, N, lambda stage, n: noise(stage, n).float()) as trace:
            loss = model(ids(), use_cache=False).logits[0, N - 1 :].square().mean()
        assert len(made) == len(set(windows[first:second])) + len(set(windows[second:]))
        assert len({id(mask) for mask, *_ in made}) == 2
        assert [window for _, _, window in made[:1]] == [windows[first]]
        assert all(kept() is None for _, kept, _ in made)
        made.clear()
        torch.autograd.grad(loss, trace.scores)
    assert [window for _, _, window in made] == (list(windows[first:])[::-1] if recompute else [])
    assert all(kept() is None for _, kept, _ in made)
    assert not any(left)


@pytest.mark.parametrize(("family", "matrices"), [("bloom", 2), ("gpt_oss", 2), ("gemma2", 3), ("llama", 0)])
def test_attention_that_sdpa_cannot_serve_keeps_so_many_matrices_a_layer(tiny_model, family, matrices):
    """[heads, tokens, tokens] in the model's dtype, as docs/training.md counts them."""
    model = any_model(tiny_model, family).bfloat16()
    kept = {}

    def keep(tensor):
        if tensor.shape[-2:] == (N + R, N + R):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), make_policy(model)(model, N):
        model(ids(), use_cache=False)
    layers = model.config.num_hidden_layers - SCHEDULE.layers[0]
    size = 2 * model.config.num_attention_heads * (N + R) ** 2
    # In the first of these layers nothing but the mask is on the graph: it keeps its scores.
    expected = matrices * (layers - 1) + (matrices > 0)
    assert [tensor.untyped_storage().nbytes() for tensor in kept.values()] == [size] * expected


@pytest.mark.parametrize("softmaxes", [0, 2])
def test_attention_that_takes_another_number_of_softmaxes_is_refused(tiny_model, monkeypatch, softmaxes):
    model = tiny_model("bloom")
    kind = type(attention_of(decoder_layers(model)[0]))
    own = kind.forward

    def other(self, hidden_states, *args, **kwargs):
        if softmaxes == 0:
            return hidden_states, None
        own(self, hidden_states, *args, **kwargs)
        return own(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", other)
    policy = MaskingPolicy(SCHEDULE, Learned(32, 2, width=8))
    refused = pytest.raises(
        UserError, match=f"BloomAttention cannot be trained .* its attention takes {softmaxes} softm"
    )
    with refused, policy(model, N):
        model(ids(), use_cache=False)


@pytest.mark.parametrize("family", ["bloom", "mistral_window", "llama", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_refused_in_every_kind(tiny_model, family, side):
    model = tiny_model(family)
    mask = torch.ones(1, N + R, dtype=torch.long)
    mask[0, 0 if side == "left" else -1] = 0
    policy = MaskingPolicy(SCHEDULE, Learned(32, 2, width=8))
    with pytest.raises(UserError, match="one sequence without padding: layer 1 was handed"), policy(model, N):
        model(ids(), attention_mask=mask, use_cache=False)


KINDS = [kind for kind, outcome in yaml.safe_load(TABLE.read_text()).items() if outcome == "exact"]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [9, 30])  # below the window of those that have one, and above
def test_whatever_can_be_pruned_can_be_trained_for(tokens):
    """Every family of transformers that pruning supports: values of removal, a gradient for every stage."""
    assert len(KINDS) > 80
    for kind in KINDS:
        model = make(kind, "cpu").double().eval().requires_grad_(False)
        sequence = torch.randint(3, 128, (1, tokens + 2))
        with Float64Throughout():
            with make_policy(model)(model, tokens) as trace:
                found = model(sequence, use_cache=False).logits[0, tokens - 1 :]
            kept = [positions[None] for positions in trace.kept]
            expected = masked_logits_of_any(model, sequence, kept, tokens)
            unpruned = model(sequence, use_cache=False).logits[0, tokens - 1 :]
        scale = max(1.0, expected.abs().max().item())
        difference = (found - expected).abs().max().item()
        assert difference <= 1e-9 * scale, f"{kind}: {difference}"
        assert (found - unpruned).abs().max() > 1e-3 * scale, kind
        for gradient in torch.autograd.grad(found.square().mean(), trace.scores):
            assert gradient.isfinite().all(), kind
            assert gradient.any(), kind


def masked_logits_of_any(model, sequence, kept, tokens):
    from sdtp.verification.hidden_keys import masked_logits as of_any

    return of_any(model, sequence, SCHEDULE.layers, kept, tokens)[0, tokens - 1 :]
