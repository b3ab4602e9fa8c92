"""A prompt token by token: the text of each, and the stage that removed it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdtp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens decoded together. Each is decoded with those before it in its piece, so that longer pieces cost more a token.
_PIECE = 32
# Where byte-level tokens split characters, a character is whole after so many of them: UTF-8 has up to four bytes.
_LONGEST_CHARACTER = 4
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def removal_stages(kept: Sequence[Sequence[int]], prompt_tokens: int) -> list[int]:
    """For each prompt token the 0-based stage that removed it; `len(kept)` for a token that was never removed.

    Args:
        kept: for each stage, the positions (0 to prompt_tokens - 1) that are left after it.
        prompt_tokens: tokens of the prompt.

    Raises:
        UserError: a stage keeps a position that the prompt does not have or an earlier stage removed.
    """
    present = set(range(prompt_tokens))
    stages = [len(kept)] * prompt_tokens
    for stage, positions in enumerate(kept):
        strange = set(positions) - present
        if strange:
            raise UserError(
                f"kept, stage {stage}: position {min(strange)} was not present; accepted: those left before"
            )
        for removed in present - set(positions):
            stages[removed] = stage
        present = set(positions)
    return stages


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; joined, they are the text of all.

    So tokens of every tokenizer keep their leading space, and characters stay whole: one that is split over several
    tokens is the text of the last of them, and the others' is empty. Bytes that are no character are U+FFFD.
    """
    texts: list[str] = []
    while len(texts) < len(ids):
        texts += _piece(tokenizer, ids, len(texts))
    return texts


def _piece(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> list[str]:
    """Texts of the tokens from `start` to the next end of a character after `_PIECE` of them."""
    context = _context(tokenizer, ids, start)

    def text(end: int) -> str:
        return _decode(tokenizer, [*context, *ids[start:end]])

    end = min(start + _PIECE, len(ids))
    while end < min(start + _PIECE + _LONGEST_CHARACTER, len(ids)) and text(end).endswith(_BROKEN):
        end += 1
    whole = text(end)
    told = [len(_decode(tokenizer, context))]
    for stop in range(start + 1, end):
        # What is not yet a character is decoded otherwise than it will be in the end.
        told.append(max(told[-1], _shared(whole, text(stop))))
    told.append(max(told[-1], len(whole)))
    return [whole[before:after] for before, after in itertools.pairwise(told)]


def _context(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int) -> list[int]:
    """The fewest tokens before `start` that begin and end with characters: the first token of all loses its space."""
    for first in range(start - 1, max(-1, start - 1 - _LONGEST_CHARACTER), -1):
        if _BROKEN not in _decode(tokenizer, ids[first:start]):
            return list(ids[first:start])
    return []


def _shared(whole: str, start: str) -> int:
    """Characters at the beginning that two texts have in common."""
    pairs = enumerate(zip(whole, start, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(whole), len(start)))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
