"""Files that are not what they are taken for: what each is damaged by, who reads it, and what is said of it.

Each case damages one file of a finished tiny run and names the job that reads it. None of them may run code: pickles,
templates and configurations that could, would write the file `canary`.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.forking import SITE

CANARY = "canary"
TEST_DATA, TEXT = "results/tiny/test-data", "results/tiny/benchmark-text.json"
REFERENCE = "results/tiny/evaluation/reference.safetensors"
MODEL, DATA, PRUNER, SALIENCY = (
    "results/tiny/model",
    "results/tiny/data",
    "results/tiny/pruner",
    "results/tiny/saliency",
)
ROWS = [{"prompt": f"What is the {number}th question?", "response": f"answer {number}"} for number in range(20)]


class Evil:
    """Writes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


@dataclass(frozen=True)
class Case:
    """A damaged file.

    Attributes:
        name: what it is.
        job: which step reads it, by the name of its log.
        damage: does it, in the folder of a finished run; may return settings of the job to lay over its own.
        words: what the message has to hold; the first names the file.
    """

    name: str
    job: str
    damage: Callable[[Path], dict[str, Any] | None]
    words: tuple[str, ...]


CASES: list[Case] = []


def case(job: str, *words: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Adds a case that is called like the function that damages."""

    def add(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES.append(Case(damage.__name__, job, damage, words))
        return damage

    return add


def truncate(path: Path, fraction: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def own_model(folder: Path) -> Path:
    return folder / "tiny-model"


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the JSON header of a safetensors file and leaves its bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    described = json.loads(data[8 : 8 + length])
    change(described)
    text = json.dumps(described).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# Records ------------------------------------------------------------------------------------------------------------


def records(path: str, kind: str = "jsonl", **data: Any) -> dict[str, Any]:
    source = {"kind": kind, "ref": path, "revision": None, "sha256": None}
    return {"data": {"train": {"source": source}, "test": {"source": source}, **data}}


def jsonl(folder: Path, last: bytes) -> dict[str, Any]:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    (folder / "rows.jsonl").write_bytes(lines + last)
    return records("rows.jsonl")


@case("data", "rows.jsonl, line 21", "a JSON object is needed")
def jsonl_cut_off(folder: Path) -> Any:
    return jsonl(folder, b'{"prompt": "half a')


@case("data", "rows.jsonl, line 21", "is not a JSON object")
def jsonl_list(folder: Path) -> Any:
    return jsonl(folder, b'["prompt", "response"]\n')


@case("data", "rows.jsonl, line 21", "'response' is 7")
def jsonl_number_for_text(folder: Path) -> Any:
    return jsonl(folder, b'{"prompt": "x", "response": 7}\n')


@case("data", "rows.jsonl, line 21", "'response' is nan")
def jsonl_nan(folder: Path) -> Any:
    return jsonl(folder, b'{"prompt": "x", "response": NaN}\n')


@case("data", "rows.jsonl, line 21", "a JSON object is needed")
def jsonl_number_of_ten_thousand_digits(folder: Path) -> Any:
    return jsonl(folder, b'{"id": ' + b"9" * 10_000 + b', "prompt": "x", "response": "y"}\n')


@case("data", "rows.jsonl, line 21", "nested too deeply")
def jsonl_nested_a_hundred_thousand_deep(folder: Path) -> Any:
    return jsonl(folder, b'{"prompt": ' + b"[" * 100_000 + b"\n")


@case("data", "rows.jsonl, line 1", "not UTF-8")
def jsonl_pickle(folder: Path) -> Any:
    (folder / "rows.jsonl").write_bytes(pickle.dumps(Evil()))
    return records("rows.jsonl")


@case("data", "rows.jsonl, line 21", "longer than")
def jsonl_endless_line(folder: Path) -> Any:
    settings = jsonl(folder, b"")
    with (folder / "rows.jsonl").open("r+b") as file:
        file.truncate(2**28)  # a hole, which takes no room on the disk
    return settings


@case("data", "rows.jsonl has no rows")
def jsonl_empty(folder: Path) -> Any:
    (folder / "rows.jsonl").write_bytes(b"")
    return records("rows.jsonl")


@case("data", "rows", "a JSON-lines file is needed")
def jsonl_folder(folder: Path) -> Any:
    (folder / "rows").mkdir()
    return records("rows")


def parquet(folder: Path, rows: Any, **options: Any) -> Path:
    path = folder / "tables" / "rows.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows), path, **options)
    return path


COLUMNS = {name: [row[name] for row in ROWS] for name in ("prompt", "response")}


@case("data", "rows.parquet", "a Parquet file is needed")
def parquet_cut_off(folder: Path) -> Any:
    truncate(parquet(folder, COLUMNS))
    return records("tables", "local")


@case("data", "rows.parquet", "'response' is 0")
def parquet_numbers_for_texts(folder: Path) -> Any:
    parquet(folder, {**COLUMNS, "response": list(range(20))})
    return records("tables", "local")


@case("data", "rows.parquet", "unpacks to")
def parquet_bomb(folder: Path) -> Any:
    text = "0" * 2**26
    path = parquet(folder, {"prompt": [text], "response": [text]}, compression="zstd")
    assert path.stat().st_size < 2**20
    return records("tables", "local")


@case("data", "saved", "state.json")
def dataset_state_cut_off(folder: Path) -> Any:
    shutil.copytree(folder / DATA / "train", folder / "saved")
    truncate(folder / "saved" / "state.json")
    return records("saved", "local")


@case("data", "saved", "evil.arrow")
def dataset_state_points_outside(folder: Path) -> Any:
    shutil.copytree(folder / DATA / "train", folder / "saved")
    shutil.copy(next((folder / "saved").glob("*.arrow")), folder / "evil.arrow")
    change_json(folder / "saved" / "state.json", _data_files=[{"filename": "../evil.arrow"}])
    return records("saved", "local")


# Models -------------------------------------------------------------------------------------------------------------


@case("model", "tiny-model/config.json")
def model_config_cut_off(folder: Path) -> None:
    truncate(own_model(folder) / "config.json")


@case("model", "tiny-model/config.json", "it holds a list")
def model_config_list(folder: Path) -> None:
    (own_model(folder) / "config.json").write_text("[1, 2]")


@case("model", "tiny-model/config.json", "hidden_size")
def model_config_text_for_number(folder: Path) -> None:
    change_json(own_model(folder) / "config.json", hidden_size="many")


@case("model", "tiny-model/config.json")
def model_config_huge_number(folder: Path) -> None:
    change_json(own_model(folder) / "config.json", hidden_size=10**18)


@case("model", "tiny-model/config.json")
def model_config_negative_number(folder: Path) -> None:
    change_json(own_model(folder) / "config.json", num_hidden_layers=-4)


@case("model", "tiny-model/config.json", "num_hidden_layers")
def model_config_nan(folder: Path) -> None:
    change_json(own_model(folder) / "config.json", num_hidden_layers=float("nan"))


@case("model", "tiny-model", "trust_remote_code")
def model_config_with_code(folder: Path) -> None:
    (own_model(folder) / "evil.py").write_text(f"open({CANARY!r}, 'w')\nclass C: pass\n")
    change_json(own_model(folder) / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})


@case("model", "tiny-model/model.safetensors")
def model_weights_cut_off(folder: Path) -> None:
    truncate(own_model(folder) / "model.safetensors")


@case("model", "tiny-model/model.safetensors")
def model_weights_pickle(folder: Path) -> None:
    (own_model(folder) / "model.safetensors").write_bytes(pickle.dumps(Evil()))


@case("model", "tiny-model/model.safetensors")
def model_weights_torch_save(folder: Path) -> None:
    torch.save({"weight": Evil()}, own_model(folder) / "model.safetensors")


@case("model", "pytorch_model.bin", "pickled weights")
def model_weights_named_as_pickle(folder: Path) -> None:
    (own_model(folder) / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, own_model(folder) / "pytorch_model.bin")


@case("model", "tiny-model/model.safetensors")
def model_weights_header_of_all_bytes(folder: Path) -> None:
    path = own_model(folder) / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


@case("model", "tiny-model/model.safetensors")
def model_weights_outside_their_file(folder: Path) -> None:
    def change(described: dict[str, Any]) -> None:
        described["lm_head.weight"]["data_offsets"] = [2**60, 2**60 + 131072]

    header(own_model(folder) / "model.safetensors", change)


@case("model", "tiny-model/model.safetensors", "layers.1.mlp.up_proj.weight", "shape")
def model_weights_of_another_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 31)

    change_weights(own_model(folder) / "model.safetensors", change)


@case("model", "tiny-model/model.safetensors", "layers.2.self_attn.q_proj.weight", "missing")
def model_weights_missing(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.2.self_attn.q_proj.weight"]

    change_weights(own_model(folder) / "model.safetensors", change)


@case("model", "tiny-model/model.safetensors.index.json", "../evil.safetensors")
def model_index_points_outside(folder: Path) -> None:
    path = own_model(folder) / "model.safetensors"
    names = list(load_file(path))
    shutil.copy(path, folder / "evil.safetensors")
    path.rename(path.with_name("model-00001-of-00001.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../evil.safetensors")}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@case("saliency/0", MODEL, "not finite")
def model_weights_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan"))

    change_weights(folder / MODEL / "model.safetensors", change)


@case("saliency/0", f"{MODEL}/model.safetensors")
def fetched_weights_cut_off(folder: Path) -> None:
    truncate(folder / MODEL / "model.safetensors")


@case("check", f"{MODEL}/manifest.json")
def manifest_cut_off(folder: Path) -> None:
    truncate(folder / MODEL / "manifest.json")


@case("data", f"{MODEL}/manifest.json", "context_length")
def manifest_without_a_key(folder: Path) -> None:
    (folder / MODEL / "manifest.json").write_text("{}")


# Tokenizers ---------------------------------------------------------------------------------------------------------


@case("data", MODEL, "tokenizer")
def tokenizer_cut_off(folder: Path) -> None:
    truncate(folder / MODEL / "tokenizer.json")


@case("data", MODEL, "tokenizer")
def tokenizer_of_wrong_types(folder: Path) -> None:
    change_json(folder / MODEL / "tokenizer.json", model={"type": "BPE", "vocab": [1, 2], "merges": 3})


@case("data", MODEL, "tokenizer")
def tokenizer_pickle(folder: Path) -> None:
    (folder / MODEL / "tokenizer.json").write_bytes(pickle.dumps(Evil()))


@case("data", MODEL, "tokenizer")
def tokenizer_with_code(folder: Path) -> None:
    (folder / MODEL / "evil.py").write_text(f"open({CANARY!r}, 'w')\nclass T: pass\n")
    (folder / MODEL / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    (folder / MODEL / "tokenizer.json").unlink()


@case("data", MODEL, "chat template")
def template_that_would_run_code(folder: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / MODEL / "chat_template.jinja").write_text(escape)


@case("data", MODEL, "chat template")
def template_bomb(folder: Path) -> None:
    (folder / MODEL / "chat_template.jinja").write_text("{% for i in range(10 ** 12) %}x{% endfor %}")


@case("data", MODEL, "chat template")
def template_cut_off(folder: Path) -> None:
    truncate(folder / MODEL / "chat_template.jinja")


# GGUF ---------------------------------------------------------------------------------------------------------------


def package(folder: Path, content: bytes) -> dict[str, Any]:
    """An installed distribution `weights` that ships a GGUF file."""
    site = folder / SITE
    (site / "weights-1.0.dist-info").mkdir(parents=True)
    (site / "weights.gguf").write_bytes(content)
    (site / "weights-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.4\nName: weights\nVersion: 1.0\n")
    (site / "weights-1.0.dist-info" / "RECORD").write_text("weights.gguf,,\nweights-1.0.dist-info/RECORD,,\n")
    source = {"kind": "package", "ref": "weights/weights.gguf", "revision": None, "sha256": None}
    return {"model": {"source": source}}


def gguf_bytes(folder: Path, name: str = "token_embd.weight") -> bytes:
    """A whole file with one tensor."""
    path = folder / "whole.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_tensor(name, np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    path.unlink()
    return data


@case("model", "weights.gguf", "not a GGUF file")
def gguf_pickle(folder: Path) -> Any:
    return package(folder, pickle.dumps(Evil()))


@case("model", "weights.gguf", "cut off")
def gguf_header_cut_off(folder: Path) -> Any:
    return package(folder, gguf_bytes(folder)[:40])


@case("model", "weights.gguf", "token_embd.weight", "cut off")
def gguf_weights_cut_off(folder: Path) -> Any:
    return package(folder, gguf_bytes(folder)[:-64])


@case("model", "weights.gguf", "cut off")
def gguf_of_two_to_the_sixty_keys(folder: Path) -> Any:
    data = bytearray(gguf_bytes(folder))
    data[16:24] = struct.pack("<Q", 2**60)
    return package(folder, bytes(data))


@case("model", "weights.gguf", "cut off")
def gguf_array_of_two_to_the_sixty(folder: Path) -> Any:
    key = b"tokenizer.ggml.tokens"
    value = struct.pack("<IIQ", 9, 0, 2**60)  # an array of bytes
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + value
    return package(folder, data + bytes(64))


@case("model", "weights.gguf", "llama.block_count is None")
def gguf_without_sizes(folder: Path) -> Any:
    return package(folder, gguf_bytes(folder).replace(b"llama.block_count", b"llama.blocks_were"))


@case("model", "weights.gguf", "version 999")
def gguf_of_a_version_to_come(folder: Path) -> Any:
    data = bytearray(gguf_bytes(folder))
    data[4:8] = struct.pack("<I", 999)
    return package(folder, bytes(data))


@case("model", "weights.gguf", "weights; 1 layers of 32 and 64 need more")
def gguf_tensor_called_like_a_path(folder: Path) -> Any:
    return package(folder, gguf_bytes(folder, "../../evil"))


@case("model", "package 'weights'", "'../../evil.gguf'")
def gguf_reference_that_leaves_the_package(folder: Path) -> Any:
    settings = package(folder, gguf_bytes(folder))
    settings["model"]["source"]["ref"] = "weights/../../evil.gguf"
    return settings


# What steps leave for steps -----------------------------------------------------------------------------------------


@case("saliency/0", f"{DATA}/manifest.json")
def data_manifest_cut_off(folder: Path) -> None:
    truncate(folder / DATA / "manifest.json")


@case("saliency/0", f"{DATA}/train")
def data_rows_cut_off(folder: Path) -> None:
    truncate(next((folder / DATA / "train").glob("*.arrow")))


@case("evaluate/unpruned-1.0", f"{TEST_DATA}/test")
def data_rows_pickle(folder: Path) -> None:
    next((folder / TEST_DATA / "test").glob("*.arrow")).write_bytes(pickle.dumps(Evil()))


@case("evaluate/random-0.8", "evaluation/reference.safetensors")
def reference_cut_off(folder: Path) -> None:
    truncate(folder / REFERENCE)


@case("evaluate/random-0.5", "evaluation/reference.safetensors")
def reference_pickle(folder: Path) -> None:
    (folder / REFERENCE).write_bytes(pickle.dumps(Evil()))


@case("evaluate/sdtp-0.8", "evaluation/reference.safetensors", "does not match its checksum")
def reference_with_a_changed_bit(folder: Path) -> None:
    data = (folder / REFERENCE).read_bytes()
    (folder / REFERENCE).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@case("benchmark/0.8", TEXT)
def benchmark_text_cut_off(folder: Path) -> None:
    truncate(folder / TEXT)


@case("saliency-index", "shard-1.safetensors", "not a whole file of labels")
def shard_cut_off(folder: Path) -> None:
    truncate(folder / SALIENCY / "shard-1.safetensors")


@case("saliency-index", "shard-0.safetensors", "not a whole file of labels")
def shard_pickle(folder: Path) -> None:
    (folder / SALIENCY / "shard-0.safetensors").write_bytes(pickle.dumps(Evil()))


@case("train", f"{SALIENCY}/index.json")
def index_cut_off(folder: Path) -> None:
    truncate(folder / SALIENCY / "index.json")


@case("train", f"{SALIENCY}/index.json", "shards")
def index_without_shards(folder: Path) -> None:
    content = json.loads((folder / SALIENCY / "index.json").read_text())
    del content["shards"]
    (folder / SALIENCY / "index.json").write_text(json.dumps(content))


@case("train", f"{SALIENCY}/index.json", "../../../evil.safetensors")
def index_points_outside(folder: Path) -> None:
    shutil.copy(folder / SALIENCY / "shard-0.safetensors", folder / "evil.safetensors")
    content = json.loads((folder / SALIENCY / "index.json").read_text())
    content["shards"][0]["file"] = "../../../evil.safetensors"
    for example in content["examples"]:
        if example["shard"] == "shard-0.safetensors":
            example["shard"] = "../../../evil.safetensors"
    (folder / SALIENCY / "index.json").write_text(json.dumps(content))


@case("generate/0.8", f"{PRUNER}/pruner.json")
def pruner_settings_cut_off(folder: Path) -> None:
    truncate(folder / PRUNER / "pruner.json")


@case("generate/0.8", f"{PRUNER}/pruner.json", "scorer.width")
def pruner_settings_huge_number(folder: Path) -> None:
    content = json.loads((folder / PRUNER / "pruner.json").read_text())
    content["scorer"]["width"] = 10**18
    (folder / PRUNER / "pruner.json").write_text(json.dumps(content))


@case("benchmark/0.5", f"{PRUNER}/pruner.safetensors")
def pruner_weights_cut_off(folder: Path) -> None:
    truncate(folder / PRUNER / "pruner.safetensors")


@case("evaluate/sdtp-0.8", f"{PRUNER}/pruner.safetensors")
def pruner_weights_pickle(folder: Path) -> None:
    (folder / PRUNER / "pruner.safetensors").write_bytes(pickle.dumps(Evil()))


@case("evaluate/sdtp-0.5", f"{PRUNER}/pruner.safetensors", "not finite")
def pruner_weights_nan(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).fill_(float("nan"))

    change_weights(folder / PRUNER / "pruner.safetensors", change)


@case("report", f"{PRUNER}/pruner.safetensors", "shape")
def pruner_weights_of_another_shape(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        tensors[name] = torch.zeros(3, 3)

    change_weights(folder / PRUNER / "pruner.safetensors", change)


@case("tables", "results/tiny/benchmark/ratio-0.8.json")
def timings_cut_off(folder: Path) -> None:
    truncate(folder / "results/tiny/benchmark/ratio-0.8.json")


@case("tables", "results/tiny/evaluation/random-0.5.jsonl", "loss")
def evaluations_without_a_key(folder: Path) -> None:
    path = folder / "results/tiny/evaluation/random-0.5.jsonl"
    path.write_text(re.sub(r'"loss": [^,]+, ', "", path.read_text()))


@case("figures", "results/tiny/tables/latency.csv")
def table_of_bytes(folder: Path) -> None:
    (folder / "results/tiny/tables/latency.csv").write_bytes(pickle.dumps(Evil()))


@case("report", "results/tiny/generations/ratio-0.8.jsonl", "line 1")
def generations_cut_off(folder: Path) -> None:
    (folder / "results/tiny/generations/ratio-0.8.jsonl").write_text('{"id": "te')


# Configurations -----------------------------------------------------------------------------------------------------


def overlay(folder: Path, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (folder / "tiny.yaml").write_bytes(data)


# Of a file that is no YAML Snakemake speaks itself, and does not say which it is: the one on its command line.
@case("snakemake", "Config file is not valid JSON or YAML")
def config_cut_off(folder: Path) -> None:
    overlay(folder, "run: tiny\nmodel: {source: {kind")


@case("snakemake", "Config file must be given as JSON or YAML with keys at top level")
def config_list(folder: Path) -> None:
    overlay(folder, "- run\n- tiny\n")


@case("snakemake", "Config file is not valid JSON or YAML")
def config_with_code(folder: Path) -> None:
    overlay(folder, f"run: !!python/object/apply:builtins.open [{CANARY}, w]\n")


@case("snakemake", "seed", "a whole number")
def config_text_for_number(folder: Path) -> None:
    overlay(folder, yaml.safe_dump({"run": "tiny", "seed": "one"}))


@case("snakemake", "training.learning_rate", "finite")
def config_nan(folder: Path) -> None:
    overlay(folder, "run: tiny\ntraining: {learning_rate: .nan}\n")


@case("snakemake", "seed = Infinity", "a whole number")
def config_huge_number(folder: Path) -> None:
    overlay(folder, "run: tiny\nseed: 1.0e+400\n")


@case("snakemake", "a3: holds more than 10000 values")
def config_of_aliases_that_multiply(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]" for at in range(1, 10)]
    overlay(folder, "\n".join([*lines, "run: tiny"]))


@case("snakemake", "seed: holds more than 10000 values")
def config_that_holds_itself(folder: Path) -> None:
    overlay(folder, "run: tiny\nseed: &seed [*seed]\n")


@case("snakemake", "run", "../../evil")
def config_run_outside(folder: Path) -> None:
    overlay(folder, "run: ../../evil\n")


@case("snakemake", "variants.../evil", "name")
def config_variant_outside(folder: Path) -> None:
    overlay(folder, "run: tiny\nvariants: {../evil: {training: {steps: 1}}}\n")


@case("snakemake", "model.source.ref", "no folder")
def config_names_a_model_that_is_not_there(folder: Path) -> None:
    overlay(folder, "run: tiny\nmodel: {source: {kind: local, ref: ../nothing, revision: null, sha256: null}}\n")
