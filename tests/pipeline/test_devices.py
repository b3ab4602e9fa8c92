"""GPU leases, with real processes on a machine whose nvidia-smi is a script; devices are never shared or lost."""

import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest
import torch

from sdtp.errors import UserError
from sdtp.pipeline import devices
from sdtp.pipeline.devices import choose_device, visible_gpus

# Says which devices it has and who it is, then holds them until its standard input ends.
HOLD = ["bash", "-c", 'echo "$CUDA_VISIBLE_DEVICES"; read -r line || true']
# `sdtp lease` of another user, who could not read the environment: what it imports is read before.
LEASE_AS = """
import os, sys
from sdtp.pipeline import devices
os.umask(0o077)
os.setuid(int(sys.argv[1]))
devices.main(sys.argv[2:])
"""
PATIENCE = 60.0


def gpu(index: int) -> str:
    return f"GPU-{index}{index:07x}-aaaa"


class Lease:
    """A `sdtp lease` process."""

    def __init__(self, gpus: int, command: list[str], environment: dict[str, str], user: int | None) -> None:
        program = ["-m", "sdtp.cli", "lease"] if user is None else ["-c", LEASE_AS, str(user)]
        self.process = subprocess.Popen(
            [sys.executable, *program, "--gpus", str(gpus), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
            start_new_session=True,
        )
        # Ends whatever a fault in the lease would let hang: the reads below then see the end of the pipe.
        self.watchdog = threading.Timer(PATIENCE, self._end)
        self.watchdog.start()

    def line(self) -> str:
        return self._pipe(self.process.stdout).readline().strip()

    def devices(self) -> set[str]:
        return set(self.line().split(","))

    def complaint(self) -> str:
        """The next line of stderr: a waiting lease says there what it waits for."""
        return self._pipe(self.process.stderr).readline().strip()

    def release(self) -> int:
        self._pipe(self.process.stdin).close()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> None:
        self.watchdog.cancel()
        self._end()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            self._pipe(pipe).close()

    def _end(self) -> None:
        """Kills the process and all it started, which hold its pipes open."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


Start = Callable[..., Lease]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(8)` puts an nvidia-smi on PATH that lists eight GPUs, for this process and those it starts."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def install(gpus: int, folder: Path = tmp_path) -> None:
        monkeypatch.setenv("SDTP_LEASE_DIR", str(folder / "leases"))
        script = folder / "bin" / "nvidia-smi"
        script.parent.mkdir(exist_ok=True)
        listing = "".join(f"{index}, {gpu(index)}\n" for index in range(gpus))
        script.write_text(
            '#!/bin/sh\n[ "$*" = "--query-gpu=index,uuid --format=csv,noheader" ] || exit 2\n'
            + (f"cat <<'END'\n{listing}END\n" if gpus else "echo No devices were found; exit 6\n")
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    return install


@pytest.fixture
def lease() -> Iterator[Start]:
    started: list[Lease] = []

    def start(gpus: int, command: list[str] = HOLD, user: int | None = None, **environment: str) -> Lease:
        started.append(Lease(gpus, command, {**os.environ, **environment}, user))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_two_cards_are_never_given_to_two_of_four_jobs(machine: Callable[[int], None], lease: Start) -> None:
    machine(2)
    first, second = lease(1), lease(1)
    had, other = first.devices(), second.devices()
    assert had | other == {gpu(0), gpu(1)}
    assert len(had) == 1
    third = lease(1)
    assert "waiting for 1 GPUs, 0 free" in (said := third.complaint())
    assert f"process {first.process.pid}" in said
    fourth = lease(1)
    assert "behind another lease" in fourth.complaint()
    assert first.release() == 0
    assert third.devices() == had
    assert second.release() == 0
    assert fourth.devices() == other


@pytest.mark.slow
def test_holders_never_overlap(machine: Callable[[int], None], lease: Start, tmp_path: Path) -> None:
    machine(3)
    # mkdir succeeds for one process only; the loop keeps the folders long enough for an overlap to show.
    script = (
        "cd $PLACE; held=${CUDA_VISIBLE_DEVICES//,/ }; mkdir $held || exit 9; "
        "for i in {1..50}; do /bin/true; done; rmdir $held"
    )
    jobs = [lease(1 + index % 2, ["bash", "-c", script], PLACE=str(tmp_path)) for index in range(12)]
    assert [job.process.wait(PATIENCE) for job in jobs] == [0] * 12


@pytest.mark.slow
def test_requests_of_four_on_eight_devices_do_not_deadlock(machine: Callable[[int], None], lease: Start) -> None:
    machine(8)
    # Opposite orders: two leases that took their devices one by one would each end up with some of them.
    masks = ["0,1,2,3,4,5,6,7", "7,6,5,4,3,2,1,0"]
    jobs = [lease(4, ["bash", "-c", "/bin/true"], CUDA_VISIBLE_DEVICES=masks[index % 2]) for index in range(6)]
    assert [job.process.wait(PATIENCE) for job in jobs] == [0] * 6


def test_two_requests_of_four_run_side_by_side_and_a_third_takes_nothing(
    machine: Callable[[int], None], lease: Start
) -> None:
    machine(8)
    first, second = lease(4), lease(4)
    had, other = first.devices(), second.devices()
    assert len(had) == len(other) == 4
    assert had | other == {gpu(index) for index in range(8)}
    assert first.release() == 0
    fifth = lease(5)
    assert "waiting for 5 GPUs, 4 free" in fifth.complaint()
    assert second.release() == 0
    assert len(fifth.devices()) == 5


def test_killing_a_waiting_wrapper_lets_the_next_one_go(machine: Callable[[int], None], lease: Start) -> None:
    machine(1)
    holder = lease(1)
    holder.devices()
    waiting = lease(1)
    assert "waiting for 1 GPUs" in waiting.complaint()
    behind = lease(1)
    assert "behind another lease" in behind.complaint()
    waiting.kill()
    assert "held by process" in behind.complaint()
    assert holder.release() == 0
    assert behind.devices() == {gpu(0)}


def test_killing_one_rank_frees_its_device_only(machine: Callable[[int], None], lease: Start) -> None:
    machine(2)
    ranks = [lease(1), lease(1)]
    devices = [rank.devices() for rank in ranks]
    ranks[1].kill()
    after = lease(1)
    assert after.devices() == devices[1]
    said = lease(1).complaint()
    # Which of the two came first is chance, so which device each has is too.
    for held, holder in ((devices[0], ranks[0]), (devices[1], after)):
        assert f"{held.pop()} (held by process {holder.process.pid}" in said


# A launcher with two ranks that says their process ids; each ends with its own standard input.
RANKS = 'echo "$CUDA_VISIBLE_DEVICES"; for rank in 0 1; do bash -c "read -r line" <&0 & echo $!; done; wait'


def test_devices_are_held_until_the_last_of_launcher_and_ranks_is_dead(
    machine: Callable[[int], None], lease: Start
) -> None:
    machine(2)
    launcher = lease(2, ["bash", "-c", RANKS])
    assert launcher.devices() == {gpu(0), gpu(1)}
    ranks = [os.pidfd_open(int(launcher.line())) for _ in range(2)]
    signal.pidfd_send_signal(ranks[0], signal.SIGKILL)
    assert select.select([ranks[0]], [], [], PATIENCE)[0]
    launcher.kill()
    after = lease(1)
    assert "waiting for 1 GPUs, 0 free" in after.complaint()  # rank 1 lives
    signal.pidfd_send_signal(ranks[1], signal.SIGKILL)
    assert after.devices() <= {gpu(0), gpu(1)}
    for rank in ranks:
        os.close(rank)


def test_without_gpus_nobody_waits(
    lease: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Callable[[int], None]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tools))  # a PATH with no nvidia-smi on it, also where the tests' machine has one
    jobs = [lease(1, HOLD), lease(4, HOLD)]
    assert [job.devices() for job in jobs] == [{""}, {""}]  # both run at once
    assert [job.release() for job in jobs] == [0, 0]
    assert not (tmp_path / "leases").exists()


def test_an_nvidia_smi_without_devices_means_the_cpu(machine: Callable[[int], None], lease: Start) -> None:
    machine(0)
    job = lease(2)
    assert "No devices were found" in job.complaint()
    assert job.devices() == {""}


def test_an_nvidia_smi_that_hangs_is_not_waited_for(
    machine: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(devices, "PATIENCE", 0.2)
    with pytest.raises(
        UserError, match=r"nvidia-smi does not answer within 0\.2 s.*CUDA_VISIBLE_DEVICES=-1 uses the CPU"
    ):
        visible_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(devices, "PATIENCE", PATIENCE)
    assert visible_gpus() == []  # without asking


def test_more_than_the_machine_has_gets_all_of_it(machine: Callable[[int], None], lease: Start) -> None:
    machine(2)
    job = lease(4)
    assert "4 GPUs asked for, 2 on this machine" in job.complaint()
    assert job.devices() == {gpu(0), gpu(1)}


def test_a_job_of_no_gpus_sees_none_and_waits_for_none(machine: Callable[[int], None], lease: Start) -> None:
    machine(1)
    lease(1).devices()
    job = lease(0, ["bash", "-c", 'echo "[$CUDA_VISIBLE_DEVICES]${CUDA_VISIBLE_DEVICES+set}"'])
    assert job.line() == "[]set"


def test_a_mask_from_outside_limits_the_choice(machine: Callable[[int], None], lease: Start) -> None:
    machine(4)
    first = lease(1, CUDA_VISIBLE_DEVICES="2")
    assert first.devices() == {gpu(2)}
    second = lease(1, CUDA_VISIBLE_DEVICES="2,3")
    assert second.devices() == {gpu(3)}
    third = lease(1, CUDA_VISIBLE_DEVICES=f"{gpu(2)},{gpu(3)}")
    assert "waiting for 1 GPUs, 0 free" in third.complaint()
    assert lease(1, CUDA_VISIBLE_DEVICES="").devices() == {""}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [gpu(0), gpu(1), gpu(2)]),
        ("2,0", [gpu(2), gpu(0)]),
        ("1,1", [gpu(1)]),
        ("GPU-2", [gpu(2)]),
        ("MIG-7, 0", ["MIG-7", gpu(0)]),
        ("-1", []),
        (" ", []),
    ],
)
def test_masks_are_read_as_cuda_reads_them(
    machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, mask: str | None, expected: list[str]
) -> None:
    machine(3)
    if mask is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert visible_gpus() == expected


@pytest.mark.parametrize("mask", ["3", "0,GPU-9", "GPU-", "0,,1", "two"])
def test_a_mask_that_names_no_gpu_is_an_error(
    machine: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, mask: str
) -> None:
    machine(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    with pytest.raises(UserError, match=rf"CUDA_VISIBLE_DEVICES={mask}: .*accepted: 0 \({gpu(0)}\), 1"):
        visible_gpus()


def test_a_lease_of_other_devices_does_not_wait_behind_one_that_waits(
    machine: Callable[[int], None], lease: Start
) -> None:
    machine(2)
    holder = lease(1, CUDA_VISIBLE_DEVICES="0")
    assert holder.devices() == {gpu(0)}
    waiting = lease(1, CUDA_VISIBLE_DEVICES="0")
    assert "waiting for 1 GPUs, 0 free" in waiting.complaint()
    assert lease(1, CUDA_VISIBLE_DEVICES="1").devices() == {gpu(1)}
    # The order of the mask makes no other set.
    both = [lease(2, CUDA_VISIBLE_DEVICES="0,1"), lease(2, CUDA_VISIBLE_DEVICES="1,0")]
    assert sorted(one.complaint().partition(", ")[2][:6] for one in both) == ["0 free", "behind"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be others")
def test_users_of_a_host_share_its_devices(machine: Callable[..., None], lease: Start) -> None:
    with tempfile.TemporaryDirectory() as name:  # others cannot enter pytest's own
        shared = Path(name)
        shared.chmod(0o1777)
        machine(2, shared)
        (shared / "bin").chmod(0o755)
        first, second = lease(1, user=65534), lease(1, user=1)
        assert first.devices() | second.devices() == {gpu(0), gpu(1)}
        third = lease(1, user=2)
        assert f"process {first.process.pid}" in (said := third.complaint())
        assert f"process {second.process.pid}" in said
        third.kill()
        assert first.release() == 0
        again = lease(1, user=1)
        assert len(again.devices()) == 1
        assert f"process {again.process.pid}" in lease(1).complaint()


def test_lock_files_are_in_one_folder_for_all_that_nobody_can_lead_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Callable[[int], None], lease: Start
) -> None:
    monkeypatch.delenv("SDTP_LEASE_DIR", raising=False)
    shared = tmp_path / "sdtp-gpus"
    monkeypatch.setattr(devices, "SHARED", shared)
    before = os.umask(0o077)
    try:
        assert devices.lease_folder() == shared
    finally:
        os.umask(before)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    shared.rmdir()
    shared.symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{shared} is a symbolic link.*SDTP_LEASE_DIR"):
        devices.lease_folder()
    machine(1)
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases" / f"{gpu(0)}.lock").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("as it was")
    job = lease(1)
    assert job.complaint().startswith(f"error: {tmp_path}/leases/{gpu(0)}.lock: Too many levels of symbolic links")
    assert job.process.wait(PATIENCE) == 1
    assert (tmp_path / "precious").read_text() == "as it was"


def test_in_a_slurm_job_that_asks_for_all_of_it_the_allocation_is_used_as_it_is(
    machine: Callable[[int], None], lease: Start, tmp_path: Path
) -> None:
    machine(8)
    jobs = [lease(gpus, SLURM_JOB_ID="7", CUDA_VISIBLE_DEVICES="5,6") for gpus in (2, 2, 16)]
    assert [job.line() for job in jobs] == ["5,6"] * 3
    assert [job.release() for job in jobs] == [0] * 3
    assert jobs[2].complaint() == ""
    assert not (tmp_path / "leases").exists()


def test_in_a_slurm_job_the_leases_of_parts_of_it_are_apart(machine: Callable[[int], None], lease: Start) -> None:
    machine(8)
    first, second = (lease(1, SLURM_JOB_ID="7", CUDA_VISIBLE_DEVICES="5,6") for _ in range(2))
    assert first.devices() | second.devices() == {gpu(5), gpu(6)}


def test_the_wrapper_becomes_the_command(machine: Callable[[int], None], lease: Start) -> None:
    machine(1)
    job = lease(1, ["bash", "-c", "echo $$; exit 7"])
    assert job.line() == str(job.process.pid)
    assert job.process.wait(PATIENCE) == 7


def test_a_command_that_does_not_exist_is_named(machine: Callable[[int], None], lease: Start) -> None:
    machine(1)
    job = lease(1, ["no-such-command"])
    assert job.complaint() == "error: sdtp lease: command 'no-such-command' not found"
    assert job.process.wait(PATIENCE) == 1


def test_the_device_is_the_first_visible_gpu_or_the_cpu() -> None:
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
