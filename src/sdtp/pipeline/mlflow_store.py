"""Where runs are stored: an MLflow tracking server or database, and how several processes share it."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtp.errors import UserError


def tracking_uri(results_dir: Path, uri: str | None) -> str:
    """Where runs are stored: MLFLOW_TRACKING_URI, else `uri`, else the SQLite file `mlflow.db` beside `results_dir`.

    Raises UserError for a plain folder (`file:./mlruns`, `./mlruns`), which MLflow 3 no longer writes to.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI") or uri or f"sqlite:///{results_dir.resolve().parent / 'mlflow.db'}"
    if chosen.startswith("file:") or (":" not in chosen and chosen != "databricks"):
        raise UserError(
            f"tracking.uri (or MLFLOW_TRACKING_URI): {chosen!r} is a folder, which MLflow no longer writes to; "
            "accepted: sqlite:///FILE, http(s)://SERVER, another database URL, or null for SQLite under results/"
        )
    return chosen


class Store:
    """An experiment in an MLflow store, both made where missing, and the one writer at a time that SQLite allows."""

    def __init__(self, uri: str, experiment: str) -> None:
        # No usage reports; and a server that is away costs seconds, not MLflow's several minutes.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient  # slow to import

        self._file = Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
        with self.writing():
            if not uri.startswith(("http:", "https:", "databricks")):
                _reach(uri)
            self.client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._find_or_create(experiment)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held around every change. MLflow's own waiting does not cover two processes that make the schema, nor two
        transactions that both read and then want to write, which SQLite fails at once."""
        if self._file is None:
            yield
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file.with_name(f".{self._file.name}.lock"), "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def create_run(self, label: str, output: Path, tags: dict[str, str]) -> str:
        """Opens a run for what writes `output`, tagged with the latest one that did, and gives its id."""
        place, host = str(output.resolve()), socket.gethostname()
        with self.writing():
            earlier = self.client.search_runs(
                [self.experiment_id], f"tags.`sdtp.output` = '{place}'", max_results=1, order_by=["start_time DESC"]
            )
            for run in earlier:
                tags = {**tags, "sdtp.supersedes": run.info.run_id}
                if run.info.status == "RUNNING" and run.data.tags.get("sdtp.host") == host:
                    # Outputs have one writer at a time, so that one was killed before it could say so.
                    self.client.set_terminated(run.info.run_id, "KILLED")
            tags = {**tags, "sdtp.output": place, "sdtp.host": host}
            return str(self.client.create_run(self.experiment_id, tags=tags, run_name=label).info.run_id)

    def log_batch(self, run_id: str, **batch: Any) -> None:
        """MlflowClient.log_batch, as the one writer."""
        with self.writing():
            self.client.log_batch(run_id, **batch)

    def _find_or_create(self, experiment: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            artifacts = None if self._file is None else (self._file.resolve().parent / "mlartifacts").as_uri()
            try:
                return str(self.client.create_experiment(experiment, artifact_location=artifacts))
            except MlflowException:  # on a server, which this process cannot lock, another one may have been faster
                found = self.client.get_experiment_by_name(experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise UserError(
                f"tracking.experiment: {experiment!r} was deleted in MLflow; restore it or name another one"
            )
        return str(found.experiment_id)


def _reach(database: str) -> None:
    """Raises at once for a database that cannot be read; MLflow would try again for most of an hour."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(database)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()
