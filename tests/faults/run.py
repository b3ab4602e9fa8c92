"""A finished run of the tiny configuration, its jobs, and what is the same in two runs of one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.forking import Forking
from tests.workflow import tiny_model
from tests.workflow.project import TINY, copy_project, snakemake

# The arguments of a step that name what it writes; other steps read what the further ones name.
WRITTEN = ("--output", "--metrics")
FURTHER = {
    "train": ("--history",),
    "tables": ("--latency", "--quality", "--comparisons", "--targets"),
    "figures": ("--sparsity", "--foresight"),
}
LONGEST = 160  # characters of a message in the table
# What a clock or a meter says, in files that hold it beside results.
MEASURED = re.compile(r"_s$|seconds$|^peak_|per_second/|speedup/|resumed$")


@dataclass(frozen=True)
class Job:
    """One job of the workflow.

    Attributes:
        name: as its log is called: `train`, `evaluate/sdtp-0.8`.
        arguments: of `sdtp`.
        outputs: what it writes, relative to the project.
        seconds: that it took, undisturbed.
    """

    name: str
    arguments: list[str]
    outputs: tuple[str, ...]
    seconds: float = 0.0

    @property
    def step(self) -> str:
        """The step's name."""
        return self.arguments[2]

    def with_settings(self, changes: dict[str, Any] | None) -> list[str]:
        """Its arguments with settings laid over its own."""
        arguments = list(self.arguments)
        at = arguments.index("--settings") + 1
        arguments[at] = json.dumps(_laid_over(json.loads(arguments[at]), changes or {}))
        return arguments


@dataclass(frozen=True)
class Run:
    """A project folder in which the tiny run is finished, and its jobs by name, in an order in which they can run."""

    folder: Path
    jobs: dict[str, Job]

    def copy(self, target: Path) -> Path:
        """The run's files and its model in a folder that may be changed."""
        for part in ("results", "tiny-model"):
            shutil.copytree(self.folder / part, target / part)
        shutil.copy(self.folder / "tiny.yaml", target)
        return target

    def differences(self, folder: Path, job: Job) -> list[str]:
        """Files among what a job writes that are there and not this run's; measured numbers are let be.

        A file under a temporary name is none of them: nobody reads it, and the next writer removes it.
        """
        return [
            name
            for output in job.outputs
            for name in _names(folder / output, folder)
            if not _is_no_output(name) and _content(folder / name) != _content(self.folder / name)
        ]

    def missing(self, folder: Path, job: Job) -> list[str]:
        """Files of this run among what a job writes that are not there."""
        return [
            name
            for output in job.outputs
            for name in _names(self.folder / output, self.folder)
            if not (folder / name).exists()
        ]


def finish(folder: Path, forking: Forking) -> Run:
    """Makes a project and runs its jobs, each as Snakemake would, in `folder`."""
    copy_project(folder)
    tiny_model.make(folder / "tiny-model")
    shutil.copy(TINY, folder / "tiny.yaml")
    planned = snakemake(folder, "--dry-run", "--configfile", "tiny.yaml").stdout
    jobs = {}
    for line in re.findall(r"^Shell command: (.*)$", planned, flags=re.MULTILINE):
        words = shlex.split(line)
        if "--log" not in words:
            continue  # of a target, which runs nothing
        arguments = words[words.index("--log") :]
        name = re.sub(r"^logs/[^/]+/|\.log$", "", arguments[1])
        written = (*WRITTEN, *FURTHER.get(arguments[2], ()))
        outputs = tuple(value for key, value in itertools.pairwise(arguments) if key in written)
        ended = forking(folder, arguments)
        assert ended.status == 0, ended.stderr
        jobs[name] = Job(name, arguments, outputs, ended.seconds)
    return Run(folder, jobs)


def remove(path: Path) -> None:
    """Deletes a file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def everything(folder: Path, *but: str) -> dict[str, str]:
    """SHA-256 of every file below a folder, `but` some of its parts, and the locks, which stay where they are."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in _names(folder, folder)
        if Path(name).parts[0] not in but and not name.endswith(".lock")
    }


def brief(message: str, folder: Path) -> str:
    """A message as the table has it: without the test's own folder, and not whole where it is long."""
    message = message.removeprefix("error: ").replace(f"{folder}/", "")
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}…"


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inside = isinstance(value, dict) and key != "source"
        merged[key] = _laid_over(merged.get(key, {}), value) if inside else value
    return merged


def _names(path: Path, folder: Path) -> Iterator[str]:
    if path.is_file():
        yield str(path.relative_to(folder))
    for parent, _, names in os.walk(path):
        for name in names:
            yield str(Path(parent, name).relative_to(folder))


def _is_no_output(name: str) -> bool:
    last = Path(name).name
    return last.startswith(".tmp-") or last == ".snakemake_timestamp"


def _content(path: Path) -> object:
    """What of a file is the same whenever it is made."""
    if path.suffix == ".json" and path.parent.name in ("metrics", "benchmark"):
        return _unmeasured(json.loads(path.read_text("utf-8")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(inner) for key, inner in value.items() if not MEASURED.search(key)}
    return [_unmeasured(inner) for inner in value] if isinstance(value, list) else value
