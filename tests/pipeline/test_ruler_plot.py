"""The heat map: values in their cells, one scale, equal files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdtp.errors import UserError
from sdtp.evaluation.ruler.scoring import HeatMap
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.ruler_plot import heat_maps

VALUES = np.array([[100.0, 80.0, 10.0], [50.0, 40.4, 0.0]])


def made(values: np.ndarray = VALUES, n: int = 20, depths: tuple[float, ...] = (0.0, 0.5)) -> HeatMap:
    return HeatMap(depths, (512, 1024, 2048), values, n)


def test_each_method_has_a_panel_on_one_scale_with_its_values_in_the_cells() -> None:
    figure = heat_maps({"unpruned": made(), "sdtp": made(VALUES / 2, 300), "other": made(), "fourth": made()})
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.images}
    assert list(panels) == [
        "Unpruned, smoke: n = 20 a cell",
        "SDTP, n = 300 a cell",
        "other, smoke: n = 20 a cell",
        "fourth, smoke: n = 20 a cell",
    ]
    axes = panels["SDTP, n = 300 a cell"]
    np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), VALUES / 2)
    assert {panel.images[0].get_clim() for panel in panels.values()} == {(0.0, 100.0)}
    # The first depth is at the top, as in the prompt.
    assert axes.get_ylim() == (1.5, -0.5)
    cells = {text.get_position(): text.get_text() for text in panels["Unpruned, smoke: n = 20 a cell"].texts}
    assert cells == {(0, 0): "100", (1, 0): "80", (2, 0): "10", (0, 1): "50", (1, 1): "40", (2, 1): "0"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024", "2,048"]
    first = panels["Unpruned, smoke: n = 20 a cell"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0%", "50%"]
    assert sum(axes.get_visible() for axes in figure.axes) == 4 + 1  # and the colour bar


def test_values_can_be_read_on_their_colour() -> None:
    (axes, _) = heat_maps({"sdtp": made()}).axes
    for text in axes.texts:
        column, row = text.get_position()
        red, green, blue, _ = axes.images[0].cmap(axes.images[0].norm(VALUES[int(row), int(column)]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        assert (text.get_color() == "white") == dark


def test_equal_maps_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(heat_maps({"unpruned": made(), "sdtp": made()}), tmp_path / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_maps_of_different_grids_are_refused() -> None:
    with pytest.raises(UserError, match=r"sdtp was asked at depths \(0\.0, 1\.0\)"):
        heat_maps({"unpruned": made(), "sdtp": made(depths=(0.0, 1.0))})
    with pytest.raises(UserError, match="no heat maps"):
        heat_maps({})
