from __future__ import annotations

import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from sdtp.errors import UserError
from sdtp.evaluation.names import BASELINES
from sdtp.pipeline import plots
from sdtp.pipeline.observations import foresight_table, sparsity_table
from sdtp.pipeline.plotstyle import METHODS, REDUCTIONS, label_ends, save, shades
from sdtp.training.saliency import Reduction
from tests.pipeline import synthetic_run

KEPT = {0.9: np.array([0.9, 0.81, 0.73]), 0.7: np.array([0.7, 0.49, 0.34])}

FIGURES: dict[str, Callable[[], Figure]] = {
    "saliency": lambda: plots.saliency(
        synthetic_run.saliency()[0], synthetic_run.LAYERS, [f"{n}$" for n in range(400)], "abs"
    ),
    "sparsity": lambda: plots.sparsity(sparsity_table(synthetic_run.saliency(), synthetic_run.LAYERS), KEPT),
    "foresight": lambda: plots.foresight(
        foresight_table(synthetic_run.saliency(), synthetic_run.LAYERS), synthetic_run.LAYERS
    ),
    "latency": lambda: plots.latency(synthetic_run.latency()),
    "speedup": lambda: plots.speedup(synthetic_run.latency()),
    "quality": lambda: plots.quality(synthetic_run.quality(), synthetic_run.latency(), 490),
    "training": lambda: plots.training(synthetic_run.history()),
}


def places(line: Any) -> np.ndarray:
    return np.asarray(line.get_xdata(orig=False), dtype=float)


def heights(line: Any) -> np.ndarray:
    return np.asarray(line.get_ydata(orig=False), dtype=float)


def heat_map(figure: Figure) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def texts(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    found: list[Any] = figure.findobj(Text)
    return [text.get_text() for text in found]


def test_sparsity_draws_the_mean_of_examples_and_their_quartiles() -> None:
    # 90% of the mass: 1, 2, 3 and 4 tokens of four, so mean 0.625 and quartiles 0.4375 and 0.8125; drawn first.
    examples = [np.array([row], dtype=float) for row in ([97, 1, 1, 1], [48, 48, 2, 2], [33, 33, 33, 1], [1, 1, 1, 1])]
    (axes,) = plots.sparsity(sparsity_table(examples, [4]), {}).axes
    assert heights(axes.lines[0]) == pytest.approx([0.625])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4375, 0.8125))


def test_foresight_draws_the_mean_of_examples() -> None:
    rising, falling = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    examples = [rising, rising, rising, falling]
    figure = plots.foresight(foresight_table(examples, [4, 7]), [4, 7])
    np.testing.assert_allclose(heat_map(figure), [[1, 0.5], [0.5, 1]])
    assert texts(figure).count("0.50") == 2
    assert "mean of 4 prompts" in texts(figure)


def test_foresight_of_a_single_stage_is_its_own() -> None:
    figure = plots.foresight(foresight_table([np.array([[1.0, 2.0]])], [4]), [4])
    np.testing.assert_allclose(heat_map(figure), [[1]])


def test_saliency_draws_magnitudes_and_labels_the_most_salient_tokens_that_lie_apart() -> None:
    scores = np.full((2, 100), 0.01)
    scores[:, 40] = -9.0
    scores[:, 41] = 8.0  # too near to be labelled
    scores[:, 70] = 5.0
    figure = plots.saliency(scores, [4, 7], [f"t{index}" for index in range(100)], "abs")
    image = heat_map(figure)
    assert image.shape == (2, 100)
    assert image[0, 40] == 9.0
    found = texts(figure)
    assert {"t40", "t70"} <= set(found)
    assert "t41" not in found


def test_saliency_of_a_long_prompt_keeps_the_largest_of_each_group() -> None:
    scores = np.full((1, 5000), 0.01)
    scores[0, 3333] = 7.0
    image = heat_map(plots.saliency(scores, [4], ["x"] * 5000, "abs"))
    assert image.shape == (1, 1000)
    assert image[0, 3333 // 5] == 7.0


@pytest.mark.parametrize(
    ("scores", "match"), [(np.zeros((1, 3)), "zero for every token"), (np.ones((2, 3)), r"shape \(2, 3\) for 1 layers")]
)
def test_saliency_refuses_what_it_cannot_draw(scores: Any, match: Any) -> None:
    with pytest.raises(UserError, match=match):
        plots.saliency(scores, [4], ["a", "b", "c"], "abs")


@pytest.mark.parametrize(
    ("reduction", "label"),
    [
        ("abs", "saliency: |Σ gradient × input|"),
        ("signed", "saliency: magnitude of Σ gradient × input"),
        ("l2", "saliency: √Σ (gradient × input)²"),
    ],
)
def test_saliency_is_labelled_by_its_reduction(reduction: Any, label: Any) -> None:
    figure = plots.saliency(np.array([[1.0, 2.0]]), [4], ["a", "b"], reduction)
    assert [text for text in texts(figure) if text.startswith("saliency")] == [label]


def test_every_reduction_of_saliency_has_a_name() -> None:
    assert set(REDUCTIONS) == set(get_args(Reduction))


def test_speedup_draws_both_bounds_and_a_bar_down_to_the_lower_quartile() -> None:
    table = synthetic_run.latency()
    figure = plots.speedup(table.sample(frac=1, random_state=0))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "keep ratio 0.9",
        "keep ratio 0.8",
        "keep ratio 0.7",
    ]
    rows = table[table["keep_ratio"] == 0.8].sort_values("prompt_tokens")
    flop, length, measured = figure.axes[1].lines[:3]
    np.testing.assert_allclose(heights(flop), rows["flop_bound"])
    np.testing.assert_allclose(heights(length), rows["length_bound"])
    np.testing.assert_allclose(heights(measured), rows["prefill_speedup"])
    bars: Any = figure.axes[1].collections[0]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends[:, 0], rows["speedup_q25"])
    np.testing.assert_allclose(ends[:, 1], rows["prefill_speedup"])
    assert figure.axes[0].get_ylim()[0] <= 1


