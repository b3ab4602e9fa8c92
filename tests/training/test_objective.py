"""One example's losses."""

import pytest
import torch

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import objective
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise
from sdtp.training.objective import Weights, example_losses, masked_logits
from sdtp.training.policy import MaskingPolicy
from sdtp.training.response import response_logits
from sdtp.training.samplers import gumbel_noise

SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)
KEY = (5, 2)


def make_policy():
    return MaskingPolicy(SCHEDULE, Learned(32, SCHEDULE.stages, width=8, neighbours=1, recency=0.5), temperature=0.5)


def make_example(tokens):
    return Example("e", torch.randint(3, 128, (tokens,)), torch.randint(3, 128, (3,)), torch.rand(2, tokens))


def test_losses_run_over_the_tokens_entering_each_stage_under_keyed_noise(tiny_model):
    model, policy, example = tiny_model(), make_policy(), make_example(30)
    losses = example_losses(model, policy, example, Weights(2.0, 3.0, 5.0), KEY)
    with policy(model, 30, lambda stage, tokens: gumbel_noise(*KEY, "e", stage, tokens)) as trace:
        ids = torch.cat([example.prompt_ids, example.response_ids])[None]
        logits = model(ids, use_cache=False).logits[0]
    assert [len(entering) for entering in trace.entering] == [30, 21]
    own = logits[29:32].log_softmax(-1)[torch.arange(3), example.response_ids]
    mse, rank = torch.zeros(()), torch.zeros(())
    for estimates, entering, label in zip(trace.estimates, trace.entering, example.saliency, strict=True):
        mse += (estimates[entering] - standardise(label)[entering]).square().mean() / 2
        rank += pairwise_ranking(estimates[entering], label[entering]) / 2
    expected = {"ce": -own.mean(), "mse": mse, "rank": rank, "loss": -2 * own.mean() + 3 * mse + 5 * rank}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: loss.item() for name, loss in expected.items()}, rel=1e-5
    )


def test_a_prompt_too_short_for_a_choice_has_a_gradient_of_zero(tiny_model):
    policy = make_policy()
    loss = example_losses(tiny_model(), policy, make_example(3), Weights(1.0, 0.0, 0.0), KEY)["loss"]
    assert loss.item() > 0
    loss.backward()
    for parameter in policy.scorer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize(
    "weights",
    [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, -1.0)],
)
def test_weights_that_train_nothing_or_the_opposite_are_refused(weights):
    with pytest.raises(UserError, match=r"training\.weights is .*at least one of them above 0"):
        Weights(*weights)


def test_kl_is_that_from_the_same_model_without_masks(tiny_model):
    model, policy, example = tiny_model(), make_policy(), make_example(30)
    losses = example_losses(model, policy, example, Weights(ce=2.0, mse=0.0, rank=0.0, kl=3.0), KEY)
    assert losses.keys() == {"ce", "kl", "loss"}
    unpruned = response_logits(model, example.prompt_ids, example.response_ids).log_softmax(-1)
    pruned = masked_logits(model, policy, example, KEY)[0].log_softmax(-1)
    expected = (unpruned.exp() * (unpruned - pruned)).sum(-1).mean()
    assert losses["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["kl"].item() > 1e-3
    assert losses["loss"].item() == pytest.approx((2 * losses["ce"] + 3 * losses["kl"]).item(), rel=1e-6)
    gradients = torch.autograd.grad(losses["kl"], list(policy.scorer.parameters()))
    assert all(gradient.any() for gradient in gradients[::2])  # the weights of every stage
    assert not model.lm_head.weight.requires_grad


class Counted:
    """Forwards of a model's layers and calls of what a loss is made of."""

    def __init__(self, model, monkeypatch):
        self.tokens, self.heads, self.calls, self.graphs = [], [], [], []
        model.model.norm.register_forward_hook(
            lambda _, args, output: self.graphs.append((torch.is_grad_enabled(), output.requires_grad))
        )
        model.model.layers[0].register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[1]))
        model.lm_head.register_forward_hook(lambda _, args, output: self.heads.append(output.shape[1]))
        for name in ("response_cross_entropy", "response_kl", "standardised_mse", "pairwise_ranking", "standardise"):
            own = getattr(objective, name)
            monkeypatch.setattr(objective, name, self.counting(name, own))

    def counting(self, name, own):
        def call(*args):
            self.calls.append(name)
            return own(*args)

        return call


