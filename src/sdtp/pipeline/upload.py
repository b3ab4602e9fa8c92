"""Brings runs that wait on disk into the MLflow store, each exactly once however often this is cut short."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdtp.pipeline import operations
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.spool import Entry, claimed, waiting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Left:
    """What an upload left on disk: runs that still go, and runs that no store was named for."""

    going: int
    homeless: int


def upload_all(spool: Path, uri: str | None, told: Callable[[str], None], only: frozenset[str] | None = None) -> Left:
    """Uploads every waiting run, parents before children.

    uri: of the store; None: MLFLOW_TRACKING_URI, or what the run was meant for.
    told: called with the label of each run that was uploaded.
    only: ids of the runs to upload, None for all.

    Raises whatever the store raises, at the first run that it does not take whole; that run and those after it wait on.
    """
    stores: dict[tuple[str, str], Store] = {}
    going = homeless = 0
    for folder in waiting(spool):
        if only is not None and folder.name not in only:
            continue
        with claimed(folder) as entry:
            if entry is None:
                going += 1
                continue
            opening = entry.opening
            place = uri or os.environ.get("MLFLOW_TRACKING_URI") or opening["uri"]
            if place is None:
                homeless += 1
                continue
            key = (place, opening["experiment"])
            if key not in stores:
                stores[key] = Store(*key)
            upload(entry, stores[key])
            told(opening["label"])
    return Left(going, homeless)


def upload(entry: Entry, store: Store) -> None:
    """Uploads one entry and deletes it. What the store will never take is warned of and left out.

    A run that was never closed belongs to a process that was killed, and ends so, when it was last heard of.
    """
    opening = entry.opening
    tags = dict(opening["tags"])
    if opening["parent"] and (parent := store.find(opening["parent"])):
        tags["mlflow.parentRunId"] = parent
    run_id = store.create_run({**opening, "tags": tags}, alone=False)
    closed, last = False, opening["started"]
    for operation in entry.operations():
        closed = closed or operation["kind"] == "close"
        last = max([last, *(point[2] for point in operation.get("points", []))])
        try:
            operations.apply(store, run_id, operation)
        except operations.RefusedError as error:
            logger.warning("%s: left out, since the store refuses it: %s", opening["label"], error)
    if not closed:
        operations.apply(store, run_id, operations.close("KILLED", last))
    entry.discard()
