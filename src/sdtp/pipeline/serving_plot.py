"""The figure of serving: requests a second on each placement, and the longest prompt that fits."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdtp.pipeline.plotstyle import METHODS, STYLE, shades
from sdtp.pipeline.serving import ONE_DEVICE


@mpl.rc_context(STYLE)
def serving(throughput: pd.DataFrame, longest: pd.DataFrame) -> Figure:
    """Requests a second, a panel a batch size and a group of bars a placement; right, tokens that fit.

    Args:
        throughput: `sdtp.pipeline.serving.throughput_table`; placements that were not run are named below.
        longest: `sdtp.pipeline.serving.longest_table`.
    """
    run = throughput[throughput["not_run"].isna()]
    batches = sorted(run["batch"].unique())
    figure = Figure(figsize=(3.6 * (len(batches) + 1) + 0.6, 4), layout="constrained")
    *panels, last = figure.subplots(1, len(batches) + 1, squeeze=False)[0]
    ratios = sorted(longest.loc[longest["method"] == "sdtp", "keep_ratio"].unique(), reverse=True)
    colours = {("unpruned", 1.0): METHODS["unpruned"][1], (ONE_DEVICE, 1.0): "#BBBBBB"}
    colours |= {("sdtp", ratio): colour for ratio, colour in zip(ratios, shades(len(ratios)), strict=True)}
    for axes, batch in zip(panels, batches, strict=True):
        _bars(axes, run[run["batch"] == batch], colours)
        axes.set(title=f"{batch:.0f} together", ylabel="requests per second")
    if panels:
        panels[0].legend(fontsize=8)
    for place, row in enumerate(longest.to_dict("records")):
        height = 0 if pd.isna(row["longest_prompt"]) else row["longest_prompt"]
        last.bar(place, height, color=colours[row["method"], row["keep_ratio"]])
        more = "≥ " if row["at_context_limit"] else ""
        last.annotate(f"{more}{height:,.0f}", (place, height), ha="center", va="bottom", fontsize=8)
    names = ["unpruned" if row.method == "unpruned" else f"{row.keep_ratio:g}" for row in longest.itertuples()]
    last.set_xticks(range(len(longest)), names)
    last.set(xlabel="keep ratio", ylabel="tokens", title="longest prompt that fits")
    notes = throughput.dropna(subset="not_run")
    told = [f"{row.placement} not run: {row.not_run}" for row in notes.itertuples()]
    told.append(f"≥: the model has no more positions; memory limit {_bytes(longest['memory_limit'].iloc[0])}")
    figure.supxlabel("\n".join(told), x=0.01, ha="left", fontsize=8, color="#444444")
    return figure


def _bars(axes: Axes, table: pd.DataFrame, colours: dict[tuple[str, float], str]) -> None:
    """Groups of bars, with quartiles of the paired speedup over the placement's unpruned model laid on the medians."""
    placements = list(dict.fromkeys(table["placement"]))
    arms = [arm for arm in colours if not table[_is(table, arm)].empty]
    width = 0.8 / max(1, len(arms))
    for number, arm in enumerate(arms):
        rows = table[_is(table, arm)].set_index("placement").reindex(placements)
        places = np.arange(len(placements)) + (number - (len(arms) - 1) / 2) * width
        name = {"unpruned": "unpruned", ONE_DEVICE: "unpruned, one device"}.get(arm[0], f"keep ratio {arm[1]:g}")
        rate, middle = rows["requests_per_s"], rows["end_to_end_speedup"]
        spread = [rate * (1 - rows["speedup_q25"] / middle), rate * (rows["speedup_q75"] / middle - 1)]
        axes.bar(places, rate, width, color=colours[arm], label=name)
        axes.errorbar(places, rate, yerr=np.abs(spread), fmt="none", ecolor="#444444", elinewidth=0.8, capsize=1.5)
    axes.set_xticks(range(len(placements)), placements)


def _is(table: pd.DataFrame, arm: tuple[str, float]) -> pd.Series:
    return (table["method"] == arm[0]) & (table["keep_ratio"] == arm[1])


def _bytes(limit: float | None) -> str:
    return "all of the GPU" if limit is None or pd.isna(limit) else f"{limit / 1e9:g} GB"
