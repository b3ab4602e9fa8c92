"""Every part of the paper from small inputs whose numbers are easy to check by hand."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from sdtp.errors import UserError
from sdtp.evaluation.longbench.tasks import Category
from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline.paper import missing
from sdtp.pipeline.paper.ablation import ablation
from sdtp.pipeline.paper.drawing import sparsity
from sdtp.pipeline.paper.part import Part
from sdtp.pipeline.paper.published import load, numbers
from sdtp.pipeline.paper.quality import OWN_PROMPTS, speeds_of, table_1, table_3, table_6, with_llmlingua
from sdtp.pipeline.paper.saliency import figure_1, figure_2, salient
from sdtp.pipeline.paper.shortened import Speed
from sdtp.pipeline.paper.speed import LENGTHS, table_2
from sdtp.pipeline.paper.sweep import swept
from sdtp.pipeline.suite_tables import suite_cells, suite_table
from sdtp.pipeline.target_settings import SuitesSettings
from tests.pipeline import synthetic_run
from tests.workflow.project import ROOT

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
AGAIN = missing.Again("tiny", ["config/tiny.yaml"])


def row(part: Part, **keys: Any) -> dict[str, Any]:
    """The one row with these keys."""
    rows = part.rows
    for key, value in keys.items():
        rows = rows[rows[key] == value]
    [found] = rows.to_dict("records")
    return {str(name): value for name, value in found.items()}


def timing_of(tokens: int, positions: int | None) -> str:
    """Stands for the command that times a length."""
    return f"time {tokens} with {positions or 'its own'} positions"


def speed(lengths: dict[int, int] | None = None, context: int | None = 8192, new_tokens: int = 128) -> Part:
    """Table 2 of the made-up run, its lengths renamed."""
    latency = synthetic_run.latency()
    latency["prompt_tokens"] = latency["prompt_tokens"].replace(lengths or {})
    # 2 TFLOP a decoded token, a quarter less when pruned.
    return table_2(
        latency,
        lambda tokens, new, ratio: 2.0 * new * (1.0 if ratio == 1.0 else 0.75),
        context,
        new_tokens,
        timing_of,
        numbers("table-2", MISTRAL, load()),
    )


def test_speeds_are_the_latency_tables_and_arithmetic_ends_with_decoding() -> None:
    part = speed()
    unpruned, pruned = row(part, prompt_tokens=2048, keep_ratio=1.0), row(part, prompt_tokens=2048, keep_ratio=0.9)
    assert unpruned["prefill_tflop"] == pytest.approx(2048 * 2.7e-4)
    assert unpruned["end_to_end_tflop"] == pytest.approx(2048 * 2.7e-4 + 32)
    assert pruned["end_to_end_tflop"] == pytest.approx(2048 * 2.7e-4 / (1.52 * 1.05) + 24)
    assert pruned["flop_change"] == pytest.approx(pruned["end_to_end_tflop"] / unpruned["end_to_end_tflop"] - 1)
    assert (unpruned["flop_change"], unpruned["memory_change"], unpruned["prefill_speedup"]) == (0.0, 0.0, 1.0)
    assert (unpruned["scoring_s"], pruned["scoring_s"]) == (0.0, pytest.approx(0.01 * pruned["prefill_s"]))
    # The table's own paired ratio: the quotient of the two peaks would be -0.1 / 1.2.
    assert pruned["memory_change"] == pytest.approx(-0.1)
    assert pruned["prefill_speedup"] == pytest.approx(1.52 * 1.05)
    assert pruned["end_to_end_speedup"] == pytest.approx(0.9 * 1.52 * 1.05)
    assert list(part.measured["prompt_tokens"]) == [length for length in (512, 1024, 2048) for _ in range(4)]
    assert list(part.measured["keep_ratio"])[:4] == [1.0, 0.9, 0.8, 0.7]


def test_papers_number_stands_beside_its_own_length_method_and_ratio_only() -> None:
    # 3,968 of 4,096 positions: the rest are new tokens.
    part = speed({1024: 3968})
    assert row(part, prompt_tokens=3968, keep_ratio=0.9)["prefill_speedup_paper"] == 1.52
    assert row(part, prompt_tokens=3968, keep_ratio=0.9)["end_to_end_speedup_paper"] == 1.08
    assert row(part, prompt_tokens=3968, keep_ratio=0.9)["memory_change_paper"] == -0.03
    assert row(part, prompt_tokens=3968, keep_ratio=1.0)["prefill_tflop_paper"] == 72.51
    others = part.rows[~((part.rows["prompt_tokens"] == 3968) & part.rows["keep_ratio"].isin([0.9, 1.0]))]
    assert others[others["why"].isna()]["prefill_speedup_paper"].isna().all()
    # Seconds of another machine are no reference.
    assert "prefill_s_paper" not in part.rows
    assert "peak_memory_bytes_paper" not in part.rows


def test_lengths_of_the_paper_that_were_not_timed_say_why() -> None:
    part = speed({1024: 3968})
    left = part.rows[part.rows["why"].notna()]
    assert list(left["prompt_tokens"]) == list(LENGTHS[1:])
    assert list(left["prefill_speedup_paper"]) == [1.58, 1.67, 1.79, 1.87, 2.15]
    assert left["prefill_speedup"].isna().all()
    # 8,192 and 128 new ones are more than 8,192 positions, but 8,064 is the paper's 8K as well.
    assert left["command"].iloc[0] == "time 8064 with its own positions"
    assert left["why"].iloc[0] == (
        "not among benchmark.prompt_tokens of this configuration; 8,064 counts, the longest that 128 new tokens leave "
        "of 8,192 positions"
    )
    assert left["command"].iloc[1] == "time 16384 with 16512 positions"
    assert "are more than the model's 8,192 positions" in left["why"].iloc[1]
    assert row(speed(context=None), prompt_tokens=131072)["command"] == "time 131072 with its own positions"
    assert row(speed(context=8320), prompt_tokens=8192)["command"] == "time 8192 with its own positions"
    # With a twentieth of the length for new tokens it still counts, and with one more no longer.
    assert row(speed(new_tokens=409), prompt_tokens=8192)["command"] == "time 7783 with its own positions"
    assert row(speed(new_tokens=410), prompt_tokens=8192)["command"] == "time 8192 with 8602 positions"
    # What is advised counts as the paper's length once it was timed.
    assert 8192 not in speed({2048: 8064}).rows["prompt_tokens"].tolist()


def test_salient_tokens_are_those_above_a_tenth_of_the_layers_largest() -> None:
    # 1.0 is a tenth of 10, and not above it; magnitudes count.
    scores = np.array([[10.0, 1.0, -1.1, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert salient(scores).tolist() == [0.5, 1.0]
    with pytest.raises(UserError, match="zero everywhere or not finite"):
        salient(np.array([[1.0, 2.0], [0.0, 0.0]]))
    with pytest.raises(UserError, match="zero everywhere or not finite"):
        salient(np.array([[1.0, np.nan]]))


def test_sparsity_is_the_mean_of_the_examples_with_its_interval_and_quartiles() -> None:
    shares = [0.25, 0.5, 0.5, 0.75]
    examples = [np.array([[10.0] * round(4 * share) + [0.5] * round(4 - 4 * share)]) for share in shares]
    [found] = figure_2(examples, [7], {}).rows.to_dict("records")
    assert found["layer"] == 7
    assert (found["salient"], found["q25"], found["q75"], found["n"]) == (0.5, 0.4375, 0.5625, 4)
    assert 0.0 <= found["salient_low"] < 0.5 < found["salient_high"] <= 1.0


def test_sparsity_is_drawn_on_an_axis_whose_labels_are_its_ticks() -> None:
    # Up to 0.2, ticks stand at 0.025, 0.05, ...: rounded to whole percents they would say 2%, 5%, 8%.
    examples = [np.array([[10.0] * few + [0.5] * (20 - few)]) for few in (2, 3, 4)]
    figure = sparsity(figure_2(examples, [7], {}))
    figure.canvas.draw()
    labels = [float(label.get_text().rstrip("%")) for label in figure.axes[0].get_yticklabels()]
    assert labels == pytest.approx(100 * figure.axes[0].get_yticks())


def test_map_has_every_token_of_every_layer_with_its_share_of_the_layers_saliency() -> None:
    part = figure_1(np.array([[3.0, -1.0], [0.0, 2.0]]), [4, 7], ["a", "b"], {})
    assert part.rows[["layer", "position", "token", "saliency", "share"]].to_numpy().tolist() == [
        [4, 0, "a", 3.0, 0.75],
        [4, 1, "b", 1.0, 0.25],
        [7, 0, "a", 0.0, 0.0],
        [7, 1, "b", 2.0, 1.0],
    ]
    with pytest.raises(UserError, match="one above zero a layer"):
        figure_1(np.zeros((1, 2)), [4], ["a", "b"], {})
    with pytest.raises(UserError, match=r"shape \(1, 2\) for 1 layers and 3 tokens"):
        figure_1(np.ones((1, 2)), [4], ["a", "b", "c"], {})


def evaluation(method: str, ratio: float, losses: list[float], kept: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c-{number}", "task": "continuation", "prompt_tokens": 80, "kept_tokens": kept, "correct": None,
            "loss": loss, "kl": loss / 8, "top1": 0.5, "response_tokens": 4, "method": method, "keep_ratio": ratio,
            "seed": None,
        }
        for number, loss in enumerate(losses)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "trained"), [("table-4", "without-rank"), ("table-5", "without-rank-and-mse")])
def test_ablation_is_paired_with_the_runs_own_pruner(name: str, trained: str) -> None:
    part = ablation(
        name,
        evaluation("unpruned", 1.0, [2.0, 3.0, 4.0]),
        evaluation("sdtp", 0.8, [2.5, 3.5, 4.5]),
        evaluation("sdtp", 0.8, [2.75, 3.75, 4.75]),
        [
            {"label_updates": 1920, "optimizer_steps": 8, "kept_step": 8},
            {"label_updates": 0, "optimizer_steps": 4, "kept_step": 4},
        ],
        {},
    )
    updates = part.rows.loc[part.rows["metric"] == "loss", ["label_updates", "optimizer_steps"]]
    assert updates.iloc[0].isna().all()
    assert updates.iloc[1:].to_numpy().tolist() == [[1920, 8], [0, 4]]
    assert list(part.rows["variant"]) == ["unpruned", "full", trained] * 3
    assert list(dict.fromkeys(part.rows["metric"])) == ["loss", "kl", "top1"]
    left_out = row(part, metric="loss", variant=trained)
    assert (left_out["value"], left_out["difference"], left_out["n"]) == (3.75, 0.25, 3)
    assert (left_out["difference_low"], left_out["difference_high"]) == (0.25, 0.25)
    assert np.isnan(row(part, metric="loss", variant="full")["difference"])
    assert row(part, metric="loss", variant="unpruned")["value"] == 3.0


def test_verdicts_of_an_ablation_count_its_keep_ratios() -> None:
    counted = [{"label_updates": 0, "optimizer_steps": 4, "kept_step": 4}] * 2
    losses = [float(number) for number in range(8)]
    full, worse = (
        [one for ratio in (0.9, 0.8) for one in evaluation("sdtp", ratio, [loss + more * ratio for loss in losses])]
        for more in (1, 2)
    )
    part = ablation("table-4", evaluation("unpruned", 1.0, losses), full, worse, counted, {})
    for ratio in (0.9, 0.8):
        found = row(part, metric="loss", variant="without-rank", keep_ratio=ratio)
        # All signs, one as far on either side; of two ratios.
        assert (found["p_holm"], found["verdict"]) == (2 * 2 / 2**8, "worse")
        same = row(part, metric="top1", variant="without-rank", keep_ratio=ratio)
        assert (same["p_holm"], same["verdict"]) == (1.0, "no difference shown")
    for variant in ("unpruned", "full"):
        assert part.rows.loc[part.rows["variant"] == variant, ["p_holm", "verdict"]].isna().all(axis=None)


def scores(suite: str) -> pd.DataFrame:
    """A suite of two categories: one row each of a task, a category and the whole, and one of a single length."""
    rows = []
    for method, ratio, value in (("unpruned", 1.0, 50.0), ("sdtp", 0.9, 40.0), ("sdtp-half", 0.9, 45.0)):
        for category, task, length in (
            ("qa", "qa-1", None),
            ("qa", "all", None),
            ("qa", "all", 512),
            ("all", "all", None),
        ):
            own = value + (1.0 if category == "all" else 0.0) + (7.0 if length or task != "all" else 0.0)
            rows.append(
                {
                    "suite": suite, "category": category, "task": task, "length": length, "method": method,
                    "keep_ratio": ratio, "value": own, "low": own - 5, "high": own + 5, "n": 12,
                    "difference": own - 50, "difference_low": own - 53, "difference_high": own - 47, "p_value": 0.01,
                    "p_holm": 0.02, "verdict": None if ratio == 1.0 else "worse",
                    "language": "en" if suite == "longbench" else None, "compression": 1.0 if ratio == 1.0 else 2.5,
                }
            )  # fmt: skip
    return pd.DataFrame(rows).astype({"length": "Int64"})


# Of the unpruned model on the prompts of both suites, of which some are in another language or category.
PROMPTS = [
    {"suite": suite, "category": category, "task": task, "prompt_tokens": tokens}
    for suite, category, task, tokens in (
        ("longbench", "qa", "hotpotqa", 900), ("longbench", "qa", "qasper", 2000), ("longbench", "qa", "dureader", 70),
        ("longbench", "code", "lcc", 100), ("ruler", "qa", "qa-1", 512), ("ruler", "qa", "qa-1", 1024),
    )
]  # fmt: skip


def test_categories_of_a_suite_stand_with_compression_speed_and_the_papers_average() -> None:
    seen: dict[tuple[str, float], list[list[int]]] = {}

    def layer_mean(method: str, ratio: float, prompts: Sequence[int]) -> float | None:
        seen.setdefault((method, ratio), []).append(list(prompts))
        return 1.6 if method == "sdtp" else None

    part = table_1(
        {"longbench": scores("longbench"), "ruler": scores("ruler")},
        PROMPTS,
        {("sdtp", 0.9): Speed(1.5, 1.2, timed_tokens=384)},
        layer_mean,
        [{"suite": "longbench", "category": "average", "method": "llmlingua2", "why": "no weights", "command": "x"}],
        numbers("table-1", MISTRAL, load()),
    )
    assert list(part.rows["category"])[:6] == ["qa", "average"] * 3
    pruned = row(part, suite="longbench", category="average", method="sdtp")
    assert (pruned["value"], pruned["value_low"], pruned["value_high"], pruned["n"]) == (41.0, 36.0, 46.0, 12)
    assert (pruned["difference"], pruned["difference_low"]) == (-9.0, -12.0)
    assert (pruned["p_holm"], pruned["verdict"]) == (0.02, "worse")
    assert (pruned["compression"], pruned["last_compression"]) == (1.6, 2.5)
    assert (pruned["prefill_speedup"], pruned["end_to_end_speedup"], pruned["timed_tokens"]) == (1.5, 1.2, 384)
    # Each category's own prompts, and the average's in English and code.
    assert seen["sdtp", 0.9] == [[900, 2000], [900, 2000, 100], [512, 1024], [512, 1024]]
    assert pruned["prompt_tokens"] == 900
    assert row(part, suite="longbench", category="qa", method="sdtp")["prompt_tokens"] == 1450
    assert row(part, suite="ruler", category="average", method="sdtp")["prompt_tokens"] == 768
    assert (pruned["value_paper"], pruned["compression_paper"]) == (39.82, 1.61)
    assert row(part, suite="longbench", category="average", method="unpruned")["value_paper"] == 42.34
    half = row(part, suite="longbench", category="average", method="sdtp-half")
    assert (half["value_paper"], half["compression_paper"]) == (40.98, 1.32)
    assert np.isnan(half["prefill_speedup"])
    assert np.isnan(half["compression"])
    # The paper's numbers are of LongBench, and of its average.
    assert part.rows["value_paper"].notna().sum() == 3
    assert row(part, method="llmlingua2")["why"] == "no weights"


def test_papers_average_is_that_of_the_english_tasks() -> None:
    chinese = scores("longbench").assign(language="zh", value=1.0)
    table = pd.concat([scores("longbench"), chinese], ignore_index=True)
    part = table_1({"longbench": table}, PROMPTS, {}, lambda *_: None, [], numbers("table-1", MISTRAL, load()))
    assert list(part.rows["category"][:2]) == ["qa", "average"]
    assert set(part.rows["category"]) == {"qa", "average", "qa, Chinese", "average, Chinese"}
    assert row(part, category="average", method="sdtp")["value_paper"] == 39.82
    other = row(part, category="average, Chinese", method="sdtp")
    assert other["value"] == 1.0
    assert np.isnan(other["value_paper"])


@pytest.mark.parametrize(
    ("suites", "ref", "own_prompts", "said"),
    [
        (("longbench", "ruler"), MISTRAL, True, True),
        (("longbench", "ruler"), MISTRAL, False, False),
        (("ruler",), MISTRAL, True, False),  # nothing of LongBench stands there
        (("longbench", "ruler"), "gpt2", True, False),  # nor any number of the paper
    ],
)
def test_own_wording_of_longbench_is_told_where_the_papers_numbers_stand_beside_it(
    suites: tuple[str, ...], ref: str, own_prompts: bool, said: bool
) -> None:
    part = table_1(
        {name: scores(name) for name in suites},
        PROMPTS,
        {},
        lambda *_: None,
        [],
        numbers("table-1", ref, load()),
        own_prompts=own_prompts,
    )
    assert (OWN_PROMPTS in part.about) == said


def test_table_without_a_column_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"ruler\.csv: no column n, difference; accepted: task"):
        table_1({"ruler": scores("ruler").drop(columns=["n", "difference"])}, PROMPTS, {}, lambda *_: None, [], {})


def harness(*tasks: str) -> pd.DataFrame:
    """The harness's table of tasks of the paper and of one local one, at one method and ratio."""
    cells = [("paper", "all", 60.0), *(("paper", task, 60.0) for task in tasks)] if tasks else []
    cells += [("local", "all", 30.0), ("local", "sdtp_fact", 30.0)]
    common = {"method": "sdtp", "keep_ratio": 0.9, "low": 25.0, "high": 65.0, "n": 12, "chance": 25.0}
    common |= dict.fromkeys(("difference", "difference_low", "difference_high"), -1.0)
    common |= {"p_holm": 0.02, "verdict": "worse"}
    return pd.DataFrame(
        [{"category": category, "task": task, "value": value, **common} for category, task, value in cells]
    )


