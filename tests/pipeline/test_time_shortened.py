"""`sdtp time-shortened`: the model on whole and on shortened prompts, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from sdtp.pipeline.steps import time_shortened

pytestmark = pytest.mark.usefixtures("no_tracking")


def test_both_prompts_run_in_turn_and_what_shortening_took_is_kept(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(time_shortened, "load_model", lambda *_: model)
    settings = {
        "model": {
            "source": {"kind": "local", "ref": "m", "revision": None, "sha256": None},
            "dtype": "float32",
            "attention": "sdpa",
        },
        "benchmark": {"new_tokens": 2, "repeats": 3, "warmup": 1},
    }
    about = {"weights": "w", "keep_ratio": 0.9, "device": "CPU", "versions": {"llmlingua": "0.2.2"}, "warmup": 1}
    prompt = {"prompt_ids": list(range(3, 43)), "shortened_ids": list(range(3, 25)), "shortening_s": [0.5, 0.25, 0.75]}
    (tmp_path / "shortened.json").write_text(json.dumps({**about, "rows": [prompt]}))
    paths = {
        "model": tmp_path,
        "shortened": tmp_path / "shortened.json",
        "output": tmp_path / "o.json",
        "metrics": tmp_path / "m.json",
    }
    options = [str(part) for name, path in paths.items() for part in (f"--{name}", path)]
    time_shortened.main(["--settings", json.dumps(settings), *options])
    # A round of warm-up and three timed ones, of a prefill and a step of decoding each.
    assert lengths == [40, 1, 22, 1] * 4
    found = json.loads((tmp_path / "o.json").read_text())
    assert (found["method"], found["keep_ratio"], found["model"]) == ("llmlingua2", 0.9, "m")
    assert found["shortening"] == {name: about[name] for name in ("weights", "device", "versions", "warmup")}
    unpruned, own = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["unpruned", "llmlingua2"]
    assert (unpruned["prompt_tokens"], own["prompt_tokens"], own["kept_tokens"]) == (40, 40, 22)
    assert own["shortening_s"] == [0.5, 0.25, 0.75]
    assert all(len(row[name]) == 3 for row in found["rows"] for name in ("prefill_s", "end_to_end_s"))
    # Half a second is far more than a tiny model takes.
    assert json.loads((tmp_path / "m.json").read_text())["prefill_speedup/40"] < 1
