"""What profiles/kubernetes would submit: the plugin's own jobs, written down by an endpoint that runs none of them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import s3_server
from tests.cluster.tiny_run import call
from tests.workflow.project import ROOT, copy_project, job_counts

REASON = s3_server.missing()
NEEDED = ("snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_s3")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="not installed: snakemake-executor-plugin-kubernetes (pip install -e '.[kubernetes]')",
    ),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@contextmanager
def recording(look: Callable[[], None]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address that takes jobs as Kubernetes' API does, and the list of those it was given; each of them fails.

    `look` is called with each job that comes.
    """
    jobs: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/jobs"):
                jobs.append(body)
                look()
            self._answer(body)

        def do_GET(self) -> None:
            if self.path.endswith("/status"):
                name = self.path.split("/")[-2]
                [job] = [job for job in jobs if job["metadata"]["name"] == name]
                self._answer({**job, "status": {"failed": 1}})
            else:
                self._answer({"items": []})

        def do_DELETE(self) -> None:
            self._answer({"status": "Success"})

        def _answer(self, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", jobs
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = copy_project(tmp_path / "sdtp")
    shutil.copy(ROOT / ".gitignore", folder / ".gitignore")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def arguments(address: str) -> list[str]:
    return ["--workflow-profile", "profiles/kubernetes", "--storage-s3-endpoint-url", address]


def environment(folder: Path, kubernetes: str = "http://127.0.0.1:9") -> dict[str, str]:
    path = folder / "kubeconfig.json"
    cluster = {"name": "k", "cluster": {"server": kubernetes}}
    context = {"name": "k", "context": {"cluster": "k", "user": "k"}}
    users = [{"name": "k", "user": {}}]
    path.write_text(json.dumps({"clusters": [cluster], "contexts": [context], "users": users, "current-context": "k"}))
    named = {"SDTP_BUCKET": s3_server.BUCKET, "SDTP_IMAGE": "registry.test/sdtp:1", "KUBECONFIG": str(path)}
    return {**os.environ, **named, **s3_server.CREDENTIALS}


def test_paper_run_is_planned_in_a_bucket(clone: Path) -> None:
    with s3_server.serving() as address:
        options = ["--dry-run", *arguments(address), "--configfile", "config/paper/qwen2-7b.yaml"]
        output = call(clone, *options, environment=environment(clone))
    assert job_counts(output)["saliency"] == 8
    assert "s3://bucket/sdtp/results/qwen2-7b/report.html" in output


def test_training_job_asks_for_its_gpu_and_brings_the_sources(clone: Path) -> None:
    inputs = [
        "model/x",
        "data/x",
        "saliency/index.json",
        "saliency/shard-0.safetensors",
        "saliency/shard-1.safetensors",
    ]
    packed: list[bytes] = []
    with s3_server.serving() as address:
        s3 = s3_server.client(address)
        for name in inputs:
            s3.put_object(Bucket=s3_server.BUCKET, Key=f"sdtp/results/default/{name}", Body=b"x")

        def unpack() -> None:
            """What the job would find: Snakemake removes the sources in the end."""
            keys = [item["Key"] for item in s3.list_objects_v2(Bucket=s3_server.BUCKET)["Contents"]]
            packed.extend(
                s3.get_object(Bucket=s3_server.BUCKET, Key=key)["Body"].read() for key in keys if ".tar" in key
            )

        with recording(unpack) as (kubernetes, jobs):
            options = ["--allowed-rules", "train", "--", "results/default/training/history.csv"]
            # Nobody runs it, and Snakemake notices.
            output = call(clone, *arguments(address), *options, environment=environment(clone, kubernetes), fails=True)
    assert len(packed) == 1, output
    [job] = jobs
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    asked = {"memory": "96000M", "ephemeral-storage": "50000M", "nvidia.com/gpu": "1"}
    assert container["resources"]["requests"] == {"cpu": "15200m", **asked}
    assert container["resources"]["limits"] == {"cpu": "16000m", **asked}
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert container["image"] == "registry.test/sdtp:1"
    assert "--target-jobs" in container["args"][1]
    names = {entry["name"] for entry in container["env"]}
    assert set(s3_server.CREDENTIALS) <= names
    with tarfile.open(fileobj=io.BytesIO(packed[0])) as archive:
        assert {"workflow/schemas/config.schema.yaml", "config/config.yaml", "src/sdtp/cli.py"} <= set(
            archive.getnames()
        )