def test_papers_average_stands_beside_that_of_all_its_tasks_alone() -> None:
    published = {("sdtp", 0.9, "average", "value"): 70.5, ("sdtp", 0.9, "copa", "value"): 81.0}
    part = table_3(harness(*PAPER_TASKS), [], published)
    average = row(part, task="average of the paper's tasks")
    assert (average["value"], average["value_paper"]) == (60.0, 70.5)
    assert row(part, task="copa")["value_paper"] == 81.0
    local = row(part, task="average, local tasks")
    assert local["value"] == 30.0
    assert np.isnan(local["value_paper"])
    part = table_3(harness(*PAPER_TASKS[:3]), [], published)
    average = row(part, task="average of 3 of the paper's 8 tasks")
    assert average["value"] == 60.0
    assert np.isnan(average["value_paper"])
    assert list(table_3(harness(), [], published).rows["task"]) == ["average, local tasks", "sdtp_fact"]


def test_tasks_of_the_paper_that_were_not_run_follow_the_local_ones() -> None:
    left = [{"task": "copa", "method": "sdtp", "keep_ratio": 0.9, "why": "hub data", "command": "sdtp-lm-eval"}]
    part = table_3(harness("piqa"), left, {("sdtp", 0.9, "piqa", "value"): 51.0})
    assert row(part, task="piqa")["value"] == 60.0
    assert row(part, task="piqa")["value_paper"] == 51.0
    assert row(part, task="copa")["why"] == "hub data"
    assert part.rows["task"].iloc[-1] == "copa"
    assert list(table_3(None, left, {}).rows["task"]) == ["copa"]


