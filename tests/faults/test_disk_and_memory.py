"""Full and read-only disks, missing rights, vanished inputs, no memory, a clock that went back."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Table
from tests.faults.forking import Forking
from tests.faults.run import Job, Run, brief, everything, remove

pytestmark = pytest.mark.slow

SEED = 11
# Every step that writes more than a few numbers.
JOBS = ("model", "data", "saliency/0", "train", "generate/0.8", "tables", "report")
NOBODY = 65534
MORE_MEMORY = 4 * 2**20
_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MS_REMOUNT, _MNT_DETACH = 1, 32, 2
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Mounted:
    """A file system in memory, of a limited size."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        self._mount(0, f"size={size}")

    def read_only(self, on: bool) -> None:
        """Mounts it anew, to be read only or to be written again."""
        self._mount(_MS_REMOUNT | (_MS_RDONLY if on else 0), "")

    def leave(self, free: int) -> Path:
        """Fills it up but for `free` bytes; gives the file that does."""
        ballast = self.path / "ballast"
        room = shutil.disk_usage(self.path).free
        with ballast.open("wb") as file:
            file.write(b"x" * max(0, room - free))
        return ballast

    def close(self) -> None:
        """Unmounts it."""
        _LIBC.umount2(str(self.path).encode(), _MNT_DETACH)

    def _mount(self, flags: int, data: str) -> None:
        if _LIBC.mount(b"tmpfs", str(self.path).encode(), b"tmpfs", flags, data.encode()):
            number = ctypes.get_errno()
            if number == errno.EPERM:
                pytest.skip("may not mount a file system here")
            raise OSError(number, os.strerror(number))


@pytest.fixture
def disk(undisturbed: Run, tmp_path: Path) -> Iterator[Mounted]:
    """A project whose results lie on a small disk of their own, and that disk."""
    mounted = Mounted(tmp_path / "results", 8 * 2**20)
    yield mounted
    mounted.close()


def fill(undisturbed: Run, folder: Path) -> None:
    """The run's files in a folder in which `results` is there already."""
    shutil.copytree(undisturbed.folder / "results", folder / "results", dirs_exist_ok=True)
    shutil.copytree(undisturbed.folder / "tiny-model", folder / "tiny-model")


def assert_resumes(undisturbed: Run, forking: Forking, folder: Path, job: Job) -> None:
    """The same command gives the same, and leaves nothing else."""
    ended = forking(folder, job.arguments)
    assert ended.status == 0, ended.stderr
    assert undisturbed.missing(folder, job) == []
    assert undisturbed.differences(folder, job) == []
    assert not list((folder / "results").rglob(".tmp-*"))


@root_only
@pytest.mark.parametrize("name", JOBS)
def test_disk_full(name: str, undisturbed: Run, forking: Forking, disk: Mounted, tmp_path: Path, table: Table) -> None:
    fill(undisturbed, tmp_path)
    job = undisturbed.jobs[name]
    size = sum(
        path.stat().st_size
        for output in job.outputs
        for path in [tmp_path / output, *(tmp_path / output).rglob("*")]
        if path.is_file()
    )
    for output in job.outputs:
        remove(tmp_path / output)
    remove(tmp_path / "results" / "tiny" / "checkpoints")
    others = everything(tmp_path, "logs")
    for free in (0, int(random.Random(f"{SEED}/{name}").uniform(0.1, 0.8) * size)):
        ballast = disk.leave(free)
        ended = forking(tmp_path, job.arguments)
        ballast.unlink()
        assert ended.status == 1, ended.stderr
        assert "No space left on device; free some space, then run this again" in ended.error
        assert "results/tiny/" in ended.error
        assert undisturbed.differences(tmp_path, job) == []
        kept = everything(tmp_path, "logs")
        assert {path: kept.get(path) for path in others} == others
    assert_resumes(undisturbed, forking, tmp_path, job)
    table.add("Disk, rights, memory", f"disk full, {name}", 2, brief(ended.error, tmp_path) + "; then same")


@root_only
def test_results_that_cannot_be_written(
    undisturbed: Run, forking: Forking, disk: Mounted, tmp_path: Path, table: Table
) -> None:
    fill(undisturbed, tmp_path)
    disk.read_only(True)
    before = everything(tmp_path, "logs")
    for name in JOBS:
        ended = forking(tmp_path, undisturbed.jobs[name].arguments)
        assert ended.status == 1, ended.stderr
        assert "results/tiny/" in ended.error
        assert "Read-only file system; mount it to be written" in ended.error
    assert everything(tmp_path, "logs") == before
    disk.read_only(False)
    assert_resumes(undisturbed, forking, tmp_path, undisturbed.jobs["tables"])
    table.add("Disk, rights, memory", "read-only results", len(JOBS), brief(ended.error, tmp_path) + "; then same")


