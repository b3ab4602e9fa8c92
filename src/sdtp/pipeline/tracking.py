"""MLflow: one parent run for a pipeline invocation, one child run for each step.

Every step writes its results beside its outputs, so that a tracker may fail: apart from a tracking URI that cannot
work, which is refused before any work starts, a failure here is one warning, and what could not be sent waits on disk
for `sdtp track sync`. A rerun is always a new run, and the two name each other in tags; no run is ever continued, so
that none holds two values for one step of a curve. Metrics are sent in batches.
"""

import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from sdtp.errors import UserError
from sdtp.pipeline import operations, provenance
from sdtp.pipeline.files import canonical_json, digest, write_atomically
from sdtp.pipeline.locks import lock_file, only_writer
from sdtp.pipeline.mlflow_store import tracking_uri, without_password
from sdtp.pipeline.mounts import place
from sdtp.pipeline.resources import measured
from sdtp.pipeline.spool import claimed, openings, spool_folder, waiting
from sdtp.pipeline.tracked_run import TrackedRun, one_line
from sdtp.pipeline.upload import upload_all

logger = logging.getLogger(__name__)

PARENT_FILE = "mlflow-parent.json"
# What the pipeline's own run is given of the results, where this invocation made it.
SHOWN = ("report.html", "figures", "tables")

# Of each invocation of this process, by its results folder: what its steps were told, and what it holds.
_INVOCATIONS: dict[Path, tuple[dict[str, Any], ExitStack]] = {}


def start_pipeline(results_dir: Path, config: Mapping[str, Any], experiment: str, uri: str | None) -> Path:
    """Opens the parent run of one pipeline invocation; call it once, before the first step.

    Makes the database and the experiment, so that steps never race on them, closes the runs that a killed invocation
    left going, and writes what the steps need to know to a file, which it gives: how the parent was opened, the
    configuration's hash, the git commit. When the tracker fails, the file says so, and the steps do not try again.
    The file is `results_dir/mlflow-parent.json`; for the time that another invocation works on the same run it is one
    of this invocation's own beside it. `config` is logged whole but for passwords in addresses, as the artifact
    config.yaml.

    Raises UserError for a tracking URI that cannot work.
    """
    chosen = tracking_uri(results_dir, uri)
    commit, dirty = provenance.git()
    facts: dict[str, Any] = {
        "config_sha256": digest(config),
        "git_commit": commit,
        "git_dirty": dirty,
    }
    tags = {**provenance.origin(facts), "sdtp.step": "pipeline", "sdtp.run": results_dir.name}
    output, parent_file, held = _hold(results_dir)
    opening = _opening(f"pipeline {results_dir.name}", output, tags, chosen, experiment)
    run = TrackedRun(opening, spool_folder(results_dir))
    run.connect(chosen, alone=True, first=True)
    run.text("config.yaml", yaml.safe_dump(json.loads(without_password(canonical_json(config))), sort_keys=False))
    run.release()
    facts |= {"opening": opening, "experiment": experiment}
    facts |= {"failed": run.failure} if run.failure else {"run_id": run.run_id}
    with write_atomically(parent_file) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    _INVOCATIONS[results_dir.resolve()] = facts, held
    return parent_file


def finish_pipeline(results_dir: Path, status: str) -> None:
    """Closes the parent run that `start_pipeline` opened in this process; status: FINISHED, FAILED or KILLED.

    It is given the report and the figures that this invocation made, and the steps' runs what Snakemake measured of
    their jobs. Runs of this invocation that wait on disk are tried once more. The tracking URI is looked up as the
    steps do, with SDTP_TRACKING_URI.
    """
    if (invocation := _INVOCATIONS.pop(results_dir.resolve(), None)) is not None:
        facts, held = invocation
        with held:
            _finish(results_dir, status, facts)


def _finish(results_dir: Path, status: str, facts: Mapping[str, Any]) -> None:
    opening, spool = facts["opening"], spool_folder(results_dir)
    uri = tracking_uri(results_dir, os.environ.get("SDTP_TRACKING_URI"))
    run = TrackedRun(opening, spool)
    if "failed" in facts:
        run.wait(facts["failed"])
    else:
        run.connect(uri, alone=False)
    for name in SHOWN:
        path = results_dir / name
        if path.exists() and path.stat().st_mtime_ns // 1_000_000 >= opening["started"]:
            run.artifact(path, None)
    run.resources_of_children()
    run.close(status)
    try:
        _resources_of_waiting(spool, opening["id"])
        mine = frozenset(one["id"] for one in openings(spool).values() if opening["id"] in (one["id"], one["parent"]))
        if mine:
            upload_all(spool, uri, lambda label: logger.info("%s: uploaded to MLflow after all", label), mine)
    except Exception as error:  # as in TrackedRun
        logger.warning(
            "MLflow is still not to be used (%s): this invocation's runs wait in %s; `sdtp track sync` uploads them",
            one_line(error),
            spool,
        )


