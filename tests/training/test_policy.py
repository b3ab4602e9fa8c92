"""The masking policy: its values are those of physical removal, its gradients those of the masks."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtp.errors import UserError
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training import policy as policies
from sdtp.training.policy import MaskingPolicy
from sdtp.training.samplers import gumbel_noise
from tests.pruning.reference import removal
from tests.scoring import keep_scores

N, R = 30, 6
SCHEDULE = PruningSchedule((1, 2, 3), (0.7, 0.5, 0.3), sinks=2, local=0.1, min_local=3)


def ids(length=N + R):
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(0))


def make_scorer(schedule=SCHEDULE):
    torch.manual_seed(7)
    return Learned(32, schedule.stages, width=16)


def noise(stage, tokens):
    return gumbel_noise(0, 0, "example", stage, tokens)


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    # The eager attention of transformers takes its softmax in float32 whatever the dtype.
    [("sdpa", torch.float32, 1e-5), ("sdpa", torch.float64, 1e-9), ("eager", torch.float32, 1e-5)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("noisy", [False, True])
def test_values_are_those_of_physical_removal(tiny_model, family, attention, dtype, tolerance, noisy):
    model = tiny_model(family, dtype=dtype, attention=attention)
    scorer = make_scorer()
    policy = MaskingPolicy(SCHEDULE, scorer, temperature=0.3)

    def score(stage, hidden, prompt):
        scores = keep_scores(scorer, stage, hidden, prompt, N)
        return scores + 0.3 * noise(stage, N)[prompt] if noisy else scores

    states, kept, entering = removal(model, ids(), N, SCHEDULE, score)
    logits = model.lm_head(states)
    seen = []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with policy(model, N, noise if noisy else None) as trace:
        output = model(ids(), use_cache=False)
    hook.remove()
    assert [positions.tolist() for positions in trace.kept] == kept
    assert [len(positions) for positions in kept] == SCHEDULE.surviving(N) == [21, 15, 9]
    columns = torch.tensor(kept[-1] + list(range(N, N + R)))
    torch.testing.assert_close(seen[0][columns], states, rtol=0, atol=tolerance * max(1, states.abs().max().item()))
    torch.testing.assert_close(
        output.logits[0, columns], logits, rtol=0, atol=tolerance * max(1, logits.abs().max().item())
    )
    # The scorer read the states that pruning would have given it.
    for stage, (positions, hidden) in enumerate(entering):
        assert trace.entering[stage].tolist() == positions
        expected = keep_scores(scorer, stage, hidden, positions, N)
        torch.testing.assert_close(trace.scores[stage][positions], expected, rtol=0, atol=1e-5)


def test_the_last_prompt_position_predicts_as_under_removal(tiny_model):
    """The first response token is predicted by the last prompt token, which the tail protects."""
    model = tiny_model()
    scorer = make_scorer()
    states, _kept, _ = removal(
        model, ids(N), N, SCHEDULE, lambda stage, hidden, prompt: keep_scores(scorer, stage, hidden, prompt, N)
    )
    with MaskingPolicy(SCHEDULE, scorer)(model, N):
        logits = model(ids(), use_cache=False, logits_to_keep=R + 1).logits[0, 0]
    torch.testing.assert_close(logits, model.lm_head(states[-1]), rtol=0, atol=1e-5 * max(1, logits.abs().max().item()))


@pytest.mark.parametrize(("keep", "changes"), [((1.0, 1.0, 1.0), False), ((0.5, 0.5, 0.5), True)])
def test_a_schedule_that_keeps_all_changes_nothing(tiny_model, keep, changes):
    model = tiny_model()
    plain = model(ids()).logits
    with MaskingPolicy(dataclasses.replace(SCHEDULE, keep=keep), make_scorer())(model, N):
        masked = model(ids(), use_cache=False).logits
    assert ((masked - plain).abs().max().item() > 1e-3) == changes


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_short_prompts_keep_what_the_schedule_says(tiny_model, tokens):
    model = tiny_model()
    with MaskingPolicy(SCHEDULE, make_scorer())(model, tokens) as trace:
        assert model(ids(tokens + R), use_cache=False).logits.isfinite().all()
    assert [len(positions) for positions in trace.kept] == SCHEDULE.surviving(tokens)


def masked_loss(model, masks):
    """A loss of the response with token i weighed by masks[layer][i] as a key of that layer, by an explicit bias."""
    backbone, tokens = model.model, N + R
    hidden = backbone.embed_tokens(ids())
    rope = backbone.rotary_emb(hidden, position_ids=torch.arange(tokens)[None])
    for index, layer in enumerate(backbone.layers):
        row = torch.cat([masks.get(index, torch.ones(N)).double(), torch.ones(R, dtype=torch.float64)])
        weight = torch.where(torch.eye(tokens, dtype=torch.bool), 1.0, row.expand(tokens, tokens))
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        bias = weight.clamp_min(1e-300).log().masked_fill(future, -torch.inf)
        hidden = layer(hidden, attention_mask=bias[None, None], position_embeddings=rope)
    return model.lm_head(backbone.norm(hidden))[0, N - 1 :].logsumexp(-1).sum()


def test_straight_through_gradient_is_that_of_the_masks_times_the_sigmoid(tiny_model):
    """d loss / d score = (d loss / d mask of that token) * sigmoid'((score - cut) / T) / T, at both stages.

    Compared at tokens visible in every layer the mask acts on: what hidden keys get is the attention's own test.
    """
    model = tiny_model(dtype=torch.float64)
    schedule = PruningSchedule((1, 3), (0.6, 0.4), sinks=2, local=0.0, min_local=3)
    temperature = 0.7
    with MaskingPolicy(schedule, make_scorer(schedule), temperature)(model, N, noise) as trace:
        loss = model(ids(), use_cache=False).logits[0, N - 1 :].logsumexp(-1).sum()
    gradients = torch.autograd.grad(loss, trace.scores)

    free = list(range(2, N - 3))
    hard, relative = [], []
    for stage in range(2):
        scores = (trace.scores[stage] + temperature * noise(stage, N)).detach().double()
        entering, kept = trace.entering[stage].tolist(), trace.kept[stage].tolist()
        dropped = [i for i in entering if i not in kept]
        cut = (max(scores[i] for i in dropped) + min(scores[i] for i in kept if i in free)) / 2
        # Tokens that are gone already are held against the same cut as those that are not.
        hard.append(torch.tensor([i in kept if i in entering else bool(scores[i] > cut) for i in range(N)]).double())
        relative.append((scores - cut) / temperature)
    gone = [i for i in free if not hard[0][i]]
    assert 0 < sum(hard[1][i] for i in gone) < len(gone)  # some would have stayed, some not

    def loss_of(first, second):
        return masked_loss(model, {1: first, 2: first, 3: first * second})

    torch.testing.assert_close(loss.detach(), loss_of(*hard), rtol=1e-9, atol=1e-9)
    for stage in range(2):
        everywhere = [i for i in trace.entering[stage].tolist() if hard[stage][i] and hard[1][i]]
        assert len(set(everywhere) & set(free)) >= 2
        for token in everywhere:
            masks = [mask.clone() for mask in hard]
            masks[stage].requires_grad_(True)
            (slope,) = torch.autograd.grad(loss_of(*masks), masks[stage])
            sigmoid = torch.sigmoid(relative[stage][token])
            expected = (slope[token] * sigmoid * (1 - sigmoid) / temperature).item() if token in free else 0.0
            assert gradients[stage][token].item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_loss_reaches_every_stage_and_no_stage_trains_through_a_later_score(tiny_model):
    model = tiny_model()
    scorer = make_scorer()
    with MaskingPolicy(SCHEDULE, scorer)(model, N, noise) as trace:
        loss = model(ids(), use_cache=False).logits[0, N:].square().mean()
    loss.backward(retain_graph=True)
    for stage in range(3):
        assert scorer.mlps[stage][0].weight.grad.norm() > 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())
    # What stage 2 scores is a constant to stages 0 and 1.
    reached = torch.autograd.grad(trace.scores[2].sum(), list(scorer.mlps[0].parameters()), allow_unused=True)
    assert all(gradient is None for gradient in reached)


def test_a_token_an_earlier_stage_dropped_gives_no_gradient_to_a_later_one(tiny_model):
    model = tiny_model()
    with MaskingPolicy(SCHEDULE, make_scorer())(model, N) as trace:
        loss = model(ids(), use_cache=False).logits[0, N:].square().mean()
    gradients = torch.autograd.grad(loss, trace.scores)
    gone = [i for i in range(N) if i not in trace.entering[1].tolist()]
    assert torch.equal(gradients[1][gone], torch.zeros(len(gone)))
    assert (gradients[0][gone].abs() > 0).all()


def test_an_earlier_mask_counts_in_later_layers_where_its_token_would_still_be_there(tiny_model):
    """Of a token the first stage dropped: the last layer's say reaches its score if the second would have kept it."""
    schedule = PruningSchedule((1, 3), (0.6, 0.4), sinks=2, local=0.0, min_local=3)
    model = tiny_model(dtype=torch.float64)
    with MaskingPolicy(schedule, make_scorer(schedule), 0.7)(model, N, noise) as trace:
        # The loss sees the masks of the last layer alone.
        hook = model.model.layers[3].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
        loss = model(ids(), use_cache=False).logits[0, N - 1 :].logsumexp(-1).sum()
        hook.remove()
    (gradient,) = torch.autograd.grad(loss, trace.scores[0])
    entering, kept = trace.entering[1].tolist(), trace.kept[1].tolist()
    noisy = (trace.scores[1] + 0.7 * noise(1, N)).detach()
    lowest_kept = min(noisy[i] for i in kept if 2 <= i < N - 3)
    cut = (lowest_kept + max(noisy[i] for i in entering if i not in kept)) / 2
    gone = [i for i in range(N) if i not in entering]
    would_stay = [i for i in gone if noisy[i] > cut]
    assert 0 < len(would_stay) < len(gone)
    assert {i for i in gone if gradient[i] != 0} == set(would_stay)


