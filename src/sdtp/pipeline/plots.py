"""The figures of a run: each function turns tables or arrays into one matplotlib figure, and reads no file."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sdtp.errors import UserError
from sdtp.pipeline.observations import MASSES
from sdtp.pipeline.plotstyle import METHODS, OTHER, SPLITS, STYLE, label_ends, name_of, saliency_name, shades
from sdtp.pipeline.results import LOWER_IS_BETTER, nearest_length, quality_panels, smoke, with_speedup

# More columns than the figure has pixels would drop tokens; the largest of each group is drawn instead.
HEAT_MAP_COLUMNS = 1024
MASS_COLOURS = dict(zip(MASSES, ("#D55E00", "#CC79A7", "#009E73"), strict=True))


@mpl.rc_context(STYLE)
def saliency(scores: np.ndarray, layers: Sequence[int], tokens: Sequence[str], reduction: str) -> Figure:
    """Heat map of one prompt's saliency, after the paper's Fig. 1.

    Args:
        scores: [stages, tokens], finite; magnitudes are drawn, on a logarithmic scale.
        layers: [stages], the decoder layer each stage's hidden states enter.
        tokens: [tokens], their texts; the most salient ones are labelled.
        reduction: that of the scores, a key of `REDUCTIONS`; named in the colour bar's label.
    """
    magnitude = np.abs(scores)
    if magnitude.shape != (len(layers), len(tokens)):
        raise UserError(f"saliency of shape {magnitude.shape} for {len(layers)} layers and {len(tokens)} tokens")
    if not magnitude.any():
        raise UserError("saliency is zero for every token of the example; accepted: at least one above zero")
    group = -(-len(tokens) // HEAT_MAP_COLUMNS)
    starts = np.arange(0, len(tokens), group)
    image = np.maximum.reduceat(magnitude, starts, axis=1)
    # The lowest hundredth would stretch the scale over decades that hold no information.
    floor = np.quantile(image[image > 0], 0.01)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(
        np.maximum(image, floor),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(floor, image.max() if image.max() > floor else floor * 10),
        extent=(0, len(tokens), len(layers) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(xlabel="position in the prompt (tokens)", ylabel="entering decoder layer")
    figure.colorbar(drawn, ax=axes, label=f"saliency: {saliency_name(reduction)}", pad=0.01)
    # Each stage counts the same, whatever the scale of its gradients.
    share = (magnitude / np.maximum(magnitude.sum(axis=1, keepdims=True), np.finfo(float).tiny)).mean(axis=0)
    for position in _spread(np.argsort(-share, kind="stable"), count=8, apart=0.045 * len(tokens)):
        axes.annotate(
            repr(tokens[position])[1:-1].strip() or "space",
            (position + 0.5, -0.5),
            xytext=(0, 7),
            textcoords="offset points",
            parse_math=False,
            rotation=40,
            rotation_mode="anchor",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.6},
        )
    return figure


def _spread(candidates: np.ndarray, count: int, apart: float) -> list[int]:
    """The first `count` candidates that lie at least `apart` from those already chosen."""
    chosen: list[int] = []
    for candidate in candidates:
        if len(chosen) < count and all(abs(candidate - other) >= apart for other in chosen):
            chosen.append(int(candidate))
    return chosen


@mpl.rc_context(STYLE)
def foresight(table: pd.DataFrame, layers: Sequence[int]) -> Figure:
    """How well an early stage's order of the tokens foretells a late one's, as the paper observes: a heat map.

    Args:
        table: as `foresight_table` gives it.
        layers: [stages], decoder layers; one alone has no row in the table.
    """
    mean, place = np.eye(len(layers)), {layer: index for index, layer in enumerate(layers)}
    for row in table.to_dict("records"):
        early, late = place[row["layer"]], place[row["later_layer"]]
        mean[early, late] = mean[late, early] = row["correlation"]
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(mean, cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(*mean.shape):
        value = mean[row, column]
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    ticks, names = range(len(layers)), [str(layer) for layer in layers]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.grid(visible=False)
    axes.set(xlabel="entering decoder layer", ylabel="entering decoder layer")
    if len(table):
        axes.set_title(f"mean of {table['n'].iloc[0]} prompts")
    figure.colorbar(drawn, ax=axes, label="rank correlation of saliency (Spearman)")
    return figure


@mpl.rc_context(STYLE)
def sparsity(table: pd.DataFrame, kept: Mapping[float, np.ndarray]) -> Figure:
    """Salient-token sparsity over layers, after the paper's Fig. 2, beside what each keep ratio leaves.

    Of each mass the mean share over the examples, in a band of their quartiles.

    Args:
        table: as `sparsity_table` gives it.
        kept: keep ratio -> [stages], the share of prompt tokens left after each stage.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    layers, labels = list(table["layer"].unique()), []
    for mass, colour in MASS_COLOURS.items():
        rows = table[table["mass"] == mass]
        axes.fill_between(layers, rows["q25"], rows["q75"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(layers, rows["share"], color=colour, marker="o", clip_on=False)
        labels.append((rows["share"].iloc[-1], f"carry {mass:.0%} of saliency", colour))
    for (ratio, left), colour in zip(kept.items(), shades(len(kept)), strict=True):
        axes.plot(layers, left, color=colour, linestyle="--", marker=".", linewidth=1.3)
        labels.append((left[-1], f"kept at ratio {ratio:g}", colour))
    axes.set(xlabel="decoder layer", ylabel="share of the prompt's tokens", xticks=layers)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.set_title(f"mean and quartiles of {table['n'].iloc[0]} prompts")
    label_ends(figure, axes, layers[-1], labels)
    return figure


@mpl.rc_context(STYLE)
def latency(table: pd.DataFrame) -> Figure:
    """Prefill seconds by prompt length, a line a ratio, with quartile bars; `table` as `read_latency` gives it."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    labels = []
    unpruned = table[table["method"] == "unpruned"]
    ratios = _ratios(table)
    arms = [(unpruned, "unpruned", METHODS["unpruned"][1], "s")]
    for ratio, colour in zip(ratios, shades(len(ratios)), strict=True):
        rows = table[(table["method"] == "sdtp") & (table["keep_ratio"] == ratio)]
        arms.append((rows, f"keep ratio {ratio:g}", colour, "o"))
    for rows, text, colour, marker in arms:
        rows = rows.sort_values("prompt_tokens")
        bars = [rows["prefill_s"] - rows["prefill_q25"], rows["prefill_q75"] - rows["prefill_s"]]
        axes.errorbar(rows["prompt_tokens"], rows["prefill_s"], yerr=bars, color=colour, marker=marker, capsize=3)
        labels.append((rows["prefill_s"].iloc[-1], text, colour))
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)", ylabel="prefill (seconds)")
    _length_ticks(axes, table)
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_title(f"median and quartiles of {_repeats(table)} repeats")
    label_ends(figure, axes, unpruned["prompt_tokens"].max(), labels)
    return figure


@mpl.rc_context(STYLE)
def speedup(table: pd.DataFrame) -> Figure:
    """Measured prefill speedup against both bounds, a panel a ratio, with a bar down to the lower quartile.

    `table` as `read_latency` gives it; speedups are medians of paired ratios.
    """
    ratios = _ratios(table)
    figure = Figure(figsize=(max(8, 2.7 * len(ratios)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axes, ratio, colour in zip(panels, ratios, shades(len(ratios)), strict=True):
        rows = table[(table["method"] == "sdtp") & (table["keep_ratio"] == ratio)].sort_values("prompt_tokens")
        lengths = rows["prompt_tokens"]
        axes.plot(lengths, rows["flop_bound"], color="#D55E00", linestyle=":", marker="_", label="FLOP bound")
        axes.plot(lengths, rows["length_bound"], color="#333333", linestyle="--", marker="_", label="length bound")
        bars = [rows["prefill_speedup"] - rows["speedup_q25"], np.zeros(len(rows))]
        axes.errorbar(
            lengths, rows["prefill_speedup"], yerr=bars, color=colour, marker="o", capsize=3, label="measured"
        )
        axes.set(xscale="log", xlabel="prompt length (tokens)", title=f"keep ratio {ratio:g}")
        _length_ticks(axes, table)
        axes.margins(x=0.12)
    panels[0].set(ylabel="prefill speedup (×)")
    # 1 is the unpruned model: heights above it are what was gained.
    panels[0].set_ylim(min(1, panels[0].get_ylim()[0]))
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper right", ncols=3)
    return figure


@mpl.rc_context(STYLE)
def quality(table: pd.DataFrame, speeds: pd.DataFrame, prompt_tokens: float) -> Figure:
    """Quality against measured prefill speedup: a panel a task and metric, a line a method, 95% intervals.

    Agreement with the unpruned model is in the tables alone.

    Args:
        table: as `read_quality` gives it.
        speeds: as `read_latency` gives it; the speedup belongs to the ratio, whatever method chose the tokens.
        prompt_tokens: median prompt length of the quality rows; the nearest benchmarked length gives the speedup.

    Raises:
        UserError: a ratio of `table` was not benchmarked.
    """
    rows, panels = with_speedup(table, speeds, prompt_tokens), quality_panels(table)
    methods = list(rows["method"].unique())
    # Methods of one ratio share its speedup; a slight shift keeps their intervals readable.
    step = 0.012 * max(rows["prefill_speedup"].max() - 1, 0.1)
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3.7 * height), layout="constrained")
    grid = figure.subplots(height, 2, squeeze=False).flat
    for (task, metric), axes in zip(panels, grid, strict=False):
        cells = table[(table["task"] == task) & (table["metric"] == metric)]
        baseline = cells.loc[cells["method"] == "unpruned", "value"].item()
        axes.axhline(baseline, color=METHODS["unpruned"][1], linestyle="--", linewidth=1)
        labels = [(baseline, "Unpruned", METHODS["unpruned"][1])]
        for index, method in enumerate(methods):
            _, colour, marker = METHODS.get(method, (method, *OTHER))
            line = rows[(rows["task"] == task) & (rows["metric"] == metric) & (rows["method"] == method)]
            line = line.sort_values("prefill_speedup")
            places = line["prefill_speedup"] + step * (index - (len(methods) - 1) / 2)
            bars = [line["value"] - line["ci_low"], line["ci_high"] - line["value"]]
            axes.errorbar(places, line["value"], yerr=bars, color=colour, marker=marker, capsize=2, elinewidth=1)
            labels.append((line["value"].iloc[-1], name_of(method), colour))
        better = "lower" if metric in LOWER_IS_BETTER else "higher"
        axes.set(xlabel=f"prefill speedup (×) at {nearest_length(speeds, prompt_tokens):,} tokens")
        axes.set(ylabel=f"{metric} ({better} is better)", title=f"{task}, {smoke(int(cells['n'].min()))}")
        label_ends(figure, axes, rows["prefill_speedup"].max() + step * len(methods) / 2, labels)
    for axes in grid:
        axes.set_visible(False)
    return figure


@mpl.rc_context(STYLE)
def training(history: pd.DataFrame) -> Figure:
    """Learning curves, a panel a metric; `history` has columns step, split, metric, value."""
    metrics = list(history["metric"].unique())
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(8, 0.6 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for metric, axes in zip(metrics, grid, strict=False):
        for split, curve in history[history["metric"] == metric].groupby("split", sort=False):
            curve = curve.sort_values("step")
            axes.plot(
                curve["step"],
                curve["value"],
                color=SPLITS[str(split)],
                label=split,
                marker="." if len(curve) < 20 else None,
            )
        axes.set_title(metric)
        axes.set_xlabel("step")
    for axes in grid:
        axes.set_visible(False)
    handles = [mpl.lines.Line2D([], [], color=colour) for colour in SPLITS.values()]
    figure.legend(handles, ["train", "held out"], loc="outside upper right", ncols=2)
    return figure


def _ratios(table: pd.DataFrame) -> list[float]:
    return sorted(table.loc[table["method"] == "sdtp", "keep_ratio"].unique(), reverse=True)


def _repeats(table: pd.DataFrame) -> str:
    low, high = int(table["repeats"].min()), int(table["repeats"].max())
    return str(low) if low == high else f"{low} to {high}"


def _length_ticks(axes: Axes, table: pd.DataFrame) -> None:
    lengths = sorted(table["prompt_tokens"].unique())
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
