"""lm-eval's model `sdtp`: against `--model hf` where nothing is pruned, against teacher forcing where something is."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

import huggingface_hub.constants
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sdtp.errors import UserError
from sdtp.evaluation import harness
from sdtp.evaluation.harness import PrunedLM
from sdtp.evaluation.harness_pruner import read_pruner
from sdtp.evaluation.methods import BASELINES
from sdtp.evaluation.names import PAPER_TASKS
from sdtp.evaluation.teacher_forcing import force
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

TASK = Path(__file__).with_name("harness_task")
SETTINGS = {"keep_ratio": 0.6, "start": 1, "step": 2, "sinks": 2, "local": 0.0, "min_local": 4}
SCHEDULE = PruningSchedule.geometric(4, 1, 2, 0.6, 2, 0.0, 4)  # what the settings are on a model of 4 layers
PAIRS = [
    ("the quick brown fox jumps over", " the lazy dog"),
    ("the quick brown fox jumps over", " a"),
    ("a much longer context, which the batch has to pad the others for, and so on", " and on"),
    ("the quick brown fox jumps over", " the lazy cat"),
    ("no", "!"),  # shorter than what every stage protects
    ("", "hello"),  # scored after the prefix token
    ("the quick brown fox jumps over", " b"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing touches the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, after padding, beginning and end."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(vocab_size=259)


@pytest.fixture
def folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """The model and its tokenizer as on disk."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Callable[..., PrunedLM]:
    """Factory of lm-eval models around the tiny one."""
    return functools.partial(PrunedLM, model, tokenizer=tokenizer)


