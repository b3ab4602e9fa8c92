"""The step that tunes the run's pruner for a keep ratio: what it costs, what it takes over, and where it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation import damage
from sdtp.evaluation.teacher_forcing import force
from sdtp.pipeline.chosen import chosen_method
from sdtp.pipeline.config import Settings
from sdtp.pipeline.steps import tune
from sdtp.pruning import flops
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline import tunable
from tests.pipeline.killed import carry_out

pytestmark = pytest.mark.usefixtures("no_tracking")

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model": {"dtype": "float32", "attention": "sdpa"},
    "pruning": {"start": 1, "step": 2, "sinks": 2, "local": 0.1, "min_local": 3},
}
# As training left it, for a keep ratio of 0.7.
OWN = PruningSchedule.geometric(6, 1, 2, 0.7, sinks=2, local=0.1, min_local=3)
# Six examples choose and six report; three stages at six fractions.
ALONE = 6 * 3 * 6
MEDIAN = 44  # of 30, 39, 40, 40, 41, 44, 48, 49, 50, 50, 51, 60 the lower middle one


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tunable.made(tiny_model)


@pytest.fixture
def run(tmp_path: Path, model: PreTrainedModel) -> Path:
    return tunable.save(tmp_path, model, OWN)


def arguments(run: Path, ratio: float, results: str = "results") -> list[str]:
    folders = [part for name in ("model", "pruner", "data") for part in (f"--{name}", str(run / name))]
    own = run / results
    return [
        *("--settings", json.dumps(SETTINGS), *folders, "--keep-ratio", str(ratio)),
        *("--checkpoint", str(own / "checkpoints" / f"{ratio}.jsonl"), "--output", str(own / "tuned" / str(ratio))),
        *("--metrics", str(own / f"metrics-{ratio}.json")),
    ]


def result(run: Path, ratio: float, results: str = "results") -> Any:
    return json.loads((run / results / "tuned" / str(ratio) / "tuning.json").read_text())


def metrics(run: Path, ratio: float, results: str = "results") -> Any:
    return json.loads((run / results / f"metrics-{ratio}.json").read_text())


def test_costs_what_the_keep_ratio_costs_and_is_evaluated_as_it_is(run: Path, model: PreTrainedModel) -> None:
    tune.main(arguments(run, 0.8))
    found, folder = result(run, 0.8), run / "results" / "tuned" / "0.8"
    asked, tuned = OWN.with_ratio(0.8), TokenPruner.from_pretrained(folder)
    assert (found["keep_ratio"], found["prompt_tokens"], found["split"]) == (0.8, MEDIAN, "heldout")
    assert found["chosen"] == "tuned"
    # The share of the unpruned model's operations is the geometric schedule's, which is compared as it is.
    assert found["compared"]["geometric"]["keep"] == list(asked.keep)
    whole = flops.prefill(model.config, MEDIAN)
    given = flops.prefill(model.config, MEDIAN, asked, tuned.scorer) / whole
    spent = flops.prefill(model.config, MEDIAN, tuned.schedule, tuned.scorer) / whole
    assert found["ratio"] == pytest.approx(given)
    assert given - 0.03 < spent <= given * (1 + 1e-12)
    # Nothing goes at layer 1, where it would be missed.
    assert tuned.schedule.surviving(MEDIAN)[0] == MEDIAN
    assert tuned.schedule.surviving(MEDIAN)[-1] < asked.surviving(MEDIAN)[-1]
    told = metrics(run, 0.8)
    assert (told["tuned_is_chosen"], told["measurements_taken_over"]) == (1.0, 0.0)
    assert told["tuned/kl"] == found["report"]["tuned"]["kl"] < told["geometric/kl"]

    prompt, settings = list(range(3, 53)), Settings.from_mapping(SETTINGS)
    kept = {}
    for method, pruner in (("sdtp-tuned", folder), ("sdtp", run / "pruner")):
        chosen = chosen_method(method, settings, model, 0.8, pruner)
        kept[method] = force(model, prompt, [9, 4, 7], chosen(prompt, [9, 4, 7])).kept_tokens
    assert kept == {"sdtp-tuned": tuned.schedule.surviving(50)[-1], "sdtp": asked.surviving(50)[-1]}
    assert kept["sdtp-tuned"] < kept["sdtp"]
    with pytest.raises(UserError, match="would replace what was chosen for them"):
        chosen_method("sdtp", settings, model, 0.8, folder)


def test_another_keep_ratio_takes_over_what_each_stage_does_alone(run: Path) -> None:
    tune.main(arguments(run, 0.7, "alone"))
    for ratio in (0.8, 0.7):
        tune.main(arguments(run, ratio))
    assert metrics(run, 0.7, "alone")["measurements_taken_over"] == 0
    # And no whole schedule: those cost something else.
    assert metrics(run, 0.7)["measurements_taken_over"] == ALONE
    assert result(run, 0.7) == result(run, 0.7, "alone")


def test_nothing_is_measured_twice_and_another_scorers_measurements_do_not_count(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.main(arguments(run, 0.8))
    first = result(run, 0.8)

    def not_again(*given: Any) -> None:
        raise AssertionError("it is known")

    with monkeypatch.context() as patch:
        patch.setattr(damage, "forced_logits", not_again)
        tune.main(arguments(run, 0.8))
        assert result(run, 0.8) == first
        tunable.save_pruner(run, OWN, seed=1)
        with pytest.raises(AssertionError, match="it is known"):
            tune.main(arguments(run, 0.8))


@pytest.mark.slow
def test_a_killed_step_goes_on_and_ends_with_the_same(run: Path) -> None:
    # In the stages' curves; between two whole schedules of the first example; in a line; when all is measured.
    phases = {
        "stage": ("compute", 50),
        "between": ("compute", ALONE + 4),
        "line": ("write", 60),
        "finish": ("finish", 1),
    }
    plan: list[list[object]] = [["", 0, str(run / "whole.txt"), ["tune", *arguments(run, 0.8, "whole")]]]
    for name, (phase, count) in phases.items():
        plan.append([phase, count, str(run / f"{name}-killed.txt"), ["tune", *arguments(run, 0.8, name)]])
        plan.append(["", 0, str(run / f"{name}.txt"), ["tune", *arguments(run, 0.8, name)]])
    process = carry_out("tests.pipeline.killed_tuning", plan, run)
    assert process.stdout.split() == ["0"] + ["-9", "0"] * len(phases), process.stderr

    def measured(name: str) -> int:
        path = run / f"{name}.txt"
        return len(path.read_text().splitlines()) if path.exists() else 0

    every = measured("whole")
    assert every > ALONE + 6 * 4 + 6 * 2
    kept = {"stage": 49, "between": ALONE + 3, "line": 59, "finish": every}
    for name, count in kept.items():
        assert measured(f"{name}-killed") == count + (name == "line"), name
        assert measured(name) == every - count, name
        assert metrics(run, 0.8, name)["measurements_taken_over"] == count, name
        for file in ("tuning.json", "pruner.json", "pruner.safetensors", "tuning.svg"):
            own, whole = (run / results / "tuned" / "0.8" / file for results in (name, "whole"))
            assert own.read_bytes() == whole.read_bytes(), (name, file)
        assert not list((run / name).rglob(".tmp-*")), name
