"""Attention as `LastQuery` and the peers read it off a layer: the model's own, or refused by name, for every family.

`python -m tests.verification.test_last_query` writes the table of what becomes of each anew; read the difference
before committing it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import DynamicCache

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.evaluation.peers.observing import check_readable, observed
from sdtp.pruning import last_query
from sdtp.pruning.adapter import architecture
from tests.verification.test_every_architecture import WINDOW, make
from tests.verification.test_every_architecture import table as architectures

TABLE = Path(__file__).with_name("last_query.yaml")
SUPPORTED = [kind for kind, what in architectures().items() if what == "exact"]
TOKENS = WINDOW - 1
FULL = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}


class Recorded(scorers.LastQuery):
    """Keeps what it was told."""

    def score(self, view):
        self.__dict__["told"] = super().score(view)
        return self.told


def told(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens]: what LastQuery is told of a layer."""
    scorer = Recorded()
    schedule = PruningSchedule((layer + 1,), (0.6,), sinks=2, local=0.1, min_local=3)
    with torch.no_grad(), TokenPruner(schedule, scorer)(model):
        model(ids)
    return scorer.told


def read_by_peers(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens]: the same, made of the queries and keys that peers read."""
    parts, found = architecture(model), []
    check_readable(parts, [layer], "a peer")

    def read(_, queries, keys, scaling):
        found.append((torch.einsum("kgqd,knd->kgqn", queries, keys) * scaling).softmax(-1)[:, :, -1].mean((0, 1)))

    with torch.no_grad(), observed(parts, [layer], 1, read):
        model(ids, cache=DynamicCache(config=parts.config))
    return found[0][None]


def made(kind: str, **changes: Any) -> Any:
    """A tiny model whose norms and biases differ from channel to channel: else a norm could change places unnoticed."""
    model = make(kind, "cpu", **changes).eval()
    for weights in model.parameters():
        if weights.ndim == 1:
            weights.data += torch.rand_like(weights)
    model.set_attn_implementation("eager")
    return model


def outcome(model: Any, layer: int, expected: torch.Tensor, ids: torch.Tensor, read: Any) -> str:
    """Of one layer: "agrees", "differs", or why it is refused."""
    try:
        found = read(model, layer, ids)
    except (TypeError, ValueError) as error:
        return "refused: " + re.sub(
            ".*LastQuery is not supported (with layer [0-9]+'s [A-Za-z0-9]+: )?", "", str(error)
        )
    assert found.shape == expected.shape
    return "agrees" if (found - expected).abs().max() <= 1e-5 else "differs"


def outcomes(kind: str, read: Any, **changes: Any) -> list[str]:
    """Of layers 0, 1 and 2."""
    model = made(kind, **changes)
    ids = torch.randint(3, 128, (1, TOKENS))
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    return [outcome(model, layer, attentions[layer][:, :, -1].mean(1), ids, read) for layer in range(3)]


def short(found: list[str]) -> str | list[str]:
    """What the table says of a kind."""
    return found[0] if len(set(found)) == 1 else found


def table() -> dict[str, str | list[str]]:
    """Kind -> what becomes of each of its layers."""
    known: dict[str, str | list[str]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return known


def test_every_supported_kind_is_in_the_table():
    assert list(table()) == SUPPORTED
    assert "differs" not in str(table())
    assert sum(what == "agrees" for what in table().values()) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPPORTED)
def test_last_query_is_told_the_model_s_own_attention_or_refused(kind):
    assert short(outcomes(kind, told)) == table()[kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPPORTED)
def test_peers_read_what_last_query_is_told(kind):
    found, expected = outcomes(kind, read_by_peers), outcomes(kind, told)
    assert "differs" not in found
    assert [what == "agrees" for what in found] == [what == "agrees" for what in expected]


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("cohere2", {}, ["agrees", "refused: the layer has no rotary positions", "agrees"]),
        ("cohere2", FULL, ["refused: the layer has no rotary positions"] * 3),
        ("exaone4", {**FULL, "sliding_window": None}, ["agrees"] * 3),
        ("olmo", {"clip_qkv": 0.1}, ["refused: its attention has clip_qkv"] * 3),
        (
            "cohere",
            {"use_qk_norm": True},
            ["refused: its CohereLayerNorm of queries is not over the 8 channels of one head"] * 3,
        ),
    ],
)
@pytest.mark.parametrize("read", [told, read_by_peers])
def test_a_setting_decides(kind, changes, expected, read):
    assert outcomes(kind, read, **changes) == expected


@pytest.mark.parametrize("kind", ["hunyuan_v1_dense", "lfm2", "phi"])
def test_norms_by_other_names_are_refused(kind):
    changes = {"lfm2": FULL, "phi": {"qk_layernorm": True}}.get(kind, {})
    words = "norms of queries and keys before their rotation are known, called q_norm and k_norm, and it has a q"
    assert all(what.startswith(f"refused: {words}") for what in outcomes(kind, told, **changes))


@pytest.mark.parametrize(("kind", "layer"), [("cohere2", 1), ("afmoe", 1), ("hunyuan_v1_dense", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kind_that_nobody_has_named_is_found_by_its_keys(monkeypatch, kind, layer, dtype):
    monkeypatch.setattr(last_query, "_rotates", lambda _: True)
    monkeypatch.setattr(last_query, "_OUTPUT_NORMS", ("query_layernorm", "key_layernorm"))
    model = made(kind).to(dtype)
    ids, cache = torch.randint(3, 128, (1, TOKENS)), DynamicCache()
    schedule = PruningSchedule((layer + 1,), (0.6,), sinks=2, local=0.1, min_local=3)
    words = f"layer {layer}'s .*: a key in its cache is not k_proj's"
    with torch.no_grad(), TokenPruner(schedule, scorers.LastQuery())(model) as trace:
        with pytest.raises(TypeError, match=words):
            model(ids, cache=cache)
        assert not trace.kept
        with pytest.raises(RuntimeError, match="a forward pass on this cache was interrupted"):
            model(ids[:, :1], cache=cache)


def test_rounding_is_no_other_key_and_a_rotation_is():
    key = torch.randn(2, 4, 128)
    key[..., 100] = 50.0  # what keys of Qwen 2 are like: one large channel, which turns slowly
    steps = key.abs().amax(-1, keepdim=True).clamp_max(4) / 127
    for same in (key, key.bfloat16(), (key / steps).round() * steps):
        assert not last_query._unlike(same, key)
    assert not last_query._unlike(key * 0, key * 0)
    angles = 20 / 1e6 ** torch.arange(0, 1, 1 / 64)
    cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
    rotated = key * cos + torch.cat([-key[..., 64:], key[..., :64]], dim=-1) * sin
    for other in (rotated, key * 1.5, -key):
        assert last_query._unlike(other, key)


if __name__ == "__main__":
    made_anew = {kind: short(outcomes(kind, told)) for kind in SUPPORTED}
    TABLE.write_text(yaml.safe_dump(made_anew, sort_keys=False, width=200), encoding="utf-8")