def open_run(
    name: str,
    wildcards: Mapping[str, Any],
    settings: str,
    output: Path,
    inputs: Mapping[str, Sequence[Path]],
    resources: Path,
) -> TrackedRun:
    """Opens the run of one step, as a child of the run that SDTP_PARENT_RUN_FILE names.

    SDTP_PARENT_RUN_FILE, SDTP_TRACKING_URI, SDTP_EXPERIMENT and SDTP_RUN come from the workflow. With neither of the
    first two nor MLFLOW_TRACKING_URI set, the step was called by hand and is not tracked.

    name: the step. settings: its settings, JSON text: short values become parameters, the whole text the artifact
    settings.json. output: what the step writes, of which this process is the one writer; the latest run that wrote it
    is the one this run supersedes. A step that writes below variants/NAME of its run's results belongs to that variant
    of an ablation, and is tagged with it. inputs: what it reads, under the names that the hashes are tagged with.
    resources: where Snakemake will put what it measured of the job.

    Raises UserError for a tracking URI that cannot work.
    """
    parent_file = os.environ.get("SDTP_PARENT_RUN_FILE")
    uri = os.environ.get("SDTP_TRACKING_URI")
    if not (parent_file or uri or os.environ.get("MLFLOW_TRACKING_URI")):
        return TrackedRun(None, "")
    results_dir = Path(parent_file or output).parent
    chosen = tracking_uri(results_dir, uri)
    facts = _facts(Path(parent_file)) if parent_file else {}
    if not facts:
        facts["git_commit"], facts["git_dirty"] = provenance.git()
    run_name = os.environ.get("SDTP_RUN", "")
    variant = provenance.variant(output, run_name)
    tags = {
        **provenance.origin(facts),
        "sdtp.step": name,
        "sdtp.rule": name.replace("-", "_"),
        "sdtp.wildcards": canonical_json(wildcards),
        "sdtp.run": run_name,
        "sdtp.resources": str(resources),
        "mlflow.source.name": f"sdtp {name}",
        **provenance.hashed(inputs),
        **variant,
    }
    if "run_id" in facts:
        tags["mlflow.parentRunId"] = facts["run_id"]
    identity = sorted([*wildcards.items(), *((key.removeprefix("sdtp."), value) for key, value in variant.items())])
    label = " ".join([name, *(f"{key}={value}" for key, value in identity)])
    experiment = os.environ.get("SDTP_EXPERIMENT") or facts.get("experiment") or "sdtp"
    parent = facts.get("opening", {}).get("id")
    run = TrackedRun(_opening(label, output, tags, chosen, experiment, parent), spool_folder(results_dir))
    if "failed" in facts:
        logger.warning("the run waits in %s, since the pipeline's could not be opened: %s", run.spool, facts["failed"])
        run.wait(facts["failed"])
    else:
        run.connect(chosen, alone=True)
    run.settings(settings)
    return run


def _opening(
    label: str, output: Path, tags: Mapping[str, str], uri: str, experiment: str, parent: str | None = None
) -> dict[str, Any]:
    """How to open a run, now or later, see `Store.create_run` and `spool.Entry`."""
    identity = uuid.uuid4().hex
    return {
        "id": identity,
        "label": label,
        "tags": {**tags, "sdtp.id": identity, "sdtp.output": str(output.resolve()), "sdtp.place": place(output)},
        "started": operations.now(),
        "experiment": experiment,
        "parent": parent,
        # A password is not written down; whoever uploads the run gives the address again.
        "uri": None if urlsplit(uri).password else uri,
    }


def _hold(results_dir: Path) -> tuple[Path, Path, ExitStack]:
    """What an invocation alone writes, where its steps are told of it, and the lock that says that it lives.

    It writes `results_dir`. If another invocation does, whose targets are others, it has a file of its own there, for
    as long as the lock is held.
    """
    if (unfinished := _INVOCATIONS.pop(results_dir.resolve(), None)) is not None:
        unfinished[1].close()
    held, parent_file = ExitStack(), results_dir / PARENT_FILE
    try:
        held.enter_context(only_writer(results_dir.resolve()))
    except UserError:
        own = parent_file.with_stem(f"{parent_file.stem}-{uuid.uuid4().hex[:8]}")
        held.enter_context(only_writer(own))
        for file in (lock_file(own), own):
            held.callback(file.unlink, missing_ok=True)
        return own, own, held
    return results_dir, parent_file, held


def _facts(parent_file: Path) -> dict[str, Any]:
    """What `start_pipeline` wrote down; nothing where it did not."""
    try:
        facts: dict[str, Any] = json.loads(parent_file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts


def _resources_of_waiting(spool: Path, invocation: str) -> None:
    """Adds what Snakemake measured to the runs of an invocation that wait on disk."""
    for folder in waiting(spool):
        with claimed(folder) as entry:
            if entry is None or entry.opening["parent"] != invocation:
                continue
            opening = entry.opening
            found = measured(Path(opening["tags"]["sdtp.resources"]), opening["started"])
            if found is not None:
                entry.append(found)
