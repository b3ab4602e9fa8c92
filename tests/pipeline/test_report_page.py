"""The report and the paper's page in a real browser, on a phone and on a desk, in the light and in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sdtp.pipeline import report
from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.paper.page import render_html
from tests.pipeline import synthetic_run
from tests.pipeline.paper import test_page

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from tests.pipeline.browser import MARKS, PATIENCE, chromium  # noqa: E402

pytestmark = MARKS

PHONE, DESK = (390, 844), (1400, 900)
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 400" width="800" height="400">'
    b'<rect width="800" height="400" fill="#0072b2"/></svg>'
)
TOKENS = synthetic_run.tokens()
# Contrast of each element's text with what lies behind it (WCAG 2.2), colours laid over each other by the browser.
CONTRAST = """
const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const over = (colours) => {
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  const light = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
};
return [...document.querySelectorAll(arguments[0])].map((element) => {
  const behind = [];
  for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
  const lights = [over(behind), over([...behind, getComputedStyle(element).color])].sort((one, other) => other - one);
  return (lights[0] + 0.05) / (lights[1] + 0.05);
});
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


class Opened:
    """A page in the browser."""

    def __init__(self, driver: webdriver.Chrome, path: Path) -> None:
        self.driver = driver
        self.path = path

    def open(self, size: tuple[int, int] = DESK, scheme: str = "light") -> Opened:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.path.as_uri())
        return self

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    @property
    def is_too_wide(self) -> bool:
        return bool(self.run("const page = document.documentElement; return page.scrollWidth > page.clientWidth"))

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def column(self, table: str, number: int) -> list[str]:
        """The cells of a column of a table, from 1."""
        return [cell.text for cell in self.all(f"{table} tbody tr td:nth-child({number}):not([colspan])")]

    def tokens(self, kind: str) -> list[int]:
        """Positions of the tokens of a class, in the first token view."""
        query = (
            "return [...document.querySelector('.tokens').children].map((one) => one.classList.contains(arguments[0]))"
        )
        return [position for position, is_one in enumerate(self.run(query, kind)) if is_one]

    def until(self, condition: Any) -> None:
        WebDriverWait(self.driver, PATIENCE).until(lambda _: condition())


@pytest.fixture
def opened(driver: webdriver.Chrome, tmp_path: Path) -> Opened:
    """The report, opened from disk on a desk."""
    path = tmp_path / "report.html"
    path.write_text(report.render(synthetic_run.run(figures=dict.fromkeys(FIGURES, SVG))), encoding="utf-8")
    return Opened(driver, path).open()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_page_fits_can_be_read_and_asks_for_nothing(opened: Opened, size: tuple[int, int], scheme: str) -> None:
    opened.open(size, scheme)
    assert not opened.is_too_wide
    assert opened.driver.get_log("browser") == []
    loaded = opened.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    dark = opened.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    texts = ["p", "nav a", "td", "th", "figcaption", ".smoke", ".legend span", ".tokens span", ".sort", "output"]
    contrast = {text: min(opened.run(CONTRAST, text)) for text in texts}
    opened.one("input[type=search]").send_keys("union")
    opened.one(".after input").send_keys(Keys.ARROW_RIGHT)
    texts = [".hit", ".here", ".going", ".find button"]
    contrast |= {text: min(opened.run(CONTRAST, text)) for text in texts}
    assert min(contrast.values()) >= 4.5, contrast
    # A wide table moves within itself, and what a row is about stays in sight.
    table = opened.one("#speed .scroll")
    opened.run("arguments[0].scrollLeft = 9999", table)
    moved = opened.run("return arguments[0].scrollLeft", table)
    assert (moved > 300) == (size == PHONE)
    first = opened.run("return arguments[0].querySelector('tbody td').getBoundingClientRect().left", table)
    assert first == opened.run("return arguments[0].getBoundingClientRect().left", table)


