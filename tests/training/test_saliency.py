"""Saliency against an independent autograd reference, and what it must leave alone."""

import collections
import functools
import gc
import hashlib

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sdtp.errors import UserError
from sdtp.training import saliency as implementation
from sdtp.training.saliency import NotFiniteError, batch_saliency, reduce, saliency
from tests.conftest import FAMILIES
from tests.pruning.tiny import float64
from tests.training.magnified import magnify

LAYERS = (1, 2, 3)


def ids(length, seed=0):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


def reference(model, prompt, response, layers, reduction, target):
    """The definition, written apart: full logits, gradients of every layer's input, no hook."""
    embedded = model.get_input_embeddings()(torch.cat([prompt, response])[None]).detach().requires_grad_(True)
    output = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
    for state in output.hidden_states:
        state.retain_grad()
    predicting = output.logits[0, len(prompt) - 1 : -1]
    if target == "loss":
        (-predicting.log_softmax(-1)[torch.arange(len(response)), response].mean()).backward()
    else:
        predicting[torch.arange(len(response)), response].mean().backward()
    rows = []
    for layer in layers:
        state = output.hidden_states[layer]  # entry l is what enters layer l
        product = (state.grad * state.detach())[0, : len(prompt)]
        rows.append(
            {"signed": product.sum(-1), "abs": product.sum(-1).abs(), "l2": product.pow(2).sum(-1).sqrt()}[reduction]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("reduction", ["abs", "signed", "l2"])
@pytest.mark.parametrize("target", ["loss", "logit"])
def test_saliency_is_that_of_an_independent_float64_reference(tiny_model, family, reduction, target):
    model = tiny_model(family, dtype=torch.float64)
    prompt, response = ids(23), ids(5, seed=1)
    expected = reference(model, prompt, response, LAYERS, reduction, target)
    found = saliency(model, prompt, response, LAYERS, reduction, target)
    assert found.shape == (3, 23)
    assert found.dtype == torch.float32
    assert found.grad_fn is None
    assert expected.abs().min(dim=1).values.max() > 0
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-10)


# Prompt and response tokens: above and below the windows' 12, responses longer and shorter than others'.
SIZES = ((23, 5), (31, 1), (7, 3), (30, 2))


def batch_of(sizes=SIZES):
    return [ids(n, seed) for seed, (n, _) in enumerate(sizes)], [ids(m, 50 + seed) for seed, (_, m) in enumerate(sizes)]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_has_the_same_saliency_in_a_batch_as_alone(tiny_model, family):
    model = tiny_model(family, dtype=torch.float64)
    layers = (2, 4) if family == "gemma3" else (1, 3)
    prompts, responses = batch_of()
    with float64():
        together = batch_saliency(model, prompts, responses, layers)
        for prompt, response, found in zip(prompts, responses, together, strict=True):
            alone = saliency(model, prompt, response, layers)
            assert found.shape == (2, len(prompt))
            assert (
                found.dtype == torch.float64
            )  # the mode's: labels are not rounded to float32 before they are compared
            assert (found - alone).abs().max() <= 1e-9 * alone.max()
            assert alone.max() > 1e-4


@pytest.mark.parametrize("target", ["loss", "logit"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "opt", "bloom", "qwen3_moe"])
def test_a_batch_in_float32_gives_what_its_examples_give_alone(tiny_model, family, attention, target):
    model = tiny_model(family, attention=attention)
    prompts, responses = batch_of()
    together = batch_saliency(model, prompts, responses, (1, 3), "signed", target)
    for prompt, response, found in zip(prompts, responses, together, strict=True):
        alone = saliency(model, prompt, response, (1, 3), "signed", target)
        assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit_of_a_batch(tiny_model, family, dtype):
    """Labels of a run that recomputes stand beside those of one that did not, in one shard."""
    model = tiny_model(family, dtype)
    layers = (2, 4) if family == "gemma3" else (1, 3)
    plain = batch_saliency(model, *batch_of(), layers)
    checkpointed = batch_saliency(model, *batch_of(), layers, gradient_checkpointing=True)
    for expected, found in zip(plain, checkpointed, strict=True):
        assert torch.equal(found, expected)
        assert expected.max() > 1e-4


