"""The suites' table: means by task, category and length, paired with the unpruned model; and its figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats as scipy_stats

from sdtp.errors import UserError
from sdtp.evaluation.longbench.tasks import TASKS, Category, Language, of_language
from sdtp.evaluation.stats import holm, paired_difference
from sdtp.pipeline import suite_plot
from sdtp.pipeline.plotstyle import save
from sdtp.pipeline.suite_tables import SUITE_COLUMNS, check_complete, suite_cells, suite_table

# Of each method the scores of tasks' examples.
RULER: dict[tuple[str, float], dict[str, list[float]]] = {
    ("unpruned", 1.0): {"single": [100, 100, 0, 100], "multi_key": [100, 0, 100, 100], "qa": [0, 100, 0, 0]},
    ("sdtp", 0.8): {"single": [100, 0, 0, 100], "multi_key": [0, 0, 100, 100], "qa": [0, 100, 100, 0]},
    ("recent", 0.8): {"single": [0, 0, 0, 0], "multi_key": [0, 0, 0, 0], "qa": [0, 0, 0, 0]},
}
CATEGORIES = {"single": "retrieval", "multi_key": "retrieval", "qa": "question answering"}
LONGBENCH: dict[tuple[str, float], dict[str, list[float]]] = {
    ("unpruned", 1.0): {"qasper": [40, 60], "narrativeqa": [10, 20, 30, 40], "lcc": [90, 70]},
    ("sdtp", 0.9): {"qasper": [30, 60], "narrativeqa": [10, 10, 30, 30], "lcc": [80, 70]},
}
LONGBENCH_CATEGORIES = {"qasper": "single-document QA", "narrativeqa": "single-document QA", "lcc": "code completion"}


def ruler_rows(seeds: tuple[int | None, ...] = (None,)) -> list[dict[str, Any]]:
    """Examples 0 and 1 of each task have 100 tokens, 2 and 3 have 200; pruning keeps a quarter."""
    return [
        {
            "suite": "ruler",
            "task": task,
            "category": CATEGORIES[task],
            "id": f"{task}-{number}",
            "method": method,
            "keep_ratio": ratio,
            "seed": seed,
            "score": float(score) if seed in (None, 0) else 50.0,
            "prompt_tokens": 100 if number < 2 else 200,
            "kept_tokens": (100 if number < 2 else 200) // (1 if method == "unpruned" else 4),
            "length": 100 if number < 2 else 200,
            "depth": 0.5,
        }
        for (method, ratio), tasks in RULER.items()
        for task, scores in tasks.items()
        for number, score in enumerate(scores)
        for seed in (seeds if method == "recent" else (None,))
    ]


def longbench_rows() -> list[dict[str, Any]]:
    return [
        {
            "suite": "longbench",
            "task": task,
            "category": LONGBENCH_CATEGORIES[task],
            "id": str(number),  # unique in a task only
            "method": method,
            "keep_ratio": ratio,
            "seed": None,
            "score": float(score),
            "prompt_tokens": 1000,
            "kept_tokens": 1000 if method == "unpruned" else 500,
        }
        for (method, ratio), tasks in LONGBENCH.items()
        for task, scores in tasks.items()
        for number, score in enumerate(scores)
    ]


def cell(table: pd.DataFrame, **columns: Any) -> dict[str, Any]:
    """The one row of a table with these values; of all lengths where none is given."""
    own = table[table["length"].isna()] if "length" not in columns else table
    for name, value in columns.items():
        own = own[own[name] == value]
    (row,) = own.to_dict("records")
    return {str(name): value for name, value in row.items()}


@pytest.fixture(scope="module")
def ruler() -> pd.DataFrame:
    return suite_table(suite_cells(ruler_rows()))


def test_rows_are_the_whole_its_categories_and_tasks_at_every_length(ruler: pd.DataFrame) -> None:
    assert list(ruler.columns) == SUITE_COLUMNS
    first = ruler[ruler["method"] == "unpruned"]
    groups = [
        ("all", "all"),
        ("retrieval", "all"),
        ("retrieval", "single"),
        ("retrieval", "multi_key"),
        ("question answering", "all"),
        ("question answering", "qa"),
    ]
    found = list(first[["category", "task"]].itertuples(index=False, name=None))
    assert found == 3 * groups
    assert [None if pd.isna(length) else int(length) for length in first["length"]] == 6 * [None] + 6 * [100] + 6 * [
        200
    ]
    assert list(ruler["method"][:3]) == ["unpruned", "sdtp", "recent"]
    assert len(ruler) == 3 * 3 * 6


def test_values_and_differences_are_those_of_the_examples(ruler: pd.DataFrame) -> None:
    single = cell(ruler, task="single", method="sdtp")
    assert (single["value"], single["n"], single["difference"], single["compression"]) == (50.0, 4, -25.0, 4.0)
    interval = scipy_stats.binomtest(2, 4).proportion_ci(0.95, method="wilson")
    assert (single["low"], single["high"]) == pytest.approx((100 * interval.low, 100 * interval.high))
    pair = paired_difference([1, 0, 0, 1], [1, 1, 0, 1], 1.0)
    # Bonett and Price's: of -1, 0, 0, 0 and of one answer more that only the one gets right, and one only the other.
    half = 100 * 1.959964 * math.sqrt((3 / 6 - 1 / 36) / 6)
    assert (single["difference_low"], single["difference_high"]) == pytest.approx((-100 / 6 - half, -100 / 6 + half))
    assert (single["difference_low"], single["difference_high"]) == pytest.approx((100 * pair.low, 100 * pair.high))
    assert single["p_value"] == pair.p_value
    short = cell(ruler, task="single", method="sdtp", length=100)
    assert (short["value"], short["n"], short["difference"]) == (50.0, 2, -50.0)
    whole = cell(ruler, category="all", method="sdtp")
    assert (whole["value"], whole["n"], whole["difference"]) == pytest.approx((50.0, 12, -25 / 3))
    unpruned = cell(ruler, category="all", method="unpruned")
    assert unpruned["value"] == pytest.approx(700 / 12)
    assert unpruned["compression"] == 1.0
    assert all(pd.isna(unpruned[name]) for name in ("difference", "difference_low", "difference_high", "p_value"))


def test_longbench_counts_tasks_in_a_category_and_categories_in_the_whole_alike() -> None:
    table = suite_table(suite_cells(longbench_rows()))
    assert table["length"].isna().all()
    category = cell(table, category="single-document QA", task="all", method="unpruned")
    assert (category["value"], category["n"]) == (37.5, 6)  # of 50 and 25, not of six examples: 33.3
    whole = cell(table, category="all", method="sdtp")
    assert whole["value"] == pytest.approx(((45 + 20) / 2 + 75) / 2)
    assert whole["difference"] == pytest.approx(((-5 - 5) / 2 - 5) / 2)
    assert whole["compression"] == 2.0
    assert whole["low"] < whole["value"] < whole["high"]


# GPT-3.5-Turbo-16k's scores by task, from the benchmark's own tables, which round to one digit.
PUBLISHED = dict(
    zip(
        TASKS,
        (
            *(23.6, 43.3, 52.3, 61.2),
            *(51.6, 37.7, 26.9, 28.7),
            *(29.5, 23.4, 26.7, 16.0),
            *(68.0, 91.4, 41.7, 29.2),
            *(4.5, 71.0, 77.5),
            *(54.7, 53.6),
        ),
        strict=True,
    )
)


def published_table(tasks: list[str]) -> pd.DataFrame:
    """Two examples of each task, either with the published score."""
    first = longbench_rows()[0]
    return suite_table(
        suite_cells(
            {**first, "task": name, "category": TASKS[name].category.value, "id": str(number), "score": PUBLISHED[name]}
            for name in tasks
            for number in range(2)
        )
    )


@pytest.mark.parametrize(
    ("language", "categories", "average"),
    [
        (Language.ENGLISH, [39.8, 38.7, 26.5, 67.1, 37.8, 54.1], 44.0),
        (Language.CHINESE, [61.2, 28.7, 16.0, 29.2, 77.5, 54.1], 44.5),
    ],
)
def test_means_are_those_of_the_published_leaderboard(
    language: Language, categories: list[float], average: float
) -> None:
    own = published_table(list(TASKS))
    own = own[own["language"] == language.value]
    assert cell(own, category="all")["value"] == pytest.approx(average, abs=0.06)
    found = own[(own["task"] == "all") & (own["category"] != "all")]
    assert list(found["category"]) == list(Category)
    assert found["value"].tolist() == pytest.approx(categories, abs=0.11)
    # Alone, a language is what it is beside the other.
    alone = published_table(of_language(language))
    assert alone[alone["task"] == "all"]["value"].tolist() == own[own["task"] == "all"]["value"].tolist()
    assert set(alone["language"]) == {language.value, "code"}


def test_each_task_stands_once_whatever_languages_it_counts_for() -> None:
    table = published_table(list(TASKS))
    tasks = table[table["task"] != "all"]
    assert sorted(tasks["task"]) == sorted(TASKS)
    assert dict(zip(tasks["task"], tasks["language"], strict=True)) == {
        name: task.language.value for name, task in TASKS.items()
    }
    whole = table[table["category"] == "all"]
    assert dict(zip(whole["language"], whole["n"], strict=True)) == {"en": 2 * 16, "zh": 2 * 7}
    code = published_table(["lcc"])
    assert cell(code, category="all")["language"] == "en"


def test_figure_has_a_whole_for_each_language() -> None:
    (axes,) = suite_plot.suite(published_table(["qasper", "dureader", "lcc"])).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["all English tasks", "qasper", "lcc", "all Chinese tasks", "dureader"]
    values = list(axes.containers[0].lines[0].get_xdata())
    assert values == pytest.approx([(43.3 + 54.7) / 2, 43.3, 54.7, (28.7 + 54.7) / 2, 28.7])


def test_p_values_are_adjusted_within_a_group_and_verdicts_are_the_intervals(ruler: pd.DataFrame) -> None:
    rows = [*ruler_rows(), *({**row, "method": "random"} for row in ruler_rows() if row["method"] == "recent")]
    table = suite_table(suite_cells(rows))
    family = [cell(table, category="all", method=method) for method in ("sdtp", "recent", "random")]
    assert [row["p_holm"] for row in family] == pytest.approx(holm([row["p_value"] for row in family]))
    assert family[1]["p_holm"] == pytest.approx(3 * family[1]["p_value"])  # not times all rows of the table
    assert [row["verdict"] for row in family] == ["no difference shown", "worse", "worse"]
    # Two methods of a group raise it less than three.
    assert cell(ruler, category="all", method="recent")["p_holm"] == pytest.approx(2 * family[1]["p_value"])
    unpruned = cell(table, category="all", method="unpruned")
    assert pd.isna(unpruned["p_holm"])
    assert pd.isna(unpruned["verdict"])


def test_seeds_are_means_within_an_example() -> None:
    table = suite_table(suite_cells(ruler_rows(seeds=(0, 1))))
    own = cell(table, task="single", method="recent")
    assert (own["value"], own["n"]) == (25.0, 4)


def test_incomplete_scores_are_refused() -> None:
    rows = ruler_rows(seeds=(0, 1))
    with pytest.raises(UserError, match=r"recent at keep ratio 0\.8 has scores of 12 examples .* with each seed"):
        suite_cells(rows[:-1])
    with pytest.raises(UserError, match=r"sdtp at keep ratio 0\.8 has scores of 11 examples and unpruned of 12, 11 of"):
        suite_cells([row for row in rows if (row["method"], row["id"]) != ("sdtp", "qa-1")])
    with pytest.raises(UserError, match=r"recent at keep ratio 0\.8 has two scores of qa 'qa-3'"):
        suite_cells([*rows, rows[-1]])
    with pytest.raises(UserError, match=r"scores of the suites \['longbench', 'ruler'\]"):
        suite_cells([*rows, *longbench_rows()])
    cells = suite_cells(rows)
    check_complete(cells, ["sdtp", "recent"], [0.8])
    with pytest.raises(UserError, match=r"\('sdtp', 0\.7\)"):
        check_complete(cells, ["sdtp", "recent"], [0.8, 0.7])
    with pytest.raises(UserError, match=r"--scores hold"):
        check_complete(cells, ["sdtp"], [0.8])


def test_figure_has_each_method_in_each_task_with_its_interval(ruler: pd.DataFrame, tmp_path: Path) -> None:
    (axes,) = suite_plot.suite(ruler).axes
    assert axes.get_title(loc="left") == "keep ratio 0.8, smoke: n = 4 a task"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all tasks", "single", "multi key", "qa"]
    drawn = {container.get_label(): container for container in axes.containers}
    assert list(drawn) == ["Unpruned", "SDTP", "Recent"]
    points = drawn["SDTP"].lines[0]
    assert list(points.get_xdata()) == pytest.approx([50.0, 50.0, 50.0, 50.0])
    heights = {name: list(own.lines[0].get_ydata()) for name, own in drawn.items()}
    for number in range(4):
        assert heights["Unpruned"][number] < heights["SDTP"][number] < heights["Recent"][number]
        assert heights["SDTP"][number] == pytest.approx(number)
    (bars,) = drawn["SDTP"].lines[2]
    single = cell(ruler, task="single", method="sdtp")
    assert bars.get_segments()[1][:, 0] == pytest.approx([single["low"], single["high"]])
    for name in ("a", "b"):
        save(suite_plot.suite(ruler), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_figure_has_a_panel_a_keep_ratio_with_the_unpruned_model_in_each() -> None:
    rows = ruler_rows() + [{**row, "keep_ratio": 0.9} for row in ruler_rows() if row["method"] == "sdtp"]
    first, second = suite_plot.suite(suite_table(suite_cells(rows))).axes
    assert [axes.get_title(loc="left")[:14] for axes in (first, second)] == ["keep ratio 0.9", "keep ratio 0.8"]
    unpruned = [list(axes.containers[0].lines[0].get_xdata()) for axes in (first, second)]
    assert unpruned[0] == unpruned[1]
    assert len(unpruned[0]) == 4
    assert len(first.containers[2].lines[0].get_xdata()) == 0  # recent was not run there
