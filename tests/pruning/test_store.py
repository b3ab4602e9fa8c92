from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3))


def test_a_learned_pruner_comes_back_bit_for_bit(tmp_path):
    scorer = scorers.Learned(16, 2, width=8)
    TokenPruner(SCHEDULE, scorer).save_pretrained(tmp_path)
    back = TokenPruner.from_pretrained(tmp_path)
    states = torch.randn(5, 16)
    assert back.schedule == SCHEDULE
    assert torch.equal(back.scorer.keep_scores(1, states), scorer.keep_scores(1, states))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruner.json", "pruner.safetensors"]


@pytest.mark.parametrize("scorer", [scorers.Random(9), scorers.Recent(), scorers.HiddenNorm(), scorers.LastQuery()])
def test_baselines_come_back(tmp_path, scorer):
    TokenPruner(SCHEDULE, scorer).save_pretrained(tmp_path)
    assert TokenPruner.from_pretrained(tmp_path).scorer == scorer


def test_what_has_no_form_on_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Saliency cannot be saved"):
        TokenPruner(SCHEDULE, scorers.Saliency(torch.zeros(2, 1, 4))).save_pretrained(tmp_path)


def damage_weights(change):
    def damage(folder):
        weights = load_file(folder / "pruner.safetensors")
        change(weights)
        save_file(weights, folder / "pruner.safetensors")

    return damage


def damage_settings(change):
    def damage(folder):
        settings = json.loads((folder / "pruner.json").read_text())
        change(settings)
        (folder / "pruner.json").write_text(json.dumps(settings))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_weights(lambda w: w.pop("mlps.0.0.weight")), "mlps.0.0.weight has shape missing"),
        (damage_weights(lambda w: w.update(extra=torch.zeros(1))), "tensor extra"),
        (damage_weights(lambda w: w.update({"mlps.1.2.bias": torch.zeros(3)})), "mlps.1.2.bias has shape"),
        (damage_weights(lambda w: w["mlps.0.0.weight"].fill_(torch.nan)), "not finite"),
        (damage_settings(lambda s: s.update(format=99)), "format is 99"),
        (damage_settings(lambda s: s.pop("schedule")), "key 'schedule' is missing"),
        (damage_settings(lambda s: s["schedule"].update(keep=[0.5])), "one per layer"),
        (damage_settings(lambda s: s["scorer"].update(kind="Oracle")), "scorer.kind is 'Oracle'"),
        (damage_settings(lambda s: s["scorer"].update(width=4)), "has shape"),
        (lambda f: (f / "pruner.safetensors").write_bytes((f / "pruner.safetensors").read_bytes()[:200]), "whole"),
        (lambda f: (f / "pruner.json").write_text("{"), "pruner.json"),
    ],
)
def test_damaged_files_are_named_with_their_fault(tmp_path, damage, words):
    TokenPruner(SCHEDULE, scorers.Learned(16, 2, width=8)).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words):
        TokenPruner.from_pretrained(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TokenPruner.from_pretrained(tmp_path / "nowhere")
