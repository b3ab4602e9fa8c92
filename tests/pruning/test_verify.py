from __future__ import annotations

import pytest
import torch

from sdtp.pruning import prefill, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.verify import hidden_keys, mask_equals_removal
from tests.pruning.reference import masked_logits

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_pruning_passes(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids = torch.randint(3, 128, (1, 40))
    assert mask_equals_removal(model, TokenPruner(SCHEDULE, scorers.Random(1)), ids) <= 1e-12


def test_hidden_keys_equal_the_reference(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 128, (1, 20))
    kept = [torch.tensor([0, 1, 3, 5, 9, 13, 18, 19]), torch.tensor([0, 9, 19])]
    with hidden_keys(model, (1, 3), kept, 20), torch.no_grad():
        found = model(ids, use_cache=False).logits
    expected = masked_logits(model, ids, torch.ones_like(ids), (1, 3), [k[None] for k in kept], prompt=20)
    assert torch.allclose(found[:, kept[1]], expected[:, kept[1]], rtol=0, atol=1e-12)


def test_a_wrong_pruner_fails(tiny_model, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 128, (1, 40))
    # Compacted positions: survivors renumbered from 0, the commonest mistake of this kind of method.
    monkeypatch.setattr(
        prefill.LayerInputs, "rotary", lambda self, table, columns: tuple(p[:, : columns.shape[1]] for p in table)
    )
    assert mask_equals_removal(model, TokenPruner(SCHEDULE, scorers.Random(1)), ids) > 1e-3


def test_a_scorer_that_reads_the_cache_can_be_verified(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(3, 128, (1, 40))
    assert mask_equals_removal(model, TokenPruner(SCHEDULE, scorers.LastQuery()), ids) < 1e-9


def test_a_schedule_without_stages_is_refused(tiny_model):
    pruner = TokenPruner(PruningSchedule((), ()), scorers.Random())
    with pytest.raises(ValueError, match="no stages"):
        mask_equals_removal(tiny_model(), pruner, torch.ones(1, 5, dtype=torch.long))


def test_a_batch_is_refused(tiny_model):
    with pytest.raises(ValueError, match="2 rows"):
        mask_equals_removal(tiny_model(), TokenPruner(SCHEDULE, scorers.Random(1)), torch.ones(2, 5, dtype=torch.long))
