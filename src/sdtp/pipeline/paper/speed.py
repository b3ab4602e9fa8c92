"""Table 2 of the paper: arithmetic, time and memory over prompt lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from sdtp.pipeline.paper.part import Part, Value, not_run, part
from sdtp.pipeline.paper.published import Numbers

# The paper's prompt lengths, in tokens, and the tokens it decodes after each.
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
NEW_TOKENS = 128
ABOUT = (
    "The paper times prefill, and prefill with 128 new tokens, of prompts of 4K to 128K tokens on an A100. Here "
    "seconds are this machine's and stand beside none of the paper's; ratios do: speedups, and changes of peak "
    "memory with the weights included, are medians of pairs that ran side by side in one process. TFLOP here are of "
    "causal attention and the logits of a prompt's last position; how the paper counts them is not known, and it has "
    "more: 72.5 for Mistral-7B unpruned at 4K and 8864 at 128K, where this count gives 61.6 and 6333."
)
KEYS = {"prompt_tokens": "Prompt tokens", "method": "Method", "keep_ratio": "Keep ratio", "new_tokens": "New tokens"}
VALUES = (
    Value("prefill_tflop", "Prefill TFLOP"),
    Value("end_to_end_tflop", "End-to-end TFLOP"),
    Value("flop_change", "End-to-end FLOPs against unpruned", "change"),
    Value("prefill_s", "Prefill s", published=False),
    Value("scoring_s", "Of it scoring, s", published=False),
    Value("end_to_end_s", "End to end s", published=False),
    Value("prefill_speedup", "Prefill speedup ×"),
    Value("end_to_end_speedup", "End-to-end speedup ×"),
    Value("peak_memory_bytes", "Peak memory", "memory", published=False),
    Value("memory_change", "Peak memory against unpruned", "change"),
)


def table_2(
    latency: pd.DataFrame,
    decode_tflop: Callable[[int, int, float], float],
    context: int | None,
    new_tokens: int,
    command: Callable[[int, int | None], str],
    published: Numbers,
) -> Part:
    """A row each prompt length and arm, the unpruned one first, and a row each length of the paper that was not timed.

    Args:
        latency: as `sdtp.pipeline.results.read_latency` gives it.
        decode_tflop: of prompt length, new tokens and keep ratio (1.0: unpruned), the arithmetic of decoding.
        context: positions of the model; None where it states none.
        new_tokens: that this run decodes after each prompt.
        command: of a prompt's tokens, and the positions that a model in place of this one needs or None, what times it.
        published: the paper's numbers.
    """
    rows: list[dict[str, Any]] = []
    for _, group in latency.groupby("prompt_tokens"):
        arms = group.sort_values("keep_ratio", ascending=False, kind="stable").to_dict("records")
        totals = {
            arm["keep_ratio"]: arm["prefill_tflop"]
            + decode_tflop(arm["prompt_tokens"], arm["new_tokens"], arm["keep_ratio"])
            for arm in arms
        }
        for arm in arms:
            rows.append(
                {
                    **{key: arm[key] for key in (*KEYS, "prefill_tflop", "prefill_s", "scoring_s", "end_to_end_s")},
                    **{key: arm[key] for key in ("prefill_speedup", "end_to_end_speedup", "peak_memory_bytes")},
                    "end_to_end_tflop": totals[arm["keep_ratio"]],
                    "flop_change": totals[arm["keep_ratio"]] / totals[1.0] - 1,
                    "memory_change": arm["peak_memory_ratio"] - 1,
                }
            )
    timed = {nominal(int(length)) for length in latency["prompt_tokens"].unique()}
    rows += [_untimed(length, context, new_tokens, command) for length in LENGTHS if length not in timed]
    return part("table-2", ABOUT, KEYS, VALUES, rows, published, lambda row: str(nominal(row["prompt_tokens"])))


def nominal(tokens: int) -> int:
    """The length of the paper that a prompt is of, which leaves up to 5% of it to new tokens; else its own length."""
    return next((length for length in LENGTHS if 0.95 * length <= tokens <= length), int(tokens))


def _untimed(
    length: int, context: int | None, new_tokens: int, command: Callable[[int, int | None], str]
) -> dict[str, Any]:
    keys: Mapping[str, Any] = {"prompt_tokens": length, "method": "sdtp", "keep_ratio": 0.9, "new_tokens": new_tokens}
    longest = length if context is None else min(length, context - new_tokens)
    if nominal(longest) != length:
        why = (
            f"a prompt of this length, or up to 5% less, and {new_tokens} new tokens are more than the model's "
            f"{context:,} positions; the command is for one with more in place of MODEL, as a run of its own"
        )
        return not_run(why, command(length, length + new_tokens), **keys)
    why = "not among benchmark.prompt_tokens of this configuration"
    if longest < length:
        why += f"; {longest:,} counts, the longest that {new_tokens} new tokens leave of {context:,} positions"
    return not_run(why, command(longest, None), **keys)
