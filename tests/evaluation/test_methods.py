"""What a method's name means: what it is made from, how much it keeps, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from sdtp.evaluation import methods, names
from sdtp.evaluation.peers.compression import Compression
from sdtp.evaluation.peers.fastkv import FastKV
from sdtp.evaluation.peers.gemfilter import GemFilter
from sdtp.evaluation.peers.peer import Peer
from sdtp.evaluation.teacher_forcing import force
from sdtp.pruning import scorers
from sdtp.pruning.pruner import TokenPruner
from sdtp.pruning.schedule import PruningSchedule

# Three stages in four layers: of 40 tokens 20, 10 and 5 are left; the layers hold 40 + 20 + 10 + 5 = 75.
SCHEDULE = PruningSchedule((1, 2, 3), (0.5, 0.25, 0.125), sinks=1, min_local=2)
PROMPT = list(range(3, 43))
RESPONSE = [9, 4, 7]


def made(method: str, model: PreTrainedModel, **changes: object) -> TokenPruner | Peer | None:
    given = {
        "schedule": SCHEDULE,
        "pruner": TokenPruner(SCHEDULE.with_ratio(0.9), scorers.Learned(32, 3, width=8)),
        "seed": 5,
        "layer": 1,
        "cache_keep": 0.4,
    }
    needed = names.needs(method)
    given = {name: value for name, value in given.items() if name in needed} | changes
    return methods.make(method, model, **given)(PROMPT, RESPONSE)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", names.METHODS)
def test_every_name_is_made_from_what_it_needs_and_runs(
    tiny_model: Callable[..., PreTrainedModel], method: str
) -> None:
    model = tiny_model()
    kept = force(model, PROMPT, RESPONSE, made(method, model)).kept_tokens
    expected = {
        "unpruned": 40,
        "sdtp-half": 10,  # a half at layer 1 and a half at layer 3
        "sdtp-tuned": 29,  # what its own schedule leaves, 0.9 after 0.9 after 0.9
        "snapkv": 19,  # 75 entries in four layers
        "h2o": 19,
        "fastkv": 5,
        "unpruned+snapkv": 16,
        "unpruned+h2o": 16,
        "sdtp+snapkv": 2,  # 40% of the 5 that are left
        "sdtp+h2o": 2,
    }
    assert kept == expected.get(method, 5)


def test_names_and_their_makers_are_the_same() -> None:
    assert set(methods.BASELINES) == set(names.BASELINES)
    assert set(methods.RULES) == set(names.RULES)
    assert len(set(names.METHODS)) == len(names.METHODS)


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("unpruned", set()),
        ("sdtp", {"schedule", "pruner"}),
        ("sdtp-half", {"schedule", "pruner"}),
        ("sdtp-tuned", {"schedule", "pruner"}),
        ("random", {"schedule", "seed"}),
        ("recent", {"schedule"}),
        ("oracle", {"schedule", "labels"}),
        ("gemfilter", {"schedule", "layer"}),
        ("fastkv", {"schedule", "layer"}),
        ("h2o", {"schedule"}),
        ("unpruned+h2o", {"cache_keep"}),
        ("sdtp+snapkv", {"schedule", "pruner", "cache_keep"}),
    ],
)
def test_needs(method: str, needed: set[str]) -> None:
    assert names.needs(method) == needed


def test_what_is_needed_and_not_given_is_named(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    for method, name in (("sdtp", "pruner"), ("recent", "schedule"), ("h2o", "schedule"), ("sdtp+h2o", "cache_keep")):
        with pytest.raises(ValueError, match=f"method {method.replace('+', '.')} needs {name}, which is not given"):
            made(method, model, **{name: None})
    with pytest.raises(ValueError, match=r"method 'sdtp.h3o' is not known: unpruned, sdtp,"):
        methods.make("sdtp+h3o", model)


def test_seed_and_layer_reach_their_methods(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model()
    random = made("random", model)
    assert isinstance(random, TokenPruner)
    assert isinstance(random.scorer, scorers.Random)
    assert random.scorer.seed == 5
    gemfilter, fastkv = made("gemfilter", model), made("fastkv", model, layer=2)
    assert isinstance(gemfilter, GemFilter)
    assert isinstance(fastkv, FastKV)
    assert (gemfilter.layer, fastkv.layer) == (1, 2)


def test_a_rule_on_top_takes_its_share_of_what_the_pruner_leaves(tiny_model: Callable[..., PreTrainedModel]) -> None:
    on_top = made("sdtp+h2o", tiny_model(), cache_keep=0.5)
    assert isinstance(on_top, Compression)
    assert on_top.pruner is not None
    assert on_top.pruner.schedule == SCHEDULE
    assert on_top.keep(20) == 10


@pytest.mark.parametrize(
    ("method", "layers", "expected"),
    [("gemfilter", 32, 13), ("fastkv", 32, 15), ("gemfilter", 30, 12), ("fastkv", 28, 13), ("fastkv", 2, 0)],
)
def test_selecting_layer_is_as_deep_as_in_the_papers(method: str, layers: int, expected: int) -> None:
    assert methods.selecting_layer(method, layers) == expected


def test_selecting_layer_is_what_null_means(tiny_model: Callable[..., PreTrainedModel]) -> None:
    gemfilter = made("gemfilter", tiny_model(), layer=None)
    assert isinstance(gemfilter, GemFilter)
    assert gemfilter.layer == 2  # 13 of 32 in a model of four


@pytest.mark.parametrize(
    ("method", "expected"),
    [("sdtp", False), ("gemfilter", False), ("fastkv", False), ("h2o", True), ("sdtp+h2o", True), ("kvpress-X", True)],
)
def test_compression_leaves_the_first_token_to_the_prefill(method: str, expected: bool) -> None:
    assert names.compresses(method) is expected


def test_names_are_read_without_torch() -> None:
    code = "import sys, sdtp.evaluation.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
