"""The MLflow pages a person opens with `make ui`, in a real browser, over a store that two real steps wrote."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtp.pipeline.step import step
from sdtp.pipeline.tracking import finish_pipeline, start_pipeline

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from tests.pipeline.browser import MARKS, PATIENCE, chromium  # noqa: E402

pytestmark = MARKS

STEPS = ("train keep_ratio=0.9", "train keep_ratio=0.8")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder with a pipeline's run and two steps' runs in it."""
    folder = tmp_path / "results" / "default"
    for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDTP_PARENT_RUN_FILE", str(folder / "mlflow-parent.json"))
    start_pipeline(folder, {"run": "default"}, "sdtp", None)
    for ratio, tau in ((0.9, 0.6125), (0.8, 0.5375)):
        args = argparse.Namespace(settings='{"seed":0}', metrics=folder / f"metrics/train-{ratio}.json")
        with step("train", args, outputs=[folder / f"out-{ratio}"], wildcards={"keep_ratio": ratio}) as log:
            log.metric("tau", tau)
            for at in range(5):
                log.metric("heldout/tau", tau * at / 4, step=10 * at)
    finish_pipeline(folder, "FINISHED")
    return folder.parent


@pytest.fixture
def address(results: Path) -> Iterator[str]:
    """The address of a server started as `make ui` starts it; it answers from the moment the test begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "timeout",
        "300",
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        "sqlite:///results/mlflow.db",
    ]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=results.parent,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its workers are stopped with it
    )
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "startup complete" in line:
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(said))
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path / "profile") as driver:
        yield driver


def shows(browser: webdriver.Chrome, *texts: str) -> None:
    """Waits until the page shows all of `texts`."""
    WebDriverWait(browser, PATIENCE).until(
        lambda page: all(text in page.find_element(By.TAG_NAME, "body").text for text in texts),
        message=f"{texts} not all on {browser.current_url}",
    )


def row_of(browser: webdriver.Chrome, run: str) -> WebElement:
    """The row of a run, found by its link, in the list of runs."""
    return browser.find_element(By.XPATH, f"//div[@role='row'][.//a[contains(., '{run}')]]")


@pytest.fixture
def runs(address: str, browser: webdriver.Chrome) -> webdriver.Chrome:
    """The list of runs, in which the pipeline's steps are unfolded."""
    with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE) as answer:
        assert answer.status == 200
    browser.get(f"{address}/#/experiments/1/runs")
    shows(browser, "pipeline default")
    # The first button of the pipeline's row unfolds its steps.
    row_of(browser, "pipeline default").find_element(By.TAG_NAME, "button").click()
    shows(browser, *STEPS)
    return browser


def test_a_person_finds_the_runs_and_a_metric(runs: webdriver.Chrome) -> None:
    runs.find_element(By.PARTIAL_LINK_TEXT, "train keep_ratio=0.8").click()
    shows(runs, "tau", "0.5375")


def test_a_person_compares_two_pruners(runs: webdriver.Chrome) -> None:
    for step_name in STEPS:
        row_of(runs, step_name).find_element(By.XPATH, ".//input[@type='checkbox']").click()
    runs.find_element(By.XPATH, "//button[contains(., 'Compare')]").click()
    shows(runs, "Comparing 2 Runs", *STEPS, "0.613", "0.538")
    # What differs beside the numbers.
    shows(runs, '{"keep_ratio":0.9}', '{"keep_ratio":0.8}')
    runs.find_element(By.LINK_TEXT, "heldout/tau").click()
    shows(runs, *(f"{step_name} (heldout/tau)" for step_name in STEPS), "0.6125 (step=40)", "0.5375 (step=40)")
    curves = WebDriverWait(runs, PATIENCE).until(
        lambda page: [
            line
            for line in page.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace path.js-line")
            if line.get_attribute("d")
        ]
    )
    # Each from the axis upwards, of the height that the metric has.
    heights = {round(line.size["height"]) for line in curves}
    assert len(heights) == 2
    assert max(heights) / min(heights) == pytest.approx(0.6125 / 0.5375, abs=0.03)