def test_without_gradient_only_the_scores_are_on_the_graph(tiny_model):
    model = tiny_model()
    with MaskingPolicy(SCHEDULE, make_scorer())(model, N, gradient=False) as trace:
        logits = model(ids(), use_cache=False).logits
    assert not logits.requires_grad
    assert all(scores.requires_grad for scores in trace.scores)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_also_after_an_exception(tiny_model, attention):
    model = tiny_model(attention=attention)
    plain = model(ids()).logits
    scorer = make_scorer()
    with torch.no_grad():
        scorer.mlps[2][2].bias.fill_(torch.nan)  # fails in the last stage, with the others' masks in place
    with pytest.raises(UserError), MaskingPolicy(SCHEDULE, scorer)(model, N):
        model(ids(), use_cache=False)
    assert model.config._attn_implementation == attention
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(model(ids()).logits, plain)


@pytest.mark.parametrize("noisy", [True, False])
def test_a_number_that_varies_is_masked_as_exactly_those_are_removed(tiny_model, noisy):
    """Under Gumbel-softmax: values are those of physical removal of its draw, and protected tokens are never in it."""
    model = tiny_model(dtype=torch.float64)
    policy = MaskingPolicy(SCHEDULE, make_scorer(), 0.3, "gumbel_softmax")
    counts = []
    for epoch in range(6):
        with policy(
            model, N, (lambda stage, n, e=epoch: gumbel_noise(0, e, "a", stage, n)) if noisy else None
        ) as trace:
            logits = model(ids(), use_cache=False).logits[0]
        kept = [positions.tolist() for positions in trace.kept]
        for stage, (entering, protected) in enumerate(zip(trace.entering, trace.protected, strict=True)):
            assert entering.tolist() == (kept[stage - 1] if stage else list(range(N)))
            n = len(entering)
            own = [i < 2 or place >= n - SCHEDULE.protected_tail(n) for place, i in enumerate(entering.tolist())]
            assert protected.tolist() == own
            assert set(entering[protected].tolist()) <= set(kept[stage]) <= set(entering.tolist())
        counts.append([len(positions) for positions in kept])
        # Removal of what was kept: a schedule of those numbers, by scores that are 1 there and 0 elsewhere.
        plan = SimpleNamespace(
            layers=SCHEDULE.layers, sinks=0, protected_tail=lambda n: 0, surviving=lambda n: counts[-1]
        )
        states, removed, _ = removal(
            model,
            ids(),
            N,
            plan,
            lambda stage, _, prompt, kept=kept: torch.tensor([float(i in kept[stage]) for i in prompt]),
        )
        assert removed == kept
        columns = torch.tensor(kept[-1] + list(range(N, N + R)))
        expected = model.lm_head(states)
        torch.testing.assert_close(logits[columns], expected, rtol=0, atol=1e-9 * max(1, expected.abs().max().item()))
    budgets = SCHEDULE.surviving(N)
    if noisy:
        assert len(set(map(tuple, counts))) > 3
        assert all(
            abs(sum(column) / 6 - budget) < 3 for column, budget in zip(zip(*counts, strict=True), budgets, strict=True)
        )
    else:
        assert counts == [budgets] * 6


