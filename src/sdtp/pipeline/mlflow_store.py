"""Where runs are stored: an MLflow tracking server or database, and how several processes share it."""

import fcntl
import itertools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtp.errors import UserError
from sdtp.pipeline.locks import is_free, lock_file
from sdtp.pipeline.mounts import place


def tracking_uri(results_dir: Path, uri: str | None) -> str:
    """Where runs are stored: MLFLOW_TRACKING_URI, else `uri`, else the SQLite file `mlflow.db` beside `results_dir`.

    Raises UserError for a plain folder (`file:./mlruns`, `./mlruns`), which MLflow 3 no longer writes to.
    """
    chosen = os.environ.get("MLFLOW_TRACKING_URI") or uri or f"sqlite:///{results_dir.parent.resolve() / 'mlflow.db'}"
    if chosen.startswith("file:") or (":" not in chosen and chosen != "databricks"):
        raise UserError(
            f"tracking.uri (or MLFLOW_TRACKING_URI): {chosen!r} is a folder, which MLflow no longer writes to; "
            "accepted: sqlite:///FILE, http(s)://SERVER, another database URL, or null for SQLite under results/"
        )
    return chosen


def without_password(text: str) -> str:
    """A text with the passwords of the addresses in it left out: `http://me:…@host`."""
    return re.sub(r'(//[^/@:\s"]*):[^/\s"]*@', r"\1:…@", text)


class Store:
    """An experiment in an MLflow store, both made where missing, and the one writer at a time that SQLite allows.

    Every run has a tag `sdtp.id`, given before the store knows of it: by it a run is found again whose making was not
    answered, and is never made twice.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        # No usage reports, no addresses on standard output; and a server that is away costs seconds, not MLflow's
        # several minutes.
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient  # slow to import

        self._uri = uri
        self._file = Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None
        with self.writing():
            if not uri.startswith(("http:", "https:", "databricks")):
                _reach(uri)
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
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

    @contextmanager
    def named_by_the_environment(self) -> Iterator[None]:
        """Held where MLflow looks for a store in MLFLOW_TRACKING_URI, whichever its client was made for."""
        before = os.environ.get("MLFLOW_TRACKING_URI")
        os.environ["MLFLOW_TRACKING_URI"] = self._uri
        try:
            yield
        finally:
            if before is None:
                del os.environ["MLFLOW_TRACKING_URI"]
            else:
                os.environ["MLFLOW_TRACKING_URI"] = before

    def create_run(self, opening: Mapping[str, Any], *, alone: bool) -> str:
        """Opens the run that `opening` describes, unless it is there already, and gives its id.

        Runs that wrote the same output form a chain, in the order they began: each names the one it replaces
        (`sdtp.supersedes`) and the one that replaced it (`sdtp.superseded_by`), also where it is opened only later.

        opening: `id`, `label`, `tags` (`sdtp.place` among them: what the run writes, see `mounts.place`), and
            `started`, milliseconds since 1970.
        alone: whether this process is known to be the one writer of the output, so that an earlier run that still goes
            there was killed before it could say so, and is closed as KILLED.
        """
        with self.writing():
            run_id = self.find(opening["id"]) or self._create(opening)
            output, started = opening["tags"]["sdtp.place"], f"attributes.start_time {{}} {opening['started']}"
            # Of two: this run is among those that began no later.
            before = self.runs_of(output, "attributes.start_time DESC", 2, started.format("<="))
            earlier = [run for run in before if run.info.run_id != run_id][:1]
            later = self.runs_of(output, "attributes.start_time ASC", 1, started.format(">"))
            chain = [*(run.info.run_id for run in earlier), run_id, *(run.info.run_id for run in later)]
            for old, new in itertools.pairwise(chain):
                self.client.set_tag(new, "sdtp.supersedes", old)
                self.client.set_tag(old, "sdtp.superseded_by", new)
            for run in earlier:
                if alone and run.info.status == "RUNNING":
                    self.client.set_terminated(run.info.run_id, "KILLED")
        return run_id

    def find(self, identity: str) -> str | None:
        """The id of the run with this `sdtp.id`, None where there is none.

        A server that made a run and could not say so was asked again, by MLflow itself: what it made beyond the first
        one is deleted, empty as it is.
        """
        first, *extra = sorted(run.info.run_id for run in self.runs(f"tags.`sdtp.id` = '{identity}'")) or [None]
        for run_id in extra:
            self.client.delete_run(run_id)
        return first

    def runs(self, condition: str, order: str = "attributes.start_time ASC", count: int = 1000) -> list[Any]:
        """Runs of the experiment that fulfil a condition in MLflow's search language, deleted ones left out."""
        return list(self.client.search_runs([self.experiment_id], condition, max_results=count, order_by=[order]))

    def runs_of(self, output: str, order: str, count: int, condition: str | None = None) -> list[Any]:
        """Runs of the experiment that wrote `output`, as `mounts.place` names it; they are given as `runs` does."""
        further = f" and {condition}" if condition else ""
        quote = '"' if "'" in output else "'"
        if quote not in output:
            return self.runs(f"tags.`sdtp.place` = {quote}{output}{quote}{further}", order, count)
        # The search language cannot write both kinds of quotes: to LIKE, _ is any one character.
        pattern = output.replace("'", "_")
        similar = self.runs(f"tags.`sdtp.place` LIKE '{pattern}'{further}", order)
        return [run for run in similar if run.data.tags["sdtp.place"] == output][:count]

    def close_abandoned(self) -> list[str]:
        """Closes, as KILLED, the runs that still go although nobody writes their output any more; gives their names.

        Whether somebody does, the lock beside the output says, if the output's path means the same file here as it did
        where the run was opened (`mounts.place`). Where there is no lock, a run of this host is taken for dead, its
        results having been deleted, and one of another host is left alone.
        """
        closed = []
        for run in self.runs("attributes.status = 'RUNNING'"):
            output = run.data.tags.get("sdtp.output")
            if output is None or run.data.tags.get("sdtp.place") != place(Path(output)):
                continue
            free = is_free(lock_file(Path(output)))
            if free or (free is None and run.data.tags.get("sdtp.host") == socket.gethostname()):
                with self.writing():
                    self.client.set_terminated(run.info.run_id, "KILLED")
                closed.append(str(run.info.run_name))
        return closed

    def log_batch(self, run_id: str, **batch: Any) -> None:
        """MlflowClient.log_batch, as the one writer."""
        with self.writing():
            self.client.log_batch(run_id, **batch)

    def _create(self, opening: Mapping[str, Any]) -> str:
        run = self.client.create_run(
            self.experiment_id, start_time=opening["started"], tags=opening["tags"], run_name=opening["label"]
        )
        # Which of several there is, if MLflow asked more than once.
        return self.find(opening["id"]) or str(run.info.run_id)

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
