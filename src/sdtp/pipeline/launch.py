"""One step as several processes on this machine, one a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from sdtp.errors import UserError

_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
_PROGRAM = "import sys; from sdtp.cli import main; sys.exit(main())"


def launched() -> bool:
    """Whether this process is one of several that `launch`, `accelerate launch` or `torchrun` started."""
    return "LOCAL_RANK" in os.environ


def launch(processes: int, command: Sequence[str]) -> None:
    """Run a command line of this program once a process, and wait until all are done.

    Each finds its place in the environment (RANK, WORLD_SIZE and so on), as accelerate and torch.distributed read it.
    They are ended together: when one fails, or when this process is told to end.

    Args:
        processes: at least one.
        command: arguments of `sdtp`.

    Raises:
        SystemExit: a process failed, and has said why.
        UserError: a process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Of a failure it would print a page, traceback of the launcher included, below what the process itself said.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-c", _PROGRAM, *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        raise UserError(
            f"process {rank} of {processes} was ended by {failure.signal_name()}, and the others with it (for want of "
            "memory, perhaps); run this again to go on from the last checkpoint"
        ) from None
    except SignalException as error:
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)


def end_with_launcher() -> None:
    """Have the system end this process when the one that started it ends, however that was (Linux only).

    Processes of a launcher that was killed would go on, on GPUs that are no longer theirs.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
