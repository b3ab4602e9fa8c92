"""One example's losses."""

import pytest
import torch

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise
from sdtp.training.objective import Weights, example_losses
from sdtp.training.policy import MaskingPolicy, gumbel_noise

SCHEDULE = PruningSchedule((1, 3), (0.7, 0.4), sinks=1, local=0.1, min_local=2)
KEY = (5, 2)


def make_policy():
    return MaskingPolicy(SCHEDULE, Learned(32, SCHEDULE.stages, width=8), temperature=0.5)


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
    for scores, entering, label in zip(trace.scores, trace.entering, example.saliency, strict=True):
        mse += (scores[entering] - standardise(label)[entering]).square().mean() / 2
        rank += pairwise_ranking(scores[entering], label[entering]) / 2
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


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (1.0, float("nan"), 0.0)])
def test_weights_that_train_nothing_or_the_opposite_are_refused(weights):
    with pytest.raises(UserError, match=r"training\.weights is .*at least one of them above 0"):
        Weights(*weights)
