"""`sdtp recommend` on the files of a made-up run: what people and programs are told, the exit code, faults in the run.

The made-up run (see `synthetic_run`) at 2048 tokens, its longest: unpruned takes 4.267 s, keep ratios 0.9, 0.8 and 0.7
take 2.673, 1.992 and 1.587 s, upper quartiles are 1.03 times that, and peaks are 1.2e9 bytes, pruned 1.1e9.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdtp.errors import UserError
from sdtp.pipeline.steps import recommend
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline import synthetic_run

N = 200
# Of 200 questions unpruned answers 160; these answer the first so many, and none of the others.
RIGHT = {1.0: 160, 0.9: 158, 0.8: 144, 0.7: 80}
# More nats a token than unpruned on continuation, by 0.002 more or less from example to example.
HARM = {1.0: 0.0, 0.9: 0.02, 0.8: 0.05, 0.7: 0.08}
MACHINE = {"device": "some card", "dtype": "float32", "attention": "sdpa", "versions": {"torch": "2.13.0"}, "warmup": 1}


def latency() -> pd.DataFrame:
    """The run's table, timed with a scorer of 4 units on 8 hidden ones: 80 operations a token."""
    table = synthetic_run.latency()
    pruned = table["method"] == "sdtp"
    entering = table["prompt_tokens"] * 0.0
    for stage in range(3):
        entering += (table["prompt_tokens"] * table["keep_ratio"] ** stage).round()
    table.loc[pruned, "scoring_tflop"] = 80 * entering[pruned] / 1e12
    return table


def evaluation(method: str, ratio: float, n: int = N) -> list[dict[str, Any]]:
    """One row an example of both tasks; a prompt has 400 tokens."""
    kept = 400 if method == "unpruned" else round(400 * ratio**3)
    same = {"prompt_tokens": 400, "kept_tokens": kept, "method": method, "keep_ratio": ratio, "seed": None}
    same |= {"kl": 0.5, "top1": 0.75}
    rows = []
    for index in range(n):
        right = index < RIGHT[ratio] * n / N
        rows.append({"id": f"r-{index}", "task": "retrieval", "correct": right, "loss": 1.0, **same})
        loss = 3 + index % 7 + HARM[ratio] + (0.002 * (-1) ** index if ratio < 1 else 0)
        rows.append({"id": f"c-{index}", "task": "continuation", "correct": None, "loss": loss, **same})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pruner(folder: Path, width: int = 4, **protection: int) -> None:
    schedule = PruningSchedule.geometric(12, 4, 3, ratio=0.8, **{"sinks": 2, "min_local": 8, **protection})
    TokenPruner(schedule, scorers.Learned(hidden_size=8, stages=3, width=width)).save_pretrained(folder)


def write_run(run: Path, n: int = N) -> Path:
    write_pruner(run / "pruner")
    (run / "tables").mkdir()
    latency().to_csv(run / "tables" / "latency.csv", index=False)
    (run / "benchmark").mkdir()
    for ratio in synthetic_run.RATIOS:
        (run / "benchmark" / f"ratio-{ratio}.json").write_text(json.dumps(MACHINE))
        for method in ("sdtp", "lastquery"):
            write_rows(run / "evaluation" / f"{method}-{ratio}.jsonl", evaluation(method, ratio, n))
    write_rows(run / "evaluation" / "unpruned-1.0.jsonl", evaluation("unpruned", 1.0, n))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "results" / "default")


