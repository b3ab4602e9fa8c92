"""The dataset folder: splits, sources and what the manifest says of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdtp.errors import UserError
from sdtp.pipeline.benchmark_text import benchmark_prompt, write_benchmark_text
from sdtp.pipeline.config import DataSettings
from sdtp.pipeline.corpus import read_corpus, split_documents
from sdtp.pipeline.data import build_test_data, build_training_data
from sdtp.pipeline.data_folder import TRAINING, load_split, split_hash
from sdtp.pipeline.data_steps import RECORD_COUNTS
from sdtp.pipeline.facts import TEST, TRAIN
from sdtp.pipeline.files import canonical_json
from sdtp.pipeline.instructions import MAX_RESPONSE_TOKENS
from sdtp.pipeline.prompts import encode, render
from sdtp.pipeline.steps import data as step
from sdtp.pipeline.steps import test_data as test_step
from tests.pipeline.conftest import TURNS
from tests.pipeline.hub import COMMIT, serve
from tests.pipeline.test_tasks import documents

Install = Callable[..., Path]


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return make_tokenizer(template=TURNS)


@pytest.fixture
def speeches(corpus_package: Install) -> dict[str, Any]:
    """A source: a package of 20 documents."""
    corpus_package("speeches", {document.name: document.text for document in documents(20)})
    return source("package", "speeches")


def source(kind: str, ref: str | Path, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "ref": str(ref), "revision": None, "sha256": None, **fields}


def settings(train: dict[str, Any], test: dict[str, Any], **fields: Any) -> DataSettings:
    values = {
        "max_tokens": 900,
        "distractors": 8,
        "examples": 6,
        "heldout": 3,
        "tests": 4,
        "malformed": "skip",
        **fields,
    }
    return DataSettings.from_mapping(
        {
            "max_tokens": values["max_tokens"],
            "train": {"source": train, "examples": values["examples"], "heldout": values["heldout"]},
            "test": {"source": test, "examples": values["tests"]},
            "malformed": values["malformed"],
            "distractors": values["distractors"],
        },
        "data",
    )


def build(tokenizer: PreTrainedTokenizerBase, chosen: DataSettings, seed: int, folder: Path) -> dict[str, Any]:
    """Makes both data folders as a run has them; returns the manifest of what is learned from, with all splits."""
    manifest = build_training_data(tokenizer, chosen, seed, folder / "data")
    of_records = chosen.test.source.kind != "package"
    learned_from = [folder / "data"] if of_records else []
    tested = build_test_data(tokenizer, chosen, seed, folder / "test-data", learned_from)
    return {**manifest, "splits": {**manifest["splits"], **tested["splits"]}}


def load(folder: Path, split: str) -> Dataset:
    return load_split(folder / ("data" if split in TRAINING else "test-data"), split)


def write_rows(path: Path, count: int, **fields: str) -> Path:
    rows = [{"id": f"r{n}", "prompt": f"question {n}", "response": f"answer {n}", **fields} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_corpus_gives_both_tasks_from_different_documents(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    manifest = build(tokenizer, settings(speeches, speeches), 0, tmp_path / "data")
    splits = {name: load(tmp_path / "data", name).to_list() for name in ("train", "heldout", "test")}
    tasks = {name: [row["task"] for row in rows] for name, rows in splits.items()}
    assert tasks["train"] == ["retrieval", "continuation"] * 3
    assert tasks["heldout"] == ["retrieval", "continuation", "retrieval"]
    assert tasks["test"] == ["retrieval", "continuation"] * 4
    used = {name: {part for row in rows for part in row["source"].split("+")} for name, rows in splits.items()}
    assert not used["train"] & used["test"]
    assert not used["heldout"] & (used["train"] | used["test"])
    for name, vocabulary in (("train", TRAIN), ("heldout", TRAIN), ("test", TEST)):
        known = {value for value_type in vocabulary.value_types for value in value_type.values}
        assert {row["response"].strip() for row in splits[name] if row["task"] == "retrieval"} <= known
    rows = [row for part in splits.values() for row in part]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {len(row["prompt_ids"]) for row in rows} == {900}
    assert list(rows[0]) == ["id", "task", "prompt_ids", "response_ids", "prompt", "response", "source"]
    assert manifest["splits"]["test"]["tasks"] == {"retrieval": 4, "continuation": 4}
    assert manifest["splits"]["test"]["source"]["sha256"] == read_corpus("speeches").sha256


def test_columns_are_int32_and_text(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    build(tokenizer, settings(speeches, speeches), 0, tmp_path / "data")
    features = load(tmp_path / "data", "test").features
    assert features["prompt_ids"].feature.dtype == features["response_ids"].feature.dtype == "int32"
    assert {features[name].dtype for name in ("id", "task", "prompt", "response", "source")} == {"string"}


def test_content_hash_is_over_rows_in_order_and_repeats(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    manifest = build(tokenizer, settings(speeches, speeches), 0, tmp_path / "a")
    digest = hashlib.sha256()
    for row in load(tmp_path / "a", "train"):
        digest.update(canonical_json(row).encode() + b"\n")
    assert manifest["splits"]["train"]["content_sha256"] == digest.hexdigest()
    assert split_hash(tmp_path / "a" / "data", "train") == digest.hexdigest()
    assert build(tokenizer, settings(speeches, speeches), 0, tmp_path / "b") == manifest
    for part in ("data", "test-data"):
        written = json.loads((tmp_path / "b" / part / "manifest.json").read_text())
        assert written["splits"].items() <= manifest["splits"].items()
    other = build(tokenizer, settings(speeches, speeches), 1, tmp_path / "c")
    assert other["content_sha256"] != manifest["content_sha256"]


def test_more_examples_leave_the_first_ones_as_they_were(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    build(tokenizer, settings(speeches, speeches, tests=3), 0, tmp_path / "few")
    build(tokenizer, settings(speeches, speeches, tests=5), 0, tmp_path / "more")
    few, more = (load(tmp_path / name, "test").to_list() for name in ("few", "more"))
    assert more[: len(few)] == few


def test_test_examples_of_a_corpus_are_the_same_whatever_is_learned_from(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    rows = source("jsonl", write_rows(tmp_path / "rows.jsonl", 9))
    chosen = {name: settings(learned, speeches) for name, learned in (("speeches", speeches), ("rows", rows))}
    made = {name: build(tokenizer, one, 0, tmp_path / name) for name, one in chosen.items()}
    assert made["speeches"]["content_sha256"] != made["rows"]["content_sha256"]
    assert made["speeches"]["splits"]["test"] == made["rows"]["splits"]["test"]


def test_benchmark_text_is_the_test_documents(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "text.json"
    tokens = write_benchmark_text(tokenizer, settings(speeches, speeches), text)
    first = split_documents(read_corpus("speeches").documents)["test"][0]
    beginning = str(tokenizer.decode(benchmark_prompt(text, 300))).strip()
    assert len(beginning) > 500
    assert first.text.startswith(beginning)
    assert len(benchmark_prompt(text, tokens)) == tokens > 2048
    with pytest.raises(
        UserError, match=rf"benchmark\.prompt_tokens: {tokens + 1} is not in 1\.\.{tokens}, the tokens of"
    ):
        benchmark_prompt(text, tokens + 1)


def test_records_of_one_source_are_disjoint_between_splits(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = source("jsonl", write_rows(tmp_path / "rows.jsonl", 13))
    build(tokenizer, settings(rows, rows), 0, tmp_path / "data")
    prompts = [row["prompt"] for name in ("train", "heldout", "test") for row in load(tmp_path / "data", name)]
    assert sorted(prompts) == sorted(f"question {n}" for n in range(13))
    with pytest.raises(UserError, match=r"data\.test\.examples: 5 .* 4 are left: 13 of 13 are usable, and 9 of these"):
        build(tokenizer, settings(rows, rows, tests=5), 0, tmp_path / "more")
    with pytest.raises(UserError, match=r"data\.train\.heldout: 8 .* 7 are left: 13 of 13 are usable, and 6 of these"):
        build(tokenizer, settings(rows, rows, heldout=8), 0, tmp_path / "more")


def prompts(folder: Path, *splits: str) -> set[str]:
    return {row["prompt"] for split in splits for row in load(folder, split)}


def test_another_spelling_of_the_training_file_gives_no_training_prompt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl", 13)
    monkeypatch.chdir(tmp_path)
    chosen = settings(source("jsonl", "rows.jsonl"), {**source("jsonl", ""), "ref": "./rows.jsonl"})
    manifest = build(tokenizer, chosen, 0, tmp_path / "data")
    assert len(prompts(tmp_path / "data", "train", "heldout", "test")) == 13
    left_out = {split: part["in_training"] for split, part in manifest["splits"].items()}
    assert left_out == {"train": 0, "heldout": 6, "test": 9}


def test_prompts_that_overlap_with_training_are_left_out_however_they_are_written(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trained = source("jsonl", write_rows(tmp_path / "rows.jsonl", 9))
    path = tmp_path / "other.jsonl"
    written = ["QUESTION  0", "question\n1", "question 2", "question 20", "question 21"]
    path.write_text("".join(json.dumps({"prompt": prompt, "response": "another"}) + "\n" for prompt in written))
    manifest = build(tokenizer, settings(trained, source("jsonl", path), tests=2), 0, tmp_path / "data")
    assert prompts(tmp_path / "data", "test") == {"question 20", "question 21"}
    assert manifest["splits"]["test"]["in_training"] == 3
    assert manifest["splits"]["test"]["rows"] == {"n_total": 5, "n_skipped": 0, "n_used": 2, "n_left": 3}
    with pytest.raises(UserError, match=r"data\.test\.examples: 3 records .* 2 are left: 5 of 5 .* 3 of these"):
        build(tokenizer, settings(trained, source("jsonl", path), tests=3), 0, tmp_path / "more")


def test_prompt_with_two_responses_is_in_one_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n // 2}", "response": f"answer {n}"} for n in range(26)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = source("jsonl", path)
    build(tokenizer, settings(both, both), 0, tmp_path / "data")
    trained, heldout, tested = (prompts(tmp_path / "data", split) for split in ("train", "heldout", "test"))
    assert not trained & heldout
    assert not (trained | heldout) & tested


def test_step_refuses_prompts_that_leave_no_room_for_the_response(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
        monkeypatch.delenv(name, raising=False)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    manifest = {"trust_remote_code": False, "context_length": 931}
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    parts = {step: {"train": {"examples": 2, "heldout": 1}}, test_step: {"test": {"examples": 2}}}

    def run(which: ModuleType, of: dict[str, Any]) -> None:
        data = {"max_tokens": 900, "malformed": "skip", "distractors": 8}
        data |= {name: {**part, "source": of} for name, part in parts[which].items()}
        files = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "data")]
        which.main(
            ["--settings", json.dumps({"seed": 0, "data": data}), *files, "--metrics", str(tmp_path / "metrics.json")]
        )

    rows = source("jsonl", write_rows(tmp_path / "rows.jsonl", 3))
    for which in parts:
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
        error = r"^900 \(data\.max_tokens\) \+ 32 \(longest response\) = 932 .* has 931$"
        with pytest.raises(UserError, match=error):
            run(which, speeches)
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest | {"context_length": 932}))
        run(which, speeches)
        with pytest.raises(UserError, match=r"\+ 256 \(longest response\) = 1156 tokens: the model's context has 932"):
            run(which, rows)


def test_records_become_instructions_in_the_chat_template(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    rows = source("jsonl", write_rows(tmp_path / "rows.jsonl", 9))
    manifest = build(tokenizer, settings(rows, speeches), 0, tmp_path / "data")
    row = load(tmp_path / "data", "train")[0]
    assert row["task"] == "instruction"
    assert row["prompt_ids"] == encode(tokenizer, render(tokenizer, row["prompt"]))
    assert row["response_ids"] == encode(tokenizer, row["response"])
    assert row["id"] == "train-r" + row["response"].split()[1]
    assert row["source"] == f"rows.jsonl, line {int(row['response'].split()[1]) + 1}"
    assert manifest["chat_template_tasks"] == ["retrieval", "instruction"]


@pytest.fixture
def faulty(tmp_path: Path) -> dict[str, Any]:
    """A source of eight rows: three sound ones, one of them too long in prompt and response; the last is not UTF-8."""
    path = write_rows(tmp_path / "rows.jsonl", 2)
    with path.open("ab") as file:
        long = {"prompt": "first " + "word " * 400 + "last", "response": "value " * 400}
        file.write(json.dumps(long).encode() + b"\n")
        file.write(b'{"prompt": "p", "response": ""}\n\n{"prompt": "question 0", "response": "answer 0"}\r\n')
        file.write(b'{"prompt": "q", "response": "r", "id": "r1"}\n{"prompt": "", "response": "r"}\n')
        file.write(b'{"prompt": "caf\xe9", "response": "r"}\n')
    return source("jsonl", path)


def test_cut_and_skipped_records_are_counted_and_named(
    tokenizer: PreTrainedTokenizerBase, faulty: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = settings(faulty, faulty, max_tokens=200, examples=3, heldout=0, tests=0)
    described = build_training_data(tokenizer, wanted, 0, tmp_path / "data")["splits"]["train"]
    long = max(load_split(tmp_path / "data", "train"), key=lambda row: len(row["prompt_ids"]))
    assert described["rows"] == {"n_total": 8, "n_skipped": 5, "n_used": 3, "n_left": 0}
    reasons = ("empty_response", "duplicate", "duplicate_id", "empty_prompt", "not_utf8")
    assert described["skipped"] == dict.fromkeys(reasons, 1)
    assert described["repaired"] == {"crlf": 1}
    named = {
        "empty_response": ["rows.jsonl, line 4: the response is empty"],
        "duplicate": ["rows.jsonl, line 6: prompt and response are those of rows.jsonl, line 1"],
        "duplicate_id": ["rows.jsonl, line 7: id 'r1' is used at rows.jsonl, line 2 already; ids must be unique"],
        "empty_prompt": ["rows.jsonl, line 8: the prompt is empty"],
        "not_utf8": ["rows.jsonl, line 9: byte 16 of the line, 0xe9, is not UTF-8"],
        "crlf": ["rows.jsonl, line 6"],
    }
    assert described["first_malformed"] == named
    assert [record.getMessage() for record in caplog.records if record.name == "sdtp.pipeline.data_source"] == [
        f"data.train.source: 1 of 8 rows {'repaired' if reason == 'crlf' else 'left out'}, {reason}: {place}"
        for reason, (place,) in named.items()
    ]
    cut = len(encode(tokenizer, render(tokenizer, long["prompt"]))) - 200
    unused = len(encode(tokenizer, long["response"])) - MAX_RESPONSE_TOKENS
    assert len(long["prompt_ids"]) == 200
    assert len(long["response_ids"]) == MAX_RESPONSE_TOKENS
    counts = {name: described[name] for name in RECORD_COUNTS}
    assert counts == {
        "in_training": 0, "prompts_cut": 1, "prompt_tokens_cut": cut, "responses_cut": 1, "response_tokens_cut": unused
    }  # fmt: skip
    assert described["first_cut"] == {
        "prompt": [f"rows.jsonl, line 3: {cut} tokens of the prompt"],
        "response": [f"rows.jsonl, line 3: {unused} tokens of the response"],
    }
    text = str(tokenizer.decode(long["prompt_ids"]))
    assert text.startswith("[turn]user\nfirst word")
    assert text.endswith("last[end]\n[turn]assistant\n")
    assert described["prompt_tokens"]["max"] == 200


def test_what_is_too_long_is_cut_or_fatal_as_the_rule_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 300, "response": "r"}, {"prompt": "p", "response": "value " * 400}]
    for name, row in zip(("prompt", "response"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    def one_row(name: str, max_tokens: int, malformed: str) -> dict[str, Any]:
        one = source("jsonl", tmp_path / f"{name}.jsonl")
        chosen = settings(one, one, max_tokens=max_tokens, malformed=malformed, examples=1, heldout=0, tests=0)
        return build_training_data(tokenizer, chosen, 0, tmp_path / "data")["splits"]["train"]

    excess = one_row("prompt", 200, "skip")["prompt_tokens_cut"]
    error = rf"^prompt\.jsonl, line 1: the prompt is {excess} tokens too long for data\.max_tokens 200; data\.malformed"
    with pytest.raises(UserError, match=error):
        one_row("prompt", 200, "fail")
    assert one_row("prompt", 200 + excess, "fail")["prompts_cut"] == 0
    # A response is read up to a fixed token whatever the rule: what lies past it is no fault of the row.
    assert one_row("response", 200, "fail")["responses_cut"] == 1


def test_text_without_tokens_is_refused_by_file_and_line(tmp_path: Path) -> None:
    """Some tokenizers make nothing of a text that is not blank; an empty tensor would fail far from here."""
    backend = Tokenizer(models.BPE({"a": 0, "\n": 1}, []))  # characters it does not know are dropped
    letters = PreTrainedTokenizerFast(tokenizer_object=backend)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "word", "response": "aaa"}\n')
    one = source("jsonl", path)
    chosen = settings(one, one, examples=1, heldout=0, tests=0)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: the tokenizer makes no token of the prompt"):
        build_training_data(letters, chosen, 0, tmp_path / "data")


def test_rows_add_up_in_every_split(
    tokenizer: PreTrainedTokenizerBase, faulty: dict[str, Any], speeches: dict[str, Any], tmp_path: Path
) -> None:
    chosen = settings(faulty, speeches, max_tokens=900, examples=1, heldout=1)
    parts = build(tokenizer, chosen, 0, tmp_path / "data")["splits"]
    assert {name: part["rows"] for name, part in parts.items()} == {
        "train": {"n_total": 8, "n_skipped": 5, "n_used": 1, "n_left": 2},
        "heldout": {"n_total": 8, "n_skipped": 5, "n_used": 1, "n_left": 2},
        "test": {"n_total": 8, "n_skipped": 0, "n_used": 8, "n_left": 0},
    }
    assert [len(load(tmp_path / "data", name)) for name in parts] == [1, 1, 8]


@pytest.mark.parametrize("part", ["train", "test"])
def test_malformed_row_of_either_source_is_fatal_where_the_rule_says(
    tokenizer: PreTrainedTokenizerBase, faulty: dict[str, Any], speeches: dict[str, Any], tmp_path: Path, part: str
) -> None:
    sources = (faulty, speeches) if part == "train" else (speeches, faulty)
    with pytest.raises(UserError, match=r"^rows\.jsonl, line 4: the response is empty; data\.malformed"):
        build(tokenizer, settings(*sources, malformed="fail"), 0, tmp_path / "data")
    assert not (tmp_path / "data" / ("data" if part == "train" else "test-data")).exists()


def test_step_logs_what_was_skipped_repaired_and_cut(
    tokenizer: PreTrainedTokenizerBase,
    faulty: dict[str, Any],
    speeches: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
        monkeypatch.delenv(name, raising=False)
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model" / "manifest.json").write_text('{"trust_remote_code": false, "context_length": null}')
    data: dict[str, Any] = {"max_tokens": 200, "malformed": "skip", "distractors": 0}
    data |= {"train": {"source": faulty, "examples": 2, "heldout": 1}, "test": {"source": speeches, "examples": 2}}
    metrics = tmp_path / "metrics.json"

    def run(which: ModuleType, output: str) -> dict[str, float]:
        files = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / output), "--metrics", str(metrics)]
        which.main(["--settings", json.dumps({"seed": 0, "data": data}), *files])
        numbers: dict[str, float] = json.loads(metrics.read_text())
        return numbers

    tested = run(test_step, "test-data")
    assert {name for name in tested if "/" in name} == {
        f"test/{count}" for count in ("examples", "n_total", "n_skipped", "n_used", "n_left")
    }
    logged = run(step, "data")
    assert not any(name.startswith("test/") for name in logged)
    described = json.loads((tmp_path / "data" / "manifest.json").read_text())["splits"]
    found = {name.partition("/")[2]: value for name, value in logged.items() if name.startswith("train/")}
    reasons = ("not_utf8", "duplicate_id", "empty_prompt", "empty_response", "duplicate")
    assert found == {
        "examples": 2, "n_total": 8, "n_skipped": 5, "n_used": 2, "n_left": 1,
        **{f"skipped_{reason}": 1 for reason in reasons}, "repaired_byte_order_mark": 0, "repaired_crlf": 1,
        **{count: described["train"][count] for count in RECORD_COUNTS},
    }  # fmt: skip
    assert logged["train/prompts_cut"] + logged["heldout/prompts_cut"] == 1
    assert logged["train/prompt_tokens_cut"] + logged["heldout/prompt_tokens_cut"] > 100


@pytest.mark.parametrize("part", ["train", "test"])
def test_pinned_checksum_of_a_source_is_verified(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path, part: str
) -> None:
    found = read_corpus("speeches").sha256
    pinned = {**speeches, "sha256": "0" * 64}
    chosen = settings(pinned, speeches) if part == "train" else settings(speeches, pinned)
    with pytest.raises(UserError, match=rf"data\.{part}\.source\.sha256: expected 0+, found {found} for speeches"):
        build(tokenizer, chosen, 0, tmp_path / "data")
    right = {**speeches, "sha256": found}
    build(tokenizer, settings(right, right), 0, tmp_path / "data")


def test_pinned_checksum_of_another_test_source_is_verified(
    tokenizer: PreTrainedTokenizerBase, speeches: dict[str, Any], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 4)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = build(tokenizer, settings(speeches, source("jsonl", path, sha256=right)), 0, tmp_path / "data")
    assert manifest["splits"]["test"]["source"]["sha256"] == right
    with pytest.raises(UserError, match=rf"data\.test\.source\.sha256: expected 1+, found {right}"):
        build(tokenizer, settings(speeches, source("jsonl", path, sha256="1" * 64)), 0, tmp_path / "other")


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has train and heldout, one of `sdtp test-data` has test"):
        load_split(tmp_path, "validation")


@pytest.mark.slow
def test_data_step_reads_a_hub_dataset_at_its_commit(
    tokenizer: PreTrainedTokenizerBase, corpus_package: Install, tmp_path: Path
) -> None:
    repository, model = tmp_path / "repository", tmp_path / "model"
    repository.mkdir()
    write_rows(repository / "rows.jsonl", 12)
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "manifest.json").write_text('{"trust_remote_code": false, "context_length": null}')
    hub = source("hub", "someone/rows", revision="v1")
    data: dict[str, Any] = {"max_tokens": 300, "malformed": "skip", "distractors": 8}
    data |= {"train": {"source": hub, "examples": 6, "heldout": 2}, "test": {"source": hub, "examples": 4}}
    arguments = ["--settings", json.dumps({"seed": 0, "data": data}), "--model", str(model)]
    steps = {"data": [], "test-data": ["--learned-from", str(tmp_path / "data")]}
    with serve("someone/rows", repository, "datasets") as (endpoint, _):
        for name, options in steps.items():
            files = ["--output", str(tmp_path / name), "--metrics", str(tmp_path / f"{name}.json")]
            done = subprocess.run(
                [sys.executable, "-m", "sdtp.cli", name, *arguments, *options, *files],
                env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert done.returncode == 0, done.stderr
            (revision,) = {
                part["source"]["revision"]
                for part in json.loads((tmp_path / name / "manifest.json").read_text())["splits"].values()
            }
            assert revision == COMMIT
    parts = {name: load(tmp_path, name)["prompt"] for name in ("train", "heldout", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "heldout": 2, "test": 4}
    assert len({prompt for part in parts.values() for prompt in part}) == 12
    assert json.loads((tmp_path / "data.json").read_text())["train/examples"] == 6