def test_quality_uses_the_speedup_of_the_ratio_at_the_nearest_length() -> None:
    table, speeds = synthetic_run.quality(), synthetic_run.latency()
    figure = plots.quality(table, speeds, prompt_tokens=900)
    panel = figure.axes[0]
    assert panel.get_xlabel() == "prefill speedup (×) at 1,024 tokens"
    at = speeds[(speeds["prompt_tokens"] == 1024) & (speeds["method"] == "sdtp")].set_index("keep_ratio")[
        "prefill_speedup"
    ]
    drawn = [line for line in panel.lines if len(places(line)) == 3 and line.get_linestyle() == "-"]
    assert [line.get_color() for line in drawn] == [METHODS[name][1] for name in synthetic_run.METHODS]
    for line in drawn:
        np.testing.assert_allclose(places(line), at.loc[[0.9, 0.8, 0.7]], rtol=0.02)
    np.testing.assert_allclose(heights(drawn[0]), [0.75, 0.65, 0.55])
    # No two methods lie on the same spot, or one interval would hide the other.
    assert len({places(line)[0] for line in drawn}) == len(drawn)


@pytest.mark.parametrize(("n", "expected"), [(28, "smoke: n = 28"), (99, "smoke: n = 99"), (100, "n = 100")])
def test_quality_says_how_many_examples_each_panel_rests_on(n: Any, expected: Any) -> None:
    figure = plots.quality(synthetic_run.quality(n), synthetic_run.latency(), 490)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == [f"{task}, {expected}" for task in ("retrieval", "retrieval", "continuation")]


def test_quality_names_the_ratio_that_was_not_benchmarked() -> None:
    speeds = synthetic_run.latency()
    with pytest.raises(UserError, match=r"latency.csv: no sdtp row for keep_ratio=0.7,"):
        plots.quality(synthetic_run.quality(), speeds[speeds["keep_ratio"] != 0.7], 490)


def test_training_has_a_panel_for_each_metric_and_a_line_for_each_split() -> None:
    figure = plots.training(synthetic_run.history())
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == ["loss", "ce", "mse", "rank", "kendall_tau", "top_k_overlap"]
    assert [line.get_label() for line in panels["loss"].lines] == ["train", "heldout"]
    assert [line.get_label() for line in panels["ce"].lines] == ["train"]
    seven = plots.training(
        pd.DataFrame([(0, "train", f"m{n}", 1.0) for n in range(7)], columns=["step", "split", "metric", "value"])
    )
    assert sum(axes.get_visible() for axes in seven.axes) == 7


@pytest.mark.parametrize("ends", [[0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 0.99], [0.0, 0.01, 0.9], [0.1, 0.5, 0.9]])
def test_labels_at_line_ends_keep_apart_and_inside(ends: Any) -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(figure, axes, 1.0, [(height, f"{index}", "black") for index, height in enumerate(ends)])
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 0.5 for low, high in pairwise(boxes))
    frame = axes.get_window_extent()
    assert all(frame.y0 - 8 <= (box.y0 + box.y1) / 2 <= frame.y1 + 8 for box in boxes)


def test_labels_that_are_apart_stay_at_their_lines() -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 10))
    label_ends(figure, axes, 1.0, [(8.0, "high", "black"), (2.0, "low", "black")])
    labels: Any = axes.texts
    assert {text.get_text(): text.xy[1] for text in labels} == pytest.approx({"low": 0.2, "high": 0.8})


def test_shades_differ_and_methods_have_looks_of_their_own() -> None:
    assert len(set(shades(8))) == 8
    assert len({label for label, _, _ in METHODS.values()}) == len(METHODS)
    assert len({(colour, marker) for _, colour, marker in METHODS.values()}) == len(METHODS)
    scored = [METHODS[method] for method in ("unpruned", "sdtp", *BASELINES, "oracle")]  # what most figures show
    assert len({colour for _, colour, _ in scored}) == len({marker for _, _, marker in scored}) == len(scored)


@pytest.mark.parametrize("name", FIGURES)
def test_equal_inputs_give_equal_files_that_load_nothing(name: Any, tmp_path: Path) -> None:
    digests = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        save(FIGURES[name](), folder / name)
        assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png", f"{name}.svg"]
        digests.append(
            [hashlib.sha256((folder / f"{name}.{kind}").read_bytes()).hexdigest() for kind in ("svg", "png")]
        )
    assert digests[0] == digests[1]
    _assert_loads_nothing(tmp_path / "a" / f"{name}.svg")


def _assert_loads_nothing(path: Path) -> None:
    links = [
        value for element in ET.parse(path).iter() for key, value in element.attrib.items() if key.endswith("href")
    ]
    assert all(link.startswith(("#", "data:")) for link in links)
