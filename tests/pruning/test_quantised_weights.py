"""Models whose linear weights torchao or bitsandbytes quantised are pruned as any other."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from sdtp import PruningSchedule, TokenPruner, scorers
from tests.pruning.reference import masked_logits

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)

# Both sides of a comparison round alike where weights alone are quantised. Where activations are too, a rounding error
# of float32 can move one by a step of 8 bits, and LLM.int8 finds the channels that it leaves in 16 bits among all
# tokens that a layer is given, removed ones included.
ROUNDING = 1e-5
STEPS = 12 / 127


def torchao(name, **settings):
    """A config of transformers for weights by a config of torchao."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(getattr(quantization, name)(**settings))


def bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**settings)


CONFIGS = {
    "torchao-int8": (lambda: torchao("Int8WeightOnlyConfig"), ROUNDING),
    "torchao-int4": (lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), ROUNDING),
    "torchao-float8": (lambda: torchao("Float8WeightOnlyConfig"), ROUNDING),
    "torchao-int8-activations": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), STEPS),
    "bitsandbytes-int8": (lambda: bitsandbytes(load_in_8bit=True), STEPS),
    "bitsandbytes-int8-no-outliers": (lambda: bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0), ROUNDING),
    "bitsandbytes-nf4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), ROUNDING),
    "bitsandbytes-fp4": (lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"), ROUNDING),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "tolerance"), CONFIGS.values(), ids=CONFIGS)
def test_every_step_of_a_padded_generation_equals_hidden_keys(tiny_model, tmp_path, make, tolerance):
    config = make()
    plain = tiny_model(hidden_size=64, intermediate_size=128)
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    weight = model.model.layers[2].mlp.up_proj.weight
    assert type(weight.data) is not torch.Tensor or weight.dtype in (torch.int8, torch.uint8)
    ids = torch.randint(3, 128, (2, 40))
    real = torch.stack([torch.ones(40), torch.arange(40) >= 11]).long()
    with torch.no_grad():
        change = (model(ids).logits - plain(ids).logits).abs().max()
    # LastQuery calls a quantised module by itself.
    for scorer in (scorers.Learned(64, SCHEDULE.stages, width=8), scorers.LastQuery(), scorers.Random(1)):
        with TokenPruner(SCHEDULE, scorer)(model) as trace:
            out = model.generate(
                ids, attention_mask=real, max_new_tokens=4, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        everything = torch.cat([real, torch.ones(2, 4, dtype=real.dtype)], dim=1)
        expected = masked_logits(model, out.sequences, everything, SCHEDULE.layers, trace.kept, prompt=40)
        scale = expected.abs().max()
        assert change > 0.01 * scale  # what is compared is a quantised model
        assert [(kept >= 0).sum(1).tolist() for kept in trace.kept] == [[24, 17], [12, 9]]
        assert (torch.stack(out.logits, dim=1) - expected[:, 39:43]).abs().max() <= tolerance * scale
