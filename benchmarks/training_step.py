"""What one training step takes on this device, in memory and time, against the formula of docs/training.md.

    python benchmarks/training_step.py --config qwen2-7b --tokens 1024 4096 16384

A model of a named shape with random weights, stages before every third layer from layer 4 on, scorers of width 512, a
response of 512 tokens, cross-entropy alone; one example a step. Prints a Markdown table. `kept` is what the forward
pass keeps for the backward pass, each storage counted once; `in all` the most that was allocated, weights included;
seconds are those of a forward and backward pass. Without CUDA only `kept` is measured, and benchmarks/memory.py does
the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from gpu import CONFIGS, build_model
from memory import Costs, saved_by, training_step
from transformers import PreTrainedModel

from sdtp.evaluation.memory import peak_memory
from sdtp.pipeline.devices import choose_device
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned

START, STEP, KEEP_RATIO = 4, 3, 0.8
COLUMNS = (
    "prompt tokens", "recomputing", "kept, GB", "formula", "ratio", "in all, GB", "formula", "ratio", "seconds",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """What was measured of a step; times and the peak need CUDA."""

    kept: int  # bytes
    peak: int | None  # bytes
    seconds: tuple[float, ...]


def costs(
    model: PreTrainedModel, schedule: PruningSchedule, width: int, prompt: int, response: int, recompute: bool
) -> Costs:
    """The formula for a model that `scaled_dot_product_attention` serves and whose MLPs are gated."""
    config = model.config
    heads = config.num_attention_heads
    return Costs(
        L=config.num_hidden_layers, first=schedule.layers[0], h=config.hidden_size,
        q=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads), heads=heads,
        f=config.intermediate_size, V=config.vocab_size, S=schedule.stages, w=width, N=prompt, R=response,
        b=model.dtype.itemsize, recompute=recompute,
    )  # fmt: skip


def measure(model: PreTrainedModel, scorer: Learned, schedule: PruningSchedule, shape: Costs, repeats: int) -> Step:
    """A step of one example with random tokens and labels."""
    with training_step(model, scorer, schedule, shape) as loss:
        kept, peak, seconds = saved_by(loss, model, scorer), None, []
        if model.device.type == "cuda":
            with peak_memory(model.device) as most:
                loss().backward()
            peak = most.bytes
            for _ in range(repeats):
                torch.cuda.synchronize()
                start = time.perf_counter()
                loss().backward()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    return Step(kept, peak, tuple(seconds))


def row(shape: Costs, step: Step, resident: int) -> str:
    """One line of the table; `resident` is what weights, gradients and optimizer take."""
    cells = [f"{shape.N}", "yes" if shape.recompute else "no"]
    for found, expected in ((step.kept, shape.saved()), (step.peak, resident + shape.peak())):
        measured = ["", ""] if found is None else [f"{found / 1e9:.4g}", f"{found / expected:.2f}"]
        cells += [measured[0], f"{expected / 1e9:.4g}", measured[1]]
    if step.seconds:
        middle = statistics.median(step.seconds)
        cells.append(f"{middle:.3f} ({min(step.seconds):.3f} to {max(step.seconds):.3f})")
    else:
        cells.append("")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=list(CONFIGS), default="qwen2-7b", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="prompt tokens")
    parser.add_argument("--response", type=int, default=512, help="response tokens (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of the scorers (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    args = parser.parse_args()
    device = choose_device()
    model = build_model(args.config, getattr(torch, args.dtype), device)
    schedule = PruningSchedule.geometric(
        model.config.num_hidden_layers, start=START, step=STEP, ratio=KEEP_RATIO, sinks=4, local=0.1, min_local=16
    )
    scorer = Learned(model.config.hidden_size, schedule.stages, args.width).to(device)
    resident = sum(weight.nbytes for weight in model.parameters()) + 16 * sum(w.numel() for w in scorer.parameters())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for tokens in args.tokens:
        for recompute in (False, True):
            shape = costs(model, schedule, args.width, tokens, args.response, recompute)
            try:
                lines.append(row(shape, measure(model, scorer, schedule, shape, args.repeats), resident))
            except torch.OutOfMemoryError:
                lines.append(f"| {tokens} | {'yes' if recompute else 'no'} | out of memory |" + " |" * 6)
            print(lines[-1], file=sys.stderr)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines += ["", f"{args.config}, {args.dtype}, {schedule.stages} stages, {name}; {versions}"]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
