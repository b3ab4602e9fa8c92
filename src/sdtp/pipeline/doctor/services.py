"""The model hub and the MLflow store, asked with a short timeout."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.doctor.finding import INSTALL, Finding, one_line
from sdtp.pipeline.mlflow_store import tracking_uri, without_password
from sdtp.pipeline.mounts import MOUNTS, NETWORK_FILESYSTEMS, filesystem
from sdtp.pipeline.spool import number_waiting, spool_folder

# Seconds that another process may hold SQLite's lock.
_LOCKED = 5.0


def hub(timeout: float) -> Finding:
    """Whether the model hub answers a HEAD request, asked as downloads ask."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return Finding(
            "hub", "failure", "huggingface_hub is not installed, which transformers needs", f"{INSTALL} sdtp"
        )
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        found = "not asked: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; folders and what is cached can be used"
        return Finding("hub", "ok", found)
    advice = (
        "sources of kind local, package and jsonl need no hub; for others look at HF_ENDPOINT and the proxy's settings"
    )
    try:
        status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
    except Exception as error:  # each client library has errors of its own, and all of them mean this
        reason = f"{type(error).__name__}: {one_line(error)}"
        return Finding("hub", "warning", f"{constants.ENDPOINT} is not reached: {reason}", advice)
    if status >= 500 or status == 407:  # of the server, or of a proxy that wants to know who asks
        return Finding("hub", "warning", f"{constants.ENDPOINT} answers with status {status}", advice)
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers")


def mlflow_store(results: Path, timeout: float) -> Finding:
    """Where runs are tracked, and whether that can be reached."""
    name = "MLflow store"
    if importlib.util.find_spec("mlflow") is None:
        return Finding(name, "warning", "MLflow is not installed: nothing is tracked", f"{INSTALL} 'sdtp[pipeline]'")
    try:
        uri = tracking_uri(results / "run", os.environ.get("SDTP_TRACKING_URI"))
    except UserError as error:
        return Finding(name, "failure", str(error), "change it, or unset it: SQLite beside the results is used then")
    if uri.startswith("sqlite:///"):
        return _sqlite(name, Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute())
    shown = without_password(uri)
    if not uri.startswith(("http://", "https://")):
        return Finding(name, "ok", f"{shown}, not asked: a database other than SQLite, or a service")
    advice = (
        "steps run all the same, and their runs wait for `sdtp track sync`; start the server, or correct the address"
    )
    address = re.sub(r"(?<=//)[^/@]*@", "", uri).rstrip("/")  # without name and password, which urllib does not take
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=timeout) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError) as error:  # ValueError: no address at all
        reason = one_line(getattr(error, "reason", error))  # urllib's own error only says that it is one
        return Finding(name, "warning", f"{shown} is not reached: {reason}", advice)
    if status >= 500 or status == 404:  # something else answers there
        return Finding(name, "warning", f"{shown} answers with status {status}", advice)
    return Finding(name, "ok", f"{shown} answers")


def waiting_runs(results: Path) -> Finding:
    """How many runs wait on disk because the store could not be reached."""
    name, spool = "waiting runs", spool_folder(results / "run")
    if number := number_waiting(spool):
        advice = (
            "`sdtp track sync` uploads them, once the store can be reached; runs whose step still works are counted"
        )
        return Finding(name, "warning", f"{number} in {spool}, not in the store", advice)
    return Finding(name, "ok", "none")


def check_shared(uri: str, mounts: Path = MOUNTS) -> None:
    """Refuses a store that several machines would damage: SQLite's locks do not hold over a network file system.

    Raises UserError for an SQLite file on one; `mounts` is the kernel's table of what is mounted.
    """
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    kind = filesystem(path, mounts).kind
    if kind in NETWORK_FILESYSTEMS:
        raise UserError(
            f"tracking.uri (or MLFLOW_TRACKING_URI): {path} is an SQLite file on a network file system ({kind}), and "
            "jobs on several machines would write to it; accepted: a tracking server, see docs/cluster.md"
        )


def _sqlite(name: str, path: Path) -> Finding:
    kind = filesystem(path).kind
    if kind in NETWORK_FILESYSTEMS:
        advice = "SQLite needs a local disk: set tracking.uri (or MLFLOW_TRACKING_URI) to one, or to a tracking server"
        return Finding(name, "warning", f"{path} is on a network file system ({kind})", advice)
    if not path.exists():
        return Finding(name, "ok", f"{path}, which the first run makes")
    if not os.access(path, os.W_OK):
        return Finding(name, "failure", f"{path} cannot be written", "change its permissions or its owner")
    try:
        address = f"file:{urllib.parse.quote(str(path))}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_LOCKED)) as database:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            runs = database.execute("SELECT count(*) FROM runs").fetchone()[0] if "runs" in tables else None
    except sqlite3.Error as error:
        advice = "move it away, and a new one is made; or name another one in tracking.uri"
        return Finding(name, "failure", f"{path} cannot be read: {error}", advice)
    if tables and runs is None:
        advice = "name another file in tracking.uri"
        return Finding(name, "failure", f"{path} is a database, and none of MLflow's", advice)
    return Finding(name, "ok", f"{path}, {runs or 0} runs")
