"""The mistakes earlier implementations made, put in on purpose: the reference comparison must notice every one."""

from __future__ import annotations

import pytest
import torch

from sdtp.pruning import cache, layer_inputs, prefill, schedule, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pruning.reference import masked_logits, removal

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.32), sinks=2, local=0.1, min_local=8)


def compacted_positions(patch):
    """Survivors are renumbered 0, 1, 2, ... for the rotary embedding."""
    renumbered = lambda self, table, columns: tuple(part[:, : columns.shape[1]] for part in table)  # noqa: E731
    patch(layer_inputs.LayerInputs, "rotary", renumbered)


def floored_counts(patch):
    """The budget is cut instead of rounded."""
    patch(schedule, "round", int, raising=False)


def soft_scaled_states(patch):
    """Removed tokens stay, their states multiplied by a small number."""

    def scaled(self, stage, layer, hidden, cache):
        kept = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        kept[:, ::2] = True
        self.kept.append(kept.nonzero()[:, 1].reshape(hidden.shape[0], -1))
        return hidden * torch.where(kept, 1.0, 1e-3)[..., None]

    patch(prefill.Prefill, "_stage", scaled)


def dropped_padding(patch):
    """Layers after the first stage forget which slots of shorter rows are padding."""
    patch(prefill.PromptSlots, "valid", lambda self: None)


def candidates_counted(patch):
    """The first forward of `generate` is taken for prompt altogether."""
    original = prefill.Prefill.__init__
    patch(prefill.Prefill, "__init__", lambda self, *a: original(self, *a[:5], a[4][1], *a[6:]))


def window_over_surviving_slots(patch):
    """A sliding window counts the tokens that are left, not those that were."""

    def counted(self):
        return torch.arange(self.slots).expand_as(self.positions)

    patch(cache.PrunedLayer, "columns", property(counted))


def window_forgotten(patch):
    """Layers after the first stage attend to everything."""
    original = layer_inputs.LayerInputs.mask
    patch(layer_inputs.LayerInputs, "mask", lambda self, *args: original(self, *args[:-1], None))


def one_rotary_table(patch):
    """The first table cut serves all layers of a stage, whichever theirs is."""
    original = layer_inputs.LayerInputs.rotary

    def first(self, table, columns):
        self._sources.append(table)
        return original(self, self._sources[0], columns)

    patch(layer_inputs.LayerInputs, "rotary", first)


def state_kept_between_calls(patch):
    """What one forward made serves the next one too."""
    made = {}
    original = layer_inputs.LayerInputs.__init__

    def shared(self, config):
        original(self, config)
        self._made = made

    patch(layer_inputs.LayerInputs, "__init__", shared)


def unsorted_survivors(patch):
    """Survivors come in order of their scores."""
    original = prefill.select
    patch(prefill, "select", lambda *args: (original(*args)[0].flip(1), original(*args)[1]))


def blank_states(patch):
    """Scorers are handed zeros in place of the hidden states."""
    patch(prefill, "StageView", lambda a, b, hidden, *rest: scorers.StageView(a, b, torch.zeros_like(hidden), *rest))


def check(tiny_model):
    """Removal against hidden keys in a padded batch, counts against the schedule, prompt lookup against greedy.

    Then the survivors of a scorer that reads states against those of removal one layer at a time, and a generation of a
    model with two rotary tables and a sliding window, at every step.
    """
    model = tiny_model(dtype=torch.float64)
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
    model = tiny_model("gemma3", dtype=torch.float64)
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    with TokenPruner(SCHEDULE, scorers.Random(1))(model) as trace, torch.no_grad():
        output = model.generate(input_ids=ids[:1], max_new_tokens=8, **settings)
    everything = torch.ones_like(output.sequences)
    expected = masked_logits(model, output.sequences, everything, SCHEDULE.layers, trace.kept, prompt=40)
    assert (torch.stack(output.logits, 1) - expected[:, 39:47]).abs().max() <= 1e-6  # float32 rotary tables


def test_the_real_thing_passes(tiny_model):
    check(tiny_model)


@pytest.mark.parametrize(
    "mutant",
    [
        compacted_positions,
        floored_counts,
        soft_scaled_states,
        dropped_padding,
        candidates_counted,
        window_over_surviving_slots,
        window_forgotten,
        one_rotary_table,
        state_kept_between_calls,
        unsorted_survivors,
        blank_states,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_every_mutant_is_noticed(tiny_model, monkeypatch, mutant):
    mutant(monkeypatch.setattr)
    # Some run into a guard on the way; the others must be seen in what comes out.
    loud = {candidates_counted: ValueError, state_kept_between_calls: RuntimeError}
    with pytest.raises(loud.get(mutant, AssertionError)):
        check(tiny_model)