@pytest.mark.parametrize(
    ("weights", "calls", "tokens", "heads"),
    [
        (Weights(1.0, 0.0, 0.0), ["response_cross_entropy"], [32], [3]),  # without rank and MSE
        (Weights(1.0, 1.0, 0.0), ["response_cross_entropy", *["standardise", "standardised_mse"] * 2], [32], [3]),
        (Weights(0.0, 0.0, 0.0, kl=1.0), ["response_kl"], [32, 32], [3, 3]),  # the unpruned model runs as well
        (Weights(0.0, 0.0, 1.0), ["pairwise_ranking"] * 2, [30], []),  # scores need neither response nor head
    ],
)
def test_a_weight_of_zero_computes_nothing(tiny_model, monkeypatch, weights, calls, tokens, heads):
    model, policy, example = tiny_model(), make_policy(), make_example(30)
    counted = Counted(model, monkeypatch)
    losses = example_losses(model, policy, example, weights, KEY)
    assert sorted(counted.calls) == sorted(calls)
    assert counted.tokens == tokens
    assert counted.heads == heads
    # Labels alone: the masks are off the graph. The unpruned model is never on one.
    masked = bool(weights.ce or weights.kl)
    assert counted.graphs == [(True, masked), *[(False, False)] * bool(weights.kl)]
    losses["loss"].backward()
    assert all(mlp[0].weight.grad.any() for mlp in policy.scorer.mlps)


def test_labels_alone_have_the_losses_they_have_beside_the_response(tiny_model):
    """What is not run for them, the response and the head, has no part in them."""
    model, policy, example = tiny_model(), make_policy(), make_example(30)
    alone = example_losses(model, policy, example, Weights(0.0, 2.0, 3.0), KEY)
    beside = example_losses(model, policy, example, Weights(1.0, 2.0, 3.0), KEY)
    for name in ("mse", "rank"):
        torch.testing.assert_close(alone[name], beside[name])
    assert alone["loss"].item() == pytest.approx((beside["loss"] - beside["ce"]).item(), rel=1e-5)


@pytest.mark.parametrize("weights", [Weights(0.0, 0.0, 0.0, kl=1.0), Weights(1.0, 0.0, 0.0)])
def test_a_response_loss_that_is_not_finite_names_the_example(tiny_model, weights):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(UserError, match=r"loss (kl|ce) of example 'e' is nan: training stopped"):
        example_losses(model, make_policy(), make_example(30), weights, KEY)


@pytest.mark.parametrize("weights", [Weights(1.0, 0.0, 0.0, kl=1.0), Weights(0.0, 1.0, 0.0), Weights(0.0, 0.0, 1.0)])
@pytest.mark.parametrize("sampler", ["gumbel_topk", "gumbel_softmax"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16 model"])
def test_half_precision_gives_about_the_losses_and_gradients_of_float32(tiny_model, weights, sampler, how):
    """A scorer in float32 on states that were rounded to bfloat16, by 2^-9 of their size a few times in each layer.

    Such errors add up in quadrature: 2^-9 * sqrt(4 layers * 4 roundings) = 0.8% of a state. Losses are means over many
    and move by about a percent; a gradient, of as many parts that partly cancel, by a few percent of its length, so its
    cosine to float32's is 1 - 0.03^2 / 2 or more. All that where the same tokens stay, as they do here.
    """
    policy = MaskingPolicy(SCHEDULE, Learned(32, SCHEDULE.stages, width=8), 0.5, sampler)
    example = make_example(40)
    exact = tiny_model()
    model = exact if how == "autocast" else tiny_model(dtype=torch.bfloat16)
    parameters = list(policy.scorer.parameters())

    def run(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = example_losses(model, policy, example, weights, KEY)
            gradients = torch.autograd.grad(losses["loss"], parameters)
            kept = [positions.tolist() for positions in masked_logits(model, policy, example, KEY)[1].kept]
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        return losses, kept, torch.cat([gradient.flatten() for gradient in gradients])

    expected, choice, wanted = run(exact, False)
    found, same_choice, gradient = run(model, how == "autocast")
    assert same_choice == choice
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=0.02), name
    error = (gradient - wanted).norm() / wanted.norm()
    assert 1e-5 < error < 0.05  # the model did run in bfloat16
