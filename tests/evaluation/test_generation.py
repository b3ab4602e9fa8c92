"""Generation with a trace: pruned and unpruned text of the same prompts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from sdtp.evaluation.generation import generate_batch, greedy, stop_tokens
from sdtp.pruning import scorers
from sdtp.pruning.decoding import greedy_settings
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

PRUNER = TokenPruner(PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4), scorers.Random(1))
PROMPTS = [list(range(3, 43)), list(range(50, 74))]


def test_a_row_of_a_batch_gives_what_it_gives_alone(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    batch = generate_batch(model, PRUNER, PROMPTS, max_new_tokens=5, pad_token_id=0)
    alone = [generate_batch(model, PRUNER, [prompt], max_new_tokens=5, pad_token_id=0)[0] for prompt in PROMPTS]
    assert batch == alone
    assert [len(stage) for stage in batch[0].kept] == [20, 10]
    assert [len(stage) for stage in batch[1].kept] == [12, 6]
    assert batch[1].kept[1][:2] == [0, 1]  # sinks of the row itself, not of its padding
    assert batch[1].kept[1][-4:] == [20, 21, 22, 23]


def test_unpruned_text_is_the_plain_models(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    generate: Any = model.generate
    expected = generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, do_sample=False)[0, 40:].tolist()
    generated = generate_batch(model, PRUNER, PROMPTS[:1], max_new_tokens=5, pad_token_id=0)[0]
    assert generated.unpruned_ids == expected
    assert generated.pruned_ids != expected


@pytest.mark.parametrize(("stops", "length"), [(5, 8), (7, 2), ([5, 7], 2), (None, 8)])
def test_stop_tokens_end_a_row(
    tiny_model: Callable[..., PreTrainedModel], stops: int | list[int] | None, length: int
) -> None:
    """Logits rigged to emit 9, 9, 7, 7, ...: scoring stops where timing would go on."""
    model = tiny_model()
    model.generation_config.eos_token_id = stops
    calls = []

    def rigged(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        token = 9 if len(calls) <= 2 else 7
        return torch.nn.functional.one_hot(torch.full(logits.shape[:2], token), 128).float()

    model.lm_head.register_forward_hook(rigged)
    generated = generate_batch(model, PRUNER, PROMPTS[:1], max_new_tokens=8, pad_token_id=0)[0]
    assert len(generated.unpruned_ids) == length
    # Unpruned to the first 7, then pruned, which begins with 7: rows end in `generate`, not by cutting its output.
    assert len(calls) == (3 + 1 if length == 2 else 16)


def test_stop_tokens_are_none_one_or_several(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    assert stop_tokens(model) == {2}
    model.generation_config.eos_token_id = [5, 7]
    assert stop_tokens(model) == {5, 7}
    model.generation_config.eos_token_id = None
    assert stop_tokens(model) == set()


def test_empty_prompt_is_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ValueError, match=r"prompts have \[40, 0\] tokens"):
        generate_batch(tiny_model(), PRUNER, [PROMPTS[0], []], max_new_tokens=5, pad_token_id=0)


# Of each kind of setting that changes or ends what the logits say; each alone changes the answer of the test below.
OF_CHECKPOINTS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 0.5,
    "encoder_no_repeat_ngram_size": 1,
    "sequence_bias": [[[7], 50.0]],
    "bad_words_ids": [[token] for token in range(64)],
    "suppress_tokens": list(range(64)),
    "begin_suppress_tokens": list(range(64, 128)),
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (0, 5.0),
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0},
    "num_beams": 3,
    "max_time": 0.0,
}


def argmaxes(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest token after the prompt, and after it and that token, and so on: each by a forward of its own."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", OF_CHECKPOINTS)
def test_settings_that_a_checkpoint_comes_with_change_no_answer(
    tiny_model: Callable[..., PreTrainedModel], name: str
) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = None if name != "exponential_decay_length_penalty" else 5
    expected = argmaxes(model, PROMPTS[0], 8)
    assert 5 not in expected
    model.generation_config.update(**{name: OF_CHECKPOINTS[name]})
    generate: Any = model.generate
    own = generate(torch.tensor(PROMPTS[:1]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    assert own != expected  # what the checkpoint asks for
    (reply,) = greedy(model, None, PROMPTS[:1], max_new_tokens=8, pad_token_id=0)
    assert reply.ids == expected
    (pruned,) = greedy(model, PRUNER, PROMPTS[:1], max_new_tokens=8, pad_token_id=0)
    (plain,) = greedy(tiny_model(), PRUNER, PROMPTS[:1], max_new_tokens=8, pad_token_id=0, stops=set())
    assert pruned == plain


def test_every_setting_that_makes_a_logits_processor_is_put_aside() -> None:
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    read = set(re.findall(r"generation_config\.([a-z]\w+)", source))
    assert {"repetition_penalty", "suppress_tokens", "watermarking_config"} <= read
    settings = greedy_settings(8)
    assert read - settings.keys() == {"use_cache"}  # by which guidance, put aside, would prefill its own prompt
    assert "eos_token_id" not in settings
