"""RULER's scores from rows alone, and the predictions that make the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdtp.evaluation.peers.budgets import fraction
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.evaluation.ruler.predicting import predict
from sdtp.evaluation.ruler.scoring import heat_map, score
from sdtp.evaluation.ruler.tasks import RulerExample
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

PRUNER = TokenPruner(PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4), scorers.Random(1))


@pytest.mark.parametrize(
    ("task", "prediction", "references", "expected"),
    [
        ("multi_value", "12", ["12", "34"], 50.0),
        ("multi_value", "34, then 12", ["12", "34"], 100.0),
        ("qa", "12", ["12", "34"], 100.0),
        ("qa", "56", ["12", "34"], 0.0),
        ("multi_value", "", ["12", "34"], 0.0),
        ("qa", "", ["12"], 0.0),
        ("single", "1", ["12"], 0.0),  # the prediction in the reference is no hit
        ("variables", "xyz", ["XYZ", "ABC", "DEF"], 100 / 3),
    ],
)
def test_score_is_the_share_of_references_in_the_prediction(
    task: str, prediction: str, references: list[str], expected: float
) -> None:
    assert score(task, prediction, references) == pytest.approx(expected)


def test_a_score_without_references_is_refused() -> None:
    with pytest.raises(ValueError, match="task single: no references"):
        score("single", "12", [])
    with pytest.raises(ValueError, match="a blank one is in every text"):
        score("single", "12", [""])


def row(number: int, value: float, **columns: Any) -> dict[str, Any]:
    place = {"task": "single", "length": 100, "depth": 0.0}
    return {"id": f"e{number}", "score": value, **place, **columns}


def test_heat_map_has_depths_down_and_lengths_across() -> None:
    scores = {(0.0, 100): [100, 100], (0.5, 100): [100, 0], (0.0, 50): [25, 25], (0.5, 50): [0, 0, 0]}
    rows = [
        row(100 * place + n, value, depth=depth, length=length)
        for place, ((depth, length), cell) in enumerate(scores.items())
        for n, value in enumerate(cell)
    ]
    found = heat_map([*rows, row(999, 100, task="multi_key", depth=None)])
    assert (found.depths, found.lengths, found.n) == ((0.0, 0.5), (50, 100), 2)
    np.testing.assert_allclose(found.values, [[25.0, 100.0], [0.0, 50.0]])
    with pytest.raises(ValueError, match=r"no prediction at depth 0\.5 and length 100: each depth"):
        heat_map([own for own in rows if (own["depth"], own["length"]) != (0.5, 100)])
    with pytest.raises(ValueError, match="no prediction has a depth"):
        heat_map([row(1, 100, depth=None)])


def test_an_id_is_one_example_in_its_task_only() -> None:
    found = heat_map([row(1, 100), row(1, 0, task="multi_key")])
    assert (found.n, found.values.tolist()) == (2, [[50.0]])
    with pytest.raises(ValueError, match=r"single 'e1' stands twice at depth 0\.0"):
        heat_map([row(1, 100), row(1, 0)])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Token n is the word `wn`."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)})))


def example(number: int, tokens: int, new_tokens: int = 5, first: int = 3) -> RulerExample:
    prompt = [first + (7 * place + number) % 90 for place in range(tokens)]
    return RulerExample(f"e{number}", "single", tokens, 0.5, prompt, (0, tokens), "", ["w1"], new_tokens, False, "")


def expected(model: Any, own: RulerExample) -> str:
    ids = model.generate(torch.tensor([own.prompt_ids]), max_new_tokens=own.max_new_tokens, do_sample=False)
    return " ".join(f"w{n}" for n in ids[0, len(own.prompt_ids) :].tolist())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predictions_are_the_models_own_in_the_order_of_the_examples(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    # Neighbours of one length share batches; replies of a batch have limits of their own.
    examples = [example(0, 20), example(1, 20, 3), example(2, 20, 7), example(3, 31), example(4, 20)]
    rows = list(predict(model, tokenizer, None, iter(examples), batch_size))
    assert [own["id"] for own in rows] == ["e0", "e1", "e2", "e3", "e4"]
    assert [own["prediction"] for own in rows] == [expected(model, own) for own in examples]
    assert [len(own["prediction"].split()) for own in rows] == [5, 3, 7, 5, 5]
    assert [(own["prompt_tokens"], own["kept_tokens"]) for own in rows] == [(n, n) for n in (20, 20, 20, 31, 20)]
    assert json.loads(json.dumps(rows)) == rows
    assert {key: rows[0][key] for key in ("task", "length", "depth", "references", "chat")} == {
        "task": "single",
        "length": 20,
        "depth": 0.5,
        "references": ["w1"],
        "chat": False,
    }


def test_pruned_predictions_are_those_under_the_pruner(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    examples = [example(0, 40), example(1, 40), example(2, 24)]
    rows = list(predict(model, tokenizer, PRUNER, examples, 2))
    plain = [own["prediction"] for own in predict(model, tokenizer, None, examples, 2)]
    for own, row_ in zip(examples, rows, strict=True):
        with PRUNER(model):
            assert row_["prediction"] == expected(model, own)
    assert [own["kept_tokens"] for own in rows] == [10, 10, 6]
    assert [own["prediction"] for own in rows] != plain


def test_a_peer_takes_the_place_of_a_pruner(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model, peer, examples = tiny_model(), Compression(SnapKV(6, 3), fraction(0.25)), [example(0, 80), example(1, 80)]
    model.generation_config.eos_token_id = None
    rows = list(predict(model, tokenizer, peer, examples, 1))
    with peer(model) as held:
        assert rows[1]["prediction"] == expected(model, examples[1])
    assert [own["kept_tokens"] for own in rows] == [20, 20]
    assert held.kept[-1].shape[1] > 20  # of all heads together


def test_a_pruner_that_removes_nothing_keeps_all_tokens(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    patient = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4, min_tokens=30)
    for schedule in (patient, PruningSchedule((), ())):
        rows = predict(tiny_model(), tokenizer, TokenPruner(schedule, scorers.Random(1)), [example(0, 20)], 1)
        assert [own["kept_tokens"] for own in rows] == [20]


def test_a_stop_token_ends_a_prediction_and_is_no_part_of_it(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [5, 7]
    calls: list[int] = []

    def rigged(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        token = 9 if len(calls) <= 2 else 7
        return torch.nn.functional.one_hot(torch.full(logits.shape[:2], token), 128).float()

    model.lm_head.register_forward_hook(rigged)
    (only,) = predict(model, tokenizer, None, [example(0, 20)], 1)
    assert only["prediction"] == "w9 w9"


def test_examples_are_taken_as_they_are_needed(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    taken: list[int] = []

    def endless() -> Iterator[RulerExample]:
        number = 0
        while True:
            taken.append(number)
            yield example(number, 20)
            number += 1

    rows = predict(tiny_model(), tokenizer, None, endless(), 2)
    assert [next(rows)["id"] for _ in range(3)] == ["e0", "e1", "e2"]
    assert len(taken) <= 5
