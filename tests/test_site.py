"""The documentation builds as a site, whole, and a link that leads nowhere stops it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

import sdtp
from sdtp import scorers

ROOT = Path(__file__).parents[1]
PARTS = ("mkdocs.yml", "CHANGELOG.md", "docs", "config/README.md", "results/README.md", "src")

pytestmark = pytest.mark.slow


def copy(folder: Path) -> Path:
    """What the site is made from, in a folder of its own."""
    for part in PARTS:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    scripts = sysconfig.get_path("scripts")
    return subprocess.run(
        [Path(scripts) / "zensical", "build", "--strict"],
        cwd=folder,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(tmp_path_factory.mktemp("site"))
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder / "site"


def in_navigation(entries: object) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for value in values for page in in_navigation(value)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_once(site: Path) -> None:
    pages = in_navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = ROOT / "docs"
    assert sorted(pages) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    for page in pages:
        assert (site / page).with_suffix(".html").exists()


def test_reference_describes_every_public_name(site: Path) -> None:
    page = (site / "library.html").read_text(encoding="utf-8")
    names = {*sdtp.__all__, *scorers.__all__, "pairwise_ranking"} - {"BASELINES", "flops", "scorers"}
    described = {name.rsplit(".", 1)[-1] for name in re.findall(r'<h[1-6] id="(sdtp\.[\w.]+)"', page)}
    assert names <= described
    assert {"prefill", "cache_bytes"} <= described
    text = re.sub(r"<[^>]+>", "", page)
    assert "Prune every prompt that model prefills inside the context" in text  # a docstring's first line


def test_configuration_and_results_are_the_generated_pages(site: Path) -> None:
    for page, words in (
        ("configuration", "training.question_rank"),
        ("results", "tables/quality.csv"),
        ("changes", "0.1.0"),
    ):
        assert words in (site / f"{page}.html").read_text(encoding="utf-8")


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", text), page
        assert not re.search(r"<link[^>]+rel=\"?(?:stylesheet|preconnect)\"?[^>]*href=\"?(?:https?:)?//", text), page


@pytest.mark.parametrize("link", ["nowhere.md", "method.md#nowhere", "../LICENSE.md"])
def test_broken_link_stops_the_build(tmp_path: Path, link: str) -> None:
    folder = copy(tmp_path)
    with (folder / "docs" / "index.md").open("a", encoding="utf-8") as file:
        file.write(f"\n[broken]({link})\n")
    done = build(folder)
    assert done.returncode != 0
    assert "does not exist" in done.stdout
