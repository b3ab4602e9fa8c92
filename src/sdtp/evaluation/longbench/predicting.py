"""Predictions of a model, pruned or not, for prompts of LongBench: greedy, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdtp.evaluation.generation import greedy, stop_tokens
from sdtp.evaluation.longbench.tasks import Prompt, task
from sdtp.evaluation.peers.peer import Peer
from sdtp.pruning.pruner import TokenPruner


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pruner: TokenPruner | Peer | None,
    prompts: Iterable[Prompt],
) -> Iterator[dict[str, Any]]:
    """Generate an answer to each prompt, as they are asked for.

    Decoding is greedy, to the model's stop tokens or the task's most new tokens. As in the official runs a newline is a
    stop token too for `samsum`, and an answer to it has at least one token before.

    Args:
        model: eval mode, unhooked.
        tokenizer: the model's.
        pruner: what prefills the prompts; None for the unpruned model.
        prompts: in any order, of any tasks.

    Yields:
        JSON-ready rows: `id`, `task` and `chat` of the prompt; `prompt_tokens` that the model was given, after
        `tokens_cut` were cut; `kept_tokens`, those of the prompt that the last layer holds in its cache (each of its
        KV heads, of a compressed one); `prediction`, the text without the token that ended it and special tokens.

    Raises:
        ValueError: an empty prompt; an unknown task.
    """
    for prompt in prompts:
        if not prompt.ids:
            raise ValueError(f"{prompt.task} {prompt.id!r} has no tokens: a prompt needs at least one")
        asked = task(prompt.task)
        stops = stop_tokens(model)
        if asked.stops_at_newline:
            stops.add(tokenizer("\n", add_special_tokens=False)["input_ids"][-1])
        (reply,) = greedy(
            model,
            pruner,
            [prompt.ids],
            asked.max_new_tokens,
            pad_token_id=min(stops, default=0),  # a single row has no padding
            stops=stops,
            min_new_tokens=int(asked.stops_at_newline),
        )
        yield {
            "id": prompt.id,
            "task": prompt.task,
            "chat": prompt.chat,
            "prompt_tokens": len(prompt.ids),
            "tokens_cut": prompt.tokens_cut,
            "kept_tokens": reply.kept_tokens,
            "prediction": str(tokenizer.decode(reply.ids, skip_special_tokens=True)),
        }
