"""Which process works on what; what several do together is in test_several_processes.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sdtp.errors import UserError
from sdtp.training.processes import Processes


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 3, 7, 8, 9])
def test_every_item_counts_once_over_all_processes(items, count, lockstep):
    shares = []
    for rank in range(count):
        one = Processes(cpu=True)
        one.rank, one.count = rank, count
        shares.append(one.share(items, lockstep))
        assert [item for item, counts in shares[-1] if counts] == [item for item in range(items) if one.holds(item)]
    counted = [item for share in shares for item, counts in share if counts]
    assert sorted(counted) == list(range(items))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= (0 if lockstep else 1)
    assert max(sizes) == -(-items // count)
    assert all(0 <= item < items for share in shares for item, _ in share)


def test_alone_nothing_is_sent_and_errors_are_what_they_were():
    one = Processes(cpu=True)
    assert (one.rank, one.count, one.main, one.device.type) == (0, 1, True, "cpu")
    values = torch.arange(3.0)
    one.add_up(values)
    one.spread(values, 5)
    assert torch.equal(values, torch.arange(3.0))
    assert one.from_main("it") == "it"
    assert one.largest(2.5) == 2.5
    with pytest.raises(UserError, match="mine"), one.together():
        raise UserError("mine")


def test_one_of_several_waits_for_hours():
    """In a process of its own, where none of a group has begun: it ends where it would meet the others."""
    script = """
from torch import distributed
from sdtp.training.processes import Processes

def begin(backend, timeout, **others):
    print(backend, timeout.total_seconds() / 3600, others)
    raise SystemExit

distributed.init_process_group = begin
Processes(cpu=True)
"""
    several = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **several}
    )
    assert done.returncode == 0, done.stderr
    backend, hours = done.stdout.split()[:2]
    assert backend == "gloo"
    assert float(hours) >= 1
