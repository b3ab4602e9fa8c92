"""Tables of serving, by hand-computed rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.serving import LONGEST_COLUMNS, THROUGHPUT_COLUMNS, longest_table, throughput_table
from sdtp.pipeline.serving_plot import serving


def row(method: str, ratio: float, prefill: list[float], decode: list[float | None]) -> dict[str, Any]:
    both = [a + (b or 0) for a, b in zip(prefill, decode, strict=True)]
    shape = {"prompt_tokens": 100, "new_tokens": 4, "batch": 2, "requests": 8}
    times = {"prefill_s": prefill, "decode_s": decode, "end_to_end_s": both}
    return {"method": method, "keep_ratio": ratio, **shape, **times}


REPLICAS = {
    "placement": "replicas-2",
    "devices": 2,
    "not_run": None,
    "rows": [
        row("unpruned", 1.0, [4.0, 5.0, 6.0], [1.0, 1.0, 1.0]),
        row("sdtp", 0.8, [2.0, 2.0, 2.0], [1.0, 1.0, 2.0]),
        row("one-device", 1.0, [8.0, 10.0, 12.0], [2.0, 2.0, 2.0]),
    ],
}
ONE = {"placement": "one", "devices": 1, "not_run": None, "rows": REPLICAS["rows"][:2]}
REFUSED = {"placement": "split-2", "devices": 2, "not_run": "2 GPUs are needed, there is 1", "rows": []}
LONGEST = {
    "memory_limit": 4000,
    "new_tokens": 2,
    "tokens_at_most": 300,
    "rows": [
        {"method": "unpruned", "keep_ratio": 1.0, "longest": 200, "peaks": {"100": 900, "200": 3900, "300": 4100}},
        {"method": "sdtp", "keep_ratio": 0.8, "longest": 300, "peaks": {"100": 900, "300": 3800}},
        {"method": "sdtp", "keep_ratio": 0.5, "longest": None, "peaks": {"100": None}},
    ],
}


def test_speedups_are_paired_over_the_placement_and_over_one_device() -> None:
    table = throughput_table([REPLICAS])
    assert list(table.columns) == THROUGHPUT_COLUMNS
    arms = table.set_index("method")
    pruned = arms.loc["sdtp"]
    # End to end of unpruned: 5, 6, 7; pruned: 3, 3, 4; one device: 10, 12, 14.
    assert pruned["end_to_end_speedup"] == pytest.approx(1.75)  # of 5/3, 2, 7/4
    assert (pruned["speedup_q25"], pruned["speedup_q75"]) == pytest.approx(((5 / 3 + 1.75) / 2, 1.875))
    assert pruned["end_to_end_over_one"] == pytest.approx(3.5)  # of 10/3, 4, 14/4
    assert (pruned["prefill_speedup"], pruned["prefill_over_one"]) == (2.5, 5.0)
    assert (pruned["decode_speedup"], pruned["decode_over_one"]) == (1.0, 2.0)
    assert arms.loc["unpruned", "end_to_end_over_one"] == 2.0
    assert arms.loc["one-device", "end_to_end_speedup"] == 0.5
    # 8 requests of 100 tokens and 4 new ones: 3 s, of which prefill 2 s.
    rates = pruned[["requests_per_s", "new_tokens_per_s", "prompt_tokens_per_s"]].tolist()
    assert rates == pytest.approx([8 / 3, 32 / 3, 400.0])


def test_one_device_is_its_own_reference_and_what_was_not_run_says_why() -> None:
    table = throughput_table([ONE, REFUSED])
    own = table[table["placement"] == "one"]
    assert own["end_to_end_over_one"].tolist() == own["end_to_end_speedup"].tolist()
    refused = table[table["placement"] == "split-2"].iloc[0]
    assert refused["not_run"] == "2 GPUs are needed, there is 1"
    assert math.isnan(refused["requests_per_s"])


def test_without_new_tokens_there_is_no_time_of_decoding() -> None:
    rows = [row("unpruned", 1.0, [4.0], [None]), row("sdtp", 0.8, [2.0], [None])]
    table = throughput_table([{**ONE, "rows": rows}])
    assert table["decode_s"].isna().all()
    assert table["decode_speedup"].isna().all()
    assert table["prefill_speedup"].tolist() == [1.0, 2.0]


def test_a_batch_without_the_unpruned_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"^one, batches of 2: no row of the unpruned model$"):
        throughput_table([{**ONE, "rows": REPLICAS["rows"][1:2]}])


def test_longest_prompts() -> None:
    table = longest_table(LONGEST)
    assert list(table.columns) == LONGEST_COLUMNS
    assert table["longest_prompt"].tolist()[:2] == [200, 300]
    assert table["over_unpruned"].tolist()[:2] == [1.0, 1.5]
    assert table["peak_memory_bytes"].tolist()[:2] == [3900, 3800]
    assert table["at_context_limit"].tolist() == [False, True, False]
    assert table.iloc[2][["longest_prompt", "over_unpruned", "peak_memory_bytes"]].isna().all()


def test_the_figure_has_a_bar_an_arm_and_names_what_was_not_run() -> None:
    figure = serving(throughput_table([ONE, REPLICAS, REFUSED]), longest_table(LONGEST))
    batch, last = figure.axes
    # Unpruned and one ratio on both placements, one device beside one of them (the other bar is not a number).
    assert sorted(bar.get_height() for bar in batch.patches if bar.get_height() > 0) == pytest.approx(
        sorted([8 / 6, 8 / 6, 8 / 3, 8 / 3, 8 / 12])
    )
    assert [text.get_text() for text in last.texts] == ["200", "≥ 300", "0"]
    told = figure.get_supxlabel()
    assert "split-2 not run: 2 GPUs are needed, there is 1" in told
    assert "memory limit 4e-06 GB" in told


def test_the_figure_of_placements_none_of_which_could_be_run() -> None:
    figure = serving(throughput_table([REFUSED]), longest_table({**LONGEST, "memory_limit": None}))
    assert len(figure.axes) == 1
    assert "all of the GPU" in figure.get_supxlabel()
