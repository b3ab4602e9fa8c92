"""What the benchmark, evaluate and generate steps add to the rooms they call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import methods
from sdtp.evaluation.head import response_states
from sdtp.pipeline import timings
from sdtp.pipeline.config import BenchmarkSettings
from sdtp.pipeline.steps import benchmark, evaluate, generate
from sdtp.pruning import flops, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)
SETTINGS = BenchmarkSettings(prompt_tokens=(24, 40), new_tokens=3, repeats=4, warmup=2)


pytestmark = pytest.mark.usefixtures("no_tracking")


@pytest.mark.parametrize(
    ("main", "option", "settings", "message"),
    [
        (
            benchmark.main,
            "--text",
            {"benchmark": {"prompt_tokens": [40], "new_tokens": 3}},
            r"^40 \(benchmark\.prompt_tokens\) \+ 3 \(benchmark\.new_tokens\) = 43 tokens: the model's context has 42$",
        ),
        (
            generate.main,
            "--data",
            {"generation": {"examples": 2, "max_new_tokens": 4}},
            r"^39 \(longest prompt\) \+ 4 \(generation\.max_new_tokens\) = 43 tokens: the model's context has 42$",
        ),
    ],
)
def test_tokens_beyond_the_context_are_refused_before_the_model_is_loaded(
    tmp_path: Path, main: Callable[[list[str]], None], option: str, settings: dict[str, Any], message: str
) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    (model / "manifest.json").write_text(json.dumps({"context_length": 42}))
    rows = [{"task": "retrieval", "prompt_ids": [1] * length} for length in (39, 20, 60)]  # the third is not shown
    Dataset.from_list(rows).save_to_disk(data / "test")
    (data / "manifest.json").write_text(json.dumps({"splits": {"test": {"content_sha256": "d" * 64}}}))
    files = ["--model", str(model), option, str(data), "--pruner", str(tmp_path / "pruner")]
    files += ["--output", str(tmp_path / "output"), "--metrics", str(tmp_path / "metrics")]
    with pytest.raises(UserError, match=message):
        main(["--settings", json.dumps(settings), *files, "--keep-ratio", "0.5"])


def test_benchmark_rows(tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    forwards: list[int] = []  # tokens of each
    model.register_forward_pre_hook(
        lambda _, args, inputs: forwards.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    before: list[int] = []  # prefills before each pass that memory is measured in
    peak_memory = timings.peak_memory
    monkeypatch.setattr(timings, "peak_memory", lambda device: before.append(forwards.count(40)) or peak_memory(device))
    pruner = TokenPruner(SCHEDULE, scorers.Learned(32, 2, width=8))
    unpruned, pruned = benchmark.measure(model, pruner, list(range(3, 43)), SETTINGS)
    assert (unpruned["method"], pruned["method"]) == ("unpruned", "sdtp")
    for row in (unpruned, pruned):
        assert (row["prompt_tokens"], row["new_tokens"]) == (40, 3)
        assert [len(row[name]) for name in ("prefill_s", "decode_s", "end_to_end_s")] == [4, 4, 4]
        for prefill, decode, total in zip(row["prefill_s"], row["decode_s"], row["end_to_end_s"], strict=True):
            assert prefill + decode == pytest.approx(total)
        assert len(row["peak_memory_bytes"]) == 3
    # Unpruned, pruned and length bound have six rounds of time; then the first two three of memory, decoding as before.
    assert before == [3 * 6 + measured for measured in range(2 * 3)]
    assert forwards.count(1) == 2 * (2 * 6 + 2 * 3)
    assert len(pruned["ideal_s"]) == len(pruned["scoring_s"]) == 4
    assert min(pruned["scoring_s"]) > 0
    assert (unpruned["kept_tokens"], pruned["kept_tokens"]) == (40, 10)
    assert (unpruned["kv_cache_bytes"], pruned["kv_cache_bytes"]) == (160 * 128, 90 * 128)
    scoring = pruned["scoring_flop"]
    assert scoring == (40 + 20) * 2 * (32 * 8 + 2 * 8)
    assert pruned["prefill_flop"] == flops.prefill(model.config, 40, SCHEDULE) + scoring
    assert unpruned["prefill_flop"] == flops.prefill(model.config, 40)


def states_of(model: PreTrainedModel) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    """The unpruned model's states on an example, each run alone."""

    def states(example: Mapping[str, Any]) -> torch.Tensor:
        [(found, _)] = response_states(model, [example["prompt_ids"]], [example["response_ids"]])
        return found

    return states


