"""The tiny run with all its files in an object store, through Snakemake's S3 plugin and a local S3 server."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.cluster import s3_server
from tests.cluster.tiny_run import CONFIGURED, call, hashes

REASON = s3_server.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_storage_plugin_s3") is None,
        reason="not installed: snakemake-storage-plugin-s3 (pip install -e '.[s3]')",
    ),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
PREFIX = "sdtp/results/tiny/"


@pytest.fixture(scope="module")
def in_bucket(local: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, str]]:
    """A project folder whose run is in a bucket, what a second call of it says, and the files of the bucket."""
    folder = tmp_path_factory.mktemp("bucket") / "sdtp"
    shutil.copytree(local.with_name("untouched"), folder)
    with s3_server.serving() as address:
        options = [
            *("--cores", "2", *CONFIGURED),
            *("--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{s3_server.BUCKET}/sdtp"),
            *("--storage-s3-endpoint-url", address),
            *("--shared-fs-usage", "persistence", "software-deployment", "sources", "source-cache"),
        ]
        environment = {**os.environ, **s3_server.CREDENTIALS}
        call(folder, *options, environment=environment)
        again = call(folder, "--dry-run", *options, environment=environment)
        return folder, again, _hashes(address)


def test_run_in_a_bucket_is_a_run_in_a_folder(local: Path, in_bucket: tuple[Path, str, dict[str, str]]) -> None:
    folder, again, found = in_bucket
    assert "Nothing to be done" in again
    expected = hashes(local / "results" / "tiny")
    assert len(expected) > 25
    assert {name: found.get(name) for name in expected} == expected
    assert {"report.html", "registered.json", "resources/train.tsv"} <= set(found)
    # What this machine keeps of it: the tracking, and which run of that is the pipeline's.
    assert [path.name for path in (folder / "results" / "tiny").iterdir()] == ["mlflow-parent.json"]


def test_its_runs_in_mlflow_hold_what_they_hold_without_a_bucket(
    local: Path, in_bucket: tuple[Path, str, dict[str, str]]
) -> None:
    """What a step reads, what it writes, and what Snakemake measured of it are all of files that go to the bucket."""
    expected, found = (_tracked(folder / "results") for folder in (local, in_bucket[0]))
    assert "snakemake/s" in expected["train keep_ratio=0.8"]["metrics"]
    assert "sdtp.input.saliency" in expected["train keep_ratio=0.8"]["inputs"]
    assert "report.html" in expected["report"]["artifacts"]
    # Copies of the report and the figures are gone when the pipeline's own run is closed; their steps' runs have them.
    assert expected.pop("pipeline tiny")["artifacts"] == {"config.yaml", "report.html", "figures", "tables"}
    assert "config.yaml" in found.pop("pipeline tiny")["artifacts"]
    assert found == expected


def _tracked(results: Path) -> dict[str, dict[str, set[str]]]:
    """Of each finished run: names of its metrics, of what it read and of its artifacts."""
    with sqlite3.connect(results / "mlflow.db") as database:
        metrics, tags = (
            database.execute(f"SELECT run_uuid, key FROM {table}").fetchall() for table in ("metrics", "tags")
        )
        runs = database.execute("SELECT run_uuid, name, artifact_uri FROM runs WHERE status = 'FINISHED'").fetchall()
    return {
        name: {
            "metrics": {key for of, key in metrics if of == run},
            "inputs": {key for of, key in tags if of == run and key.startswith("sdtp.input.")},
            "artifacts": {path.name for path in Path(unquote(urlsplit(artifacts).path)).iterdir()},
        }
        for run, name, artifacts in runs
    }


def _hashes(address: str) -> dict[str, str]:
    s3 = s3_server.client(address)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=s3_server.BUCKET, Prefix=PREFIX)
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {
        key.removeprefix(PREFIX): hashlib.sha256(
            s3.get_object(Bucket=s3_server.BUCKET, Key=key)["Body"].read()
        ).hexdigest()
        for key in keys
    }
