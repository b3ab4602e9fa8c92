"""Measures one model under its pruners at several prompt lengths, inside a budget of time and of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from sdtp.evaluation import latency
from sdtp.evaluation.latency import Samples, Stopwatch, Timing
from sdtp.pipeline.timings import memory
from sdtp.pruning import flops
from sdtp.pruning.adapter import decoder_layers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.scorers import Learned

SEED = 0  # of weights and prompts
WARMUP = 1  # rounds


class ArmOutOfMemoryError(Exception):
    """The device's memory did not suffice for one arm."""

    def __init__(self, arm: str) -> None:
        super().__init__(arm)
        self.arm = arm


class OutOfTimeError(Exception):
    """The budget ended between two passes."""


class Budget:
    """The seconds a run may take, and a progress bar of them: its total is what the run is predicted to take.

    Args:
        seconds: from now on.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.clock = clock
        self.started = clock()
        form = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
        # Its unit is the second, so that its rate is one, and what remains is the total less the time gone.
        self.total = seconds
        self.bar = tqdm(total=seconds, bar_format=form, smoothing=0, mininterval=1)

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds until the budget ends; negative after that."""
        return self.seconds - self.gone

    def expect(self, seconds: float, doing: str) -> None:
        """Say what is done now, and how long all that is planned will take from here."""
        self.total = self.bar.total = self.gone + seconds
        self.bar.set_description(doing, refresh=False)
        self.bar.n = self.gone
        self.bar.refresh()

    def tick(self) -> None:
        """Move the bar on; called between passes."""
        self.bar.update(max(0.0, min(self.gone, self.total) - self.bar.n))


@dataclasses.dataclass(frozen=True)
class Work:
    """What one arm has to do for one prompt, by arithmetic.

    Attributes:
        prefill_flop: operations of the prefill, scoring included.
        scoring_flop: those of the scorer.
        kv_cache_bytes: keys and values held after it.
        kept_tokens: prompt tokens that are left after the last stage.
    """

    prefill_flop: float
    scoring_flop: float
    kv_cache_bytes: int
    kept_tokens: int


@dataclasses.dataclass(frozen=True)
class Bench:
    """One model, the pruners it is timed under, and how.

    Attributes:
        model: eval mode, unhooked.
        pruners: by keep ratio, each with a learned scorer.
        work: by prompt tokens and keep ratio, None for the unpruned model.
        new_tokens: tokens a pass generates, >= 1.
        repeats: timed rounds, >= 1.
        budget: ends the run.
        matmul_flop_per_s, copy_byte_per_s: the device's ceilings.
        weight_bytes: what a decode step reads of the weights.
    """

    model: PreTrainedModel
    pruners: Mapping[float, TokenPruner]
    work: Mapping[tuple[int, float | None], Work]
    new_tokens: int
    repeats: int
    budget: Budget
    matmul_flop_per_s: float
    copy_byte_per_s: float
    weight_bytes: int


def scorer_of(pruner: TokenPruner) -> Learned:
    """The scorer that `build_pruners` gave a pruner."""
    return cast(Learned, pruner.scorer)


def work_of(model: PreTrainedModel, tokens: int, pruner: TokenPruner | None) -> Work:
    """What a prompt of so many tokens takes, pruned or not."""
    config, size = model.config, model.dtype.itemsize
    if pruner is None:
        return Work(flops.prefill(config, tokens), 0.0, flops.cache_bytes(config, tokens, None, size), tokens)
    schedule, scorer = pruner.schedule, scorer_of(pruner)
    return Work(
        flops.prefill(config, tokens, schedule, scorer),
        flops.scoring(tokens, schedule, scorer),
        flops.cache_bytes(config, tokens, schedule, size),
        schedule.surviving(tokens)[-1],
    )


def decode_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads: all but an embedding table that is not the head too."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.numel() * p.itemsize for p in model.parameters() if p is not table or p is head)


