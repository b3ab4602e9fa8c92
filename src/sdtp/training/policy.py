"""The differentiable stand-in for removal: in training a dropped token stays in the sequence, hidden as a key."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import architecture
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.pruning.selection import protected_tokens
from sdtp.training.masked_model import masked_attention
from sdtp.training.samplers import SAMPLERS, highest

Noise = Callable[[int, int], torch.Tensor]

# Rows of a layer's attention mask that are compared at once: at 32K tokens each copy of one takes 32 MB.
_BLOCK = 1024


@dataclasses.dataclass
class PolicyTrace:
    """What the stages decided in one forward.

    Attributes:
        scores: per stage [prompt_tokens] float32, the scores that decide, on the graph.
        entering: per stage LongTensor [present], ascending positions of the tokens the stage chose from.
        protected: per stage bool [present], which of those the schedule protects.
        kept: per stage LongTensor [kept], ascending positions of the survivors.
        estimates: per stage [prompt_tokens] float32, what the scores were made of: the estimate of every prompt
            token's saliency, on the graph.
    """

    scores: list[torch.Tensor] = dataclasses.field(default_factory=list)
    entering: list[torch.Tensor] = dataclasses.field(default_factory=list)
    protected: list[torch.Tensor] = dataclasses.field(default_factory=list)
    kept: list[torch.Tensor] = dataclasses.field(default_factory=list)
    estimates: list[torch.Tensor] = dataclasses.field(default_factory=list)


class MaskingPolicy:
    """Hides dropped tokens as keys from their stage on; values equal removal, gradients reach the scorer.

    At every survivor and every response token the forward gives what physical removal gives. Dropped tokens keep being
    computed: no survivor sees them, but the loss is differentiable in their masks, which says what bringing one back
    would do. The hard mask of a stage is straight-through: its gradient is that of `sigmoid(margin / temperature)`, the
    margin a noisy score's distance from where its token would be dropped (see `samplers`). Masks are cumulative over
    the stages. The scorer reads detached states, so that no stage learns to change what a later one sees.

    Args:
        schedule: the stages, their budgets, and what they protect, as in pruning.
        scorer: gives the keep scores.
        temperature: width of the relaxation, > 0, and with `gumbel_topk` the scale of the noise.
        sampler: how noise decides, a key of `samplers.SAMPLERS`; without noise the highest scores stay, as in pruning.
            Under `gumbel_softmax` the number kept varies about the budget.

    Raises:
        UserError: a temperature that is not positive, or an unknown sampler.
    """

    def __init__(
        self, schedule: PruningSchedule, scorer: Learned, temperature: float = 1.0, sampler: str = "gumbel_topk"
    ) -> None:
        if not temperature > 0:
            raise UserError(f"training.temperature is {temperature}: a number above 0 is accepted")
        if sampler not in SAMPLERS:
            raise UserError(f"training.sampler is {sampler!r}: one of {', '.join(SAMPLERS)} is accepted")
        self.schedule = schedule
        self.scorer = scorer
        self.temperature = temperature
        self.sampler = SAMPLERS[sampler]

    @contextlib.contextmanager
    def __call__(
        self, model: PreTrainedModel, prompt_tokens: int, noise: Noise | None = None, gradient: bool = True
    ) -> Iterator[PolicyTrace]:
        """Attach to the model; a forward inside the block is masked. Use one forward a block, without a cache.

        Args:
            model: frozen causal LM.
            prompt_tokens: the first so many tokens of the sequence are the prompt; the rest, the response, is never
                scored, hidden or counted.
            noise: `noise(stage, prompt_tokens)` gives [prompt_tokens] standard Gumbel noise, as `gumbel_noise` does;
                None takes the highest scores.
            gradient: False leaves the masks off the graph, which spares the model's backward pass where only the scores
                are trained.

        Raises:
            UserError: the schedule does not fit the model, or inside the block one of its layers cannot be masked.
        """
        parts = architecture(model)
        self.schedule.check_fits(len(parts.layers))
        run = _MaskedForward(self, prompt_tokens, noise, gradient)
        with contextlib.ExitStack() as undo:
            for index in range(min(self.schedule.layers, default=len(parts.layers)), len(parts.layers)):
                hook = run.hook(index, parts.windows[index])
                undo.callback(parts.layers[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
            undo.enter_context(masked_attention(model))
            yield run.trace


class _MaskedForward:
    """The state of one masked forward."""

    def __init__(self, policy: MaskingPolicy, prompt_tokens: int, noise: Noise | None, gradient: bool) -> None:
        self.policy = policy
        self.prompt_tokens = prompt_tokens
        self.noise = noise
        self.gradient = gradient
        self.trace = PolicyTrace()
        self.mask: torch.Tensor | None = None  # [prompt_tokens], cumulative
        self.keys: torch.Tensor | None = None  # [1, 1, 1, tokens], the mask as the attention takes it
        # What was found causal, with its window: layers are handed the same one or two masks. Not kept alive.
        self.causal: list[tuple[weakref.ref[torch.Tensor], int | None]] = []

    def hook(self, layer: int, window: int | None) -> Any:
        """Forward pre-hook of a decoder layer that attends within a window, or to all before it."""
        stages = self.policy.schedule.layers

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0]
            if layer in stages:
                self.decide(stages.index(layer), hidden)
                self.keys = self.key_mask(hidden.shape[1])
            self.check(kwargs["attention_mask"], hidden.shape[1], window, layer)
            return args, {**kwargs, "attention_mask": self.keys}

        return enter

    def check(self, mask: torch.Tensor | None, tokens: int, window: int | None, layer: int) -> None:
        """Refuse a layer's attention mask that hides more or less than its window and the future; once a mask."""
        if mask is None or any(known() is mask and of == window for known, of in self.causal):
            return
        if not _is_causal(mask, tokens, window):
            raise UserError(
                f"the masking policy takes one sequence without padding: layer {layer} was handed an attention mask"
            )
        self.causal.append((weakref.ref(mask), window))

    def decide(self, stage: int, hidden: torch.Tensor) -> None:
        """Score, choose, and multiply the stage's straight-through mask into the cumulative one."""
        n, schedule, trace = self.prompt_tokens, self.policy.schedule, self.trace
        positions = torch.arange(n, device=hidden.device)
        entering = trace.kept[-1] if trace.kept else positions
        present = torch.zeros(n, dtype=torch.bool, device=hidden.device).index_fill_(0, entering, True)
        lengths = torch.full((1,), n, device=hidden.device)
        places = (positions[None], lengths, present[None])
        estimates = self.policy.scorer.estimates(stage, hidden[:, :n].detach(), *places)
        scores = self.policy.scorer.scores(estimates, *places)[0]
        if not scores.isfinite().all():
            raise UserError(f"scores of stage {stage} (layer {schedule.layers[stage]}) are not finite")
        protected = protected_tokens(schedule, entering[None], None, [len(entering)], None)[0]
        trace.estimates.append(estimates[0])
        trace.scores.append(scores)
        trace.entering.append(entering)
        trace.protected.append(protected)
        free = present.index_fill(0, entering[protected], False)
        budget = min(schedule.surviving(n)[stage], len(entering)) - int(protected.sum())
        if budget >= int(free.sum()):
            trace.kept.append(entering)
            return
        temperature = self.policy.temperature
        if self.noise is None:
            kept, margin = highest(scores, free, max(budget, 0))
        else:
            noise = self.noise(stage, n).to(scores)
            kept, margin = self.policy.sampler(scores, free, max(budget, 0), temperature, noise)
        stays = kept | (present & ~free)
        left = positions[stays]
        if not len(left):  # a sampler may draw nobody, and pruning always leaves someone
            left = margin.detach().masked_fill(~free, -torch.inf).argmax()[None]
            stays = stays.index_fill(0, left, True)
        trace.kept.append(left)
        # A token that an earlier stage dropped gets the mask it would have had here, so that the gradient of the
        # earlier mask says what keeping it would have done through all the layers where it would have stayed.
        mask = torch.where(present, stays, margin > 0).to(scores.dtype)
        if self.gradient:
            soft = torch.sigmoid(margin / temperature)
            mask = mask + torch.where(present & ~free, 0.0, soft - soft.detach())
        self.mask = mask if self.mask is None else self.mask * mask

    def key_mask(self, tokens: int) -> torch.Tensor:
        """[1, 1, 1, tokens]: the mask of each key, 1 for the response."""
        if self.mask is None:
            return torch.ones(1, 1, 1, tokens, device=self.trace.entering[-1].device)
        return torch.cat([self.mask, self.mask.new_ones(tokens - self.prompt_tokens)])[None, None, None]


def _is_causal(mask: torch.Tensor, tokens: int, window: int | None) -> bool:
    """Whether a layer's attention mask, bool or to be added, hides the future and what is before the window alone.

    Compared in blocks of rows, by comparisons of positions and not by their distances: at 32K tokens a matrix of these
    would take 8 GB. One synchronisation with the device.
    """
    if mask.shape[2:] != (tokens, tokens):
        return False
    columns = torch.arange(tokens, device=mask.device)
    alike = []
    for start in range(0, tokens, _BLOCK):
        own = columns[start : start + _BLOCK, None]
        expected = own >= columns
        if window:
            expected &= columns > own - window
        shown = mask[0, 0, start : start + _BLOCK]
        alike.append(((shown if shown.dtype == torch.bool else shown == 0) == expected).all())
    return bool(torch.stack(alike).all())
