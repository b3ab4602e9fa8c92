"""What a training step's activations cost in memory: measured on this CPU against the formula of docs/training.md.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/memory.py

(The second setting has the C library hand freed tensors back at once, as a GPU's allocator can; else holes count.)
Prints Markdown tables, of what was measured and of what the formula gives for Qwen2-7B and BLOOM-7B on each of 8 GPUs.

Models are Llamas with random weights, four query heads to a key head, and BLOOMs, which keep attention matrices; MLPs
are four times as wide as the hidden states.
`saved` is what the forward pass keeps for the backward pass, each storage counted once and weights left out; `peak` is
how far the resident memory of the process grows in one step of one example, forward and backward, beyond what it held
before: model, scorer, gradients and optimizer state.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdtp.evaluation.memory import PROCESS, peak_memory
from sdtp.pruning.schedule import PruningSchedule
from sdtp.pruning.scorers import Learned
from sdtp.training.backbone import running
from sdtp.training.examples import Example
from sdtp.training.objective import Weights, example_losses
from sdtp.training.optimizer import adamw, flat_gradients
from sdtp.training.policy import MaskingPolicy

RESPONSE = 64
VOCABULARY = 8192
WIDTH = 128
BLOCK = 256  # query rows whose attention matrix the backward pass holds at once
COLUMNS = (
    "family", "layers", "hidden", "tokens", "recomputing",
    "saved, MB", "formula", "ratio", "peak, MB", "formula", "ratio",
)  # fmt: skip

ESTIMATED = ("prompt tokens", "recomputing", "saved", "passing", "scorer", "in all, whole model", "in all, sharded")


@dataclasses.dataclass(frozen=True)
class Costs:
    """The formula, in the symbols of docs/training.md."""

    L: int  # decoder layers
    first: int  # the first stage's
    h: int  # hidden size
    q: int  # query heads times their size
    heads: int
    f: int  # width of the MLPs
    V: int  # vocabulary
    S: int  # stages
    w: int  # width of the scorers
    N: int  # prompt tokens
    R: int  # response tokens
    b: int  # bytes of a number of the model
    recompute: bool
    matrices: int = 0  # attention matrices that a layer keeps: none where scaled_dot_product_attention serves it
    wide: int = 3  # tensors as wide as the MLP that it keeps

    @property
    def T(self) -> int:  # noqa: N802
        """Tokens of the sequence."""
        return self.N + self.R

    def layer(self) -> int:
        """Bytes that one layer keeps for the backward pass."""
        narrow = self.T * (8 * self.h + self.b * (3 * self.q + self.wide * self.f))
        return narrow + self.matrices * self.b * self.heads * self.T**2

    def head(self) -> int:
        """Bytes that the final norm and the loss keep."""
        return 4 * self.T * self.h + 4 * self.R * self.V

    def saved(self) -> int:
        """Bytes that the forward pass keeps."""
        layer = self.b * self.T * self.h if self.recompute else self.layer()
        return (self.L - self.first) * layer + self.S * 4 * self.N * (self.h + 2 * self.w) + self.head()

    def passing(self) -> int:
        """Bytes that the worst moment holds besides."""
        mlp = 3 * self.b * self.T * self.f  # its gradients, and, before it ran or after it is done, what it keeps
        attention = 6 * 4 * (self.T if self.matrices else BLOCK) * self.heads * self.T  # the backward pass
        # While the layers of a stage run: the most beside it is the input of an MLP's last map, which nobody keeps.
        mask = 0 if self.matrices else self.b * self.T * (self.T + self.f)
        logits = 8 * self.R * self.V
        if self.recompute:
            return self.layer() + max(mlp, attention - mlp, mask)
        return max(mlp, attention - mlp, mask, logits)

    def peak(self) -> int:
        """Bytes at the peak of a step, beyond weights, gradients and optimizer."""
        return self.saved() + self.passing()


def costs(family: str, layers: int, hidden: int, tokens: int, recompute: bool) -> Costs:
    """Of a model that is measured."""
    schedule = make_schedule(layers)
    kept = {"llama": {}, "bloom": {"matrices": 2, "wide": 1}}[family]
    return Costs(
        L=layers, first=schedule.layers[0], h=hidden, q=hidden, heads=hidden // 64, f=4 * hidden, V=VOCABULARY,
        S=schedule.stages, w=WIDTH, N=tokens, R=RESPONSE, b=4, recompute=recompute, **kept,
    )  # fmt: skip


def llama(shape: Costs) -> LlamaConfig:
    """Of a model of this shape, its embeddings and head apart."""
    return LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.h,
        intermediate_size=shape.f,
        num_hidden_layers=shape.L,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 4),
        attn_implementation="sdpa",
    )


def make_schedule(layers: int) -> PruningSchedule:
    """Stages before every third layer from layer 1 on."""
    return PruningSchedule.geometric(layers, start=1, step=3, ratio=0.8, sinks=4, local=0.1, min_local=16)


def sharded_weights(whole: float, embeddings: float, layers: int, processes: int) -> tuple[float, float]:
    """Bytes of weights that each process keeps, of a model of `whole` bytes, and those of the layers it gathers."""
    spread = whole - embeddings
    return embeddings + spread / processes, 2 * spread / layers


@dataclasses.dataclass(frozen=True)
class Estimated:
    """A model whose costs are computed and not measured."""

    name: str
    weights: float
    embeddings: float  # of the weights, with the head's
    costs: Costs
    prompts: tuple[int, ...]  # tokens

    def rows(self, gpus: int) -> list[str]:
        """What a step takes on each of several GPUs, in GB, as rows of a table."""
        shape = self.costs
        scorer = 16 * sum(weight.numel() for weight in Learned(shape.h, shape.S, shape.w).parameters())
        whole, embeddings = shape.b * self.weights, shape.b * self.embeddings
        sharded = sum(sharded_weights(whole, embeddings, shape.L, gpus))
        lines = []
        for tokens in self.prompts:
            for recompute in (False, True):
                one = dataclasses.replace(shape, N=tokens, recompute=recompute)
                rest = one.peak() + scorer
                cells = [f"{tokens}", "yes" if recompute else "no"]
                cells += [
                    f"{value / 1e9:.1f}" for value in (one.saved(), one.passing(), scorer, whole + rest, sharded + rest)
                ]
                lines.append("| " + " | ".join(cells) + " |")
        return lines


QWEN2 = Estimated(
    "Qwen2-7B", 7.616e9, 2 * 152064 * 3584,
    Costs(L=28, first=4, h=3584, q=3584, heads=28, f=18944, V=152064, S=8, w=512, N=0, R=512, b=2, recompute=False),
    (1024, 4096, 16384, 32256),
)  # fmt: skip
BLOOM = Estimated(
    "BLOOM-7B", 7.069e9, 250880 * 4096,
    Costs(
        L=30, first=4, h=4096, q=4096, heads=32, f=16384, V=250880, S=9, w=512, N=0, R=256, b=2, recompute=False,
        matrices=2, wide=1,
    ),
    (512, 1792, 32512),
)  # fmt: skip


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int((PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Storages that a forward pass inside keeps, by address, those of `weights` left out."""
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor.detach()  # a result that its own node kept would never go

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


