"""Attention kernels give the same, flash attention gets what it can read, and memory is what the survivors need."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_flex_attn_available

from sdtp import PruningSchedule, TokenPruner, scorers
from sdtp.pruning.layer_inputs import LayerInputs
from sdtp.pruning.prefill import PromptSlots

SCHEDULE = PruningSchedule((1, 3), (0.6, 0.3), sinks=2, local=0.1, min_local=3)


def prompt(*lengths):
    """Token ids padded on the left, and their mask, 1 at real tokens."""
    ids = torch.randint(3, 128, (len(lengths), max(lengths)))
    return ids, torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()


def generation(model, scorer, ids, real, new=6):
    """Survivors of each stage, and logits [rows, steps, vocabulary] of a greedy generation and a turn after it."""
    with TokenPruner(SCHEDULE, scorer)(model) as trace:
        out = model.generate(
            ids, attention_mask=real, max_new_tokens=new, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        turn = ids[:, -3:]
        everything = functional.pad(real, (0, new - 1 + turn.shape[1]), value=1)
        inputs = {"position_ids": (everything.cumsum(1) - 1)[:, -3:]}
        with torch.no_grad():
            later = model(turn, attention_mask=everything, cache=out.cache, **inputs).logits
    return list(trace.kept), torch.cat([torch.stack(out.logits, dim=1), later.to(out.logits[0].dtype)], dim=1)


def assert_same(found, expected, tolerance):
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert (found[1] - expected[1]).abs().max() <= tolerance * expected[1].abs().max()


@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "opt", "mixtral"])
@pytest.mark.parametrize("scorer", [scorers.HiddenNorm(), scorers.Random(3)], ids=lambda s: type(s).__name__)
def test_eager_attention_gives_what_sdpa_gives(tiny_model, family, lengths, scorer):
    ids, real = prompt(*lengths)
    found, expected = (
        generation(tiny_model(family, attention=attention), scorer, ids, real) for attention in ("eager", "sdpa")
    )
    assert_same(found, expected, 1e-5)


@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this torch has no flex attention")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3"])
def test_flex_attention_gives_what_sdpa_gives(tiny_model, family, lengths):
    ids, real = prompt(*lengths)
    scorer = scorers.LastQuery() if family == "llama" else scorers.HiddenNorm()
    expected = generation(tiny_model(family), scorer, ids, real)
    with torch.compiler.set_stance("force_eager"):  # compiling the kernel takes half a minute a shape
        found = generation(tiny_model(family, attention="flex_attention"), scorer, ids, real)
    assert_same(found, expected, 1e-5)


# --- flash attention ---


def flash(module, query, key, value, attention_mask, scaling, sliding_window=None, position_ids=None, **kwargs):
    """What transformers asks of flash attention, slowly: padding by a 2-D mask, windows counted in keys held.

    Position ids are its sign of packed sequences where they are not one after another.
    """
    assert attention_mask is None or attention_mask.shape == (key.shape[0], key.shape[2])
    assert position_ids is None or len(query) > 1 or (position_ids.diff(dim=-1) == 1).all()
    queries = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
    keys = torch.arange(key.shape[2])
    allowed = (keys <= queries)[None]
    if sliding_window is not None:
        allowed = allowed & (queries - keys < sliding_window)
    if attention_mask is not None:
        allowed = (allowed & attention_mask[:, None].bool()) | (keys == queries)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed[:, None], scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_model(tiny_model, monkeypatch):
    """Factory of tiny models with "flash_attention_2" as their attention, which `flash` stands in for."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)

    def make(family, **config):
        model = tiny_model(family, **config)
        model.config._attn_implementation = "flash_attention_2"
        return model

    return make


@pytest.mark.parametrize("lengths", [(40,), (40, 23)], ids=["one", "padded"])
@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("qwen3", {}), ("mistral_window", {"sliding_window": 60})]
)
def test_flash_attention_gets_masks_by_which_it_gives_what_sdpa_gives(tiny_model, flash_model, family, config, lengths):
    ids, real = prompt(*lengths)
    expected = generation(tiny_model(family, **config), scorers.HiddenNorm(), ids, real)
    found = generation(flash_model(family, **config), scorers.HiddenNorm(), ids, real)
    assert_same(found, expected, 1e-5)