def test_tables_sort_by_value_and_go_back(opened: Opened) -> None:
    table = "#speed .scroll:nth-of-type(1) table"
    head, button = opened.one(f"{table} th:nth-child(5)"), opened.one(f"{table} th:nth-child(5) button")
    before = opened.column(table, 5)
    assert before[:3] == ["1", "1.54 [1.51]", "2.07 [2.02]"]
    values = sorted(float(cell.split()[0]) for cell in before)
    button.click()
    assert [float(cell.split()[0]) for cell in opened.column(table, 5)] == values
    assert head.get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.ENTER)
    assert [float(cell.split()[0]) for cell in opened.column(table, 5)] == values[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    assert opened.column(table, 5) == before
    assert head.get_attribute("aria-sort") is None
    # By value, not by letter, and what has none stays last both ways.
    lengths = opened.one(f"{table} th:nth-child(3) button")
    lengths.click()
    lengths.click()
    assert opened.column(table, 3) == ["2,048"] * 4 + ["1,024"] * 4 + ["512"] * 4
    bound = opened.one(f"{table} th:nth-child(6) button")
    for _ in range(2):
        bound.click()
        assert opened.column(table, 6)[-3:] == ["–"] * 3
    assert lengths.find_element(By.XPATH, "..").get_attribute("aria-sort") is None


def test_columns_of_words_signs_and_counts_sort(opened: Opened) -> None:
    table = "#quality .scroll:nth-of-type(1) table"
    opened.one(f"{table} th:nth-child(1) button").click()
    names = opened.column(table, 1)
    assert names == sorted(names)
    assert len(set(names)) == 5
    opened.one(f"{table} th:nth-child(5) button").click()
    values = [float(cell.split()[0].replace("−", "-")) for cell in opened.column(table, 5)[:-1]]
    assert values == sorted(values)
    assert values[0] == -0.75
    cells = opened.all(f"{table} td:nth-child(8)")
    for cell, count in zip(cells, ["n = 100", "smoke: n = 9", *["n = 1,000"] * 11], strict=True):
        opened.run("arguments[0].textContent = arguments[1]", cell, count)
    opened.one(f"{table} th:nth-child(8) button").click()
    assert opened.column(table, 8)[:3] == ["smoke: n = 9", "n = 100", "n = 1,000"]


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_figures_enlarge(opened: Opened, size: tuple[int, int]) -> None:
    opened.open(size)
    button = opened.one("#quality .enlarge")
    assert button.accessible_name == "Enlarge: Quality against measured prefill speedup"
    small = opened.one("#quality figure img").rect
    assert 0 <= small["x"] <= small["x"] + small["width"] <= size[0]  # whole, also where it is small
    button.send_keys(Keys.ENTER)
    dialog, large = opened.one("dialog"), opened.one("dialog img").rect
    assert dialog.is_displayed()
    assert large["width"] > 1.2 * small["width"]
    assert large["width"] / large["height"] == pytest.approx(2, rel=0.01)
    box = opened.run("return document.querySelector('dialog').getBoundingClientRect().toJSON()")
    assert 0 <= box["left"] < box["right"] <= size[0]
    assert 0 <= box["top"] < box["bottom"] <= size[1]
    ActionChains(opened.driver).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert opened.run("return document.activeElement") == button


def test_slider_shows_what_was_left_after_each_stage(opened: Opened) -> None:
    kept = synthetic_run.generations()[0]["kept"]
    slider, said = opened.one(".after input"), opened.one(".after output")
    assert slider.accessible_name == "What was left"
    assert said.text == "all 120 tokens"
    assert opened.tokens("gone") + opened.tokens("going") == []
    for stage, layer in enumerate(synthetic_run.LAYERS):
        slider.send_keys(Keys.ARROW_RIGHT)
        removed = [position for position in range(120) if position not in kept[stage]]
        assert sorted(opened.tokens("gone") + opened.tokens("going")) == removed
        now = [position for position in removed if stage == 0 or position in kept[stage - 1]]
        assert opened.tokens("going") == now
        left = f"{len(kept[stage])} of 120 tokens left after stage {stage + 1}"
        assert said.text == f"{left}, before layer {layer}; {len(now)} removed there"
        assert slider.get_attribute("aria-valuetext") == said.text
    slider.send_keys(Keys.HOME)
    assert opened.tokens("gone") + opened.tokens("going") == []


def test_pointing_at_a_token_shows_its_scores(opened: Opened) -> None:
    kept = synthetic_run.generations()[0]["kept"]
    # Scores are 100 times the stage, and the position: ranks count from the end of those that entered.
    entered = [list(range(120)), *kept[:-1]]
    removed_last = next(position for position in kept[1] if position not in kept[2])
    lines = [
        f"{layer} {100 * stage + removed_last} "
        f"{len(entered[stage]) - entered[stage].index(removed_last)} of {len(entered[stage])} "
        f"{'removed' if stage == 2 else 'kept'}"
        for stage, layer in enumerate(synthetic_run.LAYERS)
    ]
    token, card = opened.all(".tokens span")[removed_last], opened.one("#scores")
    assert not card.is_displayed()
    ActionChains(opened.driver).move_to_element(token).perform()
    opened.until(card.is_displayed)
    assert card.text.splitlines() == [
        TOKENS[removed_last], f"token {removed_last + 1} of 120, removed before layer 10",
        "Before layer Score Rank", *lines,
    ]  # fmt: skip
    ActionChains(opened.driver).move_to_element(opened.one("#tokens summary")).perform()
    opened.until(lambda: not card.is_displayed())


def test_arrow_keys_go_from_token_to_token(opened: Opened) -> None:
    box, card = opened.one(".tokens"), opened.one("#scores")
    box.send_keys(Keys.ARROW_RIGHT)
    assert "token 1 of 120" in card.text
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "token 2 of 120" in card.text
    assert opened.tokens("pointed") == [1]
    box.send_keys(Keys.ESCAPE)
    assert not card.is_displayed()
    box.send_keys(Keys.ARROW_LEFT)
    assert "token 120 of 120, never removed" in card.text
    opened.run("scrollTo(0, 0)")  # the token leaves, and its scores with it
    opened.until(lambda: not card.is_displayed())


@pytest.mark.parametrize("size", [PHONE, DESK, (500, 180)], ids=["phone", "desk", "low"])
def test_scores_are_whole_in_the_window_wherever_their_token_is(opened: Opened, size: tuple[int, int]) -> None:
    opened.open(size)
    for index, block in product((0, 8, 60, 119), ("center", "end")):
        token = opened.all(".tokens span")[index]
        opened.run("arguments[0].scrollIntoView({block: arguments[1]}); arguments[0].click()", token, block)
        box = opened.run("return document.getElementById('scores').getBoundingClientRect().toJSON()")
        assert 0 <= box["left"] < box["right"] <= size[0]
        assert 0 <= box["top"] < box["bottom"] <= size[1]


def test_search_finds_what_spans_tokens(opened: Opened) -> None:
    field, said = opened.one("input[type=search]"), opened.one(".find output")
    previous, following = opened.all(".find button")
    field.send_keys("CODE of harb")
    starts = [at for at in range(118) if TOKENS[at : at + 3] == [" code", " of", " Harbour"]]
    assert len(starts) == 7
    assert opened.tokens("hit") == [at + step for at in starts for step in range(3)]
    assert opened.tokens("here") == [starts[0] + step for step in range(3)]
    assert said.text == "1 of 7"
    shown = opened.one(".tokens .here").rect["y"] - opened.run("return scrollY")
    assert 0 < shown < DESK[1]
    following.click()
    field.send_keys(Keys.ENTER)
    assert opened.tokens("here")[0] == starts[2]
    previous.click()
    field.send_keys(Keys.SHIFT, Keys.ENTER)
    assert (opened.tokens("here")[0], said.text) == (starts[0], "1 of 7")
    field.clear()
    field.send_keys("harbour\n")  # the field has no lines: the word alone
    assert said.text == "2 of 7"
    field.send_keys(" of")
    assert (opened.tokens("hit"), said.text) == ([], "not found")
    assert not following.is_enabled()


def test_only_the_pages_own_scripts_run(opened: Opened) -> None:
    html = opened.path.read_text("utf-8")
    opened.path.write_text(html.replace("</body>", "<script>document.title = 'taken'</script></body>"), "utf-8")
    opened.open()
    assert opened.driver.title == "SDTP report: synthetic"
    assert "Content Security Policy" in opened.driver.get_log("browser")[0]["message"]
    assert opened.all(".sort")  # and the others do


def test_without_scripts_everything_is_there_but_the_controls(opened: Opened) -> None:
    opened.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened.open()
        assert opened.all(".sort") == []
        shown = [one for one in opened.all("input, button, output, #scores") if one.is_displayed()]
        assert shown == []
        assert all(opened.one(part).is_displayed() for part in ("#speed table", "#quality img", ".tokens span"))
    finally:
        opened.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_remarks_of_the_papers_page_stay_with_their_rows(driver: webdriver.Chrome, tmp_path: Path) -> None:
    path = tmp_path / "paper.html"
    path.write_text(render_html(test_page.paper("Mistral-7B")), encoding="utf-8")
    opened = Opened(driver, path).open(PHONE)
    assert not opened.is_too_wide
    table = "#table-3 table"
    rows = [row.text.split()[0] for row in opened.all(f"{table} tbody tr")]
    assert rows == ["copa", "piqa", "not"]
    opened.one(f"{table} th:nth-child(2) button").click()
    opened.one(f"{table} th:nth-child(2) button").click()
    assert [row.text.split()[0] for row in opened.all(f"{table} tbody tr")] == ["piqa", "not", "copa"]
    assert opened.driver.get_log("browser") == []
