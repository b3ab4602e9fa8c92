from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtp.pruning import scorers, store
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.scoring import keep_scores

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3))
BUDGET = PruningSchedule.to_budget(8, 1, 3, 100)
SETTINGS, WEIGHTS = "pruner.json", "pruner.safetensors"


def learned() -> scorers.Learned:
    return scorers.Learned(16, 2, width=8)


def asking() -> scorers.Learned:
    return scorers.Learned(16, 2, width=8, position=True, question_rank=16, neighbours=2, recency=0.25)


@pytest.mark.parametrize("make", [learned, asking], ids=lambda make: make.__name__)
def test_a_learned_pruner_comes_back_bit_for_bit(tmp_path, make):
    scorer = make()
    store.save(tmp_path, SCHEDULE, scorer)
    schedule, back, trained_for = store.load(tmp_path)
    states = torch.randn(5, 16)
    assert schedule == SCHEDULE
    assert trained_for is None  # saved by hand
    assert isinstance(back, scorers.Learned)
    assert torch.equal(keep_scores(back, 1, states), keep_scores(scorer, 1, states))
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [SETTINGS, WEIGHTS]


def test_what_is_loaded_does_not_change_with_the_file(tmp_path):
    store.save(tmp_path, SCHEDULE, learned())
    back = store.load(tmp_path)[1]
    before = keep_scores(back, 0, torch.ones(1, 16))
    (tmp_path / WEIGHTS).write_bytes(bytes(len((tmp_path / WEIGHTS).read_bytes())))
    assert torch.equal(keep_scores(back, 0, torch.ones(1, 16)), before)


def test_loading_draws_no_random_numbers(tmp_path):
    store.save(tmp_path, SCHEDULE, learned())
    state = torch.get_rng_state()
    store.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_dtype_is_not_the_scorer_s(tmp_path, tiny_model):
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 500))
    states, positions, lengths = torch.randn(1, 500, 32), torch.arange(500)[None], torch.tensor([500])
    schedule = PruningSchedule((1, 3), (0.6, 0.3))
    scorer = scorers.Learned(32, 2, width=8, position=True, question_rank=8, neighbours=2, recency=0.3)
    TokenPruner(schedule, scorer).save_pretrained(tmp_path)

    def kept(pruner):
        with torch.no_grad(), pruner(model) as trace:
            model(ids)
        return list(trace.kept)

    with torch.no_grad():
        expected = kept(TokenPruner(schedule, scorer)), scorer(1, states, positions, lengths)
    torch.set_default_dtype(torch.bfloat16)  # as people do to load their models
    back = TokenPruner.from_pretrained(tmp_path)
    assert {weights.dtype for weights in back.scorer.parameters()} == {torch.float32}
    assert {weights.dtype for weights in scorers.Learned(32, 2, question_rank=8).parameters()} == {torch.float32}
    with torch.no_grad():
        found = back.scorer(1, states, positions, lengths)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected[1])
    assert all(torch.equal(one, other) for one, other in zip(kept(back), expected[0], strict=True))
    back.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, SETTINGS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("scorer", [scorers.Random(9), scorers.Recent(), scorers.HiddenNorm(), scorers.LastQuery()])
@pytest.mark.parametrize("schedule", [SCHEDULE, BUDGET, PruningSchedule((), ())], ids=["keep", "budget", "none"])
def test_baselines_come_back(tmp_path, scorer, schedule):
    store.save(tmp_path, schedule, scorer)
    assert store.load(tmp_path) == (schedule, scorer, None)


def test_the_model_a_pruner_was_trained_for_comes_back(tmp_path, tiny_model):
    model = tiny_model(hidden_size=16, dtype=torch.bfloat16)
    taken = fingerprint(model)
    store.save(tmp_path, SCHEDULE, learned(), taken)
    back = store.load(tmp_path)[2]
    assert back == taken
    back.check(model)
    text = (tmp_path / SETTINGS).read_text()
    assert len(text.splitlines()) < 100  # numbers side by side: for reading


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [
        (learned(), False),
        (asking(), True),
        (scorers.Random(), False),
        (scorers.Recent(), False),
        (scorers.HiddenNorm(), False),
        (scorers.LastQuery(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_settings_say_whether_the_question_decides(tmp_path, scorer, expected):
    store.save(tmp_path, SCHEDULE, scorer)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    assert settings["question_conditioned"] is expected
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "question_conditioned": not expected}))
    words = f"question_conditioned is {not expected}: it is {expected} of {type(scorer).__name__}"
    with pytest.raises(ValueError, match=words):
        store.load(tmp_path)


