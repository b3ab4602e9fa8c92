"""GemFilter (arXiv 2409.17422): the first layers choose tokens, and the whole model runs again on those alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from sdtp.evaluation.peers import operations
from sdtp.evaluation.peers.attaching import PlainModel
from sdtp.evaluation.peers.budgets import Budget, kept
from sdtp.evaluation.peers.observing import check_readable, observed
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.peers.received import pooled, strongest
from sdtp.evaluation.peers.trace import Prefilled
from sdtp.pruning.adapter import Architecture
from sdtp.pruning.cache import PrunedLayer


class _Reached(Exception):  # noqa: N818  (it ends the first pass, and is no error)
    """The filter layer has run."""


class GemFilter(Peer):
    """Runs the prompt through the layers up to `layer`, selects there, and prefills the selected tokens from scratch.

    Selected are the tokens of the greatest products of the last query with their keys, summed over all heads and
    averaged over five neighbours (Algorithm 1 of the paper and its authors' code: products, not probabilities). The
    second pass is that of a shorter prompt: its tokens stand at positions 0 to k-1, as in the paper, and decoding goes
    on at k. Every layer's cache holds the same k tokens.

    The last token of the prompt is always selected, where the paper leaves it to its score: the second pass is to say
    what comes after the prompt.

    Args:
        layer: the filter layer, 0-based; it runs whole. The paper has 13 of 32 for Llama 3.1 8B.
        keep: tokens selected of the prompt's; a fraction is the one kept.
    """

    _KERNEL = 5

    def __init__(self, layer: int, keep: Budget) -> None:
        self.layer, self.keep = layer, keep

    def check(self, architecture: Architecture) -> None:
        """See `Peer.check`."""
        layers = len(architecture.layers)
        if not 0 <= self.layer < layers:
            raise ValueError(f"layer is {self.layer}: the model has layers 0 to {layers - 1}")
        check_readable(architecture, [self.layer], type(self).__name__)

    def prefill(self, model: PlainModel, input_ids: torch.Tensor, cache: DynamicCache) -> Prefilled:
        """See `Peer.prefill`.

        Raises:
            ValueError: a pruner is attached to the model.
        """
        tokens = input_ids.shape[1]
        scores = self._scores(model, input_ids)  # [1, tokens]
        positions = strongest(scores, 1, kept(self.keep, tokens)).to(input_ids.device)
        logits = model.prefill(input_ids.gather(1, positions), cache)
        if any(isinstance(layer, PrunedLayer) for layer in cache.layers):
            raise ValueError("a pruner is attached to the model of a peer: GemFilter is not combined with one")
        return Prefilled(logits, (positions,) * len(cache.layers))

    def _scores(self, model: PlainModel, input_ids: torch.Tensor) -> torch.Tensor:
        """[1, tokens] float32, of every token of the prompt."""
        found: list[torch.Tensor] = []

        def read(layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
            with torch.autocast(keys.device.type, enabled=False):
                # Query heads are summed first: they meet the same keys.
                found.append(torch.einsum("kd,knd->n", queries.float().sum((1, 2)), keys.float())[None])

        def stop(*_: Any) -> None:
            raise _Reached

        handle = model.architecture.layers[self.layer].register_forward_hook(stop)
        try:
            with observed(model.architecture, [self.layer], 1, read):
                model.prefill(input_ids, DynamicCache(config=model.architecture.config))
        except _Reached:
            pass
        finally:
            handle.remove()
        return pooled(found[0], self._KERNEL)

    def prefill_flops(self, config: Any, prompt_tokens: int) -> float:
        """See `Peer.prefill_flops`: both passes."""
        return operations.selection_and_rerun(config, prompt_tokens, self.layer, kept(self.keep, prompt_tokens))
