"""A prompt's forward pass under a pruner: which tokens are present, stage by stage."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from sdtp.pruning.adapter import Architecture, attention_of
from sdtp.pruning.cache import PrunedLayer, know_later, layer_to_hold
from sdtp.pruning.last_query import last_query_attention, unknown_keys
from sdtp.pruning.layer_inputs import LayerInputs
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Scorer, StageView
from sdtp.pruning.selection import numbers, protected_tokens, select, take

# Threads may finish prefills of one context at once: a trace is of one of them throughout.
_TELLING = threading.Lock()


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

    def tell(self, kept: list[torch.Tensor], prompt_lengths: list[int]) -> None:
        """Of a prefill that has ended; nothing of one that failed."""
        with _TELLING:
            self.kept[:] = kept
            self.prompt_lengths[:] = prompt_lengths


@dataclasses.dataclass(frozen=True)
class PromptSlots:
    """`Slots` of a prompt, and what a pruned cache layer shall know of them.

    Attributes:
        positions: LongTensor [batch, slots], index among the row's real tokens; -1 at padding.
        columns: LongTensor [batch, slots] of the input; -1 at padding that is left after a stage.
        padded: whether any slot is padding.
        seen: columns of input, removed tokens and padding included.
    """

    positions: torch.Tensor
    columns: torch.Tensor
    padded: bool
    seen: int

    def valid(self) -> torch.Tensor | None:
        """See `Slots.valid`."""
        return self.positions >= 0 if self.padded else None


class Prefill:
    """A prompt on its way through the layers, losing tokens at each stage.

    Args:
        schedule: which layers prune and how many tokens survive.
        scorer: who decides.
        architecture: the model's layers and how they attend.
        attention_mask: [batch, tokens] as given to the model (nonzero = real), or None.
        shape: (batch, tokens) of the forward.
        prompt_columns: columns that are prompt; later ones are candidate tokens, never scored, removed or counted.
        protect: [batch, prompt_columns] bool, True at columns the caller wants kept, or None.
        device: where the inputs are.
        ranks: the process group that shares the model's weights; all of it keeps what its first rank keeps.
        position_ids: [batch or 1, tokens] as given to the model, or None.
        drafts: whether the cache may be cut by the last prompt token, which is then fed again as it was.

    Raises:
        ValueError: a row without any token.
    """

    always_gather = False  # tests set it to send even a complete prompt through the gather path

    def __init__(
        self,
        schedule: PruningSchedule,
        scorer: Scorer,
        architecture: Architecture,
        attention_mask: torch.Tensor | None,
        shape: tuple[int, int],
        prompt_columns: int,
        protect: torch.Tensor | None,
        device: torch.device,
        ranks: Any = None,
        position_ids: torch.Tensor | None = None,
        drafts: bool = False,
    ) -> None:
        self.schedule, self.scorer, self.architecture, self.ranks = schedule, scorer, architecture, ranks
        self.inputs = LayerInputs(architecture.config)
        self.position_ids, self.masked = position_ids, attention_mask is not None
        self.drafts = drafts
        batch, tokens = shape
        self.batch, self.extra, self.seen = batch, tokens - prompt_columns, tokens
        self.columns = torch.arange(tokens, device=device).expand(batch, tokens)
        self.valid: torch.Tensor | None = None
        self.present = [prompt_columns] * batch
        self.right_padded = False  # whether some row's last column is padding
        self.positions = self.columns[:, :prompt_columns]
        if attention_mask is not None:
            real = attention_mask[:, :prompt_columns].to(device) != 0
            ends = torch.stack([real.sum(1), real[:, -1:].sum(1)])
            self.present, last = ends.tolist()  # the one read of lengths in a prefill
            self.right_padded = not all(last)
            if min(self.present, default=0) < prompt_columns:
                self.valid = real
                self.positions = (real.cumsum(1) - 1).masked_fill(~real, -1)
        if min(self.present, default=0) == 0:
            raise ValueError(
                f"row {self.present.index(0)} of the prompt has no token: at least one is needed"
                if self.present
                else "the prompt has no rows"
            )
        self.prompt_lengths = list(self.present)
        self.lengths = numbers(self.present, device)
        self.protect = protect
        self.stage = -1  # the latest stage that removed something; -1: layers still see the model's own columns
        self.kept: list[torch.Tensor] = []
        self.cache: Any = None  # what the layers run with
        self.faults: list[tuple[Exception, torch.Tensor]] = []  # what may be wrong, and bool scalars: whether it is
        self.query: tuple[torch.Tensor, Any] | None = None

    def first_pruned(self) -> int:
        """The first layer to run on what a stage makes of the tokens; the number of layers if none will."""
        for stage, layer in enumerate(self.schedule.layers):
            if self.valid is not None or any(self.schedule.surviving(n)[stage] < n for n in self.prompt_lengths):
                return layer
        return len(self.architecture.layers)

    def before_layer(self, layer: int, hidden: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The states [batch, kept, hidden] that a layer shall run on; `hidden` itself where nothing is removed."""
        self.cache = cache
        if layer == 0:
            self._check_positions(cache)
        if layer in self.schedule.layers:
            whole = self._slots() if self.stage < 0 else None
            hidden = self._stage(self.schedule.layers.index(layer), layer, hidden, cache)
            if whole is not None and self.stage >= 0 and cache is not None:
                for earlier in range(layer):
                    self._know(cache, earlier, whole, -1)
        if self.stage >= 0 and cache is not None:
            self._know(cache, layer, self._slots(), self.stage)
        return hidden

    def _check_positions(self, cache: Cache | None) -> None:
        """Refuse position ids that the model's own mask, or a flash kernel, reads as several packed sequences."""
        packed = cache is None or "flash" in self.architecture.config._attn_implementation
        if self.masked or not packed or self.position_ids is None:
            return
        if (self.position_ids.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids with gaps and no attention_mask are read as several packed sequences, which is not "
                "supported under a pruner: give an attention_mask"
            )

    def _slots(self) -> PromptSlots:
        """The tokens present, candidates last."""
        positions, columns = self.positions, self.columns
        if self.extra:
            lengths = self.lengths.to(positions.device)
            candidates = lengths[:, None] + torch.arange(self.extra, device=lengths.device)
            positions = torch.cat([positions, candidates], dim=1)
        if self.valid is not None and self.stage >= 0:
            columns = columns.masked_fill(positions < 0, -1)
        return PromptSlots(positions, columns, self.valid is not None, self.seen)

    def _know(self, cache: Cache, layer: int, slots: PromptSlots, stage: int) -> None:
        """Have a layer of the cache know the tokens it holds or is about to."""
        held: DynamicLayer = layer_to_hold(cache, layer, len(self.architecture.layers))
        cache.layers[layer] = PrunedLayer(
            held,
            slots.positions,
            slots.columns,
            stage,
            slots.positions.shape[1] - self.extra - self.drafts,
            slots.padded,
            slots.seen,
            self.architecture.window,
            self.architecture.maskless,
        )
        know_later(cache.layers)

    def adapt(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
        """A layer's arguments with mask, position ids, rotary table and biases for the tokens present."""
        if self.stage < 0:
            return kwargs
        slots = self._slots()
        window = self.architecture.windows[layer]
        changed = self.inputs.arguments(kwargs, hidden, slots, cache, layer, self.stage, window)
        if kwargs.get("position_embeddings") is not None:
            changed["position_embeddings"] = self.inputs.rotary(kwargs["position_embeddings"], self.columns)
        return changed

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
            self.kept.append(positions)
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
        nan = ValueError(f"{type(self.scorer).__name__} gave NaN scores at stage {stage}: what was kept means nothing")
        self.faults.append((nan, scores.isnan().any() if valid is None else (scores.isnan() & valid).any()))
        kept, self.valid = select(scores, protected, valid, budgets)
        if self.ranks is not None:
            kept = kept.contiguous()  # gloo sends the memory behind a view as if it were the view
            torch.distributed.broadcast(kept, group_src=0, group=self.ranks)
        self.positions = positions.gather(1, kept)
        if self.valid is not None:
            self.positions = self.positions.masked_fill(~self.valid, -1)
        self.kept.append(self.positions)
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
        """What `StageView.last_query_attention` computes.

        Raises:
            ValueError: the keys of the layer before are not at hand.
        """
        if cache is None or self.query is None:
            raise ValueError("LastQuery reads the keys of the layer before: call the model with use_cache=True")
        attention = attention_of(self.architecture.layers[layer - 1])
        if attention is None:
            raise ValueError(f"layer {layer - 1} has no attention")
        state, table = self.query
        found, unlike = last_query_attention(
            attention, state, table, cache.layers[layer - 1], self.positions, self.valid
        )
        self.faults.append((unknown_keys(attention, layer - 1), unlike))
        if self.ranks is not None:  # each rank has some of the heads
            torch.distributed.all_reduce(found, group=self.ranks)
            found = found / torch.distributed.get_world_size(self.ranks)
        return found

    def finish(self, trace: Trace) -> None:
        """Tell the trace what was kept, and look for faults: one read, after the last layer.

        Raises:
            ValueError: scores were not numbers, naming the stage.
            TypeError: attention was read of a kind that is not known.
        """
        flags = [flag.to(self.faults[0][1].device) for _, flag in self.faults]
        for (fault, _), found in zip(self.faults, torch.stack(flags).tolist() if flags else (), strict=True):
            if found:
                if self.cache is not None:
                    self.cache.layers[0].spoil()
                trace.tell([], [])
                raise fault
        trace.tell(self.kept, self.prompt_lengths)
