"""Agreement of a scorer with saliency, by hand."""

import math

import pytest
import torch

from sdtp.training.agreement import stage_agreement
from sdtp.training.policy import PolicyTrace


def make_trace(scores, entering, protected, kept):
    return PolicyTrace(
        [torch.tensor(scores)], [torch.tensor(entering)], [torch.tensor(protected)], [torch.tensor(kept)]
    )


def test_only_the_tokens_a_stage_decides_on_count():
    # Of tokens 0 and 2..5 that enter, 0 and 5 are protected; 2 and 4 are chosen among 2, 3, 4.
    trace = make_trace(
        [9.0, 9.0, 3.0, 1.0, 2.0, -9.0], [0, 2, 3, 4, 5], [True, False, False, False, True], [0, 2, 4, 5]
    )
    saliency = torch.tensor([[0.0, 7.0, 5.0, 4.0, 3.0, 9.0]])
    # Pairs (2,3) agree; (2,4) agree; (3,4) do not: tau = (2 - 1) / 3. Saliency would have kept 2 and 3.
    tau, overlap = stage_agreement(trace, saliency)
    assert tau == pytest.approx(1 / 3)
    assert overlap == 0.5


def test_constant_scores_agree_with_nothing():
    trace = make_trace([0.0] * 4, [0, 1, 2, 3], [False] * 4, [0, 1])
    tau, overlap = stage_agreement(trace, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert tau == 0.0
    assert overlap == 0.0


def test_stages_without_a_choice_do_not_count():
    trace = make_trace([1.0, 2.0], [0, 1], [True, True], [0, 1])
    assert all(math.isnan(value) for value in stage_agreement(trace, torch.rand(1, 2)))
