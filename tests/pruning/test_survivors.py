"""Each scorer keeps the tokens its description says, at every stage: against removal one layer at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.pruning.reference import removal
from tests.scoring import keep_scores

SCHEDULE = PruningSchedule((1, 2, 4), (0.7, 0.45, 0.3), sinks=2, local=0.05, min_local=3)
LENGTHS = (40, 33, 17)  # of the padded batch's rows

# (stage, states [present, hidden], their positions in the prompt) -> scores [present]
Score = Callable[[int, torch.Tensor, list[int]], torch.Tensor]


def learned() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """Keep logit minus drop logit of a two-layer GELU MLP on the state divided by its root mean square."""
    return _learned(position=False, question_rank=0)


def asking() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The same, with the token's place and its best match among the last 16 tokens, head by head, as further inputs."""
    return _learned(position=True, question_rank=16)


def sharing() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The first, each averaged with its two neighbours present on either side, the nearer ones weighing more, and a
    share of recency."""
    return _learned(position=False, question_rank=0, neighbours=2, recency=0.25)


def weighing() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The second, averaged with a neighbour, and more of recency."""
    return _learned(position=True, question_rank=16, neighbours=1, recency=2.0)


def _weighted(estimates: torch.Tensor, place: int, neighbours: int) -> float:
    """The mean around a place, with weights that fall with the distance."""
    around = range(max(0, place - neighbours), min(len(estimates), place + neighbours + 1))
    weights = {other: neighbours + 1 - abs(other - place) for other in around}
    return sum(weight * float(estimates[other]) for other, weight in weights.items()) / sum(weights.values())


