"""docs/add-a-scorer.md, followed: its class is a scorer, its tests pass, and its row stands in the table of quality."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

from sdtp.pruning import store
from tests.pruning.scorer_contract import CONTRACT
from tests.workflow.blocks import blocks, commands
from tests.workflow.project import ROOT, snakemake

PAGE = "docs/add-a-scorer.md"
BEFORE = "@dataclasses.dataclass(frozen=True)\nclass Saliency"
# Of the tests that the page names those that a new scorer can fail; the others have nothing to do with it.
ABOUT_SCORERS = "novelty or Novelty or names or asked or looks or manual"

pytestmark = pytest.mark.slow


def python_block(part: str) -> str:
    return next(block.text for block in blocks("python", page=PAGE) if part in block.text)


@pytest.mark.parametrize("clause", CONTRACT, ids=lambda clause: clause.__name__)
def test_the_pages_scorer_keeps_to_the_contract(
    tiny_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clause: Callable[..., None],
) -> None:
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(python_block("class Novelty"), PAGE, "exec"), vars(module))
    monkeypatch.setitem(store._PLAIN, "Novelty", module.Novelty)
    clause(module.Novelty(), tiny_model(), tmp_path)


@pytest.fixture
def followed(project: Path) -> Path:
    """The finished tiny run's project, changed as the page says."""
    source = project / "src" / "sdtp"
    block = python_block("class Novelty")
    written = block[block.index("@dataclasses") :] + "\n\n" + BEFORE
    edit(source / "pruning" / "scorers.py", '    "Learned",\n', '    "Learned",\n    "Novelty",\n')
    edit(source / "pruning" / "scorers.py", BEFORE, written)
    edit(source / "pruning" / "scorers.py", "HiddenNorm, LastQuery)\n", "HiddenNorm, LastQuery, Novelty)\n")
    edit(source / "evaluation" / "names.py", '"hiddennorm", "lastquery")', '"hiddennorm", "lastquery", "novelty")')
    schema = project / "workflow" / "schemas" / "config.schema.yaml"
    edit(schema, "hiddennorm, lastquery", "hiddennorm, lastquery, novelty")
    row = re.search(r'`("novelty": \(.*\),)`', (ROOT / PAGE).read_text(encoding="utf-8"))
    assert row is not None
    edit(source / "pipeline" / "plotstyle.py", '    "oracle": (', f'    {row[1]}\n    "oracle": (')
    manual = python(project, "workflow/scripts/config_manual.py").stdout
    assert manual.count("lastquery, novelty") == 3
    (project / "config" / "README.md").write_text(manual, encoding="utf-8")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=ignore, dirs_exist_ok=True)
    with (project / "tests" / "pruning" / "test_scorers.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + python_block("def test_"))
    return project


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done


def test_page_leads_to_passing_tests_and_a_row_in_the_table(followed: Path) -> None:
    lines = [command for block in blocks("bash", page=PAGE) for command in commands(block)]
    named = [word for line in lines if line.startswith(".venv/bin/pytest") for word in shlex.split(line)[1:]]
    assert "tests/pruning/test_every_scorer.py" in named
    told = python(followed, "-m", "pytest", "-v", "-p", "no:cacheprovider", *named, "-k", ABOUT_SCORERS).stdout
    assert "test_scorers.py::test_novelty_is_the_state_that_points_elsewhere PASSED" in told
    for clause in CONTRACT:
        assert re.search(rf"test_scorer_keeps_to_its_contract\[Novelty-{clause.__name__}\] PASSED", told)

    # What is there of the tiny run is left as it is: only what the scorer adds is made.
    changed = {"evaluation": {"methods": ["sdtp", "random", "novelty"]}}
    (followed / "more.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    table = "results/tiny/tables/quality.csv"
    added = ["--forcerun", "tables", "--rerun-triggers", "mtime"]
    snakemake(followed, table, *added, "--configfile", "tiny.yaml", "more.yaml")
    rows = (followed / table).read_text(encoding="utf-8").splitlines()
    assert sum(",novelty," in row for row in rows) == 2 * 7  # retrieval has four metrics, continuation three
