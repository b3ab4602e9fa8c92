"""MLflow: one parent run for a pipeline invocation, one child run for each step.

Every step writes its results beside its outputs, so that a tracker may fail: apart from a tracking URI that cannot
work, which is refused before any work starts, a failure here is one warning and nothing else. A rerun is always a new
run, whose tag `sdtp.supersedes` holds the id of the run it replaces; no run is ever continued, so that none holds two
values for one step of a curve. Metrics are sent in batches.
"""

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp.pipeline.files import canonical_json, write_atomically
from sdtp.pipeline.mlflow_store import Store, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

PARENT_FILE = "mlflow-parent.json"
# Longer settings are in the artifact only: MLflow cuts parameters at 6,000 characters without a word.
LONGEST_PARAM = 250
BATCH = 1000  # metrics in one request, MLflow's limit
SECONDS_BETWEEN_BATCHES = 10.0


def start_pipeline(results_dir: Path, config: Mapping[str, Any], experiment: str, uri: str | None) -> None:
    """Opens the parent run of one pipeline invocation; call it once, before the first step.

    Makes the database and the experiment, so that steps never race on them, and writes what the steps need to know to
    `results_dir/mlflow-parent.json`: the parent's id, the configuration's hash, the git commit. When the tracker fails,
    the file says so, and the steps do not try again. `config` is logged whole, as the artifact config.yaml.

    Raises UserError for a tracking URI that cannot work.
    """
    chosen = tracking_uri(results_dir, uri)
    commit, dirty = _git()
    facts: dict[str, Any] = {
        "config_sha256": sha256(canonical_json(config).encode()).hexdigest(),
        "git_commit": commit,
        "git_dirty": dirty,
    }
    with _failure_is_a_warning("starting the pipeline's run") as failures:
        store = Store(chosen, experiment)
        tags = {**_origin(facts), "sdtp.step": "pipeline", "sdtp.run": results_dir.name}
        facts["run_id"] = store.create_run(f"pipeline {results_dir.name}", results_dir, tags)
        store.client.log_dict(facts["run_id"], dict(config), "config.yaml")
    if failures:
        facts = {"failed": failures[0]}
    with write_atomically(results_dir / PARENT_FILE) as temporary:
        temporary.write_text(json.dumps({**facts, "experiment": experiment}, indent=2) + "\n", "utf-8")


def finish_pipeline(results_dir: Path, status: str) -> None:
    """Closes the parent run that `start_pipeline` opened; status: FINISHED, FAILED or KILLED.

    The tracking URI is looked up as the steps do, with SDTP_TRACKING_URI.
    """
    with _failure_is_a_warning("closing the pipeline's run"):
        facts = json.loads((results_dir / PARENT_FILE).read_text("utf-8"))
        if "run_id" in facts:
            store = Store(tracking_uri(results_dir, os.environ.get("SDTP_TRACKING_URI")), facts["experiment"])
            with store.writing():
                store.client.set_terminated(facts["run_id"], status)


def open_run(name: str, wildcards: Mapping[str, Any], settings: str, output: Path) -> "TrackedRun":
    """Opens the run of one step, as a child of the run that SDTP_PARENT_RUN_FILE names.

    SDTP_PARENT_RUN_FILE, SDTP_TRACKING_URI, SDTP_EXPERIMENT and SDTP_RUN come from the workflow. With neither of the
    first two nor MLFLOW_TRACKING_URI set, the step was called by hand and is not tracked.

    name: the step. settings: its settings, JSON text: short values become parameters, the whole text the artifact
    settings.json. output: what the step writes; the latest run that wrote it is the one this run supersedes. A step
    that writes below variants/NAME of its run's results belongs to that variant of an ablation, and is tagged with it.

    Raises UserError for a tracking URI that cannot work.
    """
    parent_file = os.environ.get("SDTP_PARENT_RUN_FILE")
    uri = os.environ.get("SDTP_TRACKING_URI")
    if not (parent_file or uri or os.environ.get("MLFLOW_TRACKING_URI")):
        return TrackedRun(None, "")
    chosen = tracking_uri(Path(parent_file or output).parent, uri)
    run = TrackedRun(None, "")
    with _failure_is_a_warning("starting the step's run"):
        facts: dict[str, Any] = {}
        if parent_file and Path(parent_file).is_file():
            facts = json.loads(Path(parent_file).read_text("utf-8"))
        if "failed" in facts:
            logger.warning("not tracked, since the pipeline's run could not start: %s", facts["failed"])
            return run
        if not facts:
            facts["git_commit"], facts["git_dirty"] = _git()
        tags = {
            **_origin(facts),
            "sdtp.step": name,
            "sdtp.wildcards": canonical_json(wildcards),
            "sdtp.run": os.environ.get("SDTP_RUN", ""),
            "mlflow.source.name": f"sdtp {name}",
        }
        if "run_id" in facts:
            tags["mlflow.parentRunId"] = facts["run_id"]
        variant = _variant(output, tags["sdtp.run"])
        tags |= variant
        identity = sorted([*wildcards.items(), *((key.removeprefix("sdtp."), value) for key, value in variant.items())])
        label = " ".join([name, *(f"{key}={value}" for key, value in identity)])
        store = Store(chosen, os.environ.get("SDTP_EXPERIMENT") or facts.get("experiment") or "sdtp")
        run = TrackedRun(store, store.create_run(label, output, tags))
        run.settings(settings)
    return run