def _learned(
    position: bool, question_rank: int, neighbours: int = 0, recency: float = 0.0
) -> tuple[scorers.Scorer, Callable[[int], Score]]:
    scorer = scorers.Learned(32, SCHEDULE.stages, 8, position, question_rank, neighbours, recency)

    def score_of(row: int) -> Score:
        end = LENGTHS[row] - 1

        def decide(estimates: torch.Tensor, positions: list[int]) -> torch.Tensor:
            return torch.tensor(
                [
                    _weighted(estimates, place, neighbours) + recency * math.log((end + 1) / (end + 1 - position))
                    for place, position in enumerate(positions)
                ],
                dtype=torch.float64,
            )

        def score(stage: int, hidden: torch.Tensor, positions: list[int]) -> torch.Tensor:
            first, first_bias, second, second_bias = (p.detach().double() for p in scorer.mlps[stage].parameters())
            normed = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
            inputs = []
            for token, place in zip(normed, positions, strict=True):
                more = [place / end, math.log2(1 + place) / 16, math.log2(1 + end - place) / 16] if position else []
                for head in range(question_rank // 8):
                    rows = slice(8 * head, 8 * head + 8)
                    key = scorer.keys[stage].weight[rows].detach().double() @ token
                    queries = [scorer.queries[stage].weight[rows].detach().double() @ last for last in normed[-16:]]
                    more.append(max(float(key @ query) for query in queries) / math.sqrt(8))
                inputs.append(torch.cat([token, torch.tensor(more, dtype=torch.float64)]))
            inner = torch.stack(inputs) @ first.T + first_bias
            keep, drop = (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2 @ second.T + second_bias).T
            return decide(keep - drop, positions)

        return score

    return scorer, score_of


def hidden_norm() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The L2 norm of the state."""
    return scorers.HiddenNorm(), lambda row: lambda stage, hidden, positions: hidden.pow(2).sum(-1).sqrt()


def recent() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The original position."""
    return scorers.Recent(), lambda row: lambda stage, hidden, positions: torch.tensor(positions)


def random() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """A number for (seed, stage, position): that of the whole prompt's table at the positions still present."""
    scorer = scorers.Random(seed=5)
    everything = torch.arange(max(LENGTHS))[None]

    def score(stage: int, hidden: torch.Tensor, positions: list[int]) -> torch.Tensor:
        nothing = torch.zeros(1, everything.shape[1], 0)
        view = scorers.StageView(stage, -1, nothing, everything, everything.amax(1) + 1, lambda: nothing)
        return scorer.score(view)[0, positions]

    return scorer, lambda row: score


def saliency() -> tuple[scorers.Scorer, Callable[[int], Score]]:
    """The label of this stage, row and original position."""
    labels = torch.rand(SCHEDULE.stages, len(LENGTHS), max(LENGTHS))
    return scorers.Saliency(labels), lambda row: lambda stage, hidden, positions: labels[stage, row, positions]


def left_padded(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids [rows, longest] and their mask, 1 at real tokens."""
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    columns = torch.arange(max(lengths))
    return ids, torch.stack([columns >= max(lengths) - n for n in lengths]).long()


def assert_kept(found: list[torch.Tensor], row: int, expected: list[list[int]]) -> None:
    """A row of the trace, its padding left out, is `expected` at every stage."""
    assert [[position for position in kept[row].tolist() if position >= 0] for kept in found] == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "make", [learned, asking, sharing, weighing, hidden_norm, recent, random, saliency], ids=lambda make: make.__name__
)
def test_each_scorer_keeps_its_best_tokens(
    tiny_model: Callable[..., PreTrainedModel], family: str, make: Callable[[], tuple], seed: int
) -> None:
    model = tiny_model(family, torch.float64, num_hidden_layers=6)
    torch.manual_seed(seed)
    scorer, score_of = make()
    ids, real = left_padded(LENGTHS)
    with TokenPruner(SCHEDULE, scorer)(model) as trace, torch.no_grad():
        model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
    for row, n in enumerate(LENGTHS):
        with torch.no_grad():
            _, expected, _ = removal(model, ids[row : row + 1, -n:], n, SCHEDULE, score_of(row))
        assert_kept(trace.kept, row, expected)


@pytest.mark.parametrize("make", [learned, asking, sharing, weighing], ids=lambda make: make.__name__)
def test_learned_scores_are_those_of_their_formula(make: Callable[[], tuple]) -> None:
    scorer, score_of = make()
    hidden = 100 * torch.randn(40, 32, dtype=torch.float64)
    for stage in range(SCHEDULE.stages):
        for positions in (list(range(40)), [0, 3, *range(12, 40, 2), 39], [5, 39]):  # 40, 17 and 2 tokens left
            expected = score_of(0)(stage, hidden[positions], positions).float()
            found = keep_scores(scorer, stage, hidden[positions], positions, 40).detach()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [asking, sharing, weighing], ids=lambda make: make.__name__)
def test_removed_tokens_are_scored_by_what_is_left(make: Callable[[], tuple]) -> None:
    """Training scores tokens that an earlier stage removed: they ask nothing, share with none, and are scored as if
    they alone came back."""
    scorer, _ = make()
    assert isinstance(scorer, scorers.Learned)
    hidden, positions, lengths = torch.randn(1, 40, 32), torch.arange(40)[None], torch.tensor([40])
    present = torch.rand(1, 40) < 0.6
    left = present.nonzero()[:, 1]
    scores = scorer(1, hidden, positions, lengths, present)
    alone = scorer(1, hidden[:, left], positions[:, left], lengths)
    torch.testing.assert_close(scores[:, left], alone)
    assert not torch.allclose(scorer(1, hidden, positions, lengths)[:, left], alone)
    for token in (~present[0]).nonzero()[:, 0].tolist():
        returned = torch.cat([left[left < token], torch.tensor([token]), left[left > token]])
        seen = torch.isin(returned, left)[None]
        again = scorer(1, hidden[:, returned], positions[:, returned], lengths, seen)[0, returned == token]
        torch.testing.assert_close(again, scores[0, [token]])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lengths", [(40,), LENGTHS], ids=["one", "padded"])
def test_last_query_keeps_what_the_layer_before_attended_to(
    tiny_model: Callable[..., PreTrainedModel], family: str, lengths: tuple[int, ...], seed: int
) -> None:
    """The probabilities are those of the model's own eager attention, over the tokens the stage before left."""
    model = tiny_model(family, torch.float64, num_hidden_layers=6)
    torch.manual_seed(seed)
    ids, real = left_padded(lengths)
    with TokenPruner(SCHEDULE, scorers.LastQuery())(model) as trace, torch.no_grad():
        model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))

    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    attention: list[torch.Tensor] = []  # [heads, queries, keys] of every layer, as removal goes through them
    for layer in reference.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: attention.append(output[1][0]))

    def score(stage: int, hidden: torch.Tensor, positions: list[int]) -> torch.Tensor:
        assert len(attention) == SCHEDULE.layers[stage]
        assert attention[-1].shape[1:] == (len(positions), len(positions))
        return attention[-1][:, -1].mean(0)

    for row, n in enumerate(lengths):
        own = ids[row : row + 1, -n:]
        with torch.no_grad():
            whole = reference(own, output_attentions=True).attentions
            attention.clear()
            _, expected, _ = removal(reference, own, n, SCHEDULE, score)
        torch.testing.assert_close(attention[0], whole[0][0], rtol=0, atol=1e-6)
        assert_kept(trace.kept, row, expected)
