"""`sdtp tune-schedule` on folders: a model of which it is known where pruning hurts, and faults in the input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.names import LEAST_REPORTED
from sdtp.evaluation.schedule_search import Found
from sdtp.evaluation.stats import paired_difference
from sdtp.evaluation.teacher_forcing import force
from sdtp.evaluation.tuning import alone
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.steps import tune_schedule
from sdtp.pipeline.tuning_plot import COLOURS, tuning
from sdtp.pruning import flops, scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline import tunable

SCHEDULE = PruningSchedule((1, 3), (0.8, 0.64), sinks=2, local=0.1, min_local=3)
TOKENS = 48


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tunable.made(tiny_model)


@pytest.fixture
def run(tmp_path: Path, model: PreTrainedModel) -> Path:
    return tunable.save(tmp_path, model, SCHEDULE)


def arguments(run: Path, *more: str, output: str = "tuned", target: str = "--flops", ratio: float = 0.7) -> list[str]:
    folders = [part for name in ("model", "pruner", "data") for part in (f"--{name}", str(run / name))]
    return [*folders, target, str(ratio), "--prompt-tokens", str(TOKENS), "--output", str(run / output), *more]


def result(run: Path, output: str = "tuned") -> dict[str, Any]:
    found = json.loads((run / output / "tuning.json").read_text())
    assert isinstance(found, dict)
    return found


def loss_difference(
    run: Path, model: PreTrainedModel, pruner: Callable[[int], TokenPruner], ids: tuple[str, ...]
) -> dict[str, float]:
    """Task -> mean over its examples of what pruning adds to the response's loss."""
    values: dict[str, list[float]] = {}
    for row in load_split(run / "data", "heldout").to_list():
        if row["id"] in ids:
            prompt, response = row["prompt_ids"], row["response_ids"]
            losses = [-force(model, prompt, response, p).log_probs.mean() for p in (None, pruner(len(prompt)))]
            values.setdefault(row["task"], []).append(float(losses[1] - losses[0]))
    return {task: sum(part) / len(part) for task, part in values.items()}


