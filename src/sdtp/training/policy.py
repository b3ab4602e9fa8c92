"""The differentiable stand-in for removal: in training a dropped token stays in the sequence, hidden as a key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.pruning.selection import protected_tokens, select
from sdtp.training import attention
from sdtp.training.seeding import keyed_generator

Noise = Callable[[int, int], torch.Tensor]


@dataclasses.dataclass
class PolicyTrace:
    """What the stages decided in one forward.

    Attributes:
        scores: per stage [prompt_tokens] float32, the scorer's output for every prompt token, on the graph.
        entering: per stage LongTensor [present], ascending positions of the tokens the stage chose from.
        protected: per stage bool [present], which of those the schedule protects.
        kept: per stage LongTensor [kept], ascending positions of the survivors.
    """

    scores: list[torch.Tensor] = dataclasses.field(default_factory=list)
    entering: list[torch.Tensor] = dataclasses.field(default_factory=list)
    protected: list[torch.Tensor] = dataclasses.field(default_factory=list)
    kept: list[torch.Tensor] = dataclasses.field(default_factory=list)


class MaskingPolicy:
    """Hides dropped tokens as keys from their stage on; values equal removal, gradients reach the scorer.

    At every survivor and every response token the forward gives what physical removal gives. Dropped tokens keep being
    computed: no survivor sees them, but the loss is differentiable in their masks, which says what bringing one back
    would do. The hard mask of a stage is straight-through: its gradient is that of
    `sigmoid((score - cut) / temperature)`, `cut` the midpoint between the lowest kept and the highest dropped score.
    Masks are cumulative over the stages. The scorer reads detached states, so that no stage learns to change what a
    later one sees.

    Args:
        schedule: the stages and their budgets, applied exactly as in pruning.
        scorer: gives the keep scores.
        temperature: width of the relaxation and scale of the noise, > 0.

    Raises:
        UserError: a temperature that is not positive.
    """

    def __init__(self, schedule: PruningSchedule, scorer: Learned, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise UserError(f"training.temperature is {temperature}: a number above 0 is accepted")
        self.schedule = schedule
        self.scorer = scorer
        self.temperature = temperature

    @contextmanager
    def __call__(
        self, model: PreTrainedModel, prompt_tokens: int, noise: Noise | None = None, gradient: bool = True
    ) -> Iterator[PolicyTrace]:
        """Attach to the model; a forward inside the block is masked. Use one forward a block, without a cache.

        Args:
            model: frozen causal LM.
            prompt_tokens: the first so many tokens of the sequence are the prompt; the rest, the response, is never
                scored, hidden or counted.
            noise: `noise(stage, prompt_tokens)` gives [prompt_tokens] added to the scores times the temperature, as
                `gumbel_noise` does; None takes the highest scores.
            gradient: False leaves the masks off the graph, which spares the model's backward pass where only the scores
                are trained.

        Raises:
            UserError: the model cannot change its attention, or the schedule does not fit it.
        """
        layers = decoder_layers(model)
        self.schedule.check_fits(len(layers))
        run = _MaskedForward(self, prompt_tokens, noise, gradient)
        hooks = [
            layers[index].register_forward_pre_hook(run.hook(index), with_kwargs=True)
            for index in range(min(self.schedule.layers, default=len(layers)), len(layers))
        ]
        before = model.config._attn_implementation
        try:
            put_attention(model)
            yield run.trace
        finally:
            for hook in hooks:
                hook.remove()
            model.set_attn_implementation(before)


def put_attention(model: PreTrainedModel) -> None:
    """Have a model attend through key masks with gradients.

    Raises:
        UserError: the model cannot change its attention.
    """
    model.set_attn_implementation(attention.NAME)
    if model.config._attn_implementation != attention.NAME:
        raise UserError(f"{type(model).__name__} cannot change its attention: no scorer can be trained through it")


class _MaskedForward:
    """The state of one masked forward."""

    def __init__(self, policy: MaskingPolicy, prompt_tokens: int, noise: Noise | None, gradient: bool) -> None:
        self.policy = policy
        self.prompt_tokens = prompt_tokens
        self.noise = noise
        self.gradient = gradient
        self.trace = PolicyTrace()
        self.mask: torch.Tensor | None = None  # [prompt_tokens], cumulative
        self.keys: torch.Tensor | None = None  # [1, 1, tokens, tokens], the mask as the attention takes it

    def hook(self, layer: int) -> Any:
        """Forward pre-hook of a decoder layer."""
        stages = self.policy.schedule.layers

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden = args[0]
            if layer in stages:
                self.decide(stages.index(layer), hidden)
                self.keys = self.key_mask(hidden.shape[1])
            if kwargs["attention_mask"] is not None:
                raise UserError(
                    "the masking policy takes one sequence without padding, no longer than the model's sliding window, "
                    f"if it has one: layer {layer} was handed an attention mask"
                )
            return args, {**kwargs, "attention_mask": self.keys}

        return enter

    def decide(self, stage: int, hidden: torch.Tensor) -> None:
        """Score, choose, and multiply the stage's straight-through mask into the cumulative one."""
        n, schedule, trace = self.prompt_tokens, self.policy.schedule, self.trace
        positions = torch.arange(n, device=hidden.device)
        entering = trace.kept[-1] if trace.kept else positions
        present = torch.zeros(n, dtype=torch.bool, device=hidden.device).index_fill_(0, entering, True)
        lengths = torch.full((1,), n, device=hidden.device)
        scores = self.policy.scorer(stage, hidden[:, :n].detach(), positions[None], lengths, present[None])[0]
        if not scores.isfinite().all():
            raise UserError(f"scores of stage {stage} (layer {schedule.layers[stage]}) are not finite")
        noisy = scores
        if self.noise is not None:
            noisy = scores + self.policy.temperature * self.noise(stage, n).to(scores)
        value = noisy.detach()
        protected = protected_tokens(schedule, entering[None], None, [len(entering)], None)
        columns, _ = select(value[entering][None], protected, None, [schedule.surviving(n)[stage]])
        kept = entering[columns[0]]
        trace.scores.append(scores)
        trace.entering.append(entering)
        trace.protected.append(protected[0])
        trace.kept.append(kept)

        chosen = torch.zeros_like(value, dtype=torch.bool).index_fill_(0, kept, True)
        free = torch.ones_like(chosen).index_fill_(0, entering[protected[0]], False)
        if len(kept) == len(entering):
            return
        highest_dropped = value[present & ~chosen].amax()
        lowest_kept = value[chosen & free].amin() if (chosen & free).any() else highest_dropped
        cut = (highest_dropped + lowest_kept) / 2
        # A token that an earlier stage dropped gets the mask it would have had here, so that the gradient of the
        # earlier mask says what keeping it would have done through all the layers where it would have stayed.
        hard = torch.where(present, chosen, value > cut).to(scores.dtype)
        soft = torch.sigmoid((noisy - cut) / self.policy.temperature)
        mask = hard + torch.where(free, soft - soft.detach(), 0.0) if self.gradient else hard
        self.mask = mask if self.mask is None else self.mask * mask

    def key_mask(self, tokens: int) -> torch.Tensor:
        """[1, 1, tokens, tokens]: every query weighs a key by its mask, itself and the response by 1."""
        if self.mask is None:
            return torch.ones(1, 1, tokens, tokens, device=self.trace.entering[-1].device)
        row = torch.cat([self.mask, self.mask.new_ones(tokens - self.prompt_tokens)])
        itself = torch.eye(tokens, dtype=torch.bool, device=row.device)
        return row.expand(tokens, tokens).masked_fill(itself, 1.0)[None, None]


def gumbel_noise(seed: int, epoch: int, example: str, stage: int, tokens: int) -> torch.Tensor:
    """Standard Gumbel noise [tokens] float32 on the CPU, a function of (seed, epoch, example, stage) alone.

    Added to scores before a top-k it draws k tokens without replacement, with the scores as log-weights (Gumbel top-k,
    Kool et al. 2019, arXiv 1903.06059): budgets stay exact.
    """
    generator = keyed_generator(seed, epoch, example, stage)
    uniform = torch.rand(tokens, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return (-(-uniform.log()).log()).float()
