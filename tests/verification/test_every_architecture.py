"""Every causal language model of transformers: refused by name when a pruner is attached, or exact at every step.

`python -m tests.verification.test_every_architecture` writes the table of what becomes of each anew; read the
difference before committing it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MusicgenDecoderConfig, MusicgenMelodyDecoderConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.pruning.adapter import architecture
from sdtp.verification.hidden_keys import masked_logits
from tests.pruning import reference

TABLE = Path(__file__).with_name("every_architecture.yaml")
KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)
WINDOW = 12

# Whatever of these a config has; some go by several names.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "num_key_value_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    "vocab_size": 128,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # the default 0.02 makes tiny random models nearly blind to positions
    "attention_dropout": 0.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {f"indexer_{name}": 8 for name in ("budget", "compress_ratio", "head_dim", "n_heads")}
INDEXER |= {"indexer_kv_heads": 1, "head_dim": 8}
# What a config needs besides.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 64}},
    "emu3": {"text_config": {name: value for name, value in TINY.items() if name != "sliding_window"}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True},
}
# Packages without which a kind cannot be made.
OPTIONAL = {"gemma3n": "timm"}
# Keep their layers where the tests' own reference does not look.
NOT_IN_REFERENCE = ("biogpt",)
# Where the mapping's config is that of a model around the decoder.
CONFIGS: dict[str, Any] = {"musicgen": MusicgenDecoderConfig, "musicgen_melody": MusicgenMelodyDecoderConfig}


def make(kind: str, device: str, tiny: bool = True, **changes: Any) -> Any:
    """A random model of a kind, of its default size unless tiny."""
    config_class = CONFIGS.get(kind, CONFIG_MAPPING[kind])
    own = {**OWN.get(kind, {}), **changes}
    if tiny:
        default = vars(config_class(**own))
        own = {**{name: value for name, value in TINY.items() if name in default}, **own}
        if "kv_lora_rank" in default:  # latent attention has a key for every head
            own["num_key_value_heads"] = own["num_attention_heads"]
        if default.get("layer_types") and "layer_types" not in own:
            types = list(dict.fromkeys(default["layer_types"]))  # each of its types, in turn
            own["layer_types"] = [types[layer % len(types)] for layer in range(4)]
    config = config_class(**own, experts_implementation="eager")  # the grouped one has no float64
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    torch.manual_seed(1)
    with torch.device(device):
        return model_class(config) if kind in CONFIGS else AutoModelForCausalLM.from_config(config)


def refusal(kind: str, **changes: Any) -> str | None:
    """Why a pruner refuses a kind, told without its weights; None if it does not.

    Some kinds cannot be made tiny by the settings above: then of the default size, which is refused or fails the test.
    """
    try:
        model = make(kind, "meta", **changes)
    except (AttributeError, NotImplementedError, TypeError, ValueError, StrictDataclassError):
        model = make(kind, "meta", tiny=False, **changes)
    try:
        architecture(model)
    except TypeError as error:
        return str(error).removeprefix(f"{type(model).__name__} is not supported: ")
    return None


def check_exact(kind: str, **changes: Any) -> None:
    """Compare generation from a prompt above the window, and from a left-padded batch of it and one below."""
    model = make(kind, "cpu", **changes).double().eval()
    assert sum(weights.numel() for weights in model.parameters()) < 3_000_000
    ids = torch.randint(3, 128, (2, 40))
    real = torch.stack([torch.arange(40) >= 40 - n for n in (40, 9)]).long()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    with reference.Float64Throughout(), torch.no_grad():
        unpruned = model(ids[:1]).logits
        assert_close(masked_logits(model, ids[:1], (), [], 40), unpruned, unpruned)
        for prompt, mask in ((ids[:1], real[:1]), (ids, real)):
            with TokenPruner(SCHEDULE, scorers.Random(1))(model) as trace:
                out = model.generate(prompt, attention_mask=mask, **settings)
            everything = torch.cat([mask, mask.new_ones(len(mask), 5)], dim=1)
            expected = masked_logits(model, out.sequences, SCHEDULE.layers, trace.kept, 40, everything)
            for step, logits in enumerate(out.logits):
                assert_close(logits, expected[:, 39 + step], unpruned)
            if kind not in NOT_IN_REFERENCE:
                ours = reference.masked_logits(model, out.sequences, everything, SCHEDULE.layers, trace.kept, 40)
                assert_close(expected[:, 39:], ours[:, 39:], unpruned)
        assert [kept.shape[1] for kept in trace.kept] == [24, 12]
        # Without an effect of removal, equality would say nothing.
        assert (expected[0, 39] - unpruned[0, -1]).abs().max() > 1e-3 * unpruned.abs().max()


def assert_close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= 1e-9 * scale.abs().max().item()


def outcome(kind: str) -> str:
    """What the table says of a kind."""
    reason = refusal(kind)
    if reason is not None:
        return f"refused: {reason}"
    check_exact(kind)
    default = vars(CONFIG_MAPPING[kind](**OWN.get(kind, {})))
    if default.get("sliding_window", WINDOW) is None:  # the window is a choice there: then no mask is needed either
        check_exact(kind, sliding_window=None)
    return "exact"


def table() -> dict[str, str]:
    """Kind -> what becomes of it."""
    found: dict[str, str] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return found


def test_every_kind_is_in_the_table():
    new, gone = set(KINDS) - set(table()), set(table()) - set(KINDS)
    told = f"transformers {transformers.__version__} has {sorted(new)} besides, and lacks {sorted(gone)}"
    assert not new | gone, f"{told}: write the table anew, as this file's docstring says"
    exact = [kind for kind, what in table().items() if what == "exact"]
    assert len(exact) >= 85


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_refused_with_its_reason_or_exact(kind):
    if kind in OPTIONAL:
        pytest.importorskip(OPTIONAL[kind])
    assert outcome(kind) == table()[kind]


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("falcon", {"alibi": True}, "its ALiBi biases are part of its attention mask"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its attention is bidirectional"),
        ("bart", {"is_encoder_decoder": False}, "its layers take encoder_hidden_states"),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, "it attends to an encoder"),
    ],
)
def test_a_setting_is_refused(kind, changes, reason):
    assert str(refusal(kind, **changes)).startswith(reason)


if __name__ == "__main__":
    known = table()
    made = {kind: known[kind] if kind in OPTIONAL else outcome(kind) for kind in KINDS}
    TABLE.write_text(yaml.safe_dump(made, sort_keys=False, width=200), encoding="utf-8")
