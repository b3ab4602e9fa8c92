"""Every step that reads examples says so in MLflow, by the content hash that the data step gave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sdtp.pipeline.data_folder import split_hash
from sdtp.pipeline.files import sha256_file

READ = {
    "data": {"train", "heldout"},
    "test-data": {"test"},
    "saliency": {"train", "heldout"},
    "train": {"train", "heldout"},
    "generate": {"test"},
    "benchmark": {"benchmark"},
    "evaluate": {"test"},
}

pytestmark = pytest.mark.slow


def test_runs_name_the_data_they_read(project: Path) -> None:
    results = project / "results" / "tiny"
    folders = {"train": "data", "heldout": "data", "test": "test-data"}
    hashes = {split: split_hash(results / folder, split) for split, folder in folders.items()}
    hashes["benchmark"] = sha256_file(results / "benchmark-text.json")
    client = MlflowClient(f"sqlite:///{project / 'results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sdtp")
    assert experiment is not None
    for step, names in READ.items():
        runs = client.search_runs([experiment.experiment_id], f"tags.`sdtp.step` = '{step}'")
        assert runs, step
        for run in runs:
            read = {given.dataset.name: json.loads(given.dataset.source) for given in run.inputs.dataset_inputs}
            assert {name: source["digest"] for name, source in read.items()} == {name: hashes[name] for name in names}
