"""The table, page and figure of an ablation of made-up evaluations, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.evaluation.stats import mean_interval, paired_difference, wilson_interval
from sdtp.pipeline.ablation_plot import ablation
from sdtp.pipeline.ablations import ABLATION_COLUMNS, ablation_table, all_rows, arm, markdown
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.steps.ablation import by_variant, read_training
from sdtp.pipeline.tables import quality_cells
from sdtp.pipeline.targets import target_table
from tests.pipeline.rows import only


def evaluated(
    method: str, ratio: float, correct: Sequence[bool], losses: Sequence[float], kept: int, seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows of retrieval examples r0, r1, ... and, with losses larger by 10, of continuation examples c0, c1, ..."""
    rows = []
    for index, (right, loss) in enumerate(zip(correct, losses, strict=True)):
        same = {"method": method, "keep_ratio": ratio, "seed": seed, "prompt_tokens": 100, "kept_tokens": kept + index}
        same |= {"kl": loss / 8, "top1": 1 - loss / 8}
        same |= {"kl": 0.1, "top1": 0.5}
        rows.append({"id": f"r{index}", "task": "retrieval", "correct": right, "loss": loss, **same})
        rows.append({"id": f"c{index}", "task": "continuation", "correct": None, "loss": loss + 10, **same})
    return rows


T, F = True, False
REFERENCES = [
    *evaluated("unpruned", 1.0, [T, T, T, T], [1.0, 2.0, 3.0, 4.0], 97),
    # By loss recent is the best baseline, by accuracy lastquery; the oracle beats both and is none.
    *evaluated("recent", 0.8, [F, F, F, T], [1.2, 2.2, 3.2, 4.4], 40),
    *evaluated("lastquery", 0.8, [F, T, F, T], [1.5, 2.5, 3.5, 4.5], 40),
    *evaluated("oracle", 0.8, [T, T, T, T], [1.0, 2.1, 3.0, 4.1], 40),
    # At this ratio it is the other way round.
    *evaluated("recent", 0.5, [F, F, F, F], [3.0, 3.0, 5.0, 5.0], 10),
    *evaluated("lastquery", 0.5, [F, F, F, F], [2.0, 2.0, 4.0, 4.0], 10),
    *evaluated("oracle", 0.5, [T, T, F, T], [1.0, 2.3, 3.1, 4.1], 10),
]
VARIANTS = {
    "full": [
        *evaluated("sdtp", 0.8, [T, F, T, T], [1.1, 2.1, 3.2, 4.1], 40),
        *evaluated("sdtp", 0.5, [F, F, F, T], [2.0, 2.0, 4.0, 3.0], 10),
    ],
    # A method's name is no trouble as a variant's.
    "recent": [
        # Out of order: differences go by example.
        *reversed(evaluated("sdtp", 0.8, [T, F, F, T], [1.4, 2.5, 3.4, 4.9], 30)),
        *evaluated("sdtp", 0.5, [F, F, F, F], [2.5, 2.5, 4.5, 3.5], 8),
    ],
}


TRAINING = {
    "full": {"label_updates": 960, "optimizer_steps": 8, "kept_step": 0},
    "recent": {"label_updates": 0, "optimizer_steps": 1200, "kept_step": 1100},
}


def made(references: list[dict[str, Any]], variants: dict[str, list[dict[str, Any]]]) -> pd.DataFrame:
    rows = all_rows(references, variants)
    return ablation_table(rows, quality_cells(rows), {name: TRAINING.get(name, TRAINING["full"]) for name in variants})


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return made(REFERENCES, VARIANTS)


def test_every_cell_has_one_row_variants_after_the_methods_in_their_order(table: pd.DataFrame) -> None:
    assert list(table.columns) == ABLATION_COLUMNS
    assert list(dict.fromkeys(zip(table["task"], table["metric"], strict=True))) == [
        ("retrieval", "accuracy"),
        ("retrieval", "loss"),
        ("retrieval", "kl"),
        ("retrieval", "top1"),
        ("continuation", "loss"),
        ("continuation", "kl"),
        ("continuation", "top1"),
    ]
    panel = table[(table["task"] == "continuation") & (table["metric"] == "loss")]
    assert list(zip(panel["method"], panel["variant"], panel["keep_ratio"], strict=True)) == [
        ("unpruned", "", 1.0),
        *((method, "", ratio) for ratio in (0.8, 0.5) for method in ("recent", "lastquery", "oracle")),
        *(("sdtp", variant, ratio) for variant in ("full", "recent") for ratio in (0.8, 0.5)),
    ]


