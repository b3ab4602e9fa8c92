"""Every check, in turn. None needs torch, MLflow or a network to be there: that one is missing is what it finds out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from sdtp.pipeline.doctor.finding import Finding
from sdtp.pipeline.doctor.hardware import attention, cuda, devices
from sdtp.pipeline.doctor.services import hub, mlflow_store, waiting_runs
from sdtp.pipeline.doctor.software import library, python, workflow
from sdtp.pipeline.doctor.storage import disk

TIMEOUT = 5.0


def examine(results: Path, timeout: float = TIMEOUT) -> Iterator[Finding]:
    """The findings of every check; nothing is changed, but for probe files that are removed again.

    Args:
        results: the folder that runs are written to.
        timeout: seconds to wait for a server.
    """
    checks: list[Callable[[], Finding | list[Finding]]] = [
        python,
        library,
        workflow,
        cuda,
        devices,
        attention,
        functools.partial(disk, results),
        functools.partial(hub, timeout),
        functools.partial(mlflow_store, results, timeout),
        functools.partial(waiting_runs, results),
    ]
    for check in checks:
        found = check()
        yield from found if isinstance(found, list) else [found]
