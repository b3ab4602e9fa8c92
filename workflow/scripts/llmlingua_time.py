"""Times LLMLingua-2 on the prompts that methods are timed on; what it leaves of them is timed by `sdtp time-shortened`.

In the environment of llmlingua_compress.py; imports nothing of this project.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from typing import Any

from llmlingua_compress import Compressor, Counting, arguments, check_weights, load, read, shortened, write


def main() -> None:
    """Time LLMLingua-2 on the prompts that the command line names."""
    parser = arguments(str(__doc__))
    parser.add_argument("--keep-ratio", required=True, type=float, help="of the budgets, for the file")
    parser.add_argument("--repeats", required=True, type=int, help="timed rounds")
    parser.add_argument("--warmup", required=True, type=int, help="rounds before them, at least one")
    args = parser.parse_args()
    check_weights(args.weights)
    compressor, tokenizer = load(args.weights, args.model)
    rows = [timed(example, compressor, tokenizer, args.warmup, args.repeats) for example in read(args.examples)]
    result = {
        "weights": args.weights,
        "keep_ratio": args.keep_ratio,
        "device": device_name(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "llmlingua")},
        "warmup": args.warmup,
        "rows": rows,
    }
    write(args.output, json.dumps(result, indent=1, allow_nan=False) + "\n")


def timed(
    example: dict[str, Any], compressor: Compressor, tokenizer: Counting, warmup: int, repeats: int
) -> dict[str, Any]:
    """What shortening one prompt takes, and what is left of it.

    Args:
        example: a row of `sdtp budgets --timed`: all of its prompt is text that may be shortened.
        compressor, tokenizer: see `shortened`.
        warmup, repeats: how often it is shortened before and while the clock counts.

    Returns:
        `prompt_ids` and `shortened_ids`, and `shortening_s`, a number a repeat. Reading the ids as text and the shorter
        text as ids again is in it, of which a server does the second anyway.
    """
    from tqdm.auto import tqdm

    ids = example["prompt_ids"]
    seconds = []
    for _ in tqdm(range(warmup + repeats), desc=f"shortening {len(ids)} tokens", unit="round", mininterval=10):
        # Text comes out, so that no work is queued on a GPU when the clock is read.
        start = time.perf_counter()
        made = shortened({**example, "context": [0, len(ids)]}, compressor, tokenizer)
        seconds.append(time.perf_counter() - start)
    return {"prompt_ids": ids, "shortened_ids": made["prompt_ids"], "shortening_s": seconds[warmup:]}


def device_name() -> str:
    """What the numbers were measured on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
