"""Multiple-choice tasks from a text to the table: what lm-eval finds, what the steps write, what the table holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

import huggingface_hub.constants
import lm_eval.tasks
from lm_eval.tasks import TaskManager

from sdtp.errors import UserError
from sdtp.evaluation import harness_scores
from sdtp.evaluation.harness import PrunedLM
from sdtp.evaluation.harness_scores import evaluate
from sdtp.evaluation.stats import paired_difference, wilson_interval
from sdtp.pipeline import question_files, suite_plot
from sdtp.pipeline.files import read_jsonl, write_jsonl
from sdtp.pipeline.multiple_choice import SHOTS
from sdtp.pipeline.predictions import Predictions
from sdtp.pipeline.steps import harness, harness_table, multiple_choice_data
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pipeline.test_multiple_choice import documents
from tests.workflow import tiny_model

# lm-eval asks the machine about itself at the end of each evaluation.
pytestmark = pytest.mark.slow

TASKS = ["sdtp_fact", "sdtp_number"]
PRUNING = {"start": 1, "step": 1, "sinks": 2, "local": 0.0, "min_local": 4}
SETTINGS: dict[str, Any] = {
    "seed": 0,
    "model": {"dtype": "float32", "attention": "sdpa"},
    "pruning": PRUNING,
    "evaluation": {"seeds": [0, 1]},
    "harness": {
        "methods": ["sdtp", "random"],
        "keep_ratios": [0.5],
        "tasks": TASKS,
        "fewshot": 2,
        "limit": 3,
        "batch_size": 1,
    },
}
SCHEDULE = PruningSchedule.geometric(4, 1, 1, 0.5, 2, 0.0, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an untrained pruner for it, and local tasks of five questions over a folder of texts."""
    folder = tmp_path_factory.mktemp("harness")
    tiny_model.make(folder / "model")
    manifest = {"num_layers": 4, "context_length": 1024, "trust_remote_code": False, "weights_sha256": "0" * 64}
    (folder / "model" / "manifest.json").write_text(json.dumps(manifest))
    torch.manual_seed(1)
    pruner = TokenPruner(SCHEDULE, scorers.Learned(32, SCHEDULE.stages, width=8))
    pruner.save_pretrained(folder / "pruner")
    (folder / "texts").mkdir()
    for document in documents():
        (folder / "texts" / f"{document.name}.txt").write_text(document.text, encoding="utf-8")
    source = {"kind": "local", "ref": str(folder / "texts"), "revision": None, "sha256": None}
    settings = {"seed": 0, "harness": {"local": {"source": source, "questions": 5, "passage_words": 40}}}
    arguments = ["--output", str(folder / "tasks"), "--metrics", str(folder / "data.json")]
    multiple_choice_data.main(["--settings", json.dumps(settings), "--tasks", *TASKS, *arguments])
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, no_tracking: None) -> None:
    """Nothing touches the network, nothing is tracked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def answered(
    folder: Path, method: str, ratio: float, output: Path, pruner: bool = False, code: str = "c", **changes: Any
) -> list[dict[str, Any]]:
    """The rows of `sdtp harness`; its results, metrics and checkpoint lie beside `output`."""
    settings = {**SETTINGS, "harness": {**SETTINGS["harness"], **changes}}
    given = ["--settings", json.dumps(settings), "--model", str(folder / "model"), "--tasks", str(folder / "tasks")]
    given += ["--pruner", str(folder / "pruner")] if pruner else []
    written = ["--results", str(output.with_suffix(".json")), "--metrics", str(output.with_suffix(".metrics"))]
    written += ["--checkpoint", str(output.with_suffix(".checkpoint")), "--code", code]
    harness.main([*given, "--method", method, "--keep-ratio", str(ratio), "--output", str(output), *written])
    return read_jsonl(output)


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, Path]:
    """The rows of every job of a table, as files."""
    made = {name: folder / f"{name}.jsonl" for name in ("unpruned-1.0", "sdtp-0.5", "random-0.5")}
    for name, path in made.items():
        method, ratio = name.rsplit("-", 1)
        answered(folder, method, float(ratio), path, pruner=method == "sdtp")
    return made


def test_lm_eval_finds_the_tasks_wherever_the_folder_is(folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder / "tasks", tmp_path / "elsewhere")
    os.utime(moved / "question_files.py", ns=(1, 1))  # lm-eval remembers modules by path and time
    manager = TaskManager(include_path=str(moved), include_defaults=False)
    assert manager.all_tasks == sorted(TASKS)
    loaded = manager.load(TASKS)["tasks"]
    for name, task in loaded.items():
        docs = list(task.test_docs())
        assert [doc["id"] for doc in docs] == [f"{name}-test-{number:05d}" for number in range(5)]
        assert len(list(task.fewshot_docs())) == SHOTS
        doc = docs[0]
        assert task.doc_to_text(doc) == doc["context"]
        assert task.doc_to_choice(doc) == doc["choices"]
        assert task.doc_to_target(doc) == doc["answer"]


def test_questions_are_read_whatever_characters_are_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "a", "context": "\u2028 \u2029 \x85 \r\n"}, {"id": "b", "context": "."}]
    for split in question_files.SPLITS:
        write_jsonl(tmp_path / f"task-{split}.jsonl", rows)
    monkeypatch.setattr(question_files, "__file__", str(tmp_path / "question_files.py"))  # it reads what lies beside it
    loaded = question_files.load(questions="task")
    assert {split: part.to_list() for split, part in loaded.items()} == {"train": rows, "test": rows}


def test_rows_say_what_was_answered_and_what_was_pruned(folder: Path, jobs: dict[str, Path]) -> None:
    rows = read_jsonl(jobs["sdtp-0.5"])
    assert [(row["task"], row["id"]) for row in rows] == [
        (task, f"{task}-{number:05d}") for task in TASKS for number in range(3)
    ]
    for row in rows:
        assert (row["suite"], row["category"], row["method"], row["keep_ratio"]) == ("harness", "local", "sdtp", 0.5)
        assert row["seed"] is None
        assert row["choices"] == len(row["log_likelihoods"]) == 4
        assert row["kept_tokens"] == SCHEDULE.surviving(row["prompt_tokens"])[-1] < row["prompt_tokens"]
    # A right answer is the choice with the highest likelihood, as the file of questions has it.
    for task in TASKS:
        answers = [question["answer"] for question in read_jsonl(folder / "tasks" / f"{task}-test.jsonl")][:3]
        own = [row for row in rows if row["task"] == task]
        guesses = [row["log_likelihoods"].index(max(row["log_likelihoods"])) for row in own]
        expected = [100.0 * (guess == answer) for guess, answer in zip(guesses, answers, strict=True)]
        assert [row["score"] for row in own] == expected
    [result] = json.loads(jobs["sdtp-0.5"].with_suffix(".json").read_text())
    assert result["seed"] is None
    for task in TASKS:
        mean = sum(row["score"] for row in rows if row["task"] == task) / 300
        assert result["results"][task]["acc,none"] == pytest.approx(mean)
        assert result["n-shot"][task] == 2
    assert result["config"]["kept_tokens"] == sum(row["kept_tokens"] for row in rows)
    assert "samples" not in result
    metrics = json.loads(jobs["sdtp-0.5"].with_suffix(".metrics").read_text())
    shares = [sum(row[name] for row in rows) for name in ("kept_tokens", "prompt_tokens")]
    assert metrics["kept_share"] == pytest.approx(shares[0] / shares[1])
    assert metrics["truncated_requests"] == 0


def test_nothing_changes_where_everything_is_kept(folder: Path, jobs: dict[str, Path], tmp_path: Path) -> None:
    kept = answered(folder, "sdtp", 1.0, tmp_path / "kept.jsonl", pruner=True)
    unpruned, pruned = read_jsonl(jobs["unpruned-1.0"]), read_jsonl(jobs["sdtp-0.5"])
    for one, other, third in zip(kept, unpruned, pruned, strict=True):
        assert (one["id"], one["score"], one["kept_tokens"]) == (other["id"], other["score"], other["prompt_tokens"])
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=0, abs=1e-4)
        assert max(abs(a - b) for a, b in zip(third["log_likelihoods"], one["log_likelihoods"], strict=True)) > 1e-3


def test_what_chooses_at_random_runs_once_a_seed(jobs: dict[str, Path]) -> None:
    rows = read_jsonl(jobs["random-0.5"])
    first, second = ([row for row in rows if row["seed"] == seed] for seed in (0, 1))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert len(first) + len(second) == len(rows) == 12
    assert all(a["log_likelihoods"] != b["log_likelihoods"] for a, b in zip(first, second, strict=True))
    results = json.loads(jobs["random-0.5"].with_suffix(".json").read_text())
    assert [result["seed"] for result in results] == [0, 1]
    assert len({result["config"]["context_tokens"] for result in results}) == 1


def taken_over(output: Path) -> tuple[int, int]:
    """Of the job's answers all, and those that were not computed."""
    metrics = json.loads(output.with_suffix(".metrics").read_text())
    return int(metrics["answers"]), int(metrics["answers_taken_over"])


