"""One step as several processes, one a GPU: on this machine, or on all those of a Slurm job."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdtp.errors import UserError

_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
_PROGRAM = "import sys; from sdtp.cli import main; sys.exit(main())"
# Where the launchers of a Slurm step meet: below the ports that systems give out (Linux: from 32768).
_FIRST_PORT, _PORTS = 20000, 12000
# In which Snakemake tells each library how many threads a job may have. Where torch has MKL, MKL's number decides.
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclass(frozen=True)
class SlurmStep:
    """A step of a Slurm job (`srun`) whose tasks run this one command: each task launches the processes of its GPUs.

    Attributes:
        tasks: how many there are.
        task: which of them this is, from 0.
        address: of the first one's node, where all meet.
        port: the same for all tasks of the step, and another for other steps that run at the same time.
    """

    tasks: int
    task: int
    address: str
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmStep | None:
        """The step that an environment is of; None outside of Slurm, and in a step of one task.

        Raises UserError if Slurm does not say where the step's first node is.
        """
        if (tasks := slurm_tasks(environment)) < 2:
            return None
        node = _scontrol("show", "hostnames", environment["SLURM_STEP_NODELIST"]).split()[0]
        # Slurm's name of a node need not be one that the network knows.
        described = dict(pair.partition("=")[::2] for pair in _scontrol("show", "node", "--oneliner", node).split())
        number = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        return cls(
            tasks=tasks,
            task=int(environment["SLURM_PROCID"]),
            address=described["NodeAddr"],
            port=_FIRST_PORT + number % _PORTS,
        )


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that an environment is of; 1 outside of Slurm, and in a job's script."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether a process is the first of those launched together, or the launcher that speaks for the others."""
    if "RANK" in environment:
        return environment["RANK"] == "0"
    return slurm_tasks(environment) < 2 or environment["SLURM_PROCID"] == "0"


def process_name(environment: Mapping[str, str]) -> str:
    """What a process is called among several that were launched together: "process 1 of 2"; empty for any other."""
    rank, count = environment.get("RANK"), environment.get("WORLD_SIZE", "1")
    return "" if rank is None or count == "1" else f"process {rank} of {count}"


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise UserError where `accelerate launch` was told to shard the model, which only the settings can ask for."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "accelerate launch has FSDP on (--use_fsdp, or its configuration file), which is not how a model is "
            "sharded here: launch with --multi_gpu instead, and set training.shard_model to true"
        )


def launched() -> bool:
    """Whether this process is one of several that `launch`, `accelerate launch` or `torchrun` started."""
    return "LOCAL_RANK" in os.environ


def launch(processes: int, command: Sequence[str]) -> None:
    """Run a command line of this program once a process, and wait until all are done.

    Each finds its place in the environment (RANK, WORLD_SIZE and so on), as accelerate and torch.distributed read it.
    They are ended together: when one fails, or when this process is told to end. In a Slurm step of several tasks each
    task calls this, and the processes of all of them work as one; `srun --kill-on-bad-exit` ends them together.

    Args:
        processes: at least one; in such a step, of this task.
        command: arguments of `sdtp`.

    Raises:
        SystemExit: a process failed, and has said why.
        UserError: a process was killed, or Slurm does not say where the step's first node is.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Of a failure they would print pages, tracebacks of the launcher included, below what the process itself said.
    for module in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    for variable in _THREADS:
        if threads := os.environ.get(variable):
            os.environ[variable] = str(max(1, int(threads) // processes))
    config = LaunchConfig(nproc_per_node=processes, max_restarts=0, **_meeting(SlurmStep.of(os.environ)))
    in_all = config.max_nodes * processes
    try:
        elastic_launch(config, sys.executable)("-c", _PROGRAM, *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            raise SystemExit(failure.exitcode) from None
        raise UserError(
            f"process {rank} of {in_all} was ended by {failure.signal_name()}, and the others with it (for want of "
            "memory, perhaps); run this again to go on from the last checkpoint"
        ) from None
    except SignalException as error:
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)


def _meeting(step: SlurmStep | None) -> dict[str, Any]:
    """How the launchers find one another: there is one, or those of a step, in the order of its tasks."""
    if step is None:
        alone = {"min_nodes": 1, "max_nodes": 1, "run_id": uuid.uuid4().hex}
        return {**alone, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    return {
        "min_nodes": step.tasks,
        "max_nodes": step.tasks,
        "run_id": str(step.port),
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{step.address}:{step.port}",
        "rdzv_configs": {"rank": step.task},
    }


def _scontrol(*arguments: str) -> str:
    """What Slurm's `scontrol` says."""
    if shutil.which("scontrol") is None:
        raise UserError("a Slurm step of several tasks, but there is no command scontrol to ask for its first node")
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        raise UserError(f"scontrol {' '.join(arguments)} gives no answer: {done.stderr.strip()}")
    return done.stdout


def end_with_launcher() -> None:
    """Have the system end this process when the one that started it ends, however that was (Linux only).

    Processes of a launcher that was killed would go on, on GPUs that are no longer theirs.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
