"""A model is known again after everything people do to it without changing what it computes, and no other is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from sdtp.pruning.fingerprint import CHANNELS, ROWS, Fingerprint, fingerprint
from tests.conftest import FAMILIES


def trained(tiny_model, seed: int = 3, **settings: Any) -> Any:
    """A tiny model with weights of its own: its norms are no longer all ones."""
    model = tiny_model(**settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def names(taken: Fingerprint) -> set[str]:
    return {sample.name for sample in taken.samples}


def agreement(taken: Fingerprint, model: Any) -> str:
    with pytest.raises(ValueError, match="its weights: ") as caught:
        taken.check(model)
    return str(caught.value)


def test_what_is_taken(tiny_model):
    model = trained(tiny_model)
    taken = fingerprint(model)
    assert dataclasses.astuple(taken)[:4] == ("llama", 32, 4, 128)
    samples = {sample.name: sample for sample in taken.samples}
    norms = [
        f"model.layers.{i}.{norm}.weight" for i in range(4) for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    assert set(samples) == {"model.embed_tokens.weight", "model.norm.weight", *norms}
    norm = model.model.layers[2].input_layernorm.weight
    assert samples["model.layers.2.input_layernorm.weight"].shape == (32,)
    torch.testing.assert_close(
        torch.tensor(samples["model.layers.2.input_layernorm.weight"].values), norm[:CHANNELS], rtol=1e-5, atol=0
    )
    rows = [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 45, 49, 53, 57, 61]  # and on, to the last: 127 * i // 31
    rows += [65, 69, 73, 77, 81, 86, 90, 94, 98, 102, 106, 110, 114, 118, 122, 127]
    assert samples["model.embed_tokens.weight"].shape == (128, 32)
    torch.testing.assert_close(
        torch.tensor(samples["model.embed_tokens.weight"].values).view(ROWS, CHANNELS),
        model.model.embed_tokens.weight[rows, :CHANNELS],
        rtol=1e-5,
        atol=0,
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_models_of_every_family_are_told_apart_and_known_again(tiny_model, family):
    model, same, other = tiny_model(family), tiny_model(family), tiny_model(family)
    taken = fingerprint(model)
    taken.check(same.to(torch.bfloat16))
    assert len(taken.samples) >= 10
    torch.manual_seed(5)
    other.get_input_embeddings().weight.data.normal_(0, 0.2)  # their norms are all ones
    assert float(agreement(taken, other).partition("its weights: ")[2].partition("%")[0]) <= 6


def test_the_error_says_how_many_values_agree(tiny_model):
    model = trained(tiny_model)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data[64:] += 1  # the latter half of the rows
    words = (
        "this LlamaForCausalLM is another model than the pruner was trained for: its weights: 50% of the sampled "
        "values agree, 95% are needed"
    )
    assert agreement(fingerprint(model), other) == words


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"hidden_size": 16}, "its hidden_size is 16, not 32$"),
        ("llama", {"num_hidden_layers": 5}, "its num_layers is 5, not 4$"),
        ("llama", {"vocab_size": 130}, "its vocab_size is 130, not 128$"),
        ("mistral", {}, "its model_type is mistral, not llama$"),
        (
            "qwen2",
            {"vocab_size": 99, "num_hidden_layers": 2},
            "qwen2, not llama; its num_layers is 2, not 4; its voc",
        ),
    ],
)
def test_another_architecture_or_size_is_named(tiny_model, family, settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        fingerprint(tiny_model()).check(tiny_model(family, **settings))
    assert "agree" not in str(caught.value)


@pytest.mark.parametrize("used", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained_in", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_model_is_known_again(tiny_model, trained_in, used):
    taken = fingerprint(trained(tiny_model).to(trained_in))
    taken.check(trained(tiny_model).to(used))
    taken.check(trained(tiny_model).to(torch.float16).to(used))  # rounded twice
    assert taken._agreement(fingerprint(trained(tiny_model).to(torch.float16).to(torch.bfloat16))) == 1.0


def test_small_values_survive_float16(tiny_model):
    model = trained(tiny_model)
    model.model.embed_tokens.weight.data *= 1e-4  # below 6e-5 float16 rounds to multiples of 6e-8
    assert fingerprint(model)._agreement(fingerprint(copy.deepcopy(model).half())) == 1.0


def test_how_far_fine_tuning_may_go(tiny_model):
    model = trained(tiny_model)
    taken = fingerprint(model)

    def scaled(factor: float, part: str) -> Any:
        other = copy.deepcopy(model)
        for name, parameter in other.named_parameters():
            if part in name:
                parameter.data *= factor
        return other

    taken.check(scaled(1.0075, ""))
    taken.check(scaled(2.0, "proj"))  # what merged low-rank updates change
    assert "0% of the sampled" in agreement(taken, scaled(1.009, "embed_tokens"))
    assert "0% of the sampled" in agreement(taken, scaled(1.009, "norm"))


def test_new_special_tokens_in_a_row_or_two_pass(tiny_model):
    model = trained(tiny_model)
    taken = fingerprint(model)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data[127] += 1
    taken.check(other)
    other.model.embed_tokens.weight.data[:9] += 1  # three sampled rows more: 28 of 32 are left
    assert "88% of the sampled" in agreement(taken, other)


def test_norms_cannot_outvote_the_embedding(tiny_model):
    model = tiny_model(num_hidden_layers=200, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    other = copy.deepcopy(model)
    other.model.embed_tokens.weight.data += 1  # 256 values of 3,464
    assert "0% of the sampled" in agreement(fingerprint(model), other)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_quantised_linear_weights_is_known_again(tiny_model):
    torchao = pytest.importorskip("torchao.quantization")
    model = trained(tiny_model)
    taken, quantised = fingerprint(model), copy.deepcopy(model)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    assert type(quantised.model.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
    taken.check(quantised)
    assert fingerprint(quantised) == taken
    agreement(fingerprint(trained(tiny_model, seed=4)), quantised)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_embedding_is_left_out(tiny_model):
    torchao = pytest.importorskip("torchao.quantization")
    model = trained(tiny_model)
    taken = fingerprint(model)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "model.embed_tokens"
    )
    assert type(model.model.embed_tokens.weight.data) is not torch.Tensor
    assert names(taken) - names(fingerprint(model)) == {"model.embed_tokens.weight"}
    taken.check(model)
    agreement(fingerprint(trained(tiny_model, seed=4)), model)  # the norms decide


def on_disk(model: Any, folder: Any) -> Any:
    """The model from its files, read with all weights left on the disk."""
    model.save_pretrained(folder)
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"}
    places |= {"model.rotary_emb": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=folder / "offload")


def saved_again_on_disk(model: Any, folder: Any) -> Any:
    """The model dispatched to a folder of memory-mapped weights."""
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"}
    places |= {"model.rotary_emb": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


def in_memory(model: Any, folder: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


class HoldsNothing(ModelHook):
    weights_map: ClassVar[dict[str, torch.Tensor]] = {}


def in_memory_beside_another_hook(model: Any, folder: Any) -> Any:
    for module in model.modules():
        add_hook_to_module(module, HoldsNothing())
    return in_memory(model, folder)


def whole_layers_at_once(model: Any, folder: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "offload", [on_disk, saved_again_on_disk, in_memory, in_memory_beside_another_hook, whole_layers_at_once]
)
def test_an_offloaded_model_is_known_again(tiny_model, tmp_path, offload, tied):
    taken = fingerprint(trained(tiny_model, tie_word_embeddings=tied))
    offloaded = offload(trained(tiny_model, tie_word_embeddings=tied), tmp_path)
    assert offloaded.model.norm.weight.is_meta
    assert offloaded.model.embed_tokens.weight.is_meta
    assert fingerprint(offloaded) == taken
    taken.check(offloaded)
    agreement(fingerprint(trained(tiny_model, seed=4)), offloaded)
    assert offloaded.model.norm.weight.is_meta  # nothing was brought in by looking


def test_where_no_weight_can_be_read_the_sizes_decide(tiny_model):
    taken = fingerprint(trained(tiny_model))
    with torch.device("meta"):
        taken.check(tiny_model())
        assert fingerprint(tiny_model()).samples == ()
        with pytest.raises(ValueError, match="hidden_size is 16, not 32"):
            taken.check(tiny_model(hidden_size=16))
    fingerprint(tiny_model().to("meta")).check(trained(tiny_model))


def test_shards_are_left_out_and_copies_on_every_rank_are_read(tiny_model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = trained(tiny_model)
        taken = fingerprint(model)

        def place(module: Any, placement: Any) -> None:
            module.weight = torch.nn.Parameter(distribute_tensor(module.weight.data, mesh, [placement]), False)

        place(model.model.embed_tokens, Shard(0))
        place(model.model.layers[0].input_layernorm, Shard(0))
        place(model.model.norm, Replicate())
        left = names(taken) - names(fingerprint(model))
        assert left == {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}
        taken.check(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_local_shard_is_not_taken_for_the_whole_weight(tiny_model):
    taken = fingerprint(trained(tiny_model))
    model = trained(tiny_model)
    embedding = model.model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight.data[64:].clone(), False)  # the second of two ranks
    taken.check(model)


ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "dora": peft.LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "trained embedding": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    "new tokens": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[0, 127]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "tokens alone": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[0, 127]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_model_under_adapters_is_known_again(tiny_model, adapter):
    model = trained(tiny_model)
    taken = fingerprint(model)
    wrapped = peft.get_peft_model(model, ADAPTERS[adapter])
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name or "modules_to_save" in name or "ln_tuning" in name or "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter))
    adapted = fingerprint(wrapped.get_base_model())
    assert names(taken) <= names(adapted)
    assert taken._agreement(adapted) == 1.0
    taken.check(wrapped.get_base_model())
    agreement(fingerprint(trained(tiny_model, seed=4)), wrapped.get_base_model())
    fingerprint(wrapped.get_base_model()).check(trained(tiny_model))


def test_looking_changes_nothing(tiny_model):
    model = trained(tiny_model).requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    fingerprint(model).check(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
