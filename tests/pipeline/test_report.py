from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sdtp.errors import UserError
from sdtp.pipeline import report
from tests.pipeline import synthetic_run

LOADING = {"src", "href", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Tags, the attributes by which a browser loads something, and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.styles = ""
        self.text = ""
        self.tokens: list[tuple[str, str]] = []
        self._open = ""
        self._class = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open, self._class = tag, dict(attrs).get("class") or ""
        self.text += " " if tag in ("td", "th", "li", "tr") else ""
        self.links += [value or "" for name, value in attrs if name in LOADING]
        self.styles += " ".join(value or "" for name, value in attrs if name == "style")

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.styles += data
            return
        self.text += data
        if self._open == "span" and re.fullmatch(r"s\d+", self._class):
            self.tokens.append((data, self._class))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def page(**changes: Any) -> Page:
    return Page(report.render(synthetic_run.run(**changes)))


def words(html_text: str) -> str:
    return " ".join(html_text.split())


def test_the_page_is_whole_small_and_loads_nothing() -> None:
    html = report.render(synthetic_run.run())
    parsed = Page(html)
    assert len(html.encode()) < 10_000_000
    assert [link for link in parsed.links if not link.startswith(("#", "data:"))] == []
    assert not re.search("https?://", html)
    assert not re.search(r"url\(|@import", parsed.styles)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    # The browser is told as well, in case a later edit forgets.
    assert "default-src 'none'" in html
    assert parsed.tags.count("img") == len(report.FIGURES)
    assert "prefers-color-scheme: dark" in parsed.styles


def test_figures_are_inside() -> None:
    figures = {name: f"<svg>{name}</svg>".encode() for name in report.FIGURES}
    links = page(figures=figures).links
    inside = [base64.b64decode(link.partition(",")[2]).decode() for link in links if link.startswith("data:")]
    assert sorted(inside) == sorted(f"<svg>{name}</svg>" for name in report.FIGURES)


def test_smoke_stands_where_quality_is_shown_on_few_examples_and_nowhere_else() -> None:
    few = page(n=28).text
    rows = len(synthetic_run.quality())
    # The head of the summary, each cost of each ratio, each row of the tables, the figure's caption.
    assert few.count("smoke: n = 28") == 1 + 3 * 3 + rows + 1
    many = page(n=400).text
    assert "smoke" not in many
    assert many.count("n = 400") == 3 * 3 + rows + 1


def test_equal_runs_give_equal_pages() -> None:
    assert report.render(synthetic_run.run()) == report.render(synthetic_run.run())


@pytest.mark.parametrize(
    "attack", ["<script>alert(1)</script>", "\"><img src=http://evil.example/x onerror='x()'>", "{{ 7 * 7 }}"]
)
def test_text_of_prompts_and_models_is_only_text(attack: Any) -> None:
    generations = [
        {**row, "pruned_text": attack, "unpruned_text": attack, "reference": attack, "task": attack}
        for row in synthetic_run.generations()
    ]
    parsed = page(
        generations=generations,
        tokens=[attack] * 120,
        settings={"run": attack},
        model={"source": {"ref": attack}, attack: attack},
        data={attack: attack},
        tests={attack: [500]},
        timed_on=attack,
        versions={"machine": attack},
    )
    assert "script" not in parsed.tags
    assert parsed.tags.count("img") == len(report.FIGURES)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert parsed.text.count(attack) > 3 * 120


def test_summary_says_what_was_gained_and_what_it_cost() -> None:
    run = synthetic_run.run()
    first = report.cards(run)[0]
    assert [card["ratio"] for card in report.cards(run)] == [0.9, 0.8, 0.7]
    near, longest = first["gains"]
    assert (near["prompt_tokens"], longest["prompt_tokens"]) == (512, 2048)
    # By hand: 1 + 5.2 * 0.1 = 1.52, times 1 + 2048 / 40960 = 1.05.
    assert longest["speedup"] == pytest.approx(1.52 * 1.05)
    assert longest["lower_quartile"] == pytest.approx(1.52 * 1.05 * 0.98)
    full = 2048 / 600 * 1.25
    assert longest["end_to_end"] == pytest.approx((full + 0.72) / (full / (1.52 * 1.05) + 0.72))
    assert longest["cache_change"] == pytest.approx(1 / (1.52 * 1.05) - 1, abs=1e-6)
    assert longest["memory_change"] == pytest.approx(-0.1 / 1.2)
    accuracy, _, loss = first["costs"]
    assert (accuracy["unpruned"], accuracy["verdict"]) == (0.75, "within the interval")
    assert (accuracy["best_other"]["method"], accuracy["beaten"]) == ("recent", False)
    assert loss["best_other"]["value"] == pytest.approx(3.1 + 2.5 * 0.1)
    text = words(page().text)
    assert "2,048 tokens: prefill 1.60×, 0.97 of the length bound; prompt and 16 new tokens 1.47×" in text
    assert "KV cache −37%, peak memory −8%" in text
    assert "retrieval accuracy 0.65 [0.57, 0.73], unpruned 0.75: worse, outside the interval" in text
    assert "135 million parameters" in text
    assert "28 retrieval prompts of 500 tokens, 28 continuation prompts of 480 tokens" in text


def test_a_method_that_beats_sdtp_is_said_to_be_better_but_the_oracle_is_no_method() -> None:
    quality = synthetic_run.quality()
    better = (quality["task"] == "continuation") & (quality["method"] == "recent") & (quality["keep_ratio"] == 0.9)
    quality.loc[better, "value"] = 3.05
    oracle = quality[quality["method"] == "sdtp"].assign(method="oracle", value=0.5)
    quality = pd.concat([quality, oracle])
    costs = report.cards(synthetic_run.run(quality=quality))[0]["costs"]
    assert (costs[2]["best_other"]["method"], costs[2]["beaten"]) == ("recent", True)
    assert "a better method: Recent 3.05" in words(page(quality=quality).text)


def test_every_row_of_both_tables_is_shown() -> None:
    text = words(page().text)
    for label in ("Random 0.8 0.00 0.00 to 0.08", "SDTP 0.9 0.75 0.67 to 0.83 1.00 within the interval smoke: n = 28"):
        assert label in text
    assert "Unpruned 1.0 512 0.91 [0.89, 0.93]" in text
    assert (
        "SDTP 0.7 2,048 1.59 [1.56, 1.63] 2.69 [2.63] 2.77 0.97 2.82 0.95 0.21 0.72 2.31 16 33.5 MiB 1,049 MiB 5"
        in text
    )


def test_values_that_do_not_exist_are_dashes() -> None:
    latency = synthetic_run.latency().assign(decode_s=np.nan, peak_memory_bytes=np.nan)
    text = page(latency=latency).text
    assert "nan" not in text.lower().replace("finance", "")
    assert "peak memory –" in text


def test_removal_stages_by_hand() -> None:
    # Stage 0 drops 1 and 4, stage 1 drops 2, stage 2 drops nothing.
    assert report.removal_stages([[0, 2, 3, 5], [0, 3, 5], [0, 3, 5]], 6) == [3, 0, 1, 3, 0, 3]
    with pytest.raises(UserError, match="stage 1: position 1 was not present; accepted"):
        report.removal_stages([[0, 2], [0, 1]], 3)
    with pytest.raises(UserError, match="stage 0: position 3 was not present; accepted"):
        report.removal_stages([[0, 3]], 3)


def test_token_view_shades_each_token_by_the_stage_that_removed_it() -> None:
    row = {
        "id": "r-0", "task": "retrieval", "keep_ratio": 0.9, "prompt_tokens": 5,
        "kept": [[0, 2, 3, 4], [0, 3, 4], [0, 4]],
        "pruned_text": "p", "unpruned_text": "u", "reference": "r",
    }  # fmt: skip
    parsed = page(generations=[row], tokens=["a", "b", "c", "d", "e"])
    shown = [token for token in parsed.tokens if len(token[0]) == 1]
    assert shown == [("a", "s3"), ("b", "s0"), ("c", "s1"), ("d", "s2"), ("e", "s3")]
    assert "removed before layer 7: 1" in parsed.text
    assert "2 of 5 tokens reach the last layer" in parsed.text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": ["a"] * 119}, "generation r-0, keep_ratio 0.9: 120 tokens and 3 stages; accepted: the data's 119"),
        ({"layers": (4, 7)}, "the pruner's 2"),
        ({"shown": "x"}, "generations: no row for id x"),
        ({"figures": {"saliency": b""}}, "no sparsity.svg, latency.svg, speedup.svg, quality.svg, training.svg"),
        ({"latency": synthetic_run.latency().query("keep_ratio != 0.8")}, "no sdtp row for keep_ratio=0.8"),
    ],
)
def test_contradictions_and_gaps_are_named(changes: Any, match: Any) -> None:
    with pytest.raises(UserError, match=match):
        report.render(synthetic_run.run(**changes))


