"""The cells, tables and figures of the sweeps: made-up evaluations against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from sdtp.errors import UserError
from sdtp.evaluation.stats import mean_interval, paired_difference, wilson_interval
from sdtp.pipeline.config import PruningSettings
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.sweep_cells import count_cells, position_cells, swept_layers
from sdtp.pipeline.sweep_plot import sweep
from sdtp.pipeline.sweeps import (
    SWEEP_COLUMNS,
    check_complete,
    first_of_each_task,
    sweep_table,
)
from sdtp.pipeline.target_settings import SweepSettings
from tests.pipeline.rows import only

SWEEP = {"layers": [7, 1], "layer_ratios": [0.7, 0.9], "counts": [3, 1], "count_ratios": [0.9], "examples": 4}
PRUNING = PruningSettings.from_mapping({"start": 4, "step": 3})
CELLS = [((1,), 0.9), ((1,), 0.7), ((7,), 0.9), ((7,), 0.7)]
T, F = True, False
UNPRUNED = ([T, T, F, T], [1.0, 2.0, 3.0, 4.0])
# Layers and ratio -> right, losses, tokens kept of 100, 101, ...; operations.
EVALUATED: dict[tuple[tuple[int, ...], float], tuple[list[bool], list[float], int, float]] = {
    ((1,), 0.9): ([T, T, F, T], [1.1, 2.2, 3.2, 4.1], 90, 80.0),
    ((1,), 0.7): ([F, F, F, T], [2.0, 2.5, 3.0, 4.3], 70, 50.0),
    ((7,), 0.9): ([T, T, F, T], [1.0, 2.1, 2.9, 4.1], 90, 90.0),
    ((7,), 0.7): ([T, F, F, T], [1.5, 2.3, 3.1, 4.2], 70, 60.0),
    ((4,), 0.9): ([T, T, F, T], [1.3, 2.3, 3.3, 4.3], 90, 85.0),
    ((4, 7, 10), 0.9): ([F, T, F, T], [1.4, 2.5, 3.6, 4.5], 73, 70.0),
}


def evaluated(right: Sequence[bool], losses: Sequence[float], kept: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of retrieval examples r0, r1, ... and, with losses larger by 10, of continuation examples c0, c1, ..."""
    rows = []
    for index, (correct, loss) in enumerate(zip(right, losses, strict=True)):
        same = {"seed": None, "prompt_tokens": 100 + index, "kept_tokens": kept, **more}
        same |= {"kl": loss / 8, "top1": 1 - loss / 8}
        rows.append({"id": f"r{index}", "task": "retrieval", "correct": correct, "loss": loss, **same})
        rows.append({"id": f"c{index}", "task": "continuation", "correct": None, "loss": loss + 10, **same})
    return rows


def unpruned() -> list[dict[str, Any]]:
    return evaluated(*UNPRUNED, 100, method="unpruned", keep_ratio=1.0)


def rows() -> list[dict[str, Any]]:
    found = []
    for (layers, ratio), (right, losses, kept, flop) in EVALUATED.items():
        cell = {"method": "sdtp", "layers": list(layers), "keep_ratio": ratio, "flop": flop, "unpruned_flop": 100.0}
        # Out of order: differences go by example.
        found += reversed(evaluated(right, losses, kept, **cell))
    return found


def settings(**change: Any) -> SweepSettings:
    return SweepSettings.from_mapping({**SWEEP, **change})


@pytest.fixture(scope="module")
def positions() -> pd.DataFrame:
    return sweep_table(unpruned(), rows(), CELLS)


@pytest.fixture(scope="module")
def counts() -> pd.DataFrame:
    return sweep_table(unpruned(), rows(), count_cells(settings(), PRUNING))


