"""Reads a prompt's queries and keys off a model's attention while it prefills, whichever kernel computes it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sdtp.pruning.adapter import Architecture, attention_of, bound_arguments, cache_of
from sdtp.pruning.last_query import check_attention

# Given a layer, its queries [KV heads, query heads per KV head, queries, head_dim] and its keys [KV heads, tokens,
# head_dim], both rotated, and the scaling of their products.
Reader = Callable[[int, torch.Tensor, torch.Tensor, float], None]


def check_readable(architecture: Architecture, layers: Iterable[int], reader: str) -> None:
    """Refuse attention whose queries are not known here.

    Args:
        architecture: of the model.
        layers: whose attention is to be read.
        reader: who reads it, for the message.

    Raises:
        TypeError: an attention is built otherwise, with what is missing.
    """
    for layer in layers:
        try:
            check_attention(attention_of(architecture.layers[layer]), layer)
        except TypeError as error:
            raise TypeError(f"{reader} reads attention as LastQuery does. {error}") from error


@contextlib.contextmanager
def observed(architecture: Architecture, layers: Iterable[int], queries: int | None, read: Reader) -> Iterator[None]:
    """Inside, `read` is called each time a layer's attention has run.

    Projections are taken as the model makes them, none is computed again.

    Args:
        architecture: of the model, whose attention `check_readable` accepts; it runs on one row, without padding, and
            with an empty cache.
        layers: whose attention is read.
        queries: how many of the last tokens' queries; None for all.
        read: see `Reader`.
    """
    projected: dict[int, torch.Tensor] = {}

    def keep(layer: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        projected[layer] = output if queries is None else output[:, -queries:]

    def after(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = bound_arguments(module, args, kwargs)
        keys = cache_of(given).layers[layer].keys[0]  # [KV heads, tokens, head_dim]
        rotated = _rotated(module, projected.pop(layer), given["position_embeddings"])
        with torch.no_grad():
            read(layer, rotated.unflatten(0, (keys.shape[0], -1)), keys, getattr(module, "scaling"))  # noqa: B009

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            attention: Any = attention_of(architecture.layers[layer])
            hooks.callback(attention.q_proj.register_forward_hook(functools.partial(keep, layer)).remove)
            hooks.callback(attention.register_forward_hook(functools.partial(after, layer), with_kwargs=True).remove)
        yield


def _rotated(attention: Any, projected: torch.Tensor, table: Any) -> torch.Tensor:
    """Queries [query heads, queries, head_dim] as the attention multiplies them with keys.

    Args:
        attention: the layer's.
        projected: [1, queries, query heads x head_dim], what `q_proj` made.
        table: (cos, sin) [1, tokens, dim], of which the last are the queries'.

    Raises:
        ValueError: the rotary table does not cover a head.
    """
    queries = projected.unflatten(-1, (-1, attention.head_dim))
    if getattr(attention, "q_norm", None) is not None:
        queries = attention.q_norm(queries)
    cos, sin = (part[:, -projected.shape[1] :] for part in table)
    if cos.shape[-1] != attention.head_dim:
        raise ValueError(
            f"a rotary table covers {cos.shape[-1]} of {attention.head_dim} channels: queries are not read"
        )
    # The rotation is the model family's own: the function its attention module calls.
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    queries = queries.transpose(1, 2)
    rotated: torch.Tensor = rotate(queries, queries, cos, sin)[0]
    return rotated[0]