def test_evaluation_rows(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    prompt = list(range(3, 43))
    best = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
    examples = [
        {"id": "a", "task": "retrieval", "prompt_ids": prompt, "response_ids": [best]},
        {"id": "b", "task": "retrieval", "prompt_ids": prompt, "response_ids": [(best + 1) % 128]},
        {"id": "c", "task": "continuation", "prompt_ids": prompt, "response_ids": [best, 5]},
    ]
    rows = evaluate.evaluate(model, examples, methods.unpruned, 4096, states_of(model))
    assert [row["correct"] for row in rows] == [True, False, None]
    assert [row["kept_tokens"] for row in rows] == [40, 40, 40]
    assert [row["response_tokens"] for row in rows] == [1, 1, 2]
    assert rows[0]["loss"] < rows[1]["loss"]
    assert [row["kl"] for row in rows] == [0.0, 0.0, 0.0]
    assert [row["top1"] for row in rows] == [1.0, 1.0, 1.0]
    pruned = evaluate.evaluate(model, examples, methods.baseline("recent", SCHEDULE, 0), 4096, states_of(model))
    assert [row["kept_tokens"] for row in pruned] == [10, 10, 10]
    assert pruned[0]["kl"] == pytest.approx(pruned[1]["kl"], abs=1e-6)  # the same place, whatever the response says
    assert pruned[0]["kl"] > 1e-4


def test_the_unpruned_model_is_read_off_the_reference_as_it_would_run(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model = tiny_model()
    examples = [
        {"id": "a", "task": "retrieval", "prompt_ids": list(range(3, 43)), "response_ids": [9]},
        {"id": "b", "task": "continuation", "prompt_ids": list(range(5, 36)), "response_ids": [5, 6, 7]},
    ]
    states = {example["id"]: states_of(model)(example) for example in examples}
    read = evaluate.evaluate(model, examples, methods.unpruned, 4096, lambda example: states[example["id"]])
    # A schedule that keeps all tokens prunes nothing, and runs.
    every = methods.baseline("recent", PruningSchedule.geometric(4, start=1, step=1, ratio=1.0), 0)
    run = evaluate.evaluate(model, examples, every, 4096, lambda example: states[example["id"]])
    assert read == [{**row, **{name: pytest.approx(row[name], abs=1e-5) for name in ("loss", "kl")}} for row in run]


@pytest.mark.parametrize("method", ["lastquery", "oracle", "snapkv"])
def test_examples_that_run_together_have_the_rows_they_have_alone(
    tiny_model: Callable[..., PreTrainedModel], method: str
) -> None:
    model = tiny_model()
    if method == "oracle":
        pruner_for = methods.oracle(model, SCHEDULE, "l2", "loss")
    elif method == "snapkv":
        pruner_for = methods.Fixed(methods.peer(method, SCHEDULE, 4, 1))
    else:
        pruner_for = methods.baseline(method, SCHEDULE, 0)
    examples = [
        {"id": str(index), "task": task, "prompt_ids": list(range(3, 3 + length)), "response_ids": response}
        for index, (task, length, response) in enumerate(
            [
                ("retrieval", 40, [9]),
                ("continuation", 31, [5, 6]),
                ("continuation", 40, [7, 8, 9]),
                ("retrieval", 40, [1]),
            ]
        )
    ]
    states = {example["id"]: states_of(model)(example) for example in examples}
    prefills = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: prefills.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    rows = evaluate.evaluate(model, examples, pruner_for, 80, lambda example: states[example["id"]])
    together = {shape for shape in prefills if shape[1] in (31, 40)}
    assert together == ({(2, 40), (1, 40), (1, 31)} if method == "lastquery" else {(1, 40), (1, 31)})
    for row, example in zip(rows, examples, strict=True):
        (alone,) = evaluate.evaluate(model, [example], pruner_for, 1, lambda example: states[example["id"]])
        assert row == {**alone, **{name: pytest.approx(alone[name], abs=1e-5) for name in ("loss", "kl")}}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "sdtp", "--keep-ratio", "0.9"], "--pruner is missing"),
        (["--method", "unpruned", "--keep-ratio", "0.9"], "--keep-ratio is 0.9"),
    ],
)
def test_evaluate_refuses_arguments_that_do_not_go_together(arguments: list[str], named: str) -> None:
    files = ["--settings", "{}", "--model", "m", "--data", "d", "--output", "o", "--metrics", "f"]
    files += ["--reference", "r"]
    with pytest.raises(UserError, match=named):
        evaluate.main([*files, *arguments])


def test_generations_take_turns_between_tasks() -> None:
    assert generate.spread(["r", "r", "r", "c"], 3) == [0, 3, 1]
    assert generate.spread(["r", "c"], 9) == [0, 1]


def test_scores_stand_in_the_order_of_the_tokens_that_entered_each_stage() -> None:
    scores = [{0: 0.5, 1: -1.23456, 2: float("nan"), 3: 123456.0}, {}, {3: 1e-9, 1: 2.0}]
    assert generate.by_entrant(scores, [[1, 2, 3], [1, 3], [3]], 4) == [[0.5, -1.235, None, 123500.0], [], [2.0, 1e-9]]
