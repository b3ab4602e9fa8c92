"""One forward pass under a pruner: the tokens present, and what each decoder layer is handed instead.

The model's loop gives every layer the same mask, position ids and rotary table; after the first stage layers run on
fewer tokens, so these are rewritten before each of them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from sdtp.pruning.cache import PrunedLayer, install
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Scorer, StageView
from sdtp.pruning.selection import protected_tokens, select, take


@dataclasses.dataclass
class Trace:
    """What the latest prefill under a pruner kept.

    Attributes:
        kept: per stage a LongTensor [batch, max_kept], indices into the row's real prompt tokens (0...N-1, padding not
            counted), ascending; shorter rows padded on the left with -1.
        prompt_lengths: `N` of each row.
    """

    kept: list[torch.Tensor] = dataclasses.field(default_factory=list)
    prompt_lengths: list[int] = dataclasses.field(default_factory=list)


class LayerInputs:
    """Masks and tables for the layers of one forward pass, made once for all layers that share a length."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._made: dict[tuple[Any, ...], Any] = {}
        self._sources: list[Any] = []  # keeps tables alive, so that no other one gets the same id

    def forget(self) -> None:
        """Drop what was made: the layers from here on have another length."""
        self._made.clear()
        self._sources.clear()

    def mask(
        self, hidden: torch.Tensor, valid: torch.Tensor | None, cache: Cache | None, layer: int, stage: int
    ) -> Any:
        """The attention mask of a layer for [batch, tokens, hidden] states; None where the kernel needs none.

        Args:
            hidden: [batch, tokens, hidden] states the layer is about to run on.
            valid: [batch, cached + tokens] bool, True at real tokens; None if all are.
            cache: tells, at `layer`, how many tokens are held already; None if none are kept.
            layer: decoder layer, for the cache.
            stage: the stage whose survivors the layer holds: layers of one stage share a mask.
        """
        key = ("mask", stage, hidden.device)
        if key not in self._made:
            # Position ids are left out: gaps in them would be read as borders of packed sequences.
            self._made[key] = create_causal_mask(
                config=self._config, inputs_embeds=hidden, attention_mask=valid, cache=cache, layer_idx=layer
            )
        return self._made[key]

    def rotary(self, table: Any, columns: torch.Tensor) -> Any:
        """The (cos, sin) table [batch or 1, all tokens, dim] cut to the tokens present."""
        key = ("rotary", id(table))
        if key not in self._made:
            self._sources.append(table)
            self._made[key] = tuple(take(part, columns.to(part.device)) for part in table)
        return self._made[key]


