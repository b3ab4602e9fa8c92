"""What `uv build` makes, in an environment that has torch and transformers and nothing of the workflow."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ABSENT = ("snakemake", "mlflow", "pandas", "datasets", "jsonschema", "matplotlib", "accelerate", "scipy")

pytestmark = pytest.mark.slow

PROGRAM = f"""
import importlib.util, pathlib, sys, tempfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import sdtp
from sdtp import PruningSchedule, TokenPruner, flops, scorers

assert sys.prefix in sdtp.__file__, sdtp.__file__
found = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]
assert found == [], found
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)).eval()
schedule = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
ids = torch.randint(3, 64, (1, 40))
with tempfile.TemporaryDirectory() as folder:
    TokenPruner(schedule, scorers.Learned(32, 2, width=8)).save_pretrained(folder)
    pruner = TokenPruner.from_pretrained(folder)
with pruner(model) as trace:
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
assert out.shape == (1, 43) and [kept.shape[1] for kept in trace.kept] == [24, 12]
assert flops.prefill(model.config, 40, schedule) < flops.prefill(model.config, 40)
print(sdtp.__version__)
"""

TYPED = """
from typing import assert_type

from sdtp import PruningSchedule, TokenPruner, scorers

schedule = PruningSchedule.geometric(num_layers=4, start=1, step=1, ratio=0.9)
assert_type(schedule.surviving(100), list[int])
TokenPruner(schedule, scorers.Recent())
TokenPruner(schedule, "recent")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution that it is made from."""
    folder = tmp_path_factory.mktemp("dist")
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    done = subprocess.run(
        [uv, "build", "--out-dir", folder, ROOT],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def requirements(*names: str) -> Iterator[importlib.metadata.Distribution]:
    """The distributions of these names and all that they require on this machine, without extras."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        yield found
        needed = [Requirement(line) for line in found.requires or []]
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment: the wheel's files, and links to what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    site = Path(where)
    with zipfile.ZipFile(wheel(built)) as archive:
        archive.extractall(site)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needed = importlib.metadata.Distribution.at(site / metadata.split("/")[0]).requires or []
    plain = [one.name for one in map(Requirement, needed) if one.marker is None]
    assert sorted(plain) == ["safetensors", "torch", "transformers"]
    for distribution in requirements(*plain):
        for top in {path.parts[0] for path in distribution.files or [] if path.parts[0] not in ("..", "__pycache__")}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return python


def test_wheel_prunes_with_torch_and_transformers_alone(environment: Path, tmp_path: Path) -> None:
    done = subprocess.run([environment, "-I", "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == importlib.metadata.version("sdtp")


def test_type_hints_of_the_wheel_are_seen(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TYPED, encoding="utf-8")
    # What torch and transformers are made of is not looked at: it takes mypy minutes.
    settings = (
        "[mypy]\n[mypy-torch.*,transformers.*,safetensors.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
    )
    (tmp_path / "mypy.ini").write_text(settings, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", environment, "program.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(found) == 1, done.stdout + done.stderr
    assert 'program.py:9: error: Argument 2 to "TokenPruner" has incompatible type "str"; expected "Scorer"' in found[0]


def test_wheel_has_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(wheel(built)) as archive:
        names = set(archive.namelist())
    package = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "sdtp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "sdtp/py.typed" in package
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == package
    assert {name.split(".dist-info/")[1] for name in info} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_source_distribution_has_what_a_clone_has(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Snakefile", "config/config.yaml", "mkdocs.yml"}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".venv/", ".snakemake/", "results/default/", "site/"))]