def test_value_interval_and_kept_share_are_the_variants_own(table: pd.DataFrame) -> None:
    row = only(table, task="retrieval", metric="accuracy", variant="recent", keep_ratio=0.8)
    assert (row["method"], row["value"], row["n"], row["retained"]) == ("sdtp", 0.5, 4, 0.5)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson_interval([1, 0, 0, 1]))
    assert row["kept_share"] == pytest.approx((0.30 + 0.31 + 0.32 + 0.33) / 4)
    loss = only(table, task="continuation", metric="loss", variant="recent", keep_ratio=0.5)
    assert loss["value"] == pytest.approx(13.25)
    assert (loss["ci_low"], loss["ci_high"]) == pytest.approx(mean_interval([12.5, 12.5, 14.5, 13.5]))
    assert loss["kept_share"] == pytest.approx((0.08 + 0.09 + 0.10 + 0.11) / 4)


def test_differences_are_to_the_first_variant_and_to_the_best_baseline_of_the_ratio(table: pd.DataFrame) -> None:
    row = only(table, task="retrieval", metric="loss", variant="recent", keep_ratio=0.8)
    assert row["baseline"] == "recent"
    to_first = paired_difference([1.4, 2.5, 3.4, 4.9], [1.1, 2.1, 3.2, 4.1])
    assert (row["minus_first"], row["first_low"], row["first_high"], row["first_p_value"]) == pytest.approx(
        (0.425, to_first.low, to_first.high, to_first.p_value)
    )
    to_baseline = paired_difference([1.4, 2.5, 3.4, 4.9], [1.2, 2.2, 3.2, 4.4])
    assert (row["minus_baseline"], row["baseline_low"], row["baseline_high"]) == pytest.approx(
        (0.3, to_baseline.low, to_baseline.high)
    )
    other_ratio = only(table, task="retrieval", metric="loss", variant="recent", keep_ratio=0.5)
    assert (other_ratio["baseline"], other_ratio["minus_first"]) == ("lastquery", pytest.approx(0.5))
    assert other_ratio["minus_baseline"] == pytest.approx(0.25)
    accuracy = only(table, task="retrieval", metric="accuracy", variant="recent", keep_ratio=0.8)
    assert (accuracy["baseline"], accuracy["minus_baseline"], accuracy["minus_first"]) == ("lastquery", 0.0, -0.25)


def test_methods_are_compared_too_and_nothing_with_itself(table: pd.DataFrame) -> None:
    panel = table[(table["task"] == "retrieval") & (table["metric"] == "loss")]
    assert only(panel, method="oracle", keep_ratio=0.8)["minus_baseline"] == pytest.approx(-0.2)
    assert only(panel, method="lastquery", keep_ratio=0.8)["minus_first"] == pytest.approx(0.375)
    first = only(panel, variant="full", keep_ratio=0.8)
    assert math.isnan(first["minus_first"])
    assert first["minus_baseline"] == pytest.approx(-0.125)
    best = panel[(panel["method"] == "recent") & (panel["keep_ratio"] == 0.8)].iloc[0]
    assert math.isnan(best["minus_baseline"])
    assert best["minus_first"] == pytest.approx(0.125)
    unpruned = only(panel, method="unpruned")
    assert math.isnan(unpruned["minus_first"])
    assert math.isnan(unpruned["minus_baseline"])
    assert unpruned["baseline"] == ""


def test_without_a_baseline_there_is_no_difference_to_one() -> None:
    references = [row for row in REFERENCES if row["method"] in ("unpruned", "oracle")]
    table = made(references, VARIANTS)
    assert set(table["baseline"]) == {""}
    assert table["minus_baseline"].isna().all()
    row = only(table, task="continuation", metric="loss", variant="recent", keep_ratio=0.8)
    assert row["minus_first"] == pytest.approx(0.425)


def test_variant_on_other_examples_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"sdtp:recent at keep ratio 0.8 was evaluated on 3 examples and unpruned on 4"):
        made(REFERENCES, VARIANTS | {"recent": VARIANTS["recent"][2:]})


def test_rows_of_a_variant_say_how_it_was_trained(table: pd.DataFrame) -> None:
    row = only(table, task="retrieval", metric="loss", variant="recent", keep_ratio=0.5)
    assert (row["label_updates"], row["optimizer_steps"], row["kept_step"]) == (0, 1200, 1100)
    assert set(table.loc[table["variant"] == "full", "kept_step"]) == {0}
    assert table.loc[table["variant"] == "", "label_updates"].isna().all()
    # As whole numbers, also beside rows that have none.
    assert ",960,8,0,\n" in table.to_csv(index=False)


