"""The trade-off's tables and figures of made-up measurements, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.colors
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from sdtp.errors import UserError
from sdtp.evaluation.stats import holm
from sdtp.pipeline import tradeoff_plot
from sdtp.pipeline.files import write_jsonl
from sdtp.pipeline.plotstyle import METHODS
from sdtp.pipeline.steps import tradeoff as step
from sdtp.pipeline.suite_tables import suite_cells, suite_table
from sdtp.pipeline.tradeoff import Timed, compression_table, read_timed, tradeoff_table
from tests.pipeline.rows import only

MB = 1_000_000


def quality(
    method: str, ratio: float, losses: list[float], correct: list[bool], answer_tokens: int = 1
) -> list[dict[str, Any]]:
    """Continuations of 20 tokens with these losses, and retrievals."""
    common = {"method": method, "keep_ratio": ratio, "seed": None, "prompt_tokens": 100, "kept_tokens": 50}
    common |= {"kl": 0.5, "top1": 0.75}
    rows = [
        {"id": f"c{number}", "task": "continuation", "correct": None, "loss": loss, "response_tokens": 20, **common}
        for number, loss in enumerate(losses)
    ]
    return rows + [
        {"id": f"r{number}", "task": "retrieval", "correct": right, "loss": 1.0, "response_tokens": tokens, **common}
        for number, (right, tokens) in enumerate(zip(correct, [1, answer_tokens, answer_tokens], strict=True))
    ]


def timing(
    method: str, ratio: float, lengths: tuple[int, ...] = (100, 300), flop: float | None = 4.0, seconds: float = 2.0
) -> dict[str, Any]:
    """Five passes: of the unpruned model in 4 s, but for one of 8 s; of the method in `seconds`, but for one of 1 s."""
    rows = []
    for length in lengths:
        for name, prefill, peak, cache in (
            ("unpruned", [4.0, 4.0, 8.0, 4.0, 4.0], [900 * MB, 910 * MB, 905 * MB], 100),
            (method, [seconds, 1.0, seconds, seconds, seconds], [890 * MB, 895 * MB, 885 * MB], 40),
        ):
            row = {
                "method": name,
                "prompt_tokens": length,
                "new_tokens": 3,
                "prefill_s": prefill,
                "decode_s": [1.0 if name == "unpruned" else 0.8] * 5,
                "end_to_end_s": [first + 1.0 for first in prefill],
                "cold_s": 9.0,
                "kv_cache_bytes": cache,
                "peak_memory_bytes": peak,
            }
            rows.append(row | ({} if flop is None else {"prefill_flop": 8.0 if name == "unpruned" else flop}))
    return {"method": method, "keep_ratio": ratio, "model": "some/model", "stages": [4, 7], "rows": rows}


def timed(*arguments: Any, **options: Any) -> Timed:
    return read_timed(timing(*arguments, **options), "t.json")


ROWS = [
    *quality("unpruned", 1.0, [3.0, 2.0, 2.5], [True, True, False], 2),
    *quality("sdtp", 0.8, [3.3, 2.2, 2.6], [True, False, False], 2),
    *quality("snapkv", 0.8, [3.1, 2.0, 2.5], [True, True, False], 2),
    *quality("sdtp+h2o", 0.8, [3.6, 2.5, 3.0], [True, False, True], 2),
    *quality("unpruned+h2o", 1.0, [3.1, 2.3, 2.6], [True, False, False], 2),
    *quality("oracle", 0.8, [3.0, 2.0, 2.4], [True, True, True], 2),
]
TIMINGS = [
    timed("sdtp", 0.8),
    timed("snapkv", 0.8, flop=10.0, seconds=5.0),
    timed("sdtp+h2o", 0.8),
    timed("unpruned+h2o", 1.0, seconds=4.0),
]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return tradeoff_table(ROWS, TIMINGS)


def test_quality_stands_beside_the_methods_own_speed_at_each_length(table: pd.DataFrame) -> None:
    row = only(table, method="sdtp", task="continuation", metric="loss", timed_tokens=300)
    assert (row["keep_ratio"], row["model"], row["stages"]) == (0.8, "some/model", "4 7")
    assert row["value"] == pytest.approx(2.7)
    assert (row["n"], row["quality_tokens"], row["repeats"]) == (3, 100, 5)
    assert row["low"] < 2.7 < row["high"]
    assert row["difference"] == pytest.approx(0.2)  # to the unpruned model, of the same examples
    assert row["difference_low"] < 0.2 < row["difference_high"]
    # Pairs of 4/2, 4/1, 8/2, 4/2 and 4/2: the ratio of the medians would be 2 too, their quartiles are those of pairs.
    assert (row["speedup_q25"], row["prefill_speedup"], row["speedup_q75"]) == (2.0, 2.0, 4.0)
    assert row["decode_speedup"] == pytest.approx(1.25)
    assert row["end_to_end_speedup"] == pytest.approx(5 / 3)
    assert row["flop_bound"] == 2.0
    assert (row["kv_cache_bytes"], row["unpruned_kv_cache_bytes"]) == (40, 100)
    assert (row["peak_memory_bytes"], row["unpruned_peak_memory_bytes"]) == (890 * MB, 905 * MB)
    differences = [row[f"memory_difference_{name}"] / MB for name in ("low", "bytes", "high")]
    assert differences == [-20, -15, -10]
    assert row["from_prefill"] == 0.0
    assert len(table[table["method"] == "sdtp"]) == 7 * 2  # accuracy, two losses, agreement, at two lengths


def test_compression_is_no_faster_and_says_what_came_before_it(table: pd.DataFrame) -> None:
    row = only(table, method="snapkv", task="retrieval", metric="accuracy", timed_tokens=100)
    assert row["prefill_speedup"] == pytest.approx(0.8)
    assert row["flop_bound"] == pytest.approx(0.8)
    assert row["from_prefill"] == pytest.approx(3 / 5)  # responses of 1, 2 and 2 tokens, of which the first each
    row = only(table, method="snapkv", task="continuation", metric="loss", timed_tokens=100)
    assert row["from_prefill"] == pytest.approx(1 / 20)


def test_responses_that_are_the_prefills_alone_count_as_their_share_of_the_examples() -> None:
    # Of 1, 20 and 20 tokens: few tokens are a response's first, and a third of the responses are no more than that.
    long = [
        *quality("unpruned", 1.0, [3.0, 2.0, 2.5], [True, True, False], 20),
        *quality("snapkv", 0.8, [3.1, 2.0, 2.5], [True, False, False], 20),
    ]
    made = tradeoff_table(long, TIMINGS[1:2])
    row = only(made, method="snapkv", task="retrieval", metric="accuracy", timed_tokens=100)
    assert row["from_prefill"] == pytest.approx(1 / 3)
    assert marks(tradeoff_plot.tradeoff(made), 1, "snapkv").get_markerfacecolor() == "white"
    quarter = tradeoff_plot.tradeoff(made.assign(from_prefill=0.25))
    assert marks(quarter, 1, "snapkv").get_markerfacecolor() == "white"
    fewer = tradeoff_plot.tradeoff(made.assign(from_prefill=0.24))
    assert marks(fewer, 1, "snapkv").get_markerfacecolor() != "white"


def test_unpruned_is_the_reference_and_the_oracle_has_no_time(table: pd.DataFrame) -> None:
    row = only(table, method="unpruned", task="continuation", metric="loss", timed_tokens=100)
    ones = ("prefill_speedup", "speedup_q25", "speedup_q75", "decode_speedup", "end_to_end_speedup", "flop_bound")
    assert [row[name] for name in ones] == [1.0] * 6
    assert row["memory_difference_bytes"] == 0.0
    assert row["peak_memory_bytes"] == 905 * MB
    row = only(table, method="oracle", task="continuation", metric="loss")
    assert row["value"] == pytest.approx(7.4 / 3)
    assert math.isnan(row["timed_tokens"])
    assert math.isnan(row["prefill_speedup"])


def test_what_was_not_measured_is_empty() -> None:
    one = timing("kvpress-KnormPress", 0.8, flop=None)
    for row in one["rows"]:
        row |= {"decode_s": [None] * 5, "peak_memory_bytes": [None] * 3}
    rows = [*ROWS[:6], *quality("kvpress-KnormPress", 0.8, [3.0, 2.0, 2.5], [True, True, True])]
    made = tradeoff_table(rows, [read_timed(one, "t.json")])
    row = only(made, method="kvpress-KnormPress", task="continuation", metric="loss", timed_tokens=100)
    assert row["prefill_speedup"] == 2.0
    for name in ("flop_bound", "decode_speedup", "peak_memory_bytes", "memory_difference_low"):
        assert math.isnan(row[name])


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"^timings: sdtp at keep ratio 0.8 was evaluated and not timed"):
        tradeoff_table(ROWS[:12], [TIMINGS[1]])
    with pytest.raises(UserError, match=r"^timings: snapkv at keep ratio 0.8 was timed at \[100\] tokens and sdtp at"):
        tradeoff_table(ROWS, [TIMINGS[0], timed("snapkv", 0.8, (100,)), *TIMINGS[2:]])
    half = timing("sdtp", 0.8)
    del half["rows"][0]
    with pytest.raises(UserError, match=r"^t.json: rows of \['sdtp'\] at 100 tokens; unpruned and sdtp are needed"):
        read_timed(half, "t.json")
    with pytest.raises(UserError, match=r"^evaluations: no cache was compressed on top of another method"):
        compression_table(ROWS[:12], TIMINGS[:1])


def test_compression_on_top_is_compared_with_its_own_base() -> None:
    made = compression_table(ROWS, TIMINGS)
    assert list(dict.fromkeys(made["method"])) == ["unpruned", "unpruned+h2o", "sdtp", "sdtp+h2o"]
    row = only(made, method="sdtp+h2o", task="continuation", metric="loss")
    assert (row["base"], row["rule"], row["timed_tokens"]) == ("sdtp", "h2o", 100)
    assert row["difference"] == pytest.approx((0.4 + 0.3 + 0.3) / 3)
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert row["cache_share"] == pytest.approx(0.4)
    family = made[(made["task"] == "continuation") & (made["metric"] == "loss") & made["p_value"].notna()]
    assert list(family["method"]) == ["unpruned+h2o", "sdtp+h2o"]
    assert family["p_holm"].tolist() == pytest.approx(holm(family["p_value"].tolist()))
    assert family["p_holm"].tolist() != family["p_value"].tolist()
    assert row["verdict"] == "no difference shown"  # of three examples none can be
    row = only(made, method="unpruned+h2o", task="continuation", metric="loss")
    assert row["difference"] == pytest.approx((0.1 + 0.3 + 0.1) / 3)
    assert row["prefill_speedup"] == 1.0
    row = only(made, method="unpruned", task="continuation", metric="loss")
    assert (row["rule"], row["cache_share"]) == ("none", 1.0)
    assert math.isnan(row["difference"])
    assert row["verdict"] is None


def test_answers_of_one_token_say_nothing_of_compression(caplog: pytest.LogCaptureFixture) -> None:
    made = compression_table(ROWS, TIMINGS)
    # Of the three retrievals the first has an answer of one token, which all of the methods get right.
    row = only(made, method="sdtp+h2o", metric="accuracy")
    assert (row["n"], row["value"], row["difference"]) == (2, 0.5, 0.5)
    single = [{**row, "response_tokens": 20 if row["task"] == "continuation" else 1} for row in ROWS]
    made = compression_table(single, TIMINGS)
    assert set(made["task"]) == {"continuation"}
    assert "retrieval: 0 responses of two tokens or more" in caplog.text


def marks(figure: Figure, panel: int, method: str) -> Any:
    """The line of a method in a panel."""
    _, colour, marker = METHODS[method]
    [line] = [
        line
        for line in figure.axes[panel].lines
        if line.get_marker() == marker and matplotlib.colors.same_color(line.get_color(), colour)
    ]
    return line


@pytest.fixture(scope="module")
def drawn(table: pd.DataFrame) -> Figure:
    return tradeoff_plot.tradeoff(table)


def test_points_stand_at_measured_speed_and_quality(drawn: Figure) -> None:
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    assert titles == ["continuation, smoke: n = 3", "retrieval, smoke: n = 3"] * 2
    assert drawn.axes[2].get_xlabel() == "prefill speedup (×) at 300 tokens"
    assert drawn.axes[0].get_ylabel() == "loss above unpruned at 100 tokens (lower is better)"
    line = marks(drawn, 0, "sdtp")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0], [pytest.approx(0.2)])
    level = marks(drawn, 0, "unpruned")
    assert (list(level.get_xdata()), list(level.get_ydata())) == ([1.0], [0.0])
    line = marks(drawn, 1, "snapkv")
    assert list(line.get_xdata()) == [pytest.approx(0.8)]
    level = marks(drawn, 1, "unpruned")
    assert (list(level.get_xdata()), list(level.get_ydata())) == ([1.0], [pytest.approx(2 / 3)])


def test_marks_are_hollow_where_the_prefill_gave_the_answer(drawn: Figure) -> None:
    faces = {
        (method, panel): marks(drawn, panel, method).get_markerfacecolor()
        for method in ("snapkv", "sdtp+h2o", "sdtp")
        for panel in (0, 1)
    }
    hollow = {key for key, face in faces.items() if face == "white"}
    assert hollow == {("snapkv", 1), ("sdtp+h2o", 1)}
    assert drawn.get_supxlabel() == (
        "a point a keep ratio: 0.8; hollow: a quarter or more of the responses, or of their tokens, was predicted by "
        "the prefill, before the cache was compressed"
    )


def test_bars_go_both_ways(drawn: Figure, table: pd.DataFrame) -> None:
    row = only(table, method="sdtp", task="continuation", metric="loss", timed_tokens=100)
    segments = [
        segment
        for bars in drawn.axes[0].collections
        if isinstance(bars, LineCollection)
        for segment in bars.get_segments()
    ]
    upright = [sorted(segment[:, 1]) for segment in segments if segment[0, 0] == segment[1, 0] == 2.0]
    level = [sorted(segment[:, 0]) for segment in segments if segment[0, 1] == segment[1, 1] == row["difference"]]
    low, high = row["difference_low"], row["difference_high"]
    assert [pytest.approx([low, high])] == [one for one in upright if one[0] == pytest.approx(low)]
    assert [2.0, 4.0] in [list(one) for one in level]


def test_labels_do_not_overlap(drawn: Figure) -> None:
    drawn.draw_without_rendering()
    for axes in drawn.axes:
        notes = [child for child in axes.get_children() if isinstance(child, Annotation)]
        assert {note.get_text() for note in notes} == {"Unpruned", "SDTP", "SnapKV", "SDTP + H2O"}
        line = 12 / (axes.get_window_extent().height / drawn.dpi * 72)  # of text, as a share of the axes
        heights = sorted(note.get_position()[1] for note in notes)
        assert min(later - earlier for earlier, later in pairwise(heights)) > 0.99 * line


def test_memory_is_less_the_unpruned_models(table: pd.DataFrame) -> None:
    figure = tradeoff_plot.memory(table)
    assert list(marks(figure, 0, "sdtp").get_xdata()) == [-15.0]
    assert list(marks(figure, 0, "unpruned").get_xdata()) == [0.0]
    assert figure.axes[0].get_xlabel() == "peak memory above unpruned (MB) at 100 tokens"


def suite(name: str, category: str, tasks: tuple[str, ...], tokens: int) -> pd.DataFrame:
    """Two examples of each task, of three methods, one of which nothing times and one at a ratio that is not timed."""
    arms = [("unpruned", 1.0, 80.0), ("sdtp", 0.8, 60.0), ("sdtp", 0.7, 40.0), ("gemfilter", 0.8, 50.0)]
    rows = [
        {"suite": name, "task": task, "category": category, "id": str(number), "method": method, "keep_ratio": ratio}
        | {"seed": None, "score": score + 10 * number, "prompt_tokens": tokens + number, "kept_tokens": tokens // 2}
        for method, ratio, score in arms
        for task in tasks
        for number in range(2)
    ]
    made = suite_table(suite_cells(rows))
    return pd.read_csv(io.StringIO(made.to_csv(index=False)))  # as the step reads it


@pytest.fixture(scope="module")
def with_suites() -> pd.DataFrame:
    suites = [suite("longbench", "code completion", ("lcc",), 1000), suite("ruler", "retrieval", ("single", "qa"), 200)]
    return tradeoff_table(ROWS, TIMINGS, suites)


def test_whole_scores_of_suites_stand_beside_the_same_speeds(with_suites: pd.DataFrame, table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(with_suites[: len(table)], table, check_dtype=False)
    added = with_suites[len(table) :]
    found = added[["task", "metric", "method", "keep_ratio", "timed_tokens"]].itertuples(index=False, name=None)
    arms = [("unpruned", 1.0), ("sdtp", 0.8)]  # those that both have
    assert list(found) == [
        (name, "score", *arm, length) for name in ("longbench", "ruler") for arm in arms for length in (100, 300)
    ]
    row = only(added, task="ruler", method="sdtp", timed_tokens=300)
    assert (row["value"], row["n"], row["quality_tokens"], row["prefill_speedup"]) == (65.0, 4, 200.5, 2.0)
    assert row["retained"] == pytest.approx(65 / 85)
    assert row["low"] < 65.0 < row["high"]
    assert (row["stages"], row["kv_cache_bytes"]) == ("4 7", 40)
    assert math.isnan(row["from_prefill"])


def test_scores_of_what_was_not_timed_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    suites = [suite("longbench", "code completion", ("lcc",), 1000), suite("ruler", "retrieval", ("single", "qa"), 200)]
    tradeoff_table(ROWS, TIMINGS, suites)
    assert [record.getMessage() for record in caplog.records] == [
        "suites: sdtp at keep ratio 0.7, gemfilter at keep ratio 0.8: not timed, and so left out"
    ]


def test_chinese_tasks_are_a_panel_of_their_own() -> None:
    both = suite("longbench", "multi-document QA", ("hotpotqa", "dureader"), 1000)
    made = tradeoff_table(ROWS, TIMINGS, [both])
    assert list(dict.fromkeys(made["task"]))[-2:] == ["longbench", "longbench-zh"]
    assert only(made, task="longbench-zh", method="sdtp", timed_tokens=100)["n"] == 2
    titles = [axes.get_title(loc="left") for axes in tradeoff_plot.tradeoff(made).axes]
    assert titles[2:4] == ["LongBench, smoke: n = 2", "LongBench in Chinese, smoke: n = 2"]


def test_suites_have_panels_after_the_tasks(with_suites: pd.DataFrame) -> None:
    figure = tradeoff_plot.tradeoff(with_suites)
    titles = [axes.get_title(loc="left").partition(",")[0] for axes in figure.axes]
    assert titles == ["continuation", "retrieval", "LongBench", "RULER-style tasks"] * 2
    axes = figure.axes[7]
    assert axes.get_xlabel() == "prefill speedup (×) at 300 tokens"
    assert axes.get_ylabel() == "score at 200 tokens (higher is better)"
    line = marks(figure, 7, "sdtp")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2.0], [65.0])
    assert list(marks(figure, 7, "unpruned").get_ydata()) == [85.0]
    memory = tradeoff_plot.memory(with_suites)
    assert list(marks(memory, 6, "sdtp").get_xdata()) == [-15.0]


def test_step_sets_suites_beside_and_names_figures_after_the_table(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:12])
    (tmp_path / "timing.json").write_text(json.dumps(timing("sdtp", 0.8)))
    suite("ruler", "retrieval", ("single",), 200).to_csv(tmp_path / "ruler.csv", index=False)
    paths = {"evaluations": "rows.jsonl", "timings": "timing.json", "table": "beside.csv", "metrics": "m.json"}
    common = ["--settings", "{}", "--figures", str(tmp_path)]
    common += [part for name, path in paths.items() for part in (f"--{name}", str(tmp_path / path))]
    step.main([*common, "--suites", str(tmp_path / "ruler.csv")])
    assert list(dict.fromkeys(pd.read_csv(tmp_path / "beside.csv")["task"])) == ["continuation", "retrieval", "ruler"]
    assert {path.name for path in tmp_path.glob("*.svg")} == {"beside.svg", "beside-memory.svg"}
    step.main(common)
    assert "ruler" not in pd.read_csv(tmp_path / "beside.csv")["task"].tolist()
    pd.DataFrame({"suite": ["ruler"]}).to_csv(tmp_path / "ruler.csv", index=False)
    with pytest.raises(UserError, match=r"ruler\.csv: no column language, category, task"):
        step.main([*common, "--suites", str(tmp_path / "ruler.csv")])
