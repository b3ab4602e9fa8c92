"""Saliency against an independent autograd reference, and what it must leave alone."""

import gc
import hashlib

import pytest
import torch

from sdtp.errors import UserError
from sdtp.training.saliency import reduce, saliency

LAYERS = (1, 2, 3)


def ids(length, seed=0):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


def reference(model, prompt, response, layers, reduction, target):
    """The definition, written apart: full logits, gradients of every layer's input, no hook."""
    embedded = model.get_input_embeddings()(torch.cat([prompt, response])[None]).detach().requires_grad_(True)
    output = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
    for state in output.hidden_states:
        state.retain_grad()
    predicting = output.logits[0, len(prompt) - 1 : -1]
    if target == "loss":
        (-predicting.log_softmax(-1)[torch.arange(len(response)), response].mean()).backward()
    else:
        predicting[torch.arange(len(response)), response].mean().backward()
    rows = []
    for layer in layers:
        state = output.hidden_states[layer]  # entry l is what enters layer l
        product = (state.grad * state.detach())[0, : len(prompt)]
        rows.append(
            {"signed": product.sum(-1), "abs": product.sum(-1).abs(), "l2": product.pow(2).sum(-1).sqrt()}[reduction]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("reduction", ["abs", "signed", "l2"])
@pytest.mark.parametrize("target", ["loss", "logit"])
def test_saliency_is_that_of_an_independent_float64_reference(tiny_model, family, reduction, target):
    model = tiny_model(family, dtype=torch.float64)
    prompt, response = ids(23), ids(5, seed=1)
    expected = reference(model, prompt, response, LAYERS, reduction, target)
    found = saliency(model, prompt, response, LAYERS, reduction, target)
    assert found.shape == (3, 23)
    assert found.dtype == torch.float32
    assert found.grad_fn is None
    assert expected.abs().min(dim=1).values.max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-10)


def test_states_entering_a_layer_are_the_same_tensor_in_hooks_and_in_hidden_states(tiny_model):
    model = tiny_model()
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: seen.__setitem__(index, args[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    output = model(ids(9)[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for index in range(4):
        torch.testing.assert_close(seen[index], output.hidden_states[index], rtol=0, atol=0)
    # The last entry is past the final norm: no stage reads it.
    torch.testing.assert_close(model.lm_head(output.hidden_states[4]), output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_checkpointing_changes_nothing(tiny_model, family):
    model = tiny_model(family, attention_dropout=0.5)
    prompt, response = ids(23), ids(5, seed=1)
    plain = saliency(model, prompt, response, LAYERS)
    checkpointed = saliency(model, prompt, response, LAYERS, gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)
    assert (plain.sum(1) > 0.01).all()
    assert not model.is_activation_checkpointing
    assert not any(module.training for module in model.modules())


def test_checkpointing_recomputes_the_layers(tiny_model):
    model = tiny_model()
    calls = []
    model.model.layers[2].self_attn.register_forward_hook(lambda *_: calls.append(1))
    saliency(model, ids(8), ids(2), LAYERS)
    assert len(calls) == 1
    saliency(model, ids(8), ids(2), LAYERS, gradient_checkpointing=True)
    assert len(calls) == 3
    assert not model(ids(8)[None]).logits.requires_grad  # transformers' switch would leave a hook on the embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_an_error_not_zeros(tiny_model, checkpointing):
    with torch.no_grad(), pytest.raises(RuntimeError, match="no gradient reaches"):
        saliency(tiny_model(), ids(8), ids(2), LAYERS, gradient_checkpointing=checkpointing)


def test_a_detached_layer_is_named(tiny_model):
    model = tiny_model()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(RuntimeError, match="no gradient reaches"):
        saliency(model, ids(8), ids(2), (1, 2))


def test_non_finite_saliency_names_the_stage(tiny_model):
    model = tiny_model()
    # Layer 2's input overflows in the backward pass only: the forward pass is sound.
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient * torch.inf) and None
    )
    with pytest.raises(RuntimeError, match=r"layer [12] \(stage [01]\) is not finite"):
        saliency(model, ids(8), ids(2), (1, 2))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("signed", [0.0, 1.0, -2.0]), ("abs", [0.0, 1.0, 2.0]), ("l2", [18**0.5, 1.0, 2.0])],
)
def test_reductions_sum_with_signs_or_take_a_norm(reduction, expected):
    product = torch.tensor([[3.0, -3.0], [1.0, 0.0], [-2.0, 0.0]])
    gradient = torch.tensor([[1.5, -1.5], [0.5, 1.0], [2.0, 7.0]])
    hidden = product / gradient
    torch.testing.assert_close(reduce(gradient, hidden, reduction), torch.tensor(expected))
    # Gradient times input, not the gradient alone.
    torch.testing.assert_close(reduce(gradient, 2 * hidden, reduction), 2 * torch.tensor(expected))


def test_reduction_of_bfloat16_is_summed_in_float32():
    gradient = torch.ones(1, 4096, dtype=torch.bfloat16)
    hidden = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    assert reduce(gradient, hidden, "signed").item() == 4096 * 1.0078125


def weights_hash(model):
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_fifty_examples_leave_no_gradient_graph_or_tensor_behind(tiny_model):
    model = tiny_model().requires_grad_(True)  # saliency freezes it for the while, and thaws it again
    before = weights_hash(model)
    live = []
    for example in range(50):
        result = saliency(model, ids(64, example), ids(4, example), LAYERS)
        assert result.grad_fn is None
        assert not result.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        del result
        gc.collect()
        live.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert live[49] == live[1]
    assert weights_hash(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_below_the_first_stage_are_not_on_the_graph(tiny_model):
    model = tiny_model().requires_grad_(True)
    tracked = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    for checkpointing in (False, True):
        saliency(model, ids(8), ids(2), (2, 3), gradient_checkpointing=checkpointing)
        assert tracked == [False, False, True, True]
        tracked.clear()


def test_model_is_left_as_it_was_after_an_error(tiny_model):
    model = tiny_model().requires_grad_(True)
    with pytest.raises(IndexError):
        saliency(model, torch.tensor([1, 2, 4000]), ids(2), LAYERS, gradient_checkpointing=True)
    assert not model.is_activation_checkpointing
    assert not model.model.layers[0].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "saliency.reduction is 'max': one of abs, signed, l2"),
        ({"target": "kl"}, "saliency.target is 'kl': one of loss, logit"),
        ({"response_ids": torch.tensor([], dtype=torch.long)}, r"response_ids has shape \(0,\)"),
        ({"layers": (3, 1)}, r"layers is \[3, 1\]: ascending layers from 0 to 3"),
        ({"layers": (1, 4)}, r"layers is \[1, 4\]"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, change, message):
    arguments = {"prompt_ids": ids(8), "response_ids": ids(2), "layers": LAYERS, **change}
    with pytest.raises(UserError, match=message):
        saliency(tiny_model(), **arguments)


def test_training_mode_is_refused(tiny_model):
    with pytest.raises(UserError, match="training mode"):
        saliency(tiny_model().train(), ids(8), ids(2), LAYERS)
