"""The sweep's steps, on files, with a tiny model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.evaluation.teacher_forcing import force, forced_logits
from sdtp.pipeline.data_folder import load_split
from sdtp.pipeline.files import read_jsonl, write_jsonl
from sdtp.pipeline.models import load_model
from sdtp.pipeline.steps import reference, sweep_evaluate, sweep_table, sweep_train
from sdtp.pruning import flops
from sdtp.pruning.fingerprint import fingerprint
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import label_fit
from sdtp.training.examples import Example
from sdtp.training.label_fit import fit_labels, stage_states
from sdtp.training.optimizer import adamw
from sdtp.training.processes import Processes
from sdtp.training.response import response_kl
from sdtp.training.saliency import saliency
from tests.pipeline.saliency_run import MODEL, inputs, make_run

pytestmark = pytest.mark.usefixtures("no_tracking")

LAYERS = (1, 2, 3)
# Retrieval r0, r1, r2 and continuation c0, c1, of these prompt lengths.
TEST = {"r0": 30, "c0": 40, "r1": 34, "c1": 40, "r2": 30}
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "model": MODEL,
    "pruning": {"start": 1, "step": 1, "sinks": 1, "local": 0.1, "min_local": 2},
    "saliency": {"reduction": "l2", "target": "loss", "batch_tokens": 60, "gradient_checkpointing": False},
    "training": {
        "label_epochs": 2,
        "label_examples": 3,
        "learning_rate": 1e-2,
        "width": 8,
        "position": True,
        "question_rank": 8,
        "neighbours": 1,
        "recency": 0.25,
        "weights": {"mse": 1.0, "rank": 0.5},
    },
    "evaluation": {"batch_tokens": 80},
    "sweep": {"layers": [3, 1], "layer_ratios": [0.5], "counts": [1, 2], "count_ratios": [0.7, 0.5], "examples": 2},
}


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> Path:
    """A run folder with a model, five examples to train on, and the test examples."""
    folder = tmp_path / "run"
    make_run(folder, tiny_model(), [20 + number for number in range(6)])
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "id": id_,
            "task": "retrieval" if id_[0] == "r" else "continuation",
            "prompt_ids": torch.randint(3, 128, (tokens,), generator=generator).tolist(),
            "response_ids": torch.randint(3, 128, (3,), generator=generator).tolist(),
        }
        for id_, tokens in TEST.items()
    ]
    Dataset.from_list(rows).save_to_disk(folder / "data" / "test")
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    manifest["splits"]["test"] = {"content_sha256": "e" * 64}
    (folder / "data" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def chosen(*keys: str, **change: Any) -> str:
    """The settings under dotted keys, as a rule passes them, with changes by block."""
    blocks: dict[str, Any] = {}
    for key in keys:
        block, _, leaf = key.partition(".")
        blocks[block] = {**blocks.get(block, {}), leaf: SETTINGS[block][leaf]} if leaf else SETTINGS[block]
    for block, values in change.items():
        blocks[block] = {**blocks[block], **values}
    return json.dumps(blocks)


def train(run: Path, output: Path, **change: Any) -> TokenPruner:
    keys = ("seed", "model", "pruning", "saliency", "training", "sweep.layers", "sweep.counts")
    metrics = output.with_suffix(".json")
    arguments = ["--settings", chosen(*keys, **change), *inputs(run), "--output", str(output)]
    sweep_train.main([*arguments, "--metrics", str(metrics)])
    return TokenPruner.from_pretrained(output)


@pytest.fixture
def trained(run: Path) -> Path:
    """The sweep's pruner."""
    train(run, run / "pruner")
    return run / "pruner"


def model_of(run: Path) -> PreTrainedModel:
    return load_model(run / "model", "float32", "sdpa", torch.device("cpu"))


def test_one_pruner_has_a_stage_at_every_layer_and_prunes_nothing_by_itself(run: Path, trained: Path) -> None:
    pruner = TokenPruner.from_pretrained(trained)
    assert pruner.schedule == PruningSchedule(LAYERS, (1.0, 1.0, 1.0), sinks=1, local=0.1, min_local=2)
    assert pruner.trained_for == fingerprint(model_of(run))
    assert isinstance(pruner.scorer, Learned)
    assert (pruner.scorer.stages, pruner.scorer.width, pruner.scorer.neighbours) == (3, 8, 1)
    metrics = json.loads(trained.with_suffix(".json").read_text())
    assert (metrics["examples"], metrics["stages"]) == (3, 3)


