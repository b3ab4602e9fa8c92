"""One pruner on several models, one model in several threads, calls within calls, and what exceptions leave behind."""

from __future__ import annotations

import contextlib
import threading

import peft
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.pruning import pruner as pruner_module
from tests.pruning.reference import masked_logits

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
SETTINGS = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def prompt(n):
    return torch.randint(3, 128, (1, n))


def generated(model, ids, trace):
    """Survivors of each stage and the logits of every step, [stages][tokens] and [steps, vocabulary]."""
    logits = torch.cat(model.generate(ids, **SETTINGS).logits)
    return [kept[0].tolist() for kept in trace.kept], logits


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def belongings(model):
    """What a pruner could leave behind: every module's attributes and hooks."""
    return {
        name: (sorted(vars(module)), [list(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")])
        for name, module in model.named_modules()
    }


# --- several models ---


@pytest.mark.parametrize("other", [scorers.HiddenNorm(), scorers.Recent()], ids=["same", "different"])
def test_two_models_at_once_give_what_they_give_one_after_the_other(tiny_model, other):
    models = [tiny_model(), tiny_model("gemma3")]
    pruners = [TokenPruner(SCHEDULE, scorers.HiddenNorm())]
    pruners.append(pruners[0] if isinstance(other, scorers.HiddenNorm) else TokenPruner(SCHEDULE, other))
    prompts = [prompt(40), prompt(31)]
    expected = []
    for model, pruner, ids in zip(models, pruners, prompts, strict=True):
        with pruner(model) as trace:
            expected.append(generated(model, ids, trace))
    with pruners[0](models[0]) as first, pruners[1](models[1]) as second:
        traces = [first, second]
        for which in (0, 1, 1, 0):
            assert_same(generated(models[which], prompts[which], traces[which]), expected[which])
        # Token by token, in turns.
        caches = [None, None]
        steps = [[], []]
        fed = list(prompts)
        with torch.no_grad():
            for _ in range(5):
                for which, model in enumerate(models):
                    out = model(fed[which], cache=caches[which], use_cache=True, logits_to_keep=1)
                    caches[which] = out.cache
                    steps[which].append(out.logits[0, -1].float())
                    fed[which] = out.logits[:, -1:].argmax(-1)
    for which in (0, 1):
        assert (torch.stack(steps[which]) - expected[which][1]).abs().max() <= 1e-5
    assert [kept[0].tolist() for kept in first.kept] == expected[0][0]
    assert [kept[0].tolist() for kept in second.kept] == expected[1][0]


# --- threads ---


def run_at_once(*calls):
    """Call each in a thread of its own; their results, or the exceptions they raised."""
    results = [None] * len(calls)

    def run(index):
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Meeting(scorers.HiddenNorm):
    """Lets no thread go on from a stage before every other one has come to it."""

    def __init__(self, threads):
        vars(self)["barrier"] = threading.Barrier(threads, timeout=60)

    def score(self, view):
        self.barrier.wait()
        return super().score(view)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 23), (17, 31, 24)])
def test_threads_that_share_a_context_give_what_they_give_one_after_the_other(tiny_model, lengths):
    """None of them entered it; they meet in the middle of their prefills."""
    model = tiny_model()
    prompts = [prompt(n) for n in lengths]
    expected = []
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace:
        expected = [generated(model, ids, trace) for ids in prompts]
    with TokenPruner(SCHEDULE, Meeting(len(lengths)))(model) as trace:
        found = run_at_once(*(lambda ids=ids: torch.cat(model.generate(ids, **SETTINGS).logits) for ids in prompts))
        latest = (trace.prompt_lengths, [kept[0].tolist() for kept in trace.kept])
    for logits, (_, alone) in zip(found, expected, strict=True):
        assert torch.equal(logits, alone)
    assert latest in [([n], kept) for n, (kept, _) in zip(lengths, expected, strict=True)]