@pytest.fixture
def ask(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """The exit code and the lines that were printed."""

    def asked(*arguments: str) -> tuple[int, list[str]]:
        code = 0
        try:
            recommend.main(["--run", str(run), *arguments])
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        return code, capsys.readouterr().out.splitlines()

    return asked


Ask = Callable[..., tuple[int, list[str]]]


def plain(ask: Ask, *arguments: str) -> dict[str, Any]:
    code, told = ask(*arguments, "--json")
    found = json.loads("\n".join(told))
    assert isinstance(found, dict)
    assert found["met"] is (code == 0)
    return found


def test_what_people_are_told(ask: Ask, run: Path) -> None:
    code, told = ask("--ttft", "2.7")
    assert code == 0
    assert told[:8] == [
        "target  time to first token up to 2.70 s, prompts of 2048 tokens, the longest timed",
        f"choice  sdtp at keep ratio 0.8; the pruner is {run}/pruner",  # 0.9 takes 2.673 s, but its quartile 2.754 s
        "",
        f'    pruner = TokenPruner.from_pretrained("{run}/pruner")',
        "    with pruner(model, ratio=0.8): output = model.generate(**inputs)",
        "",
        told[6],
        told[7],
    ]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in told[6:10]]
    assert rows[0][-2:] == ["retrieval kept", "continuation kept"]
    assert rows[1][:6] == ["0.9", "2.67 (2.62–2.75)", "5", "0.627 (≤ 0.639)", "1,049 MiB", "56.4 MiB"]
    assert rows[1][-1] == "misses by 0.0536 s"
    assert rows[2][:3] == [">", "0.8", "1.99 (1.95–2.05)"]
    assert rows[2][-3].startswith("0.900 (0.8")
    assert rows[2][-3].endswith("), n = 200")
    assert rows[2][-2:] == ["0.951 (0.951–0.951), n = 200", "meets it"]
    assert rows[3][0] == "0.7"
    assert told[13:] == [
        "timed on some card, float32, sdpa attention, torch 2.13.0",
        "note: quality was measured on prompts of 400 tokens, which says little about 2048 tokens",
    ]


def test_the_lines_of_python_run(ask: Ask) -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=12, **size)).eval()
    for method in ("sdtp", "lastquery"):
        lines = plain(ask, "--ttft", "2.7", "--method", method)["python"]
        assert len(lines) == 2
        names = {"TokenPruner": TokenPruner, "scorers": scorers, "model": model}
        names["inputs"] = {"input_ids": torch.arange(100)[None] % 29 + 1, "max_new_tokens": 2, "pad_token_id": 0}
        exec("\n".join([lines[0], lines[1].replace("model, ratio=0.8)", "model, ratio=0.8) as trace")]), names)
        assert names["trace"].kept[-1].shape[1] == round(0.512 * 100)


@pytest.mark.parametrize(
    ("arguments", "method", "ratio"),
    [
        (["--ttft", "2.76"], "sdtp", 0.9),
        (["--ttft", "4.39"], "sdtp", 0.9),
        (["--ttft", "4.4"], "unpruned", 1.0),  # 4.267 * 1.03 = 4.395
        (["--ttft-ratio", "0.64"], "sdtp", 0.9),  # 1 / (0.98 * 1.596) = 0.6394; the median is 0.627
        (["--ttft-ratio", "0.63"], "sdtp", 0.8),
        (["--memory", "1100000000"], "sdtp", 0.9),
        (["--memory", "1.1GB"], "sdtp", 0.9),
        (["--memory", "1150 MiB"], "unpruned", 1.0),  # 1.206e9
        (["--quality", "0.7"], "sdtp", 0.8),  # every task: 0.7 keeps half of retrieval
        (["--quality", "0.97"], None, None),
        (["--quality", "0.96", "--task", "retrieval"], "sdtp", 0.9),  # 158 of 160
        (["--quality", "0.9", "--task", "continuation"], "sdtp", 0.7),  # exp(-0.08) = 0.923
        (["--quality", "0.95", "--task", "continuation"], "sdtp", 0.8),  # 0.951
        (["--quality", "0.9", "--task", "continuation", "--prompt-tokens", "512"], "sdtp", 0.7),
        (["--ttft", "0.61", "--prompt-tokens", "512"], "sdtp", 0.9),  # 0.589 * 1.03 = 0.607
        (["--ttft", "0.5", "--prompt-tokens", "512"], "sdtp", 0.8),
    ],
)
def test_choices(ask: Ask, arguments: list[str], method: str | None, ratio: float | None) -> None:
    found = plain(ask, *arguments)
    assert (found["method"], found["keep_ratio"]) == (method, ratio)


