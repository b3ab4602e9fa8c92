from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.pipeline.paper import drawing, page
from sdtp.pipeline.paper.names import PARTS
from sdtp.pipeline.paper.part import JUDGED, Part, Value, not_run, part
from sdtp.pipeline.paper.published import load
from tests.pipeline.test_report import Page, words

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
VALUES = (
    Value("value", "Score", interval=True),
    Value("change", "Change", "change", published=False),
    Value("bytes", "Memory", "memory", published=False),
    Value("empty", "Never measured"),
)


def made(name: str, paper: float | None = None) -> Part:
    rows: list[dict[str, Any]] = [
        {"task": "copa", "method": "sdtp", "keep_ratio": 0.9, "value": 61.5, "value_low": 50.25, "value_high": 70.0,
         "change": -0.34, "bytes": 2**31, "n": 12},
        not_run("no data | here", "sdtp-lm-eval --tasks piqa", task="piqa", method="unpruned", keep_ratio=1.0),
    ]  # fmt: skip
    published = {} if paper is None else {("sdtp", 0.9, "copa", "value"): paper}
    keys = {"task": "Task", "method": "Method", "keep_ratio": "Keep ratio"}
    return part(name, f"About {name}.", keys, VALUES, rows, published, lambda row: str(row["task"]))


def saliency_map() -> Part:
    rows = [
        {"layer": 4, "position": position, "token": f" w{position}", "saliency": 1.0, "share": share}
        for position, share in enumerate(np.linspace(0.01, 0.5, 40))
    ]
    values = (Value("saliency", "Saliency", published=False), Value("share", "Share", published=False))
    keys = {"layer": "Layer", "position": "Position", "token": "Token"}
    return part("figure-1", "About the map.", keys, values, rows, {}, lambda row: "")


def paper(known: str | None = None, **changes: Any) -> page.Paper:
    number = 66.25 if known else None
    parts = [saliency_map() if name == "figure-1" else made(name, number) for name in PARTS]
    fields: dict[str, Any] = {
        "run": "tiny",
        "model": "some/model",
        "known": known,
        "parts": parts,
        "figures": dict.fromkeys([*PARTS, "tradeoff"], SVG),
        "further": {"tradeoff": "Quality against speed"},
        "further_notes": ["A note."],
        "further_missing": [not_run("no environment", "make it", method="A peer")],
        "published": load(),
        "settings": {"run": "tiny"},
    }
    return page.Paper(**{**fields, **changes})


def test_page_is_whole_and_loads_nothing() -> None:
    html = page.render_html(paper("Mistral-7B"))
    parsed = Page(html)
    assert [link for link in parsed.links if not link.startswith(("#", "data:"))] == []
    assert not {"link", "iframe", "object"} & set(parsed.tags)
    assert "default-src 'none'" in html
    assert parsed.tags.count("script") == html.count("'sha256-") == 1
    assert "prefers-color-scheme: dark" in parsed.styles
    assert parsed.tags.count("img") == len(PARTS) + 1
    for title in PARTS.values():
        assert title in parsed.text
    assert page.render_html(paper("Mistral-7B")) == html


def test_line_has_its_interval_its_examples_and_the_papers_number_in_the_next_column() -> None:
    text = words(Page(page.render_html(paper("Mistral-7B"))).text)
    assert "Task Method Keep ratio Score [95% interval] Score, the paper's Change Memory Examples" in text
    assert "copa SDTP 0.9 61.5 [50.2, 70.0] 66.2 −34% 2,048 MiB smoke: n = 12" in text
    # A column that nothing filled is left out.
    assert "Never measured" not in text


def test_model_that_the_paper_does_not_have_has_no_column_of_its_numbers() -> None:
    text = words(Page(page.render_html(paper())).text)
    assert "the paper's" not in text.partition("The paper's numbers, and where")[0].partition("Configuration")[0][200:]
    assert "The paper does not have this model" in text
    assert "None for this model." in text


def test_page_says_which_model_the_papers_numbers_are_said_to_be_of() -> None:
    text = words(Page(page.render_html(paper("Mistral-7B"))).text)
    assert "The paper has Mistral-7B: 17 of its numbers could be found, and stand" in text
    assert "names it Mistral-7B and no version, so that they may be of other weights than some/model." in text
    assert "The paper has Qwen2-7B: 0 of its numbers could be found." in page.render_markdown(paper("Qwen2-7B"))


def test_what_was_not_run_says_why_and_what_runs_it() -> None:
    shown = paper()
    text = words(Page(page.render_html(shown)).text)
    assert text.count("not run: no data | here. sdtp-lm-eval --tasks piqa") == len(PARTS) - 1
    markdown = page.render_markdown(shown)
    assert (
        "| piqa | Unpruned | 1 | – | – | – | – | not run: no data \\| here. `sdtp-lm-eval --tasks piqa` |" in markdown
    )


def test_what_no_further_figure_has_says_why_and_what_runs_it() -> None:
    assert "A peer, not run: no environment. make it" in words(Page(page.render_html(paper())).text)
    assert "A peer, not run: no environment. `make it`" in page.render_markdown(paper()).splitlines()


def test_counts_are_whole() -> None:
    value = Value("updates", "Updates", "count", published=False)
    rows: list[dict[str, Any]] = [{"method": "unpruned"}, {"method": "sdtp", "updates": 8}]
    shown = part("table-4", "", {"method": "Method"}, (value,), rows, {}, lambda row: "")
    assert [line.cells[1] for line in page.view(shown).lines] == ["–", "8"]


