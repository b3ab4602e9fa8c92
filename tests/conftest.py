"""Shared fixtures: fixed seeds and tiny random models."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from xdist.scheduler import LoadFileScheduling

from sdtp.verification.families import EXPERTS, WINDOW
from sdtp.verification.families import SIZES as TINY

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_window": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    # Two rotary tables: theta 10,000 in sliding layers, 1,000,000 in full ones.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,  # both kinds of layer before, between and after stages at 2 and 4
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "phi3_window": (Phi3Config, Phi3ForCausalLM, {"sliding_window": WINDOW}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),  # rotates a quarter of each head
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # learned positions
    "bloom": (BloomConfig, BloomForCausalLM, {"n_layer": 4, "n_head": 4}),  # ALiBi
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, **EXPERTS}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS},
    ),
    # Attention sinks: each head's softmax has one more logit, of no key.
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 8,
            "num_local_experts": 4,
            **EXPERTS,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0, 1, 0]}),  # 0: no positions at all
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
}


# A shell that starts the tests in its background has them ignore Ctrl-C, and every process they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# A test is skipped for want of a GPU, of an optional package or environment, of Slurm, or of the right to mount and to
# make control groups, its reason printed; more skips than that are a fault.
MOST_SKIPPED = 56


CLUSTER = "tests/cluster"  # whose files share one Slurm cluster, of which a machine has one
SLOW = (CLUSTER, "tests/workflow", "tests/faults")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several workers (`-n`) the slow files' come first, that none is left alone with one at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(SLOW))


class OneCluster(LoadFileScheduling):
    """Each worker (`-n`) tests whole files, for what their tests share, and one of them those of the cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return CLUSTER if nodeid.startswith(CLUSTER) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneCluster:
    # Not a mark for `--dist loadgroup`: under pytest 9.2 pytest-xdist 3.8 no longer sees it, and says nothing.
    return OneCluster(config, log)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that skipped too much."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if exitstatus == pytest.ExitCode.OK and skipped > MOST_SKIPPED:
        reporter.write_line(f"{skipped} tests were skipped: at most {MOST_SKIPPED} may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module")
def benchmark_script() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script of `benchmarks` as Python finds it when it runs the file: its folder first on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the order that a process started with OMP_NUM_THREADS=1 has: what is compared with it to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def isolated_randomness() -> Iterator[None]:
    """Every test starts from the same seed and default dtype, whatever ran before it."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random causal LMs: `tiny_model(family="llama", dtype=torch.float32, **config)`, eval mode.

    Families that have the eager kernel alone get that one in place of sdpa.
    """

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **config: Any
    ) -> PreTrainedModel:
        config_class, model_class, extra = FAMILIES[family]
        if attention == "sdpa" and not model_class._supports_sdpa:
            attention = "eager"
        torch.manual_seed(1234)
        model = model_class(config_class(**{**TINY, **extra, **config}, attn_implementation=attention))
        return model.to(dtype).eval().requires_grad_(False)

    return make
