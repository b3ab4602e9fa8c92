"""What a pruner costs where there is little to gain: short prompts, and steps of decoding.

    python benchmarks/overhead.py results/default/model --out overhead.json

Two tables. Prefill of short prompts tells from which length on pruning pays. Decoding compares a step on a pruned cache
inside a pruner's context with a step of the unpruned model after the same prompt, for one row and for a batch whose
rows differ in length. Arms run in turn; scorers are learned MLPs with random weights, whose cost is the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdtp.evaluation.latency import Context, Samples, Stopwatch, Timing, compare, interleave
from sdtp.pipeline.files import write_atomically
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned

SEED = 0  # of scorers and prompts
ROWS = 4  # of the ragged batch; the shortest has half the tokens of the longest


def decoding_pass(
    model: PreTrainedModel, context: Context, ids: torch.Tensor, mask: torch.Tensor, steps: int, watch: Stopwatch
) -> Timing:
    """Steps of decoding after a prefill that is not timed.

    Args:
        model: a causal LM.
        context: what the pass runs in.
        ids: LongTensor [batch, tokens], padded on the left.
        mask: [batch, tokens], 1 at real tokens.
        steps: >= 1.
        watch: the clock.
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with context(), torch.inference_mode():
        # As `generate` does: no mask where nothing is padding.
        given = mask if mask.min() == 0 else None
        output = model(input_ids=ids, attention_mask=given, position_ids=positions, logits_to_keep=1)
        cache, token, position = output.cache, output.logits[:, -1:].argmax(-1), positions[:, -1:]
        start = watch.read()
        for _ in range(steps):
            position = position + 1
            if given is not None:
                given = torch.cat([given, given.new_ones(len(ids), 1)], dim=1)
            output = model(input_ids=token, attention_mask=given, position_ids=position, cache=cache, logits_to_keep=1)
            token = output.logits[:, -1:].argmax(-1)
        return Timing(0.0, watch.read() - start, steps + 1)


def ratios_of(ours: Samples, other: Samples, value: Callable[[Timing], float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios `other / ours` of a timing's value."""
    paired = [value(b) / value(a) for a, b in zip(ours.warm, other.warm, strict=True)]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def short_prompts(
    model: PreTrainedModel, pruners: dict[float, TokenPruner], lengths: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Prefill speedup by length and keep ratio."""
    rows = []
    for tokens in lengths:
        prompt = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(SEED))
        for ratio, pruner in pruners.items():
            timed = compare(model, pruner, prompt.to(model.device), 1, repeats, warmup=1)
            speedup = ratios_of(timed["sdtp"], timed["unpruned"], lambda timing: timing.prefill_s)
            unpruned_s = statistics.median(timing.prefill_s for timing in timed["unpruned"].warm)
            rows.append({"prompt_tokens": tokens, "ratio": ratio, "unpruned_s": unpruned_s, "speedup": speedup})
            print(f"prefill {tokens} tokens, {ratio}: {speedup['median']:.3f} ({speedup['q25']:.3f})", flush=True)
    return rows


def decoding(
    model: PreTrainedModel, pruners: dict[float, TokenPruner], tokens: int, steps: int, repeats: int
) -> list[dict[str, Any]]:
    """Time of a step on the unpruned cache over that on the pruned one, alone and in a ragged batch."""
    rows = []
    watch = Stopwatch(model.device)
    for name, batch in (("one row", 1), (f"{ROWS} rows, left padding", ROWS)):
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : tokens // 2 * row // (batch - 1)] = 0

        def run(context: Context, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> Callable[[], Timing]:
            return lambda: decoding_pass(model, context, ids, mask, steps, watch)

        passes = {"unpruned": run(contextlib.nullcontext)}
        passes |= {str(ratio): run(lambda pruner=pruner: pruner(model)) for ratio, pruner in pruners.items()}
        timed = interleave(passes, repeats, warmup=1)
        for ratio in pruners:
            # Cost, not speedup: time of a pruned step over that of an unpruned one.
            cost = ratios_of(
                timed["unpruned"], timed[str(ratio)], lambda timing: timing.seconds_per_output_token or 0.0
            )
            unpruned_s = statistics.median(t.seconds_per_output_token or 0.0 for t in timed["unpruned"].warm)
            rows.append({"rows": name, "prompt_tokens": tokens, "ratio": ratio, "unpruned_s": unpruned_s, "cost": cost})
            print(f"decode, {name}, {ratio}: {cost['median']:.3f} ({cost['q75']:.3f})", flush=True)
    return rows


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, help="folder of a causal LM")
    add("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512], help="short prompts (default: 32...512)")
    add("--decode-tokens", type=int, default=1024, help="prompt that decoding continues (default: %(default)s)")
    add("--steps", type=int, default=16, help="decoding steps timed together (default: %(default)s)")
    add("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="kept by each stage (default: 0.9 0.8 0.7)")
    add("--repeats", type=int, default=9, help="timed rounds (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="JSON", help="results to write")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(SEED)
    pruners = {}
    for ratio in args.ratios:
        schedule = PruningSchedule.geometric(model.config.num_hidden_layers, start=4, step=3, ratio=ratio)
        pruners[ratio] = TokenPruner(schedule, Learned(model.config.hidden_size, schedule.stages))
    result = {
        "model": model.config.name_or_path,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "short_prompts": short_prompts(model, pruners, args.lengths, args.repeats),
        "decoding": decoding(model, pruners, args.decode_tokens, args.steps, args.repeats),
    }
    with write_atomically(args.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