def test_flash_attention_with_more_tokens_than_the_window_is_refused(flash_model):
    model = flash_model("mistral_window", sliding_window=43)
    words = r"flash_attention_2 counts a sliding window of 43 in tokens held.* a sequence of 44 tokens .*use sdpa"
    ids, ran = prompt(44)[0], []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model), torch.no_grad():
        with pytest.raises(ValueError, match=words):
            model(ids)
        assert not ran
        handle.remove()
        # While it decodes, too, and the cache it was reached with is as it was.
        cache = model(ids[:, :40]).cache
        for end in (41, 42, 43):
            model(ids[:, end - 1 : end], cache=cache)
        held = [layer.get_seq_length() for layer in cache.layers]
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                model(ids[:, 43:], cache=cache)
            assert [layer.get_seq_length() for layer in cache.layers] == held
    # What nothing is removed from is the kernel's own affair.
    with TokenPruner(SCHEDULE, scorers.HiddenNorm())(model, ratio=1.0), torch.no_grad():
        pruned = model(ids).logits
    with torch.no_grad():
        assert torch.equal(pruned, model(ids).logits)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_masks_are_of_two_dimensions_or_none(tiny_model, implementation):
    config = tiny_model().config
    config._attn_implementation = implementation
    hidden = torch.zeros(2, 5, 32)
    whole = torch.tensor([[0, 1, 7, 8, 9], [0, 2, 3, 8, 9]])
    short = torch.tensor([[0, 1, 7, 8, 9], [-1, -1, 0, 8, 9]])
    slots = PromptSlots(whole, whole, False, 10)
    padded = PromptSlots(short, short, True, 10)
    assert LayerInputs(config).mask(hidden, slots, None, 1, 0, None) is None
    assert LayerInputs(config).mask(hidden, slots, None, 1, 0, 10) is None
    for window in (None, 10):
        mask = LayerInputs(config).mask(hidden, padded, None, 1, 0, window)
        assert mask.tolist() == (short >= 0).tolist()
    for tokens in (slots, padded):
        with pytest.raises(ValueError, match=f"{implementation} counts a sliding window of 9 .* 10 tokens"):
            LayerInputs(config).mask(hidden, tokens, None, 1, 0, 9)


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not (available() and torch.cuda.is_available()), reason=f"{name} needs its package and a GPU"
            ),
        )
        for name, available in [
            ("flash_attention_2", is_flash_attn_2_available),
            ("flash_attention_3", is_flash_attn_3_available),
        ]
    ],
)
def test_flash_attention_gives_what_sdpa_gives(tiny_model, implementation):
    ids, real = (tensor.cuda() for tensor in prompt(40, 23))
    found, expected = (
        generation(
            tiny_model(dtype=torch.float16, attention=name, hidden_size=128).cuda(), scorers.Random(3), ids, real
        )
        for name in (implementation, "sdpa")
    )
    assert_same(found, expected, 4 * torch.finfo(torch.float16).eps)


# --- memory ---


class Memory(TorchDispatchMode):
    """Follows every tensor that operations make inside it.

    Attributes:
        largest: elements of the largest tensor.
        peak: most bytes alive at once, of what was made here.
        sizes: bytes of each storage that is alive.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def count(self, size):
        """Storages of `size` bytes that are alive."""
        return sum(1 for one in self.sizes.values() if one == size)


LONG = {"num_hidden_layers": 8, "max_position_embeddings": 4096}
N = 2048


def generate_long(model, pruner, ids, real):
    """Memory of a prefill of N tokens and three steps."""
    with pruner(model) if pruner else contextlib.nullcontext(), Memory() as memory:
        model.generate(ids, attention_mask=real, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return memory


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "opt"])
def test_no_tensor_grows_with_the_square_of_the_prompt(tiny_model, family):
    """None has as many elements as the last survivors squared, in prefill or decode: no mask, and no scores."""
    window = {"sliding_window": 2 * N} if family == "gemma3" else {}
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 4} if family == "gemma3" else {}
    model = tiny_model(family, **LONG, **window, **layers)
    schedule = PruningSchedule((2, 4), (0.6, 0.4))
    squared = schedule.surviving(N)[-1] ** 2
    ids, real = prompt(N)
    assert generate_long(model, None, ids, real).largest < squared
    for scorer in (scorers.HiddenNorm(), scorers.Learned(32, 2)):
        assert generate_long(model, TokenPruner(schedule, scorer), ids, real).largest < squared


def test_masks_that_are_built_are_noticed(tiny_model):
    model = tiny_model(**LONG)
    pruner = TokenPruner(PruningSchedule((2,), (0.5,)), scorers.HiddenNorm())
    ids, real = prompt(600, 590)
    for one in (None, pruner):
        assert generate_long(model, one, ids, real).largest >= 2 * 600**2


def test_the_peak_of_a_long_prefill_falls_with_the_schedule(tiny_model):
    model = tiny_model(**LONG)
    ids, real = prompt(N)

    def peak(pruner):
        with pruner(model) if pruner else contextlib.nullcontext(), Memory() as memory, torch.no_grad():
            model(ids, attention_mask=real, logits_to_keep=1)
        return memory.peak

    unpruned = peak(None)
    of_ratio = {
        ratio: peak(TokenPruner(PruningSchedule.geometric(8, 1, 1, ratio), scorers.HiddenNorm()))
        for ratio in (1.0, 0.9, 0.5)
    }
    assert of_ratio[1.0] <= 1.02 * unpruned
    assert of_ratio[0.9] < 0.8 * of_ratio[1.0]
    assert of_ratio[0.5] < 0.8 * of_ratio[0.9]


@pytest.mark.parametrize("scorer", [scorers.HiddenNorm(), scorers.LastQuery(), scorers.Learned(32, 1)],
                         ids=lambda s: type(s).__name__)  # fmt: skip
@pytest.mark.parametrize("lengths", [(N,), (N, N - 100)], ids=["one", "padded"])
def test_states_of_removed_tokens_are_freed_after_the_stages_layer(tiny_model, scorer, lengths):
    model = tiny_model(**LONG)
    ids, real = prompt(*lengths)
    size = len(lengths) * N * model.config.hidden_size * 4
    pruner = TokenPruner(PruningSchedule((3,), (0.4,)), scorer)

    def whole_states(pruner):
        """Tensors as large as all tokens' states that are alive when each layer begins."""
        alive = []
        handles = [
            layer.register_forward_pre_hook(lambda module, args: alive.append(memory.count(size)))
            for layer in model.model.layers
        ]
        with pruner(model) if pruner else contextlib.nullcontext(), Memory() as memory, torch.no_grad():
            model(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0), logits_to_keep=1)
        for handle in handles:
            handle.remove()
        return alive

    # The model's loop itself holds on to the embeddings, and to a layer's input until the layer is done.
    assert whole_states(None) == [1, 2, 2, 2, 2, 2, 2, 2]
    assert whole_states(pruner) == [1, 2, 2, 2, 1, 1, 1, 1]
