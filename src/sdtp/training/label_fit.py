"""The first part of stage 2: fits the scorers to saliency alone, on stored hidden states.

A step through the masked model costs a forward and a backward for one update. The labels need neither once the states
are known: one forward an example, then as many passes over the states as one likes. Cross-entropy takes over from
scorers that already know what saliency looks like.

This is a warm start, and differs from the steps that follow it in which tokens count. There the losses run over the
tokens entering a stage, as pruning leaves them. Here each stage's losses run over every token of the prompt and its
state in the unpruned model, for there is no policy yet that could say which tokens enter: what untrained scorers would
drop is chance, and a token one of them lost would teach the later stages nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.scorers import Learned, rms_normalised
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse
from sdtp.training.optimizer import GRADIENT_CLIP, adamw
from sdtp.training.seeding import keyed_generator


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
        states.append(rms_normalised(args[0][0]).half().cpu())

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
    examples: Sequence[Example],
    *,
    epochs: int,
    learning_rate: float,
    mse: float,
    rank: float,
    seed: int,
    log: Callable[[float, int], None],
) -> None:
    """Train the scorer in place on states and saliency, one example an update, every one once an epoch.

    Args:
        scorer: on the device to train on.
        states: per example [stages, tokens, hidden], as `stage_states` gives them.
        examples: whose states these are, in the same order; their saliency is what is learned.
        epochs: passes over the examples.
        learning_rate: peak of the cosine schedule with linear warm-up.
        mse, rank: weights of `standardised_mse` and `pairwise_ranking`, each the mean over stages; one may be 0.
        seed: keys the order of the examples.
        log: `log(mean loss, epoch)`, epochs counted from 1.

    Raises:
        UserError: a loss that is not finite, naming the example and the stage.
    """
    device = next(scorer.parameters()).device
    targets = [torch.stack([standardise(stage) for stage in example.saliency]) for example in examples]
    updates = epochs * len(states)
    optimizer, rates = adamw(scorer, learning_rate, updates)
    generator = keyed_generator(seed, "labels")
    progress = tqdm(total=updates, desc="fitting to saliency", unit="update")
    for epoch in range(1, epochs + 1):
        total = 0.0
        for index in torch.randperm(len(states), generator=generator).tolist():
            losses = []
            positions = torch.arange(states[index].shape[1], device=device)
            lengths = torch.full((1,), len(positions), device=device)
            for stage, hidden in enumerate(states[index].to(device)):
                scores = scorer(stage, hidden[None], positions[None], lengths)[0]
                if mse:
                    losses.append(mse * standardised_mse(scores, targets[index][stage].to(device)))
                if rank:
                    losses.append(rank * pairwise_ranking(scores, examples[index].saliency[stage].to(device)))
            values = torch.stack(losses)
            if not values.isfinite().all():
                first = int((~values.isfinite()).nonzero()[0])
                where = f"example {examples[index].id!r} at stage {first * scorer.stages // len(losses)}"
                raise UserError(f"the loss of {where} in label epoch {epoch} is {losses[first]}: training stopped")
            loss = values.sum() / scorer.stages
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), GRADIENT_CLIP)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            total += loss.item() / len(states)
            progress.update()
        progress.set_postfix(loss=f"{total:.3f}")
        log(total, epoch)
    progress.close()