def test_a_thread_may_decode_while_another_prefills(tiny_model):
    model = tiny_model()
    first, second = prompt(40), prompt(23)
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace:
        alone = generated(model, second, trace)
        kept = generated(model, first, trace)[0]
    decoding, done = threading.Event(), threading.Event()

    class InTheMiddle(scorers.HiddenNorm):
        def score(self, view):
            if view.stage == 1 and view.prompt_lengths[0] == 23:
                decoding.set()
                assert done.wait(60)
            return super().score(view)

    tokens = prompt(6)

    def decode():
        with torch.no_grad():
            cache = model(first).cache
            assert decoding.wait(60)
            logits = [model(tokens[:, i : i + 1], cache=cache).logits[0, -1] for i in range(6)]
        done.set()
        return torch.stack(logits)

    with TokenPruner(SCHEDULE, InTheMiddle())(model):
        decoded, generation = run_at_once(decode, lambda: torch.cat(model.generate(second, **SETTINGS).logits))
    assert torch.equal(generation, alone[1])
    sequence = torch.cat([first, tokens], dim=1)
    expected = masked_logits(
        model, sequence, torch.ones_like(sequence), SCHEDULE.layers, [torch.tensor([k]) for k in kept], prompt=40
    )
    assert (decoded - expected[0, 40:]).abs().max() <= 1e-5 * expected.abs().max()


def test_a_trace_is_of_one_prefill_when_two_end_at_once(tiny_model):
    model = tiny_model()
    other = threading.Thread(target=lambda: model(prompt(23)))

    class Interrupted(list):
        """Has the other thread come to its end when this one has written half of the trace."""

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            if other.ident is None:
                other.start()
                other.join(timeout=1)

    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace, torch.no_grad():
        trace.kept = Interrupted()
        model(prompt(40))
        other.join()
    assert [kept.shape[1] for kept in trace.kept] == SCHEDULE.surviving(trace.prompt_lengths[0])


def test_of_two_threads_that_attach_at_once_one_is_refused(tiny_model, monkeypatch):
    model = tiny_model()
    barrier, leave = threading.Barrier(2), threading.Barrier(2, timeout=60)
    session = pruner_module.Session

    def after_the_other(*args):
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=1)  # both get here, if both found the model free
        return session(*args)

    monkeypatch.setattr(pruner_module, "Session", after_the_other)

    def attach():
        try:
            with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model):
                leave.wait()
                return len(model.model._forward_pre_hooks)
        except ValueError:
            leave.wait()
            raise

    results = run_at_once(attach, attach)
    refused = [result for result in results if isinstance(result, ValueError)]
    assert len(refused) == 1
    assert "already" in str(refused[0])
    assert 1 in results


# --- attached once ---


def refused(pruner, model):
    with pytest.raises(ValueError, match=r"a pruner is attached to this .* already: leave its context first"):
        pruner(model).__enter__()


def test_a_second_pruner_is_refused_wherever_it_takes_hold(tiny_model):
    model = tiny_model()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], r=2))
    pruner, second = TokenPruner(SCHEDULE, scorers.HiddenNorm()), TokenPruner(SCHEDULE, scorers.Recent())
    ids, before = prompt(40), belongings(model)
    for attached in (model, wrapped):
        with pruner(attached) as trace:
            expected = generated(model, ids, trace)
            inside = belongings(model)
            for one in (pruner, second):
                for where in (model, wrapped, wrapped.base_model):
                    refused(one, where)
            assert belongings(model) == inside
            assert_same(generated(model, ids, trace), expected)  # the first goes on
        assert belongings(model) == before
    with second(model):
        pass


# --- calls within calls ---


def test_a_logits_processor_may_run_the_model(tiny_model):
    """What it prefills is a prompt of its own, shorter or longer than the one that is being answered."""
    model = tiny_model()
    ids, others = prompt(40), [prompt(23), prompt(55)]
    seen = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores):
            for other in others:
                with torch.no_grad():
                    seen.append((other.shape[1], model(other).logits))
                seen.append((other.shape[1], model.generate(other, **SETTINGS).logits[-1]))
            return scores

    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model):
        expected = model.generate(ids, **SETTINGS).logits
        with torch.no_grad():
            alone = {n: (model(other).logits, model.generate(other, **SETTINGS).logits[-1])
                     for n, other in zip((23, 55), others, strict=True)}  # fmt: skip
        found = model.generate(ids, logits_processor=LogitsProcessorList([Asks()]), **SETTINGS).logits
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(seen) == 20
    for index, (n, logits) in enumerate(seen):
        assert torch.equal(logits, alone[n][index % 2])


def test_a_model_may_be_its_own_assistant(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids = prompt(10).repeat(1, 4)
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model) as trace:
        greedy = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
        kept = list(trace.kept)
        assisted = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, assistant_model=model)
    assert torch.equal(greedy, assisted)
    assert trace.prompt_lengths == [40]
    assert all(torch.equal(a, b) for a, b in zip(kept, trace.kept, strict=True))