def sweep_rows() -> pd.DataFrame:
    common = {"task": "continuation", "metric": "loss", "n": 6, "retained": 1.0, "p_value": 0.5, "p_holm": 1.0}
    unpruned = {"method": "unpruned", "stages": 0, "layers": "", "keep_ratio": 1.0, "value": 3.0}
    pruned = {"method": "sdtp", "stages": 2, "layers": "4 7", "keep_ratio": 0.9, "value": 3.5}
    rows = [
        {**common, **own, "low": own["value"] - 0.5, "high": own["value"] + 0.25, "compression": speed,
         "flop_speedup": speed, "verdict": None if np.isnan(difference) else "worse",
         **dict.fromkeys(("difference", "difference_low", "difference_high"), difference)}
        for own, difference, speed in ((unpruned, np.nan, 1.0), (pruned, 0.5, 1.25))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("name", "by", "place"), [("figure-4", "layers", "4 7"), ("figure-5", "stages", "2")])
def test_sweep_has_its_place_in_words_and_none_without_stages(name: str, by: str, place: str) -> None:
    part = swept(name, sweep_rows(), {("sdtp", 0.9, "continuation", "value"): 3.25})
    assert list(part.rows[by]) == ["", place]
    pruned = row(part, method="sdtp")
    assert (pruned["value"], pruned["value_low"], pruned["value_high"], pruned["value_paper"]) == (3.5, 3.0, 3.75, 3.25)
    assert (pruned["difference"], pruned["compression"], pruned["flop_speedup"], pruned["n"]) == (0.5, 1.25, 1.25, 6)
    assert (pruned["p_holm"], pruned["verdict"]) == (1.0, "worse")
    with pytest.raises(UserError, match=f"{name}: no column layers, p_holm"):
        swept(name, sweep_rows().drop(columns=["layers", "p_holm"]), {})


