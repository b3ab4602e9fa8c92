"""Every code block of README, CONTRIBUTING and docs/: run, planned, or listed here with the reason why not.

Python runs, page by page, against random models in the place of results/default. Snakemake plans on the shipped
configurations. `sdtp` commands run on random models and a made-up run. Of make, pytest and scripts it is checked that
what is named exists. The page on scorers is followed by `test_add_a_scorer.py`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.cli import main
from sdtp.pipeline.block import Source
from sdtp.pipeline.records import read_records
from sdtp.pruning.fingerprint import fingerprint
from tests.pipeline.test_recommend_step import latency, write_run
from tests.workflow import tiny_model as tiny_folder
from tests.workflow.blocks import PAGES, Block, blocks, commands, existing, files, indented_code
from tests.workflow.project import ROOT, copy_project, job_counts, snakemake

pytestmark = pytest.mark.slow

# Beginning of a command -> why it is not run here. Each has to be the beginning of some command, or it goes.
NOT_RUN = {
    "apt-get install": "root, and a Debian mirror",
    "sinfo": "Slurm; tests/cluster",
    "srun": "Slurm; tests/cluster",
    ".venv/bin/python tests/cluster/slurm_cluster.py": "Slurm and root; tests/cluster",
    'eval "$(.venv/bin/python tests/cluster/slurm_cluster.py': "Slurm and root; tests/cluster",
    ".venv/bin/snakemake --workflow-profile profiles/slurm": "the Slurm plugin; tests/cluster",
    ".venv/bin/snakemake --workflow-profile profiles/kubernetes": "the Kubernetes plugin; tests/cluster",
    ".venv/bin/snakemake --cores all --default-storage-provider s3": "a bucket; tests/cluster/test_storage.py",
    "python3 -m venv /tmp/moto": "an environment for a server that stands in for S3; tests/cluster/conftest.py",
    'PATH="/tmp/moto/bin': "that server; tests/cluster/test_storage.py",
    ".venv/bin/pip install": "what it installs is not this project's environment",
    "export": "sets a variable for commands that are not run",
    ".venv/bin/mlflow server": "a server that stays; tests/pipeline/mlflow_server.py starts one",
    'eval "$(.venv/bin/register-python-argcomplete sdtp)"': "the user's shell; tests/test_completion.py",
    ".venv/bin/python benchmarks/": "minutes; tests/test_benchmarks.py and test_benchmark_saliency.py run small ones",
    ".venv/bin/sdtp doctor": "asks a hub; tests/pipeline/test_doctor.py",
    ".venv/bin/sdtp verify": "a minute each; tests/verification/test_verify.py, tests/pipeline/test_verify_step.py",
    ".venv/bin/sdtp tune-schedule": "held-out examples; tests/pipeline/test_tune_schedule_step.py",
    ".venv/bin/sdtp track sync": "uploads to the user's store; tests/pipeline/test_spool.py",
    ".venv/bin/sdtp score --predictions": "suites are not in the tiny run; tests/workflow/test_suites.py",
    ".venv/bin/sdtp-lm-eval": "minutes; tests/evaluation/test_harness.py runs the same tasks",
    ".venv/bin/snakemake results/novelty": "wants the page's scorer: test_add_a_scorer.py",
    "git diff": "of the user's own change",
}
# Python blocks that are not run, by a line of them.
PYTHON_NOT_RUN = {
    'TokenPruner.from_mlflow("models:/sdtp-SmolLM2': "a registered version; tests/pipeline/test_registry.py",
}
# What the pages name and only a reader has.
STAND_INS = {
    "/models/my-7b": "stand-ins/my-7b",
    "/models/new-model": "stand-ins/my-7b",
    "/data/LongBench": "stand-ins/longbench",
}


def shell() -> list[tuple[Block, str]]:
    return [(block, command) for block in blocks("bash") for command in commands(block)]


def reason(command: str) -> str | None:
    return next((why for beginning, why in NOT_RUN.items() if command.startswith(beginning)), None)


def chosen(*beginnings: str) -> list[object]:
    """The commands with one of the beginnings that are not listed; the same command of a page once."""
    found = {
        (block.page, command): pytest.param(block, command, id=f"{block}-{command[:40]}")
        for block, command in shell()
        if command.startswith(beginnings) and reason(command) is None
    }
    return list(found.values())


MAKE, SNAKEMAKE, SDTP, PYTEST, MODULE = (
    "make ", ".venv/bin/snakemake", ".venv/bin/sdtp ", ".venv/bin/pytest", ".venv/bin/python -m",
)  # fmt: skip


def test_every_block_has_a_language_and_every_command_is_run_or_listed() -> None:
    assert {block.language for block in blocks()} <= {"bash", "python", "yaml", "json", "text"}
    assert {
        page: found
        for page in PAGES
        if (found := [line for line in indented_code(page) if "/" in line or "--" in line])
    } == {}
    unknown = [
        f"{block}: {command}"
        for block, command in shell()
        if reason(command) is None and not command.startswith((MAKE, SNAKEMAKE, SDTP, PYTEST, MODULE))
    ]
    assert unknown == []


def test_nothing_is_listed_in_vain() -> None:
    every = [command for _, command in shell()]
    assert [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in every)] == []
    python = [block.text for block in blocks("python")]
    assert [part for part in PYTHON_NOT_RUN if not any(part in text for text in python)] == []


@pytest.mark.parametrize(("block", "command"), chosen(MAKE))
def test_make_has_the_target(block: Block, command: str) -> None:
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (block, done.stderr)


@pytest.mark.parametrize(("block", "command"), chosen(PYTEST, MODULE))
def test_named_tests_and_modules_exist(block: Block, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] == "-m" and command.startswith(MODULE):
        assert existing(words[1].replace(".", "/") + ".py"), block
        return
    markers = yaml.safe_load(json.dumps([line.split(":")[0] for line in _markers()]))
    while words:
        word = words.pop(0)
        if word == "-m":
            assert words.pop(0).removeprefix("not ") in markers, block
        elif word == "-k":
            words.pop(0)
        else:
            assert existing(word), block


def _markers() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', text.split("markers = [")[1].split("]")[0])


# --- Snakemake ---


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an empty clone has, and what the pages say that a reader has."""
    folder = copy_project(tmp_path_factory.mktemp("pages") / "sdtp")
    for name in ("tests/evaluation/harness_task", "stand-ins/my-7b", "stand-ins/longbench/data"):
        (folder / name).mkdir(parents=True)
    return folder


