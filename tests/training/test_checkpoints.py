"""Checkpoints: what is loaded is what was saved, and what is damaged gives way to the one before."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from sdtp.training.checkpoints import LABELS, STEPS, Checkpoints

FINGERPRINT = "ab" * 32
STATE = {
    "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "fused": None, "maximize": False, "params": [0, 1]}],
    "rates": {"last_epoch": 7, "_last_lr": [1e-320]},
    "history": [({"kl": math.nan, "tau": math.inf}, 0, "heldout"), ({"loss": 1 / 3}, 1, "train")],
    "tracking_run": "é",
}


@pytest.fixture
def store(tmp_path):
    """With the checkpoints of steps 1 and 2."""
    store = Checkpoints(tmp_path, FINGERPRINT)
    for step in (1, 2):
        store.save(STEPS, step, {"weight": torch.full((3,), float(step))}, STATE)
    return store


def test_what_is_loaded_is_what_was_saved(store):
    tensors, state = store.load()
    assert tensors.keys() == {"weight"}
    assert tensors["weight"].tolist() == [2.0, 2.0, 2.0]
    assert (state["part"], state["step"], state["fingerprint"]) == (STEPS, 2, FINGERPRINT)
    # As JSON has it: lists for tuples. NaN is no number that equals itself.
    assert repr({name: state[name] for name in STATE}) == repr(json.loads(json.dumps(STATE)))


def test_what_is_loaded_is_of_no_file(store):
    """A network file system keeps a folder with a mapped file, and a training holds what it loaded to its end."""
    held = store.load()
    mapped = Path("/proc/self/maps").read_text()
    assert str(store.folder) not in mapped
    for step in (3, 4):
        store.save(STEPS, step, {"weight": torch.zeros(3)}, STATE)
    assert held[0]["weight"].tolist() == [2.0, 2.0, 2.0]


def assert_gives_way(store, caplog, text):
    """With this text as the state of the newest checkpoint."""
    newest = store.folder / "step-00000002"
    (newest / "state.json").write_text(text)
    caplog.clear()
    tensors, state = store.load()
    assert (state["step"], tensors["weight"].tolist()) == (1, [1.0, 1.0, 1.0])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"checkpoint {newest} is damaged and not used: ")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[1]", "{}", "0", '"text"', "{", '{"fingerprint": "ab"}', '{"state_sha256": null}']
)
def test_a_state_that_is_none_gives_way_to_the_one_before(store, caplog, text):
    assert_gives_way(store, caplog, text)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_state_gives_way_to_the_one_before(store, caplog, share):
    text = (store.folder / "step-00000002" / "state.json").read_text()
    assert_gives_way(store, caplog, text[: int(share * len(text))])


def test_a_state_with_any_key_missing_gives_way_to_the_one_before(store, caplog):
    state = json.loads((store.folder / "step-00000002" / "state.json").read_text())
    assert state.keys() == {*STATE, "part", "step", "fingerprint", "tensors_sha256", "state_sha256"}
    for key in state:
        assert_gives_way(store, caplog, json.dumps({name: value for name, value in state.items() if name != key}))


def leaves(value, path=()):
    """Where a JSON value has what is neither an object nor a list."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))
    else:
        yield path


def test_a_state_with_any_value_edited_gives_way_to_the_one_before(store, caplog):
    state = json.loads((store.folder / "step-00000002" / "state.json").read_text())
    paths = list(leaves(state))
    assert ("groups", 0, "lr") in paths
    assert ("history", 1, 0, "loss") in paths
    for path in paths:
        edited = copy.deepcopy(state)
        at = edited
        for key in path[:-1]:
            at = at[key]
        value = at[path[-1]]
        # A bit of a number's last digit is enough.
        at[path[-1]] = math.nextafter(value, 1) if isinstance(value, float) and math.isfinite(value) else [value]
        assert_gives_way(store, caplog, json.dumps(edited))


@pytest.mark.parametrize("damage", ["flipped bit", "of another step", "none"])
def test_damaged_tensors_give_way_to_the_checkpoint_before(store, caplog, damage):
    path = store.folder / "step-00000002" / "state.safetensors"
    if damage == "flipped bit":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "of another step":
        path.write_bytes((store.folder / "step-00000001" / "state.safetensors").read_bytes())
    else:
        path.unlink()
    assert_gives_way(store, caplog, (path.parent / "state.json").read_text())


def test_where_all_steps_are_damaged_a_label_epoch_is_gone_on_from(tmp_path):
    store = Checkpoints(tmp_path, FINGERPRINT)
    for part in (LABELS, STEPS):
        store.save(part, 3, {"weight": torch.ones(1)}, STATE)
    assert store.load()[1]["part"] == STEPS
    (store.folder / "step-00000003" / "state.json").write_text("null")
    assert store.load()[1]["part"] == LABELS
    (store.folder / "labels-00000003" / "state.json").write_text("[]")
    assert store.load() is None


def test_a_whole_checkpoint_of_another_fingerprint_is_no_damage_and_not_used(store, caplog):
    other = Checkpoints(store.folder.parent, FINGERPRINT[:-1] + "0")
    assert other.folder == store.folder  # a folder is named by the first digits
    with caplog.at_level("INFO", "sdtp"):
        assert other.load() is None
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
