from __future__ import annotations

import pytest
import torch

from sdtp.pruning import scorers


def view(stage=0, positions=None, hidden=None):
    positions = torch.arange(6)[None] if positions is None else positions
    hidden = torch.zeros(*positions.shape, 4) if hidden is None else hidden
    return scorers.StageView(stage, 4, hidden, positions, positions.amax(1) + 1, lambda: torch.zeros(1))


def test_random_depends_on_seed_stage_and_position_alone():
    all_positions = torch.arange(5000)[None]
    scores = scorers.Random(3).score(view(1, all_positions))
    some = torch.tensor([[7, 99, 4321]])
    assert torch.equal(scorers.Random(3).score(view(1, some)), scores[:, some[0]])
    assert not torch.equal(scorers.Random(4).score(view(1, all_positions)), scores)
    assert not torch.equal(scorers.Random(3).score(view(2, all_positions)), scores)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", range(3))
def test_random_is_uniform_and_uncorrelated(seed, stage):
    scores = scorers.Random(seed).score(view(stage, torch.arange(20000)[None]))[0]
    assert scores.min() >= 0
    assert scores.max() < 1
    assert scores.mean().item() == pytest.approx(0.5, abs=0.01)
    assert scores.histc(10, 0, 1).min().item() > 1800
    other = scorers.Random(seed + 1).score(view(stage, torch.arange(20000)[None]))[0]
    for a, b in ((scores[:-1], scores[1:]), (scores, other)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 0.03


def test_recent_and_hidden_norm():
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]])
    positions = torch.tensor([[0, 5, 9]])
    assert scorers.Recent().score(view(0, positions)).tolist() == [[0, 5, 9]]
    assert scorers.HiddenNorm().score(view(0, positions, hidden)).tolist() == [[5, 1, 10]]


def test_learned_is_keep_minus_drop_and_blind_to_scale():
    scorer = scorers.Learned(4, 2, width=8)
    hidden = torch.randn(2, 3, 4)
    places = torch.arange(3).expand(2, 3), torch.tensor([3, 3])
    scores = scorer(1, hidden, *places)
    logits = scorer.mlps[1](hidden / hidden.square().mean(-1, keepdim=True).sqrt())
    assert torch.allclose(scores, logits[..., 0] - logits[..., 1], atol=1e-4)
    assert torch.allclose(scorer(1, hidden * 1000, *places), scores, atol=1e-4)
    assert scorer(1, hidden.to(torch.bfloat16), *places).dtype == torch.float32
    assert not torch.equal(scorer(0, hidden, *places), scores)


def test_saliency_reads_labels_by_original_position():
    labels = torch.tensor([[[0.0, 1, 2, 3, 4, 5]]])
    assert scorers.Saliency(labels).score(view(0, torch.tensor([[1, 4, 5]]))).tolist() == [[1, 4, 5]]
    with pytest.raises(ValueError, match="at least 8 tokens"):
        scorers.Saliency(labels).score(view(0, torch.tensor([[1, 7]])))