def test_cells_are_single_layers_and_the_first_stages_of_the_run() -> None:
    assert position_cells(settings()) == CELLS
    assert count_cells(settings(), PRUNING) == [((4,), 0.9), ((4, 7, 10), 0.9)]
    assert swept_layers(settings(), PRUNING, 11) == (1, 4, 7, 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [1, 11]}, "sweep.layers: 11 is no layer to prune at; .* 11 layers, so that 1 to 10 are accepted"),
        ({"counts": [4]}, r"sweep.counts: 4 stages at layers 4, 7, \.\.\. .* 11 layers; 1 to 3 are accepted"),
    ],
)
def test_layers_the_model_does_not_have_are_refused_by_their_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        swept_layers(settings(**change), PRUNING, 11)


def test_the_first_examples_of_each_task_are_taken_in_their_order() -> None:
    examples = [{"id": id_, "task": id_[0]} for id_ in ("a0", "b0", "a1", "a2", "b1", "c0")]
    assert [one["id"] for one in first_of_each_task(examples, 2)] == ["a0", "b0", "a1", "b1", "c0"]


def test_every_cell_has_one_row_after_the_unpruned_models(positions: pd.DataFrame) -> None:
    assert list(positions.columns) == SWEEP_COLUMNS
    panel = positions[(positions["task"] == "continuation") & (positions["metric"] == "loss")]
    assert list(zip(panel["method"], panel["layers"], panel["keep_ratio"], strict=True)) == [
        ("unpruned", "", 1.0),
        ("sdtp", "1", 0.9),
        ("sdtp", "1", 0.7),
        ("sdtp", "7", 0.9),
        ("sdtp", "7", 0.7),
    ]
    assert list(panel["stages"]) == [0, 1, 1, 1, 1]
    assert len(positions) == 7 * len(panel)


def test_values_intervals_and_differences_are_those_of_the_examples(positions: pd.DataFrame) -> None:
    loss = only(positions, task="retrieval", metric="loss", layers="1", keep_ratio=0.7)
    right, losses, *_ = EVALUATED[(1,), 0.7]
    assert loss["value"] == pytest.approx(2.95)
    assert (loss["low"], loss["high"], loss["n"]) == (*mean_interval(losses), 4)
    assert loss["difference"] == pytest.approx((1.0 + 0.5 + 0.0 + 0.3) / 4)
    pair = paired_difference(losses, UNPRUNED[1])
    assert (loss["difference_low"], loss["difference_high"]) == (pair.low, pair.high)
    assert loss["p_value"] == pair.p_value == 0.25
    assert loss["retained"] == pytest.approx(math.exp(-0.45))
    accuracy = only(positions, task="retrieval", metric="accuracy", layers="1", keep_ratio=0.7)
    assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (0.25, *wilson_interval(list(map(float, right))))
    assert accuracy["difference"] == pytest.approx(-0.5)


def test_p_values_are_adjusted_for_all_cells_of_their_panel(positions: pd.DataFrame) -> None:
    panel = positions[(positions["task"] == "continuation") & (positions["metric"] == "loss")]
    panel = panel[panel["method"] == "sdtp"]
    assert list(panel["p_value"]) == [0.125, 0.25, 1.0, 0.125]
    # Of four, the two smallest by 4 and 3, never falling: 0.5, 0.5; then 2 times 0.25, and 1.
    assert list(panel["p_holm"]) == [0.5, 0.5, 1.0, 0.5]
    assert set(panel["verdict"]) == {"no difference shown"}  # four examples, all of which point one way, have p = 0.125
    unpruned = only(positions, task="continuation", metric="loss", method="unpruned")
    assert unpruned[["difference", "p_value", "p_holm", "verdict"]].isna().all()


def test_compression_and_calculated_speedup_are_ratios_of_sums(positions: pd.DataFrame) -> None:
    row = only(positions, task="continuation", metric="loss", layers="7", keep_ratio=0.7)
    assert row["compression"] == pytest.approx((100 + 101 + 102 + 103) / 280)
    assert row["flop_speedup"] == pytest.approx(400 / 240)
    reference = only(positions, task="continuation", metric="loss", method="unpruned")
    assert (reference["compression"], reference["flop_speedup"]) == (1.0, 1.0)


