"""The first part of stage 2: fits the scorers to saliency alone, on stored hidden states.

A step through the masked model costs a forward and a backward for one update. The labels need neither once the states
are known: one forward an example, then as many passes over the states as one likes. Cross-entropy takes over from
scorers that already know what saliency looks like.

This is a warm start, and differs from the steps that follow it in which tokens count. There the losses run over the
tokens entering a stage, as pruning leaves them. Here each stage's losses run over every token of the prompt and its
state in the unpruned model, for there is no policy yet that could say which tokens enter: what untrained scorers would
drop is chance, and a token one of them lost would teach the later stages nothing.

An epoch can be the first of a run that goes on: what the ones before it left are the scorer, its optimizer and its
learning rate, and the order of the examples depends on the epoch's number alone.

Several processes make the same updates as one, to the bit: each holds the states of its share of the examples, computes
the gradient when one of these is next, and sends it to the others. Updates follow one another, so this spreads the
states' memory and the forwards that made them, and not the updates' time.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import optim
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sdtp.errors import UserError
from sdtp.host_memory import available_memory
from sdtp.pruning.adapter import decoder, decoder_layers
from sdtp.pruning.learned import Learned, rms_normalised
from sdtp.training.examples import Example
from sdtp.training.losses import pairwise_ranking, standardise, standardised_mse
from sdtp.training.optimizer import GRADIENT_CLIP, flat_gradients
from sdtp.training.processes import Processes
from sdtp.training.seeding import keyed_generator

# The share of the memory left that stored states may take: the rest of training needs some as well.
_MOST = 0.9


def check_states_fit(prompt_tokens: Sequence[int], stages: int, hidden_size: int, processes: Processes) -> None:
    """Refuse examples whose stored states need more memory than there is, before any of them is computed.

    Args:
        prompt_tokens: of each example.
        stages: states of a token.
        hidden_size: numbers of a state, 2 bytes each.
        processes: that share the examples, on one host or several; called by all of them.

    Raises:
        UserError: a host has less than that left; it says how many of the examples would fit.
        FailedElsewhereError: so it is, and this is not the main process.
    """
    hosts = processes.from_all((socket.gethostname(), available_memory()))
    left = {host: _MOST * free for host, free in hosts if free is not None}
    needed = dict.fromkeys(left, 0)
    full = None
    for place, tokens in enumerate(prompt_tokens):
        host = hosts[place % len(hosts)][0]
        if host in left:
            needed[host] += 2 * stages * tokens * hidden_size
            if full is None and needed[host] > left[host]:
                full = place, host
    with processes.together():
        if full is not None:
            fitting, host = full
            accepted = f"at most {fitting} is accepted" if fitting else "training.label_epochs of 0 is accepted"
            takes, there = (f"{value / 1e9:.3g} GB of memory" for value in (needed[host], left[host]))
            raise UserError(
                f"training.label_examples: the hidden states of {len(prompt_tokens)} examples take {takes} on "
                f"{host}, where {there} may be used: {accepted}"
            )


def stored_states(
    model: PreTrainedModel, examples: Sequence[Example], layers: Sequence[int], processes: Processes, lockstep: bool
) -> dict[int, torch.Tensor]:
    """What `fit_labels` trains on: the `stage_states` of the examples that this process holds, by their place.

    Whether there is memory for them is for the caller to ask, with `check_states_fit`, before it computes anything.

    Args:
        model: frozen causal LM.
        examples: all of them.
        layers: the stages' decoder layers.
        processes: that share the examples.
        lockstep: whether all must run as many forwards (the model is sharded).
    """
    states = {}
    with processes.together(lockstep):
        turns = processes.share(len(examples), lockstep)
        for index, counts in tqdm(turns, desc="states for saliency", unit="example", disable=not processes.main):
            found = stage_states(model, examples[index].prompt_ids, layers)
            if counts:
                states[index] = found
    return states


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
    with torch.autocast("cpu", enabled=False):  # under the CPU's, float16 cannot be stacked
        return torch.stack(states)


def fit_labels(
    scorer: Learned,
    optimizer: optim.Optimizer,
    rates: optim.lr_scheduler.LRScheduler,
    states: Mapping[int, torch.Tensor],
    examples: Sequence[Example],
    *,
    epochs: range,
    mse: float,
    rank: float,
    seed: int,
    log: Callable[[float, int], None],
    processes: Processes,
) -> None:
    """Train the scorer in place on states and saliency, one example an update, every one once an epoch.

    Args:
        scorer: on the device to train on, alike on every process.
        optimizer, rates: of its weights and their learning rate, stepped once an example (see `optimizer.adamw`).
        states: by example [stages, tokens, hidden], as `stored_states` gives them.
        examples: all of them; their saliency is what is learned.
        epochs: numbers of the passes over the examples, counted from 1.
        mse, rank: weights of `standardised_mse` and `pairwise_ranking`, each the mean over stages; one may be 0.
        seed: keys the order of the examples in each epoch.
        log: `log(mean loss, epoch)`, called after each.
        processes: that hold the states.

    Raises:
        UserError: a loss that is not finite, naming the example and the stage; or a gradient, naming the example.
    """
    device = next(scorer.parameters()).device
    targets = {index: torch.stack([standardise(stage) for stage in examples[index].saliency]) for index in states}
    gradients = flat_gradients(scorer)
    # Closed also when a checkpoint cannot be written, so that the message has a line of its own.
    with tqdm(
        total=len(epochs) * len(examples), desc="fitting to saliency", unit="update", disable=not processes.main
    ) as progress:
        for epoch in epochs:
            total = 0.0
            generator = keyed_generator(seed, "labels", epoch)
            for index in torch.randperm(len(examples), generator=generator).tolist():
                gradients.zero_()
                loss = torch.zeros((), device=device)
                with processes.together():
                    if processes.holds(index):
                        loss = _loss(
                            scorer, states[index].to(device), targets[index], examples[index], mse, rank, epoch
                        )
                        loss.backward()
                loss = loss.detach()
                processes.spread(gradients, index)
                processes.spread(loss, index)
                norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), GRADIENT_CLIP)
                if not norm.isfinite():
                    raise UserError(
                        f"the gradient of example {examples[index].id!r} in label epoch {epoch} has norm {norm}: "
                        "training stopped"
                    )
                optimizer.step()
                rates.step()
                total += loss.item() / len(examples)
                progress.update()
            progress.set_postfix(loss=f"{total:.3f}")
            log(total, epoch)


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
