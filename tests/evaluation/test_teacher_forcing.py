"""Teacher forcing on a pruned cache, and the two scores read off it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.evaluation import continuation, methods, retrieval
from sdtp.evaluation.teacher_forcing import Forced, batch_logits, force, summary
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.saliency import saliency

PROMPT = list(range(3, 43))
SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)


def test_unpruned_is_one_plain_forward(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, response = tiny_model(), [9, 60, 33, 2]
    forced = force(model, PROMPT, response)
    logits = model(input_ids=torch.tensor([PROMPT + response])).logits[0, 39:43].log_softmax(-1)
    torch.testing.assert_close(forced.log_probs, logits[range(4), response], rtol=0, atol=1e-5)
    assert torch.equal(forced.argmax, logits.argmax(-1))
    assert forced.kept_tokens == 40


@pytest.mark.parametrize("scorer", [scorers.Random(3), scorers.Recent(), scorers.HiddenNorm(), scorers.LastQuery()])
def test_pruned_gives_the_logits_of_generate(
    tiny_model: Callable[..., PreTrainedModel], scorer: scorers.Scorer
) -> None:
    model, pruner = tiny_model(), TokenPruner(SCHEDULE, scorer)
    with pruner(model):
        generate: Any = model.generate
        generated = generate(
            torch.tensor([PROMPT]),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    response = generated.sequences[0, 40:].tolist()
    forced = force(model, PROMPT, response, pruner)
    expected = torch.cat(generated.logits).log_softmax(-1)  # [6, vocabulary]
    torch.testing.assert_close(forced.log_probs, expected[range(6), response], rtol=0, atol=1e-5)
    assert forced.argmax.tolist() == expected.argmax(-1).tolist()
    assert forced.kept_tokens == 10
    unpruned = force(model, PROMPT, response)
    assert (unpruned.log_probs - forced.log_probs).abs().max() > 1e-3  # pruning does change these logits


def test_response_of_one_token(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    forced = force(model, PROMPT, [9], TokenPruner(SCHEDULE, scorers.Recent()))
    assert forced.log_probs.shape == forced.argmax.shape == (1,)


@pytest.mark.parametrize("scorer", [None, scorers.HiddenNorm(), scorers.LastQuery()])
def test_examples_together_have_what_each_has_alone(
    tiny_model: Callable[..., PreTrainedModel], scorer: scorers.Scorer | None
) -> None:
    model, pruner = tiny_model(), None if scorer is None else TokenPruner(SCHEDULE, scorer)
    prompts, responses = [PROMPT, PROMPT[::-1], PROMPT[:24]], [[9, 60, 33], [7], [5, 6]]
    together = batch_logits(model, prompts, responses, pruner)
    for prompt, response, one in zip(prompts, responses, together, strict=True):
        found, alone = summary(*one), force(model, prompt, response, pruner)
        torch.testing.assert_close(found.log_probs, alone.log_probs, rtol=0, atol=1e-5)
        assert torch.equal(found.argmax, alone.argmax)
        assert found.kept_tokens == alone.kept_tokens


@pytest.mark.parametrize(("prompt", "response", "named"), [([], [1], "prompts"), ([1], [], "responses")])
def test_refuses_empty_texts(
    tiny_model: Callable[..., PreTrainedModel], prompt: list[int], response: list[int], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"{named} have \[0\] tokens: each needs at least one"):
        force(tiny_model(), prompt, response)


def forced(argmax: list[int], log_probs: list[float]) -> Forced:
    return Forced(torch.tensor(log_probs), torch.tensor(argmax), 1)


def test_correct_means_every_token() -> None:
    assert retrieval.correct(forced([5, 6, 7], [0, 0, 0]), [5, 6, 7])
    assert not retrieval.correct(forced([5, 6, 8], [0, 0, 0]), [5, 6, 7])


def test_loss_is_the_mean_in_nats() -> None:
    assert continuation.loss(forced([1, 2], [-1.0, -2.0])) == pytest.approx(1.5)


class TestMethods:
    @pytest.mark.parametrize("method", methods.BASELINES)
    def test_baseline_is_the_scorer_of_its_name(self, method: str) -> None:
        pruner = methods.baseline(method, SCHEDULE, 5)(PROMPT, [9])
        assert pruner is not None
        assert type(pruner.scorer).__name__.lower() == method
        assert pruner.schedule == SCHEDULE
        assert getattr(pruner.scorer, "seed", 5) == 5

    def test_oracle_keeps_the_most_salient_tokens_of_the_very_example(
        self, tiny_model: Callable[..., PreTrainedModel]
    ) -> None:
        model, response = tiny_model(), [9, 60, 33]
        schedule = PruningSchedule((2,), (0.25,), sinks=0, local=0.0, min_local=1)
        pruner = methods.oracle(model, schedule, "abs", "loss")(PROMPT, response)
        assert pruner is not None
        with pruner(model) as trace:
            model(input_ids=torch.tensor([PROMPT]), use_cache=True)
        labels = saliency(model, torch.tensor(PROMPT), torch.tensor(response), (2,))[0]
        best = set(labels[:-1].topk(9).indices.tolist()) | {39}  # 10 tokens, the protected last one among them
        assert trace.kept[0][0].tolist() == sorted(best)
