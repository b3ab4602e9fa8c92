"""TokenPruner: attaches to an unmodified transformers model and removes prompt tokens while it prefills."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from sdtp.pruning import store
from sdtp.pruning.adapter import architecture, cache_of
from sdtp.pruning.fingerprint import Fingerprint
from sdtp.pruning.prefill import Trace
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned, Saliency, Scorer
from sdtp.pruning.session import Session
from sdtp.pruning.wrappers import unwrap

_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_ATTACHING = threading.Lock()


class TokenPruner:
    """Removes the least important prompt tokens between a decoder's layers.

    Examples:
        >>> with TokenPruner.from_pretrained(folder)(model) as trace:
        ...     out = model.generate(**inputs, max_new_tokens=128)
        >>> trace.kept[-1]  # the prompt tokens that reached the last stage

    Args:
        schedule: which layers prune and how many tokens survive each.
        scorer: who decides; anything with `scorers.Scorer`'s method.
        trained_for: the model that the scorer learned on, see `fingerprint.fingerprint`; None if it serves any.

    Raises:
        ValueError: a learned scorer with weights, or saliency with labels, for another number of stages.
    """

    def __init__(self, schedule: PruningSchedule, scorer: Scorer, trained_for: Fingerprint | None = None) -> None:
        if isinstance(scorer, (Learned, Saliency)) and scorer.stages != schedule.stages:
            raise ValueError(
                f"{type(scorer).__name__} was made for {scorer.stages} stages, the schedule has {schedule.stages}"
            )
        self.schedule = schedule
        self.scorer = scorer
        self.trained_for = trained_for

    def with_schedule(self, schedule: PruningSchedule) -> TokenPruner:
        """The same scorer under another schedule of as many stages."""
        return TokenPruner(schedule, self.scorer, self.trained_for)

    def at_stages(self, stages: Sequence[int]) -> TokenPruner:
        """A pruner with some of the stages alone: their layers and shares, see `PruningSchedule.at_stages`.

        What decides at a stage decides there as before: a learned scorer's weights are shared, not copied, and the
        oracle's labels are those of the stages' layers.

        Args:
            stages: which of the schedule's stages, 0-based, at least one, ascending.

        Raises:
            ValueError: stages that are not that.
        """
        schedule = self.schedule.at_stages(stages)
        scorer = self.scorer
        if isinstance(scorer, Learned):
            scorer = scorer.at_stages(stages)
        elif isinstance(scorer, Saliency):
            scorer = Saliency(scorer.labels[list(stages)])
        return TokenPruner(schedule, scorer, self.trained_for)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `pruner.json` (schedule, scorer) and, for a learned scorer, `pruner.safetensors`.

        Raises:
            ValueError: the scorer has no form on disk (the saliency oracle, one's own class).
        """
        store.save(Path(folder), self.schedule, self.scorer, self.trained_for)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TokenPruner:
        """Read what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other; named with the fault.
        """
        return cls(*store.load(Path(folder)))

    @classmethod
    def from_mlflow(cls, uri: str) -> TokenPruner:
        """Read a pruner that MLflow has, from the store that MLFLOW_TRACKING_URI names.

        Args:
            uri: of a registered version (`models:/NAME@champion`, `models:/NAME/3`), of a logged model
                (`models:/m-ID`), or of artifacts of a run (`runs:/ID/pruner`).

        Raises:
            ImportError: MLflow is not installed; nothing else here needs it.
            ValueError: no pruner is there, or more than one, or a damaged one.
        """
        try:
            from mlflow.artifacts import download_artifacts
        except ImportError as error:
            raise ImportError("TokenPruner.from_mlflow needs MLflow: pip install mlflow") from error
        with tempfile.TemporaryDirectory() as folder:
            download_artifacts(artifact_uri=uri, dst_path=folder)
            found = [path.parent for path in Path(folder).rglob(store.SETTINGS)]
            if len(found) != 1:
                raise ValueError(f"{uri}: {len(found)} pruners are there; accepted: a URI of one")
            return cls.from_pretrained(found[0])

    @contextlib.contextmanager
    def __call__(
        self, model: nn.Module, protect: torch.Tensor | None = None, ratio: float | None = None
    ) -> Iterator[Trace]:
        """Prune every prompt that `model` prefills inside the context; the model is as before on exit.

        A forward with no cache or an empty one is a prefill; tokens added to the cache it returns are never removed.
        The context belongs to the model, not to the thread that entered it: until it is left, any thread's prompts are
        pruned, each by itself, also when threads call the model at once.

        Args:
            model: a causal LM of transformers (see `adapter.architecture` for the supported kinds), also inside PEFT or
                DistributedDataParallel.
            protect: [batch, prompt tokens] bool over the input's columns, True at tokens that no stage may remove.
            ratio: keep this fraction at each stage of what the stage before left, instead of the schedule's own
                numbers; in (0, 1].

        Yields:
            The trace of the latest prefill, of whichever thread.

        Raises:
            TypeError: the model's kind is not supported.
            ValueError: the scorer or the schedule was made for another model, `ratio` is out of range, or a pruner is
                attached.
        """
        inner: Any = unwrap(model)
        parts = architecture(inner)
        if parts.stack is inner:
            raise TypeError(
                f"{type(inner).__name__} has no language-model head: attach to the causal LM that holds it, "
                "whose calls tell prompts from what follows"
            )
        if inner.get_output_embeddings() is None:
            raise TypeError(
                f"{type(inner).__name__} has no language-model head: what it makes of each token, or of the one in a "
                "certain column, has no counterpart among survivors; a causal LM is needed"
            )
        schedule = self.schedule if ratio is None else self.schedule.with_ratio(ratio)
        schedule.check_fits(len(parts.layers))
        if isinstance(self.scorer, Learned) and self.scorer.hidden_size != parts.config.hidden_size:
            raise ValueError(
                f"the scorer was trained for hidden size {self.scorer.hidden_size}, {type(inner).__name__} has "
                f"{parts.config.hidden_size}"
            )
        if self.trained_for is not None:
            self.trained_for.check(inner)
        with _ATTACHING:  # two threads may try at once
            if parts.stack in _ATTACHED:
                raise ValueError(
                    f"a pruner is attached to this {type(inner).__name__} already: leave its context first"
                )
            _ATTACHED.add(parts.stack)
        try:
            session = Session(schedule, self.scorer, inner, parts, protect)
            with contextlib.ExitStack() as hooks:
                session.attach(hooks)
                yield session.trace
        finally:
            _ATTACHED.discard(parts.stack)

    def cache_document(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        protect: torch.Tensor | None = None,
    ) -> Cache:
        """The pruned KV cache of a document that questions will be asked about.

        Ask each with a copy: `model.generate(document_and_question_ids, cache=copy.deepcopy(cache))` inside
        `with pruner(model):` gives what it gives when it is the only one.

        Args:
            model, protect: as for `__call__`.
            input_ids: LongTensor [batch, tokens] of the document alone.
            attention_mask: [batch, tokens], 0 at left padding.

        Raises:
            ValueError: the scorer looks at the question, which is not there yet; and what `__call__` raises.
        """
        if self.scorer.question_conditioned:
            raise ValueError(
                f"{type(self.scorer).__name__} chooses tokens by the end of the prompt: a document without its "
                "question cannot be pruned by it"
            )
        positions: dict[str, Any] = {}
        if attention_mask is not None:
            positions = {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)}
        with self(model, protect), torch.no_grad():
            output = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **positions)
        cache: Cache = cache_of(output)
        return cache