def test_what_programs_are_told(ask: Ask, run: Path) -> None:
    found = plain(ask, "--quality", "0.7", "--prompt-tokens", "1024")
    assert found["target"] == {"kind": "quality", "limit": 0.7, "prompt_tokens": 1024, "task": None}
    assert (found["pruner"], len(found["python"])) == (f"{run}/pruner", 2)
    assert found["timed_on"] == "some card, float32, sdpa attention, torch 2.13.0"
    assert found["quality_prompt_tokens"] == [400, 400]
    assert [(one["method"], one["keep_ratio"]) for one in found["settings"]] == [
        ("unpruned", 1.0), ("sdtp", 0.9), ("sdtp", 0.8), ("sdtp", 0.7),
    ]  # fmt: skip
    unpruned, light = found["settings"][:2]
    seconds = 1024 / 600 * (1 + 1024 / 8192)
    assert unpruned["cost"] == pytest.approx(
        {
            "prompt_tokens": 1024,
            "ttft_s": seconds,
            "ttft_q25": seconds * 0.98,
            "ttft_q75": seconds * 1.03,
            "ttft_ratio": 1.0,
            "ttft_ratio_q75": 1 / 0.98,  # of the made-up table; a true one has 1 here
            "peak_memory_bytes": 1.2e9,
            "kv_cache_bytes": 1024 * 46080,
            "repeats": 15,
            "between": None,
        }
    )
    assert light["cost"]["ttft_s"] == pytest.approx(seconds / (1.52 * 1.025))
    assert unpruned["kept"]["retrieval"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 200}
    assert light["kept"]["retrieval"]["value"] == pytest.approx(158 / 160)
    assert light["kept"]["continuation"]["value"] == pytest.approx(math.exp(-0.02))
    # Losses differ by nats from example to example: only a paired interval is as narrow as this.
    assert 0 < light["kept"]["continuation"]["high"] - light["kept"]["continuation"]["low"] < 0.001
    assert found["closest"]["miss"] == pytest.approx(0.7 - found["settings"][2]["kept"]["retrieval"]["low"])


def test_nothing_meets_it(ask: Ask) -> None:
    code, told = ask("--ttft", "1.5")
    assert code == 1
    # 1.5873 s, of which the upper quartile is 1.6349 s.
    assert told[1] == "choice  none: the closest, sdtp at keep ratio 0.7, misses by 0.135 s"
    assert told[2] == ""
    assert not any("TokenPruner" in line or line.startswith(">") for line in told)
    assert [line.split()[0] for line in told[4:6]] == ["0.8", "0.7"]
    found = plain(ask, "--memory", "300MB")
    assert (found["method"], found["keep_ratio"], found["pruner"], found["python"]) == (None, None, None, [])
    assert found["closest"] == {"method": "sdtp", "keep_ratio": 0.9, "miss": 8e8}


@pytest.mark.parametrize(
    ("given", "limit"),
    [("5", 5.0), ("1200MB", 1.2e9), ("3kb", 3000.0), ("2 KiB", 2048.0), ("1.5MiB", 1572864.0), ("2GiB", 2147483648.0)],
)
def test_bytes(ask: Ask, given: str, limit: float) -> None:
    assert plain(ask, "--memory", given)["target"]["limit"] == limit


def test_unpruned_needs_no_pruner(ask: Ask) -> None:
    code, told = ask("--ttft", "100")
    assert code == 0
    assert told[1:4] == ["choice  unpruned; no pruning is needed", "", "    output = model.generate(**inputs)"]


def test_between_measured_lengths(ask: Ask) -> None:
    # Halfway between 512 and 2048 in logarithms lies 1024, so 724 between 512 and 1024: times are geometric means.
    table = synthetic_run.latency().set_index(["method", "keep_ratio", "prompt_tokens"])
    found = plain(ask, "--ttft", "1", "--prompt-tokens", "724")
    ends = [table.loc["sdtp", 0.9, length] for length in (512, 1024)]
    middle = found["settings"][1]["cost"]
    assert middle["ttft_s"] == pytest.approx(math.sqrt(ends[0]["prefill_s"] * ends[1]["prefill_s"]), rel=5e-4)
    share = (724 - 512) / 512
    cache = ends[0]["kv_cache_bytes"] * (1 - share) + ends[1]["kv_cache_bytes"] * share
    assert middle["kv_cache_bytes"] == pytest.approx(cache)
    assert middle["between"] == [512, 1024]
    _, told = ask("--ttft", "1", "--prompt-tokens", "724")
    assert "note: prompts of 724 tokens were not timed: their numbers are interpolated between those of 512 and of 1024 tokens" in told  # fmt: skip  # noqa: E501
    assert told[0] == "target  time to first token up to 1.00 s, prompts of 724 tokens"