def test_prunes_where_it_does_no_harm(run: Path, model: PreTrainedModel, capsys: pytest.CaptureFixture[str]) -> None:
    tune_schedule.main(arguments(run))
    pruner = TokenPruner.from_pretrained(run / "tuned")
    before = TokenPruner.from_pretrained(run / "pruner")
    schedule = pruner.schedule
    assert schedule.layers == SCHEDULE.layers
    assert (schedule.sinks, schedule.local, schedule.min_local) == (2, 0.1, 3)
    first, last = schedule.surviving(TOKENS)
    assert first == TOKENS  # nothing at layer 1, where it would be missed
    assert last < 0.5 * TOKENS
    assert isinstance(pruner.scorer, scorers.Learned)
    assert isinstance(before.scorer, scorers.Learned)
    for name, weight in before.scorer.state_dict().items():
        assert torch.equal(weight, pruner.scorer.state_dict()[name])
    # At layer 1 nothing is scored, so that its operations are not those of a stage that removes.
    unpruned = flops.prefill(model.config, TOKENS)
    spent = flops.prefill(model.config, TOKENS, schedule) + 2 * before.scorer.multiply_adds(TOKENS)
    assert 0.67 < spent / unpruned <= 0.7

    found = result(run)
    assert (found["chosen"], found["target"], found["ratio"], found["prompt_tokens"]) == ("tuned", "flops", 0.7, TOKENS)
    assert found["examples"] == {
        "choosing": {"retrieval": 4, "continuation": 2},
        "reporting": {"retrieval": 4, "continuation": 2},
        "too_short": 1,
    }
    assert found["content_sha256"] == "h" * 64
    candidates = found["candidates"]
    assert list(candidates)[:2] == ["geometric", "optimum"]
    assert candidates[found["best"]]["cost"] == pytest.approx(spent / unpruned)
    assert all(row["cost"] <= 0.7 for row in candidates.values())
    assert candidates["geometric"]["cost"] > 0.68
    assert len({tuple(row["survivors"]) for row in candidates.values()}) == len(candidates) > 4
    assert candidates[found["best"]]["kl"] == min(row["kl"] for row in candidates.values())
    assert found["report"]["tuned"]["kl"] < 1e-6 < found["report"]["geometric"]["kl"]
    assert found["report"]["tuned"]["tasks"]["continuation"]["n"] == 2
    difference = found["difference"]["kl"]
    assert difference["n"] == 6
    assert difference["mean"] == pytest.approx(found["report"]["tuned"]["kl"] - found["report"]["geometric"]["kl"])
    assert difference["low"] <= difference["mean"] <= difference["high"] < 0
    keep = found["compared"]["geometric"]["keep"]
    assert keep[1] == pytest.approx(keep[0] ** 2)
    gradual = before.with_schedule(PruningSchedule(**found["compared"]["geometric"]))
    reported = loss_difference(run, model, lambda n: gradual, ("e1", "e3", "e5", "e7", "e10", "e12"))
    assert found["report"]["geometric"]["loss"] == pytest.approx(sum(reported.values()) / 2, abs=1e-5)

    captured = capsys.readouterr()
    # Six examples unpruned twice, at six fractions of two stages, under every candidate; six others under two.
    forwards = 6 * (2 + 2 * 6 + len(candidates)) + 6 * 3
    assert f"{forwards}/{forwards}" in captured.err
    told = captured.out.splitlines()
    assert told[0] == f"prefill FLOPs: 0.7 of the unpruned model's, for {TOKENS} prompt tokens"
    assert [line.split()[0] for line in told[3:5]] == ["geometric", "optimum"]
    assert told[-2:] == [
        f"{found['best']} is better than the geometric schedule: it is chosen",
        f"written to {run / 'tuned'}",
    ]
    assert sorted(path.name for path in (run / "tuned").iterdir()) == [
        "pruner.json",
        "pruner.safetensors",
        "tuning.json",
        "tuning.png",
        "tuning.svg",
    ]


def test_stages_are_measured_alone(run: Path, model: PreTrainedModel) -> None:
    tune_schedule.main(arguments(run))
    pruner = TokenPruner.from_pretrained(run / "pruner")
    first, last = result(run)["stages"]
    assert (first["layer"], last["layer"]) == (1, 3)
    assert all(point["kl"] < 1e-6 for point in last["points"])
    # Every task in turn, and each task's examples in turn to choose with and to report on.
    choosing = ("e0", "e2", "e4", "e6", "e9", "e11")
    means = loss_difference(run, model, lambda n: pruner.with_schedule(alone(SCHEDULE, 0, 0.5, n)), choosing)
    point = first["points"][2]
    assert point["fraction"] == 0.5
    assert point["loss"] == pytest.approx(sum(means.values()) / 2, abs=1e-5)
    assert point["tasks"]["retrieval"]["loss"] == pytest.approx(means["retrieval"], abs=1e-5)
    assert point["kept_share"] == pytest.approx(0.5, abs=0.01)
    assert [one["kl"] > 1e-6 for one in first["points"]] == [True] * 6


def test_memory_of_a_baseline(run: Path) -> None:
    TokenPruner(SCHEDULE, scorers.Recent()).save_pretrained(run / "pruner")
    tune_schedule.main(arguments(run, target="--memory", ratio=0.65))
    pruner = TokenPruner.from_pretrained(run / "tuned")
    assert isinstance(pruner.scorer, scorers.Recent)
    lengths = pruner.schedule.layer_lengths(TOKENS, 6)
    assert 0.63 < sum(lengths) / (6 * TOKENS) <= 0.65
    assert lengths[:3] == [TOKENS] * 3


