"""Examples are refused where they enter, by name."""

import dataclasses

import pytest
import torch

from sdtp.errors import UserError
from sdtp.training.examples import Example, check_examples

LAYERS = (1, 3)
GOOD = Example("good", torch.arange(20), torch.tensor([5]), torch.rand(2, 20))


def labels(stage, value):
    saliency = torch.rand(2, 20)
    saliency[stage, 4] = value
    return saliency


def test_good_examples_pass_and_their_tokens_are_counted():
    other = dataclasses.replace(GOOD, response_ids=torch.tensor([5, 6, 7]))
    assert check_examples([GOOD, other], LAYERS, vocabulary=20) == [(20, 1), (20, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saliency": torch.rand(3, 20)}, r"saliency has shape \(3, 20\): \(2, 20\) is accepted"),
        ({"saliency": torch.rand(2, 30)}, r"saliency has shape \(2, 30\): \(2, 20\) is accepted"),
        ({"saliency": torch.rand(2, 1)}, r"saliency has shape \(2, 1\)"),
        ({"saliency": torch.rand(20)}, r"saliency has shape \(20,\)"),
        ({"saliency": labels(0, torch.nan)}, r"saliency of stage 0 \(layer 1\) is not finite"),
        ({"saliency": labels(1, -torch.inf)}, r"saliency of stage 1 \(layer 3\) is not finite"),
        ({"prompt_ids": torch.arange(0)}, r"prompt_ids has shape \(0,\): \[tokens\], at least one"),
        ({"prompt_ids": torch.arange(20)[None]}, r"prompt_ids has shape \(1, 20\)"),
        ({"response_ids": torch.arange(0)}, r"response_ids has shape \(0,\)"),
        ({"response_ids": torch.tensor([4, 20])}, "response_ids has token 20: 0 to 19 are accepted"),
        ({"prompt_ids": torch.arange(-1, 19)}, "prompt_ids has token -1: 0 to 19 are accepted"),
    ],
)
def test_bad_examples_are_named(change, message):
    bad = dataclasses.replace(GOOD, id="bad", **change)
    with pytest.raises(UserError, match=f"example 'bad': {message}"):
        check_examples([GOOD, bad], LAYERS, vocabulary=20)
