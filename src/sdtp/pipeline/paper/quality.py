"""Tables 1, 3 and 6 of the paper: long-context tasks, multiple-choice tasks, and compressed caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from sdtp.errors import UserError
from sdtp.evaluation.longbench import tasks as longbench
from sdtp.evaluation.names import PAPER_TASKS
from sdtp.pipeline.paper.part import JUDGED, Part, Value, part
from sdtp.pipeline.paper.published import Numbers
from sdtp.pipeline.paper.shortened import LLMLINGUA, Speed
from sdtp.pipeline.results import records, with_verdicts
from sdtp.pipeline.suite_tables import ALL, GROUP, PAPER, suite_cells, suite_table

# What a table of scores has of each cell, whichever suite it is of.
SCORED = [
    "task",
    "method",
    "keep_ratio",
    "value",
    "low",
    "high",
    "n",
    "difference",
    "difference_low",
    "difference_high",
    "p_holm",
    "verdict",
]
SCORE = Value("value", "Score", interval=True)
DIFFERENCE = Value("difference", "Minus unpruned, paired", "signed", interval=True, published=False)
PREFILL, END_TO_END = Value("prefill_speedup", "Prefill speedup ×"), Value("end_to_end_speedup", "End-to-end speedup ×")
SHORTENING = Value("shortening_s", "Of it shortening, s", published=False)

# Added to the text of Table 1 where it is so.
OWN_PROMPTS = (
    " LongBench's prompts have this project's own wording here, since suites.longbench.templates names no folder of "
    "the official ones: the paper's scores beside ours are of other prompts."
)
# The row of Table 3 that has the paper's own average beside it.
AVERAGE = "average of the paper's tasks"

# (method, keep ratio) -> what was measured.
Speeds = Mapping[tuple[str, float], Speed]
# Of a method, keep ratio and prompts' tokens: these over those that a layer sees on average; None without stages.
LayerMean = Callable[[str, float, Sequence[int]], float | None]


def scored(table: pd.DataFrame, name: str, more: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a table of scores by the names that a part has, `n` included; `more` columns are kept as they are.

    Raises:
        UserError: a column is missing.
    """
    missing = [column for column in (*SCORED, *more) if column not in table.columns]
    if missing:
        raise UserError(f"{name}: no column {', '.join(missing)}; accepted: {', '.join((*SCORED, *more))}")
    renamed = table.rename(columns={"low": "value_low", "high": "value_high"})
    return records(renamed)


def table_1(
    suites: Mapping[str, pd.DataFrame],
    unpruned: Sequence[Mapping[str, Any]],
    speeds: Speeds,
    layer_mean: LayerMean,
    missing: Sequence[dict[str, Any]],
    published: Numbers,
    own_prompts: bool = False,
    emptied: Sequence[Mapping[str, Any]] = (),
) -> Part:
    """A row each category of each suite, method and keep ratio, and a suite's average, which the paper calls so.

    Args:
        suites: `longbench` and `ruler`, those that were run, as `sdtp.pipeline.suite_tables.suite_table` gives them.
        unpruned: scores of the unpruned model on all of their prompts, which say how long these are.
        speeds: what was timed.
        layer_mean: the compression as the mean over layers.
        missing: rows of `not_run`.
        published: the paper's numbers.
        own_prompts: whether LongBench's prompts have this project's wording, and not the official one.
        emptied: `suite`, `category`, `task` and `keep_ratio` of each prompt of whose context LLMLingua-2 left nothing.

    Raises:
        UserError: a table without one of the columns, or of examples that the unpruned model has no scores of.
    """
    keys = {"suite": "Suite", "category": "Category", "method": "Method", "keep_ratio": "Keep ratio"}
    last = Value("last_compression", "Compression at the last layer ×", published=False)
    values = (
        SCORE,
        DIFFERENCE,
        *JUDGED,
        Value("prompt_tokens", "Prompt tokens, median", published=False),
        Value("compression", "Compression, mean of layers ×"),
        last,
        PREFILL,
        END_TO_END,
        SHORTENING,
        Value("emptied", "Prompts without any context left", "count", published=False),
        Value("timed_tokens", "Timed at, tokens", published=False),
    )
    rows = []
    for name, table in suites.items():
        for row in scored(categories(table), f"{name}.csv", ("category", "compression", "language")):
            arm = row["method"], row["keep_ratio"]
            own = prompt_tokens(unpruned, name, row)
            measured = speeds.get(arm)
            rows.append(
                {
                    **row,
                    "suite": name,
                    "category": _category(row),
                    "prompt_tokens": statistics.median(own),
                    # A shortened text is as short for every layer.
                    "compression": row["compression"] if arm[0] == LLMLINGUA else layer_mean(*arm, own),
                    "last_compression": row["compression"],
                    "prefill_speedup": measured and measured.prefill,
                    "end_to_end_speedup": measured and measured.end_to_end,
                    "shortening_s": measured and measured.shortening_s,
                    "emptied": len(_counted([one for one in emptied if one["keep_ratio"] == arm[1]], name, row))
                    if arm[0] == LLMLINGUA
                    else None,
                    "timed_tokens": measured and measured.timed_tokens,
                }
            )
    about = (
        "The paper scores LongBench's English tasks by category: the unpruned model, its pruner with ten stages and "
        "with five, and LLMLingua-2, which shortens the prompt's text. RULER-style tasks over local text are the "
        "analogue that needs no download; sdtp-half is the trained pruner at every second of its stages. Speedups were "
        "measured of the method and keep ratio, at the length beside them and not on the suite's prompts; those of "
        "LLMLingua-2 count the time that it takes to shorten the prompt, which has a column of its own."
    )
    if own_prompts and "longbench" in suites and published:
        about += OWN_PROMPTS
    # The paper's numbers are LongBench's.
    return part(
        "table-1",
        about,
        keys,
        values,
        [*rows, *missing],
        published,
        lambda row: str(row["category"]) if row["suite"] == "longbench" else "",
    )


