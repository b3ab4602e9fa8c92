"""Models whose states are larger or smaller than they are made, and the gradients with respect to them the reverse."""

import torch
from transformers import PreTrainedModel


def magnify(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """Multiply what a Llama-like model adds to its residual stream; the model itself, changed."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return model