def random_prompt(config: PreTrainedConfig, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """LongTensor [rows, tokens], the same every time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (rows, tokens), generator=generator).to(device)


def seconds_of(work: Callable[[], Any], watch: Stopwatch) -> Timing:
    """The time of any work on the device, in the form that `latency.interleave` collects."""
    with torch.inference_mode():
        start = watch.read()
        work()
        seconds = watch.read() - start
    return Timing(seconds, seconds, new_tokens=1)


def median_prefill(samples: Samples) -> float:
    """Seconds."""
    return statistics.median(timing.prefill_s for timing in samples.warm)


def ceilings(
    model: PreTrainedModel, tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """What torch reaches on this device: the products of one decoder layer, and a copy within its memory.

    Args:
        model: gives the shapes and the dtype.
        tokens: rows of the products.
        repeats: timed rounds; medians are reported.
        clock: seconds, monotonic.

    Returns:
        `matmul_tflop_per_s` and the shapes it was measured at, `copy_gb_per_s` (bytes read plus bytes written) and the
        bytes copied.
    """
    device = model.device
    watch = Stopwatch(device, clock)
    weights = [m.weight for m in decoder_layers(model)[0].modules() if isinstance(m, nn.Linear)]
    inputs = torch.randn(tokens, max(w.shape[1] for w in weights), device=device, dtype=model.dtype)
    size = min(2**30, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    rounds = 5  # of the work between two readings of the clock, so that launching it is hidden

    def products() -> None:
        for weight in weights * rounds:
            nn.functional.linear(inputs[:, : weight.shape[1]], weight)

    def copies() -> None:
        for _ in range(rounds):
            target.copy_(source)

    passes = {"matmul": lambda: seconds_of(products, watch), "copy": lambda: seconds_of(copies, watch)}
    samples = latency.interleave(passes, repeats, WARMUP)
    flop = 2 * tokens * sum(weight.numel() for weight in weights)
    return {
        "matmul_tflop_per_s": rounds * flop / median_prefill(samples["matmul"]) / 1e12,
        "matmul_tokens": tokens,
        "matmul_shapes": [list(weight.shape) for weight in weights],
        "copy_gb_per_s": rounds * 2 * size / median_prefill(samples["copy"]) / 1e9,
        "copy_bytes": size,
    }


def arms_of(ratios: Sequence[float]) -> dict[str, float | None]:
    """The arms of a length, and the keep ratio of each: the unpruned model once, and three for each ratio.

    `sdtp` and `ideal` are those of `latency.arms`; `scoring` runs the scorer alone.
    """
    return {"unpruned": None} | {f"{arm}/{ratio}": ratio for ratio in ratios for arm in ("sdtp", "ideal", "scoring")}


def passes_of(bench: Bench, tokens: int, ratios: Sequence[float]) -> dict[str, Callable[[], Timing]]:
    """One pass of each arm of `arms_of`, all on the same prompt."""
    watch = Stopwatch(bench.model.device)
    prompt = random_prompt(bench.model.config, 1, tokens, watch.device)
    passes: dict[str, Callable[[], Timing]] = {}
    for ratio in ratios:
        pruner = bench.pruners[ratio]
        arms = latency.arms(bench.model, pruner, prompt, bench.new_tokens, watch)
        scoring = latency.scoring_arm(bench.model, pruner, tokens, watch)
        passes |= {"unpruned": arms["unpruned"], f"sdtp/{ratio}": arms["sdtp"]}
        passes |= {f"ideal/{ratio}": arms["ideal"], f"scoring/{ratio}": scoring}
    return passes


@dataclasses.dataclass
class Measured:
    """One length.

    Attributes:
        tokens: prompt tokens.
        ratios: keep ratios that were run.
        samples: times of each arm that ran.
        held: memory of the arms `unpruned` and `sdtp`, as `memory` gives it.
        tried: arms that ran or ran out of memory.
    """

    tokens: int
    ratios: list[float]
    samples: dict[str, Samples]
    held: dict[str, dict[str, int | None]]
    tried: list[str]


def measure(bench: Bench, tokens: int, ratios: Sequence[float], without: Sequence[str] = ()) -> Measured:
    """Time the arms of one length, interleaved. An arm that runs out of memory is dropped, and the others start over.

    Args:
        bench: what is timed.
        tokens: prompt tokens.
        ratios: keep ratios.
        without: arms that are not tried.

    Raises:
        OutOfTimeError: the budget ended first.
    """
    passes = {name: run for name, run in passes_of(bench, tokens, ratios).items() if name not in without}
    result = Measured(tokens, list(ratios), {}, {}, list(passes))

    @contextlib.contextmanager
    def first_pass(arm: str) -> Iterator[None]:
        if not arm.startswith(("unpruned", "sdtp")):  # the memory of the others says nothing of a model
            yield
            return
        with memory(bench.model) as result.held[arm]:
            yield

    while passes and not result.samples:
        guarded = {name: functools.partial(_guarded, bench.budget, name, run) for name, run in passes.items()}
        failed = None
        try:
            result.samples = latency.interleave(guarded, bench.repeats, WARMUP, first_pass)
        except ArmOutOfMemoryError as error:
            failed = error.arm
        if failed is not None:  # here the error is gone, and with it the frames that held the arm's tensors
            del passes[failed]
            release(bench.model.device)
    return result


def _guarded(budget: Budget, arm: str, run: Callable[[], Timing]) -> Timing:
    budget.tick()
    if budget.left < 0:
        raise OutOfTimeError
    try:
        return run()
    except torch.OutOfMemoryError:
        raise ArmOutOfMemoryError(arm) from None


def release(device: torch.device) -> None:
    """Hand what nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def predicted_seconds(bench: Bench, tokens: int, ratios: Sequence[float], known: Mapping[str, Measured]) -> float:
    """What all rounds of a length will take, by each arm's times at another length.

    Prefill is scaled with its operations, decode with the bytes a step reads: for a longer prompt too much, since some
    of the time is launching kernels. An arm not seen yet counts as if it ran at the device's ceilings: too little.

    Args:
        bench: what is timed.
        tokens: prompt tokens.
        ratios: keep ratios.
        known: the latest length at which an arm was measured, by arm.
    """
    total = 0.0
    for arm, ratio in arms_of(ratios).items():
        work = bench.work[tokens, ratio]
        read = bench.weight_bytes + work.kv_cache_bytes
        if arm in known:
            samples, before = known[arm].samples[arm], bench.work[known[arm].tokens, ratio]
            total += work.prefill_flop / before.prefill_flop * median_prefill(samples)
            decode_s = statistics.median(timing.decode_s or 0.0 for timing in samples.warm)
            total += read / (bench.weight_bytes + before.kv_cache_bytes) * decode_s
        elif arm.startswith("scoring"):
            total += work.scoring_flop / bench.matmul_flop_per_s
        else:
            steps = 0 if arm.startswith("ideal") else bench.new_tokens - 1
            total += work.prefill_flop / bench.matmul_flop_per_s + steps * read / bench.copy_byte_per_s
    return total * (bench.repeats + WARMUP)


def run_lengths(
    bench: Bench, lengths: Sequence[int], after_each: Callable[[list[Measured], list[dict[str, Any]]], None]
) -> None:
    """Measure the lengths in their order, of each as many keep ratios as fit into the budget, largest first.

    Args:
        bench: what is timed.
        lengths: prompt tokens.
        after_each: gets what was measured and what was left out so far: `prompt_tokens`, `keep_ratio`, `reason`.
    """
    measured: list[Measured] = []
    left_out: list[dict[str, Any]] = []
    known: dict[str, Measured] = {}
    exhausted: dict[str, int] = {}  # the shortest prompt for which an arm's memory did not suffice
    for done, tokens in enumerate(lengths):
        reasons: dict[float | None, str] = {}  # why a row of this length is left out, by keep ratio
        without = [arm for arm, limit in exhausted.items() if tokens >= limit]
        for arm, ratio in arms_of(list(bench.pruners)).items():
            if arm in without and arm in ("unpruned", f"sdtp/{ratio}"):
                reasons[ratio] = f"out of memory at {exhausted[arm]} tokens already"
        ratios = [ratio for ratio in bench.pruners if ratio not in reasons]
        while ratios and (needed := predicted_seconds(bench, tokens, ratios, known)) > bench.budget.left:
            reasons[ratios.pop()] = f"time budget: {needed:.0f} s predicted, {max(0, bench.budget.left):.0f} s left"
        result = None
        if ratios:
            ahead = sum(predicted_seconds(bench, length, ratios, known) for length in lengths[done:])
            bench.budget.expect(min(bench.budget.left, ahead), f"{tokens} tokens: ")
            with contextlib.suppress(OutOfTimeError):
                result = measure(bench, tokens, ratios, without)
            release(bench.model.device)
        if result is None:
            for ratio in (None, *ratios):
                reasons.setdefault(ratio, f"time budget of {bench.budget.seconds:.0f} s")
        else:
            measured.append(result)
            known |= dict.fromkeys(result.samples, result)
            for arm in set(result.tried) - set(result.samples):
                exhausted[arm] = min(tokens, exhausted.get(arm, tokens))
        for ratio, reason in sorted(reasons.items(), key=lambda item: -(item[0] or math.inf)):
            left_out.append({"prompt_tokens": tokens, "keep_ratio": ratio or "unpruned", "reason": reason})
        after_each(measured, left_out)
