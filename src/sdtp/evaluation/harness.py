"""The model `sdtp` of lm-evaluation-harness: contexts are pruned, continuations are scored whole.

lm-eval finds models in a registry that it fills by itself: no entry point and no option of its command line adds one.
`sdtp-lm-eval` (or `python -m sdtp.evaluation.harness`) is its command with this model in the registry:

    sdtp-lm-eval --model sdtp --model_args pretrained=FOLDER,pruner=FOLDER --tasks copa --num_fewshot 5
    sdtp-lm-eval --model sdtp --model_args pretrained=FOLDER,pruner=recent,keep_ratio=0.9,start=4,step=3 --tasks copa

Nothing else of the package needs this module, nor lm-eval.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import chunks
from tqdm import tqdm

from sdtp.errors import UserError
from sdtp.evaluation.agreement import check_finite
from sdtp.evaluation.harness_answers import Known, Scored
from sdtp.evaluation.harness_pruner import read_pruner
from sdtp.evaluation.shared_prefill import follow, prefill
from sdtp.pruning.adapter import architecture
from sdtp.pruning.prefill import Trace
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.wrappers import unwrap

LOGGER = logging.getLogger(__name__)

# As lm-eval hands them over: ((context, continuation) or None, context ids, continuation ids).
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("sdtp")
class PrunedLM(HFLM):
    """lm-eval's Hugging Face model, with its contexts pruned while they are prefilled.

    A continuation is fed on the pruned cache: no scorer sees it and none of it is removed. Requests of the same context
    share its prefill. With no pruner, or where none of a context is removed, scores are those of `--model hf`, but for
    log-softmax, which is taken in float32 unless `softmax_dtype` says otherwise.

    Attributes:
        pruner: None for the unpruned model.
        known: answers that are taken over instead of computed, and where those that are computed go; None, as it is at
            first, for neither.
        answers: continuations scored, of which `taken_over` were known.
        contexts: contexts prefilled, and `context_tokens` in them, of which `kept_tokens` were left at the last layer;
            those whose answers were all known included.
        truncated_requests: requests whose context lost tokens on the left to fit `max_length`.
        sizes: of each (context, continuation) scored, the tokens of the context and how many the last layer kept.

    Args:
        pretrained: as for `HFLM`.
        pruner, keep_ratio, start, step, sinks, local, min_local, min_tokens, seed: see `read_pruner`.
        **kwargs: as for `HFLM`. `logits_cache=False` prefills the context anew for each request.

    Raises:
        UserError: an encoder-decoder model; and what `read_pruner` raises.
    """

    def __init__(
        self,
        pretrained: Any,
        pruner: str | TokenPruner | None = None,
        keep_ratio: float | None = None,
        start: int | None = None,
        step: int | None = None,
        sinks: int | None = None,
        local: float | None = None,
        min_local: int | None = None,
        min_tokens: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, **kwargs)
        if self.backend != "causal":
            raise UserError(f"pretrained={pretrained} is an encoder-decoder model: only decoders can be pruned")
        layers = 0 if pruner is None else len(architecture(unwrap(self.model)).layers)
        self.pruner = read_pruner(
            pruner,
            layers,
            keep_ratio=keep_ratio,
            start=start,
            step=step,
            sinks=sinks,
            local=local,
            min_local=min_local,
            min_tokens=min_tokens,
            seed=seed,
        )
        with self._pruning():  # refused here, if at all, rather than after the tasks are loaded
            pass
        self.contexts = self.context_tokens = self.kept_tokens = self.truncated_requests = 0
        self.known: Known | None = None
        self.answers = self.taken_over = 0
        self.sizes: dict[tuple[str, str], tuple[int, int]] = {}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, of the unpruned model only.

        Raises:
            UserError: there is a pruner.
        """
        if self.pruner is not None:
            raise UserError(
                "loglikelihood_rolling scores a whole text, and without a context nothing is pruned: run perplexity "
                "tasks with no pruner"
            )
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding gives.

        Raises:
            UserError: a continuation that has no token, or more than the model takes, or whose log-likelihood is nan.
        """
        answers: dict[int, Scored] = {}
        sharing: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
        taken: dict[tuple[int, tuple[int, ...]], Scored] = {}
        for index, (_, context, continuation) in enumerate(requests):
            fitting = self._fitting(context, continuation)
            known = None if self.known is None else self.known.find(fitting, continuation)
            prefilled = 0 if self.logits_cache else index, tuple(fitting)
            if known is None:
                sharing[prefilled].append(index)
            else:
                answers[index] = taken[prefilled] = known
        self.answers += len(requests)
        self.taken_over += len(answers)
        for prefilled, known in taken.items():
            if prefilled not in sharing:
                self._add_up([known["prompt_tokens"]], [known["kept_tokens"]])
        groups = [
            (indices, list(context), max((requests[index][2] for index in indices), key=len))
            for (_, context), indices in sharing.items()
        ]
        # Longest first: batches have little padding, and what does not fit in memory fails at once.
        groups.sort(key=lambda group: (-len(group[1]) - len(group[2]), group[1]))
        automatic = self.batch_size == "auto" and override_bs is None
        rows = 0 if automatic else override_bs if self.batch_size == "auto" else self.batch_size
        if automatic:
            self.batch_sizes: dict[int, int] = {}  # what lm-eval found to fit is of other requests
        silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), initial=len(answers), disable=silent, desc="Scoring continuations") as bar:
            for batch in chunks(groups, rows, self._batch_scheduler if automatic else None):
                at_once = rows or list(self.batch_sizes.values())[-1]
                contexts = {index: context for indices, context, _ in batch for index in indices}
                for index, scored in self._score(batch, requests, at_once):
                    answers[index] = scored
                    pair, _, continuation = requests[index]
                    if self.known is not None:
                        self.known.add(contexts[index], continuation, scored)
                    if pair is not None:
                        self.cache_hook.add_partial("loglikelihood", pair, _as_lm_eval_has_it(scored))
                    bar.update()
        self._tell_truncated()
        for index, scored in answers.items():
            pair = requests[index][0]
            if pair is not None:
                self.sizes[pair] = scored["prompt_tokens"], scored["kept_tokens"]
        return [_as_lm_eval_has_it(answers[index]) for index in range(len(requests))]

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """The end of a context that fits before its continuation, whose last token is never fed."""
        if not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens: 1 to {self.max_length} (max_length) can be scored"
            )
        room = self.max_length + 1 - len(continuation)
        self.truncated_requests += len(context) > room
        return context[-room:]

    @torch.inference_mode()
    def _score(
        self, batch: Sequence[tuple[list[int], list[int], list[int]]], requests: Sequence[_Request], at_once: int
    ) -> list[tuple[int, Scored]]:
        """Answers to the requests of a batch of (requests' indices, context, ...), at most `at_once` in a forward."""
        asked = [(row, index) for row, (indices, _, _) in enumerate(batch) for index in indices]
        answers = []
        with self._pruning() as trace, self._autocast():
            prefilled = prefill(self.model, [context for _, context, _ in batch])
            kept = self._count(prefilled.lengths, trace)
            for begin in range(0, len(asked), at_once):
                rows, indices = zip(*asked[begin : begin + at_once], strict=True)
                continuations = [requests[index][2] for index in indices]
                predicted = follow(self.model, prefilled, rows, continuations, last=begin + at_once >= len(asked))
                for row, index, logits, ids in zip(rows, indices, predicted, continuations, strict=True):
                    continuation = torch.tensor(ids, device=logits.device)
                    log_probs = logits.to(self.softmax_dtype or torch.float32).log_softmax(-1)
                    total = float(log_probs.gather(-1, continuation.unsqueeze(-1)).sum())
                    if math.isnan(total):  # of a token that a model rules out it is -inf
                        check_finite(f"continuation {requests[index][0] or ids!r}", {"log-likelihood": total})
                    scored = Scored(
                        log_likelihood=total,
                        greedy=bool((logits.argmax(-1) == continuation).all()),
                        prompt_tokens=prefilled.lengths[row],
                        kept_tokens=kept[row],
                    )
                    answers.append((index, scored))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts generated from pruned contexts, up to the requests' stop sequences."""
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        self._tell_truncated()
        return texts

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `HFLM` does it, counting the contexts that are cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.truncated_requests += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        with self._pruning() as trace:
            generated: torch.Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self._count(generation_kwargs["attention_mask"].sum(1).tolist(), trace)
        return generated

    @contextlib.contextmanager
    def _pruning(self) -> Iterator[Trace | None]:
        if self.pruner is None:
            yield None
        else:
            with self.pruner(self.model) as trace:
                yield trace

    def _autocast(self) -> torch.autocast:
        mixed = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None)

    def _count(self, lengths: Sequence[int], trace: Trace | None) -> Sequence[int]:
        """Adds a prefill to the totals; the tokens that the last layer keeps of each of its rows."""
        if trace is not None:  # beams count as they were prefilled
            lengths = trace.prompt_lengths
        kept = (trace.kept[-1] >= 0).sum(1).tolist() if trace is not None and trace.kept else lengths
        self._add_up(lengths, kept)
        return kept

    def _add_up(self, lengths: Sequence[int], kept: Sequence[int]) -> None:
        self.contexts += len(lengths)
        self.context_tokens += sum(lengths)
        self.kept_tokens += sum(kept)

    def _tell_truncated(self) -> None:
        if self.truncated_requests:
            LOGGER.warning(
                "%d requests so far lost context on the left to fit %d tokens", self.truncated_requests, self.max_length
            )

    def get_model_info(self) -> dict[str, Any]:
        """What `HFLM` tells of the model, and what was pruned how far: it goes into the results' `config`."""
        pruner = self.pruner
        return {
            **super().get_model_info(),
            "pruning_scorer": None if pruner is None else type(pruner.scorer).__name__,
            "pruning_schedule": None if pruner is None else pruner.schedule.to_dict(),
            "contexts": self.contexts,
            "context_tokens": self.context_tokens,
            "kept_tokens": self.kept_tokens,
            "truncated_requests": self.truncated_requests,
        }


def _as_lm_eval_has_it(scored: Scored) -> tuple[float, bool]:
    return scored["log_likelihood"], scored["greedy"]


def main() -> None:
    """The command `lm_eval`, which knows `--model sdtp` as soon as this module is imported."""
    cli_evaluate()


if __name__ == "__main__":
    main()
