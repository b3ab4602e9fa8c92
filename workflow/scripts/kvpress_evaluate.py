"""Measures the quality of a press of NVIDIA's kvpress, teacher-forced, as `sdtp evaluate` does that of its methods.

Runs in an environment of its own, envs/kvpress.lock, and imports nothing of this project: kvpress needs an older
transformers than the project does.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens that each press, by its defaults, keeps unscored: its window or its sinks. A prompt has to be longer.
PRESSES = {"SnapKVPress": 64, "ExpectedAttentionPress": 4, "KnormPress": 0, "StreamingLLMPress": 4}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main() -> None:
    """Evaluate the press that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights; auto: bfloat16 on CUDA")
    parser.add_argument("--attention", default="sdpa", help="attention kernel, as transformers names it")
    parser.add_argument("--examples", required=True, type=Path, metavar="JSONL", help="made by `sdtp budgets`")
    parser.add_argument("--press", required=True, choices=PRESSES, help="what compresses the cache")
    parser.add_argument("--keep-ratio", required=True, type=float, help="of the budgets, for the rows")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples only")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example")
    args = parser.parse_args()
    examples = [json.loads(line) for line in args.examples.read_text("utf-8").splitlines()][: args.limit]
    check_lengths(examples, args.press)
    rows = evaluate(load(args.model, args.dtype, args.attention), examples, args.press)
    identity = {"method": f"kvpress-{args.press}", "keep_ratio": args.keep_ratio, "seed": None}
    written(args.output, "".join(json.dumps({**row, **identity}, allow_nan=False) + "\n" for row in rows))


def check_lengths(examples: list[dict[str, Any]], press: str) -> None:
    """Refuse prompts that a press cannot compress; those that stay whole may have any length.

    Raises:
        SystemExit: naming the first such example.
    """
    least = PRESSES[press] + 1
    for example in examples:
        tokens = len(example["prompt_ids"])
        if example["entries"] < tokens < least:
            raise SystemExit(f"example {example['id']}: its prompt has {tokens} tokens, {press} needs {least} or more")


def load(folder: Path, dtype: str, attention: str) -> PreTrainedModel:
    """The model of `folder` for inference, on the first GPU there is, else on the CPU.

    Raises:
        SystemExit: kvpress does not know this kind of model.
    """
    import torch
    from kvpress import SUPPORTED_MODELS  # type: ignore[import-not-found]  # of the other environment
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of the weights' files: the log has the examples' bar
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=getattr(torch, automatic if dtype == "auto" else dtype),
        attn_implementation=attention,
        use_safetensors=True,
        local_files_only=True,
    )
    if not isinstance(model, SUPPORTED_MODELS):
        known = ", ".join(family.__name__ for family in SUPPORTED_MODELS)
        raise SystemExit(f"{folder} is a {type(model).__name__}: kvpress supports {known}")
    return model.to(device).eval().requires_grad_(False)


def evaluate(model: PreTrainedModel, examples: list[dict[str, Any]], press: str) -> list[dict[str, Any]]:
    """One row an example, in their order: what `sdtp evaluate` writes but for the method's name.

    Args:
        model: eval mode, unhooked.
        examples: rows of `sdtp budgets`.
        press: name of a class of kvpress.
    """
    from tqdm.auto import tqdm

    rows = []
    for example in tqdm(examples, desc=f"evaluating {press}", unit="example", mininterval=10):
        response = example["response_ids"]
        logits = forced_logits(model, example["prompt_ids"], response, press, example["entries"])
        log_probs = logits.float().log_softmax(-1)[range(len(response)), response]
        rows.append(
            {
                "id": example["id"],
                "task": example["task"],
                "prompt_tokens": len(example["prompt_ids"]),
                "kept_tokens": example["entries"],
                "correct": logits.argmax(-1).tolist() == response if example["task"] == "retrieval" else None,
                "loss": -float(log_probs.double().mean()),
                "response_tokens": len(response),
            }
        )
    return rows


def forced_logits(
    model: PreTrainedModel, prompt: list[int], response: list[int], press: str, entries: int
) -> torch.Tensor:
    """Prefill a prompt under a press, then predict each response token from those before it on the compressed cache.

    Args:
        model: eval mode, unhooked.
        prompt: token ids, at least one.
        response: token ids, at least one; their positions follow the whole prompt's.
        press: name of a class of kvpress, whose settings are its defaults.
        entries: what each KV head of each layer keeps of the prompt, 1 to all of it.

    Returns:
        Logits [response, vocabulary] in the model's dtype, on its device.

    Raises:
        RuntimeError: the press left another number of entries in a layer.
    """
    import kvpress
    import torch
    from transformers import DynamicCache

    tokens = len(prompt)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        with getattr(kvpress, press)(compression_ratio=removed_share(tokens, entries))(model):
            ids = torch.tensor([prompt], device=model.device)
            first = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        found = [cache.get_seq_length(layer) for layer in range(len(cache))]
        if set(found) != {entries}:
            raise RuntimeError(f"{press} left {found} entries in the layers, {entries} of {tokens} were asked for")
        if len(response) == 1:
            return first[0]
        fed = torch.tensor([response[:-1]], device=model.device)
        positions = torch.arange(tokens, tokens + fed.shape[1], device=model.device)[None]
        later = model(input_ids=fed, past_key_values=cache, position_ids=positions, use_cache=True).logits
        return torch.cat([first, later], dim=1)[0]


def removed_share(tokens: int, entries: int) -> float:
    """The ratio of kvpress, a fraction removed, that leaves so many entries of a prompt's tokens; at 0 it does nothing.

    kvpress cuts the product of the tokens and the fraction kept to a whole number: half an entry more than wanted makes
    it just that, whatever the rounding.
    """
    return 0.0 if entries == tokens else 1.0 - (entries + 0.5) / tokens


def written(path: Path, text: str) -> None:
    """Writes a file, which is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
