"""The tiny run with all its files in an object store, through Snakemake's S3 plugin and a local S3 server."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from tests.cluster import s3_server
from tests.cluster.test_workflow import CONFIGURED, SHORTER, call, hashes
from tests.workflow import tiny_model
from tests.workflow.project import TINY, copy_project

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


def test_run_in_a_bucket_is_a_run_in_a_folder(tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "sdtp")
    tiny_model.make(folder / "tiny-model")
    shutil.copy(TINY, folder / "tiny.yaml")
    (folder / "shorter.yaml").write_text(SHORTER, encoding="utf-8")
    shutil.copytree(folder, tmp_path / "local")
    with s3_server.serving() as address:
        storage = [
            *("--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{s3_server.BUCKET}/sdtp"),
            *("--storage-s3-endpoint-url", address),
            *("--shared-fs-usage", "persistence", "software-deployment", "sources", "source-cache"),
        ]
        environment = {**os.environ, **s3_server.CREDENTIALS}
        call(folder, "--cores", "2", *CONFIGURED, *storage, environment=environment)
        again = call(folder, "--cores", "2", "--dry-run", *CONFIGURED, *storage, environment=environment)
        found = _hashes(address)
    assert "Nothing to be done" in again
    call(tmp_path / "local", "--cores", "2", *CONFIGURED)
    expected = hashes(tmp_path / "local" / "results" / "tiny")
    assert len(expected) > 25
    assert {name: found.get(name) for name in expected} == expected
    assert "report.html" in found


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