@root_only
@pytest.mark.parametrize("part", ["results/tiny", "logs", "results/tiny/test-data"])
def test_no_permission(part: str, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    folder = undisturbed.copy(tmp_path)
    (folder / "logs").mkdir()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    job = undisturbed.jobs["evaluate/random-0.8"]
    before = everything(folder, "logs")
    allowed = (folder / part).stat().st_mode
    (folder / part).chmod(0o000 if part.endswith("data") else 0o555)
    if part == "results/tiny":
        (folder / "results/tiny/evaluation").chmod(0o555)
    ended = forking(folder, job.arguments, user=NOBODY)
    (folder / part).chmod(allowed)
    (folder / "results/tiny/evaluation").chmod(0o755)
    assert ended.status == 1, ended.stderr
    assert part in ended.error
    assert "Permission denied" in ended.error
    assert everything(folder, "logs") == before
    again = forking(folder, job.arguments, user=NOBODY)
    assert again.status == 0, again.stderr
    assert undisturbed.differences(folder, job) == []
    table.add("Disk, rights, memory", f"no right to {part}", 1, brief(ended.error, tmp_path) + "; then same")


VANISHED = {
    "data": "results/tiny/model/manifest.json",
    "check": "results/tiny/model/manifest.json",
    "saliency/0": "results/tiny/data/manifest.json",
    "train": "results/tiny/saliency/shard-1.safetensors",
    "generate/0.5": "results/tiny/pruner/pruner.safetensors",
    "benchmark/0.8": "results/tiny/benchmark-text.json",
    "evaluate/sdtp-0.5": "results/tiny/pruner/pruner.json",
    "tables": "results/tiny/evaluation/random-0.8.jsonl",
    "report": "results/tiny/tables/comparisons.csv",
    "model": "tiny-model/model.safetensors",
}


@pytest.mark.parametrize("name", VANISHED)
def test_a_vanished_input(name: str, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table) -> None:
    folder, job = undisturbed.copy(tmp_path), undisturbed.jobs[name]
    path = folder / VANISHED[name]
    path.rename(tmp_path / "elsewhere")
    before = everything(folder)
    ended = forking(folder, job.arguments)
    assert ended.status == 1, ended.stderr
    assert VANISHED[name].rpartition("/")[0] in ended.error
    assert everything(folder, "logs") == before
    (tmp_path / "elsewhere").rename(path)
    assert_resumes(undisturbed, forking, folder, job)
    table.add("Disk, rights, memory", f"vanished input of {name}", 1, brief(ended.error, tmp_path) + "; then same")


@pytest.mark.parametrize("name", ["saliency/0", "evaluate/unpruned-1.0"])
def test_out_of_memory(name: str, undisturbed: Run, forking: Forking, tmp_path: Path, table: Table) -> None:
    folder, job = undisturbed.copy(tmp_path), undisturbed.jobs[name]
    for output in job.outputs:
        remove(folder / output)
    before = everything(folder)
    # A batch that would need more than the address space a process may have.
    ended = forking(folder, job.arguments, more_memory=MORE_MEMORY)
    assert ended.status == 1, ended.stderr
    assert f"{job.step}: out of memory before {job.outputs[0]} was made" in ended.error
    assert everything(folder, "logs") == before
    assert_resumes(undisturbed, forking, folder, job)
    table.add("Disk, rights, memory", f"address space used up, {name}", 1, brief(ended.error, tmp_path) + "; then same")


@root_only
def test_killed_for_memory(undisturbed: Run, forking: Forking, tmp_path: Path, table: Table) -> None:
    group = make_group()
    folder, job = undisturbed.copy(tmp_path), undisturbed.jobs["saliency/0"]
    for output in job.outputs:
        remove(folder / output)
    before = everything(folder, "logs")
    try:
        ended = forking(folder, job.arguments, group=str(group))
    finally:
        group.rmdir()
    assert ended.status == -signal.SIGKILL, ended.stderr
    kept = everything(folder, "logs")
    assert {path: kept.get(path) for path in before} == before
    assert undisturbed.differences(folder, job) == []
    assert_resumes(undisturbed, forking, folder, job)
    table.add(
        "Disk, rights, memory",
        "killed by the kernel for its cgroup's memory, saliency/0",
        1,
        "no partial file; then same",
    )


def make_group() -> Path:
    """A control group whose processes may have a few MiB together."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(parent, f"sdtp-faults-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(16 * 2**20))
        except OSError:
            continue
        return group
    pytest.skip("no control group for memory can be made here")
