"""The mistakes earlier implementations made, put in on purpose: the reference comparison must notice every one."""

from __future__ import annotations

import pytest
import torch

from sdtp.pruning import prefill, schedule, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pruning.reference import masked_logits, removal

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.32), sinks=2, local=0.1, min_local=8)


def compacted_positions(patch):
    """Survivors are renumbered 0, 1, 2, ... for the rotary embedding."""
    patch(prefill.LayerInputs, "rotary", lambda self, table, columns: tuple(p[:, : columns.shape[1]] for p in table))


def floored_counts(patch):
    """The budget is cut instead of rounded."""
    patch(schedule, "round", int, raising=False)


def soft_scaled_states(patch):
    """Removed tokens stay, their states multiplied by a small number."""

    def scaled(self, stage, layer, hidden, cache):
        kept = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        kept[:, ::2] = True
        self.trace.kept.append(kept.nonzero()[:, 1].reshape(hidden.shape[0], -1))
        return hidden * torch.where(kept, 1.0, 1e-3)[..., None]

    patch(prefill.Prefill, "_stage", scaled)


def dropped_padding(patch):
    """Layers after the first stage forget which slots of shorter rows are padding."""
    original = prefill.LayerInputs.mask
    patch(prefill.LayerInputs, "mask", lambda self, hidden, valid, *rest: original(self, hidden, None, *rest))


def candidates_counted(patch):
    """The first forward of `generate` is taken for prompt altogether."""
    original = prefill.Prefill.__init__
    patch(prefill.Prefill, "__init__", lambda self, *a: original(self, *a[:6], a[5][1], *a[7:]))


def unsorted_survivors(patch):
    """Survivors come in order of their scores."""
    original = prefill.select
    patch(prefill, "select", lambda *args: (original(*args)[0].flip(1), original(*args)[1]))


def blank_states(patch):
    """Scorers are handed zeros in place of the hidden states."""
    patch(prefill, "StageView", lambda a, b, hidden, *rest: scorers.StageView(a, b, torch.zeros_like(hidden), *rest))


def check(model):
    """Removal against hidden keys in a padded batch, counts against the schedule, prompt lookup against greedy.

    Last, the survivors of a scorer that reads states against those of removal one layer at a time.
    """
    ids = torch.randint(3, 128, (1, 10)).repeat(2, 4)
    real = torch.ones_like(ids)
    real[1, :6] = 0
    positions = (real.cumsum(1) - 1).clamp_min(0)
    with TokenPruner(SCHEDULE, scorers.Random(1))(model) as trace, torch.no_grad():
        logits = model(ids, attention_mask=real, position_ids=positions).logits[:, -3:]
        kept = [k.clone() for k in trace.kept]
        greedy = model.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
        lookup = model.generate(
            input_ids=ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, prompt_lookup_num_tokens=4
        )
    expected = masked_logits(model, ids, real, SCHEDULE.layers, kept, prompt=40)[:, -3:]
    assert (logits - expected).abs().max() <= 1e-9
    assert [(k >= 0).sum(1).tolist() for k in kept] == [[24, 20], [13, 11]]  # 0.6 and 0.32 of 40 and 34
    assert torch.equal(greedy, lookup)
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace, torch.no_grad():
        model(ids[:1])
        longest = removal(model, ids[:1], 40, SCHEDULE, lambda stage, hidden, prompt: hidden.norm(dim=-1))[1]
    assert [k[0].tolist() for k in trace.kept] == longest


def test_the_real_thing_passes(tiny_model):
    check(tiny_model(dtype=torch.float64))


@pytest.mark.parametrize(
    "mutant",
    [
        compacted_positions,
        floored_counts,
        soft_scaled_states,
        dropped_padding,
        candidates_counted,
        unsorted_survivors,
        blank_states,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_every_mutant_is_noticed(tiny_model, monkeypatch, mutant):
    model = tiny_model(dtype=torch.float64)
    mutant(monkeypatch.setattr)
    # Counted candidates run into the cache's own guard; the others must be seen in what comes out.
    with pytest.raises(ValueError if mutant is candidates_counted else AssertionError):
        check(model)