def compression() -> pd.DataFrame:
    common = {"task": "continuation", "metric": "loss", "keep_ratio": 0.8, "n": 12, "low": 3.0, "high": 4.0}
    common |= dict.fromkeys(("difference", "difference_low", "difference_high"), 0.25)
    common |= {"p_holm": 0.02, "verdict": "worse"}
    rows = [
        {"method": "sdtp", "value": 3.5, "cache_share": 0.5, "prefill_speedup": 2.0},
        {"method": "sdtp+h2o", "value": 3.75, "cache_share": 0.2, "prefill_speedup": 1.9},
    ]
    measured = {"decode_speedup": 1.1, "end_to_end_speedup": 1.5, "peak_memory_bytes": 1e9}
    return pd.DataFrame([{**common, **measured, **own} for own in rows])


def test_compression_on_top_stands_with_the_cache_that_is_left() -> None:
    part = table_6(compression(), [], {("sdtp+h2o", 0.8, "continuation", "cache_share"): 0.4})
    on_top = row(part, method="sdtp+h2o")
    assert (on_top["value"], on_top["difference"], on_top["cache_share"], on_top["cache_share_paper"]) == (
        3.75, 0.25, 0.2, 0.4,
    )  # fmt: skip
    assert (on_top["p_holm"], on_top["verdict"]) == (0.02, "worse")
    assert (on_top["decode_speedup"], on_top["end_to_end_speedup"], on_top["prefill_speedup"]) == (1.1, 1.5, 1.9)
    [left] = table_6(None, missing.compression(AGAIN, ["fastkv"], None), {}).rows.to_dict("records")
    assert (left["method"], left["why"][:13]) == ("sdtp+h2o", "peers.methods")
    assert overlay_of(left["command"]) == {"peers": {"methods": ["fastkv", "sdtp+h2o"]}}