def test_labels_belong_to_one_response():
    assert scorers.Saliency(torch.zeros(2, 1, 4)).question_conditioned is True


class Narrower(scorers.Learned):
    """Scores that `Learned` would not give back."""


class Random:
    """Another scorer of a known name."""

    question_conditioned = False


@pytest.mark.parametrize("scorer", [scorers.Saliency(torch.zeros(2, 1, 4)), Narrower(16, 2), Random()])
def test_what_has_no_form_on_disk_is_refused(tmp_path, scorer):
    with pytest.raises(ValueError, match=f"{type(scorer).__name__} cannot be saved: accepted are Learned, Random"):
        store.save(tmp_path / "new", SCHEDULE, scorer)
    assert not (tmp_path / "new").exists()


def diverged() -> scorers.Learned:
    scorer = learned()
    scorer.mlps[1][0].weight.data[3, 2] = torch.inf
    return scorer


@pytest.mark.parametrize(
    ("schedule", "scorer", "words"),
    [
        (SCHEDULE, diverged(), r"tensor mlps\.1\.0\.weight holds values that are not finite"),
        (SCHEDULE, learned().half(), r"torch\.float16: torch\.float32 is needed"),
        (SCHEDULE, scorers.Learned(16, 3), r"scorer\.stages is 3, but the schedule has 2"),
        (SCHEDULE, scorers.Random(2**70), r"scorer\.seed is 1180591620717411303424: a finite number"),
        (PruningSchedule((1,), (0.5,), sinks=4.5), scorers.Recent(), r"schedule\.sinks is 4\.5: int is needed"),
        (SCHEDULE, scorers.Random(torch.ones(())), "cannot be saved: Object of type Tensor"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, schedule, scorer, words):
    with pytest.raises(ValueError, match=words):
        store.save(tmp_path / "new", schedule, scorer)
    assert not (tmp_path / "new").exists()


def test_one_pruner_replaces_another_whole(tmp_path):
    store.save(tmp_path, SCHEDULE, learned())
    store.save(tmp_path, BUDGET, scorers.Recent())
    assert [path.name for path in tmp_path.iterdir()] == [SETTINGS]
    assert store.load(tmp_path) == (BUDGET, scorers.Recent(), None)
    other = learned()
    store.save(tmp_path, SCHEDULE, other)
    assert torch.equal(store.load(tmp_path)[1].mlps[0][0].weight, other.mlps[0][0].weight)


@pytest.mark.parametrize("call", range(12))
@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
def test_a_crash_at_any_moment_leaves_no_mixture(tmp_path, monkeypatch, name, call):
    old, new = learned(), scorers.Learned(16, 1, width=8)
    store.save(tmp_path, SCHEDULE, old)
    calls = 0
    original = getattr(os, name)

    def crashing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            raise OSError("crash")
        return original(*args, **kwargs)

    with monkeypatch.context() as crash:
        crash.setattr(os, name, crashing)
        try:
            store.save(tmp_path, PruningSchedule((1,), (0.5,)), new)
        except OSError as error:
            assert str(error) == "crash"  # noqa: PT017
    try:
        schedule, scorer, _ = store.load(tmp_path)
    except FileNotFoundError as error:
        assert str(tmp_path / SETTINGS) in str(error)  # noqa: PT017
        return
    written = old if schedule == SCHEDULE else new
    assert torch.equal(scorer.mlps[0][0].weight, written.mlps[0][0].weight)


def damage_weights(change):
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def damage_settings(change):
    def damage(folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text())
        change(settings)
        (folder / SETTINGS).write_text(json.dumps(settings))

    return damage


def text(content: str | bytes):
    return lambda folder: (folder / SETTINGS).write_bytes(content if isinstance(content, bytes) else content.encode())


def shorten(name: str, length: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def replaced(old: str, new: str):
    def damage(folder: Path) -> None:
        before = (folder / SETTINGS).read_text()
        assert old in before
        (folder / SETTINGS).write_text(before.replace(old, new, 1))

    return damage


def folder_in_place_of(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def flip_header(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[20] ^= 0xFF
    (folder / WEIGHTS).write_bytes(content)


WEIGHT_FAULTS = {
    "missing": (damage_weights(lambda w: w.pop("mlps.0.0.weight")), "mlps.0.0.weight has shape missing"),
    "extra": (
        damage_weights(lambda w: w.update(extra=torch.zeros(1))),
        r"extra has shape \(1,\), expected none",
    ),
    "extra stage": (
        damage_weights(lambda w: w.update({"mlps.2.0.weight": torch.zeros(8, 16)})),
        r"tensor mlps\.2\.0\.weight has shape \(8, 16\), expected none",
    ),
    "no tensors": (damage_weights(lambda w: w.clear()), "has shape missing"),
    "wrong shape": (
        damage_weights(lambda w: w.update({"mlps.1.2.bias": torch.zeros(3)})),
        r"mlps\.1\.2\.bias has shape \(3,\), expected \(2,\)",
    ),
    "transposed": (
        damage_weights(lambda w: w.update({"mlps.1.0.weight": w["mlps.1.0.weight"].T.contiguous()})),
        r"has shape \(16, 8\), expected \(8, 16\)",
    ),
    "scalar": (damage_weights(lambda w: w.update({"mlps.1.2.bias": torch.zeros(())})), r"has shape \(\), expected"),
    "NaN": (
        damage_weights(lambda w: w["mlps.0.0.weight"][3, 4].fill_(torch.nan)),
        "mlps.0.0.weight holds .*finite",
    ),
    "inf": (damage_weights(lambda w: w["mlps.1.2.bias"][1].fill_(torch.inf)), "mlps.1.2.bias holds .*not finite"),
    "-inf": (damage_weights(lambda w: w["mlps.1.2.bias"][1].fill_(-torch.inf)), "mlps.1.2.bias holds .*not finite"),
    **{
        str(dtype): (
            damage_weights(lambda w, dtype=dtype: w.update({"mlps.0.2.bias": torch.ones(2).to(dtype)})),
            f"mlps.0.2.bias is of {dtype}: torch.float32 is needed",
        )
        for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "truncated tensors": (shorten(WEIGHTS, 1000), "not a whole safetensors file"),
    "truncated header": (shorten(WEIGHTS, 200), "not a whole safetensors file"),
    "truncated length": (shorten(WEIGHTS, 5), "not a whole safetensors file"),
    "empty": (shorten(WEIGHTS, 0), "not a whole safetensors file"),
    "longer": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0" * 64),
        "not a whole safetensors file",
    ),
    "corrupt header": (flip_header, "not a whole safetensors file"),
    "pickle": (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"a": 1})), "not a whole safetensors file"),
    "torch.save": (lambda f: torch.save({"a": torch.ones(2)}, f / WEIGHTS), "not a whole safetensors file"),
    "pointer": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "not a whole"),
    "folder": (folder_in_place_of(WEIGHTS), "is a folder: a file is needed"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_damaged_weights_are_named_with_their_fault(tmp_path, fault):
    damage, words = WEIGHT_FAULTS[fault]
    store.save(tmp_path, SCHEDULE, learned())
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        store.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / WEIGHTS}")


SETTING_FAULTS = {
    "other format": (damage_settings(lambda s: s.update(format=99)), "format is 99: 5 is accepted"),
    "old format": (damage_settings(lambda s: s.update(format=4)), "format is 4: 5 is accepted"),
    "format as float": (damage_settings(lambda s: s.update(format=5.0)), "format is 5.0: 5 is accepted"),
    "no format": (damage_settings(lambda s: s.pop("format")), "format is None"),
    "no schedule": (damage_settings(lambda s: s.pop("schedule")), r"keys \[.*'schedule'.* are needed"),
    "no scorer": (damage_settings(lambda s: s.pop("scorer")), r"keys .* are needed"),
    "no declaration": (
        damage_settings(lambda s: s.pop("question_conditioned")),
        "'question_conditioned'.* needed",
    ),
    "unknown key": (damage_settings(lambda s: s.update(ratio=0.5)), "keys .*'ratio'"),
    "declaration as int": (damage_settings(lambda s: s.update(question_conditioned=0)), "question_conditioned is 0"),
    "list": (text("[]"), "it holds a list: an object is needed"),
    "null": (text("null"), "it holds a NoneType"),
    "number": (text("2"), "it holds a int"),
    "string": (text('"Learned"'), "it holds a str"),
    "empty": (text(""), "Expecting value"),
    "truncated": (shorten(SETTINGS, 150), "line .* column"),
    "not JSON": (text("format: 2"), "Expecting value"),
    "no UTF-8": (text(b'{"format": "\xff"}'), "utf-8"),
    "pickle": (text(pickle.dumps({"format": 5})), "utf-8"),
    "deep": (text("[" * 100_000), "nested too deeply"),
    "key twice": (replaced('"format": 5', '"format": 5, "format": 5'), "a key stands twice among"),
    "NaN": (replaced("0.6", "NaN"), "it holds NaN: numbers must be finite"),
    "Infinity": (replaced("0.6", "-Infinity"), "it holds -Infinity: numbers must be finite"),
    "overflow": (replaced('"local": 0.1', '"local": 1e999'), r"schedule\.local is inf: a finite number"),
    "huge size": (replaced('"hidden_size": 16', f'"hidden_size": {10**12}'), r"scorer\.hidden_size is 10+: a size"),
    "huge int": (replaced('"hidden_size": 16', f'"hidden_size": {10**40}'), r"hidden_size is 10+: a finite number"),
    "huge int as float": (replaced('"local": 0.1', f'"local": {10**400}'), r"schedule\.local is 10+\.\.\.: a finite"),
    "endless int": (replaced('"hidden_size": 16', f'"hidden_size": 1{"0" * 5000}'), "4300 digits"),
    "huge stages": (replaced('"stages": 2', f'"stages": {10**9}'), "scorer.stages is 10+: a size up to"),
    "other stages": (replaced('"stages": 2', '"stages": 3'), "scorer.stages is 3, but the schedule has 2"),
    "no width": (replaced('"width": 8', '"width": 0'), "scorer.width is 0: a size up to"),
    "negative size": (replaced('"hidden_size": 16', '"hidden_size": -16'), "scorer.hidden_size is -16: a size up to"),
    "odd rank": (replaced('"question_rank": 0', '"question_rank": 12'), "question_rank is 12: a multiple of 8"),
    "negative rank": (replaced('"question_rank": 0', '"question_rank": -8'), "scorer.question_rank is -8: a size up"),
    "many neighbours": (replaced('"neighbours": 0', '"neighbours": 65'), "neighbours is 65: 0 to 64 is accepted"),
    "true neighbours": (replaced('"neighbours": 0', '"neighbours": true'), "scorer.neighbours is True"),
    "negative recency": (replaced('"recency": 0.0', '"recency": -0.5'), "recency is -0.5: a number of 0 or more"),
    "recency as text": (replaced('"recency": 0.0', '"recency": "0.5"'), "scorer.recency is '0.5'"),
    "int as bool": (replaced('"position": false', '"position": 0'), "scorer.position is 0: bool is needed"),
    "other inputs": (replaced('"position": false', '"position": true'), r"mlps\.0\.0\.weight has shape \(8, 16\)"),
    "bool as int": (replaced('"width": 8', '"width": true'), "scorer.width is True: int is needed"),
    "float as int": (replaced('"width": 8', '"width": 8.0'), "scorer.width is 8.0: int is needed"),
    "string as int": (replaced('"width": 8', '"width": "8"'), "scorer.width is '8': int is needed"),
    "null as int": (replaced('"width": 8', '"width": null'), "scorer.width is None: int is needed"),
    "list as int": (replaced('"width": 8', '"width": [8]'), r"scorer\.width is \[8\]: int is needed"),
    "scorer's key unknown": (damage_settings(lambda s: s["scorer"].update(depth=3)), "scorer has keys .*'depth'"),
    "scorer's key missing": (damage_settings(lambda s: s["scorer"].pop("width")), "scorer has keys"),
    "scorer as string": (damage_settings(lambda s: s.update(scorer="Learned")), "scorer is 'Learned': an object"),
    "scorer as list": (damage_settings(lambda s: s.update(scorer=["kind"])), r"scorer is \['kind'\]: an object with a"),
    "scorer without kind": (damage_settings(lambda s: s["scorer"].pop("kind")), "an object with a kind is needed"),
    "unknown kind": (damage_settings(lambda s: s["scorer"].update(kind="Oracle")), "scorer.kind is 'Oracle': accepted"),
    "kind as list": (damage_settings(lambda s: s["scorer"].update(kind=["Random"])), r"scorer\.kind is \['Random'\]"),
    "schedule as list": (damage_settings(lambda s: s.update(schedule=[1])), r"schedule is \[1\]: an object with"),
    "schedule's key unknown": (damage_settings(lambda s: s["schedule"].update(ratio=1)), "schedule has keys .*'ratio'"),
    "schedule's key missing": (damage_settings(lambda s: s["schedule"].pop("sinks")), "schedule has keys"),
    "layers as number": (damage_settings(lambda s: s["schedule"].update(layers=3)), "schedule.layers is 3: a list"),
    "layer as string": (
        damage_settings(lambda s: s["schedule"].update(layers=[1, "3"])),
        r"schedule\.layers\[1\] is '3': int is needed",
    ),
    "keep of another length": (damage_settings(lambda s: s["schedule"].update(keep=[0.5])), "one per layer"),
    "budget as string": (damage_settings(lambda s: s["schedule"].update(budget="9")), "schedule.budget is '9': int"),
    "other width": (damage_settings(lambda s: s["scorer"].update(width=4)), "has shape"),
    "fingerprint as list": (damage_settings(lambda s: s.update(fingerprint=[1])), r"fingerprint is \[1\]: an object"),
    "fingerprint null": (damage_settings(lambda s: s.update(fingerprint=None)), "fingerprint is None: an object"),
    "fingerprint's key missing": (damage_settings(lambda s: s["fingerprint"].pop("samples")), "fingerprint has keys"),
    "sample's value": (
        damage_settings(lambda s: s["fingerprint"]["samples"][1]["values"].__setitem__(2, "1")),
        r"fingerprint\.samples\[1\]\.values\[2\] is '1': float is needed",
    ),
    "fingerprint of another size": (
        damage_settings(lambda s: s["fingerprint"].update(hidden_size=32)),
        "fingerprint.hidden_size is 32, scorer.hidden_size is 16",
    ),
    "folder": (folder_in_place_of(SETTINGS), "is a folder: a file is needed"),
}


@pytest.mark.parametrize("fault", SETTING_FAULTS)
def test_damaged_settings_are_named_with_their_fault(tmp_path, tiny_model, fault):
    damage, words = SETTING_FAULTS[fault]
    store.save(tmp_path, SCHEDULE, learned(), fingerprint(tiny_model(hidden_size=16)))
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as caught:
        store.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "Random"}, r"scorer has keys \[\]: exactly \['seed'\] are accepted"),
        ({"kind": "Random", "seed": 1.5}, r"scorer\.seed is 1\.5: int is needed"),
        ({"kind": "Recent", "seed": 1}, r"scorer has keys \['seed'\]: exactly \[\] are accepted"),
    ],
)
def test_damaged_settings_of_a_baseline_are_named_with_their_fault(tmp_path, values, words):
    store.save(tmp_path, SCHEDULE, scorers.Random(3))
    damage_settings(lambda s: s.update(scorer=values))(tmp_path)
    with pytest.raises(ValueError, match=words):
        store.load(tmp_path)


def test_a_whole_number_stands_for_a_fraction(tmp_path):
    store.save(tmp_path, SCHEDULE, scorers.Recent())
    damage_settings(lambda s: s["schedule"].update(local=1, keep=[1, 0.5]))(tmp_path)
    schedule = store.load(tmp_path)[0]
    assert schedule == PruningSchedule((1, 3), (1.0, 0.5), local=1.0)
    assert type(schedule.local) is float


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/pruner\.json: there is no such file"):
        store.load(tmp_path / "nowhere")
    store.save(tmp_path, SCHEDULE, learned())
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"pruner\.safetensors: there is no such file"):
        store.load(tmp_path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    store.save(tmp_path, SCHEDULE, scorers.Recent())
    with pytest.raises(ValueError, match=r"pruner\.json is a file: the folder that holds pruner\.json is needed"):
        store.load(tmp_path / SETTINGS)
    for inside in (tmp_path / SETTINGS, tmp_path / SETTINGS / "deeper"):
        with pytest.raises(ValueError, match=r"is a file or inside one: a folder is needed"):
            store.save(inside, SCHEDULE, scorers.Recent())