class Prefill:
    """A prompt on its way through the layers, losing tokens at each stage.

    Args:
        schedule: which layers prune and how many tokens survive.
        scorer: who decides.
        layers: the model's decoder layers.
        config: the decoder's config.
        attention_mask: [batch, tokens] as given to the model (nonzero = real), or None.
        shape: (batch, tokens) of the forward.
        prompt_columns: columns that are prompt; later ones are candidate tokens, never scored, removed or counted.
        protect: [batch, prompt_columns] bool, True at columns the caller wants kept, or None.
        trace: filled in as stages decide.
        device: where the inputs are.
    """

    always_gather = False  # tests set it to send even a complete prompt through the gather path

    def __init__(
        self,
        schedule: PruningSchedule,
        scorer: Scorer,
        layers: nn.ModuleList,
        config: Any,
        attention_mask: torch.Tensor | None,
        shape: tuple[int, int],
        prompt_columns: int,
        protect: torch.Tensor | None,
        trace: Trace,
        device: torch.device,
    ) -> None:
        self.schedule, self.scorer, self.layers, self.trace = schedule, scorer, layers, trace
        self.inputs = LayerInputs(config)
        batch, tokens = shape
        self.batch, self.extra = batch, tokens - prompt_columns
        self.columns = torch.arange(tokens, device=device).expand(batch, tokens)
        self.valid: torch.Tensor | None = None
        self.present = [prompt_columns] * batch
        self.positions = self.columns[:, :prompt_columns]
        if attention_mask is not None:
            real = attention_mask[:, :prompt_columns] != 0
            self.present = real.sum(1).tolist()  # the one read of lengths in a prefill
            if min(self.present) < prompt_columns:
                self.valid = real
                self.positions = (real.cumsum(1) - 1).masked_fill(~real, -1)
        if min(self.present) == 0:
            raise ValueError(f"row {self.present.index(0)} of the prompt has no token: at least one is needed")
        self.prompt_lengths = list(self.present)
        self.lengths = torch.tensor(self.present, device=device)
        self.protect = protect
        self.stage = -1  # the latest stage that removed something; -1: layers still see the model's own columns
        self.nan: list[tuple[int, torch.Tensor]] = []
        self.query: tuple[torch.Tensor, Any] | None = None
        trace.kept.clear()
        trace.prompt_lengths[:] = self.present

    def before_layer(self, layer: int, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The states [batch, kept, hidden] that a layer shall run on; `hidden` itself where nothing is removed."""
        if layer in self.schedule.layers:
            whole = self._cache_layer() if self.stage < 0 else None
            hidden = self._stage(self.schedule.layers.index(layer), layer, hidden, cache)
            if whole is not None and self.stage >= 0 and cache is not None:
                for earlier in range(layer):
                    install(cache, earlier, copy.copy(whole))
        if self.stage >= 0 and cache is not None:
            install(cache, layer, self._cache_layer())
        return hidden

    def _cache_layer(self) -> PrunedLayer:
        """What a layer that runs on the tokens present shall know of them."""
        slots = torch.cat([self.positions, self._extra_positions()], dim=1) if self.extra else self.positions
        return PrunedLayer(slots, self.stage, self.positions.shape[1], self.valid is not None)

    def adapt(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any], cache: Cache | None) -> None:
        """Rewrite a layer's mask, position ids and rotary table for the tokens present."""
        if self.stage < 0:
            return
        valid = self.valid
        if valid is not None and self.extra:
            valid = torch.cat([valid, valid.new_ones(self.batch, self.extra)], dim=1)
        kwargs["attention_mask"] = self.inputs.mask(hidden, valid, cache, layer, self.stage)
        kwargs["position_ids"] = None
        kwargs["position_embeddings"] = self.inputs.rotary(kwargs["position_embeddings"], self.columns)

    def _extra_positions(self) -> torch.Tensor:
        """LongTensor [batch, extra]: candidates follow the prompt."""
        lengths = self.lengths.to(self.positions.device)
        return lengths[:, None] + torch.arange(self.extra, device=lengths.device)

    def _stage(self, stage: int, layer: int, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        prompt = self.positions.shape[1]
        device = hidden.device
        positions = self.positions.to(device)
        valid = None if self.valid is None else self.valid.to(device)
        marked = None
        if self.protect is not None:
            marked = self.protect.to(device).gather(1, self.columns[:, :prompt].to(device))
            marked = marked if valid is None else marked & valid
        protected = protected_tokens(self.schedule, positions, valid, self.present, marked)
        budgets = [
            self.schedule.kept_at(stage, total, n, count)
            for total, n, count in zip(self.prompt_lengths, self.present, self._counts(protected, marked), strict=True)
        ]
        if budgets == self.present and valid is None and not self.always_gather:
            self.trace.kept.append(positions)
            return hidden
        view = StageView(
            stage, layer, hidden[:, :prompt], positions, self.lengths, lambda: self._last_query_attention(layer, cache)
        )
        with torch.no_grad():
            scores = self.scorer.score(view).to(torch.float32)
        if scores.shape != positions.shape:
            raise ValueError(
                f"{type(self.scorer).__name__} gave scores of shape {tuple(scores.shape)} at stage {stage}: "
                f"{tuple(positions.shape)} [batch, tokens] is needed"
            )
        self.nan.append((stage, scores.isnan().any() if valid is None else (scores.isnan() & valid).any()))
        kept, self.valid = select(scores, protected, valid, budgets)
        self.positions = positions.gather(1, kept)
        if self.valid is not None:
            self.positions = self.positions.masked_fill(~self.valid, -1)
        self.trace.kept.append(self.positions)
        columns = kept
        if self.extra:
            tail = torch.arange(prompt, prompt + self.extra, device=device).expand(self.batch, self.extra)
            columns = torch.cat([kept, tail], dim=1)
        self.columns = self.columns.to(device).gather(1, columns)
        self.present = budgets
        self.stage = stage
        self.inputs.forget()
        return take(hidden, columns)

    def _counts(self, protected: torch.Tensor, marked: torch.Tensor | None) -> list[int]:
        """Protected tokens of each row; read from the device only where the caller marked some."""
        if marked is not None:
            counts: list[int] = protected.sum(1).tolist()
            return counts
        return [min(n, self.schedule.sinks + self.schedule.protected_tail(n)) for n in self.present]

    def remember_query(self, hidden: torch.Tensor, table: Any) -> None:
        """Keep the last prompt token's normed state and rotary row, as a layer's attention is about to see them."""
        last = self.positions.argmax(1, keepdim=True).to(hidden.device)
        self.query = (take(hidden, last), tuple(take(part, last.to(part.device)) for part in table))

    def _last_query_attention(self, layer: int, cache: Cache | None) -> torch.Tensor:
        """[batch, tokens] float32: attention of the last prompt token in `layer - 1`, averaged over heads.

        Raises:
            ValueError: the forward keeps no cache, so the keys of the layer before are gone, or the attention is of a
                kind whose queries are not known here.
        """
        if cache is None or self.query is None:
            raise ValueError("LastQuery reads the keys of the layer before: call the model with use_cache=True")
        attention: Any = self.layers[layer - 1].self_attn
        state, (cos, sin) = self.query
        query = attention.q_proj(state).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            if attention.q_norm.weight.shape != (attention.head_dim,):
                raise ValueError(
                    f"LastQuery knows query norms over one head ({attention.head_dim} channels), "
                    f"{type(attention).__name__} has one over {attention.q_norm.weight.numel()}"
                )
            query = attention.q_norm(query)
        query = query.transpose(1, 2)
        # The rotation is the model family's own: the function its attention module calls.
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, _ = rotate(query, query, cos, sin)
        held: Any = cache.layers[layer - 1]
        keys = held.keys[:, :, : self.positions.shape[1]]
        query = query.unflatten(1, (keys.shape[1], -1)).squeeze(-2)  # [batch, KV heads, queries per KV head, head_dim]
        logits = torch.einsum("bkgd,bknd->bkgn", query.float(), keys.float()) * attention.scaling
        if self.valid is not None:
            logits = logits.masked_fill(~self.valid.to(logits.device)[:, None, None], -torch.inf)
        probabilities: torch.Tensor = logits.softmax(-1)
        return probabilities.mean((1, 2))

    def check_scores(self) -> None:
        """Raise ValueError naming the stages whose scores were not numbers: one read, after the last layer."""
        if self.nan:
            flags = torch.stack([flag.to(self.nan[0][1].device) for _, flag in self.nan]).tolist()
            if any(flags):
                stage = self.nan[flags.index(True)][0]
                raise ValueError(
                    f"{type(self.scorer).__name__} gave NaN scores at stage {stage}: what was kept means nothing"
                )


class Continuation:
    """Tokens after a pruned prompt: nothing is removed, each layer gets a mask of its own length.

    Args:
        config: the decoder's config.
        attention_mask: [batch, all tokens] as given to the model, or None.
        shape: (batch, new tokens) of the forward.
    """

    def __init__(self, config: Any, attention_mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
        self.inputs = LayerInputs(config)
        batch, self.tokens = shape
        self.new_valid: torch.Tensor | None = None
        # A lone new token of a lone row is real; elsewhere a row may have fewer new tokens than its neighbours.
        if attention_mask is not None and (batch > 1 or self.tokens > 1):
            new = attention_mask[:, -self.tokens :] != 0
            if not new.all():
                self.new_valid = new

    def adapt(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any], cache: Cache) -> None:
        """Rewrite the mask of a layer whose cache holds survivors."""
        held = cache.layers[layer] if layer < len(cache.layers) else None
        if not isinstance(held, PrunedLayer):
            return
        held.expect(None if self.new_valid is None else self.new_valid.to(hidden.device), self.tokens)
        if held.stage >= 0:  # before that the model's own mask, made for layer 0's length, is right
            kwargs["attention_mask"] = self.inputs.mask(hidden, held.valid(), cache, layer, held.stage)


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """The KV cache among a forward's keyword arguments, under its present or its former name."""
    cache: Cache | None = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, whichever way they were passed."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}
