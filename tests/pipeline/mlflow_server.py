"""A real `mlflow server` that a test can stop and start again, and a proxy before it that loses answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATIENCE = 60.0


class Server:
    """`mlflow server` over a SQLite file in `folder`, always at one address; made by `start`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.database = folder / "server.db"
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self, workers: int = 1) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", str(workers)]
        self._process = subprocess.Popen(
            ["timeout", "300", *command, "--host", "127.0.0.1", "--port", str(self._port)],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # its workers are stopped with it
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            # One worker listens after it has started up; several start up after the first process listens.
            listens = any("running on" in one for one in said)
            if listens and sum("startup complete" in one for one in said) == workers:
                # Nobody reads what it says from here on, and a full pipe would stop it.
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return
        raise AssertionError("the server did not start:\n" + "".join(said))

    def stop(self) -> None:
        """Kills it."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(PATIENCE)
            self._process = None


class LossyProxy(ThreadingHTTPServer):
    """Hands requests on to `upstream`; where `loses` says so, the answer is thrown away after the request was done."""

    daemon_threads = True

    def __init__(self, upstream: str, loses: Callable[[str], bool]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.loses = upstream, loses
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: LossyProxy

    def _hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Accept-Encoding")}
        request = urllib.request.Request(self.server.upstream + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        if self.server.loses(f"{self.command} {self.path}"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _hand_on  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
