"""One run as a step sees it: told to the MLflow store, or to the disk where the store cannot be used."""

import importlib.util
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdtp.pipeline import operations
from sdtp.pipeline.files import canonical_json
from sdtp.pipeline.mlflow_store import Store, without_password
from sdtp.pipeline.operations import Operation, Point
from sdtp.pipeline.resources import measured
from sdtp.pipeline.spool import Entry, written
from sdtp.pipeline.upload import upload_all

logger = logging.getLogger(__name__)

# Longer settings are in the artifact only: MLflow cuts parameters at 6,000 characters without a word.
LONGEST_PARAM = 250
SECONDS_BETWEEN_BATCHES = 10.0


class TrackedRun:
    """One run, told to the store, or, from its first failure on, to the disk. It never raises.

    Without an `opening` it takes everything and does nothing.
    """

    def __init__(self, opening: Mapping[str, Any] | None, spool: Path | str) -> None:
        self.run_id = ""
        self.spool = Path(spool)  # where it waits for a store that cannot be used
        self.failure = ""  # why the store is not used, one line
        self._opening = opening
        self._uri = ""
        self._store: Store | None = None
        self._entry: Entry | None = None
        self._held = ExitStack()
        self._points: dict[tuple[str, int], Point] = {}
        self._sent = time.monotonic()

    @property
    def is_told(self) -> bool:
        """Whether it takes anything at all."""
        return self._opening is not None

    def connect(self, uri: str, *, alone: bool, first: bool = False) -> None:
        """Opens the run in the store, or goes on with it there.

        alone: see `Store.create_run`. first: the store is looked through for runs that were killed.
        """
        if self._opening is None:
            return
        if importlib.util.find_spec("mlflow") is None:
            self._drop("MLflow is not installed")
            return
        self._uri = uri
        try:
            self._store = Store(uri, self._opening["experiment"])
            if first:
                closed = self._store.close_abandoned()
                if closed:
                    logger.info("closed in MLflow as KILLED, since nobody works on them: %s", ", ".join(closed))
            self.run_id = self._store.create_run(self._opening, alone=alone)
        except Exception as error:  # whatever a database or a server may raise, the step goes on
            self._fail("opening the run", error)

    def wait(self, reason: str) -> None:
        """Writes everything to the disk, without asking the store; reason: why."""
        self.failure = reason

    def settings(self, content: str) -> None:
        """Logs the settings, JSON text, as parameters and as an artifact."""
        flat = {key: value for key, value in _flat(json.loads(content)) if len(value) <= LONGEST_PARAM}
        self._do("logging the settings", operations.params(flat))
        self.text("settings.json", content)

    def text(self, name: str, content: str) -> None:
        """Logs a text file."""
        self._do(f"logging {name}", operations.text(name, content))

    def tags(self, values: Mapping[str, str]) -> None:
        """Sets tags."""
        self._do("setting tags", operations.tags(values))

    def metric(self, name: str, value: float, step: int | None) -> None:
        """Takes one finite number; for a name and step that already wait in this batch, the last value counts."""
        self.points([(name, value, operations.now(), step or 0)])

    def points(self, points: Iterable[Point]) -> None:
        """Takes finite numbers with their times, as `metric` does."""
        if self._opening is None:
            return
        for point in points:
            name, _, _, step = point
            self._points[name, step] = point
            self._flush_when_due()

    def dataset(self, name: str, path: str | Path, digest: str, revision: str | None) -> None:
        """Logs a data set the step reads."""
        source = {"uri": str(path), "digest": digest, "revision": revision}
        self._do(f"logging data set {name}", operations.dataset(name, source))

    def artifact(self, path: str | Path, folder: str | None) -> None:
        """Copies a file, or a folder with its name, to the tracker."""
        if self._opening is not None and not Path(path).exists():
            logger.warning("%s is not there, and not logged", path)
            return
        self._do(f"logging {path}", operations.artifact(Path(path), folder))

    def latest_artifacts(self, folder: str, count: int) -> None:
        """Removes all but the last `count` entries of an artifact folder, in the order of their names."""
        self._do(f"removing old artifacts of {folder}", operations.latest(folder, count))

    def register(self, name: str, model: Path, pruner: Path, evidence: Mapping[str, Any]) -> None:
        """Registers a trained pruner, see `registry.register`."""
        self._do(f"registering {name}", operations.register(name, model, pruner, evidence))

    def resources_of_children(self) -> None:
        """Gives each of the run's children in the store what Snakemake measured of its job."""
        if self._store is None or self.failure:
            return
        try:
            for child in self._store.runs(f"tags.`mlflow.parentRunId` = '{self.run_id}'"):
                record = child.data.tags.get("sdtp.resources")
                found = measured(Path(record), child.info.start_time) if record else None
                if found is not None:
                    operations.apply(self._store, child.info.run_id, found)
        except Exception as error:  # as in `connect`
            self._fail("logging what Snakemake measured", error)

    def close(self, status: str) -> None:
        """Sends what waits and ends the run; status: FINISHED, FAILED or KILLED.

        A run that went to the disk only because the store was away for a while is uploaded, if it is back.
        """
        self._flush()
        failed_before = bool(self.failure)
        self._do("closing the run", operations.close(status, operations.now()))
        self.release()
        if failed_before and self._store is not None and self._opening is not None:
            try:
                upload_all(self.spool, self._uri, lambda label: None, frozenset([self._opening["id"]]))
            except Exception as error:  # as in `connect`
                logger.info("MLflow is still not to be used: %s", one_line(error))

    def release(self) -> None:
        """Lets go of what the run holds on disk, so that another process may add to it or upload it."""
        self._held.close()
        self._entry = None

    def _flush_when_due(self) -> None:
        if len(self._points) >= operations.MOST_METRICS or time.monotonic() - self._sent >= SECONDS_BETWEEN_BATCHES:
            self._flush()

    def _flush(self) -> None:
        if self._points:
            # Not forgotten before they are sent: a signal may come in between, and then they are sent again.
            self._do("logging metrics", operations.metrics(self._points.values()))
            self._points = {}
        self._sent = time.monotonic()

    def _do(self, what: str, operation: Operation) -> None:
        if self._opening is None:
            return
        if self._store is not None and not self.failure:
            try:
                operations.apply(self._store, self.run_id, operation)
                return
            except operations.RefusedError as error:
                logger.warning("tracking failed at %s: the store refuses it: %s", what, error)
                return
            except Exception as error:  # as in `connect`
                self._fail(what, error)
        self._write(operation)

    def _write(self, operation: Operation) -> None:
        if self._opening is None:
            return
        try:
            if self._entry is None:
                self._entry = self._held.enter_context(written(self.spool, self._opening))
            self._entry.append(operation)
        except OSError as error:
            self._drop(f"what it is told cannot be kept in {self.spool} either ({one_line(error)})")

    def _fail(self, what: str, error: Exception) -> None:
        self.failure = one_line(error)
        logger.warning(
            "tracking failed at %s (%s); the run waits in %s for `sdtp track sync`", what, self.failure, self.spool
        )

    def _drop(self, reason: str) -> None:
        logger.warning("tracking failed: %s; the results on disk are whole", reason)
        self.failure = self.failure or reason
        self._opening = None
        self.release()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("training.steps", "60") and so on, for every leaf of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else canonical_json(value)


def one_line(error: Exception) -> str:
    """What went wrong, for a warning; MLflow quotes the store's address, whose password is left out."""
    return f"{type(error).__name__}: {' '.join(without_password(str(error)).split())[:300]}"