def test_model_that_no_rule_attaches_to_is_the_reason_and_another_is_needed() -> None:
    [left] = missing.compression(
        AGAIN, ["sdtp-half"], "Bloom is not supported by peers: its positions are ALiBi biases"
    )
    assert left["why"].startswith("Bloom is not supported by peers: its positions are ALiBi biases; ")
    changes = overlay_of(left["command"])
    assert changes["peers"] == {"methods": ["sdtp-half", "sdtp+h2o"]}
    assert changes["run"] == "tiny-compression"
    assert changes["model"]["source"]["ref"] == "MODEL"


def overlay_of(command: str) -> dict[str, Any]:
    """The configuration that the shell writes for a command, once it is clear that the workflow is given it last."""
    words = shlex.split(command)
    write = words[words.index("echo") :]
    assert write[2:5] == [">", write[3], "&&"]
    assert write[5:9] == [".venv/bin/snakemake", "paper", "--cores", "all"]
    assert write[9:] == ["--configfile", "config/tiny.yaml", write[3]]
    found: dict[str, Any] = yaml.safe_load(write[1])
    return found


def test_commands_state_what_is_needed_beside_what_the_run_was_given() -> None:
    again = missing.Again("tiny", ["config/tiny.yaml"], {"run": "tiny", "suites": {"keep_ratios": [0.5]}})
    left = missing.longbench(again, suites(["sdtp", "sdtp-half"], [0.5]))
    [command] = {one["command"] for one in left}
    assert overlay_of(command) == {
        "run": "tiny",
        "suites": {"keep_ratios": [0.5], "longbench": {"source": missing.LONGBENCH}},
    }
    assert again.overrides["suites"] == {"keep_ratios": [0.5]}
    papers = yaml.safe_load((ROOT / "config" / "paper" / "mistral-7b.yaml").read_text(encoding="utf-8"))
    assert papers["suites"]["longbench"]["source"] == missing.LONGBENCH
    longbench, ruler = missing.llmlingua(again, suites(["sdtp", "sdtp-half"], [0.5]), longbench=False)
    assert (longbench["suite"], ruler["suite"]) == ("longbench", "ruler")
    assert ruler["command"].startswith("make llmlingua && echo ")
    weights = {"paper": {"llmlingua": missing.LLMLINGUA}}
    assert overlay_of(ruler["command"]) == {**again.overrides, **weights}
    assert overlay_of(longbench["command"]) == {**overlay_of(command), **weights}
    there, _ = missing.llmlingua(again, suites(["sdtp", "sdtp-half"], [0.5]), longbench=True)
    assert overlay_of(there["command"]) == {**again.overrides, **weights}
    assert overlay_of(missing.length(AGAIN, [512, 256], 8064, None)) == {
        "benchmark": {"prompt_tokens": [256, 512, 8064]}
    }
    longer = overlay_of(missing.length(AGAIN, [512], 131072, 131200))
    assert (longer["run"], longer["model"]["source"]["ref"]) == ("tiny-131072", "MODEL")


