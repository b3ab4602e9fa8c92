"""The train step as two processes, as the rule starts it where there are GPUs; here on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtp.errors import UserError
from sdtp.pipeline import launch
from sdtp.pipeline.steps import train
from tests.pipeline.saliency_run import index_of, make_run, shard
from tests.pipeline.test_training_steps import TRAIN
from tests.training.several import make_model

# What `sdtp train` does with two GPUs: it becomes the launcher of its own command line.
LAUNCHER = """
import sys
from sdtp import cli
from sdtp.pipeline import launch
from sdtp.pipeline.steps import train
def main(argv):
    train.torch.cuda.device_count = lambda: 2
    step(argv)
step, train.main = train.main, main
sys.exit(cli.main())
"""
TWO = {**TRAIN, "training": {**TRAIN["training"], "steps": 3, "batch_size": 3, "label_epochs": 2}}
SHARDED = {**TWO, "training": {**TWO["training"], "shard_model": True}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, data and labels."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
            patch.delenv(name, raising=False)
        make_run(folder, make_model(), [20 + number for number in range(5)])
        index_of(folder, [shard(folder, 0), shard(folder, 1)])
    return folder


def arguments(inputs: Path, run: Path, settings: dict = TWO) -> list[str]:
    read = ["--model", inputs / "model", "--data", inputs / "data", "--saliency", inputs / "saliency" / "index.json"]
    write = ["--output", run / "pruner", "--history", run / "history.csv", "--metrics", run / "metrics.json"]
    options = ["--settings", json.dumps(settings), "--code", "c" * 64, "--checkpoints", run / "checkpoints"]
    return [str(part) for part in [*options, *read, *write]]


def run_train(
    starter: list[str], inputs: Path, run: Path, settings: dict, threads: int, path: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "SDTP"))}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))  # as Snakemake gives both
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(run)}
    environment["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    command = ["--log", str(run / "train.log"), "train", "--processes", "2", *arguments(inputs, run, settings)]
    return subprocess.run(
        [sys.executable, *starter, *command], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def start(inputs: Path, run: Path, settings: dict = TWO, path: str = "") -> subprocess.CompletedProcess[str]:
    """Through the launcher of the rule, which shares the threads out."""
    return run_train(["-c", LAUNCHER], inputs, run, settings, threads=2, path=path)


def start_where_the_second_runs(
    code: str, inputs: Path, run: Path, settings: dict = TWO
) -> subprocess.CompletedProcess[str]:
    """`start`, and as the second process begins it runs some code, which has `os`."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    (run / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n{body}\n")
    return start(inputs, run, settings, path=str(run))


def accelerate_launch(option: str, inputs: Path, run: Path) -> subprocess.CompletedProcess[str]:
    """As docs/training.md says; each process has all the threads."""
    starter = ["-m", "accelerate.commands.accelerate_cli", "launch", option, "--num_processes", "2"]
    return run_train([*starter, "--main_process_port", "0", "-m", "sdtp.cli"], inputs, run, TWO, threads=1)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    run = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "SDTP_TRACKING_URI", "SDTP_PARENT_RUN_FILE"):
            patch.delenv(name, raising=False)
        train.main(arguments(inputs, run))
    return run


