"""One prefill of several prompts, and responses fed on copies of it, against each response by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.evaluation.shared_prefill import follow, prefill
from sdtp.evaluation.teacher_forcing import forced_logits
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)
PROMPTS = [list(range(3, 43)), list(range(90, 60, -1)), [5, 9, 11], [7]]
ROWS = [0, 0, 2, 1, 0, 3]
RESPONSES = [[9, 60, 33, 2], [8], [44, 45], [3, 4, 5, 6, 7, 8], [9, 60, 34], [50, 51]]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt", "gemma3", "mistral_window", "gpt_oss"])
def test_each_response_is_predicted_as_by_itself(
    tiny_model: Callable[..., PreTrainedModel], family: str, pruned: bool
) -> None:
    model = tiny_model(family)
    pruner = TokenPruner(SCHEDULE, scorers.HiddenNorm()) if pruned else None
    with contextlib.nullcontext() if pruner is None else pruner(model):
        prefilled = prefill(model, PROMPTS)
        together = follow(model, prefilled, ROWS, RESPONSES, last=False)
        again = follow(model, prefilled, ROWS[::-1], RESPONSES[::-1], last=True)[::-1]
    for row, response, logits, second in zip(ROWS, RESPONSES, together, again, strict=True):
        alone, _, _ = forced_logits(model, PROMPTS[row], response, pruner)
        torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)
        torch.testing.assert_close(second, alone, rtol=0, atol=2e-5)


def test_one_prompt_and_response_are_bit_identical(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, pruner = tiny_model(), TokenPruner(SCHEDULE, scorers.LastQuery())
    with pruner(model):
        prefilled = prefill(model, PROMPTS[:1])
        logits = [follow(model, prefilled, [0], [response], last=False)[0] for response in RESPONSES]
    for one, response in zip(logits, RESPONSES, strict=True):
        assert torch.equal(one, forced_logits(model, PROMPTS[0], response, pruner)[0])


def test_single_tokens_need_no_second_forward(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    prefilled = prefill(model, PROMPTS[:2])
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    logits = follow(model, prefilled, [1, 0, 1], [[9], [9], [8]], last=True)
    assert not calls
    assert torch.equal(torch.cat(logits), prefilled.logits[[1, 0, 1]])


@pytest.mark.parametrize(("prompts", "responses"), [([[3], []], [[4]]), ([[3]], [[]])])
def test_refuses_empty_texts(
    tiny_model: Callable[..., PreTrainedModel], prompts: list[list[int]], responses: list[list[int]]
) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="each needs at least one"):
        follow(model, prefill(model, prompts), [0], responses, last=True)