class TrackedRun:
    """The run of one step; without a store it takes everything and does nothing. It never raises.

    After its first failure it warns and sends nothing more, but `close` is still tried.
    """

    def __init__(self, store: Store | None, run_id: str) -> None:
        self.run_id = run_id
        self._store = store
        self._failed = store is None
        self._waiting: dict[tuple[str, int], Metric] = {}
        self._sent = time.monotonic()

    def settings(self, text: str) -> None:
        """Logs the settings, JSON text, as parameters and as an artifact."""

        def send(store: Store) -> None:
            from mlflow.entities import Param

            params = [Param(key, value) for key, value in _flat(json.loads(text)) if len(value) <= LONGEST_PARAM]
            store.log_batch(self.run_id, params=params)
            store.client.log_text(self.run_id, text, "settings.json")

        self._attempt("logging the settings", send)

    def metric(self, name: str, value: float, step: int | None) -> None:
        """Takes one finite number; for a name and step that already wait in this batch, the last value counts."""
        if self._failed:
            return
        from mlflow.entities import Metric

        step = step or 0
        self._waiting[name, step] = Metric(name, value, time.time_ns() // 1_000_000, step)
        if len(self._waiting) >= BATCH or time.monotonic() - self._sent >= SECONDS_BETWEEN_BATCHES:
            self._flush()

    def dataset(self, name: str, path: str | Path, digest: str, revision: str | None) -> None:
        """Logs a data set the step reads. MLflow keeps 36 characters of a digest; the source has all of it."""

        def send(store: Store) -> None:
            from mlflow.entities import Dataset, DatasetInput

            source = {"uri": str(path), "digest": digest, "revision": revision}
            dataset = Dataset(name, digest[:36], "local", json.dumps(source))
            with store.writing():
                store.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset)])

        self._attempt(f"logging data set {name}", send)

    def artifact(self, path: str | Path, folder: str | None) -> None:
        """Copies a file, or a folder with its name, to the tracker."""

        def send(store: Store) -> None:
            store.client.log_artifact(self.run_id, str(path), folder)

        self._attempt(f"logging {path}", send)

    def latest_artifacts(self, folder: str, count: int) -> None:
        """Removes all but the last `count` entries of an artifact folder, in the order of their names.

        A store that cannot delete keeps them all, without a word: that is no failure of the run's.
        """

        def send(store: Store) -> None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            found = sorted(entry.path for entry in store.client.list_artifacts(self.run_id, folder))
            repository = get_artifact_repository(store.client.get_run(self.run_id).info.artifact_uri)
            with suppress(NotImplementedError):  # how MLflow's repositories say that they cannot delete
                for path in found[:-count]:
                    repository.delete_artifacts(path)

        self._attempt(f"removing old artifacts of {folder}", send)

    def close(self, status: str, device: str) -> None:
        """Sends what waits and ends the run; status: FINISHED, FAILED or KILLED; device: what the step computed on."""
        self._flush()
        self._failed = self._store is None  # once more: a run must not look as if it were still going

        def send(store: Store) -> None:
            from mlflow.entities import RunTag

            store.log_batch(self.run_id, tags=[RunTag("sdtp.device", device)])
            with store.writing():
                store.client.set_terminated(self.run_id, status)

        self._attempt("closing the step's run", send)

    def _flush(self) -> None:
        waiting, self._waiting, self._sent = list(self._waiting.values()), {}, time.monotonic()
        if waiting:
            self._attempt("logging metrics", lambda store: store.log_batch(self.run_id, metrics=waiting))

    def _attempt(self, what: str, send: Callable[[Store], None]) -> None:
        if self._failed or self._store is None:
            return
        with _failure_is_a_warning(what) as failures:
            send(self._store)
        self._failed = bool(failures)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("training.steps", "60") and so on, for every leaf of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else canonical_json(value)


def _origin(facts: Mapping[str, Any]) -> dict[str, str]:
    """Tags that say what made a run: code, configuration, machine, library versions."""
    tags = {
        "mlflow.source.git.commit": facts.get("git_commit", "unknown"),
        "sdtp.git_dirty": facts.get("git_dirty", "unknown"),
        "sdtp.config_sha256": facts.get("config_sha256", "unknown"),
        "sdtp.gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "sdtp.version.python": platform.python_version(),
    }
    return tags | {f"sdtp.version.{package}": version(package) for package in ("sdtp", "torch", "transformers")}


def _variant(output: Path, run: str) -> dict[str, str]:
    """The tag of an output in a folder <run>/variants/<variant>/, no tag for any other."""
    parts = output.parts
    for at in range(len(parts) - 3):
        if parts[at : at + 2] == (run, "variants"):
            return {"sdtp.variant": parts[at + 2]}
    return {}


def _git() -> tuple[str, str]:
    """The commit checked out in the working folder, and "true" where files differ from it; "unknown" without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, timeout=20, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"
    return commit.strip(), str(bool(changes.strip())).lower()


@contextmanager
def _failure_is_a_warning(what: str) -> Iterator[list[str]]:
    """Gives a list that holds, after the block, what went wrong in it: one line, or nothing."""
    failures: list[str] = []
    try:
        yield failures
    except Exception as error:  # whatever a database or a server may raise, the step goes on
        failures.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        logger.warning("tracking failed at %s (%s); the results on disk are whole", what, failures[0])
