"""What each process of a sharded training holds: measured on this CPU against the formula of docs/training.md.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/sharded_memory.py

Models are the Llamas of benchmarks/memory.py, in float32, read and sharded as the train step does it (FSDP2 over gloo).
`weights` is how far the resident memory of a process has grown when the model is loaded and sharded, the formula's
without the gathered layers; `step` how far beyond what it held before the model was there it grows in one step of one
example, forward and backward: weights, two gathered layers, scorers, activations. Of the processes the one that holds
most counts; the main one, which reads the files, has handed back what it read.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import tempfile
from pathlib import Path

import memory
import torch
import transformers
from transformers import LlamaForCausalLM

from sdtp.pipeline.steps.train import load_for
from sdtp.pruning.scorers import Learned
from sdtp.training.backbone import shard
from sdtp.training.processes import Processes

COLUMNS = (
    "processes", "layers", "hidden", "tokens", "recomputing",
    "weights, MB", "formula", "ratio", "step, MB", "formula", "ratio", "whole model, MB",
)  # fmt: skip


def write_model(shape: memory.Costs, folder: Path) -> None:
    """A Llama of this shape with random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(memory.llama(shape)).save_pretrained(folder)
    (folder / "manifest.json").write_text(json.dumps({"trust_remote_code": False}), "utf-8")


def measure(shapes: list[memory.Costs], processes: Processes) -> list[list[str]]:
    """Rows of the table, for shapes that differ in tokens and recomputing alone."""
    first = shapes[0]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(processes.from_main(made))
        if processes.main:
            write_model(first, folder)
        gc.collect()  # of the shape before
        torch.distributed.barrier()
        start = memory.resident()
        model = load_for(processes, folder, "float32", "sdpa", sharded=True)
        shard(model, processes)
        loaded = processes.largest(memory.resident() - start)
    whole = sum(weight.nbytes for weight in model.parameters())
    kept, gathered = memory.sharded_weights(whole, 2 * 4 * first.V * first.h, first.L, processes.count)
    rows = []
    for shape in shapes:
        scorer = Learned(shape.h, shape.S, shape.w)
        with memory.training_step(model, scorer, memory.make_schedule(shape.L), shape) as loss:
            torch.distributed.barrier()
            _, peak = memory.backward(loss)
        step = processes.largest(peak - start)
        weights = sum(weight.numel() for weight in scorer.parameters())
        expected = kept + gathered + 16 * weights + shape.peak()
        row = [f"{processes.count}", f"{shape.L}", f"{shape.h}", f"{shape.N}", "yes" if shape.recompute else "no"]
        for found, formula in ((loaded, kept), (step, expected)):
            row += [f"{found / 1e6:.0f}", f"{formula / 1e6:.0f}", f"{found / formula:.2f}"]
        rows.append([*row, f"{whole / 1e6:.0f}"])
    return rows


def main() -> None:
    """Measure and, in the main process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[6, 12], help="decoder layers (default: 6 12)")
    add("--hidden", type=int, nargs="+", default=[512, 1024], help="hidden sizes (default: 512 1024)")
    add("--tokens", type=int, nargs="+", default=[128, 1024], help="prompt tokens (default: 128 1024)")
    args = parser.parse_args()
    processes = Processes(cpu=True)
    if processes.count < 2:
        parser.error("one process has nothing to share: start several with torchrun")
    measure([memory.costs("llama", 4, 64, 64, False)], processes)  # what a process gets once is not the model's
    if processes.main:
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for layers, hidden in itertools.product(args.layers, args.hidden):
        passes = itertools.product(args.tokens, (False, True))
        for row in measure([memory.costs("llama", layers, hidden, *one) for one in passes], processes):
            if processes.main:
                print("| " + " | ".join(row) + " |", flush=True)
    if processes.main:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        print(f"\n{versions}, Python {platform.python_version()}, {torch.get_num_threads()} threads a process")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
