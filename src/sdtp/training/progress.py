"""How far a training has come: what it reported, its best scorer so far, and the checkpoint it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import optim

from sdtp.pruning.scorers import Learned
from sdtp.training.checkpoints import LABELS, STEPS, Checkpoints, restore, snapshot
from sdtp.training.heldout import best_evaluation
from sdtp.training.processes import Processes

logger = logging.getLogger(__name__)

Log = Callable[[dict[str, float], int, str], None]

Found = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""What `Checkpoints.load` found."""


class Progress:
    """A training's history and resume state; several processes share them, and the main one alone logs and writes.

    Args:
        scorer: what is trained.
        log, on_checkpoint, tracking_run: see `trainer.fit`.
        store: its checkpoints; None keeps none.
        processes: those that train together.

    Attributes:
        history: (metrics, step, split) of everything reported so far.
        best: weights of the best evaluation, by name; none before `keep_if_best`.
    """

    def __init__(
        self,
        scorer: Learned,
        log: Log,
        store: Checkpoints | None,
        on_checkpoint: Callable[[int], None] | None,
        tracking_run: str,
        processes: Processes,
    ) -> None:
        self.history: list[tuple[dict[str, float], int, str]] = []
        self.best: dict[str, torch.Tensor] = {}
        self._scorer, self._processes = scorer, processes
        self._log, self._on_checkpoint, self._tracking_run = log, on_checkpoint, tracking_run
        self._store = store

    def report(self, metrics: dict[str, float], step: int, split: str) -> None:
        """Add to the history, and log."""
        self.history.append((metrics, step, split))
        if self._processes.main:
            self._log(metrics, step, split)

    def keep_if_best(self, step: int) -> None:
        """Keep a copy of the scorer if the evaluation of this step, the newest, is the best."""
        if best_evaluation(self.history)[0] == step:
            self.best = {name: value.detach().clone() for name, value in self._scorer.state_dict().items()}

    def found(self) -> Found | None:
        """The newest checkpoint, whose history is reported again; where none can be used, those there are removed."""
        store, processes = self._store, self._processes
        if store is None:
            return None
        with processes.together():
            found = store.load() if processes.main else None
        found = processes.from_main(found)
        if found is None:
            with processes.together():
                if processes.main:
                    store.clear()  # damaged ones would count as the newest
                    if store.others():
                        logger.info(
                            "%s has checkpoints of other settings, inputs, code or library versions: they are not "
                            "used, and stay until a training has ended here",
                            store.folder.parent,
                        )
            return None
        state = found[1]
        for metrics, step, split in state["history"]:
            self.report(metrics, step, split)
        reached = f"{'label epoch' if state['part'] == LABELS else 'step'} {state['step']}"
        logger.info("going on from %s, reached by tracking run %s", reached, state["tracking_run"] or "(none)")
        return found

    def go_on(self, found: Found, optimizer: optim.Optimizer, rates: optim.lr_scheduler.LRScheduler) -> None:
        """Make scorer, optimizer and learning rate what they were at a checkpoint."""
        self.best = restore(self._scorer, optimizer, rates, *found)
        with self._processes.together():
            self._tell(found[1]["part"], found[1]["step"])

    def save(self, part: str, step: int, optimizer: optim.Optimizer, rates: optim.lr_scheduler.LRScheduler) -> None:
        """Write a checkpoint.

        Args:
            part, step: as `Checkpoints.save` takes them.
            optimizer, rates: those of this part.
        """
        if self._store is None:
            return
        with self._processes.together():
            if self._processes.main:
                tensors, state = snapshot(self._scorer, optimizer, rates, self.best)
                state |= {"history": self.history, "tracking_run": self._tracking_run}
                self._store.save(part, step, tensors, state)
                self._tell(part, step)

    def end(self) -> None:
        """Remove the checkpoints of other trainings; its own stay: a rerun makes the same again, without computing."""
        if self._store is None:
            return
        with self._processes.together():
            if self._processes.main:
                self._store.clear_others()

    def _tell(self, part: str, step: int) -> None:
        if part == STEPS and self._processes.main and self._on_checkpoint is not None:
            self._on_checkpoint(step)