def test_variants_with_the_same_value_of_every_example_are_named(table: pd.DataFrame) -> None:
    assert set(table["same_as"]) == {""}
    twin = list(reversed(VARIANTS["full"]))
    other = [{**row, "loss": row["loss"] + (row["id"] == "c0")} for row in twin]
    table = made(REFERENCES, VARIANTS | {"twin": twin, "other": other, "third": twin})
    assert dict(zip(table["variant"], table["same_as"], strict=True)) == {
        "": "", "full": "", "recent": "", "twin": "full", "other": "", "third": "full",
    }  # fmt: skip


def test_metrics_of_another_training_are_refused_by_what_they_lack(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"label_updates": 960.0, "optimizer_steps": 8.0, "kept_step": 4.0, "wall_seconds": 1.5}')
    assert read_training(path) == {"label_updates": 960, "optimizer_steps": 8, "kept_step": 4}
    path.write_text('{"label_updates": 960.0, "wall_seconds": 1.5}')
    with pytest.raises(UserError, match=r"train.json: no optimizer_steps, kept_step; accepted: the metrics that"):
        read_training(path)


def test_page_says_what_the_differences_show(table: pd.DataFrame) -> None:
    rows = all_rows(REFERENCES, VARIANTS)
    lines = markdown(table, target_table(quality_cells(rows), arm("full")), "mine").splitlines()
    assert lines[0] == "# Variants of run mine"
    titles = [line for line in lines if line.startswith("## ")]
    assert len(titles) == 2 + 7 * 2
    assert titles[4] == "## retrieval: loss (lower is better), keep ratio 0.5, smoke: n = 4"
    assert (titles[0], titles[-1]) == ("## How each was trained", "## Targets of full")
    assert "| full | 960 | 8 | 0 | – |" in lines
    assert "| recent | 0 | 1,200 | 1,100 | – |" in lines
    needs = "not decided: 4 examples, and 400 are needed |"
    assert len([line for line in lines if "| sdtp/full@0.8 − recent@0.8 | 4 |" in line and line.endswith(needs)]) == 6
    assert lines[-1].endswith("| not measured: no sdtp/paper@0.9 in this configuration |")
    start = lines.index("## retrieval: loss (lower is better), keep ratio 0.8, smoke: n = 4")
    section = lines[start : start + 10]
    assert section[2] == "| | loss | minus full | minus recent | kept |"
    assert section[4].startswith("| unpruned | 2.50 [")
    assert section[4].endswith("| – | – | 98% |")
    assert [line.split(" | ")[0] for line in section[5:]] == [
        "| recent", "| lastquery", "| oracle", "| **full**", "| **recent**",
    ]  # fmt: skip
    full, own = section[8].split(" | "), section[9].split(" | ")
    assert full[2] == "–"
    assert full[3].startswith("−0.125 [")
    assert own[2].startswith("+0.425 [+")
    assert own[2].endswith("]")  # four examples show no difference, whichever way they point
    assert own[4] == "32% |"
    more = markdown(
        table.assign(first_p_value=0.01), target_table(quality_cells(rows), arm("full")), "mine"
    ).splitlines()
    assert more[start + 9].split(" | ")[2] == f"{own[2]} worse"


def test_figure_has_a_panel_for_each_ratio_task_and_metric_with_variants_in_order(table: pd.DataFrame) -> None:
    figure = ablation(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        *["retrieval, smoke: n = 4"] * 2, "continuation, smoke: n = 4", *["retrieval, smoke: n = 4"] * 2,
        "continuation, smoke: n = 4",
    ]  # fmt: skip
    assert [axes.get_ylabel() for axes in figure.axes] == ["keep ratio 0.8", "", "", "keep ratio 0.5", "", ""]
    panel = figure.axes[4]  # retrieval loss at 0.5
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["full", "recent"]
    low, high = panel.get_ylim()
    assert low > high  # the first variant is on top
    points = panel.containers[0].lines[0]
    assert list(points.get_xdata()) == pytest.approx([2.75, 3.25])
    verticals = {line.get_label(): line.get_xdata()[0] for line in panel.lines if line.get_label()[0] != "_"}
    assert verticals == pytest.approx({"Unpruned": 2.5, "Recent": 4.0, "LastQuery": 3.0, "Oracle saliency": 2.625})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(verticals)


def test_equal_tables_give_equal_figures(table: pd.DataFrame, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(ablation(table), tmp_path / name / "ablation.svg")
    for kind in ("svg", "png"):
        assert (tmp_path / "a" / f"ablation.{kind}").read_bytes() == (tmp_path / "b" / f"ablation.{kind}").read_bytes()


def test_evaluations_belong_to_the_variants_in_order() -> None:
    paths = [Path(name) for name in "abcd"]
    assert by_variant(["x", "y"], paths, 2) == {"x": paths[:2], "y": paths[2:]}
    with pytest.raises(UserError, match="4 files of 3 variants: 2 of each are needed"):
        by_variant(["x", "y", "z"], paths, 2)
