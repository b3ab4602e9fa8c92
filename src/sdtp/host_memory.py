"""How much of this machine's memory programs can still have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that programs can still have: of the machine, or of a control group around this process if that has fewer
    left, what is cached of files not counted as used; None where the system does not say."""
    try:
        information = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable: +([0-9]+) kB", information, re.MULTILINE)
    if found is None:
        return None
    return max(0, min([int(found[1]) * 1024, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left in each control group around this process that has a limit."""
    try:
        groups = (root / "proc/self/cgroup").read_text()
    except OSError:
        groups = ""
    own = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    mount = root / "sys/fs/cgroup"
    group = mount / own[1] if own else mount
    for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
        try:
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        except OSError:  # no limit here, a path of outside this container, or control groups of the older kind
            continue
        if limit != "max":
            yield int(limit) - int(used) + _cached(folder)


def _cached(folder: Path) -> int:
    """Bytes of files that a control group has in memory, and that go when memory is needed."""
    try:
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
