"""How a scorer does on examples it is not trained on, and which of its states did best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.training.agreement import stage_agreement
from sdtp.training.examples import Example
from sdtp.training.objective import masked_logits
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from sdtp.training.response import response_cross_entropy, response_kl, response_logits

# Up to here a process keeps, on the CPU, what the unpruned model predicts for its share; else it is computed each time.
_KEPT_BYTES = 2**30

_METRICS = ("tau", "overlap", "ce", "kl")


def check_choices(prompt_tokens: Sequence[int], schedule: PruningSchedule) -> None:
    """Refuse held-out prompts none of which leaves a stage a choice: a scorer has nothing to agree on there.

    Args:
        prompt_tokens: of each held-out example, at least one example.
        schedule: what the scorer is trained for.

    Raises:
        UserError: so it is.
    """
    if not any(_leaves_a_choice(schedule, tokens) for tokens in prompt_tokens):
        raise UserError(
            f"no stage has a choice in any of the {len(prompt_tokens)} held-out prompts, the longest of "
            f"{max(prompt_tokens)} tokens: longer ones are accepted, or fewer protected tokens (pruning.sinks, "
            "pruning.local, pruning.min_local)"
        )


def _leaves_a_choice(schedule: PruningSchedule, prompt_tokens: int) -> bool:
    """Whether `stage_agreement` finds a stage to look at: one that keeps some of the tokens it may remove, not all."""
    left = schedule.surviving(prompt_tokens)
    # Every stage protects the sinks, so all of them enter the next.
    return any(
        min(present, schedule.sinks + schedule.protected_tail(present)) < kept < present
        for present, kept in zip((prompt_tokens, *left), left, strict=False)
    )


class HeldOut:
    """The held-out examples, each process's share of them, and what the unpruned model predicts there.

    Args:
        model: frozen causal LM.
        examples: at least one that leaves a stage a choice, as `check_choices` asks.
        processes: that share the examples.
        lockstep: whether all processes must run as many forwards (the model is sharded).
    """

    def __init__(
        self, model: PreTrainedModel, examples: Sequence[Example], processes: Processes, lockstep: bool = False
    ) -> None:
        self._model = model
        self._examples = examples
        self._processes = processes
        self._lockstep = lockstep
        vocabulary = model.config.get_text_config().vocab_size
        tokens = sum(len(examples[index].response_ids) for index, _ in processes.share(len(examples), lockstep))
        self._predictions: dict[int, torch.Tensor] = {}
        self._keeps = processes.largest(tokens * vocabulary * model.dtype.itemsize) <= _KEPT_BYTES

    @torch.no_grad()
    def evaluate(self, policy: MaskingPolicy) -> dict[str, float]:
        """How a scorer does without noise; the same on every process, and the same as one process finds.

        Returns:
            `tau`: Kendall rank correlation of scores and saliency over the tokens a stage decides on, mean over stages;
            `overlap`: the share of a stage's free choices that saliency would have made too; both the mean over the
            examples whose prompt leaves a stage a choice. `ce`: cross-entropy of the response under pruning, nats a
            token; `kl`: divergence of the pruned model's prediction of the response from the unpruned one's,
            KL(unpruned || pruned), nats a token; both the mean over all examples.

        Raises:
            UserError: `ce` or `kl` of an example is not finite, naming it.
        """
        # A row an example, filled in by the process that has it: a sum with zeros is exact, whatever the shares.
        table = torch.zeros(len(self._examples), len(_METRICS), dtype=torch.float64)
        turns = self._processes.share(len(self._examples), self._lockstep)
        with self._processes.together(self._lockstep):
            for index, counts in tqdm(
                turns, desc="held-out", unit="example", leave=False, disable=not self._processes.main
            ):
                example = self._examples[index]
                logits, trace = masked_logits(self._model, policy, example, None)
                reference = self._prediction(index, example)
                row = (
                    *stage_agreement(trace, example.saliency),
                    response_cross_entropy(logits, example.response_ids).item(),
                    response_kl(logits, reference).item(),
                )
                for name, value in zip(_METRICS[2:], row[2:], strict=True):
                    if not math.isfinite(value):
                        raise UserError(f"{name} of held-out example {example.id!r} is {value}: training stopped")
                if counts:
                    table[index] = torch.tensor(row, dtype=torch.float64)
        table = table.to(self._processes.device)
        self._processes.add_up(table)
        tau, overlap, ce, kl = table.T.tolist()
        decided = [index for index, value in enumerate(tau) if not math.isnan(value)]
        return {
            "tau": fmean(tau[index] for index in decided),
            "overlap": fmean(overlap[index] for index in decided),
            "ce": fmean(ce),
            "kl": fmean(kl),
        }

    def _prediction(self, index: int, example: Example) -> torch.Tensor:
        """The unpruned model's logits [response_tokens, vocabulary] that predict the response."""
        if index in self._predictions:
            return self._predictions[index].to(self._model.device)
        logits = response_logits(self._model, example.prompt_ids, example.response_ids)
        if self._keeps:
            self._predictions[index] = logits.cpu()
        return logits


def best_evaluation(history: Sequence[tuple[dict[str, float], int, str]]) -> tuple[int | None, int]:
    """The evaluation with the least held-out `kl`, the earliest of equals.

    Args:
        history: (metrics, step, split) of everything reported so far.

    Returns:
        Its step, None where there was no evaluation yet; and how many came after it.
    """
    found = [(metrics["kl"], step) for metrics, step, split in history if split == "heldout"]
    if not found:
        return None, 0
    best = min(range(len(found)), key=lambda place: found[place][0])
    return found[best][1], len(found) - 1 - best
