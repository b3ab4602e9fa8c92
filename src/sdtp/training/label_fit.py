"""The first part of stage 2: fits the scorers to saliency alone, on stored hidden states.

A step through the masked model costs a forward and a backward for one update. The labels need neither once the states
are known: one forward an example, then as many passes over the states as one likes. Cross-entropy takes over from
scorers that already know what saliency looks like.

This is a warm start, and differs from the steps that follow it in which tokens count. There the losses run over the
tokens entering a stage, as pruning leaves them. Here each stage's losses run over every token of the prompt and its
state in the unpruned model, for there is no policy yet that could say which tokens enter: what untrained scorers would
drop is chance, and a token one of them lost would teach the later stages nothing.

Several processes make the same updates as one, to the bit: each holds the states of its share of the examples, computes
the gradient when one of these is next, and sends it to the others. Updates follow one another, so this spreads the
states' memory and the forwards that made them, and not the updates' time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.learned import Learned, rms_normalised
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse
from sdtp.training.optimizer import GRADIENT_CLIP, adamw, flat_gradients
from sdtp.training.processes import Processes
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
    states: Mapping[int, torch.Tensor],
    examples: Sequence[Example],
    *,
    epochs: int,
    learning_rate: float,
    mse: float,
    rank: float,
    seed: int,
    log: Callable[[float, int], None],
    processes: Processes,
) -> None:
    """Train the scorer in place on states and saliency, one example an update, every one once an epoch.

    Args:
        scorer: on the device to train on, alike on every process.
        states: by example [stages, tokens, hidden], as `stage_states` gives them, of the examples that this process
            holds (see `Processes.holds`).
        examples: all of them; their saliency is what is learned.
        epochs: passes over the examples.
        learning_rate: peak of the cosine schedule with linear warm-up.
        mse, rank: weights of `standardised_mse` and `pairwise_ranking`, each the mean over stages; one may be 0.
        seed: keys the order of the examples.
        log: `log(mean loss, epoch)`, epochs counted from 1.
        processes: that hold the states.

    Raises:
        UserError: a loss that is not finite, naming the example and the stage.
    """
    device = next(scorer.parameters()).device
    targets = {index: torch.stack([standardise(stage) for stage in examples[index].saliency]) for index in states}
    updates = epochs * len(examples)
    optimizer, rates = adamw(scorer, learning_rate, updates)
    gradients = flat_gradients(scorer)
    generator = keyed_generator(seed, "labels")
    progress = tqdm(total=updates, desc="fitting to saliency", unit="update", disable=not processes.main)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for index in torch.randperm(len(examples), generator=generator).tolist():
            gradients.zero_()
            loss = torch.zeros((), device=device)
            with processes.together():
                if processes.holds(index):
                    loss = _loss(scorer, states[index].to(device), targets[index], examples[index], mse, rank, epoch)
                    loss.backward()
            loss = loss.detach()
            processes.spread(gradients, index)
            processes.spread(loss, index)
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), GRADIENT_CLIP)
            optimizer.step()
            rates.step()
            total += loss.item() / len(examples)
            progress.update()
        progress.set_postfix(loss=f"{total:.3f}")
        log(total, epoch)
    progress.close()


def _loss(
    scorer: Learned,
    states: torch.Tensor,
    targets: torch.Tensor,
    example: Example,
    mse: float,
    rank: float,
    epoch: int,
) -> torch.Tensor:
    """The weighted losses of one example, mean over stages; `targets` is its saliency, standardised."""
    losses = []
    positions = torch.arange(states.shape[1], device=states.device)
    lengths = torch.full((1,), len(positions), device=states.device)
    for stage, hidden in enumerate(states):
        estimates = scorer.estimates(stage, hidden[None], positions[None], lengths)[0]
        if mse:
            losses.append(mse * standardised_mse(estimates, targets[stage].to(estimates.device)))
        if rank:
            losses.append(rank * pairwise_ranking(estimates, example.saliency[stage].to(estimates.device)))
    values = torch.stack(losses)
    if not values.isfinite().all():
        first = int((~values.isfinite()).nonzero()[0])
        where = f"example {example.id!r} at stage {first * scorer.stages // len(losses)}"
        raise UserError(f"the loss of {where} in label epoch {epoch} is {losses[first]}: training stopped")
    return values.sum() / scorer.stages