def test_a_page_that_would_be_too_large_is_refused() -> None:
    figures = dict.fromkeys(report.FIGURES, b"x" * 1300000)
    with pytest.raises(UserError, match=r"report is 10\.\d MB; accepted: below 10 MB"):
        report.render(synthetic_run.run(figures=figures))


def test_generations_stand_beside_each_other() -> None:
    first, second = report.examples(synthetic_run.generations())
    assert (first["id"], second["id"]) == ("r-0", "c-0")
    assert [row["keep_ratio"] for row in first["rows"]] == [0.9, 0.8, 0.7]
    rows = [
        {**row, "pruned_text": row["unpruned_text"]} if row["keep_ratio"] == 0.8 else row
        for row in synthetic_run.generations()
    ]
    assert words(page(generations=rows).text).count("same text as unpruned") == 2


def test_training_shows_first_and_last_values() -> None:
    ends = {
        (end["metric"], end["split"]): end
        for end in report.curve_ends(synthetic_run.history().sample(frac=1, random_state=1))
    }
    loss = ends["loss", "heldout"]
    assert (loss["first"]["step"], loss["first"]["value"]) == (0, pytest.approx(4.1))
    assert (loss["last"]["step"], loss["last"]["value"]) == (60, pytest.approx(1.8 + 2.3 * np.exp(-4)))
    assert ("ce", "heldout") not in ends


def test_token_texts_keep_the_space_that_a_token_carries() -> None:
    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == "cat"  # decoded alone, a token loses its space
    assert report.token_texts(tokenizer, [0, 1, 2, 1]) == ["the", " cat", "s", " cat"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.756, "0.76"), (1.5, "1.50"), (12.34, "12.3"), (134.5, "134"), (2048, "2,048"),
     (15310.2, "15,310"), (0.00025, "2.5e-04"), (float("nan"), "–"), (-0.5, "-0.50")],
)  # fmt: skip
def test_number(value: Any, text: Any) -> None:
    assert report.number(value) == text


@pytest.mark.parametrize(("value", "text"), [(22.5 * 2**20, "22.5 MiB"), (48 * 2**30, "48.0 GiB"), (float("nan"), "–")])
def test_memory(value: Any, text: Any) -> None:
    assert report.memory(value) == text


def test_flatten_keeps_lists_and_dots_nested_keys() -> None:
    assert report.flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}
