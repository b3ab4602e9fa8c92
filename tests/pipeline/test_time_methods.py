"""What a timing job of several methods adds to the rooms it calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import methods
from sdtp.pipeline.config import BenchmarkSettings, Settings
from sdtp.pipeline.steps import time_methods
from sdtp.pipeline.timings import peaks
from sdtp.pruning import flops, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)
SETTINGS = BenchmarkSettings(prompt_tokens=(24,), new_tokens=3, repeats=4, warmup=2)


pytestmark = pytest.mark.usefixtures("no_tracking")


def test_rows_of_every_arm(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    pruner = TokenPruner(SCHEDULE, scorers.Learned(32, 2, width=8))
    given: dict[str, Any] = {"schedule": SCHEDULE, "pruner": pruner, "layer": 1, "cache_keep": 0.4}
    names = ("sdtp", "recent", "gemfilter", "fastkv", "snapkv", "sdtp+h2o")
    attached = {name: methods.make(name, model, **given)([], []) for name in names}
    prefills: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: prefills.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    rows = time_methods.measure(model, attached, list(range(3, 43)), SETTINGS)  # type: ignore[arg-type]
    assert list(rows) == ["unpruned", *names]
    for name, row in rows.items():
        assert (row["method"], row["prompt_tokens"], row["new_tokens"]) == (name, 40, 3)
        assert [len(row[times]) for times in ("prefill_s", "decode_s", "end_to_end_s")] == [4, 4, 4]
        assert len(row["peak_memory_bytes"]) == 3
    # Entries of all layers: 40 + 20 + 20 + 10 of the schedule, and 40%, each rounded, of them; an entry has 128 bytes.
    entries = {"unpruned": 160, "sdtp": 90, "recent": 90, "gemfilter": 40, "fastkv": 90, "snapkv": 88, "sdtp+h2o": 36}
    assert {name: row["kv_cache_bytes"] // 128 for name, row in rows.items()} == entries
    # Two rounds of warm-up, four timed, three for memory, of seven arms.
    assert prefills.count((1, 40)) == (2 + 4 + 3) * 7
    whole = flops.prefill(model.config, 40)
    operations = {name: row["prefill_flop"] for name, row in rows.items()}
    assert operations["unpruned"] == whole
    assert operations["recent"] == flops.prefill(model.config, 40, SCHEDULE)
    assert operations["sdtp"] == operations["recent"] + flops.scoring(40, SCHEDULE, pruner.scorer)  # type: ignore[arg-type]
    assert operations["snapkv"] > whole
    assert operations["sdtp"] < operations["sdtp+h2o"] < whole


def test_memory_is_measured_in_turn_after_its_own_reset(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, held, ran = tiny_model(), [], []

    def arm(name: str, megabytes: int) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            held.append(torch.ones(megabytes * 250_000))  # float32
            held.clear()
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)

        return run

    found = peaks(model, {"small": arm("small", 1), "large": arm("large", 200)})
    assert ran == ["small", "large"] * 3
    small, large = found["small"]["peak_memory_bytes"], found["large"]["peak_memory_bytes"]
    # The mark of the large arm does not stand when the small one runs again.
    assert all(190e6 < more - less < 215e6 for less, more in zip(small, large, strict=True))


def test_stages_are_those_of_the_method() -> None:
    settings = Settings.from_mapping({"pruning": {"start": 4, "step": 3}})
    # The second stage leaves what the first one left.
    pruner = TokenPruner(PruningSchedule((4, 7, 10, 13), (0.5, 0.5, 0.2, 0.1)), scorers.Recent())
    named = ("sdtp", "sdtp-half", "sdtp-tuned", "h2o", "unpruned+h2o")
    assert {name: time_methods.stages(name, settings, 16, pruner) for name in named} == {
        "sdtp": [4, 7, 10, 13],
        "sdtp-half": [4, 10],
        "sdtp-tuned": [4, 10, 13],
        "h2o": [4, 7, 10, 13],
        "unpruned+h2o": [],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "h2o", "sdtp"], "^--pruner is missing: method sdtp needs the folder of a trained pruner$"),
        (["--methods", "sdtp-tuned", "--pruner", "x"], "^--tuned is missing: method sdtp-tuned needs the folder of a "),
        (["--methods", "unpruned+h2o"], "^--keep-ratio is 0.5: method unpruned.h2o removes no token at a stage"),
        (["--methods", "h2o"], r"^40 \(peers.prompt_tokens\) \+ 3 \(benchmark.new_tokens\) = 43 tokens: the model's "),
    ],
)
def test_refusals(tmp_path: Path, arguments: list[str], message: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "manifest.json").write_text(json.dumps({"context_length": 42}))
    settings = {"benchmark": {"new_tokens": 3}, "peers": {"prompt_tokens": [40]}}
    files = ["--settings", json.dumps(settings), "--model", str(model), "--text", str(tmp_path / "text.json")]
    files += ["--output", str(tmp_path / "timings"), "--metrics", str(tmp_path / "metrics")]
    with pytest.raises(UserError, match=message):
        time_methods.main([*files, *arguments, "--keep-ratio", "0.5"])


@pytest.mark.parametrize("method", ["unpruned", "oracle", "kvpress-KnormPress"])
def test_what_cannot_be_timed_is_no_choice(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--settings", "{}", "--model", "m", "--text", "t", "--output", "o", "--metrics", "f"]
    with pytest.raises(SystemExit):
        time_methods.main([*files, "--methods", method, "--keep-ratio", "1.0"])
    assert f"invalid choice: '{method}'" in capsys.readouterr().err
