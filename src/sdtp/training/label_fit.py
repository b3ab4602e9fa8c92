"""The first part of stage 2: fits the scorers to saliency alone, on stored hidden states.

A step through the masked model costs a forward and a backward for one update. The labels need neither once the states
are known: one forward an example, then as many passes over the states as one likes. Cross-entropy takes over from
scorers that already know what saliency looks like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.scorers import Learned
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse


@torch.no_grad()
def stage_states(model: PreTrainedModel, prompt_ids: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """The unpruned model's hidden states entering each stage, divided by their root mean square.

    The scorers do that division themselves; done before, half precision holds any model's states.

    Args:
        model: frozen causal LM.
        prompt_ids: LongTensor [tokens].
        layers: the stages' decoder layers.

    Returns:
        [stages, tokens, hidden] float16 on the CPU.
    """
    states: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden = args[0][0].float()
        states.append(functional.rms_norm(hidden, (hidden.shape[-1],), eps=1e-6).half().cpu())

    modules = decoder_layers(model)
    hooks = [modules[layer].register_forward_pre_hook(keep) for layer in layers]
    try:
        decoder(model)(input_ids=prompt_ids[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states)


def fit_labels(
    scorer: Learned,
    states: Sequence[torch.Tensor],
    saliency: Sequence[torch.Tensor],
    *,
    epochs: int,
    learning_rate: float,
    mse: float,
    rank: float,
    seed: int,
    log: Callable[[float, int], None],
) -> None:
    """Train the scorer in place on (states, saliency) pairs, one example an update, every one once an epoch.

    Args:
        scorer: on the device to train on.
        states: per example [stages, tokens, hidden], as `stage_states` gives them.
        saliency: per example [stages, tokens] float32.
        epochs: passes over the examples.
        learning_rate: peak of the cosine schedule with linear warm-up.
        mse, rank: weights of `standardised_mse` and `pairwise_ranking`, each the mean over stages; one may be 0.
        seed: keys the order of the examples.
        log: `log(mean loss, epoch)`, epochs counted from 1.

    Raises:
        UserError: a loss that is not finite.
    """
    device = next(scorer.parameters()).device
    targets = [torch.stack([standardise(stage) for stage in labels]) for labels in saliency]
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, weight_decay=0.01)
    updates = epochs * len(states)
    rates = get_cosine_schedule_with_warmup(optimizer, max(1, updates // 10), updates)
    key = hashlib.sha256(f"{seed}/labels".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    progress = tqdm(total=updates, desc="fitting to saliency", unit="update")
    for epoch in range(1, epochs + 1):
        total = 0.0
        for index in torch.randperm(len(states), generator=generator).tolist():
            losses = []
            for stage, hidden in enumerate(states[index].to(device)):
                scores = scorer.keep_scores(stage, hidden)
                if mse:
                    losses.append(mse * standardised_mse(scores, targets[index][stage].to(device)))
                if rank:
                    losses.append(rank * pairwise_ranking(scores, saliency[index][stage].to(device)))
            loss = torch.stack(losses).sum() / scorer.stages
            if not loss.isfinite():
                raise UserError(f"the loss of label epoch {epoch} is {loss.item()}: training stopped")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            total += loss.item() / len(states)
            progress.update()
        progress.set_postfix(loss=f"{total:.3f}")
        log(total, epoch)
    progress.close()
