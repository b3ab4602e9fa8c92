"""A small made-up run: well-formed inputs of figures and report, with numbers that are easy to check by hand."""

from itertools import product
from math import nan
from typing import Any

import numpy as np
import pandas as pd

from sdtp.pipeline.figures import FIGURES
from sdtp.pipeline.report import Run
from sdtp.pipeline.results import pairs_of

LAYERS = (4, 7, 10)
RATIOS = (0.9, 0.8, 0.7)
LENGTHS = (512, 1024, 2048)
METHODS = ("sdtp", "random", "recent", "lastquery")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


def latency() -> pd.DataFrame:
    rows = []
    for length in LENGTHS:
        full = length / 600 * (1 + length / 8192)
        rows.append(_latency_row("unpruned", 1.0, length, full, 1.0, 15))
        for ratio in RATIOS:
            speedup = (1 + 5.2 * (1 - ratio)) * (1 + length / 40960)
            rows.append(_latency_row("sdtp", ratio, length, full / speedup, speedup, 5))
    return pd.DataFrame(rows)


def _latency_row(
    method: str, ratio: float, length: int, prefill: float, speedup: float, repeats: int
) -> dict[str, Any]:
    return {
        "method": method,
        "keep_ratio": ratio,
        "prompt_tokens": length,
        "new_tokens": 16,
        "prefill_s": prefill,
        "prefill_q25": prefill * 0.98,
        "prefill_q75": prefill * 1.03,
        "decode_s": 0.72,
        "end_to_end_s": prefill + 0.72,
        "repeats": repeats,
        "prefill_tflop": length * 2.7e-4 / speedup,
        "flop_bound": speedup * 1.05,
        "length_bound": speedup / 0.97 if method == "sdtp" else 1.0,
        "prefill_speedup": speedup,
        "speedup_q25": speedup * 0.98,
        "efficiency": 0.97 if method == "sdtp" else 1.0,
        "flop_efficiency": 1 / 1.05,
        "peak_memory_bytes": 1.2e9 - (0.1e9 if method == "sdtp" else 0),
        "kv_cache_bytes": int(length * 46080 / speedup),
        # These and the last are not the ratios of the medians above: other jobs' unpruned passes are in those.
        "decode_speedup": 1.25 if method == "sdtp" else 1.0,
        "end_to_end_speedup": 0.9 * speedup if method == "sdtp" else 1.0,
        "kept_tokens": round(length * ratio**3),
        "cold_prefill_s": 2 * prefill,
        "scoring_tflop": length * 1e-6 if method == "sdtp" else 0.0,
        "overhead_s": 0.03 * prefill if method == "sdtp" else 0.0,
        "scoring_s": 0.01 * prefill if method == "sdtp" else 0.0,
        "peak_memory_ratio": 0.9 if method == "sdtp" else 1.0,
    }


def quality(n: int = 28) -> pd.DataFrame:
    """Unpruned: accuracy 0.75, retrieval loss 1.1, continuation loss 3.1; SDTP 0.9 keeps the first exactly."""
    unpruned = {("retrieval", "accuracy"): 0.75, ("retrieval", "loss"): 1.1, ("continuation", "loss"): 3.1}
    unpruned |= {("continuation", "kl"): 0.0, ("continuation", "top1"): 1.0}
    harm = {"sdtp": 1.0, "random": 6.0, "recent": 2.5, "lastquery": 4.0}
    rows = []
    for (task, metric), base in unpruned.items():
        rows.append((task, metric, "unpruned", 1.0, base, base - 0.1, base + 0.1, n, 1.0))
        for method, ratio in product(METHODS, RATIOS):
            change = harm[method] * (0.9 - ratio + (0 if method == "sdtp" else 0.1))
            value = max(0.0, base - change) if metric in ("accuracy", "top1") else base + change
            retained = value / base if base else nan
            rows.append((task, metric, method, ratio, value, max(0.0, value - 0.08), value + 0.08, n, retained))
    names = ["task", "metric", "method", "keep_ratio", "value", "ci_low", "ci_high", "n", "retained"]
    return pd.DataFrame(rows, columns=names)


def comparisons(quality: pd.DataFrame) -> pd.DataFrame:
    """Differences of the values of `quality`, each with an interval of 0.04 to both sides."""
    keys = ["task", "metric", "method", "keep_ratio"]
    values = quality.set_index(keys)["value"].to_dict()
    counts = quality.set_index(keys)["n"].to_dict()
    rows = []
    for task, metric, method, other, ratio in pairs_of(quality[keys].itertuples(index=False, name=None)):
        mean = values[task, metric, method, ratio] - values[task, metric, other, 1.0 if other == "unpruned" else ratio]
        n = counts[task, metric, method, ratio]
        rows.append((task, metric, method, other, ratio, mean, mean - 0.04, mean + 0.04, 0.02, n, 0.06))
    names = ["task", "metric", "method", "other", "keep_ratio", "mean", "ci_low", "ci_high", "p_value", "n", "p_holm"]
    return pd.DataFrame(rows, columns=names)


