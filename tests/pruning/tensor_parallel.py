"""Pruned generations by every rank of tensor-parallel models: `torchrun tensor_parallel.py OUT_FOLDER MODEL_FOLDER...`.

`test_placement.py` starts it, and calls `generations` itself for what one process gives.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sdtp import PruningSchedule, TokenPruner, scorers

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
LENGTHS = (40, 29)


class DiffersByRank(scorers.HiddenNorm):
    """The longest states on the first rank, the shortest on the others: what rounding does to ties, at its worst."""

    def score(self, view: scorers.StageView) -> torch.Tensor:
        """See `Scorer.score`."""
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        return super().score(view) * (1 if first else -1)


def make_scorers() -> list[scorers.Scorer]:
    """The same on every rank."""
    torch.manual_seed(5)
    return [
        scorers.Learned(32, SCHEDULE.stages, width=8),
        scorers.LastQuery(),
        scorers.HiddenNorm(),
        DiffersByRank(),
    ]


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, longest] padded on the left, and their mask, 1 at real tokens."""
    torch.manual_seed(6)
    ids = torch.randint(3, 128, (len(LENGTHS), max(LENGTHS)))
    return ids, torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - n for n in LENGTHS]).long()


def recorded(scorer: scorers.Scorer) -> list[torch.Tensor]:
    """A list to which the scorer, from now on, adds the scores it gives, stage by stage."""
    seen: list[torch.Tensor] = []
    score = scorer.score

    def recording(view: scorers.StageView) -> torch.Tensor:
        seen.append(score(view).clone())
        return seen[-1]

    vars(scorer)["score"] = recording
    return seen


def generations(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Per scorer the trace, the scores, and the tokens and logits of six greedy steps."""
    ids, real = prompts()
    found = {}
    for scorer in make_scorers():
        name, scores = type(scorer).__name__, recorded(scorer)
        with TokenPruner(SCHEDULE, scorer)(model) as trace:
            out = model.generate(
                ids, attention_mask=real, max_new_tokens=6, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        found[name] = {
            "kept": list(trace.kept),
            "scores": list(scores),
            "sequences": out.sequences,
            "logits": torch.stack(out.logits, dim=1),
        }
    return found


def main(out_folder: str, *model_folders: str) -> None:
    """Write what this rank found of each model, and how many rows of a weight it held."""
    warnings.simplefilter("ignore", FutureWarning)  # `tp_plan=` is on its way to another name
    found = {}
    for folder in map(Path, model_folders):
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        weight: Any = model.model.layers[0].self_attn.q_proj.weight
        found[folder.name] = {"query_rows": weight.to_local().shape[0], "generations": generations(model)}
    torch.save(found, Path(out_folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
