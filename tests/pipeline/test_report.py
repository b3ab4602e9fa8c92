from __future__ import annotations

import base64
import json
import re
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sdtp.errors import UserError
from sdtp.pipeline import report
from sdtp.pipeline.figures import FIGURES
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
        self.scripts: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self.scores: list[Any] = []
        self._open = ""
        self._class = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open, self._class = tag, dict(attrs).get("class") or ""
        self.text += " " if tag in ("td", "th", "li", "tr") else ""
        self.scores += [json.loads(value or "") for name, value in attrs if name == "data-scores"]
        self.links += [value or "" for name, value in attrs if name in LOADING]
        self.styles += " ".join(value or "" for name, value in attrs if name == "style")

    def handle_data(self, data: str) -> None:
        if self._open == "style":
            self.styles += data
            return
        if self._open == "script":
            self.scripts.append(data)
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
    assert not {"link", "iframe", "object"} & set(parsed.tags)
    # The browser is told as well, in case a later edit forgets.
    assert "default-src 'none'" in html
    assert parsed.tags.count("img") == len(FIGURES)
    assert "prefers-color-scheme: dark" in parsed.styles


def test_a_browser_is_told_to_run_the_pages_own_scripts_alone() -> None:
    html = report.render(synthetic_run.run())
    policy = re.search("""script-src ([^;"]+)""", html)
    assert policy is not None
    hashes = [base64.b64encode(sha256(script.encode()).digest()).decode() for script in Page(html).scripts]
    assert policy[1].split() == [f"'sha256-{one}'" for one in hashes]
    assert len(hashes) == 2
    # What scripts alone can serve is not offered without them.
    assert re.findall("<(?:input|output|button)", html.partition("<script>")[0]) == re.findall(
        "<(?:input|output|button)", "".join(re.findall(r'<div class="controls[^"]*" hidden>.*?</div>', html))
    )


def test_figures_are_inside() -> None:
    figures = {name: f"<svg>{name}</svg>".encode() for name in FIGURES}
    links = page(figures=figures).links
    inside = [base64.b64decode(link.partition(",")[2]).decode() for link in links if link.startswith("data:")]
    assert sorted(inside) == sorted(f"<svg>{name}</svg>" for name in FIGURES)


def test_smoke_stands_where_quality_is_shown_on_few_examples_and_nowhere_else() -> None:
    few = page(n=28).text
    rows = len(synthetic_run.quality())
    # The head of the summary, each cost of each ratio, each row of the tables, SDTP against three others at each ratio
    # for each of five panels, the figure's caption.
    assert few.count("smoke: n = 28") == 1 + 3 * 3 + rows + 45 + 1
    many = page(n=400).text
    assert "smoke" not in many
    assert many.count("n = 400") == 3 * 3 + rows + 45 + 1


def test_rows_of_every_split_are_counted_and_add_up() -> None:
    text = words(page().text)
    assert "Split n_total n_skipped n_left n_used Prompts cut train 1,503 3 1,452 48 7 test 56 0 0 56 0" in text


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
        data={**synthetic_run.data(), attack: attack},
        tests={attack: [500]},
        timed_on=attack,
        versions={"machine": attack},
    )
    assert parsed.tags.count("script") == len(page().scripts)
    assert parsed.tags.count("img") == len(FIGURES)
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
    # The table's own paired ratio: the quotient of the two medians would be 1.47.
    assert longest["end_to_end"] == pytest.approx(0.9 * 1.52 * 1.05)
    assert longest["cache_change"] == pytest.approx(1 / (1.52 * 1.05) - 1, abs=1e-6)
    assert longest["memory_change"] == pytest.approx(-0.1)  # paired as well: the quotient would be -0.08
    accuracy, _, loss = first["costs"]
    assert (accuracy["unpruned"], accuracy["difference"]["verdict"]) == (0.75, "no difference shown")
    assert (accuracy["best_other"]["method"], accuracy["beaten_by"]) == ("recent", [])
    assert loss["best_other"]["value"] == pytest.approx(3.1 + 2.5 * 0.1)
    text = words(page().text)
    assert "2,048 tokens: prefill 1.60×, 0.970 of the length bound; prompt and 16 new tokens 1.44×" in text
    assert "KV cache −37%, peak memory −10%" in text
    assert (
        "retrieval accuracy 0.650 [0.570, 0.730], unpruned 0.750: worse; against the best other method, Recent 0.250: "
        "better" in text
    )
    assert "135 million parameters" in text
    assert "28 retrieval prompts of 500 tokens, 28 continuation prompts of 480 tokens" in text


def test_verdicts_are_of_the_paired_differences_and_not_of_the_rows_intervals() -> None:
    quality = synthetic_run.quality()
    # Each row's own interval holds the unpruned value; each paired interval is 0.04 wide and leaves out 0.
    quality = quality.assign(ci_low=quality["value"] - 5, ci_high=quality["value"] + 5)
    costs = [card["costs"] for card in report.cards(synthetic_run.run(quality=quality))]
    assert [[cost["difference"]["verdict"] for cost in card] for card in costs] == [
        ["no difference shown"] * 3, ["worse"] * 3, ["worse"] * 3,
    ]  # fmt: skip
    rows = report.quality_tables(quality, synthetic_run.comparisons(quality))[0]["rows"]
    verdicts = {(row["method"], row["keep_ratio"]): row["difference"] and row["difference"]["verdict"] for row in rows}
    assert verdicts["unpruned", 1.0] is None
    assert verdicts["sdtp", 0.9] == "no difference shown"
    assert verdicts["recent", 0.9] == "worse"