def test_gumbel_softmax_goes_on_where_an_earlier_stage_kept_too_few(tiny_model):
    """Fewer tokens enter than the budget of the next stage: all of them stay, and the masks stay differentiable."""

    class Low(Learned):
        def estimates(self, stage, hidden, positions, prompt_lengths, present=None):
            return self.level.expand(1, hidden.shape[1])

    schedule = PruningSchedule((1, 3), (0.6, 0.59), sinks=2, local=0.1, min_local=3)
    scorer = Low(32, 2)
    scorer.level = torch.zeros(1, requires_grad=True)
    model = tiny_model()
    few = 0
    for epoch in range(12):
        with MaskingPolicy(schedule, scorer, 1.0, "gumbel_softmax")(
            model, N, lambda stage, n, e=epoch: gumbel_noise(0, e, "a", stage, n)
        ) as trace:
            loss = model(ids(), use_cache=False).logits[0, N:].square().mean()
        (gradient,) = torch.autograd.grad(loss, scorer.level)
        assert gradient.isfinite()
        if len(trace.kept[0]) <= schedule.surviving(N)[1]:
            few += 1
            assert torch.equal(trace.kept[1], trace.kept[0])
    assert 0 < few < 12


def test_gumbel_softmax_that_draws_nobody_leaves_the_token_it_was_nearest_to_keeping(tiny_model):
    schedule = PruningSchedule((1, 3), (0.5, 0.25), sinks=0, local=0.0, min_local=0)
    scorer, model = make_scorer(schedule), tiny_model()
    against = torch.full((N,), -5.0).index_fill_(0, torch.tensor([12]), -4.0)  # as logistic noise -148 and -55
    with MaskingPolicy(schedule, scorer, 1.0, "gumbel_softmax")(model, N, lambda stage, n: against) as trace:
        loss = model(ids(), use_cache=False).logits[0, N:].square().mean()
    assert [kept.tolist() for kept in trace.kept] == [[12], [12]]
    gradients = torch.autograd.grad(loss, list(scorer.parameters()), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(UserError, match=r"training\.sampler is 'dice': one of gumbel_topk, gumbel_softmax is accepted"):
        MaskingPolicy(SCHEDULE, make_scorer(), sampler="dice")


def test_padding_is_refused(tiny_model):
    mask = torch.ones(1, N + R, dtype=torch.long)
    mask[0, 0] = 0
    model = tiny_model()
    with pytest.raises(UserError, match="without padding"), MaskingPolicy(SCHEDULE, make_scorer())(model, N):
        model(ids(), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("kind", ["bool", "added", "lowest"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_a_causal_mask_is_told_from_any_other(monkeypatch, kind, window):
    """In blocks that do not divide the rows evenly; each mask that differs by one entry is another."""
    monkeypatch.setattr(policies, "_BLOCK", 3)
    tokens = 7
    seen = torch.tensor([[0 <= row - column < (window or tokens) for column in range(tokens)] for row in range(tokens)])

    def mask(seen):
        if kind == "bool":
            return seen[None, None]
        lowest = torch.finfo(torch.float32).min if kind == "lowest" else -torch.inf
        return torch.zeros(tokens, tokens).masked_fill(~seen, lowest)[None, None]

    assert policies._is_causal(mask(seen), tokens, window)
    for place in range(tokens * tokens):
        other = seen.clone()
        other.view(-1)[place] ^= True
        assert not policies._is_causal(mask(other), tokens, window)
    assert not policies._is_causal(mask(seen)[..., :-1], tokens, window)
    assert not policies._is_causal(mask(seen)[..., :1, :], tokens, window)


def test_a_mask_is_checked_with_one_synchronisation_and_without_a_matrix_of_integers(monkeypatch):
    monkeypatch.setattr(policies, "_BLOCK", 8)
    made, reads = [], []
    mask = torch.full((60, 60), -torch.inf).triu(1) + torch.full((60, 60), -torch.inf).tril(-40)
    mask = mask[None, None]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._local_scalar_dense.default:
                reads.append(out)
            elif isinstance(out, torch.Tensor) and out.data_ptr() not in rows:
                made.append(out)
            return out

    rows = {row.data_ptr() for row in mask[0, 0]}  # where views of the mask itself begin
    with Watch():
        assert policies._is_causal(mask, 60, 40)
    assert reads == [True]
    assert max(one.numel() for one in made) == 8 * 60
    assert {one.dtype for one in made if one.numel() > 60} == {torch.bool}


@pytest.mark.parametrize(
    ("family", "checked"),
    [("llama", []), ("mistral_window", [True]), ("gemma3", [True]), ("bloom", [False]), ("gpt_oss", [True])],
)
def test_each_mask_is_checked_once_a_forward_whatever_the_number_of_layers(tiny_model, monkeypatch, family, checked):
    """Whether the masks that are checked are of a window."""
    model = tiny_model(family)
    windows = []
    true = policies._is_causal
    monkeypatch.setattr(policies, "_is_causal", lambda *args: (windows.append(args[2] is not None), true(*args))[1])
    policy = MaskingPolicy(SCHEDULE, make_scorer())
    for _ in range(2):
        windows.clear()
        with policy(model, N):
            model(ids(), use_cache=False)
        assert windows == checked


def test_one_layers_mask_does_not_vouch_for_anothers(tiny_model):
    """The layers with a window are handed the right mask, those without one a mask of theirs."""
    model = tiny_model("gemma3")
    layers = model.model.layers
    handed = {}

    def swap(module, args, kwargs):
        handed.setdefault("window", kwargs["attention_mask"])  # the first stage's layer has one
        return args, {**kwargs, "attention_mask": handed["window"]}

    schedule = PruningSchedule((2, 4), (0.7, 0.5), sinks=2, local=0.1, min_local=3)
    with MaskingPolicy(schedule, make_scorer(schedule))(model, N):
        model(ids(), use_cache=False)
        for index in (2, 3):
            layers[index].register_forward_pre_hook(swap, with_kwargs=True, prepend=True)
        with pytest.raises(UserError, match="layer 3 was handed an attention mask"):
            model(ids(), use_cache=False)


def test_non_finite_scores_name_the_stage(tiny_model):
    scorer = make_scorer()
    with torch.no_grad():
        scorer.mlps[1][2].bias.fill_(torch.nan)
    model = tiny_model()
    with pytest.raises(UserError, match=r"stage 1 \(layer 2\)"), MaskingPolicy(SCHEDULE, scorer)(model, N):
        model(ids(), use_cache=False)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(UserError, match=r"training\.temperature"):
        MaskingPolicy(SCHEDULE, make_scorer(), temperature)


def test_sampling_keeps_the_budget_and_follows_the_scores(tiny_model):
    """Gumbel top-1 of three free tokens: each is drawn with its softmax probability."""

    class Fixed(Learned):
        def estimates(self, stage, hidden, positions, prompt_lengths, present=None):
            return torch.tensor([[0.0, 1.0, 2.0, 0.0]])

    schedule = PruningSchedule((3,), (0.5,), sinks=0, local=0.0, min_local=1)
    model = tiny_model()
    policy = MaskingPolicy(schedule, Fixed(32, 1))
    drawn = torch.zeros(4)
    for epoch in range(600):
        with torch.no_grad(), policy(model, 4, lambda stage, n, e=epoch: gumbel_noise(0, e, "a", stage, n)) as trace:
            model(ids(5), use_cache=False)
        assert len(trace.kept[0]) == 2
        assert trace.kept[0][-1] == 3
        drawn[trace.kept[0]] += 1
    torch.testing.assert_close(drawn[:3] / 600, torch.tensor([0.0, 1.0, 2.0]).softmax(0), rtol=0, atol=0.06)