@contextmanager
def training_step(
    model: PreTrainedModel, scorer: Learned, schedule: PruningSchedule, shape: Costs
) -> Iterator[Callable[[], torch.Tensor]]:
    """The loss of one random example, after a step that loads kernels and makes the optimizer's state."""
    policy = MaskingPolicy(schedule, scorer)
    prompt, response = (torch.randint(shape.V, (length,)) for length in (shape.N, shape.R))
    example = Example("one", prompt, response, torch.rand(shape.S, shape.N))
    optimizer, _ = adamw(scorer, 1e-3, 10)
    flat_gradients(scorer)

    def loss() -> torch.Tensor:
        return example_losses(model, policy, example, Weights(ce=1.0, mse=0.0, rank=0.0), (0, 0))["loss"]

    with running(model, shape.first, autocast=False, recompute=shape.recompute):
        loss().backward()
        optimizer.step()
        yield loss


def saved_by(loss: Callable[[], torch.Tensor], model: PreTrainedModel, scorer: Learned) -> int:
    """Bytes that the forward pass of `loss` keeps beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *scorer.parameters()]}
    with saved_bytes(weights) as found:
        kept = loss()  # while it is there, so is what it keeps
    del kept
    return sum(found.values())


def backward(loss: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Resident bytes before a forward and backward pass, and the most in it."""
    with peak_memory(torch.device("cpu")) as peak:
        before = resident()
        loss().backward()
    if peak.bytes is None:
        raise SystemExit("this system does not tell the peak of its resident memory: Linux does")
    return before, peak.bytes


def measure(shape: Costs) -> tuple[int, int]:
    """Bytes saved by a forward pass, and the growth of the resident memory in a step."""
    torch.manual_seed(0)
    schedule = make_schedule(shape.L)
    if shape.matrices:
        config = BloomConfig(vocab_size=VOCABULARY, hidden_size=shape.h, n_layer=shape.L, n_head=shape.heads)
        model = BloomForCausalLM(config)
    else:
        model = LlamaForCausalLM(llama(shape))
    model = model.eval().requires_grad_(False)
    scorer = Learned(shape.h, shape.S, shape.w)
    with training_step(model, scorer, schedule, shape) as loss:
        saved = saved_by(loss, model, scorer)
        before, peak = backward(loss)
    return saved, peak - before


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = ["llama", "bloom"]
    parser.add_argument("--family", nargs="+", choices=families, default=families, help="(default: both)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8], help="decoder layers (default: 4 8)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512], help="hidden sizes (default: 256 512)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="prompt tokens (default: 512 2048)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table there")
    args = parser.parse_args()
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    shapes = itertools.product(args.family, args.layers, args.hidden, args.tokens, (False, True))
    for family, layers, hidden, tokens, recompute in shapes:
        shape = costs(family, layers, hidden, tokens, recompute)
        saved, peak = measure(shape)
        cells = [family, f"{layers}", f"{hidden}", f"{tokens}", "yes" if recompute else "no"]
        for found, expected in ((saved, shape.saved()), (peak, shape.peak())):
            cells += [f"{found / 1e6:.0f}", f"{expected / 1e6:.0f}", f"{found / expected:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    lines += ["", f"{versions}, {torch.get_num_threads()} threads", ""]
    for model in (QWEN2, BLOOM):
        header = ["| " + " | ".join(ESTIMATED) + " |", "|" + "---|" * len(ESTIMATED)]
        lines += [model.name, "", *header, *model.rows(gpus=8), ""]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