def test_only_methods_that_sdtp_is_shown_to_be_worse_than_beat_it_and_the_oracle_is_no_method() -> None:
    quality = synthetic_run.quality()

    def at(method: str) -> pd.Series:
        return (quality["task"] == "continuation") & (quality["method"] == method) & (quality["keep_ratio"] == 0.9)

    quality.loc[at("recent"), "value"] = 3.05
    quality.loc[at("random"), "value"] = 3.04
    quality.loc[at("lastquery"), "value"] = 3.08  # 0.02 better, in an interval of 0.04 to both sides
    oracle = quality[quality["method"] == "sdtp"].assign(method="oracle", value=0.5)
    quality = pd.concat([quality, oracle])
    cost = report.cards(synthetic_run.run(quality=quality))[0]["costs"][2]
    assert [other["method"] for other in cost["beaten_by"]] == ["random", "recent"]
    assert "unpruned 3.10: no difference shown; beaten by Random 3.04, Recent 3.05 smoke" in words(
        page(quality=quality).text
    )
    # The same means with wider intervals: the best of them is named, and nothing is claimed.
    unclear = synthetic_run.comparisons(quality).assign(ci_low=-1.0, ci_high=1.0)
    text = words(page(quality=quality, comparisons=unclear).text)
    assert "against the best other method, Random 3.04: no difference shown" in text
    assert "beaten" not in text


def test_every_row_of_the_tables_is_shown() -> None:
    text = words(page().text)
    for label in (
        "Random 0.8 0 [0, 0.0800] 0 −0.750 [−0.790, −0.710] 0.0600 worse smoke: n = 28",
        "SDTP 0.9 0.750 [0.670, 0.830] 1.00 0 [−0.0400, +0.0400] 0.0600 no difference shown smoke: n = 28",
        "LastQuery 0.9 +0.400 [+0.360, +0.440] 0.0600 better smoke: n = 28",
        "Unpruned 1.0 512 0.907 [0.889, 0.934] 1 – – – – – 1.81",
        "SDTP 0.7 2,048 1.59 [1.56, 1.63] 2.69 [2.63] 2.77 0.970 0.0476 2.82 0.952 3.17",
        "SDTP 0.7 2,048 16 0.720 1.25 2.31 2.42 5",
        "SDTP 0.7 2,048 702 0.206 0.00205 33.5 MiB 1,049 MiB",
    ):
        assert label in text


def test_the_page_says_what_its_numbers_rest_on() -> None:
    text = words(page(reduction="signed").text)
    assert "2 rounds of warm-up, then 5 timed repeats of each pruned arm" in text.lower()
    assert "1 round of warm-up with the timed shapes" in words(page(warmup=1).text)
    assert "One prompt; magnitude of Σ gradient × input, summed" in text
    assert "SDTP's are those of one trained pruner: the training seed is fixed" in text
    assert "The values of Random's seeds are averaged example by example first" in text
    assert "with each layer cut to the token count the schedule leaves it: whole prefills" in text


def test_values_that_do_not_exist_are_dashes() -> None:
    unknown = ("decode_s", "decode_speedup", "peak_memory_bytes", "peak_memory_ratio")
    latency = synthetic_run.latency().assign(**dict.fromkeys(unknown, np.nan))
    text = page(latency=latency).text
    assert "nan" not in text.lower().replace("finance", "")
    assert "peak memory –" in text


def test_token_view_shades_each_token_by_the_stage_that_removed_it() -> None:
    row = {
        "id": "r-0", "task": "retrieval", "keep_ratio": 0.9, "prompt_tokens": 5,
        "kept": [[0, 2, 3, 4], [0, 3, 4], [0, 4]], "scores": [[5, 1, 4, 3, 2], [], [5, 3, None]],
        "pruned_text": "p", "unpruned_text": "u", "reference": "r",
    }  # fmt: skip
    parsed = page(generations=[row], tokens=["a", "b", "c", "d", "e"])
    shown = [token for token in parsed.tokens if len(token[0]) == 1]
    assert shown == [("a", "s3"), ("b", "s0"), ("c", "s1"), ("d", "s2"), ("e", "s3")]
    assert "removed before layer 7: 1" in parsed.text
    assert "2 of 5 tokens reach the last layer" in parsed.text
    assert parsed.scores == [[[5, 1, 4, 3, 2], [], [5, 3, None]]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": ["a"] * 119}, "generation r-0, keep_ratio 0.9: 120 tokens and 3 stages; accepted: the data's 119"),
        ({"layers": (4, 7)}, "the pruner's 2"),
        (
            {"generations": [{**row, "scores": [[1.0] * 120, [], [1.0] * 96]} for row in synthetic_run.generations()]},
            "generation r-0, keep_ratio 0.9: 120, 0, 96 scores; accepted: 120, 108, 97, one of each token that entered",
        ),
        ({"shown": "x"}, "generations: no row for id x"),
        (
            {"figures": {"saliency": b""}},
            "no sparsity.svg, foresight.svg, latency.svg, speedup.svg, quality.svg, training.svg",
        ),
        ({"latency": synthetic_run.latency().query("keep_ratio != 0.8")}, "no sdtp row for keep_ratio=0.8"),
    ],
)
def test_contradictions_and_gaps_are_named(changes: Any, match: Any) -> None:
    with pytest.raises(UserError, match=match):
        report.render(synthetic_run.run(**changes))


def test_a_page_that_would_be_too_large_is_refused() -> None:
    figures = dict.fromkeys(FIGURES, b"x" * 1110000)
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