def history() -> pd.DataFrame:
    rows = []
    for metric, start, end in (("loss", 4.0, 1.5), ("ce", 2.0, 1.0), ("mse", 1.0, 0.4), ("rank", 0.7, 0.3)):
        for step in range(0, 61, 2):
            rows.append((step, "train", metric, end + (start - end) * np.exp(-step / 15) + 0.05 * np.sin(step)))
    for metric, start, end in (("loss", 4.1, 1.8), ("kendall_tau", 0.0, 0.55), ("top_k_overlap", 0.3, 0.7)):
        for step in range(0, 61, 10):
            rows.append((step, "heldout", metric, end + (start - end) * np.exp(-step / 15)))
    return pd.DataFrame(rows, columns=["step", "split", "metric", "value"])


def saliency(count: int = 6, tokens: int = 400) -> list[np.ndarray]:
    """Log-normal saliency with a salient stretch: a few tokens carry most of it, later layers more so."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(count):
        spread = np.array([1.2, 1.8, 2.4])[:, None]
        score = np.exp(rng.normal(size=(len(LAYERS), tokens)) * spread).astype(np.float32)
        score[:, tokens // 2 : tokens // 2 + 6] *= 300
        scores.append(score)
    return scores


WORDS = [
    "The",
    "state",
    "of",
    "the",
    "union",
    "is",
    "strong",
    ",",
    "and",
    "the",
    "code",
    "of",
    "Harbour",
    "is",
    "4711",
    ".",
    "\n",
]


def tokens(count: int = 120) -> list[str]:
    return [f" {WORDS[index % len(WORDS)]}" for index in range(count)]


def generations(count: int = 120) -> list[dict[str, Any]]:
    """Two examples at each ratio; each stage drops every k-th token that is left, the last 16 tokens always stay."""
    rows = []
    for ratio, (task, identifier) in product(RATIOS, (("retrieval", "r-0"), ("continuation", "c-0"))):
        kept, present = [], list(range(count))
        for _ in LAYERS:
            keep = round(len(present) * ratio)
            step = np.linspace(0, len(present) - 17, keep - 16).round().astype(int)
            present = sorted({present[index] for index in step} | set(range(count - 16, count)))
            kept.append(present)
        rows.append(
            {
                "id": identifier,
                "task": task,
                "keep_ratio": ratio,
                "prompt_tokens": count,
                "kept": kept,
                "scores": scores(kept, count),
                "pruned_text": f"The code is 4711, kept at {ratio}.",
                "unpruned_text": "The code is 4711.",
                "reference": "4711",
            }
        )
    return rows


def scores(kept: list[list[int]], count: int) -> list[list[float]]:
    """A score for each token that entered a stage, in their order: a hundred times the stage, and its position."""
    entered = [range(count), *kept[:-1]]
    return [[100 * stage + position for position in entering] for stage, entering in enumerate(entered)]


def data() -> dict[str, Any]:
    """A manifest: training made of records, testing of a corpus."""
    return {
        "seed": 0,
        "splits": {
            "train": {
                "rows": {"n_total": 1503, "n_skipped": 3, "n_left": 1452, "n_used": 48},
                "skipped": {"empty_response": 2, "not_utf8": 1},
                "prompts_cut": 7,
            },
            "test": {"rows": {"n_total": 56, "n_skipped": 0, "n_left": 0, "n_used": 56}},
        },
        "content_sha256": "ab" * 32,
    }


def run(n: int = 28, **changes: Any) -> Run:
    """A whole run; `changes` replace its fields. Comparisons follow from the quality where they are not replaced."""
    table = changes.get("quality", quality(n))
    fields: dict[str, Any] = {
        "settings": {"run": "synthetic", "seed": 0, "pruning": {"keep_ratios": list(RATIOS)}},
        "model": {"source": {"kind": "package", "ref": "some-model/weights.gguf"}, "parameters": 134515008},
        "data": data(),
        "layers": LAYERS,
        "tests": {"retrieval": [500] * n, "continuation": [480] * n},
        "latency": latency(),
        "quality": table,
        "comparisons": comparisons(table),
        "history": history(),
        "generations": generations(),
        "shown": "r-0",
        "tokens": tokens(),
        "figures": dict.fromkeys(FIGURES, SVG),
        "timed_on": "cpu, float32, sdpa attention, torch 2.13.0",
        "warmup": 2,
        "reduction": "abs",
        "versions": {"machine": "Linux x86_64, 2 CPUs", "python": "3.12.0"},
    }
    return Run(**{**fields, **changes})