@pytest.fixture
def hf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Callable[..., HFLM]:
    return functools.partial(HFLM, model, tokenizer=tokenizer)


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def scores(lm: HFLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def forced(lm: PrunedLM, context: str, continuation: str, cut: int = 0) -> tuple[float, bool]:
    """By teacher forcing, request by request, with a token a byte."""
    prompt = (lm.tokenizer.encode(context) or [lm.tokenizer.bos_token_id])[cut:]
    response = lm.tokenizer.encode(continuation)
    alone = force(lm.model, prompt, response, lm.pruner)
    return float(alone.log_probs.sum()), alone.argmax.tolist() == response


def evaluate(lm: Any, **settings: Any) -> dict[str, Any]:
    """Results of the local task with five examples in each prompt."""
    manager = TaskManager(include_path=str(TASK), include_defaults=False)
    return simple_evaluate(
        lm, tasks=["colours"], num_fewshot=5, task_manager=manager, bootstrap_iters=0, device="cpu", **settings
    )


def answers(results: dict[str, Any]) -> list[list[tuple[float, bool]]]:
    return [sample["filtered_resps"] for sample in results["samples"]["colours"]]


class TestTask:
    @pytest.mark.parametrize("batch_size", [1, 4])
    @pytest.mark.parametrize("pruner", ["", ",pruner=lastquery,keep_ratio=1.0,start=1,step=1"])
    def test_answers_as_hf_where_nothing_is_removed(self, folder: str, pruner: str, batch_size: int) -> None:
        expected = evaluate("hf", model_args=f"pretrained={folder}")
        results = evaluate("sdtp", model_args=f"pretrained={folder}{pruner}", batch_size=batch_size)
        assert results["results"]["colours"]["acc,none"] == expected["results"]["colours"]["acc,none"]
        assert results["results"]["colours"]["acc_norm,none"] == expected["results"]["colours"]["acc_norm,none"]
        for ours, theirs in zip(answers(results), answers(expected), strict=True):
            assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], rel=0, abs=1e-4)
            assert [one[1] for one in ours] == [one[1] for one in theirs]

    def test_pruned_is_teacher_forcing_request_by_request(self, folder: str) -> None:
        settings = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
        results = evaluate("sdtp", model_args=f"pretrained={folder},pruner=hiddennorm,{settings}")
        lm = PrunedLM(folder, pruner="hiddennorm", **SETTINGS, device="cpu")
        unpruned = answers(evaluate("hf", model_args=f"pretrained={folder}"))
        contexts = []
        for sample, before in zip(results["samples"]["colours"], unpruned, strict=True):
            pairs = sample["arguments"]
            assert sample["filtered_resps"] == [forced(lm, *pair) for pair in pairs]
            assert abs(sample["filtered_resps"][0][0] - before[0][0]) > 1e-3
            contexts.append(pairs[0][0])
            assert contexts[-1].count("Q: ") == 6  # the question after five examples
        config = results["config"]
        lengths = [len(context) for context in contexts]
        assert (config["contexts"], config["context_tokens"]) == (6, sum(lengths))
        assert config["kept_tokens"] == sum(SCHEDULE.surviving(length)[-1] for length in lengths)
        assert (config["pruning_scorer"], config["pruning_schedule"]) == ("HiddenNorm", SCHEDULE.to_dict())
        json.dumps(config["pruning_schedule"])

    def test_command_line(self, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saved = tmp_path / "pruner"
        TokenPruner(SCHEDULE, scorers.Recent()).save_pretrained(saved)
        out = tmp_path / "out"
        command = [
            "sdtp-lm-eval",
            "--model",
            "sdtp",
            "--model_args",
            f"pretrained={folder},pruner={saved},keep_ratio=0.5",
        ]
        command += ["--tasks", "colours", "--include_path", str(TASK), "--num_fewshot", "5", "--device", "cpu"]
        command += ["--batch_size", "2", "--output_path", str(out), "--log_samples", "--limit", "2"]
        monkeypatch.setattr(sys, "argv", command)
        # Without the thousands of tasks that lm-eval brings and takes seconds to read.
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
        harness.main()
        [written], [logged] = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
        config = json.loads(written.read_text())["config"]
        assert (config["model"], config["pruning_scorer"]) == ("sdtp", "Recent")
        assert config["pruning_schedule"]["keep"] == [0.5, 0.25]
        lm = PrunedLM(folder, pruner=str(saved), keep_ratio=0.5, device="cpu")
        for line in logged.read_text().splitlines():
            sample = json.loads(line)
            pairs = [(one["arg_0"], one["arg_1"]) for one in sample["arguments"].values()]
            found = [float(score) for score, _ in sample["filtered_resps"]]
            assert found == pytest.approx([forced(lm, *pair)[0] for pair in pairs], rel=0, abs=1e-4)


class TestLoglikelihood:
    def test_unpruned_is_hf(self, lm: Callable[..., PrunedLM], hf: Callable[..., HFLM]) -> None:
        for ours, theirs in zip(scores(lm(batch_size=3), PAIRS), scores(hf(), PAIRS), strict=True):
            assert ours == pytest.approx(theirs, rel=0, abs=1e-4)

    @pytest.mark.parametrize("method", BASELINES)
    def test_pruned_is_teacher_forcing_alone(self, lm: Callable[..., PrunedLM], method: str) -> None:
        pruned = lm(pruner=method, **SETTINGS)
        assert scores(pruned, PAIRS) == [forced(pruned, *pair) for pair in PAIRS]

    @pytest.mark.parametrize("batch_size", [2, 3, 64, "auto"])
    @pytest.mark.parametrize("method", BASELINES)
    def test_pruned_is_teacher_forcing_in_batches(
        self, lm: Callable[..., PrunedLM], method: str, batch_size: int | str
    ) -> None:
        pruned = lm(pruner=method, **SETTINGS, batch_size=batch_size)
        expected = [forced(pruned, *pair) for pair in PAIRS]
        for found, one in zip(scores(pruned, PAIRS), expected, strict=True):
            assert found == pytest.approx(one, rel=0, abs=1e-4)

    def test_requests_of_one_context_share_its_prefill(
        self, lm: Callable[..., PrunedLM], model: PreTrainedModel
    ) -> None:
        shapes: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(
            lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        shared = lm(pruner="recent", **SETTINGS, batch_size=2)
        scores(shared, PAIRS)
        # Four contexts in two batches: the longest with one continuation, of 7 tokens, and the one that has four, of
        # 13, 2, 13 and 2; then an empty one with 5 and the shortest with 1. The last token of each is not fed.
        assert shapes == [(2, 75), (2, 12), (2, 12), (1, 1), (2, 2), (2, 4)]
        assert (shared.contexts, shared.context_tokens) == (4, 75 + 30 + 2 + 1)
        shapes.clear()
        apart = lm(pruner="recent", **SETTINGS, batch_size=64, logits_cache=False)
        for one, other in zip(scores(apart, PAIRS), scores(shared, PAIRS), strict=True):
            assert one == pytest.approx(other, rel=0, abs=1e-4)
        assert shapes[:2] == [(7, 75), (7, 12)]

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_sizes_are_those_of_each_requests_own_context(self, lm: Callable[..., PrunedLM], batch_size: int) -> None:
        pruned, whole = lm(pruner="recent", **SETTINGS, batch_size=batch_size), lm(batch_size=batch_size)
        scores(pruned, PAIRS)
        scores(whole, PAIRS)
        lengths = {pair: len(pair[0]) or 1 for pair in PAIRS}  # a token a byte, or the prefix token
        assert pruned.sizes == {pair: (length, SCHEDULE.surviving(length)[-1]) for pair, length in lengths.items()}
        assert whole.sizes == {pair: (length, length) for pair, length in lengths.items()}

    def test_greedy_is_what_the_pruned_model_generates(
        self, lm: Callable[..., PrunedLM], model: PreTrainedModel
    ) -> None:
        pruned = lm(pruner="hiddennorm", **SETTINGS, batch_size=2)
        prompts = [pruned.tokenizer.encode(context) for context, _ in (PAIRS[0], PAIRS[2])]
        requests = []
        for prompt in prompts:
            with pruned.pruner(model):
                generate: Any = model.generate
                ids = generate(torch.tensor([prompt]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
            greedy = ids[0, len(prompt) :].tolist()
            other = [*greedy[:2], (greedy[2] + 1) % 259, *greedy[3:]]
            requests += [(("", ""), prompt, ids) for ids in (greedy, greedy[:1], other, other[2:])]
        found = pruned._loglikelihood_tokens(requests, disable_tqdm=True)
        assert [one[1] for one in found] == [True, True, False, False] * 2

    def test_context_is_cut_on_the_left_as_hf_does_and_counted(
        self, lm: Callable[..., PrunedLM], hf: Callable[..., HFLM], caplog: pytest.LogCaptureFixture
    ) -> None:
        limit = 25
        for ours, theirs in zip(scores(lm(max_length=limit), PAIRS), scores(hf(max_length=limit), PAIRS), strict=True):
            assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
        pruned = lm(pruner="recent", **SETTINGS, max_length=limit)
        cuts = [max(0, len(context) + len(continuation) - limit - 1) for context, continuation in PAIRS]
        assert scores(pruned, PAIRS) == [forced(pruned, *pair, cut) for pair, cut in zip(PAIRS, cuts, strict=True)]
        assert pruned.truncated_requests == sum(cut > 0 for cut in cuts) == 5
        assert pruned.get_model_info()["truncated_requests"] == 5
        assert "5 requests so far lost context on the left to fit 25 tokens" in caplog.text

    @pytest.mark.parametrize("continuation", [[], [5] * 26])
    def test_refuses_continuations_that_cannot_be_scored(
        self, lm: Callable[..., PrunedLM], continuation: list[int]
    ) -> None:
        with pytest.raises(UserError, match=rf"has {len(continuation)} tokens: 1 to 25 \(max_length\) can be scored"):
            lm(max_length=25)._loglikelihood_tokens([(("a", "b"), [3], continuation)], disable_tqdm=True)

    def test_precision_is_what_is_asked_for(self, lm: Callable[..., PrunedLM]) -> None:
        usual, fine = scores(lm(), PAIRS), scores(lm(softmax_dtype="float64"), PAIRS)
        coarse = scores(lm(mixed_precision_dtype="bfloat16"), PAIRS)
        for one, other, third in zip(usual, fine, coarse, strict=True):
            assert 0 < abs(one[0] - other[0]) < 1e-4
            assert 1e-3 < abs(one[0] - third[0]) < 1

    def test_answers_go_to_lm_evals_cache_one_by_one(self, lm: Callable[..., PrunedLM]) -> None:
        pruned = lm(pruner="recent", **SETTINGS)
        pruned.cache_hook.dbdict = {}
        found = scores(pruned, PAIRS)
        assert pruned.cache_hook.dbdict == {
            hash_args("loglikelihood", pair): score for pair, score in zip(PAIRS, found, strict=True)
        }

    def test_rolling_is_hf_without_a_pruner_and_refused_with_one(
        self, lm: Callable[..., PrunedLM], hf: Callable[..., HFLM]
    ) -> None:
        requests = instances("loglikelihood_rolling", [("a text longer than the window",), ("short",)])
        expected = hf(max_length=16).loglikelihood_rolling(requests, disable_tqdm=True)
        found = lm(max_length=16, batch_size=2).loglikelihood_rolling(requests, disable_tqdm=True)
        assert found == pytest.approx(expected, rel=0, abs=1e-4)
        with pytest.raises(UserError, match="without a context nothing is pruned"):
            lm(pruner="recent", **SETTINGS).loglikelihood_rolling(requests)


class TestGenerateUntil:
    CONTEXTS = tuple(context for context, _ in PAIRS[:3:2])

    def requests(self, until: list[str], tokens: int = 12) -> list[Instance]:
        settings = {"until": until, "max_gen_toks": tokens, "do_sample": False}
        return instances("generate_until", [(context, settings) for context in self.CONTEXTS])

    def test_unpruned_is_hf(self, lm: Callable[..., PrunedLM], hf: Callable[..., HFLM]) -> None:
        expected = hf(batch_size=2).generate_until(self.requests([]), disable_tqdm=True)
        unpruned = lm(batch_size=2)
        assert unpruned.generate_until(self.requests([]), disable_tqdm=True) == expected
        assert unpruned.context_tokens == unpruned.kept_tokens == 105

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_pruned_is_generate_in_the_pruner_up_to_a_stop(
        self, lm: Callable[..., PrunedLM], model: PreTrainedModel, batch_size: int
    ) -> None:
        pruned = lm(pruner="hiddennorm", **SETTINGS, batch_size=batch_size)
        expected = []
        for context in self.CONTEXTS:
            prompt = pruned.tokenizer.encode(context)
            with pruned.pruner(model):
                generate: Any = model.generate
                ids = generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
            expected.append(pruned.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
        assert pruned.generate_until(self.requests([]), disable_tqdm=True) == expected
        assert expected != lm().generate_until(self.requests([]), disable_tqdm=True)
        assert (pruned.contexts, pruned.context_tokens) == (2, 105)
        assert pruned.kept_tokens == SCHEDULE.surviving(30)[-1] + SCHEDULE.surviving(75)[-1]
        stop = expected[0][3:5]
        stopped = pruned.generate_until(self.requests([stop]), disable_tqdm=True)
        assert stopped == [text.split(stop)[0] for text in expected]

    def test_beams_are_counted_as_they_are_prefilled(self, lm: Callable[..., PrunedLM]) -> None:
        pruned = lm(pruner="recent", **SETTINGS)
        settings = {"until": [], "max_gen_toks": 2, "num_beams": 3}
        pruned.generate_until(instances("generate_until", [(self.CONTEXTS[0], settings)]), disable_tqdm=True)
        assert (pruned.contexts, pruned.context_tokens) == (3, 3 * 30)
        assert pruned.kept_tokens == 3 * SCHEDULE.surviving(30)[-1]

    def test_cut_contexts_are_those_of_hf_and_counted(
        self, lm: Callable[..., PrunedLM], hf: Callable[..., HFLM]
    ) -> None:
        cut = lm(max_length=52)
        expected = hf(max_length=52).generate_until(self.requests([]), disable_tqdm=True)
        assert cut.generate_until(self.requests([]), disable_tqdm=True) == expected
        assert (cut.truncated_requests, cut.context_tokens) == (1, 30 + 40)


class TestReadPruner:
    def test_plain_method_has_the_schedule_of_the_settings(self) -> None:
        pruner = read_pruner("random", 4, **SETTINGS, seed=7)
        assert pruner is not None
        assert (pruner.scorer, pruner.schedule) == (scorers.Random(7), SCHEDULE)
        plain = read_pruner("recent", 9, keep_ratio=1, start=2, step=3)
        assert plain is not None
        assert plain.schedule == PruningSchedule.geometric(9, 2, 3, 1.0)

    def test_folder_has_its_own_schedule_at_another_ratio(self, tmp_path: Path) -> None:
        TokenPruner(SCHEDULE, scorers.Random(3)).save_pretrained(tmp_path)
        for ratio, keep in ((None, (0.6, 0.36)), (0.5, (0.5, 0.25))):
            pruner = read_pruner(str(tmp_path), 4, keep_ratio=ratio)
            assert pruner is not None
            assert (pruner.scorer, pruner.schedule.layers) == (scorers.Random(3), (1, 3))
            assert pruner.schedule.keep == pytest.approx(keep)

    @pytest.mark.parametrize(
        ("pruner", "settings", "message"),
        [
            (None, {"keep_ratio": 0.5}, "keep_ratio=0.5 without a pruner: nothing would be pruned"),
            ("nowhere", {}, "pruner=nowhere is neither a folder nor one of random, recent"),
            ("recent", {"start": 1}, "pruner=recent needs keep_ratio, step as well"),
            ("recent", {**SETTINGS, "seed": 3}, "seed=3 means nothing to pruner=recent: only random has one"),
            (TokenPruner(SCHEDULE, scorers.Recent()), {"start": 1, "seed": 2}, "start=1, seed=2 cannot be set"),
        ],
    )
    def test_refuses_by_name(self, pruner: Any, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_pruner(pruner, 4, **settings)

    def test_pruner_for_another_model_is_refused_before_any_request(self, lm: Callable[..., PrunedLM]) -> None:
        with pytest.raises(ValueError, match="the model has layers 0 to 3 only"):
            lm(pruner=TokenPruner(PruningSchedule((5,), (0.5,)), scorers.Recent()))


def test_pruned_model_is_left_unhooked(lm: Callable[..., PrunedLM], hf: Callable[..., HFLM]) -> None:
    before = scores(hf(), PAIRS)
    scores(lm(pruner="lastquery", **SETTINGS, batch_size=2), PAIRS)
    assert scores(hf(), PAIRS) == before


def test_an_overflow_is_refused_by_name(lm: Callable[..., PrunedLM], model: PreTrainedModel) -> None:
    """Else the argmax of an answer's nan would be counted as a choice."""
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=r"log-likelihood of continuation \('no', '!'\) is nan: the model's logits"):
        scores(lm(pruner="recent", **SETTINGS), [("no", "!")])


def test_remote_code_is_not_trusted_by_default(folder: str) -> None:
    config = Path(folder, "config.json")
    own = {"model_type": "unheard", "auto_map": {"AutoConfig": "code.Config"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    Path(folder, "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        PrunedLM(folder, device="cpu")


def test_the_papers_tasks_are_lm_evals() -> None:
    tasks = Path(lm_eval.tasks.__file__).parent
    folders: Iterator[Path] = (tasks / name for name in ("super_glue", "piqa", "winogrande", "mathqa"))
    index = TaskManager(include_path=list(folders), include_defaults=False).task_index
    for name in PAPER_TASKS:
        config = index[name].cfg
        assert config["output_type"] == "multiple_choice"
        assert config["training_split"] == "train"  # where the five examples come from
    assert len(PAPER_TASKS) == 8