Plans = dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def plans(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plans]:
    """The output of every plan, by page and command; two at a time, each in a folder of its own."""

    def plan(page: str, command: str) -> subprocess.CompletedProcess[str]:
        folder = shutil.copytree(clone, tmp_path_factory.mktemp("plan") / "sdtp", symlinks=True)
        for name in ("train.jsonl", "test.jsonl"):
            rows = "".join(block.text for block in blocks("json", page="docs/own-data.md"))
            (folder / name).write_text(rows, encoding="utf-8")
        # my7b.yaml is of README; a page that has one of its own means that.
        for name, text in {**files("README.md"), **files(page)}.items():
            (folder / name).write_text(_stand_in(text), encoding="utf-8")
        return snakemake(folder, *shlex.split(command)[1:], "--dry-run", "--quiet", "rules", check=False)

    with ThreadPoolExecutor(2) as pool:
        yield {
            (block.page, command): pool.submit(plan, block.page, command)
            for block, command in shell()
            if command.startswith(SNAKEMAKE) and reason(command) is None
        }


@pytest.mark.parametrize(("block", "command"), chosen(SNAKEMAKE))
def test_snakemake_plans(plans: Plans, block: Block, command: str) -> None:
    done = plans[block.page, command].result()
    assert done.returncode == 0, done.stdout
    jobs = job_counts(done.stdout)
    assert jobs, done.stdout