def test_scorers_are_those_of_a_fit_to_each_layers_own_saliency(run: Path, trained: Path) -> None:
    model, training = model_of(run), SETTINGS["training"]
    examples = []
    for row in load_split(run / "data", "train").select(range(3)):
        prompt, response = torch.tensor(row["prompt_ids"]), torch.tensor(row["response_ids"])
        # Layer by layer: what a backward through all of them at once gives each is its own.
        labels = torch.cat([saliency(model, prompt, response, [layer], "l2", "loss") for layer in LAYERS])
        examples.append(Example(row["id"], prompt, response, labels))
    torch.manual_seed(3)
    expected = Learned(32, 3, width=8, position=True, question_rank=8, neighbours=1, recency=0.25)
    fit_labels(
        expected,
        *adamw(expected, training["learning_rate"], training["label_epochs"] * len(examples)),
        {index: stage_states(model, one.prompt_ids, LAYERS) for index, one in enumerate(examples)},
        examples,
        epochs=range(1, training["label_epochs"] + 1),
        mse=1.0,
        rank=0.5,
        seed=3,
        log=lambda loss, epoch: None,
        processes=Processes(cpu=True),
    )
    found = TokenPruner.from_pretrained(trained).scorer
    assert isinstance(found, Learned)
    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], value, atol=1e-5), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"label_epochs": 0}}, "training.label_epochs is 0"),
        ({"training": {"weights": {"mse": 0.0, "rank": 0.0}}}, "weights.mse 0 and rank 0: .* saliency alone"),
        ({"sweep": {"layers": [1, 4]}}, "sweep.layers: 4 is no layer"),
        ({"sweep": {"counts": [5]}}, "sweep.counts: 5 stages"),
    ],
)
def test_what_leaves_nothing_to_learn_is_refused(run: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(run, tmp_path / "pruner", **change)
    assert not (tmp_path / "pruner").exists()


def test_states_that_would_not_fit_are_refused_before_any_saliency_is_computed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_fit, "available_memory", lambda: 9000)  # a token's at three layers take 192 bytes
    monkeypatch.setattr(sweep_train, "batch_labels", None)  # is not called
    with pytest.raises(UserError, match=r"training\.label_examples: the hidden states of 3 .*: at most 2 is accepted"):
        train(run, tmp_path / "pruner")


def evaluate(run: Path, pruner: Path, output: Path, layers: tuple[int, ...], ratio: float) -> list[dict[str, Any]]:
    keys = ("model", "evaluation", "sweep.examples")
    states = output.with_name("reference.safetensors")
    files = ["--output", str(states), "--metrics", str(output.with_name("reference.json"))]
    reference.main(["--settings", chosen("model", "evaluation"), *inputs(run), *files])
    arguments = ["--settings", chosen(*keys), *inputs(run), "--pruner", str(pruner), "--layers", *map(str, layers)]
    arguments += ["--reference", str(states)]
    arguments += ["--keep-ratio", str(ratio), "--output", str(output), "--metrics", str(output.with_suffix(".json"))]
    sweep_evaluate.main(arguments)
    return read_jsonl(output)


@pytest.mark.parametrize(("layers", "ratio"), [((2,), 0.5), ((1, 3), 0.7)])
def test_rows_are_of_the_stages_asked_for_with_their_own_weights(
    run: Path, trained: Path, tmp_path: Path, layers: tuple[int, ...], ratio: float
) -> None:
    found = evaluate(run, trained, tmp_path / "rows.jsonl", layers, ratio)
    assert [row["id"] for row in found] == ["r0", "c0", "r1", "c1"]  # two of each task
    # Put together by hand.
    whole = TokenPruner.from_pretrained(trained).scorer
    assert isinstance(whole, Learned)
    scorer = Learned(32, len(layers), width=8, position=True, question_rank=8, neighbours=1, recency=0.25)
    for lists in ("mlps", "keys", "queries"):
        for stage, layer in enumerate(layers):
            getattr(scorer, lists)[stage].load_state_dict(getattr(whole, lists)[layer - 1].state_dict())
    keep = tuple(ratio ** (stage + 1) for stage in range(len(layers)))
    schedule = PruningSchedule(layers, keep, sinks=1, local=0.1, min_local=2)
    model = model_of(run)
    by_id = {row["id"]: row for row in load_split(run / "data", "test")}
    for row in found:
        example, tokens = by_id[row["id"]], TEST[row["id"]]
        forced = force(model, example["prompt_ids"], example["response_ids"], TokenPruner(schedule, scorer))
        assert row["loss"] == pytest.approx(-float(forced.log_probs.mean()), abs=1e-5)
        prompt, response = example["prompt_ids"], example["response_ids"]
        pruned, _, _ = forced_logits(model, prompt, response, TokenPruner(schedule, scorer))
        unpruned = model(input_ids=torch.tensor([prompt + response[:-1]])).logits[0, -len(response) :]
        assert row["kl"] == pytest.approx(float(response_kl(pruned, unpruned)), abs=1e-5)
        assert row["top1"] == pytest.approx(float((pruned.argmax(-1) == unpruned.argmax(-1)).float().mean()))
        assert row["kept_tokens"] == forced.kept_tokens == schedule.surviving(tokens)[-1]
        assert row["flop"] == flops.prefill(model.config, tokens, schedule, scorer)
        assert row["unpruned_flop"] == flops.prefill(model.config, tokens) > row["flop"]
        assert (row["method"], row["layers"], row["keep_ratio"], row["seed"]) == ("sdtp", list(layers), ratio, None)


