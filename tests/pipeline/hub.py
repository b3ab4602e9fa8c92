"""A hub on 127.0.0.1 that serves one repository: the boundary is HTTP, the client is the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = ("main", "v1", COMMIT)


@contextmanager
def serve(repository: str, folder: Path, kind: str = "models") -> Iterator[tuple[str, list[str]]]:
    """Serves `folder` as `repository` at `COMMIT`, also called main and v1: gives (endpoint, requested paths)."""
    requests: list[str] = []
    api, files = f"/api/{kind}/{repository}", f"{'/datasets' if kind == 'datasets' else ''}/{repository}/resolve/"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlparse(self.path).path
            requests.append(f"{self.command} {path}")
            names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
            if path == api or path in {f"{api}/revision/{branch}" for branch in BRANCHES}:
                self.answer({"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            elif path.startswith(f"{api}/tree/"):
                self.answer([entry(name) for name in names])
            elif path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                self.send_file(name) if revision in BRANCHES and name in names else self.missing("EntryNotFound")
            elif path.startswith(f"{api}/revision/"):
                self.missing("RevisionNotFound")
            else:
                self.missing("RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def answer(self, body: Any) -> None:
            self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def send_file(self, name: str) -> None:
            content = (folder / name).read_bytes()
            self.reply(200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT})

        def missing(self, code: str) -> None:
            self.reply(404, b"{}", {"X-Error-Code": code})

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test's output clean."""

    def oid(content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def entry(name: str) -> dict[str, Any]:
        content = (folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": oid(content)}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
