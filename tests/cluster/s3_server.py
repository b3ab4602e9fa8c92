"""An S3 server on this machine that keeps its files in memory: moto's, from whatever environment has it on the PATH."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

BUCKET = "bucket"
CREDENTIALS = {"SNAKEMAKE_STORAGE_S3_ACCESS_KEY": "key", "SNAKEMAKE_STORAGE_S3_SECRET_KEY": "secret"}


def missing() -> str | None:
    """Why there can be none here; None where there can."""
    if shutil.which("moto_server") is None:
        return "no S3 server: moto_server is not on the PATH (pip install 'moto[s3,server]', in any environment)"
    return None


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server with an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = ["moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            _wait(server)
            client(address).create_bucket(Bucket=BUCKET)
            yield address
        finally:
            server.terminate()


def client(address: str):  # type: ignore[no-untyped-def]  # boto3 makes its classes when it runs
    """A client of such a server."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )


def _wait(server: subprocess.Popen[str]) -> None:
    """Reads what the server says until it listens, and then on: a pipe that nobody empties stops who fills it."""
    assert server.stderr is not None
    too_late = threading.Timer(120, server.kill)
    too_late.start()
    said = []
    for line in server.stderr:
        said.append(line)
        if "Running on" in line:
            break
    else:
        raise RuntimeError(f"moto_server did not start: {''.join(said)}")
    too_late.cancel()
    threading.Thread(target=server.stderr.read, daemon=True).start()