def test_a_layer_without_a_stage_is_named(run: Path, trained: Path, tmp_path: Path) -> None:
    part = TokenPruner.from_pretrained(trained).at_stages([0, 2])
    part.save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match=r"no stage before layer 2; it has stages before \(1, 3\)"):
        evaluate(run, tmp_path / "part", tmp_path / "rows.jsonl", (1, 2), 0.5)


def test_both_tables_are_gathered_from_cells_that_they_may_share(run: Path, tmp_path: Path) -> None:
    def rows(ids: list[str], loss: float, **identity: Any) -> list[dict[str, Any]]:
        return [
            {
                "id": id_,
                "task": "retrieval" if id_[0] == "r" else "continuation",
                "prompt_tokens": TEST[id_],
                "kept_tokens": 10,
                "correct": id_ == "r0",
                "loss": loss + index,
                "kl": loss / 8,
                "top1": 0.5,
                **identity,
            }
            for index, id_ in enumerate(ids)
        ]

    cells = [((1,), 0.5), ((3,), 0.5), ((1,), 0.7), ((1, 2), 0.7), ((1, 2), 0.5)]
    evaluations = []
    for number, (layers, ratio) in enumerate(cells):
        path = tmp_path / f"{number}.jsonl"
        identity = {"method": "sdtp", "layers": list(layers), "keep_ratio": ratio, "seed": None}
        operations = {"flop": 50.0, "unpruned_flop": 100.0}
        write_jsonl(path, rows(["r0", "c0", "r1", "c1"], 2.0 + number, **operations, **identity))
        evaluations.append(str(path))
    # The run's evaluation has more examples than the sweep.
    unpruned = rows(list(TEST), 1.0, method="unpruned", keep_ratio=1.0, seed=None)
    write_jsonl(tmp_path / "unpruned.jsonl", unpruned)
    arguments = ["--settings", chosen("pruning.start", "pruning.step", "sweep"), "--data", str(run / "data")]
    arguments += ["--metrics", str(tmp_path / "metrics.json"), "--unpruned", str(tmp_path / "unpruned.jsonl")]
    for name in ("position", "count"):
        arguments += [f"--{name}", str(tmp_path / f"stage-{name}.csv")]
        arguments += [f"--{name}-figure", str(tmp_path / f"stage-{name}.svg")]
    sweep_table.main([*arguments, "--evaluations", *evaluations])

    position, count = (pd.read_csv(tmp_path / f"stage-{name}.csv") for name in ("position", "count"))
    panels = [table[(table["task"] == "retrieval") & (table["metric"] == "loss")] for table in (position, count)]
    columns = ["stages", "layers", "keep_ratio", "difference", "n"]
    assert [panel[columns].iloc[1:].values.tolist() for panel in panels] == [
        [[1, 1.0, 0.5, 1.0, 2], [1, 3.0, 0.5, 2.0, 2]],
        [[1, "1", 0.7, 3.0, 2], [1, "1", 0.5, 1.0, 2], [2, "1 2", 0.7, 4.0, 2], [2, "1 2", 0.5, 5.0, 2]],
    ]
    for name in ("position", "count"):
        for kind in ("svg", "png"):
            assert (tmp_path / f"stage-{name}.{kind}").stat().st_size > 5000
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["layers-3/retrieval-loss/0.5"] == 2.0
    assert metrics["stages-2/retrieval-loss/0.5"] == 5.0

    with pytest.raises(UserError, match="no row for 4 of 20 evaluations"):
        sweep_table.main([*arguments, "--evaluations", *evaluations[1:]])
    write_jsonl(tmp_path / "unpruned.jsonl", copy.deepcopy(unpruned)[1:])
    with pytest.raises(UserError, match="one row of method unpruned for each of 4 examples is needed"):
        sweep_table.main([*arguments, "--evaluations", *evaluations])
