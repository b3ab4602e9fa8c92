"""Which device a step computes on, and the leasing of GPUs to jobs.

Snakemake only counts GPUs: it never says which one a job has. `sdtp lease --gpus K -- CMD` takes K of them, names them
in CUDA_VISIBLE_DEVICES, and becomes CMD. One lock file stands for each GPU, by its UUID, in a folder that all users of
this host share; the locks are left to CMD and to whatever it starts with its open files, so a GPU is free exactly when
the last of these is dead, however it died. (A launcher that closes open files in its workers, as Python's subprocess
does unless told otherwise, holds the GPU alone.)
"""

import argparse
import fcntl
import logging
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sdtp.errors import UserError
from sdtp.pipeline.files import digest

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 0.5
PATIENCE = 10.0  # seconds, with a nvidia-smi that hangs in the driver
# Not below TMPDIR, which users and jobs have of their own.
SHARED = Path("/tmp/sdtp-gpus")


def choose_device() -> "torch.device":
    """The device a step computes on: the first GPU it may see (`sdtp lease` decides), else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: Sequence[str]) -> NoReturn:
    """`sdtp lease --gpus K -- CMD ...`: becomes CMD on K GPUs that no other lease holds, waiting for them if need be.

    Without GPUs CMD runs on the CPU at once; with fewer than K in all it gets them all, since waiting would never end.
    A CUDA_VISIBLE_DEVICES given from outside limits the choice. In a Slurm job (SLURM_JOB_ID) that sees no more than K
    the scheduler has chosen already, and nothing is leased. SDTP_LEASE_DIR names another folder for the lock files.

    Raises UserError for a command that cannot be found, and as `visible_gpus` and `lease_folder` do; OSError, naming
    the file, for a lock file that this user may not write.
    """
    parser = argparse.ArgumentParser(prog="sdtp lease", description="Run a command on GPUs that nobody else is using.")
    parser.add_argument("--gpus", type=int, required=True, metavar="K", help="how many; 0 hides them all")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the command and its arguments")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.gpus < 0:
        parser.error(f"--gpus: {args.gpus} is negative; accepted: 0 and above")
    if not command:
        parser.error("no command; accepted: sdtp lease --gpus K -- CMD ...")
    if shutil.which(command[0]) is None:
        raise UserError(f"sdtp lease: command {command[0]!r} not found")
    devices = visible_gpus()
    # A job on several Slurm nodes asks for more than one of them has.
    allocated = "SLURM_JOB_ID" in os.environ and args.gpus >= len(devices)
    if devices and not allocated:
        if args.gpus > len(devices):
            logger.warning("%d GPUs asked for, %d on this machine: using all of them", args.gpus, len(devices))
        taken = _take(devices, min(args.gpus, len(devices)), command)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
    os.execvp(command[0], command)


def visible_gpus() -> list[str]:
    """UUIDs of the machine's GPUs in nvidia-smi's order, or those that CUDA_VISIBLE_DEVICES names, in its order.

    That variable may hold indices, UUIDs or beginnings of UUIDs, as CUDA takes them; a MIG device stands for itself.
    Raises UserError for an entry that is none of these, and for a nvidia-smi that does not answer.
    """
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None and mask.strip() in ("", "-1"):
        return []
    gpus = _nvidia_smi()
    if mask is None or not gpus:
        return list(gpus.values())
    chosen = []
    for entry in (part.strip() for part in mask.split(",")):
        if entry.startswith("MIG-"):
            matches = [entry]
        elif entry.isdecimal():
            matches = [gpus[int(entry)]] if int(entry) in gpus else []
        else:
            matches = [uuid for uuid in gpus.values() if entry and uuid.startswith(entry)]
        if len(matches) != 1:
            known = ", ".join(f"{index} ({uuid})" for index, uuid in gpus.items())
            raise UserError(f"CUDA_VISIBLE_DEVICES={mask}: {entry!r} is not one GPU of this machine; accepted: {known}")
        chosen += [uuid for uuid in matches if uuid not in chosen]
    return chosen


def _nvidia_smi() -> dict[int, str]:
    """Index and UUID of each GPU; none where there is no nvidia-smi or it finds nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"nvidia-smi does not answer within {PATIENCE:g} s, so the GPUs cannot be used: reload the driver or "
            "restart the machine; CUDA_VISIBLE_DEVICES=-1 uses the CPU alone"
        ) from error
    if answer.returncode != 0:
        reason = " ".join((answer.stderr or answer.stdout).split())
        logger.warning("nvidia-smi finds no GPU, so the CPU is used; it says: %s", reason)
        return {}
    pairs = (line.split(",") for line in answer.stdout.splitlines() if line.strip())
    return {int(index): uuid.strip() for index, uuid in pairs}


def _take(devices: Sequence[str], count: int, command: Sequence[str]) -> list[str]:
    """Locks `count` of `devices`, all or none, and leaves the locks to the program this process becomes."""
    if count == 0:
        return []
    folder = lease_folder()
    # Leases that choose from the same devices wait in turn, and none behind one that waits for others.
    with _queue(folder / f"queue-{digest(sorted(devices))[:16]}.lock", count):
        told = False
        while True:
            held: dict[str, int] = {}
            for uuid in devices:
                if len(held) < count and (lock := _try_lock(folder / f"{uuid}.lock")) is not None:
                    held[uuid] = lock
            if len(held) == count:
                break
            if not told:
                busy = [f"{uuid} (held by {_holder(folder / f'{uuid}.lock')})" for uuid in devices if uuid not in held]
                logger.warning("waiting for %d GPUs, %d free; busy: %s", count, len(held), ", ".join(busy))
                told = True
            for lock in held.values():
                os.close(lock)
            time.sleep(SECONDS_BETWEEN_TRIES)
        for lock in held.values():
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()}: {shlex.join(command)}"[:200].encode(), 0)
            os.set_inheritable(lock, True)
    return list(held)


@contextmanager
def _queue(path: Path, count: int) -> Iterator[None]:
    """Lets one lease at a time choose devices, until it has them.

    Of those that choose from the same devices: one that needs many would never find them free at once while others keep
    taking single ones.
    """
    lock = _open(path)
    try:
        if not _locked(lock):
            logger.warning("waiting for %d GPUs, behind another lease that waits", count)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _try_lock(path: Path) -> int | None:
    descriptor = _open(path)
    if _locked(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open(path: Path) -> int:
    """A descriptor of a lock file, made where missing, for every user to write to; OSError for a symbolic link."""
    while True:
        # Without O_CREAT: with it Linux refuses another user's file in a folder that everyone may write to.
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        with suppress(FileExistsError), _for_everyone():
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


@contextmanager
def _for_everyone() -> Iterator[None]:
    """No right is masked from what the block makes."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)


def _holder(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") or "a process that is just starting"


def lease_folder() -> Path:
    """Where the lock files are, made where missing: `SHARED`, or what SDTP_LEASE_DIR names, for every user to write to.

    On this host, never on a shared disk, where another host's GPUs would be locked too.

    Raises UserError where `SHARED` is a symbolic link: whoever made it would choose where files are written.
    """
    named = os.environ.get("SDTP_LEASE_DIR")
    folder = Path(named).resolve() if named else SHARED
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _for_everyone():
        # Sticky: a lock is deleted by its owner alone, since a new one beside it would be locked by another lease.
        folder.mkdir(mode=0o1777, exist_ok=True)
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link; remove it, or name another folder in SDTP_LEASE_DIR")
    return folder