class AliveLogits(TorchDispatchMode):
    """Bytes of tensors as wide as the model's vocabulary that operations made inside the block, while they are held.

    Attributes:
        most: by dtype the most at once since `most` was last set to {}.
    """

    def __init__(self, model):
        super().__init__()
        self.width = model.config.vocab_size
        self.weights = {weight.untyped_storage()._cdata for weight in model.parameters()}  # the head's, transposed
        self.made = {}  # by storage, which views share: a reference that does not keep it, dtype and bytes
        self.most = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = (StorageWeakRef(storage), tensor.dtype, storage.nbytes())
        for dtype, size in self.now().items():
            self.most[dtype] = max(size, self.most.get(dtype, 0))
        return result

    def now(self):
        """Bytes by dtype."""
        self.made = {place: entry for place, entry in self.made.items() if not entry[0].expired()}
        sizes = collections.Counter()
        for _, dtype, size in self.made.values():
            sizes[dtype] += size
        return sizes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", ["loss", "logit"])
def test_logits_of_one_example_at_a_time_are_in_float32(tiny_model, target, checkpointing):
    """What a batch with short prompts and a large vocabulary takes: its logits twice, and one example's in float32."""
    model = tiny_model(dtype=torch.bfloat16, vocab_size=499)  # as wide as nothing else is
    prompts, responses = batch_of(((6, 8), (5, 11), (6, 9), (4, 10)))
    logits = (8 + 11 + 9 + 10) * 499 * 2
    held = []
    with AliveLogits(model) as alive:
        batch_saliency(model, [prompts[1]], [responses[1]], LAYERS, "abs", target, checkpointing)
        alone = alive.most
        alive.most = {}
        model.model.layers[3].register_forward_hook(
            lambda module, args, output: output.register_hook(lambda gradient: held.append(alive.now())) and None
        )
        batch_saliency(model, prompts, responses, LAYERS, "abs", target, checkpointing)
    if target == "loss":
        assert alone[torch.float32] >= 2 * 11 * 499 * 4  # a copy, and its log-softmax
        assert alone[torch.bfloat16] == 2 * 11 * 499 * 2  # logits and gradients: those of one example are not copied
    assert alive.most.get(torch.float32, 0) == alone.get(torch.float32, 0)
    # Logits and their gradients, and one example's before it is among them.
    assert alive.most[torch.bfloat16] <= 2 * logits + 2 * 11 * 499 * 2
    # When the backward pass comes to the layers, nothing but the gradients is left.
    assert held == [{torch.bfloat16: logits}]


def test_a_batch_is_one_forward_without_a_mask_and_logits_of_response_tokens_only(tiny_model):
    model = tiny_model()
    calls, masks, states = [], [], []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]) or calls.append(args[0].shape),
        with_kwargs=True,
    )
    model.lm_head.register_forward_hook(lambda module, args, output: states.append(output.shape))
    batch_saliency(model, *batch_of(), LAYERS)
    assert calls == [(4, 31, 32)]  # the longest has 31 + 1 - 1 tokens
    assert masks == [None]
    assert states == [(1, 5 + 1 + 3 + 2, 128)]


def test_one_example_that_is_not_finite_is_named_by_its_row_and_stage(tiny_model):
    model = tiny_model()
    prompts, responses = batch_of()

    def overflow(module, args, output):
        # Row 2's states alone, on their way back through layer 1: what enters layer 1 is stage 0, layer 3 is sound.
        output.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), torch.inf))

    model.model.layers[1].register_forward_hook(overflow)
    with pytest.raises(NotFiniteError, match=r"saliency of layer 1 \(stage 0\) is not finite") as caught:
        batch_saliency(model, prompts, responses, (1, 3))
    assert caught.value.row == 2


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_frequencies_that_follow_the_longest_row_take_rows_of_one_length_only(tiny_model, kind):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 24}
    model = tiny_model("llama", max_position_embeddings=48, rope_parameters=scaling)
    with pytest.raises(UserError, match=r"rows of 9 to 32 tokens: the rotary frequencies of LlamaForCausalLM follow"):
        batch_saliency(model, *batch_of(((23, 5), (30, 3), (7, 3))), LAYERS)
    prompts, responses = batch_of(((28, 5), (30, 3)))
    together = batch_saliency(model, prompts, responses, LAYERS)
    for prompt, response, found in zip(prompts, responses, together, strict=True):
        torch.testing.assert_close(found, saliency(model, prompt, response, LAYERS), rtol=1e-4, atol=1e-6)


