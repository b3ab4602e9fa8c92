"""Stage 2: fits the learned scorers on the frozen model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.pruning.store import learned_settings
from sdtp.training.backbone import is_sharded, running
from sdtp.training.checkpoints import LABELS, STEPS, Checkpoints
from sdtp.training.examples import Example, check_examples
from sdtp.training.gradients import batch_gradient, try_longest
from sdtp.training.heldout import HeldOut, best_evaluation, check_choices
from sdtp.training.label_fit import check_states_fit, fit_labels, stored_states
from sdtp.training.optimizer import GRADIENT_CLIP, adamw, flat_gradients
from sdtp.training.options import Options
from sdtp.training.policy import MaskingPolicy
from sdtp.training.processes import Processes
from sdtp.training.progress import Found, Log, Progress

logger = logging.getLogger(__name__)

# Another version may compute other numbers: a checkpoint belongs to the one it was made with.
_LIBRARIES = {"torch": torch.__version__, "transformers": transformers.__version__}

# Of the time of the label epochs, the share that their checkpoints may take: with little to an epoch, not each has one.
_SAVING = 0.05


def fit(
    model: PreTrainedModel,
    scorer: Learned,
    schedule: PruningSchedule,
    train: Sequence[Example],
    heldout: Sequence[Example],
    options: Options,
    log: Log,
    checkpoints: Path | None = None,
    inputs: str = "",
    on_checkpoint: Callable[[int], None] | None = None,
    tracking_run: str = "",
) -> dict[str, float]:
    """Train the scorer in place; the model stays as it is.

    Every sample comes once an epoch, in an order that depends on the seed, the epoch and the examples' lengths alone
    (see `gradients.epoch_order`). A run that was interrupted goes on from its newest checkpoint and, on the CPU, ends
    with the same bits as one that was not.

    Called by each of several processes with the same arguments, each takes its share of every batch, and all end with
    the same scorer; the main one alone logs and writes. See `Processes` and `backbone.shard`.

    Args:
        model: frozen causal LM in eval mode.
        scorer: initialised by the caller from a fixed seed.
        schedule: what pruning is trained for.
        train, heldout: examples; held-out ones may be none, without `patience`.
        options: see `Options`.
        log: `log(metrics, step, split)` with split "train" or "heldout", or "labels" where the step is an epoch; what a
            resumed run did before it was interrupted is logged again, so that the curve is whole.
        checkpoints: folder of the resume state, which all processes see; None keeps none.
        inputs: identifies the model, the examples with their labels, and the code; a checkpoint made with other inputs,
            options, schedule, settings of the scorer or library versions is ignored, and stays until a training with
            the same `checkpoints` has ended.
        on_checkpoint: called with the step of every checkpoint once it is whole, while `scorer` is as it was saved, and
            with that of the one a run goes on from, whose maker may have been killed before; not of those between label
            epochs.
        tracking_run: id of the run that `log` reports to; checkpoints hold it, and a run that goes on from one says
            whose work that was.

    Returns:
        The held-out metrics of the scorer as it was left: `tau`, `overlap`, `ce` and `kl` (see `HeldOut.evaluate`).

    Raises:
        UserError: nothing to train on, or no held-out examples to be patient with; an example that `check_examples`
            refuses; held-out prompts that `check_choices` refuses; more states for the label epochs than fit into
            memory (see `check_states_fit`); an example whose step does not fit into the device's (see
            `gradients.try_longest`); a loss that is not finite, naming the example and the stage; or a gradient that is
            not finite, naming the example and the step.
        FailedElsewhereError: one of several processes failed, and this is not the main one, which raises the failure.
    """
    if not train:
        raise UserError("there is no training example: data.train.examples must be at least 1")
    if options.patience and not heldout:
        raise UserError(
            f"training.patience is {options.patience}, but there is no held-out example: data.train.heldout of at "
            "least 1, or a patience of 0, is accepted"
        )
    processes = Processes(cpu=model.device.type == "cpu")
    with processes.together():
        vocabulary = model.config.get_text_config().vocab_size
        lengths, heldout_lengths = (
            check_examples(examples, schedule.layers, vocabulary, progress=processes.main)
            for examples in (train, heldout)
        )
        if heldout:
            check_choices([prompt for prompt, _ in heldout_lengths], schedule)
    store = None if checkpoints is None else Checkpoints(checkpoints, _fingerprint(options, schedule, scorer, inputs))
    with running(model, schedule.layers[0], autocast=options.autocast, recompute=options.gradient_checkpointing):
        progress = Progress(scorer, log, store, on_checkpoint, tracking_run, processes)
        return _Training(model, scorer, schedule, train, lengths, heldout, options, progress, processes).run()


class _Training:
    """One training under way: what `fit` was given, and how far it has come."""

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: Learned,
        schedule: PruningSchedule,
        train: Sequence[Example],
        lengths: Sequence[tuple[int, int]],
        heldout: Sequence[Example],
        options: Options,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self.model, self.scorer, self.train, self.options = model, scorer, train, options
        self.lengths, self.tokens = lengths, tuple(map(sum, lengths))
        self.processes, self.lockstep = processes, is_sharded(model)
        # The states a scorer reads and its loss stay in float32 whatever the model's dtype, so weights do too.
        self.optimizer, self.rates = adamw(scorer, options.learning_rate, options.steps)
        self.policy = MaskingPolicy(schedule, scorer, options.temperature, options.sampler)
        self.heldout = HeldOut(model, heldout, processes, self.lockstep) if heldout else None
        self.progress, self.step = progress, 0

    def run(self) -> dict[str, float]:
        """See `fit`."""
        options, progress = self.options, self.progress
        found = progress.found()
        stepping = found if found is not None and found[1]["part"] == STEPS else None
        if stepping is not None:
            progress.go_on(stepping, self.optimizer, self.rates)
            self.step = stepping[1]["step"]
        label_epochs = self._label_epochs(found)
        if label_epochs:
            prompts = [prompt for prompt, _ in self.lengths[: options.label_examples]]
            hidden_size = self.model.config.get_text_config().hidden_size
            check_states_fit(prompts, self.policy.schedule.stages, hidden_size, self.processes)
        if self.step < options.steps and _memory_is_fixed(self.model.device):
            try_longest(
                self.model, self.policy, self.train, self.lengths, options.weights,
                seed=options.seed, processes=self.processes,
            )  # fmt: skip
        if stepping is None:
            self._fit_labels(found, label_epochs)
            self._evaluate()
            progress.save(STEPS, self.step, self.optimizer, self.rates)
        self._take_steps()
        progress.end()
        return self._settle()

    def _take_steps(self) -> None:
        """The optimizer steps that are left."""
        options, progress = self.options, self.progress
        gradients = flat_gradients(self.scorer)
        with tqdm(
            initial=self.step, total=options.steps, desc="training", unit="step", disable=not self.processes.main
        ) as bar:
            while self.step < options.steps and not self._out_of_patience():
                losses = batch_gradient(
                    gradients, self.model, self.policy, self.train, self.tokens, options.weights,
                    step=self.step, batch_size=options.batch_size, seed=options.seed, processes=self.processes,
                )  # fmt: skip
                norm = torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), GRADIENT_CLIP)
                rate = float(self.rates.get_last_lr()[0])
                self.optimizer.step()
                self.rates.step()
                self.step += 1
                progress.report({**losses, "gradient_norm": float(norm), "learning_rate": rate}, self.step, "train")
                bar.update()
                bar.set_postfix(loss=f"{losses['loss']:.3f}")
                if self.step % options.evaluate_every == 0 or self.step == options.steps:
                    self._evaluate()
                if self.step % options.checkpoint_every == 0 or self.step == options.steps or self._out_of_patience():
                    progress.save(STEPS, self.step, self.optimizer, self.rates)

    def _settle(self) -> dict[str, float]:
        """Leave the scorer that is kept; its held-out metrics."""
        options, progress = self.options, self.progress
        evaluations = {step: metrics for metrics, step, split in progress.history if split == "heldout"}
        kept, _ = best_evaluation(progress.history)
        if kept is None:
            return {}
        if not options.patience:
            return evaluations[max(evaluations)]
        logger.info("keeping the scorer of step %d, the best of %d evaluations", kept, len(evaluations))
        if self.step < options.steps:
            logger.warning(
                "stopped after step %d of %d: %d evaluations without a lower held-out kl (training.patience); 0 takes "
                "all steps and keeps the last",
                self.step,
                options.steps,
                options.patience,
            )
        self.scorer.load_state_dict(progress.best)
        return evaluations[kept]

    def _evaluate(self) -> None:
        if self.heldout is None:
            return
        self.progress.report(self.heldout.evaluate(self.policy), self.step, "heldout")
        if self.options.patience:
            self.progress.keep_if_best(self.step)

    def _out_of_patience(self) -> bool:
        return 0 < self.options.patience <= best_evaluation(self.progress.history)[1]

    def _label_epochs(self, found: Found | None) -> range:
        """Numbers of the label epochs left after what was found; none where no loss with a weight uses labels."""
        options = self.options
        if not (options.weights.mse or options.weights.rank):
            return range(0)
        done = 0
        if found is not None:
            done = found[1]["step"] if found[1]["part"] == LABELS else options.label_epochs
        return range(done + 1, options.label_epochs + 1)

    def _fit_labels(self, found: Found | None, epochs: range) -> None:
        """These label epochs, from what was found after the one before them."""
        if found is None and not epochs:
            return
        options, weights = self.options, self.options.weights
        count = min(len(self.train), options.label_examples)
        optimizer, rates = adamw(self.scorer, options.learning_rate, options.label_epochs * count)
        if found is not None:
            self.progress.go_on(found, optimizer, rates)
        if not epochs:  # the last was found done: the steps go on from its scorer
            return
        if self.processes.main and count < len(self.train):
            logger.info(
                "the passes over labels learn from the first %d of %d training examples (training.label_examples)",
                count,
                len(self.train),
            )
        chosen = [self.train[index] for index in range(count)]
        states = stored_states(self.model, chosen, self.policy.schedule.layers, self.processes, self.lockstep)
        saved, cost = time.monotonic(), 0.0

        def ended(loss: float, epoch: int) -> None:
            nonlocal saved, cost
            self.progress.report({"loss": loss}, epoch, "labels")
            began = time.monotonic()
            # Where checkpoints are decides what a kill costs, and no result.
            if self.processes.from_main(epoch == options.label_epochs or cost <= _SAVING * (began - saved)):
                self.progress.save(LABELS, epoch, optimizer, rates)
                saved = time.monotonic()
                cost = saved - began

        fit_labels(
            self.scorer,
            optimizer,
            rates,
            states,
            chosen,
            epochs=epochs,
            mse=weights.mse,
            rank=weights.rank,
            seed=options.seed,
            log=ended,
            processes=self.processes,
        )


def _memory_is_fixed(device: torch.device) -> bool:
    # The CPU's is paged and shared: a pass that fits now may not later, and costs more of the time.
    return device.type != "cpu"


def _fingerprint(options: Options, schedule: PruningSchedule, scorer: Learned, inputs: str) -> str:
    # How often to evaluate changes the history's rows, hence counts as well. How often to checkpoint, how many
    # processes take part and what is recomputed does not: who runs out of memory goes on with more, or recomputing.
    decides = dataclasses.asdict(options)
    del decides["checkpoint_every"], decides["gradient_checkpointing"]
    described = {
        "options": decides,
        "schedule": schedule.to_dict(),
        "scorer": learned_settings(scorer),
        "inputs": inputs,
        "libraries": _LIBRARIES,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