def fault(run: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        recommend.main(["--run", str(run), *(arguments or ("--ttft", "1"))])
    return str(error.value)


@pytest.mark.parametrize("tokens", ["511", "32768"])
def test_nothing_is_said_of_lengths_beyond(run: Path, tokens: str) -> None:
    told = fault(run, "--ttft", "1", "--prompt-tokens", tokens)
    lengths = sorted([512, 1024, 2048, int(tokens)])
    assert told == (
        f"--prompt-tokens: {tokens} prompt tokens: measured are 512 to 2048, and only what lies between can be told; "
        f"`echo 'benchmark: {{prompt_tokens: {lengths}}}' > lengths.yaml && .venv/bin/snakemake "
        "results/default/tables/latency.csv --cores all --configfile lengths.yaml` measures it"
    )


@pytest.mark.parametrize(
    "name",
    [
        "tables/latency.csv",
        "benchmark/ratio-0.8.json",
        "evaluation/unpruned-1.0.jsonl",
        "evaluation/sdtp-0.7.jsonl",
        "pruner/pruner.json",
    ],
)
def test_missing_file(run: Path, name: str) -> None:
    (run / name).unlink()
    expected = f"{run / name}: no such file; `.venv/bin/snakemake results/default/{name} --cores all` makes it"
    assert fault(run) == expected


@pytest.mark.parametrize("there", ["config/study.yaml", "config/paper/study.yaml", None])
def test_command_of_a_run_with_a_configuration_of_its_own(tmp_path: Path, there: str | None) -> None:
    if there is not None:
        (tmp_path / there).parent.mkdir(parents=True)
        (tmp_path / there).touch()
    assert fault(tmp_path / "results" / "study").endswith(
        "`.venv/bin/snakemake results/study/tables/latency.csv --cores all "
        f"--configfile {there or 'YOUR.yaml'}` makes it"
    )


def test_pruner_without_weights(run: Path) -> None:
    (run / "pruner" / "pruner.safetensors").unlink()
    assert "pruner.safetensors" in fault(run)


def test_timed_with_a_wider_scorer(run: Path) -> None:
    write_pruner(run / "pruner", width=8)
    told = fault(run)
    assert told.startswith(
        f"{run}/tables/latency.csv was timed with another pruner than {run}/pruner: at keep ratio 0.9 "
    )
    assert told.endswith(
        "`.venv/bin/snakemake results/default/tables/latency.csv --cores all --forcerun benchmark` times this one"
    )


def test_timed_with_another_schedule(run: Path) -> None:
    write_pruner(run / "pruner", min_local=300)  # protects more than 0.7 ** 3 of 512 tokens, but not of 2048
    assert "at keep ratio 0.8 and 512 tokens 262 kept tokens, not 302" in fault(run)


def test_evaluated_with_another_schedule(run: Path) -> None:
    rows = [{**row, "kept_tokens": row["kept_tokens"] - 1} for row in evaluation("sdtp", 0.7)]
    write_rows(run / "evaluation" / "sdtp-0.7.jsonl", rows)
    told = fault(run)
    assert told.startswith(
        f"{run}/evaluation/sdtp-0.7.jsonl is of another schedule than {run}/pruner: of 400 tokens 136 "
    )
    assert "were kept, not 137; `.venv/bin/snakemake results/default/evaluation/sdtp-0.7.jsonl --cores all" in told


def test_a_pruner_trained_since_is_told(ask: Ask, run: Path) -> None:
    assert not any("older" in line for line in ask("--ttft", "3")[1])
    os.utime(run / "evaluation" / "sdtp-0.8.jsonl", (1, 1))
    note = f"{run}/evaluation/sdtp-0.8.jsonl is older than the pruner, and may be of another: see `snakemake -n`"
    assert f"note: {note}" in ask("--ttft", "3")[1]
    assert plain(ask, "--ttft", "3")["notes"][0] == note
    os.utime(run / "evaluation" / "lastquery-0.8.jsonl", (1, 1))  # which no pruner was used for
    assert not any("older" in line for line in ask("--ttft", "3", "--method", "lastquery")[1])


def test_other_method(ask: Ask, run: Path) -> None:
    code, told = ask("--ttft", "2.7", "--method", "lastquery")
    assert code == 0
    assert told[3] == (
        f'    pruner = TokenPruner(TokenPruner.from_pretrained("{run}/pruner").schedule, scorers.LastQuery())'
    )
    assert told[-1] == "note: times are of pruning with the learned scorer; lastquery's own scoring was not timed"
    told = fault(run, "--ttft", "1", "--method", "random")
    assert told == f"--method random: run {run} evaluated sdtp, lastquery; accepted: one of these"
    # Of what a run evaluates for other pages, those alone that can be asked for.
    (run / "evaluation" / "fastkv-0.8.jsonl").touch()
    assert fault(run, "--ttft", "1", "--method", "random") == told


def test_few_examples_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "default", n=20)
    recommend.main(["--run", str(run), "--ttft", "3"])
    assert "note: smoke: n = 20 examples a task, too few to tell small losses" in capsys.readouterr().out.splitlines()