def test_states_entering_a_layer_are_the_same_tensor_in_hooks_and_in_hidden_states(tiny_model):
    model = tiny_model()
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: seen.__setitem__(index, args[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    output = model(ids(9)[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    for index in range(4):
        torch.testing.assert_close(seen[index], output.hidden_states[index], rtol=0, atol=0)
    # The last entry is past the final norm: no stage reads it.
    torch.testing.assert_close(model.lm_head(output.hidden_states[4]), output.logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_checkpointing_changes_nothing(tiny_model, family):
    model = tiny_model(family, attention_dropout=0.5)
    prompt, response = ids(23), ids(5, seed=1)
    plain = saliency(model, prompt, response, LAYERS)
    checkpointed = saliency(model, prompt, response, LAYERS, gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-5)
    assert (plain.sum(1) > 0.01).all()
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_a_layer_that_has_a_forward_of_its_own_keeps_it(tiny_model):
    model = tiny_model()
    layer, calls = model.model.layers[2], []
    plain = saliency(model, ids(23), ids(5), LAYERS)
    original = layer.forward

    @functools.wraps(original)  # as accelerate does for a model on several devices
    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = own
    torch.testing.assert_close(saliency(model, ids(23), ids(5), LAYERS, gradient_checkpointing=True), plain)
    assert layer.forward is own
    assert len(calls) == 2  # once forward, once again for the backward pass


def test_checkpointing_recomputes_the_layers(tiny_model):
    model = tiny_model()
    calls = []
    model.model.layers[2].self_attn.register_forward_hook(lambda *_: calls.append(1))
    saliency(model, ids(8), ids(2), LAYERS)
    assert len(calls) == 1
    saliency(model, ids(8), ids(2), LAYERS, gradient_checkpointing=True)
    assert len(calls) == 3
    assert not model(ids(8)[None]).logits.requires_grad  # transformers' switch would leave a hook on the embeddings


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_an_error_not_zeros(tiny_model, checkpointing):
    with torch.no_grad(), pytest.raises(RuntimeError, match="no gradient reaches"):
        saliency(tiny_model(), ids(8), ids(2), LAYERS, gradient_checkpointing=checkpointing)


def test_a_detached_layer_is_named(tiny_model):
    model = tiny_model()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(RuntimeError, match="no gradient reaches"):
        saliency(model, ids(8), ids(2), (1, 2))


def test_non_finite_saliency_names_the_stage(tiny_model):
    model = tiny_model()
    # Layer 2's input overflows in the backward pass only: the forward pass is sound.
    model.model.layers[1].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient * torch.inf) and None
    )
    with pytest.raises(RuntimeError, match=r"layer [12] \(stage [01]\) is not finite"):
        saliency(model, ids(8), ids(2), (1, 2))


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("signed", [0.0, 1.0, -2.0]), ("abs", [0.0, 1.0, 2.0]), ("l2", [18**0.5, 1.0, 2.0])],
)
def test_reductions_sum_with_signs_or_take_a_norm(reduction, expected):
    product = torch.tensor([[3.0, -3.0], [1.0, 0.0], [-2.0, 0.0]])
    gradient = torch.tensor([[1.5, -1.5], [0.5, 1.0], [2.0, 7.0]])
    hidden = product / gradient
    torch.testing.assert_close(reduce(gradient, hidden, reduction), torch.tensor(expected))
    # Gradient times input, not the gradient alone.
    torch.testing.assert_close(reduce(gradient, 2 * hidden, reduction), 2 * torch.tensor(expected))


def test_reduction_of_bfloat16_is_summed_in_float32():
    gradient = torch.ones(1, 4096, dtype=torch.bfloat16)
    hidden = torch.full((1, 4096), 1.0078125, dtype=torch.bfloat16)
    assert reduce(gradient, hidden, "signed").item() == 4096 * 1.0078125


# Large states have small gradients, most of all of a long response: unscaled they leave float16 a digit and a half.
# Small ones have large gradients, which overflow as soon as they are scaled.
@pytest.mark.parametrize(("states", "response"), [(4096, 64), (1, 8), (1 / 512, 1)])
def test_float16_keeps_the_digits_it_has(tiny_model, states, response):
    model = magnify(tiny_model(initializer_range=0.02), states)
    expected = saliency(model, ids(60), ids(response, seed=1), LAYERS, "l2")
    found = saliency(model.half(), ids(60), ids(response, seed=1), LAYERS, "l2")
    assert ((found - expected).abs() / expected).median() < 0.005


def test_a_row_that_overflows_float16_takes_no_digits_from_the_others(tiny_model):
    """Each row is scaled as it is alone: one that cannot be scaled at all, beside one that has to be."""
    model = tiny_model(initializer_range=0.02).half()
    prompts, responses = [ids(60), ids(60)], [ids(64, seed=1), ids(64, seed=1)]

    def overflow(module, args, output):
        # Whatever the loss is multiplied by above 2^6 leaves float16's range in the last row.
        output.register_hook(lambda gradient: torch.cat([gradient[:1], gradient[1:] * 2**11]))

    alone = batch_saliency(model, prompts[:1], responses[:1], LAYERS, "l2")[0]
    hook = model.model.layers[LAYERS[-1]].register_forward_hook(
        lambda module, args, output: overflow(module, args, output) if len(output) > 1 else None
    )
    forwards = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])))
    together = batch_saliency(model, prompts, responses, LAYERS, "l2")[0]
    hook.remove()
    assert forwards[0] == 2
    assert set(forwards[1:]) == {1}  # the other row, at the next scale
    assert ((together - alone).abs() / alone).median() < 1e-3


