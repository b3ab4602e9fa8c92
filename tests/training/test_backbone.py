"""The frozen model recomputing its activations, or in mixed precision, and as it was afterwards."""

from __future__ import annotations

import contextlib

import pytest
import torch

from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.backbone import running
from sdtp.training.examples import Example
from sdtp.training.objective import Weights, example_losses
from sdtp.training.policy import MaskingPolicy

SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)


def gradients(model, *, autocast=False, recompute=False):
    """Loss and scorer gradients of one example, and how many bytes the forward pass saved for the backward pass."""
    torch.manual_seed(3)
    scorer = Learned(32, SCHEDULE.stages, width=8)
    example = Example("one", torch.arange(3, 103), torch.tensor([5, 6, 7]), torch.rand(2, 100))
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with running(model, 1, autocast=autocast, recompute=recompute):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = example_losses(model, MaskingPolicy(SCHEDULE, scorer), example, Weights(1.0, 1.0, 1.0), (0, 0))
        losses["loss"].backward()
    return losses["loss"].item(), [weight.grad for weight in scorer.parameters()], sum(saved.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_recomputing_gives_the_same_gradients_in_less_memory(tiny_model, family, attention):
    model = tiny_model(family, attention=attention)
    loss, expected, much = gradients(model)
    again, found, little = gradients(model, recompute=True)
    assert again == loss
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert little < 0.5 * much


def test_the_model_is_left_as_it_was(tiny_model):
    model = tiny_model()
    layers = model.model.layers
    layers[2].forward = layers[2].forward  # an instance's own, as offloading libraries set
    own = layers[2].forward
    with contextlib.suppress(KeyboardInterrupt), running(model, 1, autocast=True, recompute=True):
        assert "forward" not in vars(layers[0])  # below the first stage nothing is on the graph
        assert all("forward" in vars(layer) for layer in layers[1:])
        assert torch.is_autocast_enabled("cpu")
        raise KeyboardInterrupt
    assert [index for index, layer in enumerate(layers) if "forward" in vars(layer)] == [2]
    assert layers[2].forward is own
    assert not torch.is_autocast_enabled("cpu")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("recompute", [False, True])
def test_mixed_precision_is_close_and_not_equal(tiny_model, recompute):
    model = tiny_model()
    loss, expected, _ = gradients(model)
    rounded, found, _ = gradients(model, autocast=True, recompute=recompute)
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=2e-2)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98
