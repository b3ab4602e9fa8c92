"""What exceeds the model's context is refused with its keys and both numbers."""

from __future__ import annotations

import pytest

from sdtp.errors import UserError
from sdtp.pipeline.config import BenchmarkSettings
from sdtp.pipeline.limits import check_benchmark, check_context

BENCHMARK = BenchmarkSettings(prompt_tokens=(24, 40), new_tokens=3, repeats=5, warmup=1)


def test_tokens_that_just_fit_are_accepted() -> None:
    check_context({"a": 30, "b": 12}, 42)
    check_benchmark(BENCHMARK, 43)


def test_tokens_beyond_the_context_are_refused() -> None:
    with pytest.raises(UserError, match=r"^30 \(a\) \+ 13 \(b\) = 43 tokens: the model's context has 42$"):
        check_context({"a": 30, "b": 13}, 42)
    with pytest.raises(UserError, match=r"^40 \(benchmark\.prompt_tokens\) \+ 3 \(benchmark\.new_tokens\) = 43 .* 42$"):
        check_benchmark(BENCHMARK, 42)


def test_model_without_a_stated_context_refuses_nothing() -> None:
    check_context({"a": 10**9}, None)
    check_benchmark(BENCHMARK, None)
