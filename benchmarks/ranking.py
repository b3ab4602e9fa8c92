"""What the pairwise ranking loss costs: time of forward and backward, and memory, against the definition written out.

    OMP_NUM_THREADS=1 python benchmarks/ranking.py

Prints a Markdown table. The naive arm is the loss as one writes it down, N x N matrices and their autograd graph; it is
left out where a smaller size shows that it would not fit into the memory at hand. Arms run in turn in one process, on
the same scores; memory is that of one more pass, above what the process held before it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from sdtp.evaluation.memory import peak_memory
from sdtp.evaluation.stats import paired_ratios, quartiles
from sdtp.training import pairwise_ranking

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SEED = 0
# Room that has to be left: the naive arm is tried only where it takes at most this part of the free memory.
MOST_OF_MEMORY = 0.8
COLUMNS = (
    "tokens",
    "ours, ms",
    "naive, ms",
    "naive / ours",
    "ours, MB",
    "naive, MB",
    "gradients differ by",
)


def naive_ranking(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of `pairwise_ranking` over the whole pair matrix: [n], [n] -> a scalar."""
    above = target[:, None] > target
    return torch.where(above, functional.softplus(scores - scores[:, None]), 0).sum() / above.sum()


def gradient(loss: Loss, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Forward and backward: the gradient [n] of a fresh leaf."""
    leaf = scores.clone().requires_grad_()
    loss(leaf, target).backward()
    assert leaf.grad is not None
    return leaf.grad


def seconds(loss: Loss, scores: torch.Tensor, target: torch.Tensor) -> float:
    """Time of forward and backward."""
    start = time.perf_counter()
    gradient(loss, scores, target)
    return time.perf_counter() - start


def peak_bytes(loss: Loss, scores: torch.Tensor, target: torch.Tensor) -> int:
    """Most memory that forward and backward hold, above what the process holds before them.

    Raises:
        RuntimeError: the system does not tell (only Linux does).
    """
    with peak_memory(scores.device) as before:
        pass
    with peak_memory(scores.device) as peak:
        gradient(loss, scores, target)
    if before.bytes is None or peak.bytes is None:
        raise RuntimeError("peak memory cannot be read here: Linux with /proc/self/clear_refs is needed")
    return max(0, peak.bytes - before.bytes)


def available_bytes() -> int:
    """Memory that can be had without swapping (Linux)."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def measure(tokens: int, repeats: int, naive_bytes: float | None) -> tuple[list[str], float | None]:
    """The table's cells for one size.

    Args:
        tokens: scores and targets that are compared.
        repeats: timed passes of each arm.
        naive_bytes: memory of the naive arm per pair of tokens, from a smaller size; None where none was measured.

    Returns:
        The cells in the order of `COLUMNS`, and the naive arm's bytes per pair, for the next size.
    """
    generator = torch.Generator().manual_seed(SEED)
    scores = 3 * torch.randn(tokens, generator=generator)
    # Heavy-tailed, as saliency is.
    target = (2 * torch.randn(tokens, generator=generator)).exp()
    arms: dict[str, Loss] = {"ours": pairwise_ranking, "naive": naive_ranking}
    refused = ""
    needed, free = (naive_bytes or 0) * tokens**2, available_bytes()
    if needed > MOST_OF_MEMORY * free:
        refused = f"not run: needs {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"
        del arms["naive"]
    gradients = {name: gradient(loss, scores, target) for name, loss in arms.items()}  # the warm-up, too
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, loss in arms.items():
            times[name].append(seconds(loss, scores, target))
    memory = {name: peak_bytes(loss, scores, target) for name, loss in arms.items()}
    ours, memory_of_ours = milliseconds(times["ours"]), f"{memory['ours'] / 1e6:.1f}"
    if refused:
        return [f"{tokens}", ours, refused, "", memory_of_ours, "", ""], naive_bytes
    low, middle, high = paired_ratios(times["naive"], times["ours"])
    difference = (gradients["ours"] - gradients["naive"]).abs().max() / gradients["naive"].abs().max()
    cells = [
        f"{tokens}",
        ours,
        milliseconds(times["naive"]),
        f"{middle:.1f} ({low:.1f}–{high:.1f})",
        memory_of_ours,
        f"{memory['naive'] / 1e6:.1f}",
        f"{difference.item():.0e}",
    ]
    return cells, memory["naive"] / tokens**2


def milliseconds(times: list[float]) -> str:
    """Median (quartiles) of seconds, as milliseconds."""
    low, middle, high = (f"{1000 * value:.{1 if value < 0.1 else 0}f}" for value in quartiles(times))
    return f"{middle} ({low}–{high})"


def processor() -> str:
    """The processor's name (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 32768], help="(default: 512 4096 32768)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each arm (default: %(default)s)")
    args = parser.parse_args()
    print(
        f"{processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s) used; "
        f"Python {platform.python_version()}, torch {torch.__version__}; float32.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    naive_bytes: float | None = None
    for tokens in sorted(args.tokens):
        cells, naive_bytes = measure(tokens, args.repeats, naive_bytes)
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
