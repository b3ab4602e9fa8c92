"""What pruning saves and costs on one device: a model of a named shape with random weights, no network, one command.

    python benchmarks/gpu.py --config qwen2-7b --out results.json --markdown results.md

Times, bounds and memory are those of the workflow's latency.csv, measured by the same functions; beside them stand the
device's own ceilings, and three checks. docs/benchmarking.md says what each column means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_checks import check_cache, check_peak_memory, check_synchronisations, checked
from gpu_measure import (
    SEED,
    WARMUP,
    Bench,
    Budget,
    Measured,
    ceilings,
    decode_weight_bytes,
    release,
    run_lengths,
    work_of,
)
from gpu_page import markdown
from gpu_rows import plain, rows_of
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import sdtp
from sdtp.pipeline.devices import choose_device
from sdtp.pipeline.files import write_atomically
from sdtp.pipeline.timings import device_name
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# fmt: off
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2-7b": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, rope_parameters=_rope(1e6), tie_word_embeddings=False,
    ),
    "qwen2.5-1.5b-like": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=131072, rope_parameters=_rope(1e6), tie_word_embeddings=True,
    ),
    "llama-3-8b-like": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rope_parameters=_rope(5e5), tie_word_embeddings=False,
    ),
    "mistral-7b-like": lambda: MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rope_parameters=_rope(1e6), sliding_window=None,
        tie_word_embeddings=False,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=131072, rope_parameters=_rope(1e5), tie_word_embeddings=True,
    ),
    "tiny": lambda: LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=131072, rope_parameters=_rope(1e4), tie_word_embeddings=False,
    ),
}
# fmt: on


def build_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal LM of `CONFIGS` with random weights, made on the device.

    Raises:
        torch.OutOfMemoryError: its weights do not fit.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def build_pruners(config: PreTrainedConfig, ratios: Sequence[float], device: torch.device) -> dict[float, TokenPruner]:
    """A pruner per keep ratio, largest first: stages before layers 4, 7, ... and a scorer with random float32 weights.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    pruners = {}
    for ratio in sorted(ratios, reverse=True):
        schedule = PruningSchedule.geometric(config.num_hidden_layers, start=4, step=3, ratio=ratio)
        with torch.device(device):
            scorer = Learned(config.hidden_size, schedule.stages).eval().requires_grad_(False)
        pruners[ratio] = TokenPruner(schedule, scorer)
    return pruners


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    cuda = device.type == "cuda"
    return {
        "card": device_name(device),
        "card_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "sdtp": sdtp.__version__,
        },
    }


def output_of(*command: str) -> str | None:
    """The first line a program prints; None where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return next(iter(process.stdout.splitlines()), "") if process.returncode == 0 else None


def commit() -> str | None:
    """The revision of this checkout; None outside one."""
    revision = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{revision} with changes" if revision and changed else revision


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [2**n for n in range(12, 18)]
    add = parser.add_argument
    add("--config", choices=list(CONFIGS), default="qwen2-7b", help="shape of the model (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="(default: %(default)s)")
    add("--lengths", type=positive, nargs="+", default=lengths, help="prompt tokens, in turn (default: 4096...131072)")
    add("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="kept by each stage (default: 0.9 0.8 0.7)")
    add("--new-tokens", type=positive, default=128, help="tokens each pass generates (default: %(default)s)")
    add("--repeats", type=positive, default=5, help="timed rounds (default: %(default)s)")
    add("--budget", type=float, default=450, help="seconds; what would take longer is left out (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="JSON", help="results to write, anew after each length")
    add("--markdown", type=Path, metavar="FILE", help="the same as a page for docs/measurements/")
    return parser


def main() -> int:
    """Run the benchmark; 1 if a check failed."""
    parser = arguments()
    args = parser.parse_args()
    device = choose_device()
    budget = Budget(args.budget)
    budget.expect(args.budget, "building the model: ")
    try:
        model = build_model(args.config, getattr(torch, args.dtype), device)
        pruners = build_pruners(model.config, args.ratios, device)
        budget.expect(budget.left, "ceilings and checks: ")
        ceiling = ceilings(model, min(8192, max(args.lengths)), args.repeats)
    except torch.OutOfMemoryError:
        parser.exit(1, f"{args.config} in {args.dtype} does not fit into the memory of {device_name(device)}\n")
    except ValueError as error:
        parser.error(str(error))
    release(device)
    sync_checks = [checked("host-device synchronisations", None, "needs CUDA")]
    if device.type == "cuda":
        sync_checks = check_synchronisations(model, next(iter(pruners.values())), min(1024, max(args.lengths)))
        release(device)
    lengths = list(dict.fromkeys(args.lengths))
    arms: list[tuple[float | None, TokenPruner | None]] = [(None, None), *pruners.items()]
    bench = Bench(
        model,
        pruners,
        {(tokens, ratio): work_of(model, tokens, pruner) for tokens in lengths for ratio, pruner in arms},
        args.new_tokens,
        args.repeats,
        budget,
        ceiling["matmul_tflop_per_s"] * 1e12,
        ceiling["copy_gb_per_s"] * 1e9,
        decode_weight_bytes(model),
    )
    result = {
        **machine(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "config": args.config,
        "parameters": model.num_parameters(),
        "dtype": args.dtype,
        "attention": model.config._attn_implementation,
        "schedules": [pruner.schedule.to_dict() for pruner in pruners.values()],
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "warmup": WARMUP,
        "budget_s": args.budget,
        "ceilings": ceiling,
    }

    def write(measured: list[Measured], left_out: list[dict[str, Any]]) -> None:
        rows = [row for one in measured for row in rows_of(bench, one)]
        peaks = [checked("peak memory falls with the schedule", None, "needs CUDA")]
        if device.type == "cuda":
            peaks = check_peak_memory(rows)
        result.update(elapsed_s=budget.gone, rows=rows, left_out=left_out)
        result["checks"] = [*sync_checks, *peaks, check_cache(bench, rows)]
        contents = plain(result)
        for path, text in ((args.out, json.dumps(contents, indent=1) + "\n"), (args.markdown, markdown(contents))):
            if path is not None:
                with write_atomically(path) as temporary:
                    temporary.write_text(text, "utf-8")

    run_lengths(bench, lengths, write)
    budget.bar.close()
    for row in result["left_out"]:
        print(f"left out: {row['prompt_tokens']} tokens, {row['keep_ratio']}: {row['reason']}")
    for check in result["checks"]:
        print(f"{check['result']}: {check['check']} ({check['detail']})")
    return int(any(check["result"] == "failed" for check in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
