"""The steps of the suites on a tiny model: limits, the answers themselves, what is taken over and what is made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdtp.errors import UserError
from sdtp.evaluation.longbench.references import Reference
from sdtp.pipeline.block import Source
from sdtp.pipeline.longbench_data import Example
from sdtp.pipeline.model_sources import fetch_model
from sdtp.pipeline.steps import longbench_data, predict, ruler_data, score, suite_table
from sdtp.pipeline.target_settings import LongBenchSettings
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.workflow import tiny_model

pytestmark = [pytest.mark.usefixtures("no_tracking"), pytest.mark.slow]

RULER = {
    "source": None,  # set by `ruler`
    "tasks": ["single", "multi_key", "qa"],
    "lengths": [500, 400],
    "examples": 2,
    "depths": [0.0, 1.0],
    "keys": 2,
    "passages": None,
    "distractors": 2,
}
PREDICT: dict[str, Any] = {
    "model": {"dtype": "float32", "attention": "sdpa"},
    "suites": {"batch_tokens": 800},
    "pruning": {"start": 1, "step": 1, "sinks": 4, "local": 0.1, "min_local": 8},
    "evaluation": {"seeds": [0, 1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.make(folder / "source")
    fetch_model(Source("local", str(folder / "source"), None, None), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def pruner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pruner(tmp_path_factory.mktemp("pruner") / "pruner", 0)


def make_pruner(folder: Path, seed: int) -> Path:
    """A learned pruner, not trained, of the three stages that the settings give the model."""
    torch.manual_seed(seed)
    schedule = PruningSchedule.geometric(num_layers=4, start=1, step=1, ratio=0.9, min_local=8)
    TokenPruner(schedule, scorers.Learned(32, 3, width=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(3):
        lines = (f"The model of layer {n} reads the {number} tokens of a prompt and writes them." for n in range(80))
        (folder / f"{number}.txt").write_text(" ".join(lines))
    return folder


@pytest.fixture(scope="module")
def examples(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ruler(model, texts, tmp_path_factory.mktemp("ruler"))


def make_ruler(model: Path, texts: Path, folder: Path, **changes: Any) -> Path:
    source = {"kind": "local", "ref": str(texts), "revision": None, "sha256": None}
    settings = {"seed": 3, "suites": {"ruler": {**RULER, "source": source, **changes}}}
    files = ["--output", str(folder / "examples.jsonl"), "--metrics", str(folder / "metrics.json")]
    ruler_data.main(["--settings", json.dumps(settings), "--model", str(model), *files])
    return folder / "examples.jsonl"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_ruler_data_has_every_task_at_every_length_shortest_first(examples: Path) -> None:
    found = rows(examples)
    assert [(row["length"], row["task"]) for row in found] == [
        (length, task) for length in (400, 500) for task in RULER["tasks"] or () for _ in range(2)
    ]
    assert all(len(row["prompt_ids"]) == row["length"] and row["suite"] == "ruler" for row in found)
    assert [row["depth"] for row in found if row["task"] == "single"] == [0.0, 1.0, 0.0, 1.0]
    assert {row["category"] for row in found} == {"retrieval", "question answering"}
    assert json.loads((examples.parent / "metrics.json").read_text())["examples"] == 12


def test_ruler_lengths_beyond_the_context_are_refused(model: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^1025 \(suites\.ruler\.lengths\) = 1025 tokens: the model's context has 1024$"
    ):
        make_ruler(model, texts, tmp_path, lengths=[1025])
    with pytest.raises(
        UserError, match=r"^1010 \(suites\.ruler\.lengths\) \+ \d+ \(answer of ruler-single-1010-00000\)"
    ):
        make_ruler(model, texts, tmp_path, lengths=[1010])
    assert not (tmp_path / "examples.jsonl").exists()


def longbench_folder(folder: Path) -> Path:
    """Four examples of two tasks, as the official files have them."""
    folder.mkdir()
    for task, classes in (("qasper", None), ("trec", ["City", "Date"])):
        own = [
            {
                "_id": f"{task}-{number}",
                "input": "Where does it stand?",
                "context": f"In Paris, {number}. " * 40,
                "answers": ["Paris"] if classes is None else ["City"],
                "all_classes": classes,
                "dataset": task,
                "language": "en",
                "length": 3,
            }
            for number in range(4)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder


def make_longbench(model: Path, folder: Path, data: Path, **changes: Any) -> Path:
    source = {"kind": "local", "ref": str(data), "revision": None, "sha256": None}
    chosen = {"source": source, "templates": None, "tasks": ["trec", "qasper"], "max_tokens": 300, "examples": 2}
    settings = {"seed": 3, "suites": {"longbench": {**chosen, **changes}}}
    files = ["--output", str(folder / "examples.jsonl"), "--metrics", str(folder / "metrics.json")]
    longbench_data.main(["--settings", json.dumps(settings), "--model", str(model), *files])
    return folder / "examples.jsonl"


def test_longbench_data_are_cut_to_the_limit_with_what_they_are_held_against(model: Path, tmp_path: Path) -> None:
    found = rows(make_longbench(model, tmp_path, longbench_folder(tmp_path / "data")))
    assert [row["task"] for row in found] == ["trec", "trec", "qasper", "qasper"]
    assert {len(row["prompt_ids"]) for row in found} == {300}
    assert all(row["tokens_cut"] > 0 for row in found)
    assert [row["chat"] for row in found] == [False, False, True, True]
    assert [row["max_new_tokens"] for row in found] == [64, 64, 128, 128]
    assert [(row["answers"], row["classes"]) for row in found[1:3]] == [(["City"], ["City", "Date"]), (["Paris"], [])]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["prompts_cut"], metrics["qasper/examples"]) == (4, 2)


def test_official_templates_take_the_place_of_ours(model: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    texts = {"qasper": "Read {context} and say: {input}", "trec": "{context}{input}"}
    (tmp_path / "templates" / "dataset2prompt.json").write_text(json.dumps(texts))
    data = longbench_folder(tmp_path / "data")
    path = make_longbench(model, tmp_path, data, templates=str(tmp_path / "templates"), max_tokens=800, examples=None)
    found = rows(path)
    assert len(found) == 8
    text = AutoTokenizer.from_pretrained(model).decode(found[4]["prompt_ids"])
    assert "Read In Paris, 0. In Paris" in text
    assert "and say: Where does it stand?" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_tokens": 897},
            r"^897 \(suites\.longbench\.max_tokens\) \+ 128 \(longest answer of qasper\) = 1025 tokens: the model's",
        ),
        ({"source": None}, "suites.longbench.source is null: LongBench's data"),
        ({"tasks": ["gov_report"]}, r"\+ 512 \(longest answer of gov_report\)"),
    ],
)
def test_longbench_beyond_the_context_or_without_data_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = {"max_tokens": 513, **changes} if "tasks" in changes else changes
    with pytest.raises(UserError, match=message):
        make_longbench(model, tmp_path, longbench_folder(tmp_path / "data"), **changes)


def test_limits_are_those_of_the_tasks_that_are_asked_for() -> None:
    settings = LongBenchSettings.from_mapping({"max_tokens": 512, "tasks": ["gov_report", "trec"]})
    longbench_data.check_limits(settings, 1024)
    longbench_data.check_limits(settings, None)
    with pytest.raises(UserError, match="gov_report"):
        longbench_data.check_limits(settings, 1023)
    longbench_data.check_limits(LongBenchSettings.from_mapping({"max_tokens": 960, "tasks": ["trec"]}), 1024)


def test_fewer_examples_are_among_more_and_in_the_files_order() -> None:
    every = tuple(
        Example(str(number), task, "c", "q", Reference(("a",)), "") for task in ("trec", "lcc") for number in range(30)
    )
    few, more = longbench_data.draw(every, 3, 0), longbench_data.draw(every, 10, 0)
    assert [example.task for example in few] == 3 * ["trec"] + 3 * ["lcc"]
    assert set(few) < set(more)
    assert [every.index(example) for example in more] == sorted(every.index(example) for example in more)
    assert longbench_data.draw(every, 3, 1) != few
    assert [example.id for example in few[:3]] != [example.id for example in few[3:]]  # each task draws for itself
    assert longbench_data.draw(every, 99, 0) == longbench_data.draw(every, None, 0) == list(every)


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(model: Path, pruner: Path, examples: Path, tmp_path: Path) -> Run:
    """Predicts: the rows of the file, all in one folder."""

    def call(
        method: str,
        ratio: float = 0.5,
        data: Path = examples,
        suite: str = "ruler",
        code: str = "c",
        learned: Path = pruner,
        **changes: Any,
    ) -> list[dict[str, Any]]:
        name = f"{suite}-{method}-{ratio}"
        predict.main(
            [
                *("--settings", json.dumps({**PREDICT, **changes})),
                *("--suite", suite, "--model", str(model), "--examples", str(data), "--method", method),
                *(["--pruner", str(learned)] if method.startswith("sdtp") else []),
                *("--keep-ratio", str(ratio), "--checkpoint", str(tmp_path / "checkpoints" / f"{name}.jsonl")),
                *("--code", code, "--output", str(tmp_path / f"{name}.jsonl")),
                *("--metrics", str(tmp_path / "metrics.json")),
            ]
        )
        return rows(tmp_path / f"{name}.jsonl")

    return call


def taken_over(folder: Path) -> int:
    return int(json.loads((folder / "metrics.json").read_text())["predictions_taken_over"])


def test_predictions_are_the_models_own(run: Run, model: Path, examples: Path) -> None:
    found = run("unpruned", 1.0)
    reference = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, example in zip(found, rows(examples), strict=True):
        ids = torch.tensor([example["prompt_ids"]])
        made = reference.generate(ids, max_new_tokens=example["max_new_tokens"], do_sample=False)[0, ids.shape[1] :]
        assert row["prediction"] == tokenizer.decode(made, skip_special_tokens=True)
        assert (row["prompt_tokens"], row["kept_tokens"]) == (example["length"], example["length"])
        assert (row["references"], row["depth"], row["seed"]) == (example["references"], example["depth"], None)
        assert "prompt_ids" not in row


def test_methods_keep_what_their_stages_say(run: Run) -> None:
    for row in run("sdtp"):
        assert row["kept_tokens"] == round(row["prompt_tokens"] / 8)  # three stages
    for row in run("sdtp-half"):
        # The second of the two that are left keeps the share of the third.
        assert row["kept_tokens"] in (round(row["prompt_tokens"] / 4), round(row["prompt_tokens"] / 8))
    found = run("random")
    assert [row["seed"] for row in found] == 12 * [0] + 12 * [1]
    assert [row["prediction"] for row in found[:12]] != [row["prediction"] for row in found[12:]]
    assert {row["kept_tokens"] for row in found} == {50, 62}


def test_batches_are_neighbours_of_one_length_up_to_so_many_tokens() -> None:
    rows = [{"id": number, "prompt_ids": [0] * length} for number, length in enumerate([4, 4, 4, 6, 4, 9])]
    found = [[row["id"] for row in batch] for batch in predict.batches(rows, 8)]
    assert found == [[0, 1], [2], [3], [4], [5]]


def test_nothing_is_predicted_twice(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("sdtp")
    assert taken_over(tmp_path) == 0

    def no_model(*arguments: Any) -> None:
        raise AssertionError("no model is needed")

    with monkeypatch.context() as patch:
        patch.setattr(predict, "load_model", no_model)
        assert run("sdtp", suites={"batch_tokens": 1}) == first
    assert taken_over(tmp_path) == 12
    # A trained pruner has its own protected tokens, and no others are asked of it.
    run("recent")
    run("recent", pruning={**PREDICT["pruning"], "sinks": 5})
    assert taken_over(tmp_path) == 0
    run("sdtp", code="other")
    assert taken_over(tmp_path) == 0
    run("sdtp", learned=make_pruner(tmp_path / "another", 1))
    assert taken_over(tmp_path) == 0
    run("sdtp", learned=make_pruner(tmp_path / "the-same", 0))
    assert taken_over(tmp_path) == 12
    assert run("sdtp") == first
    assert taken_over(tmp_path) == 12


def test_an_interrupted_job_goes_on_where_it_was(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("random")
    checkpoint = tmp_path / "checkpoints" / "ruler-random-0.5.jsonl"
    made = checkpoint.read_bytes()
    checkpoint.unlink()
    original = predict.predict

    def killed(*arguments: Any) -> Any:
        for number, answer in enumerate(original(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict", killed)
        with pytest.raises(KeyboardInterrupt):
            run("random")
    assert len(checkpoint.read_bytes().splitlines()) == 5
    with checkpoint.open("ab") as file:
        file.write(made.splitlines()[5][:30])
    assert run("random") == whole
    assert taken_over(tmp_path) == 5


def test_more_examples_are_predicted_beside_those_there_are(
    run: Run, model: Path, texts: Path, examples: Path, tmp_path: Path
) -> None:
    first = run("unpruned", 1.0)
    more = run("unpruned", 1.0, make_ruler(model, texts, tmp_path, examples=3))
    assert taken_over(tmp_path) == 12
    assert len(more) == 18
    assert {row["hash"]: row["prediction"] for row in first}.items() <= {
        row["hash"]: row["prediction"] for row in more
    }.items()


def test_longbench_is_predicted_to_its_own_lengths(run: Run, model: Path, tmp_path: Path) -> None:
    data = make_longbench(model, tmp_path, longbench_folder(tmp_path / "data"))
    found = run("recent", 0.5, data, "longbench")
    assert [row["id"] for row in found] == [row["id"] for row in rows(data)]
    assert {row["kept_tokens"] for row in found} == {38}  # round(300 / 8)
    assert found[0]["classes"] == ["City", "Date"]
    with pytest.raises(UserError, match="suite is 'longbench'; 'ruler' is needed"):
        run("recent", 0.5, data, "ruler")


def test_score_needs_the_file_alone(run: Run, tmp_path: Path) -> None:
    found = run("unpruned", 1.0)
    found[0]["prediction"] = f"It is {found[0]['references'][0]}."
    path = tmp_path / "by-hand.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    score.main(["--predictions", str(path), "--output", str(tmp_path / "scores" / "s.jsonl")])
    scored = rows(tmp_path / "scores" / "s.jsonl")
    assert [row["id"] for row in scored] == [row["id"] for row in found]
    assert scored[0]["score"] == 100.0
    path.write_text(json.dumps({**found[0], "task": "niah"}) + "\n")
    with pytest.raises(UserError, match=r"by-hand\.jsonl: 'niah' is no task of suite 'ruler'"):
        score.main(["--predictions", str(path), "--output", str(tmp_path / "s.jsonl")])
    path.write_text("")
    with pytest.raises(UserError, match="no predictions; at least one is needed"):
        score.main(["--predictions", str(path), "--output", str(tmp_path / "s.jsonl")])
    with pytest.raises(UserError, match="--predictions: no file"):
        score.main(["--predictions", str(tmp_path / "none"), "--output", str(tmp_path / "s.jsonl")])


def test_table_and_figures_of_scores(run: Run, tmp_path: Path) -> None:
    paths = []
    for method, ratio in (("unpruned", 1.0), ("random", 0.5)):
        run(method, ratio)
        paths.append(tmp_path / "scores" / f"{method}-{ratio}.jsonl")
        score.main(["--predictions", str(tmp_path / f"ruler-{method}-{ratio}.jsonl"), "--output", str(paths[-1])])
    settings = json.dumps({"suites": {"methods": ["random"], "keep_ratios": [0.5]}})
    files = ["--table", str(tmp_path / "ruler.csv"), "--figure", str(tmp_path / "suite-ruler.svg")]
    files += ["--heat-map", str(tmp_path / "map.svg"), "--metrics", str(tmp_path / "metrics.json")]
    arguments = ["--settings", settings, "--suite", "ruler", *files, "--scores", *map(str, paths)]
    suite_table.main(arguments)
    for name in ("suite-ruler.svg", "suite-ruler.png", "map.svg", "map.png"):
        assert (tmp_path / name).stat().st_size > 3000
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["random/0.5/compression"] == pytest.approx(6 * (400 + 500) / (6 * (50 + 62)))
    with pytest.raises(UserError, match="--scores hold"):
        suite_table.main(arguments[:-1])