def suites(methods: list[str], ratios: list[float]) -> SuitesSettings:
    return SuitesSettings.from_mapping({"methods": methods, "keep_ratios": ratios})


def test_longbench_is_left_out_row_by_row_of_the_papers_table() -> None:
    left = missing.longbench(AGAIN, suites(["recent", "sdtp"], [0.9, 0.8]))
    part = table_1({}, [], {}, lambda *_: None, left, numbers("table-1", MISTRAL, load()))
    arms = [("unpruned", 1.0), ("sdtp", 0.9), ("sdtp", 0.8), ("sdtp-half", 0.9), ("sdtp-half", 0.8)]
    assert list(part.rows[["category", "method", "keep_ratio"]].itertuples(index=False, name=None)) == [
        (category, *arm) for category in ("average", *Category) for arm in arms
    ]
    assert part.rows["why"].str.startswith("LongBench's data are a download").all()
    [command] = set(part.rows["command"])
    assert overlay_of(command) == {
        "suites": {"longbench": {"source": missing.LONGBENCH}, "methods": ["recent", "sdtp", "sdtp-half"]}
    }
    # The paper's own numbers stand there all the same.
    assert part.rows["value_paper"].dropna().tolist() == [42.34, 39.82, 40.98]


def test_kvpress_is_made_and_named_by_a_command_and_needs_a_model_it_takes() -> None:
    [left] = missing.kvpress(AGAIN, "llama")
    assert left["command"].startswith("make kvpress && echo ")
    presses = {"peers": {"kvpress": ["SnapKVPress", "ExpectedAttentionPress"]}}
    assert overlay_of(left["command"]) == presses
    [left] = missing.kvpress(AGAIN, "bloom")
    assert left["why"].startswith("it takes no model of type bloom; ")
    assert overlay_of(left["command"]) == presses | {"run": "tiny-kvpress", "model": {"source": missing.MODEL}}