def test_prefill_time_is_measured(
    run: Path, tiny_model: Callable[..., PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    # Wide enough for its time to depend on the number of tokens.
    tiny_model(num_hidden_layers=6, intermediate_size=2048).save_pretrained(run / "model")
    more = ["--prompt-tokens", "500"]
    tune_schedule.main(arguments(run, *more, target="--latency", ratio=0.85))
    found = result(run)
    assert all(row["cost"] <= 0.85 for row in found["candidates"].values())
    assert set(found["prefill_time"]) == set(found["compared"])
    for low, middle, high in found["prefill_time"].values():
        assert 0 < low <= middle <= high
    assert "measured prefill time, geometric: " in capsys.readouterr().out


def test_the_geometric_schedule_stays_where_nothing_is_shown_to_be_better(
    run: Path, tiny_model: Callable[..., PreTrainedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    # What is lowest on the examples that choose is so by chance: every layer attends, and little depends on it.
    tiny_model(num_hidden_layers=6).save_pretrained(run / "model")
    tune_schedule.main(arguments(run))
    found = result(run)
    assert found["chosen"] == "geometric"
    assert found["best"] != "geometric"
    assert found["difference"]["kl"]["p_value"] > 0.05
    keep = TokenPruner.from_pretrained(run / "tuned").schedule.keep
    assert keep[1] == pytest.approx(keep[0] ** 2)
    assert "nothing is shown to be better than the geometric schedule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tuned", "chosen"),
    [
        ([-1.0, -2.0, -1.0, -3.0, -1.0], "geometric"),  # one in sixteen by chance: five can show nothing
        ([-1.0, -2.0, -1.0, -3.0, -1.0, -2.0], "tuned"),
        ([-1.0, -2.0, -1.0, -3.0, -1.0, 0.5], "geometric"),
    ],
)
def test_a_schedule_is_chosen_where_as_many_examples_as_are_needed_agree(tuned: list[float], chosen: str) -> None:
    difference = {"kl": paired_difference(tuned, [0.0] * len(tuned))}
    assert difference["kl"].high < 0
    found = Found([], {}, "optimum", {"geometric": SCHEDULE, "tuned": SCHEDULE}, {}, difference)
    assert found.chosen == chosen
    assert (len(tuned) >= LEAST_REPORTED) == (0.5 ** (len(tuned) - 1) <= 0.05)


def test_one_stage_leaves_little_to_choose(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TokenPruner(PruningSchedule((1,), (0.5,), sinks=2, min_local=3), scorers.Recent()).save_pretrained(run / "pruner")
    tune_schedule.main(arguments(run))
    found = result(run)
    # Whatever is solved for or blended is the geometric schedule; a move alone prunes more.
    assert list(found["candidates"]) == ["geometric", "move 1"]
    assert (found["best"], found["chosen"], found["difference"]) == ("geometric", "geometric", None)
    assert list(found["report"]) == list(found["compared"]) == ["geometric"]
    assert "no schedule has a lower mean KL than the geometric one" in capsys.readouterr().out


def test_an_older_result_is_replaced_and_nothing_else(run: Path) -> None:
    (run / "other").mkdir()
    (run / "other" / "kept").write_text("")
    with pytest.raises(UserError, match=r"^--output .*other: is there already and holds no tuning\.json"):
        tune_schedule.main(arguments(run, output="other"))
    assert (run / "other" / "kept").exists()
    (run / "other" / "tuning.json").write_text("{}")
    tune_schedule.main(arguments(run, "--examples", "12", output="other"))
    assert not (run / "other" / "kept").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--flops", "0.1"], r"^--flops 0\.1 is out of reach for 48 prompt tokens: 0\.\d{4} is the least"),
        (["--prompt-tokens", "5"], r"^--prompt-tokens 5: nothing can be removed .*; 5 tokens are protected \(sinks 2"),
        (["--prompt-tokens", "513"], r"^513 \(--prompt-tokens\) = 513 tokens: the model's context has 512$"),
        (["--split", "train"], r"^--data .*: 0 examples of train can be used \(2 rows, 2 too short to prune, "),
        (["--split", "test"], r"^--data .*: 1 examples of test can be used, only one of retrieval \(1 rows"),
        (["--pruner", "missing"], r"^--pruner missing: .*pruner\.json"),
    ],
)
def test_faults_in_the_input(run: Path, more: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tune_schedule.main(arguments(run, *more))
    assert not (run / "tuned").exists()


def test_too_few_examples_to_show_anything_are_refused_before_the_model_is_read(run: Path) -> None:
    # Without the two that would have reported as well: six choose, five report.
    rows = load_split(run / "data", "heldout").to_list()
    Dataset.from_list(rows[:-1]).save_to_disk(run / "fewer")
    shutil.rmtree(run / "data" / "heldout")
    (run / "fewer").rename(run / "data" / "heldout")
    (run / "model" / "model.safetensors").unlink()
    told = (
        r"^--data .*/data: 11 examples of heldout can be used \(12 rows, 1 too short to prune, at most 64 asked for\), "
        r"6 to choose with and 5 to report on; fewer than 6 reported can show no difference at 95%, .*: "
        r"data\.train\.heldout of 12 or more gives them$"
    )
    with pytest.raises(UserError, match=told):
        tune_schedule.main(arguments(run))


def test_least_reachable_is_reachable(run: Path) -> None:
    with pytest.raises(UserError) as refused:
        tune_schedule.main(arguments(run, ratio=0.1, target="--memory"))
    least = float(str(refused.value).split(": ")[1].split()[0])
    tune_schedule.main(arguments(run, ratio=least + 1e-4, target="--memory"))
    assert result(run)["candidates"]["geometric"]["survivors"] == SCHEDULE.with_ratio(1e-6).surviving(TOKENS)


def test_pruner_of_another_model(run: Path) -> None:
    TokenPruner(SCHEDULE, scorers.Learned(16, 2, width=4)).save_pretrained(run / "pruner")
    with pytest.raises(UserError, match="the scorer was trained for hidden size 16, LlamaForCausalLM has 32"):
        tune_schedule.main(arguments(run))
    TokenPruner(PruningSchedule((1, 9), (0.5, 0.4)), scorers.Recent()).save_pretrained(run / "pruner")
    with pytest.raises(UserError, match="the model has layers 0 to 5 only"):
        tune_schedule.main(arguments(run))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--memory", "0.5"], "not allowed with argument --flops"),
        (["--flops", "1.0"], "--flops 1.0: a share of the unpruned model's, in (0, 1), is accepted"),
        (["--prompt-tokens", "0"], "--prompt-tokens 0: at least 1 is needed"),
        (["--examples", "11"], "--examples 11: at least 12 are needed"),
    ],
)
def test_wrong_options(tmp_path: Path, more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tune_schedule.main(arguments(tmp_path, *more))
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def test_figure_shows_curves_and_schedules() -> None:
    curves = {1: [(0.2, 3.0, 2.5, 4.0), (0.8, 1.0, 0.5, 1.25)], 3: [(0.8, 0.1, 0.1, 0.1), (0.2, 0.2, 0.2, 0.2)]}
    figure: Figure = tuning(curves, {"geometric": [10, 8, 8, 6], "tuned": [10, 10, 10, 2]}, 10, 7)
    left, right = figure.axes
    lines = [container.lines[0] for container in left.containers]
    assert [[list(line.get_xdata()), list(line.get_ydata())] for line in lines] == [
        [[0.8, 0.2], [1.0, 3.0]],
        [[0.8, 0.2], [0.1, 0.2]],
    ]
    bars = left.containers[0].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[0.5, 1.25], [2.5, 4.0]]
    assert left.get_title(loc="left") == "mean and 95% interval of 7 examples"
    assert left.xaxis.get_inverted()
    steps = {patch.get_label(): patch.get_data() for patch in right.patches}
    assert steps["tuned"].values.tolist() == [1.0, 1.0, 1.0, 0.2]
    assert steps["geometric"].edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert set(COLOURS) == set(steps)
