"""The code hash sees every edit that can change a step's result, and no other.

`python -m tests.pipeline.test_codehash` writes the table of modules and the steps they rerun anew; read the difference
before committing it.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdtp.pipeline.codehash import NEUTRAL, READS, code_hash, dump, modules_of

SOURCE = Path(__file__).parents[2] / "src" / "sdtp"
TABLE = Path(__file__).with_name("modules_and_steps.yaml")
STEPS = sorted(path.stem for path in (SOURCE / "pipeline" / "steps").glob("*.py") if path.stem != "__init__")

# Runs on a copy of the package: edits each module in turn and prints which steps' hashes differ.
EDIT_EACH = """
import functools, json, sys
from pathlib import Path
from sdtp.pipeline import codehash

root, edit, steps = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
digest, known = codehash._module_digest.__wrapped__, {}  # of all modules but the edited one, which would take minutes
codehash._module_digest = lambda module: known.get(module) or known.setdefault(module, digest(module))
codehash.modules_of = functools.cache(codehash.modules_of)  # no edit imports anything
hashes = lambda: {step: codehash.code_hash(f"sdtp.pipeline.steps.{step}") for step in steps}
before, changed = hashes(), {}
for path in sorted((root / "sdtp").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    source = path.read_text()
    reworded = source.replace('\"\"\"', '\"\"\"Reworded: ', 1) + "\\n# said\\n"
    path.write_text({"statement": source + "\\nEDITED = 1\\n", "words": reworded}[edit])
    known.pop(name, None)
    after = hashes()
    path.write_text(source)
    known.pop(name, None)
    changed[name] = [step for step in steps if after[step] != before[step]]
print(json.dumps(changed))
"""


def modules() -> list[str]:
    """Every module of the package, packages included."""
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def table() -> dict[str, str]:
    """Module -> the steps whose hash it is part of."""
    used = {step: modules_of(f"sdtp.pipeline.steps.{step}") for step in STEPS}
    return {module: " ".join(step for step in STEPS if module in used[step]) for module in modules()}


def edit_each(copy: Path, edit: str) -> dict[str, list[str]]:
    shutil.copytree(SOURCE, copy / "sdtp", ignore=shutil.ignore_patterns("__pycache__"))
    process = subprocess.run(
        [sys.executable, "-c", EDIT_EACH, str(copy), edit, ",".join(STEPS)],
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=True,
    )
    changed = json.loads(process.stdout)
    assert isinstance(changed, dict)
    return changed


def test_table_of_modules_and_steps_is_pinned() -> None:
    assert table() == yaml.safe_load(TABLE.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_edited_statement_changes_exactly_the_steps_of_the_table(tmp_path: Path) -> None:
    assert {module: " ".join(steps) for module, steps in edit_each(tmp_path, "statement").items()} == table()


@pytest.mark.slow
def test_edited_words_change_no_step(tmp_path: Path) -> None:
    changed = edit_each(tmp_path, "words")
    assert list(changed) == modules()
    assert not any(changed.values())


def test_command_line_decides_no_step() -> None:
    # It imports every step: were it counted, any edit would rerun everything.
    assert "sdtp.cli" in NEUTRAL
    assert all(module not in modules_of(f"sdtp.pipeline.steps.{step}") for step in STEPS for module in NEUTRAL)


# What turns a prediction into a score.
SCORING = {
    "sdtp.evaluation.longbench.metrics",
    "sdtp.evaluation.longbench.scoring",
    "sdtp.evaluation.ruler.scoring",
    "sdtp.evaluation.suites",
}


def test_mended_metric_makes_scores_anew_and_nothing_that_a_model_is_needed_for() -> None:
    assert modules_of("sdtp.pipeline.steps.score") >= SCORING
    for step in ("predict", *(step for step in STEPS if step.endswith("_data"))):
        assert not SCORING & modules_of(f"sdtp.pipeline.steps.{step}"), step
    # Nor are prompts written anew for a change of how they are answered.
    for step in ("longbench_data", "ruler_data"):
        assert "sdtp.evaluation.generation" not in modules_of(f"sdtp.pipeline.steps.{step}")


def test_neutral_modules_exist() -> None:
    assert set(modules()) >= NEUTRAL


def test_every_data_file_of_the_package_counts_somewhere() -> None:
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    data = {name for name in found if not name.endswith(".py")} - {"py.typed"}
    assert data == {name for names in READS.values() for name in names}


def test_another_python_has_the_same_hash() -> None:
    tree = ast.parse("class A:\n    def f(self, x=None, *, y=[]):\n        return {**x, 'a': f'{y!r:>{x}}'}\n")
    text = dump(tree)
    for node in ast.walk(tree):  # as 3.12 gave functions and classes their `type_params`
        node._fields = (*node._fields, "later", "later_list")
        node.later, node.later_list = None, []  # type: ignore[attr-defined]
    assert dump(tree) == text


@pytest.mark.parametrize("head", ["", "class A:", "def f():", "async def f():"])
def test_docstrings_are_no_code_and_other_strings_are(head: str) -> None:
    def text(*lines: str) -> str:
        return dump(ast.parse(head + "".join(f"\n{' ' * bool(head)}{line}" for line in lines)))

    assert text("'one'", "x = 'two'") == text("x = 'two'")
    assert text("x = 'two'", "'one'") != text("x = 'two'")


@pytest.mark.parametrize(("one", "other"), [("x = None", "x = 0"), ("f()", "f(None)"), ("f([])", "f(())"), ("x", "y")])
def test_other_code_is_other_text(one: str, other: str) -> None:
    assert dump(ast.parse(one)) != dump(ast.parse(other))


def test_unknown_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"module sdtp\.pipeline\.steps\.trian does not exist"):
        code_hash("sdtp.pipeline.steps.trian")


if __name__ == "__main__":
    TABLE.write_text(yaml.safe_dump(table(), sort_keys=False, width=200), encoding="utf-8")
