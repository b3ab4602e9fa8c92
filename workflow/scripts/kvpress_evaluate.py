"""Measures the quality of a press of NVIDIA's kvpress, teacher-forced, as `sdtp evaluate` does that of its methods.

Runs in an environment of its own, envs/kvpress.lock, and imports nothing of this project: kvpress needs an older
transformers than the project does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
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
    parser.add_argument("--reference", required=True, type=Path, metavar="FILE", help="made by `sdtp reference`")
    parser.add_argument("--press", required=True, choices=PRESSES, help="what compresses the cache")
    parser.add_argument("--keep-ratio", required=True, type=float, help="of the budgets, for the rows")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N examples only")
    parser.add_argument("--output", required=True, type=Path, metavar="JSONL", help="one row an example")
    args = parser.parse_args()
    examples = read(args.examples)[: args.limit]
    check_lengths(examples, args.press)
    model = load(args.model, args.dtype, args.attention)
    check_head(model, examples[0]["prompt_ids"][:8])
    rows = evaluate(model, examples, args.press, reference(args.reference, args.model, model))
    identity = {"method": f"kvpress-{args.press}", "keep_ratio": args.keep_ratio, "seed": None}
    written(args.output, "".join(json.dumps({**row, **identity}, allow_nan=False) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    # Not by `splitlines`: characters of a text, U+2028 for one, would end its line.
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


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


def reference(path: Path, folder: Path, model: PreTrainedModel) -> Callable[[dict[str, Any]], torch.Tensor]:
    """What reads the unpruned model's last hidden states, [response, hidden], on an example.

    Args:
        path: made by `sdtp reference`.
        folder: of the model.
        model: in whose dtype the states have to be.

    Raises:
        SystemExit: no such file, a damaged one, one of another model or dtype; of the function, of another example.
    """
    from safetensors import SafetensorError, safe_open

    again = "run the reference step again"
    manifest = folder / "manifest.json"
    try:
        file = safe_open(path, framework="pt").__enter__()
        about = json.loads(file.metadata()["description"])
        made = about["model_sha256"], about["dtype"], about["examples"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is not a whole file of states ({error}): {again}") from error
    if made[0] != json.loads(manifest.read_text("utf-8"))["sha256"]:
        raise SystemExit(f"{path} is of another model than {folder}: {again}")
    if made[1] != str(model.dtype).removeprefix("torch."):
        raise SystemExit(f"{path} holds {made[1]} states and the model runs in {model.dtype}: {again}")

    def states(example: dict[str, Any]) -> torch.Tensor:
        ids = json.dumps([example["prompt_ids"], example["response_ids"]], separators=(",", ":"))
        if made[2].get(example["id"]) != hashlib.sha256(ids.encode()).hexdigest():
            raise SystemExit(f"{path} has no example {example['id']!r} of these tokens: {again}")
        found: torch.Tensor = file.get_tensor(example["id"])
        return found.to(model.device)

    return states


def check_head(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuse a model whose logits are not its output embeddings of the last hidden states, and nothing more.

    Args:
        model: eval mode, unhooked.
        ids: of a few tokens.

    Raises:
        SystemExit: naming the model.
    """
    import torch

    batch = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=batch).logits.float()
        alone = model.get_output_embeddings()(model.base_model(input_ids=batch).last_hidden_state).float()
    rounding = max(1e-5, 4 * torch.finfo(model.dtype).eps)
    if not float((alone - logits).abs().max()) <= rounding * float(logits.abs().max()):
        raise SystemExit(
            f"{type(model).__name__} makes its logits of more than its output embeddings: no agreement with the "
            "unpruned model can be measured"
        )


def agreement(logits: torch.Tensor, unpruned: torch.Tensor) -> dict[str, float]:
    """KL(unpruned || compressed), nats a token, and the share of tokens whose most probable token is the same.

    Args:
        logits, unpruned: [response, vocabulary].
    """
    log_q, log_p = (one.float().log_softmax(-1) for one in (unpruned, logits))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    same = logits.argmax(-1) == unpruned.argmax(-1)
    return {"kl": max(0.0, float(kl)), "top1": float(same.double().mean())}


def evaluate(
    model: PreTrainedModel,
    examples: list[dict[str, Any]],
    press: str,
    states: Callable[[dict[str, Any]], torch.Tensor],
) -> list[dict[str, Any]]:
    """One row an example, in their order: what `sdtp evaluate` writes but for the method's name.

    Args:
        model: eval mode, unhooked.
        examples: rows of `sdtp budgets`.
        press: name of a class of kvpress.
        states: see `reference`.
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
                **agreement(logits, model.get_output_embeddings()(states(example))),
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
