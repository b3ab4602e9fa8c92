"""What the steps that make data folders share: what they check first, and what they tell afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp.pipeline.block import Source
from sdtp.pipeline.data import longest_response
from sdtp.pipeline.limits import check_context
from sdtp.pipeline.models import check_template, load_tokenizer, read_manifest
from sdtp.pipeline.records import REPAIRED, SKIPPED
from sdtp.pipeline.step import StepLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a split made of records, what its manifest counts beside rows.
RECORD_COUNTS = ("in_training", "prompts_cut", "prompt_tokens_cut", "responses_cut", "response_tokens_cut")


def checked_tokenizer(model: Path, max_tokens: int, source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        UserError: the model has no room for the longest example that `source` gives with prompts of `max_tokens`, or
            its chat template takes no user's message.
    """
    # Saliency and training run over prompt and response together.
    tokens = {"data.max_tokens": max_tokens, "longest response": longest_response(source)}
    check_context(tokens, read_manifest(model)["context_length"])
    tokenizer = load_tokenizer(model)
    check_template(tokenizer, model)
    return tokenizer


def log_data(log: StepLog, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Counts, content hash and origin of each split of a data folder, from its manifest, which is kept with the run."""
    for split, described in manifest["splits"].items():
        log.metric(f"{split}/examples", described["examples"])
        log.metrics({f"{split}/{count}": number for count, number in described["rows"].items()})
        if "skipped" in described:  # made of records
            log.metrics({f"{split}/skipped_{reason}": described["skipped"].get(reason, 0) for reason in SKIPPED})
            log.metrics({f"{split}/repaired_{what}": described["repaired"].get(what, 0) for what in REPAIRED})
            log.metrics({f"{split}/{count}": described[count] for count in RECORD_COUNTS})
        revision = described["source"].get("revision") or described["source"].get("version")
        log.dataset(split, folder / split, described["content_sha256"], revision)
    log.artifact(folder / "manifest.json")
