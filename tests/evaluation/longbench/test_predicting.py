"""Predictions: greedy, to the right stop, with and without a pruner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sdtp.evaluation.longbench.predicting import predict
from sdtp.evaluation.longbench.tasks import Prompt
from sdtp.evaluation.peers.budgets import fraction
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.snapkv import SnapKV
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

Make = Callable[..., PreTrainedModel]
PRUNER = TokenPruner(PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4), scorers.Random(1))
NEWLINE = 7


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """A token is a letter of its own; token 2 ends a text and is special, token 7 is a newline."""
    vocabulary = {chr(0x4E00 + number): number for number in range(128) if number != NEWLINE} | {"\n": NEWLINE}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0x4E00)))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=chr(0x4E02))


def letters(ids: list[int]) -> str:
    return "".join("\n" if number == NEWLINE else chr(0x4E00 + number) for number in ids)


def prompt(task: str, ids: list[int], **fields: Any) -> Prompt:
    own = {"id": "1", "task": task, "ids": ids, "context": (0, len(ids)), "tokens_cut": 0, "chat": False}
    return Prompt(**{**own, **fields})


def rig(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """Has the model say `tokens` one after the other, the last one for ever; what is returned counts its calls."""
    calls: list[int] = []

    def rigged(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        token = tokens[min(len(calls), len(tokens) - 1)]
        calls.append(token)
        return torch.nn.functional.one_hot(torch.full(logits.shape[:2], token), 128).float()

    model.lm_head.register_forward_hook(rigged)
    return calls


def test_rows_say_what_was_kept_and_generated(tiny_model: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    prompts = [
        prompt("hotpotqa", list(range(3, 43)), id="a", tokens_cut=5, chat=True),
        prompt("qasper", list(range(50, 74))),
    ]
    unpruned = list(predict(model, tokenizer, None, prompts))
    pruned = list(predict(model, tokenizer, PRUNER, prompts))
    generate: Any = model.generate
    for given, row in zip(prompts, unpruned, strict=True):
        new = {"hotpotqa": 32, "qasper": 128}[given.task]
        expected = generate(torch.tensor([given.ids]), max_new_tokens=new, do_sample=False)[
            0, len(given.ids) :
        ].tolist()
        assert row["prediction"] == letters([token for token in expected if token != 2])
    fields = {name: value for name, value in unpruned[0].items() if name != "prediction"}
    tokens = {"prompt_tokens": 40, "tokens_cut": 5, "kept_tokens": 40}
    assert fields == {"id": "a", "task": "hotpotqa", "chat": True, **tokens}
    assert unpruned[1]["chat"] is False
    assert [row["kept_tokens"] for row in pruned] == [10, 6]  # a quarter
    assert [row["prompt_tokens"] for row in pruned] == [40, 24]
    with PRUNER(model):
        expected = model.generate(torch.tensor([prompts[0].ids]), max_new_tokens=32, do_sample=False)[0, 40:].tolist()
    assert pruned[0]["prediction"] == letters([token for token in expected if token != 2])
    assert pruned[0]["prediction"] != unpruned[0]["prediction"]


@pytest.mark.parametrize("task", ["trec", "passage_count", "gov_report"])
def test_an_answer_has_at_most_the_tasks_tokens(
    tiny_model: Make, tokenizer: PreTrainedTokenizerBase, task: str
) -> None:
    model = tiny_model(max_position_embeddings=600)
    calls = rig(model, [9])
    (row,) = predict(model, tokenizer, None, [prompt(task, [5, 6])])
    assert len(row["prediction"]) == len(calls) == {"trec": 64, "passage_count": 32, "gov_report": 512}[task]


@pytest.mark.parametrize(
    ("task", "tokens", "answer"),
    [
        ("hotpotqa", [9, NEWLINE, 9, 2], [9, NEWLINE, 9]),  # newlines are text
        ("samsum", [9, NEWLINE, 9, 2], [9]),  # but end this one's answers
        ("samsum", [9, 2], [9]),
        ("samsum", [NEWLINE, 9, NEWLINE], [0, 9]),  # at least one token that is none: of equal ones, the first
        ("hotpotqa", [2], []),
    ],
)
@pytest.mark.parametrize("pruner", [None, PRUNER], ids=["unpruned", "pruned"])
def test_what_ends_an_answer(
    tiny_model: Make,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    tokens: list[int],
    answer: list[int],
    pruner: TokenPruner | None,
) -> None:
    model = tiny_model()
    calls = rig(model, tokens)
    (row,) = predict(model, tokenizer, pruner, [prompt(task, list(range(20, 60)))])
    assert row["prediction"] == letters(answer)
    assert len(calls) == len(answer) + 1


def test_every_stop_token_ends_an_answer(tiny_model: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [5, 8]
    rig(model, [9, 2, 8])
    (row,) = predict(model, tokenizer, None, [prompt("hotpotqa", [20, 21])])
    assert row["prediction"] == letters([9])  # 2 ends nothing here, and is special


def test_a_peer_prefills_in_a_pruners_place(tiny_model: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    """SnapKV at a quarter of 40 tokens: heads differ in which ten they hold, so that together they hold more."""
    model = tiny_model()
    snapkv = Compression(SnapKV(window=4, kernel=3), fraction(0.25))
    given = prompt("hotpotqa", list(range(3, 43)))
    (row,) = predict(model, tokenizer, snapkv, [given])
    (unpruned,) = predict(model, tokenizer, None, [given])
    assert (row["prompt_tokens"], row["kept_tokens"]) == (40, 10)
    assert row["prediction"] != unpruned["prediction"]


def test_prompts_are_taken_as_rows_are_asked_for(tiny_model: Make, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = predict(tiny_model(), tokenizer, None, [prompt("hotpotqa", [20]), prompt("hotpotqa", [], id="empty")])
    assert next(rows)["prompt_tokens"] == 1
    with pytest.raises(ValueError, match="hotpotqa 'empty' has no tokens"):
        next(rows)
