"""The timing core: what is between two readings of the clock, and that both arms do the same work."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from sdtp.evaluation import latency
from sdtp.evaluation.latency import Stopwatch, Timing, compare, cut_to_lengths, interleave, timed_pass
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule
from tests.conftest import FAMILIES

CPU = torch.device("cpu")
PROMPT = torch.arange(3, 43).unsqueeze(0)  # [1, 40]
SCHEDULE = PruningSchedule((1, 3), (0.5, 0.25), sinks=2, min_local=4)


class CostClock:
    """Fake seconds: stands still but for what the work under test charges to it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return self.now


def charge(model: PreTrainedModel, clock: CostClock, per_token: float, per_step: float) -> None:
    """Every forward costs `per_token` for each token of layer 2's input in prefill, `per_step` in decode."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        tokens = args[0].shape[1]
        clock.now += per_token * tokens if tokens > 1 else per_step

    model.model.layers[2].register_forward_pre_hook(hook)


class TestTiming:
    def test_decode_is_the_rest_of_the_pass(self) -> None:
        timing = Timing(prefill_s=0.5, end_to_end_s=0.9, new_tokens=16)
        assert timing.decode_s == pytest.approx(0.4)
        assert timing.seconds_per_output_token == pytest.approx(0.4 / 15)  # 26.7 ms, not 0.9 / 16

    def test_one_new_token_has_no_decode(self) -> None:
        timing = Timing(prefill_s=0.5, end_to_end_s=0.5, new_tokens=1)
        assert timing.decode_s is None
        assert timing.seconds_per_output_token is None


class TestStopwatch:
    @pytest.fixture
    def events(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        log: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append(f"sync {device}"))
        return log

    def test_synchronises_once_right_before_each_reading_on_cuda(self, events: list[str]) -> None:
        watch = Stopwatch(torch.device("cuda", 1), lambda: events.append("clock") or 1.0)  # type: ignore[func-returns-value]
        watch.read()
        watch.read()
        assert events == ["sync cuda:1", "clock", "sync cuda:1", "clock"]

    def test_a_pass_synchronises_nowhere_but_at_its_readings(
        self, events: list[str], tiny_model: Callable[..., PreTrainedModel]
    ) -> None:
        watch = Stopwatch(torch.device("cuda", 0), lambda: events.append("clock") or 1.0)  # type: ignore[func-returns-value]
        timed_pass(tiny_model(), PROMPT, 6, watch)
        assert events == ["sync cuda:0", "clock"] * 3

    def test_never_synchronises_on_the_cpu(self, events: list[str], tiny_model: Callable[..., PreTrainedModel]) -> None:
        timed_pass(tiny_model(), PROMPT, 6, Stopwatch(CPU))
        assert events == []


class TestTimedPass:
    def test_books_prefill_and_decode_apart(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model, clock = tiny_model(), CostClock()
        charge(model, clock, per_token=0.5 / 40, per_step=0.4 / 15)
        timing = timed_pass(model, PROMPT, 16, Stopwatch(CPU, clock))
        assert timing.prefill_s == pytest.approx(0.5)
        assert timing.decode_s == pytest.approx(0.4)  # a second prefill would make it 0.9
        assert timing.end_to_end_s == pytest.approx(0.9)
        assert clock.readings == 3

    def test_one_new_token_is_prefill_alone(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model, clock = tiny_model(), CostClock()
        charge(model, clock, per_token=0.01, per_step=99.0)
        timing = timed_pass(model, PROMPT, 1, Stopwatch(CPU, clock))
        assert timing.prefill_s == pytest.approx(0.4)
        assert timing.end_to_end_s == timing.prefill_s

    def test_scoring_is_inside_prefill(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        """Scoring 30 ms and a prefill of 100 -> 60 ms is 1.11x, not 1.67x."""
        model, clock = tiny_model(), CostClock()
        charge(model, clock, per_token=0.1 / 40, per_step=0.0)

        class Slow(scorers.Recent):
            def score(self, view: scorers.StageView) -> torch.Tensor:
                clock.now += 0.03
                return super().score(view)

        pruner = TokenPruner(PruningSchedule((1,), (0.6,), sinks=2, min_local=4), Slow())
        samples = compare(model, pruner, PROMPT, 2, repeats=1, warmup=1, clock=clock)
        assert samples["unpruned"].warm[0].prefill_s == pytest.approx(0.1)
        assert samples["sdtp"].warm[0].prefill_s == pytest.approx(0.09)
        assert samples["ideal"].warm[0].prefill_s == pytest.approx(0.06)

    @pytest.mark.parametrize("stops", [7, [5, 7]])
    def test_no_stop_token_ends_it_early(
        self, tiny_model: Callable[..., PreTrainedModel], stops: int | list[int]
    ) -> None:
        model = tiny_model()
        model.generation_config.eos_token_id = stops
        steps = []

        def emit_stop(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
            steps.append(logits.shape[1])
            return torch.nn.functional.one_hot(torch.full(logits.shape[:2], 7), 128).float()

        model.lm_head.register_forward_hook(emit_stop)
        timing = timed_pass(model, PROMPT, 16, Stopwatch(CPU))
        assert timing.new_tokens == 16
        assert steps == [1] * 16  # one logit position in prefill too

    def test_refuses_another_number_of_tokens(
        self, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(latency, "decode", lambda model, token, cache, new_tokens: token.repeat(1, 7))
        with pytest.raises(RuntimeError, match=r"\(1, 7\) tokens were generated where \(1, 16\) were asked for"):
            timed_pass(tiny_model(), PROMPT, 16, Stopwatch(CPU))

    def test_tokens_are_those_of_generate(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        generate: Any = model.generate
        expected = generate(PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
        token, cache = latency.prefill(model, PROMPT)
        assert torch.equal(latency.decode(model, token, cache, 8), expected[:, 40:])


class TestInterleave:
    def test_arms_take_turns_and_warm_up_alike(self) -> None:
        order = []
        clock = itertools.count(1)

        def arm(name: str) -> Callable[[], Timing]:
            def run() -> Timing:
                order.append(name)
                seconds = float(next(clock))
                return Timing(seconds, seconds, 1)

            return run

        samples = interleave({name: arm(name) for name in "ABC"}, repeats=3, warmup=2)
        assert "".join(order) == "ABC" * 5
        assert samples["B"].cold.prefill_s == 2.0
        # The warm-up rounds, 5 being B's second, are in no statistic.
        assert [timing.prefill_s for timing in samples["B"].warm] == [8.0, 11.0, 14.0]

    def test_first_pass_of_each_arm_has_its_context(self) -> None:
        events = []

        @contextlib.contextmanager
        def first_pass(name: str) -> Iterator[None]:
            events.append(f"<{name}")
            yield
            events.append(f"{name}>")

        def run() -> Timing:
            events.append("run")
            return Timing(1.0, 1.0, 1)

        interleave({"A": run, "B": run}, repeats=1, warmup=1, first_pass=first_pass)
        assert events == ["<A", "run", "A>", "<B", "run", "B>", "run", "run"]

    @pytest.mark.parametrize(("repeats", "warmup", "named"), [(0, 1, "repeats is 0"), (5, 0, "warmup is 0")])
    def test_refuses_to_run_without_rounds(self, repeats: int, warmup: int, named: str) -> None:
        with pytest.raises(ValueError, match=named):
            interleave({}, repeats, warmup)


def reference_at_lengths(model: PreTrainedModel, prompt: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The model's layers driven one by one, each on the first tokens of its input; logits of the last position."""
    stack = model.model
    hidden = stack.embed_tokens(prompt)
    positions = torch.arange(prompt.shape[1]).unsqueeze(0)
    cos, sin = stack.rotary_emb(hidden, position_ids=positions)
    cache = DynamicCache(config=model.config)
    for layer, length in zip(stack.layers, lengths, strict=True):
        hidden = layer(
            hidden[:, :length],
            attention_mask=None,
            position_ids=positions[:, :length],
            position_embeddings=(cos[:, :length], sin[:, :length]),
            cache=cache,
            use_cache=True,
        )
    logits: torch.Tensor = model.lm_head(stack.norm(hidden)[:, -1:])
    return logits