def test_run_without_a_file_of_its_own_is_run_again_without_one() -> None:
    plain = missing.Again.from_json("default", "")
    assert plain.command("more", {"seed": 1}) == (
        "echo '{seed: 1}' > results/default/more.yaml && "
        ".venv/bin/snakemake paper --cores all --configfile results/default/more.yaml"
    )
    given = missing.Again.from_json("a", '{"files": ["my config.yaml"], "overrides": {"run": "a"}}')
    assert given.command("more", {}).endswith("--configfile 'my config.yaml' results/a/more.yaml")


def test_speeds_are_those_at_the_longest_timed_length() -> None:
    timed = pd.DataFrame(
        [
            ("sdtp", 0.9, 512, 1.5, 1.2), ("sdtp", 0.9, 256, 1.4, 1.1), ("oracle", 0.9, np.nan, np.nan, np.nan),
            ("unpruned", 1.0, 512, 1.0, 1.0),
        ],
        columns=["method", "keep_ratio", "timed_tokens", "prefill_speedup", "end_to_end_speedup"],
    )  # fmt: skip
    assert speeds_of(timed) == {
        ("sdtp", 0.9): Speed(1.5, 1.2, timed_tokens=512), ("unpruned", 1.0): Speed(1.0, 1.0, timed_tokens=512),
    }  # fmt: skip