def test_what_was_asked_of_one_call_is_not_asked_of_the_next(tiny_model):
    model = tiny_model()
    ids = prompt(40)
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model), torch.no_grad():
        out = model(ids)
        expected = model.model(ids).last_hidden_state
        model(ids[:, :7], cache=out.cache, logits_to_keep=7)
        assert torch.equal(model.model(ids).last_hidden_state, expected)
        for wrong in ({"logits_to_keep": None}, {"logits_to_keep": 12}, {"labels": ids}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                model(ids, **wrong)
            assert torch.equal(model.model(ids).last_hidden_state, expected)


# --- exceptions ---


class Failure(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


def fail(kind, when):
    """A hook or the like that raises at its `when`-th call."""
    calls = []

    def raising(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise kind("on purpose")

    return raising


def scorer_raises(model, pruner, ids, kind):
    raising, score = fail(kind, 2), pruner.scorer.score
    vars(pruner.scorer)["score"] = lambda view: raising() or score(view)
    try:
        model.generate(ids, **SETTINGS)
    finally:
        del vars(pruner.scorer)["score"]


def layer_raises(index, call):
    def inside(model, pruner, ids, kind):
        handle = model.model.layers[index].mlp.register_forward_pre_hook(fail(kind, call))
        try:
            model.generate(ids, **SETTINGS)
        finally:
            handle.remove()

    inside.__name__ = f"layer_{index}_raises_in_call_{call}"
    return inside


def streamer_raises(model, pruner, ids, kind):
    class Streamer:
        put = staticmethod(fail(kind, 3))
        end = staticmethod(lambda: None)

    model.generate(ids, streamer=Streamer(), **{**SETTINGS, "return_dict_in_generate": False, "output_logits": False})


POINTS = [scorer_raises, layer_raises(0, 1), layer_raises(2, 1), layer_raises(3, 3), streamer_raises]


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, Failure])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.__name__)
def test_an_exception_leaves_the_model_as_it_was(tiny_model, point, kind):
    model = tiny_model()
    own = model.model.layers[1].register_forward_hook(lambda module, args, output: None)
    pruner = TokenPruner(SCHEDULE, scorers.HiddenNorm())
    ids = prompt(40)
    unpruned = torch.cat(model.generate(ids, **SETTINGS).logits)
    with pruner(model) as trace:
        expected = generated(model, ids, trace)
    before = belongings(model)
    try:
        with pruner(model) as trace:
            with pytest.raises(kind):
                point(model, pruner, ids, kind)
            # Inside the context the next call is as if nothing had happened,
            assert_same(generated(model, ids, trace), expected)
            with pytest.raises(kind):
                point(model, pruner, ids, kind)
            hidden = model.model(ids).last_hidden_state
            assert torch.equal(model.lm_head(hidden[:, -1]), expected[1][:1])
            point(model, pruner, ids, kind)
    except kind:
        pass
    else:
        pytest.fail("nothing was raised")
    # and outside there is nothing left of it.
    assert belongings(model) == before
    assert own.id in model.model.layers[1]._forward_hooks
    assert torch.equal(torch.cat(model.generate(ids, **SETTINGS).logits), unpruned)
    with pruner(model) as trace:
        assert_same(generated(model, ids, trace), expected)


def test_a_context_that_is_closed_or_dropped_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model()
    ids = prompt(40)
    pruner = TokenPruner(SCHEDULE, scorers.HiddenNorm())
    before, unpruned = belongings(model), model(ids).logits
    context = pruner(model)
    context.__enter__()
    assert model(ids).logits.shape[1] == 12
    context.gen.close()
    assert belongings(model) == before
    context = pruner(model)
    context.__enter__()
    del context
    assert belongings(model) == before
    assert torch.equal(model(ids).logits, unpruned)
    with pruner(model):
        assert model(ids).logits.shape[1] == 12


def test_an_attach_that_fails_halfway_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("gpt_neox")  # LastQuery finds its attention built otherwise after other hooks are in place
    before = belongings(model)
    with pytest.raises(TypeError, match="LastQuery is not supported"):
        TokenPruner(SCHEDULE, scorers.LastQuery())(model).__enter__()
    assert belongings(model) == before
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model):
        assert model(prompt(40)).logits.shape[1] == 12
    assert belongings(model) == before