def _stand_in(text: str) -> str:
    for theirs, ours in STAND_INS.items():
        text = text.replace(theirs, ours)
    return text


# --- sdtp ---


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results/default has a random model of as many layers as the default one, and a pruner for it."""
    folder = tmp_path_factory.mktemp("deep")
    results = folder / "results" / "default"
    (results / "tables").mkdir(parents=True)
    latency().to_csv(results / "tables" / "latency.csv", index=False)
    tiny_folder.make(folder / "tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-model")
    tokenizer.save_pretrained(results / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=30, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(results / "model")
    schedule = PruningSchedule.geometric(num_layers=30, start=4, step=3, ratio=0.8)
    learned = scorers.Learned(32, schedule.stages, 8, position=True, question_rank=16, neighbours=2, recency=0.25)
    TokenPruner(schedule, learned, fingerprint(model)).save_pretrained(results / "pruner")
    norm = PruningSchedule.geometric(num_layers=30, start=4, step=3, ratio=0.9)
    TokenPruner(norm, scorers.HiddenNorm()).save_pretrained(folder / "norm-pruner")
    (folder / "results" / "my7b").symlink_to("default")
    (folder / "stand-ins").mkdir()
    (folder / "stand-ins" / "my-7b").symlink_to("../results/default/model")
    # The pages read their own README; its beginning is prompt enough.
    (folder / "README.md").write_text((ROOT / "README.md").read_text(encoding="utf-8")[:3000], encoding="utf-8")
    prompt = next(b.text for b in blocks("text", page="docs/commands.md"))
    assert "李明" in prompt
    (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made_up_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results/default has been timed and evaluated, with enough examples."""
    folder = tmp_path_factory.mktemp("made-up")
    write_run(folder / "results" / "default")
    return folder


@pytest.mark.parametrize(("block", "command"), chosen(SDTP))
def test_sdtp_command_runs(
    made_up_run: Path, deep_model: Path, block: Block, command: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [_stand_in(word) for word in shlex.split(command)[1:]]
    monkeypatch.chdir(made_up_run if words[0] == "recommend" else deep_model)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    told = capsys.readouterr()
    # That no setting meets a target is an answer too, and an exit code of 1.
    answered = words[0] == "recommend" and code == 1 and "none: the closest" in told.out
    assert code == 0 or answered, (block, told.out, told.err)


@pytest.mark.parametrize("name", sorted({command.split()[1] for _, command in shell() if command.startswith(SDTP)}))
def test_options_of_sdtp_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of commands that are not run as well."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    used = {
        word
        for _, command in shell()
        if command.startswith(f"{SDTP}{name} ")
        for word in shlex.split(command)
        if word.startswith("--")
    }
    assert used <= known


# --- Python ---


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page=page)])
def test_python_of_a_page_runs(deep_model: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(deep_model)
    names = _module(monkeypatch)
    with torch.no_grad(), _one_thread():
        for block in blocks("python", page=page):
            if not any(part in block.text for part in PYTHON_NOT_RUN):
                # As many line breaks before it, so that a fault names the page's line.
                exec(compile("\n" * block.line + _stand_in(block.text), page, "exec"), names)


def _module(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of an empty module, where dataclasses find it."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", ["docs/method.md", "docs/semantics.md"])
def test_numbers_in_comments_are_what_is_printed(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python", page=page):
        exec(compile(block.text, page, "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        said = re.findall(r"print\(.*\)\s+# (.*)$", block.text, flags=re.MULTILINE)
        assert said
        for line, comment in zip(printed, said, strict=True):
            assert comment.startswith(line), (line, comment)


# --- files that the pages give ---


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_example_rows_are_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(block.text, encoding="utf-8")
    found = read_records(Source("jsonl", str(path), None, None), "data.train.source", "fail")
    assert len(found.records) == len(block.text.splitlines()) > 1
    assert found.records[0].prompt.endswith("When does the valve open?")


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)
