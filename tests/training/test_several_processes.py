"""Two processes train as one does: the same losses, metrics and scorer, whole or sharded model."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.training.several import RESUMED, SCENARIOS, make_model, train

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def launch(*command, processes=2):
    """Starts a command once a process, as `accelerate launch` does where there are GPUs."""
    return subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
            *map(str, command),
        ],
        capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def several(tmp_path_factory, one_thread):
    """By rank and scenario what two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(os.path.join(REPOSITORY, "tests", "training", "several.py"), folder, *SCENARIOS)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_give_what_one_gives(several, scenario):
    first, second = (ranks[scenario] for ranks in several)
    alone = train(scenario)
    assert second["rows"] == []
    assert second["final"] == first["final"]
    for name, value in first["scorer"].items():
        assert torch.equal(second["scorer"][name], value), name
        torch.testing.assert_close(value, alone["scorer"][name], rtol=1e-4, atol=1e-5)
    assert [row[:2] for row in first["rows"]] == [row[:2] for row in alone["rows"]]
    for (step, split, found), (_, _, expected) in zip(first["rows"], alone["rows"], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (step, split, name)


@pytest.mark.slow
def test_label_epochs_are_the_same_to_the_bit(several):
    """Before the first step nothing has been summed in another order."""
    first, alone = several[0]["labels alone"], train("labels alone")
    assert first["rows"][:4] == alone["rows"][:4]
    assert [row[1] for row in first["rows"][:4]] == ["labels", "labels", "labels", "heldout"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_backbone_never_changes_and_is_in_no_optimizer(several, scenario):
    whole = sum(weight.nbytes for weight in make_model().model.layers.parameters())
    for rank in several:
        found = rank[scenario]
        assert found["unchanged"]
        assert found["gradients"] == []
        assert found["foreign"] == 0
        # Two stages, two layers each, weight and bias; and keys and queries where a scorer has them.
        weights = 12 if "default" in scenario else 8
        assert found["optimizers"] == (2 if SCENARIOS[scenario].get("label_epochs") else 1) * [weights]
        assert found["layer_bytes"] == whole / (2 if "sharded" in scenario else 1)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", RESUMED)
def test_several_processes_resume_to_the_bit(several, scenario):
    for rank in several:
        found, expected = rank[f"{scenario}, resumed"], rank[scenario]
        assert found["rows"] == expected["rows"]
        assert found["final"] == expected["final"]
        assert all(torch.equal(found["scorer"][name], value) for name, value in expected["scorer"].items())


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_process_ends_all_and_is_told_once(several, failing):
    told, other = (rank["failures"][failing] for rank in several)
    # Held-out examples and their references were the first forwards; of the batch it is that process's second example.
    assert told.startswith("UserError: loss ce of example 'train-")
    assert told.endswith("is nan: training stopped")
    assert other == "FailedElsewhereError: "


@pytest.mark.slow
def test_held_out_prompts_without_a_choice_are_told_of_once(several):
    told, other = (rank["refusal"] for rank in several)
    assert told.startswith("UserError: no stage has a choice in any of the 3 held-out prompts, the longest of 3 tokens")
    assert other == "FailedElsewhereError: "