def pruning_of(output: Path) -> list[tuple[int, int, int]]:
    """What lm-eval's results say was pruned, seed by seed."""
    results = json.loads(output.with_suffix(".json").read_text())
    return [tuple(one["config"][name] for name in ("contexts", "context_tokens", "kept_tokens")) for one in results]


class Killed(BaseException):
    """What no step catches."""


def test_a_killed_job_goes_on_where_it_was(
    folder: Path, jobs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "random-0.5.jsonl"
    checkpoint, original, seen = output.with_suffix(".checkpoint"), Predictions.add, list[str]()

    def killed(self: Predictions[Any], key: str, answer: Any) -> None:
        if len(seen) == 30:  # in the second seed, between two choices of a question
            raise Killed
        seen.append(key)
        original(self, key, answer)

    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "add", killed)
        with pytest.raises(Killed):
            answered(folder, "random", 0.5, output)
    assert not output.exists()
    made = jobs["random-0.5"].with_suffix(".checkpoint").read_bytes().splitlines(keepends=True)
    assert len(made) == 48  # two seeds, two tasks, three questions, four choices
    assert checkpoint.read_bytes() == b"".join(made[:30])
    with checkpoint.open("ab") as file:
        file.write(made[30][:100])
    assert answered(folder, "random", 0.5, output) == read_jsonl(jobs["random-0.5"])
    assert taken_over(jobs["random-0.5"]) == (48, 0)
    assert taken_over(output) == (48, 30)
    assert pruning_of(output) == pruning_of(jobs["random-0.5"])
    # Only what was missing was computed, and is there once.
    assert sorted(checkpoint.read_bytes().splitlines()) == sorted(line.rstrip() for line in made)