def test_markdown_has_every_part_its_table_and_its_figure() -> None:
    lines = page.render_markdown(paper("Mistral-7B")).splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == [*PARTS.values(), "Beyond the paper"]
    assert "| copa | SDTP | 0.9 | 61.5 [50.2, 70.0] | 66.2 | −34% | 2,048 MiB | smoke: n = 12 |  |" in lines
    for name in PARTS:
        assert f"![{PARTS[name]}]({name}.svg)" in lines
    assert "![Quality against speed](../figures/tradeoff.svg)" in lines


def test_verdict_stands_in_words_beside_its_interval() -> None:
    rows: list[dict[str, Any]] = [
        {"method": method, "difference": mean, "difference_low": mean - 1, "difference_high": mean + 1, **judged}
        for method, mean, judged in (
            ("unpruned", np.nan, {}),
            ("sdtp", 0.5, {"p_holm": 0.25, "verdict": "no difference shown"}),
        )
    ]
    columns = (Value("difference", "Minus unpruned", "signed", interval=True, published=False), *JUDGED)
    shown = part("table-1", "About it.", {"method": "Method"}, columns, rows, {}, lambda row: "")
    assert [list(line.cells) for line in page.view(shown).lines] == [
        ["Unpruned", "–", "–", "–"],
        ["SDTP", "+0.500 [−0.500, +1.50]", "0.250", "no difference shown"],
    ]
    parts = [shown if one.name == "table-1" else one for one in paper().parts]
    markdown = page.render_markdown(paper(parts=parts)).splitlines()
    assert "| SDTP | +0.500 [−0.500, +1.50] | 0.250 | no difference shown |" in markdown
    text = words(Page(page.render_html(paper(parts=parts))).text)
    assert "SDTP +0.500 [−0.500, +1.50] 0.250 no difference shown" in text


def test_map_shows_the_tokens_with_the_largest_shares() -> None:
    shown = page.view(saliency_map())
    assert [line.cells[1] for line in shown.lines] == [str(position) for position in range(39, 27, -1)]


def test_text_of_prompts_is_only_text() -> None:
    attack = "<script>alert(1)</script>"
    hostile = saliency_map()
    hostile.rows["token"] = attack
    parts = [hostile if name == "figure-1" else made(name) for name in PARTS]
    parsed = Page(page.render_html(paper(parts=parts, model=attack, run=attack, further_notes=[attack])))
    assert parsed.tags.count("script") == 1
    assert parsed.text.count(attack) >= page.MAP_ROWS + 3


def test_missing_figure_is_named() -> None:
    figures = dict.fromkeys([*PARTS, "tradeoff"], SVG)
    del figures["table-3"]
    with pytest.raises(UserError, match=r"figures: no table-3\.svg"):
        page.render_html(paper(figures=figures))


def texts(figure: Any) -> str:
    axes = figure.axes
    return " ".join([*(text.get_text() for one in axes for text in one.texts), *(one.get_title() for one in axes)])


def test_figure_of_what_was_not_run_says_why() -> None:
    whole = made("table-3")
    none = dataclasses.replace(whole, rows=whole.rows[whole.rows["why"].notna()])
    assert "not run\nno data | here" in texts(drawing.dots(none, ["task"], ["method"], "value", "score"))
    assert "not run\nno data | here" in texts(drawing.lines(none, "keep_ratio", [("value", "score")], "method"))


def test_dots_have_a_panel_a_group_with_its_bars_and_the_papers_cross() -> None:
    whole = made("table-3", 66.25)
    more = whole.rows[:1].assign(task="boolq", value=40.0, value_low=30.0, value_high=45.0, n=400)
    figure = drawing.dots(
        dataclasses.replace(whole, rows=pd.concat([whole.rows, more])),
        ["task"],
        ["method", "keep_ratio"],
        "value",
        "score",
    )
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") or axes.get_title() for axes in shown] == [
        "copa, smoke: n = 12",
        "boolq, n = 400",
    ]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["SDTP 0.9"]
    [bars] = shown[0].containers
    [segments] = bars.lines[2][0].get_segments()
    assert segments[:, 0].tolist() == [50.25, 70.0]
    assert [line.get_xdata()[0] for line in shown[0].lines if line.get_marker() == "x"] == [66.25]


def test_lines_draw_each_group_over_the_numbers_and_the_papers_beside_them() -> None:
    rows = [
        {"tokens": tokens, "keep_ratio": ratio, "value": 10 * ratio + tokens, "value_low": 10 * ratio + tokens - 1,
         "value_high": 10 * ratio + tokens + 2, "n": 5}
        for ratio in (0.9, 0.8)
        for tokens in (2, 1)
    ]  # fmt: skip
    published = {("sdtp", 0.9, "1", "value"): 9.5}
    whole = part(
        "table-2", "", {"tokens": "Tokens", "keep_ratio": "Keep ratio"}, VALUES[:1],
        [{**row, "method": "sdtp"} for row in rows], published, lambda row: str(row["tokens"]),
    )  # fmt: skip
    [axes] = drawing.lines(whole, "tokens", [("value", "score")], "keep_ratio").axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() in "ox"]
    assert drawn == [([1, 2], [10.0, 11.0]), ([1, 2], [9.0, 10.0]), ([1], [9.5])]
    assert [text.get_text() for text in axes.texts] == ["the paper's", "0.8", "0.9"]
