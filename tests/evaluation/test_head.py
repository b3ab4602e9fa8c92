"""A model's head alone gives the logits of its whole forward, whatever a family does after the output embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sdtp.evaluation.head import Head, response_states
from sdtp.verification.families import SIZES

# What these do after the output embeddings: cap, scale, divide.
SCALED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    ),
    "cohere": (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
}
# A stack that the causal LM calls by itself, outputs of several kinds, and a prefill with learned positions.
PLAIN = ["llama", "opt", "bloom", "gpt_neox", "gemma3", "mixtral", "gpt_oss"]
PROMPTS = [list(range(3, 43)), list(range(43, 83)), list(range(83, 123))]
RESPONSES = [[9, 60, 33, 2], [7], [5, 6]]


@pytest.fixture
def make(tiny_model: Callable[..., PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """Factory of tiny models by family."""

    def made(family: str) -> PreTrainedModel:
        if family not in SCALED:
            return tiny_model(family)
        config_class, model_class, own = SCALED[family]
        torch.manual_seed(1234)
        model: PreTrainedModel = model_class(config_class(**{**SIZES, **own}))
        return model.eval().requires_grad_(False)

    return made


@pytest.mark.parametrize("family", [*SCALED, *PLAIN])
@pytest.mark.parametrize("prompts", [1, 3])
def test_head_of_the_stored_states_is_the_whole_forward(
    make: Callable[[str], PreTrainedModel], family: str, prompts: int
) -> None:
    model = make(family)
    head = Head(model)
    found = response_states(model, PROMPTS[:prompts], RESPONSES[:prompts])
    for prompt, response, (states, logits) in zip(PROMPTS, RESPONSES, found, strict=False):
        assert states.shape == (len(response), 32)
        whole = model(input_ids=torch.tensor([prompt + response])).logits[0, 39 : 39 + len(response)]
        torch.testing.assert_close(head(states), whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
        head.check(states, logits)
        if family in SCALED:
            bare = model.get_output_embeddings()(states)
            assert float((bare - whole).abs().max()) > 0.1


def test_nothing_of_the_model_is_left_changed(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    head = Head(model)
    before = model(input_ids=torch.tensor([PROMPTS[0]])).logits
    with pytest.raises(RuntimeError):
        head(torch.zeros(2, 31))
    assert "forward" not in model.model.__dict__
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(input_ids=torch.tensor([PROMPTS[0]])).logits, before)


def test_a_forward_that_an_instance_has_of_its_own_is_put_back(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    calls: list[int] = []
    plain = model.model.forward
    own = lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]  # noqa: E731  # as accelerate puts one
    model.model.forward = own
    head = Head(model)
    [(states, logits)] = response_states(model, PROMPTS[:1], RESPONSES[:1])
    count = len(calls)
    torch.testing.assert_close(head(states), logits, rtol=0, atol=1e-5)
    assert len(calls) == count  # the decoder did not run
    assert model.model.__dict__["forward"] is own


def test_model_whose_logits_come_from_elsewhere_too_is_refused(make: Callable[[str], PreTrainedModel]) -> None:
    class Biased(LlamaForCausalLM):
        """Adds what a token's embedding says to its logits."""

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            embedded = self.model.embed_tokens(input_ids)[:, -output.logits.shape[1] :]
            output.logits = output.logits + embedded @ self.model.embed_tokens.weight.T
            return output

    torch.manual_seed(1234)
    model = Biased(make("llama").config).eval().requires_grad_(False)
    head = Head(model)
    [(states, logits)] = response_states(model, PROMPTS[:1], RESPONSES[:1])
    with pytest.raises(TypeError, match=r"Biased: its head makes logits .* are off by .* has no head that can be run"):
        head.check(states, logits)


def test_check_refuses_what_is_no_number(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("llama")
    with pytest.raises(TypeError, match="off by nan"):
        Head(model).check(torch.full((1, 32), float("nan")), torch.ones(1, 128))
