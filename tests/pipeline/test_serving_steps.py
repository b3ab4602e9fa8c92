"""The steps of serving, on files, with a tiny model; placements of several processes are launched for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pipeline.steps import longest_prompt, serving_tables, throughput
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline.saliency_run import MODEL

pytestmark = pytest.mark.usefixtures("no_tracking")

SERVING: dict[str, Any] = {
    "prompt_tokens": 40,
    "new_tokens": 3,
    "batch_sizes": [1, 2],
    "requests": 4,
    "memory_limit": 10**12,
    "length_step": 100,
}
SETTINGS: dict[str, Any] = {
    "model": {**MODEL, "source": {"ref": "tiny"}},
    "pruning": {"start": 1, "step": 2, "keep_ratios": [0.5], "sinks": 1, "local": 0.1, "min_local": 2},
    "benchmark": {"repeats": 2, "warmup": 1},
    "serving": SERVING,
}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """A model, a pruner of two stages, and a text of 150 tokens to make requests of."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    context = model.config.max_position_embeddings
    manifest = {"trust_remote_code": False, "context_length": context}
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "text.json").write_text(json.dumps({"ids": [3 + n % 100 for n in range(150)]}))
    schedule = PruningSchedule((1, 3), (0.5, 0.25), sinks=1, local=0.1, min_local=2)
    TokenPruner(schedule, scorers.Learned(32, 2, width=8)).save_pretrained(tmp_path / "pruner")
    return tmp_path


def arguments(run: Path, name: str, **serving: Any) -> list[str]:
    settings = {**SETTINGS, "serving": {**SERVING, **serving}}
    given = ["--settings", json.dumps(settings), "--model", str(run / "model"), "--text", str(run / "text.json")]
    files = ["--output", str(run / f"{name}.json"), "--metrics", str(run / f"{name}-metrics.json")]
    return [*given, "--pruner", str(run / "pruner"), *files]


def read(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"{name}.json").read_text())
    return found


def arms(rows: list[dict[str, Any]]) -> list[tuple[int, str, float, int, int]]:
    return [(row["batch"], row["method"], row["keep_ratio"], len(row["end_to_end_s"]), row["requests"]) for row in rows]


def test_one_device_times_every_arm_at_every_batch_size(run: Path) -> None:
    throughput.main([*arguments(run, "one"), "--placement", "one"])
    found = read(run, "one")
    assert (found["placement"], found["devices"], found["not_run"]) == ("one", 1, None)
    assert arms(found["rows"]) == [
        (batch, method, ratio, 2, 4) for batch in (1, 2) for method, ratio in (("unpruned", 1.0), ("sdtp", 0.5))
    ]
    for row in found["rows"]:
        assert (row["prompt_tokens"], row["new_tokens"]) == (40, 3)
        assert all(0 < prefill < whole for prefill, whole in zip(row["prefill_s"], row["end_to_end_s"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["replicas-2", "tensor-2"])
def test_processes_answer_together_and_beside_one_device(run: Path, placement: str) -> None:
    code = "import sys; from sdtp.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "throughput", *arguments(run, "several"), "--placement", placement],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = read(run, "several")
    assert found["devices"] == 2
    assert arms(found["rows"]) == [
        (batch, method, ratio, 2, 4)
        for batch in (1, 2)
        for method, ratio in (("unpruned", 1.0), ("sdtp", 0.5), ("one-device", 1.0))
    ]
    assert "1 threads" in found["device"]  # each its share of the cores


def test_what_cannot_be_had_is_a_row_that_says_why(run: Path) -> None:
    throughput.main([*arguments(run, "split"), "--placement", "split-2"])
    told = "layers are split over GPUs: 2 are needed, there is none"
    assert (read(run, "split")["not_run"], read(run, "split")["rows"]) == (told, [])


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        (
            {"batch_sizes": [3]},
            r"^serving.requests: 4 requests in batches of 3 cannot be shared evenly by 1 replicas; a",
        ),
        ({"prompt_tokens": 10**6}, r"^1000000 \(serving.prompt_tokens\) \+ 3 \(serving.new_tokens\) = 1000003 tokens"),
    ],
)
def test_bad_requests_are_refused(run: Path, serving: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        throughput.main([*arguments(run, "one", **serving), "--placement", "one"])


def test_requests_are_consecutive_pieces_of_the_text(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(throughput, "measure", lambda model, alone, pruners, batches, *rest: seen.extend(batches) or [])
    throughput.main([*arguments(run, "one", batch_sizes=[2]), "--placement", "one"])
    assert [tuple(one.shape) for one in seen] == [(2, 40), (2, 40)]
    rows = torch.cat(seen).flatten().tolist()
    assert rows == [3 + n % 150 % 100 for n in range(160)]


def test_the_longest_prompt_is_bounded_by_positions_or_by_memory(run: Path) -> None:
    context = read(run / "model", "manifest")["context_length"]
    longest_prompt.main(arguments(run, "longest"))
    found = read(run, "longest")
    assert found["tokens_at_most"] == context - 3
    assert [(row["method"], row["keep_ratio"], row["longest"]) for row in found["rows"]] == [
        ("unpruned", 1.0, context - 3),
        ("sdtp", 0.5, context - 3),
    ]
    assert all(peak > 10**7 for row in found["rows"] for peak in row["peaks"].values())
    longest_prompt.main(arguments(run, "longest", memory_limit=1000))
    assert [row["longest"] for row in read(run, "longest")["rows"]] == [None, None]
    longest_prompt.main(arguments(run, "longest", memory_limit=None))
    weights = sum(tensor.nbytes for tensor in load_file(run / "model" / "model.safetensors").values())
    assert read(run, "longest")["memory_limit"] == 3 * weights


def test_lengths_to_try() -> None:
    assert longest_prompt.lengths_to_try(100, 10, 320) == [100, 200, 300, 310]
    assert longest_prompt.lengths_to_try(100, 20, 320) == [100, 200, 300]
    assert longest_prompt.lengths_to_try(1000, 20, 320) == [300]
    with pytest.raises(UserError, match=r"^20 \(serving.new_tokens\) \+ 1 \(a prompt\) = 21 tokens"):
        longest_prompt.lengths_to_try(100, 20, 20)
    with pytest.raises(UserError, match=r"^serving: the model states no context length"):
        longest_prompt.lengths_to_try(100, 20, None)


def test_tables_and_figure(run: Path) -> None:
    for placement in ("one", "split-2"):
        throughput.main([*arguments(run, placement), "--placement", placement])
    longest_prompt.main(arguments(run, "longest"))
    files = {"--throughput-table": "t.csv", "--longest-table": "l.csv", "--figure": "f.svg", "--metrics": "m.json"}
    given = ["--settings", "{}", "--throughput", str(run / "one.json"), str(run / "split-2.json")]
    outputs = [part for option, name in files.items() for part in (option, str(run / name))]
    serving_tables.main([*given, "--longest", str(run / "longest.json"), *outputs])
    table = pd.read_csv(run / "t.csv")
    assert table["placement"].tolist() == ["one"] * 4 + ["split-2"]
    assert pd.read_csv(run / "l.csv")["at_context_limit"].tolist() == [True, True]
    assert (run / "f.svg").stat().st_size > 5000
    assert (run / "f.png").stat().st_size > 5000
