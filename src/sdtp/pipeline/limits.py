"""What a model's context has room for: refusals only, which change no result."""

from __future__ import annotations

from collections.abc import Mapping

from sdtp.errors import UserError
from sdtp.pipeline.config import BenchmarkSettings
from sdtp.pipeline.target_settings import ServingSettings


def check_context(tokens: Mapping[str, int], context: int | None) -> None:
    """Raise UserError where `tokens`, which share one context, are together more than it holds.

    Args:
        tokens: numbers of tokens under their config keys, or under words that say what they are.
        context: the model's context length in tokens; None for a model that states none.
    """
    total = sum(tokens.values())
    if context is not None and total > context:
        terms = " + ".join(f"{count} ({name})" for name, count in tokens.items())
        raise UserError(f"{terms} = {total} tokens: the model's context has {context}")


def check_benchmark(settings: BenchmarkSettings, context: int | None) -> None:
    """Raise UserError for a benchmarked length that, with the new tokens, is beyond the model's context."""
    for length in settings.prompt_tokens:
        check_context({"benchmark.prompt_tokens": length, "benchmark.new_tokens": settings.new_tokens}, context)


def check_serving(settings: ServingSettings, context: int | None) -> None:
    """Raise UserError for requests that, with the new tokens, are beyond the model's context."""
    tokens = {"serving.prompt_tokens": settings.prompt_tokens, "serving.new_tokens": settings.new_tokens}
    check_context(tokens, context)
