"""Finds the transformers model inside what people wrap around one, or says why it cannot be pruned there.

Wrappers are known by their classes' names: peft and the distributed packages need not be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Adapters of PEFT under which every module still maps each token by itself, so that a layer gives a survivor what it
# would give it among all tokens. Left out are virtual tokens, and adapters that mix tokens or keep a state for each.
# fmt: off
TOKENWISE_ADAPTERS = frozenset((
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA",
    "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
))
# fmt: on

_UNSEEN = "compiled code does not run hooks that are registered later"
_SHARDED = "its weights are sharded by FSDP: load the model unsharded"


def unwrap(model: Any) -> nn.Module:
    """The transformers model itself, out of DistributedDataParallel and PEFT, however nested.

    Raises:
        TypeError: the model cannot be pruned inside its wrapper, named with the reason, or there is no transformers
            model.
    """
    while not _is_a(model, "PreTrainedModel", "transformers"):  # whose import takes seconds
        model = _inside(model)
    _refuse_adapters(model, getattr(model, "peft_config", None))
    _refuse_parts(model)
    return model


def _inside(wrapper: Any) -> Any:
    """What a wrapper holds.

    Raises:
        TypeError: it is none, or one that is refused.
    """
    name = type(wrapper).__name__
    if isinstance(wrapper, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise _refusal(name, "TorchScript runs no hooks: prune the model it was made from")
    if isinstance(wrapper, (torch.export.ExportedProgram, torch.fx.GraphModule)):
        raise _refusal(name, "an exported graph has no layers to hook: prune the model it was exported from")
    if _is_a(wrapper, "OptimizedModule", "torch"):
        raise _refusal(name, f"{_UNSEEN}: prune and call the uncompiled module, which it keeps as _orig_mod")
    if isinstance(wrapper, nn.DataParallel):
        raise _refusal(name, "it copies the model at every forward: prune its .module, on one device")
    if _is_sharded(wrapper):
        raise _refusal(name, _SHARDED)
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return wrapper.module
    if _is_a(wrapper, "PeftModel", "peft") or _is_a(wrapper, "PeftMixedModel", "peft"):
        _refuse_adapters(wrapper, wrapper.peft_config)
        return wrapper.base_model
    if _is_a(wrapper, "BaseTuner", "peft"):  # what a PeftModel holds: LoraModel and its like
        _refuse_adapters(wrapper, wrapper.peft_config)
        return wrapper.model
    if isinstance(wrapper, nn.Module):
        raise _refusal(name, "it is no transformers model and no wrapper known here: give the model inside it")
    raise _refusal(name, "a transformers model is needed")


def _refuse_adapters(model: Any, configs: dict[str, Any] | None) -> None:
    for adapter, config in (configs or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        named = f"{type(model).__name__} with adapter {adapter!r} of type {kind}"
        if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
            raise _refusal(named, "it feeds virtual tokens, which are no prompt tokens")
        if getattr(config, "alora_invocation_tokens", None) is not None:
            raise _refusal(named, "an activated LoRA (alora_invocation_tokens) counts tokens from the prompt's end")
        if kind not in TOKENWISE_ADAPTERS:
            accepted = ", ".join(sorted(TOKENWISE_ADAPTERS))
            raise _refusal(named, f"adapters known to treat each token by itself are supported: {accepted}")


def _refuse_parts(model: nn.Module) -> None:
    """Raise TypeError for a module, the model or one inside it, that runs no hooks or is sharded."""
    for path, module in model.named_modules():
        named = f"{type(model).__name__}.{path}".rstrip(".")
        if module._compiled_call_impl is not None or _is_a(module, "OptimizedModule", "torch"):
            raise _refusal(named, f"it is compiled, and {_UNSEEN}: prune a model that is not")
        if _is_compiled(vars(module).get("forward", type(module).forward)):
            raise _refusal(f"{named}.forward", f"it is compiled, and {_UNSEEN}: prune a model that is not")
        if _is_sharded(module):
            raise _refusal(named, _SHARDED)


def _is_compiled(function: Any) -> bool:
    """Whether a function, or one that it wraps (as the hooks of accelerate do), came from torch.compile."""
    while function is not None:
        if hasattr(function, "_torchdynamo_orig_callable") and not hasattr(function, "_torchdynamo_disable"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _is_sharded(module: Any) -> bool:
    """Whether a module is under FSDP, the first (a wrapper) or the second (another class put in place of its own)."""
    return _is_a(module, "FullyShardedDataParallel", "torch") or _is_a(module, "FSDPModule", "torch")


def _is_a(value: Any, name: str, package: str) -> bool:
    """Whether a class of this name from a top-level package is among the classes of `value`."""
    return any(cls.__name__ == name and cls.__module__.partition(".")[0] == package for cls in type(value).__mro__)


def _refusal(name: str, reason: str) -> TypeError:
    return TypeError(f"{name} is not supported: {reason}")
