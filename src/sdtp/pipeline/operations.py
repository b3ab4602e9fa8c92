"""What is told of a run, as plain data: done in an MLflow store now, or written down and done there later.

Doing any of it twice is doing it once, so that what was sent and not answered may be sent again: a metric is known by
its name, step, time and value, a model by the run it belongs to, and everything else replaces itself.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdtp.pipeline import registry
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.mounts import place

Operation = dict[str, Any]
# One number of a run: name, value, milliseconds since 1970, step.
Point = tuple[str, float, int, int]

# MLflow's limits of one request.
MOST_METRICS, MOST_PARAMS = 1000, 100
# How a server's database says that two writers were in each other's way; MLflow does not try again by itself.
_CONFLICTS = ("IntegrityError", "database is locked")
_TRIES, _SECONDS = 5, 0.2
# Operations that hand over a file or a folder, under the key `path`.
WITH_FILES = ("artifact", "register")


class RefusedError(Exception):
    """The store was reached, and will never take this."""


def now() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def metrics(points: Iterable[Point]) -> Operation:
    """Numbers; at most `MOST_METRICS`. What MLflow takes in no name is replaced there: `sdtp+h2o` is `sdtp-on-h2o`."""
    return {"kind": "metrics", "points": [list(point) for point in points]}


def params(values: Mapping[str, str]) -> Operation:
    """Parameters, which never change."""
    return {"kind": "params", "values": dict(values)}


def tags(values: Mapping[str, str]) -> Operation:
    """Tags, which replace those of the same name."""
    return {"kind": "tags", "values": dict(values)}


def text(name: str, content: str) -> Operation:
    """A text file among the run's artifacts."""
    return {"kind": "text", "name": name, "content": content}


def dataset(name: str, source: Mapping[str, Any]) -> Operation:
    """A data set that was read: `uri`, `digest`, `revision`. MLflow keeps 36 characters of a digest, the source all."""
    return {"kind": "dataset", "name": name, "source": dict(source)}


def artifact(path: Path, folder: str | None) -> Operation:
    """A file, or a folder with its name."""
    return {"kind": "artifact", "path": str(path), "folder": folder}


def latest(folder: str, count: int) -> Operation:
    """Removes all but the last `count` entries of an artifact folder, in the order of their names."""
    return {"kind": "latest", "folder": folder, "count": count}


def register(name: str, model: Path, pruner: Path, evidence: Mapping[str, Any]) -> Operation:
    """A version of a registered model, see `registry.register`."""
    return {"kind": "register", "name": name, "path": str(model), "pruner": place(pruner), "evidence": dict(evidence)}


def close(status: str, at: int) -> Operation:
    """Ends the run: FINISHED, FAILED or KILLED, at `at` milliseconds since 1970."""
    return {"kind": "close", "status": status, "at": at}


def apply(store: Store, run_id: str, operation: Operation) -> None:
    """Does an operation on a run.

    Raises RefusedError for one that the store will not take, now or later; anything else that is raised means that the
    store could not be used, and that it may be tried again.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(_TRIES):
        try:
            _DOING[operation["kind"]](store, run_id, operation)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise RefusedError(" ".join(str(error).split())[:300]) from error
            if attempt + 1 == _TRIES or not any(conflict in str(error) for conflict in _CONFLICTS):
                raise
            time.sleep(_SECONDS * (attempt + 1))
        else:
            return


def _metrics(store: Store, run_id: str, operation: Operation) -> None:
    from mlflow.entities import Metric

    points = [Metric(_accepted(name), *numbers) for name, *numbers in operation["points"]]
    store.log_batch(run_id, metrics=points)


def _accepted(name: str) -> str:
    # One name that MLflow does not take would cost the whole batch.
    return re.sub(r"[^\w./: -]", "-", name.replace("+", "-on-"))


def _params(store: Store, run_id: str, operation: Operation) -> None:
    from mlflow.entities import Param

    values = [Param(key, value) for key, value in operation["values"].items()]
    for start in range(0, len(values), MOST_PARAMS):
        store.log_batch(run_id, params=values[start : start + MOST_PARAMS])


def _tags(store: Store, run_id: str, operation: Operation) -> None:
    store.log_batch(run_id, tags=_run_tags(operation["values"]))


def _run_tags(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in values.items()]


def _text(store: Store, run_id: str, operation: Operation) -> None:
    store.client.log_text(run_id, operation["content"], operation["name"])


def _dataset(store: Store, run_id: str, operation: Operation) -> None:
    from mlflow.entities import Dataset, DatasetInput

    source = operation["source"]
    read = Dataset(operation["name"], source["digest"][:36], "local", json.dumps(source))
    with store.writing():
        store.client.log_inputs(run_id, datasets=[DatasetInput(read)])


def _artifact(store: Store, run_id: str, operation: Operation) -> None:
    store.client.log_artifact(run_id, operation["path"], operation["folder"])


def _latest(store: Store, run_id: str, operation: Operation) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found = sorted(entry.path for entry in store.client.list_artifacts(run_id, operation["folder"]))
    repository = get_artifact_repository(store.client.get_run(run_id).info.artifact_uri)
    # How MLflow's repositories say that they cannot delete: then all are kept, which is no failure of the run's.
    with suppress(NotImplementedError):
        for path in found[: -operation["count"]]:
            repository.delete_artifacts(path)


def _register(store: Store, run_id: str, operation: Operation) -> None:
    evidence = operation["evidence"]
    version = registry.register(store, operation["name"], Path(operation["path"]), operation["pruner"], evidence)
    store.log_batch(run_id, tags=_run_tags({"sdtp.registered": f"models:/{operation['name']}/{version}"}))


def _close(store: Store, run_id: str, operation: Operation) -> None:
    with store.writing():
        store.client.set_terminated(run_id, operation["status"], operation["at"])


_DOING: Mapping[str, Callable[[Store, str, Operation], None]] = {
    "metrics": _metrics,
    "params": _params,
    "tags": _tags,
    "text": _text,
    "dataset": _dataset,
    "artifact": _artifact,
    "latest": _latest,
    "register": _register,
    "close": _close,
}