@pytest.fixture(scope="module")
def both(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write that the rule's launcher started; in `threads` how many the second one computed with."""
    run = tmp_path_factory.mktemp("both")
    told = f"open({str(run / 'threads')!r}, 'w').write(str(__import__('torch').get_num_threads()))"
    done = start_where_the_second_runs(f"import atexit\natexit.register(lambda: {told})", inputs, run)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def sharded(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes write that share one model's layers."""
    run = tmp_path_factory.mktemp("sharded")
    done = start(inputs, run, SHARDED)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def assert_same(found: Path, expected: Path) -> None:
    """The same pruner and curves, but for the order of sums."""
    mine, theirs = (load_file(run / "pruner" / "pruner.safetensors") for run in (found, expected))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    rows = [
        [line.split(",") for line in (run / "history.csv").read_text().splitlines()[1:]] for run in (expected, found)
    ]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]
    for (*_, name, value), (*_, other) in zip(*rows, strict=True):
        assert float(other) == pytest.approx(float(value), rel=1e-4 if name == "gradient_norm" else 1e-5)


@pytest.mark.slow
def test_processes_share_the_threads_of_the_job(both: Path) -> None:
    assert (both / "threads").read_text() == "1"  # of the job's two


@pytest.mark.slow
def test_two_processes_write_one_pruner_that_is_one_processs(alone: Path, both: Path) -> None:
    assert_same(both, alone)
    log = (both / "train.log").read_text().splitlines()
    assert sum(line.startswith("sdtp ") for line in log) == 1  # the main process's; the others say nothing
    assert sum("train: done in" in line for line in log) == 2  # the main process, and what launched it
    assert json.loads((both / "metrics.json").read_text())["heldout_kl"] > 0


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_pruner_for_the_same_model(alone: Path, sharded: Path) -> None:
    assert_same(sharded, alone)
    # It has the fingerprint of the model that it was trained for.
    assert (sharded / "pruner" / "pruner.json").read_bytes() == (alone / "pruner" / "pruner.json").read_bytes()


@pytest.mark.usefixtures("no_tracking")
def test_one_process_has_nothing_to_shard(inputs: Path, alone: Path, tmp_path: Path) -> None:
    train.main(arguments(inputs, tmp_path, SHARDED))
    assert (tmp_path / "history.csv").read_bytes() == (alone / "history.csv").read_bytes()


@pytest.mark.slow
def test_accelerate_launch_gives_what_the_rules_launcher_gives(inputs: Path, both: Path, tmp_path: Path) -> None:
    done = accelerate_launch("--multi_gpu", inputs, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("pruner/pruner.safetensors", "pruner/pruner.json", "history.csv"):
        assert (tmp_path / name).read_bytes() == (both / name).read_bytes(), name
    log = (tmp_path / "train.log").read_text().splitlines()
    assert sum(line.startswith("sdtp ") for line in log) == 1
    assert sum("train: done in" in line for line in log) == 1


@pytest.mark.slow
def test_sharding_that_accelerate_is_told_of_is_refused_with_the_key_that_asks_for_it(
    inputs: Path, tmp_path: Path
) -> None:
    done = accelerate_launch("--use_fsdp", inputs, tmp_path)
    assert done.returncode == 1
    told = [line for line in (tmp_path / "train.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "--use_fsdp" in told[0]
    assert told[0].endswith("and set training.shard_model to true")
    assert done.stderr.count(told[0]) == 1
    assert not (tmp_path / "pruner").exists()


@pytest.mark.slow
def test_a_failure_of_another_process_is_in_the_log_with_its_rank(inputs: Path, tmp_path: Path) -> None:
    done = start_where_the_second_runs(
        """
        from sdtp.errors import UserError
        from sdtp.pipeline import devices
        def fail():
            raise UserError('its GPU is gone')
        devices.choose_device = fail
        """,
        inputs,
        tmp_path,
    )
    assert done.returncode == 1
    told = "process 1 of 2: error: its GPU is gone"
    assert done.stderr.splitlines().count(told) == 1
    log = (tmp_path / "train.log").read_text().splitlines()
    assert log[0].startswith("sdtp ")
    assert log[1:] == [told]


@pytest.mark.slow
def test_a_failure_is_told_once(inputs: Path, tmp_path: Path) -> None:
    settings = {**TWO, "pruning": {**TWO["pruning"], "start": 2}}
    done = start(inputs, tmp_path, settings=settings)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "layers is [1, 3], but [2] is needed here" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "train.log").read_text().count("error: ") == 1
    assert not (tmp_path / "pruner").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_one_message(inputs: Path, tmp_path: Path) -> None:
    done = start_where_the_second_runs("import signal; os.kill(os.getpid(), signal.SIGKILL)", inputs, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "error: process 1 of 2 was ended by SIGKILL, and the others with it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_several_processes_that_were_killed_go_on_to_the_same_bits(
    inputs: Path, both: Path, sharded: Path, tmp_path: Path, shard: bool
) -> None:
    settings, expected = (SHARDED, sharded) if shard else (TWO, both)
    # In the third step, of which the gradients are summed: the first process has then written what it keeps of the
    # second. Nobody is told; without their launcher the kernel ends both.
    killed = start_where_the_second_runs(
        """
        import signal
        from sdtp.training import trainer
        true, calls = trainer.batch_gradient, []
        def killing(*args, **settings):
            found = true(*args, **settings)
            calls.append(found)
            if len(calls) == 3:
                os.kill(os.getppid(), signal.SIGKILL)
                signal.pause()
            return found
        trainer.batch_gradient = killing
        """,
        inputs,
        tmp_path,
        settings,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert not (tmp_path / "pruner").exists()
    done = start(inputs, tmp_path, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 2" in (tmp_path / "train.log").read_text()
    for name in ("pruner/pruner.safetensors", "pruner/pruner.json", "history.csv"):
        assert (tmp_path / name).read_bytes() == (expected / name).read_bytes(), name


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "1",
}


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `scontrol` that knows the nodes of STEP, as Slurm's prints them."""
    command = tmp_path / "scontrol"
    command.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "  'show hostnames gpu[03-04]') printf 'gpu03\\ngpu04\\n';;\n"
        "  'show node --oneliner gpu03') echo 'NodeName=gpu03 Arch=x86_64 NodeAddr=10.0.0.3 NodeHostName=gpu03';;\n"
        '  *) echo "what is $*" >&2; exit 1;;\n'
        "esac\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return command


@pytest.mark.usefixtures("scontrol")
def test_tasks_of_a_slurm_step_meet_at_its_first_node() -> None:
    step = launch.SlurmStep.of(STEP)
    assert step is not None
    assert (step.tasks, step.task, step.address) == (2, 1, "10.0.0.3")
    other = launch.SlurmStep.of({**STEP, "SLURM_PROCID": "0"})
    assert other is not None
    assert other.port == step.port
    neighbours = [{**STEP, "SLURM_STEP_ID": "1"}, {**STEP, "SLURM_JOB_ID": "8"}]
    ports = {found.port for found in map(launch.SlurmStep.of, neighbours) if found is not None}
    assert len(ports | {step.port}) == 3
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.usefixtures("scontrol")
def test_step_whose_nodes_slurm_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"scontrol show hostnames x gives no answer: what is show hostnames x"):
        launch.SlurmStep.of({**STEP, "SLURM_STEP_NODELIST": "x"})


@pytest.mark.parametrize(
    ("environment", "tasks", "speaks"),
    [
        ({}, 1, True),
        ({"RANK": "0"}, 1, True),
        ({"RANK": "1"}, 1, False),
        # A job's script, which says of the job how many tasks it has.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 1, True),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1, True),
        ({**STEP, "SLURM_PROCID": "0"}, 2, True),
        (STEP, 2, False),
        ({**STEP, "RANK": "0"}, 2, True),
    ],
)
def test_one_of_those_launched_together_speaks(environment: dict[str, str], tasks: int, speaks: bool) -> None:
    assert launch.slurm_tasks(environment) == tasks
    assert launch.speaks(environment) == speaks
    if tasks == 1:
        assert launch.SlurmStep.of(environment) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_launched_process_ends_with_what_launched_it() -> None:
    child = (
        "import signal; from sdtp.pipeline.launch import end_with_launcher; end_with_launcher();"
        "print('ready', flush=True); signal.pause()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGKILL)
        # The child holds the other end of the pipe: nothing more comes once it has ended.
        assert launcher.stdout.read() == ""
