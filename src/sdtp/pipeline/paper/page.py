"""The paper's parts on one HTML page that holds everything it shows and loads nothing, and as one page of Markdown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from sdtp.pipeline import html_page
from sdtp.pipeline.formats import NOTHING, change, memory, number, signed
from sdtp.pipeline.paper.names import PARTS
from sdtp.pipeline.paper.part import Part, Value
from sdtp.pipeline.plotstyle import name_of
from sdtp.pipeline.results import smoke

# The saliency map has a row a token; a reader sees the most salient ones.
MAP_ROWS = 12
FORMATS = {
    "number": number,
    "count": lambda value: number(int(value)),
    "signed": signed,
    "change": change,
    "memory": memory,
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """What one page is made of.

    Attributes:
        run: its name.
        model: id or folder of its model.
        known: the paper's name of that model; None where the paper does not have it.
        parts: the paper's tables and figures, in its order.
        figures: SVG bytes of each part's figure, and of the further ones, by name.
        further: figures that the paper does not have: name -> title.
        further_notes: what is to be said of them.
        further_missing: rows of `part.not_run`: methods that are not in them.
        published: the paper's numbers, as `published.load` gives them.
        settings: shown as they are.
    """

    run: str
    model: str
    known: str | None
    parts: Sequence[Part]
    figures: Mapping[str, bytes]
    further: Mapping[str, str]
    further_notes: Sequence[str]
    further_missing: Sequence[Mapping[str, Any]]
    published: pd.DataFrame
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table as it is read.

    Attributes:
        cells: one text a column.
        examples: number of examples; None where none count, or the line was not run.
        why, command: of a line that was not run; empty texts where it was.
        ours: whether it is of the run's own pruner.
    """

    cells: Sequence[str]
    examples: int | None
    why: str
    command: str
    ours: bool


@dataclasses.dataclass(frozen=True)
class View:
    """A part as both pages show it: headings, `text` ones first, and lines."""

    part: Part
    title: str
    text: Sequence[str]
    headings: Sequence[str]
    lines: Sequence[Line]


def view(part: Part) -> View:
    """A part in words; columns that are empty in every row are left out."""
    rows = part.rows
    if part.name == "figure-1":
        rows = rows.nlargest(MAP_ROWS, "share", keep="first")
    shown = [value for value in part.values if rows[value.name].notna().any() or _has_paper(rows, value)]
    headings, cells = [], []
    for value in shown:
        if rows[value.name].notna().any():
            headings.append(value.title + (" [95% interval]" if value.interval else ""))
            cells.append([_measured(row, value) for row in rows.to_dict("records")])
        if _has_paper(rows, value):
            headings.append(f"{value.title}, the paper's")
            cells.append([_number(paper, value.kind) for paper in rows[f"{value.name}_paper"]])
    lines = []
    for index, row in enumerate(rows.to_dict("records")):
        keys = [name_of(row[key]) if key in ("method", "variant") else _key(row[key]) for key in part.keys]
        ran = bool(pd.isna(row["why"]))
        lines.append(
            Line(
                [*keys, *(column[index] for column in cells)],
                int(row["n"]) if pd.notna(row["n"]) else None,
                "" if ran else str(row["why"]),
                "" if ran else str(row["command"]),
                ran and row.get("method") == "sdtp",
            )
        )
    return View(part, PARTS[part.name], list(part.keys.values()), headings, lines)


def _has_paper(rows: pd.DataFrame, value: Value) -> bool:
    return value.published and bool(rows[f"{value.name}_paper"].notna().any())


def _measured(row: Mapping[Any, Any], value: Value) -> str:
    text = _number(row[value.name], value.kind)
    if value.interval and pd.notna(row[f"{value.name}_low"]):
        low, high = (_number(row[f"{value.name}_{bound}"], value.kind) for bound in ("low", "high"))
        text += f" [{low}, {high}]"
    return text


def _number(value: Any, kind: str) -> str:
    if value is None or pd.isna(value):
        return NOTHING
    return str(value) if kind == "text" else FORMATS[kind](float(value))


def _key(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def render_html(paper: Paper) -> str:
    """The page as HTML; equal input gives equal text.

    Raises:
        UserError: a figure is missing, or the page is 10 MB or more.
    """
    return html_page.render(
        "paper.html.j2",
        "the page of the paper",
        scripts=("page.js",),
        paper=paper,
        introduction=introduction(paper),
        views=[view(part) for part in paper.parts],
        figures=html_page.embedded(paper.figures, (*PARTS, *paper.further)),
        titles={**PARTS, **paper.further},
        published=paper.published[paper.published["model"] == paper.known].to_dict("records"),
        settings=yaml.safe_dump(dict(paper.settings), sort_keys=False, allow_unicode=True),
    )


def render_markdown(paper: Paper) -> str:
    """The page as Markdown, with the figures beside it as files."""
    lines = [
        f"# The paper's tables and figures: run {paper.run}",
        "",
        f"Model: {paper.model}. {introduction(paper)}",
    ]
    for shown in map(view, paper.parts):
        lines += ["", f"## {shown.title}", "", shown.part.about, ""]
        lines += _markdown_table(shown)
        lines += ["", f"![{shown.title}]({shown.part.name}.svg)"]
    lines += ["", "## Beyond the paper", "", *(f"{note}\n" for note in paper.further_notes)]
    lines += [f"{row['method']}, not run: {row['why']}. `{row['command']}`\n" for row in paper.further_missing]
    lines += [f"![{title}](../figures/{name}.svg)\n" for name, title in paper.further.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


def introduction(paper: Paper) -> str:
    """What the paper's columns are for this run's model."""
    if paper.known is None:
        return "The paper does not have this model, so that no number of its own stands beside these."
    count = int((paper.published["model"] == paper.known).sum())
    text = f"The paper has {paper.known}: {count} of its numbers could be found"
    if not count:
        return f"{text}."
    return (
        f"{text}, and stand in a column of their own. The paper names it {paper.known} and no version, so that they "
        f"may be of other weights than {paper.model}."
    )


def _markdown_table(shown: View) -> list[str]:
    counted = any(line.examples is not None for line in shown.lines)
    noted = any(line.why for line in shown.lines)
    headings = [*shown.text, *shown.headings, *(["Examples"] if counted else []), *(["Not run"] if noted else [])]
    table = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for line in shown.lines:
        cells = list(line.cells)
        if counted:
            cells.append(smoke(line.examples) if line.examples is not None else NOTHING)
        if noted:
            cells.append(f"not run: {line.why}. `{line.command}`" if line.why else "")
        table.append(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |")
    return table
