"""Uploads runs that wait on disk for an MLflow store that could not be reached."""

import argparse
import logging
import os
from pathlib import Path

from sdtp.errors import UserError
from sdtp.pipeline.mlflow_store import tracking_uri
from sdtp.pipeline.spool import damaged, spool_folder, waiting
from sdtp.pipeline.tracked_run import one_line
from sdtp.pipeline.upload import upload_all

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run the tool; `argv` are its arguments."""
    parser = argparse.ArgumentParser(
        prog="sdtp track",
        description=f"{__doc__} `sync` may be cut short and called again: every run arrives once. Runs whose step "
        "still works are left alone.",
    )
    parser.add_argument("what", choices=["sync"], metavar="sync", help="upload what waits")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the runs; results unless given"
    )
    parser.add_argument(
        "--uri", metavar="URI", help="store to upload to; MLFLOW_TRACKING_URI, or the one each run was meant for"
    )
    args = parser.parse_args(argv)
    spool = spool_folder(args.results / "run")
    if args.uri:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        tracking_uri(args.results, args.uri)
    for error in damaged(spool):
        logger.warning("%s", error)
    due = len(waiting(spool))
    if not due:
        logger.info("nothing waits in %s that can be uploaded", spool)
        return
    uploaded: list[str] = []

    def told(label: str) -> None:
        uploaded.append(label)
        logger.info("uploaded %s", label)

    try:
        left = upload_all(spool, args.uri, told)
    except Exception as error:  # whatever a database or a server may raise
        raise UserError(
            f"{len(uploaded)} of {due} runs of {spool} are uploaded, the others wait on: {one_line(error)}"
        ) from error
    if left.going:
        logger.info("%d left, whose steps still work", left.going)
    if left.homeless:
        raise UserError(f"{left.homeless} runs of {spool} were meant for a store with a password: name it with --uri")
