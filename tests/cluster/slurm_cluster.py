"""A Slurm cluster on this machine, in a folder: two nodes of two GPUs that are not there.

    python tests/cluster/slurm_cluster.py up FOLDER      # prints what to put into the environment
    python tests/cluster/slurm_cluster.py down FOLDER

It needs root and the packages slurmctld, slurmd, slurm-client and munge (Debian's 22.05; no systemd). Nothing outside
the folder is written, /etc/slurm least of all, and all daemons listen on the loopback interface alone. Only what there
is to allocate is made up: each node says that it has 16 cores, so that jobs of a real cluster's size fit, and its GPUs
are character devices of mknod, which Slurm allocates as any others and which no driver answers for.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

NODES, GPUS, CORES, MEMORY_MB = ("n1", "n2"), 2, 16, 200_000
DAEMONS = ("munged", "slurmctld", "slurmd", "munge", "sinfo", "srun", "sbatch", "squeue", "scontrol")
# Clients that find the cluster without SLURM_CONF: Snakemake's job step takes every SLURM_ variable from the srun it
# calls.
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
NVIDIA_MAJOR = 195

# Slurm runs it in the environment of each task, before it and after it.
_WITNESS = """#!/bin/sh
task="$SLURM_JOB_ID ${{SLURM_STEP_ID:-batch}} $SLURMD_NODENAME $SLURM_PROCID"
echo "$(date +%s.%N) {event} $task ${{CUDA_VISIBLE_DEVICES:--}}" >> {file}
"""


def missing() -> str | None:
    """Why there can be no cluster here, in a few words; None where there can."""
    if os.geteuid() != 0:
        return "only root can start Slurm's daemons"
    absent = [name for name in DAEMONS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    return None


def up(folder: Path) -> None:
    """Starts the cluster in `folder`, which is made, and waits until its nodes are idle.

    Raises RuntimeError, with the daemons' last messages, if they are not within half a minute.
    """
    if " " in str(folder):
        raise RuntimeError(f"{folder}: Slurm takes no spaces in names of folders")
    for name in ("state", "dev", "log", "bin", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge's socket has to be within everybody's reach
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for node in NODES:
        for index in range(GPUS):
            os.mknod(folder / "dev" / f"{node}-gpu{index}", 0o020666, os.makedev(NVIDIA_MAJOR, index))
    (folder / "slurm.conf").write_text(_configuration(folder), encoding="utf-8")
    (folder / "gres.conf").write_text(_devices(folder), encoding="utf-8")
    for client in CLIENTS:
        program = folder / "bin" / client
        real = shutil.which(client, path=_search_path())
        program.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n', encoding="utf-8")
        program.chmod(0o755)
    for event in ("starts", "ends"):
        program = folder / "bin" / f"task-{event}"
        program.write_text(_WITNESS.format(event=event, file=folder / "tasks.txt"), encoding="utf-8")
        program.chmod(0o755)
    files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "seed")]
    logs = [f"--log-file={folder}/log/munged.log", f"--pid-file={folder}/munged.pid"]
    try:
        _start(folder, "munged", f"--key-file={key}", *files, *logs, "--num-threads=2")
        _start(folder, "slurmctld", "-i")
        for node in NODES:
            _start(folder, "slurmd", "-N", node)
        _until_idle(folder, 30)
    except (RuntimeError, subprocess.CalledProcessError, TimeoutError) as error:
        logs = [f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("log/*"))]
        down(folder)
        raise RuntimeError("\n".join([f"no cluster in {folder}: {error}", *logs])) from error


def down(folder: Path) -> None:
    """Ends its jobs and daemons, and waits until they are gone; files stay."""
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(["scancel", "--user=root"], env=environment(folder), timeout=10, check=False)
    for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess, ValueError):
            process = psutil.Process(int((folder / f"{name}.pid").read_text()))
            process.terminate()
            process.wait(timeout=30)


def environment(folder: Path) -> dict[str, str]:
    """The environment in which Slurm's commands speak to this cluster; not as a job of another."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    return {**kept, "PATH": f"{folder}/bin{os.pathsep}{_search_path()}", "SLURM_CONF": f"{folder}/slurm.conf"}


def call(folder: Path, *command: str, timeout: float = 120) -> str:
    """What a command of Slurm prints; its errors are raised with what it said."""
    done = subprocess.run(
        command, env=environment(folder), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _configuration(folder: Path) -> str:
    controller, *ports = _free_ports(1 + len(NODES))
    host = socket.gethostname()
    lines = [
        "ClusterName=sdtp",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmdLogFile={folder}/log/slurmd-%n.log",
        # What needs no control groups.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        # Jobs are started at once, and told of for an hour: there is no accounting to ask later.
        "SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0",
        "MinJobAge=3600",
        "KillWait=2",
        "GresTypes=gpu",
        "DefMemPerCPU=1000",
        f"TaskProlog={folder}/bin/task-starts",
        f"TaskEpilog={folder}/bin/task-ends",
    ]
    for node, port in zip(NODES, ports, strict=True):
        size = f"CPUs={CORES} RealMemory={MEMORY_MB} Gres=gpu:fake:{GPUS}"
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}")
    lines += [
        "PartitionName=cpu Nodes=n1 Default=YES MaxTime=1-00:00:00",
        "PartitionName=gpu Nodes=n1 MaxTime=2-00:00:00",
        "PartitionName=both Nodes=n1,n2 MaxTime=2-00:00:00",
    ]
    return "".join(f"{line}\n" for line in lines)


def _devices(folder: Path) -> str:
    """With `Flags=nvidia_gpu_env` Slurm names a job's devices in CUDA_VISIBLE_DEVICES; it asks no driver for them."""
    lines = [
        f"NodeName={node} Name=gpu Type=fake File={folder}/dev/{node}-gpu[0-{GPUS - 1}] Flags=nvidia_gpu_env"
        for node in NODES
    ]
    return "".join(f"{line}\n" for line in ["AutoDetect=off", *lines])


def _states(folder: Path) -> dict[str, str]:
    done = subprocess.run(
        ["sinfo", "--Node", "--noheader", "--format=%N %T"],
        env=environment(folder), capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    return dict(line.split() for line in done.stdout.splitlines())


def _start(folder: Path, *command: str) -> None:
    """Each puts itself into the background once it is ready to."""
    log = folder / "log" / f"{command[0]}-start.log"
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(
            command, env=environment(folder), stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=60, check=True
        )


def _until_idle(folder: Path, seconds: float) -> None:
    """Asks the controller, which has nothing to tell of by itself, until it has heard from every node."""
    ends = time.monotonic() + seconds
    while (states := _states(folder)) != dict.fromkeys(NODES, "idle"):
        if time.monotonic() > ends:
            raise TimeoutError(f"waited {seconds:.0f} s for the nodes: {states}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _search_path() -> str:
    """PATH with the folders of daemons, which not everybody's has."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def main(argv: Sequence[str]) -> None:
    """Starts or ends the cluster of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    folder = args.folder.absolute()
    if args.action == "down":
        down(folder)
        return
    if (reason := missing()) is not None:
        parser.error(reason)
    up(folder)
    sys.stdout.write(f"export SLURM_CONF={folder}/slurm.conf PATH={folder}/bin:$PATH\n")


if __name__ == "__main__":
    main(sys.argv[1:])