class TestCutToLengths:
    def test_full_lengths_are_the_unpruned_model_bit_by_bit(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        expected = model(input_ids=PROMPT, logits_to_keep=1).logits
        with cut_to_lengths(model, [40, 40, 40, 40]):
            assert torch.equal(model(input_ids=PROMPT, logits_to_keep=1).logits, expected)
        assert torch.equal(reference_at_lengths(model, PROMPT, [40] * 4), expected)

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_each_layer_runs_on_its_length(
        self, tiny_model: Callable[..., PreTrainedModel], family: str, attention: str
    ) -> None:
        lengths = SCHEDULE.layer_lengths(40, 4)
        model = tiny_model(family, attention=attention)
        with cut_to_lengths(model, lengths):
            output = model(input_ids=PROMPT, use_cache=True, logits_to_keep=1)
        assert [output.cache.get_seq_length(layer) for layer in range(4)] == lengths == [40, 20, 20, 10]
        if attention == "sdpa":  # eager needs a mask that the reference does not build
            torch.testing.assert_close(output.logits, reference_at_lengths(model, PROMPT, lengths), rtol=0, atol=0)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_causal_layers_do_not_miss_the_tokens_cut_off(
        self, tiny_model: Callable[..., PreTrainedModel], family: str
    ) -> None:
        model = tiny_model(family)
        lengths = SCHEDULE.layer_lengths(40, model.config.num_hidden_layers)
        with cut_to_lengths(model, lengths):
            logits = model(input_ids=PROMPT, logits_to_keep=1).logits
        expected = model(input_ids=PROMPT[:, : lengths[-1]], logits_to_keep=1).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    def test_leaves_no_hook_behind(self, tiny_model: Callable[..., PreTrainedModel]) -> None:
        model = tiny_model()
        with pytest.raises(KeyError), cut_to_lengths(model, [40, 20, 20, 10]):
            raise KeyError
        assert not any(layer._forward_pre_hooks for layer in model.model.layers)


class TestCompare:
    def test_baseline_is_unhooked_and_every_arm_has_its_own_work(
        self, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny_model()
        seen = []

        def spy(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, watch: Stopwatch) -> Timing:
            hooks = sum(len(layer._forward_pre_hooks) for layer in model.model.layers)
            _, cache = latency.prefill(model, prompt)
            seen.append((hooks > 0, [cache.get_seq_length(layer) for layer in range(4)], new_tokens))
            return Timing(1.0, 1.0, new_tokens)

        monkeypatch.setattr(latency, "timed_pass", spy)
        samples = compare(model, TokenPruner(SCHEDULE, scorers.HiddenNorm()), PROMPT, 5, repeats=2, warmup=1)
        arms = [(False, [40] * 4, 5), (True, [40, 20, 20, 10], 5), (True, [40, 20, 20, 10], 1)]
        assert seen == arms * 3
        assert list(samples) == ["unpruned", "sdtp", "ideal"]

    def test_pruning_after_prefill_gains_no_prefill_time(
        self, tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A method that shortens the cache when all layers have seen the prompt: prefill as before, decode cheaper."""
        model, clock = tiny_model(), CostClock()

        def cost(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
            cached = kwargs["cache"].get_seq_length(2)  # type: ignore[attr-defined]
            clock.now += args[0].shape[1] * (args[0].shape[1] + cached) * 1e-3

        model.model.layers[2].register_forward_pre_hook(cost, with_kwargs=True)

        class LateCompression(TokenPruner):
            @contextlib.contextmanager
            def __call__(self, model: torch.nn.Module, protect: torch.Tensor | None = None) -> Iterator[None]:  # type: ignore[override]
                def crop(module: torch.nn.Module, args: object, output: object) -> None:
                    if output.cache.layers[2].keys.shape[-2] == 40:  # type: ignore[attr-defined]
                        output.cache.layers[2].crop(-30)  # type: ignore[attr-defined]

                handle = model.register_forward_hook(crop)
                yield
                handle.remove()

        samples = compare(
            model, LateCompression(SCHEDULE, scorers.Recent()), PROMPT, 2, repeats=1, warmup=1, clock=clock
        )
        before, after = samples["unpruned"].warm[0], samples["sdtp"].warm[0]
        assert after.prefill_s == pytest.approx(before.prefill_s) == pytest.approx(1.6)
        assert before.decode_s == pytest.approx(0.041)
        assert after.decode_s == pytest.approx(0.011)


def test_scorer_alone_scores_what_enters_the_stages_that_remove_some(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    clock, scored = CostClock(), []

    class Slow(scorers.Learned):
        def score(self, view: scorers.StageView) -> torch.Tensor:
            clock.now += 0.001 * view.hidden.shape[1]
            scored.append(
                (view.stage, view.layer, tuple(view.hidden.shape), view.hidden.dtype, view.positions[0, -1].item())
            )
            return super().score(view)

    model = tiny_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    # 40 -> 20, nothing at the second, 20 -> 10.
    schedule = PruningSchedule((1, 2, 3), (0.5, 0.5, 0.25), sinks=2, min_local=4)
    pruner = TokenPruner(schedule, Slow(32, 3, width=8))
    timing = latency.scoring_arm(model, pruner, 40, Stopwatch(CPU, clock))()
    assert scored == [(0, 1, (1, 40, 32), torch.float32, 39), (2, 3, (1, 20, 32), torch.float32, 39)]
    assert timing.prefill_s == pytest.approx(0.06)
    assert clock.readings == 2


def test_scorer_that_reads_attention_has_no_time_of_its_own(tiny_model: Callable[..., PreTrainedModel]) -> None:
    run = latency.scoring_arm(tiny_model(), TokenPruner(SCHEDULE, scorers.LastQuery()), 40, Stopwatch(CPU))
    with pytest.raises(TypeError, match="cannot be timed alone"):
        run()


def test_prompt_tokens_per_second_count_every_row() -> None:
    assert latency.prefill_tokens_per_second(batch=2, prompt_tokens=1000, prefill_s=0.5) == 4000.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with CUDA events")
def test_stopwatch_agrees_with_cuda_events() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a @ a
    watch = Stopwatch(device)
    start = watch.read()
    begin.record()
    for _ in range(50):
        a @ a
    end.record()
    unsynced = watch.clock() - start
    elapsed = watch.read() - start
    assert elapsed == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.05)
    assert elapsed > unsynced
