"""Which layers prune, and how many tokens survive each: pure arithmetic, known before any tensor exists."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class PruningSchedule:
    """Stages of token removal over a decoder's layers.

    Stage `s` (0-based) scores the hidden states entering decoder layer `layers[s]` and removes tokens before that layer
    runs. With fractions, `round(keep[s] * N)` of a row's `N` prompt tokens are left. With a budget of `B` tokens and
    `S` stages, `round(N * (B / N) ** ((s + 1) / S))` are: each stage removes the same share, and the last leaves `B`,
    or the whole of a prompt that is no longer. Protected tokens stay in any case, also when there are more of them.

    Attributes:
        layers: 0-based decoder layers before which tokens are removed, strictly ascending, each >= 1 (lengths and
            positions are read off layer 0's cache).
        keep: fraction of the *prompt* kept after each stage, in (0, 1], never ascending; one per layer, none with a
            budget.
        sinks: first tokens of the prompt that every stage keeps (attention sinks).
        local: fraction in [0, 1] of the tokens still present that form the protected tail.
        min_local: fewest tokens in the protected tail.
        min_tokens: prompts with fewer tokens than this are left alone.
        budget: tokens left after the last stage, >= 1, instead of fractions; None with fractions.

    Raises:
        ValueError: a value outside its range, naming the field and the value.
    """

    layers: tuple[int, ...]
    keep: tuple[float, ...] = ()
    sinks: int = 4
    local: float = 0.1
    min_local: int = 16
    min_tokens: int = 0
    budget: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "keep", tuple(float(k) for k in self.keep))
        if self.budget is not None:
            self._check_budget()
        elif len(self.layers) != len(self.keep):
            raise ValueError(
                f"keep has {len(self.keep)} fractions for {len(self.layers)} layers: give one per layer, or a budget"
            )
        if not all(type(layer) is int for layer in self.layers):
            raise ValueError(f"layers is {self.layers}: they must be whole numbers")
        if any(layer < 1 for layer in self.layers):
            raise ValueError(f"layers is {self.layers}: pruning starts at layer 1 or later (layer 0 holds the prompt)")
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(f"layers is {self.layers}: they must be strictly ascending")
        if not all(0.0 < k <= 1.0 for k in self.keep):
            raise ValueError(f"keep is {self.keep}: every fraction must be in (0, 1]")
        if any(a < b for a, b in zip(self.keep, self.keep[1:], strict=False)):
            raise ValueError(f"keep is {self.keep}: a later stage cannot keep more than an earlier one")
        if not 0.0 <= self.local <= 1.0:
            raise ValueError(f"local is {self.local}: it must be in [0, 1]")
        for name in ("sinks", "min_local", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be >= 0")

    def _check_budget(self) -> None:
        if type(self.budget) is not int or self.budget < 1:
            raise ValueError(f"budget is {self.budget}: the tokens to keep must be a whole number >= 1")
        if self.keep:
            raise ValueError(f"keep is {self.keep} with a budget of {self.budget} tokens: give one of the two")
        if not self.layers:
            raise ValueError(f"budget is {self.budget} with no layers: at least one must prune to keep to it")

    @classmethod
    def geometric(
        cls,
        num_layers: int,
        start: int,
        step: int,
        ratio: float,
        sinks: int = 4,
        local: float = 0.1,
        min_local: int = 16,
        min_tokens: int = 0,
    ) -> PruningSchedule:
        """Stages at layers `start, start + step, ...`, the s-th (from 1) keeping `ratio**s` of the prompt (paper, §4).

        Args:
            num_layers: decoder layers of the model.
            start: first pruning layer, >= 1.
            step: layers between stages, >= 1.
            ratio: fraction kept at each stage of what the stage before left, in (0, 1].
            sinks, local, min_local, min_tokens: see the class.

        Raises:
            ValueError: a value outside its range.
        """
        layers = _every(num_layers, start, step)
        return cls(layers, _powers(ratio, len(layers)), sinks, local, min_local, min_tokens)

    @classmethod
    def to_budget(
        cls,
        num_layers: int,
        start: int,
        step: int,
        tokens: int,
        sinks: int = 4,
        local: float = 0.1,
        min_local: int = 16,
        min_tokens: int = 0,
    ) -> PruningSchedule:
        """Stages at layers `start, start + step, ...` that leave `tokens` of any longer prompt, an equal share each.

        Args:
            num_layers: decoder layers of the model.
            start: first pruning layer, >= 1.
            step: layers between stages, >= 1.
            tokens: the budget, >= 1.
            sinks, local, min_local, min_tokens: see the class.

        Raises:
            ValueError: a value outside its range.
        """
        return cls(_every(num_layers, start, step), (), sinks, local, min_local, min_tokens, budget=tokens)

    def with_ratio(self, ratio: float) -> PruningSchedule:
        """The same layers and protection, the s-th stage (from 1) keeping `ratio**s` of the prompt instead.

        Raises:
            ValueError: a ratio outside (0, 1].
        """
        return dataclasses.replace(self, keep=_powers(ratio, self.stages), budget=None)

    def at_stages(self, stages: Sequence[int]) -> PruningSchedule:
        """Some of the stages alone, each keeping the share it kept of what reached it; a budget is reached with them.

        A geometric schedule stays one of the same ratio, and leaves more tokens with fewer stages.

        Args:
            stages: which of the stages, 0-based, at least one, ascending.

        Raises:
            ValueError: stages that are not that.
        """
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < self.stages:
            raise ValueError(
                f"stages is {list(stages)}: at least one of 0 to {self.stages - 1} is needed, in ascending order"
            )
        layers = tuple(self.layers[stage] for stage in stages)
        if self.budget is not None:
            return dataclasses.replace(self, layers=layers)
        shares = [after / before for before, after in zip((1.0, *self.keep), self.keep, strict=False)]
        keep = tuple(itertools.accumulate((shares[stage] for stage in stages), operator.mul))
        return dataclasses.replace(self, layers=layers, keep=keep)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.layers)

    def protected_tail(self, tokens: int) -> int:
        """Length of the protected tail of a row with `tokens` tokens still present."""
        return min(tokens, max(self.min_local, math.ceil(self.local * tokens)))

    def kept_at(self, stage: int, prompt_tokens: int, present: int, protected: int) -> int:
        """Tokens one stage keeps: its share, raised to the protected tokens and to 1, capped at those present.

        Args:
            stage: 0-based stage.
            prompt_tokens: `N`, the row's real prompt tokens.
            present: tokens entering the stage.
            protected: how many of those are protected.
        """
        if prompt_tokens < self.min_tokens:
            return present
        return min(present, max(self._share(stage, prompt_tokens), protected, 1))

    def _share(self, stage: int, prompt_tokens: int) -> int:
        if self.budget is None:
            return round(self.keep[stage] * prompt_tokens)
        if prompt_tokens <= self.budget:
            return prompt_tokens
        return round(prompt_tokens * (self.budget / prompt_tokens) ** ((stage + 1) / self.stages))

    def surviving(self, prompt_tokens: int) -> list[int]:
        """Tokens left after each stage for a prompt of `prompt_tokens` (>= 1) of which the caller marks none."""
        if prompt_tokens < 1:
            raise ValueError(f"the prompt has {prompt_tokens} tokens: at least one is needed")
        counts = []
        present = prompt_tokens
        for stage in range(self.stages):
            protected = min(present, self.sinks + self.protected_tail(present))
            present = self.kept_at(stage, prompt_tokens, present, protected)
            counts.append(present)
        return counts

    def layer_lengths(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """Tokens each decoder layer runs on in prefill and caches: `num_layers` numbers.

        Raises:
            ValueError: the schedule prunes at a layer the model does not have.
        """
        self.check_fits(num_layers)
        after = dict(zip(self.layers, self.surviving(prompt_tokens), strict=True))
        lengths = []
        present = prompt_tokens
        for layer in range(num_layers):
            present = after.get(layer, present)
            lengths.append(present)
        return lengths

    def check_fits(self, num_layers: int) -> None:
        """Raise ValueError if a stage lies beyond a model of `num_layers` decoder layers."""
        if self.layers and self.layers[-1] >= num_layers:
            raise ValueError(f"layers is {self.layers}: the model has layers 0 to {num_layers - 1} only")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the arguments of the class."""
        return dataclasses.asdict(self)


def _every(num_layers: int, start: int, step: int) -> tuple[int, ...]:
    """Layers `start, start + step, ...` of a model."""
    if not 1 <= start < num_layers:
        raise ValueError(f"start is {start}: it must be a layer from 1 to {num_layers - 1}")
    if step < 1:
        raise ValueError(f"step is {step}: it must be >= 1")
    return tuple(range(start, num_layers, step))


def _powers(ratio: float, stages: int) -> tuple[float, ...]:
    """Fractions of the prompt left when each stage keeps `ratio` of what the stage before left."""
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio is {ratio}: the fraction to keep must be in (0, 1]")
    return tuple(ratio**s for s in range(1, stages + 1))