def score(id_: str, value: float, tokens: int, **changes: Any) -> dict[str, Any]:
    return {
        "suite": "ruler", "task": "qa", "category": "questions", "id": id_, "method": "unpruned", "keep_ratio": 1.0,
        "seed": None, "score": value, "prompt_tokens": tokens, "kept_tokens": tokens, "length": 512, "depth": None,
        **changes,
    }  # fmt: skip


def test_llmlingua_is_the_unpruned_model_on_shorter_prompts() -> None:
    unpruned = [score("a", 100.0, 100), score("b", 50.0, 100)]
    sdtp = [score(id_, 50.0, 100, method="sdtp", keep_ratio=0.8, kept_tokens=40) for id_ in ("a", "b")]
    table = suite_table(suite_cells([*unpruned, *sdtp]))
    own = {0.8: [score("a", 0.0, 30), score("b", 50.0, 50)]}
    both = with_llmlingua(table, unpruned, own)
    assert len(both) == len(table) + len(table) // 2
    cut = {"suite": "ruler", "category": "questions", "task": "qa"}
    emptied = [{**cut, "keep_ratio": 0.8}, {**cut, "keep_ratio": 0.9}, {**cut, "suite": "longbench", "keep_ratio": 0.8}]
    part = table_1(
        {"ruler": both},
        unpruned,
        {},
        lambda method, *_: 1.5 if method == "sdtp" else None,
        [],
        {},
        emptied=emptied,
    )
    found = row(part, method="llmlingua2", category="average")
    assert found["emptied"] == 1
    assert np.isnan(row(part, method="sdtp", category="average")["emptied"])
    assert (found["keep_ratio"], found["value"], found["difference"], found["n"]) == (0.8, 25.0, -50.0, 2)
    # 200 tokens of which 80 were left, before the first layer.
    assert (found["compression"], found["last_compression"]) == (2.5, 2.5)
    assert row(part, method="sdtp", category="average")["compression"] == 1.5
    with pytest.raises(UserError, match=r"llmlingua2 at keep ratio 0\.8 has scores of 1 examples and unpruned of 2"):
        with_llmlingua(table, unpruned, {0.8: own[0.8][:1]})


def test_papers_tasks_are_left_out_of_those_not_run_once_they_ran() -> None:
    left = missing.harness(AGAIN, ["copa", "sdtp_fact"])
    others = ["piqa", "winogrande", "mathqa", "boolq", "cb", "wic", "wsc"]
    assert [one["task"] for one in left] == others
    # At the run's own keep ratios, and into its own table.
    [command] = {one["command"] for one in left}
    assert overlay_of(command) == {"harness": {"tasks": ["copa", "sdtp_fact", *others]}}


def test_p_values_count_llmlingua_among_the_methods_that_are_looked_at() -> None:
    unpruned = [score(str(number), 100.0, 100) for number in range(8)]
    pruned = {"score": 50.0, "method": "sdtp", "keep_ratio": 0.8, "kept_tokens": 40}
    made = suite_table(suite_cells([*unpruned, *({**row, **pruned} for row in unpruned)]))
    read = pd.read_csv(io.StringIO(made.to_csv(index=False)))
    shorter = {0.8: [{**row, "score": 0.0, "prompt_tokens": 40, "kept_tokens": 40} for row in unpruned]}
    for table in (made, read):
        both = with_llmlingua(table, unpruned, shorter)
        whole = both[(both["category"] == "all") & both["length"].isna() & both["p_value"].notna()]
        assert list(whole["method"]) == ["sdtp", "llmlingua2"]
        assert whole["p_value"].tolist() == [2 / 2**8] * 2  # of all signs, one as far on either side
        assert whole["p_holm"].tolist() == [2 * 2 / 2**8] * 2
        assert whole["verdict"].tolist() == ["worse"] * 2
