"""The model inside its wrapper: found, or refused by name. Real wrappers throughout; nothing compiled is run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import pipeline

from sdtp.pruning.wrappers import TOKENWISE_ADAPTERS, unwrap


@pytest.fixture
def gloo(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, **settings)


def test_a_bare_model_is_itself(tiny_model):
    model = tiny_model()
    assert unwrap(model) is model


def test_adapters_are_taken_off(tiny_model):
    model = tiny_model()
    wrapped = peft.get_peft_model(model, lora())
    wrapped.add_adapter("second", lora())
    assert unwrap(wrapped) is model
    assert unwrap(wrapped.base_model) is model  # the tuner that a PeftModel holds


def test_mixed_adapters_are_taken_off(tiny_model):
    model = tiny_model()
    wrapped = peft.get_peft_model(model, lora(), mixed=True)
    wrapped.add_adapter("second", peft.LoHaConfig(target_modules=["v_proj"], r=4))
    assert unwrap(wrapped) is model


def test_adapters_inside_the_model_are_looked_at_too(tiny_model):
    model = tiny_model()
    peft.inject_adapter_in_model(lora(), model)
    assert unwrap(model) is model
    peft.inject_adapter_in_model(lora(alora_invocation_tokens=[5, 6]), model, adapter_name="second")
    with pytest.raises(TypeError, match=r"LlamaForCausalLM with adapter 'second' .*activated LoRA"):
        unwrap(model)


def test_distributed_data_parallel_is_taken_off_and_what_is_inside_it_too(tiny_model, gloo):
    model = tiny_model().requires_grad_(True)
    assert unwrap(DistributedDataParallel(model)) is model
    adapted = peft.get_peft_model(model, lora())
    assert unwrap(DistributedDataParallel(adapted)) is model


def test_hooks_of_accelerate_are_no_wrapper(tiny_model):
    model = tiny_model()
    add_hook_to_module(model, ModelHook())
    add_hook_to_module(model.model.layers[1], ModelHook())
    assert unwrap(model) is model


def test_code_that_is_kept_from_the_compiler_is_not_compiled(tiny_model):
    model = tiny_model()
    model.model.norm.forward = torch.compiler.disable(model.model.norm.forward)
    assert unwrap(model) is model


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=3),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(tiny_model, config):
    wrapped = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(TypeError, match=f"PeftModelForCausalLM.*{config.peft_type.value}.*virtual tokens"):
        unwrap(wrapped)


def test_adapters_that_do_not_treat_each_token_by_itself_are_refused(tiny_model):
    lily = peft.get_peft_model(tiny_model(), peft.LilyConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"adapter 'default' of type LILY.*treat each token by itself.*LORA"):
        unwrap(lily)
    activated = peft.get_peft_model(tiny_model(), lora())
    activated.add_adapter("second", lora(alora_invocation_tokens=[5, 6]))
    with pytest.raises(TypeError, match=r"adapter 'second' .*activated LoRA \(alora_invocation_tokens\)"):
        unwrap(activated)


SMALL: dict[str, dict[str, Any]] = {  # what a type of adapter needs to fit a tiny model
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 5]},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 64},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(TOKENWISE_ADAPTERS))
def test_an_adapter_that_is_let_through_treats_each_token_by_itself(tiny_model, kind):
    plain, model = tiny_model(), tiny_model()
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    config = config_class(**{"target_modules": ["q_proj", "v_proj", "down_proj"], **SMALL.get(kind, {})})
    wrapped = peft.get_peft_model(model, config).eval()
    assert unwrap(wrapped) is model
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:  # many start as no change at all
                parameter.add_(0.05 * torch.randn_like(parameter))
        chosen = torch.tensor([0, 3, 4, 9, 11])
        changed = 0
        for name, original in plain.named_modules():
            adapted = model.get_submodule(name)
            if type(adapted) is type(original) or not hasattr(original, "weight"):
                continue
            width = original.weight.shape[-1]
            inputs = torch.arange(24).view(2, 12) if isinstance(original, nn.Embedding) else torch.randn(2, 12, width)
            whole = adapted(inputs)
            changed += not torch.allclose(whole, original(inputs), atol=1e-3)
            torch.testing.assert_close(adapted(inputs[:, chosen]), whole[:, chosen], rtol=1e-5, atol=1e-5)
    assert changed >= 1


def compiled_by_its_own_method(model: Any) -> Any:
    model.compile()
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def compiled_forward_under_a_hook(model: Any) -> Any:
    compiled_forward(model)
    add_hook_to_module(model, ModelHook())
    return model


def compiled_layer(model: Any) -> Any:
    model.model.layers[2].compile()
    return model


def compiled_layer_in_its_place(model: Any) -> Any:
    model.model.layers[2] = torch.compile(model.model.layers[2])
    return model


def compiled_attention(model: Any) -> Any:
    model.model.layers[0].self_attn.forward = torch.compile(model.model.layers[0].self_attn.forward)
    return model


def compiled_under_adapters(model: Any) -> Any:
    return peft.get_peft_model(compiled_layer(model), lora())


def scripted(model: Any) -> Any:
    return torch.jit.trace(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))


def exported(model: Any) -> Any:
    return torch.export.export(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "OptimizedModule": (torch.compile, "OptimizedModule .*compiled code does not run hooks.*_orig_mod"),
    "compile()": (
        compiled_by_its_own_method,
        "LlamaForCausalLM is .*compiled, and compiled code does not run hooks",
    ),
    "forward": (compiled_forward, "LlamaForCausalLM.forward is not .*it is compiled"),
    "forward under a hook": (compiled_forward_under_a_hook, "LlamaForCausalLM.forward is not .*it is compiled"),
    "layer": (compiled_layer, "LlamaForCausalLM.model.layers.2 is not .*it is compiled"),
    "layer in its place": (compiled_layer_in_its_place, "LlamaForCausalLM.model.layers.2 is not .*it is compiled"),
    "attention": (compiled_attention, "LlamaForCausalLM.model.layers.0.self_attn.forward is not .*it is compiled"),
    "inside adapters": (compiled_under_adapters, "LlamaForCausalLM.model.layers.2 is not .*it is compiled"),
    "DataParallel": (nn.DataParallel, "DataParallel is not .*copies the model"),
    "TorchScript": (scripted, "TopLevelTracedModule is not .*TorchScript"),
    "ExportedProgram": (exported, "ExportedProgram is not .*exported"),
    "exported module": (lambda model: exported(model).module(), "GraphModule is not .*exported"),
    "own wrapper": (lambda model: nn.Sequential(model), "Sequential is not .*give the model inside"),
    "no module": (lambda model: "gpt2", "str is not .*a transformers model is needed"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(tiny_model, case):
    wrap, words = REFUSED[case]
    with pytest.raises(TypeError, match=words):
        unwrap(wrap(tiny_model()))


def test_a_pipeline_is_refused_by_name(tiny_model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(TypeError, match="TextGenerationPipeline is not"):
        unwrap(pipeline("text-generation", tiny_model(), tokenizer=tokenizer))


@pytest.mark.filterwarnings("ignore")
def test_sharded_models_are_refused_by_name(tiny_model, gloo):
    whole, layer, first = tiny_model(), tiny_model(), tiny_model().requires_grad_(True)
    fully_shard(whole)
    with pytest.raises(TypeError, match="FSDPLlamaForCausalLM is not supported: its weights are sharded"):
        unwrap(whole)
    fully_shard(layer.model.layers[1])
    with pytest.raises(
        TypeError, match=r"LlamaForCausalLM\.model\.layers\.1 is not supported: its weights are sharded"
    ):
        unwrap(layer)
    first.model.layers[3] = FullyShardedDataParallel(first.model.layers[3], device_id=torch.device("cpu"))
    with pytest.raises(
        TypeError, match=r"LlamaForCausalLM\.model\.layers\.3 is not supported: its weights are sharded"
    ):
        unwrap(first)
    with pytest.raises(TypeError, match="FullyShardedDataParallel is not supported: its weights are sharded"):
        unwrap(FullyShardedDataParallel(tiny_model().requires_grad_(True), device_id=torch.device("cpu")))


@pytest.mark.slow
def test_nothing_but_torch_and_transformers_is_imported():
    program = (
        "import sys; from transformers import LlamaConfig, LlamaForCausalLM; from sdtp.pruning import wrappers;"
        "sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1);"
        "model = LlamaForCausalLM(LlamaConfig(**sizes)); before = set(sys.modules);"
        "assert wrappers.unwrap(model) is model;"
        "print(sorted(set(sys.modules) - before), 'peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