def weights_hash(model):
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_fifty_samples_leave_no_gradient_graph_or_tensor_behind(tiny_model, rows, checkpointing):
    model = tiny_model().requires_grad_(True)  # saliency freezes it for the while, and thaws it again
    before = weights_hash(model)
    live = []
    for example in range(50):
        prompts = [ids(64 - row, example) for row in range(rows)]
        responses = [ids(4, example)] * rows
        result = batch_saliency(model, prompts, responses, LAYERS, gradient_checkpointing=checkpointing)
        assert not any(label.requires_grad or label.grad_fn is not None for label in result)
        assert all(parameter.grad is None for parameter in model.parameters())
        del result
        if example in (1, 49):
            gc.collect()
            live.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert live[0] == live[1]
    assert weights_hash(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_pass_serves_all_stages_and_keeps_no_gradient_of_them(tiny_model, checkpointing, monkeypatch):
    model = tiny_model()
    layers = (0, 1, 2, 3)
    passed, kept = [], []

    def count(layer):
        def hook(module, args):
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: passed.append(layer))

        return hook

    def counting(gradient, hidden, reduction):
        gc.collect()
        things = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        kept.append(sum(thing.shape[-2:] == hidden.shape[-2:] for thing in things))
        return reduce(gradient, hidden, reduction)

    monkeypatch.setattr(implementation, "reduce", counting)
    for layer in layers:
        model.model.layers[layer].register_forward_pre_hook(count(layer))
    saliency(model, ids(60), ids(1), layers, gradient_checkpointing=checkpointing)
    assert passed == [3, 2, 1]  # of layer 0 the states are this computation's own, made after the hook
    # Each stage's gradient as its turn comes; none of those before it.
    assert len(kept) == 4
    assert max(kept) == kept[0]


def test_layers_below_the_first_stage_are_not_on_the_graph(tiny_model):
    model = tiny_model().requires_grad_(True)
    tracked = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: tracked.append(output.requires_grad))
    for checkpointing in (False, True):
        saliency(model, ids(8), ids(2), (2, 3), gradient_checkpointing=checkpointing)
        assert tracked == [False, False, True, True]
        tracked.clear()


def test_model_is_left_as_it_was_after_an_error(tiny_model):
    model = tiny_model().requires_grad_(True)
    with pytest.raises(IndexError):
        saliency(model, torch.tensor([1, 2, 4000]), ids(2), LAYERS, gradient_checkpointing=True)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "saliency.reduction is 'max': one of abs, signed, l2"),
        ({"target": "kl"}, "saliency.target is 'kl': one of loss, logit"),
        ({"response_ids": torch.tensor([], dtype=torch.long)}, r"response_ids has shape \(0,\)"),
        ({"layers": (3, 1)}, r"layers is \[3, 1\]: ascending layers from 0 to 3"),
        ({"layers": (1, 4)}, r"layers is \[1, 4\]"),
        ({"prompt_ids": ids(8)[None]}, r"prompt_ids has shape \(1, 8\)"),
    ],
)
def test_wrong_arguments_are_named(tiny_model, change, message):
    arguments = {"prompt_ids": ids(8), "response_ids": ids(2), "layers": LAYERS, **change}
    with pytest.raises(UserError, match=message):
        saliency(tiny_model(), **arguments)


def test_training_mode_is_refused(tiny_model):
    with pytest.raises(UserError, match="training mode"):
        saliency(tiny_model().train(), ids(8), ids(2), LAYERS)


def test_as_many_responses_as_prompts_are_needed(tiny_model):
    with pytest.raises(UserError, match="2 prompts, 1 responses"):
        batch_saliency(tiny_model(), [ids(8), ids(9)], [ids(2)], LAYERS)
    with pytest.raises(UserError, match="0 prompts, 0 responses"):
        batch_saliency(tiny_model(), [], [], LAYERS)