def _category(row: Mapping[str, Any]) -> str:
    """What a category is called; the paper's are of the English tasks."""
    words = "average" if row["category"] == ALL else str(row["category"])
    return f"{words}, Chinese" if row["language"] == "zh" else words


def prompt_tokens(unpruned: Sequence[Mapping[str, Any]], suite: str, row: Mapping[str, Any]) -> list[int]:
    """Tokens of each prompt that a row of a suite's table is about.

    Args:
        unpruned: scores of the unpruned model on whole prompts.
        suite: the table's.
        row: of a category, or of all of them, in a language or in none.

    Raises:
        UserError: there are none.
    """
    found = [own["prompt_tokens"] for own in _counted(unpruned, suite, row)]
    if not found:
        raise UserError(
            f"--suite-scores: no score of {suite}'s category {row['category']}; the unpruned model's are needed"
        )
    return found


def _counted(examples: Sequence[Mapping[str, Any]], suite: str, row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of examples of all suites those that a row of a suite's table is about."""
    language = row["language"]
    tasks = None if pd.isna(language) else longbench.of_language(longbench.Language(language))
    return [
        own
        for own in examples
        if own["suite"] == suite
        and row["category"] in (ALL, own["category"])
        and (tasks is None or own["task"] in tasks)
    ]


def categories(table: pd.DataFrame) -> pd.DataFrame:
    """Of a suite's table the rows of whole categories and of their average, over all lengths."""
    return table[(table["task"] == ALL) & table["length"].isna()]


def table_3(harness: pd.DataFrame | None, missing: Sequence[dict[str, Any]], published: Numbers) -> Part:
    """A row each task, method and keep ratio, the paper's tasks that were not run last.

    The paper's tasks have an average of their own, beside which the paper's stands where it is of all of them.

    Args:
        harness: a table of scores in percent; None where none was run.
        missing: rows of `not_run`.
        published: the paper's numbers.
    """
    rows = [] if harness is None else scored(harness, "harness.csv", ("category", "chance"))
    asked = len({row["task"] for row in rows}.intersection(PAPER_TASKS))
    rows = [{**row, "task": _mean_of(row["category"], asked)} if row["task"] == ALL else row for row in rows]
    return part(
        "table-3",
        "The paper scores eight multiple-choice tasks of lm-evaluation-harness, five examples before each question, "
        "unpruned and pruned. Multiple-choice questions over local text, in the same harness and with as many "
        "examples, are the analogue that needs no download; their average is apart from that of the paper's tasks.",
        {"task": "Task", "method": "Method", "keep_ratio": "Keep ratio"},
        (
            Value("value", "Accuracy, %", interval=True),
            DIFFERENCE,
            *JUDGED,
            Value("chance", "By guessing, %", published=False),
        ),
        [*rows, *missing],
        published,
        lambda row: "average" if row["task"] == AVERAGE else str(row["task"]),
    )


def _mean_of(category: str, asked: int) -> str:
    """What the mean over a category of the harness is called; `asked` is how many of the paper's tasks were run."""
    if category != PAPER:
        return f"average, {category} tasks"
    return AVERAGE if asked == len(PAPER_TASKS) else f"average of {asked} of the paper's {len(PAPER_TASKS)} tasks"


def with_llmlingua(
    table: pd.DataFrame, unpruned: Sequence[Mapping[str, Any]], own: Mapping[float, Sequence[Mapping[str, Any]]]
) -> pd.DataFrame:
    """A suite's table with rows of LLMLingua-2 below: the unpruned model's scores on prompts that it shortened.

    Args:
        table: as `sdtp.pipeline.suite_tables.suite_table` gives it.
        unpruned: scores of the unpruned model on the whole prompts.
        own: the same on the shortened ones, by the keep ratio whose mean layer has as many tokens.

    Raises:
        UserError: other examples than the unpruned model's.
    """
    tokens = {(row["task"], row["id"]): row["prompt_tokens"] for row in unpruned}
    renamed = [
        {
            **row,
            "method": LLMLINGUA,
            "keep_ratio": ratio,
            # All that is left reaches the last layer.
            "kept_tokens": row["prompt_tokens"],
            "prompt_tokens": tokens.get((row["task"], row["id"]), row["prompt_tokens"]),
        }
        for ratio, rows in own.items()
        for row in rows
    ]
    below = suite_table(suite_cells([*unpruned, *renamed]))
    # Looked at together with the others, which the p-values have to be adjusted for.
    return with_verdicts(pd.concat([table, below[below["method"] == LLMLINGUA]], ignore_index=True), GROUP)


def table_6(compression: pd.DataFrame | None, missing: Sequence[dict[str, Any]], published: Numbers) -> Part:
    """A row each task, metric, method and keep ratio: what a rule on top of a method costs, and what it saves.

    Args:
        compression: as `sdtp.pipeline.tradeoff.compression_table` gives it; None where nothing was compressed.
        missing: rows of `not_run`.
        published: the paper's numbers.
    """
    keys = {"task": "Task", "metric": "Metric", "method": "Method", "keep_ratio": "Keep ratio"}
    values = (
        Value("value", "Mean", interval=True),
        Value("difference", "Minus the same without, paired", "signed", interval=True, published=False),
        *JUDGED,
        Value("cache_share", "Cache, share of the whole prompt's"),
        PREFILL,
        Value("decode_speedup", "Decode speedup ×"),
        END_TO_END,
        Value("peak_memory_bytes", "Peak memory", "memory", published=False),
    )
    more = ("metric", *(value.name for value in values if value.name not in SCORED))
    rows = [] if compression is None else scored(compression, "cache-compression.csv", more)
    return part(
        "table-6",
        "The paper compresses the cache of the pruned prompt further, as H2O does, and keeps 40% of it. A rule drops "
        "cache entries after the prefill, which saves decoding and memory, and no prefill; the first token of a "
        "response comes from before it, so that only responses of two tokens or more count. peers.cache_keep is the "
        "share kept.",
        keys,
        values,
        [*rows, *missing],
        published,
        lambda row: str(row["task"]),
    )


def speeds_of(tradeoff: pd.DataFrame) -> dict[tuple[str, float], Speed]:
    """What was timed of each method and keep ratio, at the longest of its lengths.

    Args:
        tradeoff: as `sdtp.pipeline.tradeoff.tradeoff_table` gives it.
    """
    timed = tradeoff.dropna(subset=["prefill_speedup"]).sort_values("timed_tokens", kind="stable")
    return {
        (row["method"], row["keep_ratio"]): Speed(
            row["prefill_speedup"], row["end_to_end_speedup"], timed_tokens=int(row["timed_tokens"])
        )
        for row in timed.to_dict("records")
    }