def test_counts_name_their_stages(counts: pd.DataFrame) -> None:
    panel = counts[(counts["task"] == "continuation") & (counts["metric"] == "loss") & (counts["method"] == "sdtp")]
    assert list(zip(panel["stages"], panel["layers"], strict=True)) == [(1, "4"), (3, "4 7 10")]
    assert only(panel, stages=3)["difference"] == pytest.approx(0.5)


def test_what_is_missing_or_twice_there_is_named() -> None:
    ids = [row["id"] for row in unpruned()]
    cells = list(EVALUATED)
    check_complete(rows(), cells, ids)
    with pytest.raises(UserError, match=r"no row for 1 of 48 .* layers \[4, 7, 10\] with keep ratio 0.9 .* 'r0'"):
        check_complete([row for row in rows() if (row["id"], len(row["layers"])) != ("r0", 3)], cells, ids)
    with pytest.raises(UserError, match=r"a row too many for 1 of 48 evaluations, stages at layers \[4, 7, 10\]"):
        check_complete([*rows(), rows()[-1]], cells, ids)
    with pytest.raises(UserError, match="a row too many for 8 of 40"):
        check_complete(rows(), cells[1:], ids)


def bars(axes: Any) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Label -> places, values, and the ends [points, 2] of the intervals that are drawn."""
    drawn = {}
    for container in axes.containers:
        assert isinstance(container, ErrorbarContainer)
        line, _, (collection,) = container.lines
        ends = np.array(collection.get_segments())[:, :, 1]
        drawn[str(container.get_label())] = (*(np.asarray(data, dtype=float) for data in line.get_data()), ends)
    return drawn


def test_figure_draws_values_with_their_intervals_and_the_unpruned_level(positions: pd.DataFrame) -> None:
    accuracy, loss, _, speedup = sweep(positions, "layers").axes
    drawn = bars(loss)
    assert list(drawn) == ["keep ratio 0.9", "keep ratio 0.7"]
    places, values, ends = drawn["keep ratio 0.7"]
    rows = positions[(positions["task"] == "retrieval") & (positions["metric"] == "loss")]
    rows = rows[rows["keep_ratio"] == 0.7]
    assert np.allclose(values, rows["value"])
    assert np.allclose(ends, rows[["low", "high"]])
    # Aside of one another, but each at its own layer.
    assert np.array_equal(np.round(places), [1, 7])
    assert not np.isclose(places, drawn["keep ratio 0.9"][0]).any()
    for axes, value in ((accuracy, 0.75), (loss, 2.5), (speedup, 1.0)):
        assert value in [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert [list(line.get_ydata()) for line in speedup.lines[:2]] == [
        pytest.approx([100 / 80, 100 / 90]),
        pytest.approx([100 / 50, 100 / 60]),
    ]
    assert loss.get_title(loc="left") == "retrieval, smoke: n = 4"
    assert speedup.get_title(loc="left") == "calculated, not timed"


def test_figure_of_counts_has_the_number_of_stages_below(counts: pd.DataFrame, tmp_path: Path) -> None:
    figure = sweep(counts, "stages")
    places, values, _ = bars(figure.axes[1])["keep ratio 0.9"]
    assert list(places) == [1, 3]
    assert np.allclose(values, [2.8, 3.0])
    save(figure, tmp_path / "stage-count.svg")
    save(sweep(counts, "stages"), tmp_path / "again.svg")
    for kind in ("svg", "png"):
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("stage-count", "again"))
        assert first == second


def test_a_table_that_was_read_back_draws_the_same(positions: pd.DataFrame, tmp_path: Path) -> None:
    positions.to_csv(tmp_path / "table.csv", index=False)
    figure = sweep(pd.read_csv(tmp_path / "table.csv"), "layers")
    assert np.allclose(bars(figure.axes[1])["keep ratio 0.9"][1], [2.65, 2.525])
