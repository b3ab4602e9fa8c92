"""Which ways of generating mean under a pruner what they mean without one; the others are refused by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

# Caches that `generate` would make and pruning cannot fill; those it is given are looked at when they arrive. "hybrid",
# which older checkpoints of sliding-window models ask for, `generate` takes for none given.
_CACHES = ("dynamic", "offloaded", "quantized", "hybrid")

_WHOLE_PROMPT = "it reads the states of the whole prompt, and removed tokens have none"
_OUTSIDE = "its decoding loop is code from outside transformers"
# Settings by name: the values that ask for nothing besides None and False, and why others are refused.
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "prefill_chunk_size": (None, "survivors are chosen over the whole prompt"),
    "token_healing": (None, "it rewrites the prompt inside generate"),
    "guidance_scale": (1, "it prefills a second prompt inside generate"),
    "assistant_early_exit": (None, "the model's first layers draft for it, with a prompt of their own"),
    "use_mtp": (None, _WHOLE_PROMPT),
    "speculation_type": (None, _WHOLE_PROMPT),
    "dola_layers": (None, _WHOLE_PROMPT),
    "penalty_alpha": (0, _WHOLE_PROMPT),
    "num_beam_groups": (1, _OUTSIDE),
    "constraints": (None, _OUTSIDE),
    "force_words_ids": (None, _OUTSIDE),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a call of `generate` says of its first forward pass.

    Attributes:
        prompt_rows: rows of the prompt; beams and return sequences repeat them.
        prompt_columns: tokens of the prompt; what the forward has more are candidates.
        drafts: whether the model is an assistant, which feeds the last prompt token again when its first candidate
            was wrong.
        candidates: whether another model, or a look into the prompt, proposes tokens.
    """

    prompt_rows: int
    prompt_columns: int
    drafts: bool
    candidates: bool


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any], own: Any) -> Generation:
    """Look at a call of `generate`, and refuse what a pruner would make wrong.

    Args:
        args, kwargs: what it was called with.
        own: the model's own generation config, or None.

    Raises:
        ValueError: naming the setting, wherever it was made, and the reason.
    """
    given = {**dict(zip(_parameters(), args, strict=False)), **kwargs}

    def setting(name: str) -> Any:
        # As `generate` resolves it: the call, then the configuration it was given, then the model's own.
        if name in given:
            return given[name]
        places = (getattr(given.get("generation_config"), name, None), getattr(own, name, None))
        return next((value for value in places if value is not None), None)

    use_cache = setting("use_cache")
    if use_cache is False or (use_cache is None and "use_cache" in given):
        raise ValueError(f"generate(use_cache={use_cache}) feeds the whole sequence at every step: not under a pruner")
    for name, (neutral, why) in _REFUSED.items():
        value = setting(name)
        if value is not None and value is not False and value != neutral:
            raise ValueError(f"{name}={value} is not supported under a pruner: {why}")
    if isinstance(given.get("custom_generate"), str):
        raise ValueError(f"custom_generate={given['custom_generate']!r} is not supported under a pruner: {_OUTSIDE}")
    implementation = setting("cache_implementation")
    if implementation is not None and implementation not in _CACHES:
        raise ValueError(
            f"cache_implementation={implementation!r} is not supported under a pruner: layers of fixed length cannot "
            f"hold survivors; one of {', '.join(map(repr, _CACHES[:-1]))} is"
        )
    candidates = given.get("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
    if candidates and given.get("inputs_embeds") is not None:
        raise ValueError(
            "inputs_embeds with assistant_model or prompt_lookup_num_tokens is not supported under a pruner: the first "
            "forward pass of generate then has the embeddings of the prompt alone, not the candidates"
        )
    prompts = (given.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    prompt = next((prompt for prompt in prompts if prompt is not None), None)
    if prompt is None:
        raise ValueError("generate under a pruner needs a prompt: input_ids or inputs_embeds")
    return Generation(prompt.shape[0], prompt.shape[1], bool(setting("is_assistant")), candidates)


@functools.cache
def _parameters() -> tuple[str, ...]:
    """Of `generate`, in their order."""
    from transformers import GenerationMixin  # here, because it takes seconds, and every model has it by now

    return tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]
