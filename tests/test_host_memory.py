"""What memory is left, of a machine and of the control groups around a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtp.host_memory import available_memory

STAT = "anon 1000\nactive_file 300\ninactive_file 500\nslab 7\n"


@pytest.mark.parametrize(
    ("own", "groups", "left"),
    [
        ("0::/\n", {}, 8000 * 1024),
        ("0::/\n", {"": ("max", "5000", STAT)}, 8000 * 1024),
        ("0::/\n", {"": ("10000", "4000", "")}, 6000),
        ("0::/\n", {"": ("10000", "4000", STAT)}, 6800),  # files that are cached go when memory is needed
        ("0::/\n", {"": ("1000", "4000", "")}, 0),
        ("0::/\n", {"": ("1000000000", "4000", "")}, 8000 * 1024),
        # A job of Slurm's: the limit is on a group above the process's own, or on its own.
        ("1:name=systemd:/\n0::/job/step\n", {"job": ("9000", "2000", ""), "job/step": ("max", "1", "")}, 7000),
        ("0::/job/step\n", {"job": ("9000", "2000", ""), "job/step": ("5000", "1000", "")}, 4000),
        ("0::/job/step\n", {"other": ("10", "1", "")}, 8000 * 1024),
        # Seen from inside a container: the path is the host's, the limit is at the top.
        ("0::/docker/1f\n", {"": ("9000", "2000", "")}, 7000),
        (None, {"": ("9000", "2000", "")}, 7000),
    ],
)
def test_the_least_that_the_machine_and_the_groups_around_a_process_leave(
    tmp_path: Path, own: str | None, groups: dict[str, tuple[str, str, str]], left: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:    8000 kB\n")
    if own is not None:
        (tmp_path / "proc/self/cgroup").write_text(own)
    for path, (limit, used, stat) in groups.items():
        folder = tmp_path / "sys/fs/cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(used + "\n")
        if stat:
            (folder / "memory.stat").write_text(stat)
    assert available_memory(tmp_path) == left


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\n")
    assert available_memory(tmp_path) is None
