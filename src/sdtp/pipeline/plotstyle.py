"""How every figure looks: palette, type, labels at line ends, and files that are equal when their inputs are.

The palette is Okabe and Ito's, and beyond its eight colours Tol's muted ones, which stay apart under the common colour
blindnesses; every method also has its own marker. A method has the same colour in every figure, a keep ratio the same
shade of blue.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.pipeline.files import write_atomically

# method -> (name, colour, marker); a method that is not here is drawn with OTHER.
METHODS = {
    "unpruned": ("Unpruned", "#333333", "s"),
    "sdtp": ("SDTP", "#0072B2", "o"),
    "sdtp-half": ("SDTP, half the stages", "#56B4E9", "8"),
    "sdtp-tuned": ("SDTP, tuned stages", "#332288", "*"),
    "random": ("Random", "#999999", "x"),
    "recent": ("Recent", "#E69F00", "^"),
    "lastquery": ("LastQuery", "#009E73", "D"),
    "hiddennorm": ("HiddenNorm", "#CC79A7", "v"),
    "oracle": ("Oracle saliency", "#D55E00", "P"),
    "gemfilter": ("GemFilter", "#D55E00", "<"),
    "fastkv": ("FastKV", "#CC79A7", ">"),
    "snapkv": ("SnapKV", "#117733", "h"),
    "h2o": ("H2O", "#882255", "p"),
    "sdtp+snapkv": ("SDTP + SnapKV", "#0072B2", "H"),
    "sdtp+h2o": ("SDTP + H2O", "#0072B2", "d"),
    "llmlingua2": ("LLMLingua-2", "#44AA99", "v"),
    "kvpress-SnapKVPress": ("kvpress SnapKV", "#332288", "X"),
    "kvpress-ExpectedAttentionPress": ("kvpress ExpectedAttention", "#AA4499", "P"),
    "kvpress-KnormPress": ("kvpress Knorm", "#999933", "v"),
    "kvpress-StreamingLLMPress": ("kvpress StreamingLLM", "#CC6677", "^"),
}
OTHER = ("#56B4E9", "*")
# saliency.reduction -> what it makes of gradient times input, summed over the hidden dimension.
REDUCTIONS = {
    "abs": "|Σ gradient × input|",
    "signed": "Σ gradient × input",
    "l2": "√Σ (gradient × input)²",
}
SPLITS = {"train": "#56B4E9", "heldout": "#0072B2"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    # Element ids of an SVG are random without a salt, and text depends on the reader's fonts unless drawn as paths.
    "svg.hashsalt": "sdtp",
    "svg.fonttype": "path",
}

# Format of a figure's file -> what matplotlib would say in it of this moment and of itself, left out.
METADATA = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def name_of(method: str) -> str:
    """The method's name as figures and report print it."""
    return METHODS.get(method, (method,))[0]


def saliency_name(reduction: str) -> str:
    """What the numbers of a heat map of saliency are: it draws magnitudes, whatever the reduction."""
    return f"magnitude of {REDUCTIONS[reduction]}" if reduction == "signed" else REDUCTIONS[reduction]


def figure_files(path: Path) -> list[Path]:
    """What `save` writes: `path` with suffixes .svg and .png."""
    return [path.with_suffix(f".{kind}") for kind in METADATA]


def save(figure: Figure, path: Path) -> None:
    """Writes `figure_files(path)`; equal figures give equal bytes."""
    for file, (kind, metadata) in zip(figure_files(path), METADATA.items(), strict=True):
        with write_atomically(file) as target, mpl.rc_context(STYLE):
            figure.savefig(target, format=kind, dpi=150, metadata=metadata)


def shades(count: int) -> list[str]:
    """`count` blues from light to dark, around SDTP's own."""
    return [mpl.colors.to_hex(colour) for colour in mpl.colormaps["Blues"](np.linspace(0.5, 0.95, count))]


def _apart(figure: Figure, axes: Axes, points: Sequence[tuple[float, float]]) -> list[float]:
    """Heights, shares of the axes, for a line of text beside each (x, y), ascending by y: near it, none overlapping."""
    gap = 12 / (axes.get_window_extent().height / figure.dpi * 72)  # a line of text as a share of the axes
    places = [axes.transAxes.inverted().transform(axes.transData.transform(point))[1] for point in points]
    heights: list[float] = []
    for place in places:
        heights.append(max(place, heights[-1] + gap) if heights else place)
    # Moving up may have left the top; the overlong end goes back down and pushes those below it.
    ceiling = max(1.0, places[-1])
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    return heights


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each (x, y, text, colour) right of the axes, moved apart, with a thin line from the point to its text."""
    figure.draw_without_rendering()  # settles the layout, so that data coordinates have a place
    ordered = sorted(points, key=lambda point: point[1])
    heights = _apart(figure, axes, [point[:2] for point in ordered])
    for (x, y, text, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xycoords="data",
            xytext=(1.05, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def label_ends(figure: Figure, axes: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes each (y, text, colour) right of its line's end, moved apart where they would overlap."""
    figure.draw_without_rendering()  # settles the layout, so that data coordinates have a place
    ordered = sorted(labels, key=lambda label: label[0])
    heights = _apart(figure, axes, [(x, y) for y, _, _ in ordered])
    for (_, text, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