def test_only_new_questions_are_asked(
    folder: Path, jobs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    original = PrunedLM._score

    def counted(self: PrunedLM, batch: Any, requests: Any, at_once: int) -> Any:
        asked.append((len(batch), sum(len(indices) for indices, _, _ in batch)))
        return original(self, batch, requests, at_once)

    output = tmp_path / "sdtp-0.5.jsonl"
    few = answered(folder, "sdtp", 0.5, output, pruner=True, tasks=TASKS[:1], limit=2)
    monkeypatch.setattr(PrunedLM, "_score", counted)
    # A task more and a question more: those choices of a question share their context as ever.
    assert answered(folder, "sdtp", 0.5, output, pruner=True) == read_jsonl(jobs["sdtp-0.5"])
    assert asked == 4 * [(1, 4)]
    assert taken_over(output) == (24, 8)
    assert few == read_jsonl(output)[:2]
    # Nothing is new, in another number at a time; the results are the same but for time.
    assert answered(folder, "sdtp", 0.5, output, pruner=True, batch_size=4) == read_jsonl(jobs["sdtp-0.5"])
    assert taken_over(output) == (24, 24)
    assert len(asked) == 4
    assert pruning_of(output) == pruning_of(jobs["sdtp-0.5"])


def test_answers_of_another_code_ratio_or_fewshot_do_not_count(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "sdtp.jsonl"
    one = {"tasks": TASKS[:1], "limit": 1, "pruner": True}
    answered(folder, "sdtp", 0.5, output, **one)
    answered(folder, "sdtp", 0.5, output, code="other", **one)
    assert taken_over(output) == (4, 0)
    answered(folder, "sdtp", 0.6, output, **one)
    assert taken_over(output) == (4, 0)
    answered(folder, "sdtp", 0.5, output, fewshot=1, **one)
    assert taken_over(output) == (4, 0)
    answered(folder, "sdtp", 0.5, output, **one)
    assert taken_over(output) == (4, 4)


def test_table_is_the_rows_means_with_differences_on_the_same_examples(
    jobs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    table_file = tmp_path / "harness.csv"
    given = ["--settings", json.dumps({"harness": SETTINGS["harness"]}), "--scores", *map(str, jobs.values())]
    written = ["--figure", str(tmp_path / "harness.svg"), "--metrics", str(tmp_path / "metrics.json")]
    harness_table.main([*given, "--table", str(table_file), *written])
    table = pd.read_csv(table_file)
    assert set(table["category"]) == {"local"}
    assert "sdtp/0.5/local/accuracy" in json.loads((tmp_path / "metrics.json").read_text())
    columns = "suite category task method keep_ratio value low high n difference difference_low difference_high"
    tested = ["p_value", "p_holm", "verdict", "prompt_tokens"]
    assert list(table.columns) == [*columns.split(), *tested, "compression", "chance", "kept_share"]
    cells = {(row["task"], row["method"]): row for row in table.to_dict("records")}
    assert set(cells) == {(task, method) for task in [*TASKS, "all"] for method in ("unpruned", "sdtp", "random")}
    for task in TASKS:
        scores = {}
        for name, path in jobs.items():
            own: dict[str, list[float]] = {}
            for row in read_jsonl(path):
                if row["task"] == task:
                    own.setdefault(row["id"], []).append(row["score"])
            scores[name.rsplit("-", 1)[0]] = [sum(values) / len(values) for values in own.values()]
        for method, values in scores.items():
            row = cells[task, method]
            assert row["value"] == pytest.approx(sum(values) / 3)
            low, high = wilson_interval([value / 100 for value in values])
            assert (row["low"], row["high"]) == pytest.approx((100 * low, 100 * high))
            assert (row["n"], row["chance"]) == (3, 25.0)
            if method != "unpruned":
                pair = paired_difference(values, scores["unpruned"])
                assert (row["difference"], row["p_value"]) == pytest.approx((pair.mean, pair.p_value))
        assert cells[task, "unpruned"]["kept_share"] == 1.0
        kept, tokens = (
            sum(row[name] for row in read_jsonl(jobs["sdtp-0.5"]) if row["task"] == task)
            for name in ("kept_tokens", "prompt_tokens")
        )
        assert cells[task, "sdtp"]["kept_share"] == pytest.approx(kept / tokens)
    whole = cells["all", "sdtp"]
    assert whole["value"] == pytest.approx(sum(cells[task, "sdtp"]["value"] for task in TASKS) / 2)
    assert whole["n"] == 6
    for kind in ("svg", "png"):
        assert (tmp_path / f"harness.{kind}").stat().st_size > 5000


def test_tasks_of_the_paper_others_and_local_ones_have_a_mean_each() -> None:
    asked = [
        ("copa", "lm-eval", 2, 60.0),
        ("cb", "lm-eval", 3, 40.0),
        ("colours", "lm-eval", 5, 10.0),
        ("sdtp_fact", "local", 4, 90.0),
    ]
    rows = [
        {
            "suite": "harness",
            "category": category,
            "task": task,
            "id": str(number),
            "method": method,
            "keep_ratio": ratio,
        }
        | {"seed": None, "score": score, "choices": choices, "prompt_tokens": 100, "kept_tokens": 50}
        for method, ratio in (("unpruned", 1.0), ("sdtp", 0.5))
        for task, category, choices, score in asked
        for number in range(2)
    ]
    table = harness_table.harness_table(rows, ["sdtp"], [0.5])
    means = table[(table["task"] == "all") & (table["method"] == "sdtp")]
    assert list(means[["category", "value", "chance"]].itertuples(index=False, name=None)) == [
        ("paper", 50.0, pytest.approx(100 * (1 / 2 + 1 / 3) / 2)),
        ("lm-eval", 10.0, 20.0),
        ("local", 90.0, 25.0),
    ]
    assert list(table.loc[table["task"] == "cb", "chance"]) == pytest.approx(2 * [100 / 3])
    (axes,) = suite_plot.suite(table).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "mean, paper tasks", "copa", "cb", "mean, lm-eval tasks", "colours", "mean, local tasks", "sdtp fact",
    ]  # fmt: skip


def test_table_refuses_jobs_that_were_not_due(jobs: dict[str, Path]) -> None:
    rows = [row for path in jobs.values() for row in read_jsonl(path)]
    with pytest.raises(UserError, match="'recent'"):
        harness_table.harness_table(rows, ["sdtp", "recent"], [0.5])


@pytest.fixture
def lm(folder: Path) -> PrunedLM:
    return PrunedLM(AutoModelForCausalLM.from_pretrained(folder / "model"), tokenizer=str(folder / "model"))


def test_task_that_there_is_none_of_is_refused_by_name(
    folder: Path, lm: PrunedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(include_path: list[str], include_defaults: bool = True) -> TaskManager:
        """A manager without the thousands of tasks that lm-eval brings and takes seconds to read."""
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(harness_scores, "TaskManager", without)
    with pytest.raises(UserError, match=r"harness.tasks: no_such_task is no task of lm-eval .*, nor in .*tasks"):
        evaluate(lm, ["sdtp_fact", "no_such_task"], [folder / "tasks"], 0, 1)


def test_data_that_cannot_be_had_are_told_in_one_sentence(lm: PrunedLM) -> None:
    with pytest.raises(UserError, match=r"harness.tasks: the data of copa are on a hub and could not be had"):
        evaluate(lm, ["copa"], [Path(lm_eval.tasks.__file__).parent / "super_glue" / "copa"], 0, 1)


def test_task_without_choices_is_refused(lm: PrunedLM, tmp_path: Path) -> None:
    (tmp_path / "free.yaml").write_text(
        "task: free\ncustom_dataset: !function rows.load\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_target: a\nmetric_list:\n  - metric: exact_match\n"
    )
    (tmp_path / "rows.py").write_text(
        "from datasets import Dataset, DatasetDict\n\ndef load(**settings):\n"
        "    return DatasetDict({'test': Dataset.from_list([{'a': 'b'}])})\n"
    )
    with pytest.raises(UserError, match=r"harness.tasks: free is no multiple-choice task with metric acc"):
        evaluate(lm, ["free"], [tmp_path], 0, 1)


def test_what_prunes_no_context_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method h2o is no pruner of contexts"):
        answered(folder, "h2o", 0.5, tmp_path / "h2o.jsonl")