def test_examples_must_be_the_same(run: Path) -> None:
    write_rows(run / "evaluation" / "sdtp-0.7.jsonl", evaluation("sdtp", 0.7)[:-2])
    assert "retrieval: sdtp at keep ratio 0.7 was evaluated on 199 examples and unpruned on 200" in fault(run)


def test_rows_must_be_whole(run: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "loss"} for row in evaluation("sdtp", 0.7)]
    write_rows(run / "evaluation" / "sdtp-0.7.jsonl", rows)
    assert fault(run).startswith(f"{run}/evaluation/sdtp-0.7.jsonl: a row without loss; ")
    write_rows(run / "evaluation" / "sdtp-0.7.jsonl", [])
    assert fault(run) == f"{run}/evaluation/sdtp-0.7.jsonl: no rows; accepted: one an example"


def test_task_that_was_not_evaluated(run: Path) -> None:
    told = fault(run, "--ttft", "1", "--task", "instruction")
    assert told == f"--task instruction: run {run} evaluated continuation, retrieval"


def test_no_share_of_nothing_can_be_kept(run: Path, ask: Ask) -> None:
    rows = [{**row, "correct": None if row["correct"] is None else False} for row in evaluation("unpruned", 1.0)]
    write_rows(run / "evaluation" / "unpruned-1.0.jsonl", rows)
    assert "retrieval: the unpruned model answers none of 200 examples" in fault(run)
    assert ask("--ttft", "3", "--task", "continuation")[0] == 0


def test_timed_on_two_machines(run: Path) -> None:
    (run / "benchmark" / "ratio-0.7.json").write_text(json.dumps({**MACHINE, "device": "another card"}))
    assert "ratio-0.7.json was timed on another card" in fault(run)


def test_memory_that_was_not_measured(run: Path, ask: Ask) -> None:
    latency().assign(peak_memory_bytes=math.nan).to_csv(run / "tables" / "latency.csv", index=False)
    assert "latency.csv holds no peak memory" in fault(run, "--memory", "1GB")
    assert plain(ask, "--ttft", "3")["settings"][0]["cost"]["peak_memory_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "one of the arguments --ttft --ttft-ratio --memory --quality is required"),
        (["--ttft", "1", "--quality", "1"], "not allowed with argument"),
        (["--ttft", "0"], "--ttft 0: seconds above 0"),
        (["--ttft", "nan"], "--ttft nan: seconds above 0"),
        (["--ttft-ratio", "1.5"], "--ttft-ratio 1.5: a share above 0 and up to 1"),
        (["--quality", "90"], "--quality 90: a share above 0 and up to 1"),
        (["--memory", "many"], "--memory many: bytes are needed"),
        (["--memory", "0"], "--memory 0: bytes are needed"),
        (["--ttft", "1", "--prompt-tokens", "0"], "--prompt-tokens 0: at least 1"),
        (["--ttft", "1", "--method", "oracle"], "invalid choice: 'oracle'"),
    ],
)
def test_wrong_options(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        recommend.main(["--run", "results/default", *arguments])
    assert end.value.code == 2
    assert told in capsys.readouterr().err
