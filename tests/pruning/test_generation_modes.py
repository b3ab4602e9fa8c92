"""Ways of generating: under a pruner each gives what transformers' own `generate` gives on the hard-masked model.

The reference is `generate` itself, on a model that is fed the whole sequence at every step and whose forward is
`masked_logits` with the trace's survivors: every logit, score, token and beam is compared, and the same seed draws the
same tokens.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdtp import TokenPruner, scorers
from tests.pruning.reference import additive, masked_logits, rewritten, visible_keys
from tests.pruning.tiny import assert_close, float64, prompt, schedule_for

FAMILIES = ["llama", "gemma3", "bloom"]
OUTPUTS = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def hard_masked(model, schedule, kept, columns):
    """A model for `generate` that runs the unpruned one over the whole sequence, removed prompt tokens hidden."""
    stand_in = copy.deepcopy(model)

    def forward(input_ids=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return CausalLMOutputWithPast(
            logits=masked_logits(model, input_ids, real, schedule.layers, kept, columns)[:, -logits_to_keep:]
        )

    stand_in.forward = forward
    return stand_in


def run(model, family, ids, real, seed=0, scorer=None, inputs=None, **settings):
    """What the pruned model generates, from `inputs` as well; what the reference does from the ids; the trace."""
    schedule = schedule_for(family)
    settings = {**OUTPUTS, **settings}
    with float64():
        torch.manual_seed(seed)
        with TokenPruner(schedule, scorer or scorers.Random(4))(model) as trace:
            found = model.generate(ids, attention_mask=real, **(inputs or {}), **settings)
        torch.manual_seed(seed)
        stand_in = hard_masked(model, schedule, trace.kept, ids.shape[1])
        expected = stand_in.generate(ids, attention_mask=real, **{**settings, "use_cache": False})
    assert trace.kept[-1].shape[1] == schedule.surviving(ids.shape[1])[-1] < ids.shape[1]
    return found, expected, trace


def assert_same(found, expected):
    """Every field of the two outputs of `generate`."""
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("logits", "scores"):
        steps = list(zip(getattr(found, name), getattr(expected, name), strict=True))
        assert steps
        for one, other in steps:
            assert one.dtype == torch.float64
            assert_close(one, other)
    if getattr(expected, "beam_indices", None) is not None:
        assert torch.equal(found.beam_indices, expected.beam_indices)
        assert_close(found.sequences_scores, expected.sequences_scores)


def letter(token):
    """The text of a token; letters that other tokenizers of the same text may number otherwise."""
    return "abcdefghijklmnopqrstuvwxyz"[token - 4] if token < 30 else chr(0x400 + token)


def text(ids):
    return "".join(map(letter, ids))


def letters(size=128):
    """A tokenizer of one letter a token; the first four are padding, begin, end and unknown."""
    special = ["[pad]", "[begin]", "[end]", "[unknown]"]
    vocabulary = {name: i for i, name in enumerate([*special, *map(letter, range(4, size))])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=special[0], bos_token=special[1], eos_token=special[2], unk_token=special[3],
        padding_side="left",
    )  # fmt: skip


# Settings of `generate` that must mean what they mean without a pruner. No token ends a sequence unless a mode says so.
MODES = {
    "greedy": {"max_new_tokens": 8},
    "max_length": {"max_length": 46, "min_length": 44, "eos_token_id": list(range(3, 60))},
    "sampling": {"do_sample": True, "max_new_tokens": 12},
    "warped sampling": {
        "do_sample": True, "temperature": 0.8, "top_k": 60, "top_p": 0.95, "min_p": 0.001, "typical_p": 0.95,
        "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "top_h": 0.9, "renormalize_logits": True, "max_new_tokens": 12,
    },
    "several samples": {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "length_penalty": 0.5},
    "beams that end": {
        "num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "eos_token_id": list(range(3, 12)),
        "early_stopping": True, "pad_token_id": 0,
    },
    "beam sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8},
    "rows that end": {"max_new_tokens": 12, "eos_token_id": list(range(3, 24)), "pad_token_id": 0},
    "repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "max_new_tokens": 10},
    "prompt as encoder input": {
        "encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2, "max_new_tokens": 10,
    },
    "lengths": {
        "min_new_tokens": 6, "max_new_tokens": 10, "eos_token_id": list(range(3, 60)), "forced_eos_token_id": 3,
        "exponential_decay_length_penalty": (7, 1.5), "pad_token_id": 0,
    },
    "words": {
        "bad_words_ids": [[5], [7, 9]], "suppress_tokens": list(range(60, 90)), "begin_suppress_tokens": [11, 12],
        "sequence_bias": {(20,): 2.0, (21, 22): 4.0}, "forced_bos_token_id": 9, "remove_invalid_values": True,
        "max_new_tokens": 10,
    },
    "watermark": {
        "watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="selfhash", context_width=2),
        "do_sample": True, "max_new_tokens": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        *(("llama", mode) for mode in MODES),
        *((family, mode) for family in ("gemma3", "bloom") for mode in ("sampling", "beams that end", "rows that end")),
    ],
)
def test_a_padded_batch_gives_what_generate_gives_on_the_masked_model(tiny_model, family, mode):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(40, 23)
    found, expected, _ = run(model, family, ids, real, **{"eos_token_id": None, **MODES[mode]})
    assert_same(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_as_long_as_each_other_with_more_protected_in_one(tiny_model, family, attention):
    """Later layers then hold padding where the first has none."""
    model = tiny_model(family, torch.float64, attention)
    ids, real = prompt(40, 40)
    protect = torch.zeros(2, 40, dtype=torch.bool)
    protect[0, 3:38] = True
    schedule = schedule_for(family)
    with float64(), torch.no_grad():
        with TokenPruner(schedule, scorers.Random(0))(model, protect=protect) as trace:
            out = model.generate(ids, attention_mask=real, max_new_tokens=4, eos_token_id=None, **OUTPUTS)
        assert len({int((row >= 0).sum()) for row in trace.kept[-1]}) == 2
        everything = torch.ones_like(out.sequences)
        expected = masked_logits(model, out.sequences, everything, schedule.layers, trace.kept, 40)
        held = [layer.get_seq_length() for layer in out.cache.layers]
        with pytest.raises(RuntimeError, match="got 1 tokens for 2 rows outside a pruner's context"):
            model(out.sequences[:, -1:], attention_mask=everything, cache=out.cache)
        assert [layer.get_seq_length() for layer in out.cache.layers] == held
    for step, logits in enumerate(out.logits):
        assert_close(logits, expected[:, 39 + step])


def test_rows_end_at_different_steps_and_are_filled_with_padding(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    free, *_ = run(model, "llama", ids, real, max_new_tokens=8, eos_token_id=None)
    ends = [free.sequences[0, 42].item(), free.sequences[1, 45].item()]
    found, expected, _ = run(model, "llama", ids, real, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert_same(found, expected)
    stops = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free.sequences[:, 40:]]
    assert stops[0] < stops[1]
    for row, stop in enumerate(stops):
        assert torch.equal(found.sequences[row, : 41 + stop], free.sequences[row, : 41 + stop])
    assert found.sequences.shape[1] == 41 + stops[1]
    assert (found.sequences[0, 41 + stops[0] :] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_share_their_row_s_survivors_and_score_by_the_reference(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(40, 23)
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "length_penalty": 0.5}
    found, _, trace = run(model, family, ids, real, scorer=scorers.HiddenNorm(), eos_token_id=None, **settings)
    for kept in trace.kept:
        assert all(torch.equal(kept[row], kept[3 * (row // 3)]) for row in range(6))
    everything = torch.cat([real.repeat_interleave(3, dim=0), torch.ones(6, 6, dtype=real.dtype)], dim=1)
    with float64():
        logits = masked_logits(model, found.sequences, everything, schedule_for(family).layers, trace.kept, prompt=40)
    chosen = logits[:, 39:-1].log_softmax(-1).gather(2, found.sequences[:, 40:, None])[..., 0]
    assert_close(found.sequences_scores, chosen.sum(1) / 6**0.5)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 6


# --- candidates: they are not prompt, whoever makes them ---


def forwards(model):
    """Counts the forward passes of a model from now on."""
    counted = []
    model.register_forward_pre_hook(lambda module, args: counted.append(module))
    return counted


def assisted(model, family, ids, real, assistant, **settings):
    """The pruned model's output with an assistant, the reference's logits for its tokens, and the trace."""
    schedule = schedule_for(family)
    with float64():
        torch.manual_seed(2)
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            found = model.generate(
                ids, attention_mask=real, assistant_model=assistant, eos_token_id=None, **{**OUTPUTS, **settings}
            )
        new = found.sequences.shape[1] - ids.shape[1]
        everything = torch.cat([real, torch.ones(1, new, dtype=real.dtype)], dim=1)
        expected = masked_logits(model, found.sequences, everything, schedule.layers, trace.kept, ids.shape[1])
    assert [kept.shape[1] for kept in trace.kept] == schedule.surviving(int(real.sum()))
    return found, expected[:, ids.shape[1] - 1 : -1], trace


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft", ["one layer", "the same weights", "itself"])
def test_assisted_decoding_is_greedy(tiny_model, family, draft):
    model = tiny_model(family, torch.float64)
    types = {"layer_types": ["sliding_attention"]} if family == "gemma3" else {}
    layers = "n_layer" if family == "bloom" else "num_hidden_layers"
    drafts = {
        "one layer": lambda: tiny_model(family, torch.float64, **{layers: 1}, **types),
        "the same weights": lambda: copy.deepcopy(model),
        "itself": lambda: model,
    }
    assistant = drafts[draft]()
    assistant.generation_config.num_assistant_tokens = 4
    ids, real = prompt(40)
    greedy, _, plain = run(model, family, ids, real, max_new_tokens=14, eos_token_id=None)
    counted = forwards(model)
    found, expected, trace = assisted(model, family, ids, real, assistant, max_new_tokens=14)
    assert torch.equal(found.sequences, greedy.sequences)
    assert all(torch.equal(a, b) for a, b in zip(trace.kept, plain.kept, strict=True))
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, step])
    if draft == "itself":  # every candidate is right: 4 drafted and 1 checked for 5 tokens, 3 times
        assert len(counted) <= 14 + 3


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("weight", [None, 0.5])
def test_assisted_sampling_takes_the_reference_s_logits(tiny_model, padding, weight):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40)
    real[:, :padding] = 0
    settings = {"do_sample": True, "max_new_tokens": 14, "assistant_ensemble_weight": weight}
    found, expected, _ = assisted(model, "llama", ids, real, copy.deepcopy(model), **settings)
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, step])


def test_an_assistant_with_a_pruner_of_its_own(tiny_model):
    model, assistant = tiny_model(dtype=torch.float64), tiny_model("gemma3", torch.float64)
    ids, real = prompt(40)
    greedy, *_ = run(model, "llama", ids, real, max_new_tokens=14, eos_token_id=None)
    with TokenPruner(schedule_for("gemma3"), scorers.HiddenNorm())(assistant) as trace:
        found, expected, _ = assisted(model, "llama", ids, real, assistant, max_new_tokens=14)
    assert torch.equal(found.sequences, greedy.sequences)
    assert [kept.shape[1] for kept in trace.kept] == [24, 12]
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, step])


def test_an_assistant_may_take_back_the_last_prompt_token(tiny_model):
    # So transformers does when the first candidate was wrong: the token comes again, and must be what it was.
    model = tiny_model(dtype=torch.float64)
    ids, _ = prompt(40)
    drafting = GenerationConfig(is_assistant=True, max_new_tokens=1, **OUTPUTS)
    with float64(), torch.no_grad(), TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        out = model.generate(ids, generation_config=drafting)
        with pytest.raises(ValueError, match="reaches into the pruned prompt"):
            out.cache.crop(-2)
        out.cache.crop(-1)
        assert [layer.get_seq_length() for layer in out.cache.layers] == [39, 23, 23, 11]
        again = model(ids[:, -1:], cache=out.cache).logits[:, -1]
    assert_close(again, out.logits[0])


def test_an_assistant_with_another_tokenizer(tiny_model):
    model, assistant = tiny_model(dtype=torch.float64), tiny_model("qwen2", torch.float64, vocab_size=160)
    ids, real = prompt(40)
    greedy, *_ = run(model, "llama", ids, real, max_new_tokens=8, eos_token_id=None)
    found, expected, _ = assisted(
        model, "llama", ids, real, assistant, max_new_tokens=8, tokenizer=letters(),
        assistant_tokenizer=letters(160), assistant_lookbehind=5, target_lookbehind=5,
    )  # fmt: skip
    assert torch.equal(found.sequences, greedy.sequences)
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, step])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_with_processors_is_greedy_with_them(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids = torch.randint(3, 128, (1, 10)).repeat(1, 4)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": 0.5}  # repeats more: candidates hold
    found, expected, _ = run(model, family, ids, torch.ones_like(ids), **settings)
    assert_same(found, expected)
    counted = forwards(model)
    schedule = schedule_for(family)
    with float64(), TokenPruner(schedule, scorers.Random(4))(model):
        lookup = model.generate(ids, prompt_lookup_num_tokens=4, max_matching_ngram_size=3, **OUTPUTS, **settings)
    assert_same(lookup, expected)
    assert len(counted) < 12


# --- what callers hook into generate ---


class Banned(LogitsProcessor):
    """No token twice, prompt included."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


class Repeats(StoppingCriteria):
    """Ends rows whose last token is of a set, each by itself."""

    def __init__(self, tokens):
        self.tokens, self.shapes = torch.tensor(tokens), []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append((tuple(input_ids.shape), len(scores)))
        return torch.isin(input_ids[:, -1], self.tokens)


def test_processors_and_stopping_criteria_see_the_whole_prompt(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    free, *_ = run(model, "llama", ids, real, max_new_tokens=8, eos_token_id=None, logits_processor=[Banned()])
    criterion = Repeats(free.sequences[:, 45].tolist())
    found, expected, _ = run(
        model, "llama", ids, real, max_new_tokens=8, eos_token_id=None, logits_processor=[Banned()],
        stopping_criteria=[criterion], prefix_allowed_tokens_fn=lambda row, ids: list(range(10 + row, 128)),
    )  # fmt: skip
    assert_same(found, expected)
    assert criterion.shapes[0] == ((2, 41), 1)
    for row, used in zip(found.sequences[:, 40:], ids, strict=True):
        assert not torch.isin(row, used).any()


def test_stop_strings_and_no_time_left(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40)
    free, *_ = run(model, "llama", ids, real, max_new_tokens=8, eos_token_id=None)
    word = text(free.sequences[0, 43:44].tolist())
    settings = {"max_new_tokens": 8, "eos_token_id": None, "tokenizer": letters()}
    found, expected, _ = run(model, "llama", ids, real, stop_strings=[word], **settings)
    assert_same(found, expected)
    first = free.sequences[0, 40:].tolist().index(free.sequences[0, 43].item())
    assert found.sequences.shape[1] == 41 + first
    found, expected, _ = run(model, "llama", ids, real, max_time=0.0, **settings)
    assert_same(found, expected)
    assert found.sequences.shape[1] == 41


class Collected(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.clone())

    def end(self):
        self.ended = True


def test_streamers_get_the_prompt_then_each_token(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40)
    streamer = Collected()
    schedule = schedule_for("llama")
    with TokenPruner(schedule, scorers.Random(4))(model):
        sequence = model.generate(ids, attention_mask=real, max_new_tokens=8, eos_token_id=None, streamer=streamer)
    assert streamer.ended
    assert torch.equal(streamer.pieces[0], ids)
    assert [piece.item() for piece in streamer.pieces[1:]] == sequence[0, 40:].tolist()


def test_a_stream_of_text_from_another_thread(tiny_model):
    model = tiny_model()
    ids, _ = prompt(40)
    with TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 40:].tolist()
        streamer = TextIteratorStreamer(letters(), skip_prompt=True, timeout=60)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "streamer": streamer}
        thread = threading.Thread(target=model.generate, args=(ids,), kwargs=settings)
        thread.start()
        streamed = "".join(streamer)
        thread.join()
    assert streamed == text(expected)


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Greedy decoding as users write it for `custom_generate`."""
    logits = []
    while True:
        step = None if not logits else 1
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **kwargs)
        outputs = model(**inputs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        logits.append(logits_processor(input_ids, outputs.logits[:, -1]))
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        if stopping_criteria(input_ids, None).all():
            return input_ids, logits


def test_a_decoding_loop_of_one_s_own(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    _, expected, _ = run(model, "llama", ids, real, **settings)
    with float64(), TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        sequences, logits = model.generate(ids, attention_mask=real, custom_generate=own_loop, **settings)
    assert torch.equal(sequences, expected.sequences)
    for one, other in zip(logits, expected.logits, strict=True):
        assert_close(one, other)


def test_another_prompt_inside_generate_is_pruned_by_its_own_length(tiny_model):
    # Classifier-free guidance as callers may put it in by hand: a processor that prefills a negative prompt.
    model = tiny_model(dtype=torch.float64)
    ids, _ = prompt(40)
    negative, _ = prompt(60)  # longer: nothing of it may pass for candidates
    schedule = schedule_for("llama")
    with float64():
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model, unconditional_ids=negative)
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            model.generate(ids, max_new_tokens=2, eos_token_id=None)
            kept = [k.clone() for k in trace.kept]
            found = model.generate(
                ids, max_new_tokens=6, eos_token_id=None, do_sample=False, logits_processor=[guidance], **OUTPUTS
            )
        assert trace.prompt_lengths == [60]
        new = found.sequences[:, 40:]
        conditioned = masked_logits(model, found.sequences, torch.ones(1, 46), schedule.layers, kept, 40)[:, 39:-1]
        negatives = torch.cat([negative, new], dim=1)
        other = masked_logits(model, negatives, torch.ones(1, 66), schedule.layers, trace.kept, 60)[:, 59:-1]
    for step in range(6):
        assert_close(found.logits[step], conditioned[:, step])
        first, second = conditioned[:, step].log_softmax(-1), other[:, step].log_softmax(-1)
        assert_close(found.scores[step], 2.0 * (first - second) + second)


# --- ways of handing generate its inputs ---


def with_positions(model, schedule, kept, ids, real, columns, position_ids):
    """`masked_logits` for position ids of the caller's own."""
    masks = visible_keys(model, real, schedule.layers, kept, columns)
    with rewritten(model, lambda layer, _: {"attention_mask": additive(masks[layer], model.dtype)}):
        return model(ids, attention_mask=real, position_ids=position_ids, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("positions", ["shifted", "with gaps", "descending"])
def test_position_ids_of_the_caller_s_own(tiny_model, family, positions):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(40, 23)
    order = {"shifted": torch.arange(40) + 9, "with gaps": torch.arange(40) * 3, "descending": 60 - torch.arange(40)}
    given = (order[positions] + 100 * torch.arange(2)[:, None]) * real
    schedule = schedule_for(family)
    with float64(), torch.no_grad():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            found = model.generate(
                ids, attention_mask=real, position_ids=given, max_new_tokens=6, eos_token_id=None, do_sample=False,
                **OUTPUTS,
            )  # fmt: skip
            alone = model(ids[:1], position_ids=given[:1]).logits  # no padding mask: a cache keeps it one sequence
            last = trace.kept[-1]
        later = given[:, -1:] + torch.arange(1, 7)  # generate counts on from the last
        everything = torch.cat([real, torch.ones(2, 6, dtype=real.dtype)], dim=1)
        whole = torch.cat([given, later], dim=1)
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            model(ids, attention_mask=real)
        expected = with_positions(model, schedule, trace.kept, found.sequences, everything, 40, whole)
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, 39 + step])
    assert_close(alone[0], expected[0, last[0]])
    usual = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
    with float64(), TokenPruner(schedule, scorers.Random(4))(model):
        default = model.generate(ids, attention_mask=real, **OUTPUTS, **usual)
    difference = (default.logits[0] - found.logits[0]).abs().max()
    assert (difference > 1e-3) == (positions != "shifted" or family == "opt")  # rotation is relative


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_in_place_of_ids(tiny_model, family):
    model = tiny_model(family, torch.float64)
    ids, real = prompt(40, 23)
    settings = {"max_new_tokens": 8, "eos_token_id": None, "repetition_penalty": 1.3}
    found, expected, _ = run(
        model, family, ids, real, inputs={"inputs_embeds": model.get_input_embeddings()(ids)}, **settings
    )
    assert_same(found, expected)
    embeddings = torch.randn(2, 40, 32, dtype=torch.float64)
    embeddings[:, ::2] = model.get_input_embeddings()(ids[:, ::2])
    schedule = schedule_for(family)
    settings["repetition_penalty"] = 1.0
    with float64():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            found = model.generate(inputs_embeds=embeddings, attention_mask=real, **OUTPUTS, **settings)
        stand_in = copy.deepcopy(model)  # whose first 40 embeddings are the caller's, whatever the ids
        table = stand_in.get_input_embeddings()
        table.register_forward_hook(lambda module, args, output: torch.cat([embeddings, output[:, 40:]], dim=1))
        sequences = torch.cat([ids, found.sequences], dim=1)  # without input_ids, generate returns what is new
        everything = torch.cat([real, torch.ones(2, 8, dtype=real.dtype)], dim=1)
        expected = masked_logits(stand_in, sequences, everything, schedule.layers, trace.kept, 40)
    assert found.sequences.shape == (2, 8)
    for step, logits in enumerate(found.logits):
        assert_close(logits, expected[:, 39 + step])


def test_positional_arguments_and_one_configuration_for_everything(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    mode = {"eos_token_id": 3, "num_beams": 2, "do_sample": True, "max_new_tokens": 8, "repetition_penalty": 1.2}
    found, expected, _ = run(model, "llama", ids, real, **mode)
    assert_same(found, expected)
    config = GenerationConfig(**mode, **OUTPUTS, pad_token_id=0, bos_token_id=1)
    with float64(), TokenPruner(schedule_for("llama"), scorers.Random(4))(model):
        torch.manual_seed(0)
        again = model.generate(ids, config, [Banned()][:0], attention_mask=real)
        model.generation_config = config
        torch.manual_seed(0)
        own = model.generate(ids, attention_mask=real)
        plain = model.generate(ids, GenerationConfig(**{**mode, "do_sample": False}, return_dict_in_generate=False))
    assert_same(again, expected)
    assert_same(own, expected)
    assert isinstance(plain, torch.Tensor)


def test_the_stack_alone_and_what_it_asks_of_the_next_call(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids, real = prompt(40, 23)
    schedule = schedule_for("llama")
    with float64(), torch.no_grad():
        with TokenPruner(schedule, scorers.Random(4))(model) as trace:
            cache = model(ids, attention_mask=real).cache
            longer = torch.cat([real, real[:, -6:]], dim=1)
            model(ids[:, :6], attention_mask=longer, cache=cache, logits_to_keep=6)  # past a prompt's protected tail
            states = model.model(ids, attention_mask=real).last_hidden_state
        expected = masked_logits(model, ids, real, schedule.layers, trace.kept, 40)
    assert states.shape == (2, 12, 32)
    for row, padding in enumerate((0, 17)):
        survivors = [p + padding for p in trace.kept[-1][row].tolist() if p >= 0]
        assert_close(model.lm_head(states[row, -len(survivors) :]), expected[row, survivors])


@pytest.mark.filterwarnings("ignore:.*pipelines sequentially.*")
def test_a_pipeline_with_batches(tiny_model):
    model = tiny_model(dtype=torch.float64)
    tokenizer = letters()
    texts = [text(torch.randint(4, 128, (n,)).tolist()) for n in (40, 23, 31, 36)]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True, "repetition_penalty": 1.2}

    def tokens(model, texts, **more):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        return [out[0]["generated_token_ids"] for out in generator(texts, batch_size=2, **settings, **more)]

    schedule = schedule_for("llama")
    pairs = [texts[:2], texts[2:]]
    kept = []
    with TokenPruner(schedule, scorers.Random(4))(model) as trace:
        found = tokens(model, texts)
        for pair in pairs:
            tokens(model, pair)
            assert trace.prompt_lengths == [len(one) for one in pair]
            kept.append(list(trace.kept))
    stand_ins = [hard_masked(model, schedule, k, max(map(len, pair))) for k, pair in zip(kept, pairs, strict=True)]
    expected = [ids for one, pair in zip(stand_ins, pairs, strict=True) for ids in tokens(one, pair, use_cache=False)]
    assert [list(row) for row in found] == [list(row) for row in expected]
    unpruned = tokens(model, texts)
    assert [list(row) for row in found] != [list(row) for row in unpruned]


# --- what is refused ---

# Each with what its message says besides the name.
REFUSED = {
    "prefill_chunk_size": (16, "whole prompt"),
    "token_healing": (True, "rewrites the prompt"),
    "guidance_scale": (1.5, "second prompt"),
    "assistant_early_exit": (1, "draft"),
    "use_mtp": (True, "removed tokens have none"),
    "speculation_type": ("dflash", "removed tokens have none"),
    "dola_layers": ("low", "removed tokens have none"),
    "penalty_alpha": (0.6, "removed tokens have none"),
    "num_beam_groups": (2, "outside transformers"),
    "constraints": ([1], "outside transformers"),
    "force_words_ids": ([[5]], "outside transformers"),
    "use_cache": (False, "every step"),
    "output_hidden_states": (True, "layers differ in length"),
    "output_attentions": (True, "layers differ in length"),
}
# Settings that no forward pass under a pruner depends on, or that are tried elsewhere.
ELSEWHERE = {
    "cache_implementation": "test_caches.py",
    "cache_config": "test_caches.py",
    "max_cache_len": "of static caches, which are refused",
    "compile_config": "of static caches, which are refused",
    "disable_compile": "of static caches, which are refused",
    "continuous_batching_config": "of generate_batch, which is refused",
    "decoder_start_token_id": "of encoder-decoder models, which are refused",
    "is_assistant": "generate's own, see the assistant that is the model itself",
    "num_assistant_tokens": "read from the assistant's configuration",
    "num_assistant_tokens_schedule": "read from the assistant's configuration",
    "assistant_confidence_threshold": "read from the assistant's configuration",
    "low_memory": "refused by transformers itself with beams, of no account otherwise",
    "diversity_penalty": "of beam groups, which are refused",
    "transformers_version": "no setting",
}
TRIED = {
    "max_time", "stop_strings", "bos_token_id", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
}  # fmt: skip


def test_every_setting_of_this_transformers_is_tried_or_refused():
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    tried = {name for mode in MODES.values() for name in mode} | set(OUTPUTS) | TRIED
    assert tried.isdisjoint(REFUSED)
    assert settings == tried | set(REFUSED) | set(ELSEWHERE)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["call", "configuration", "model"])
def test_a_setting_is_refused_by_name_wherever_it_was_made(tiny_model, name, place):
    value, reason = REFUSED[name]
    model = tiny_model()
    ids, _ = prompt(40)
    cache = DynamicCache()
    config = GenerationConfig(max_new_tokens=2)
    given = {"max_new_tokens": 2, "cache": cache}
    if place == "call":
        given[name] = value
    else:
        setattr(config if place == "configuration" else model.generation_config, name, value)
    if place == "configuration":
        given = {"generation_config": config, "cache": cache}
    with TokenPruner(schedule_for("llama"), scorers.Random())(model) as trace:
        with pytest.raises(ValueError, match=f"{name}={value}".replace("[", r"\[")) as error:
            model.generate(ids, **given)
        assert reason in str(error.value)
        assert cache.get_seq_length() == 0
        assert not trace.kept
        if name not in ("use_cache", "output_hidden_states", "output_attentions"):  # an explicit None is no default's
            model.generate(ids, **{**given, name: None, "generation_config": None, "max_new_tokens": 2})
            assert trace.kept


def test_other_calls_of_generate_are_refused(tiny_model):
    model = tiny_model()
    ids, real = prompt(40, 23)
    embeds, few = model.get_input_embeddings()(ids[:1]), {"max_new_tokens": 2, "pad_token_id": 0}
    refused = [
        (lambda: model.generate(ids, custom_generate="some/where"), "custom_generate='some/where'"),
        (lambda: model.generate(max_new_tokens=2), "needs a prompt"),
        (lambda: model.generate(ids, use_cache=None), "use_cache=None"),
        (lambda: model.generate(ids, attention_mask=real.flip(1), **few), "pad on the left"),
        (lambda: model.generate(ids.flip(1), **few), "pad on the left"),  # the mask is then read off the ids
        (lambda: model.generate(ids[:1], inputs_embeds=embeds, assistant_model=model, **few), "the prompt alone"),
        (lambda: model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=3, **few), "the prompt alone"),
        (lambda: model.generate_batch([ids[0].tolist()]), "generate_batch is not supported"),
        (lambda: model.init_continuous_batching(), "init_continuous_batching is not supported"),
        (lambda: model.continuous_batching_context_manager(), "continuous_batching_context_manager is not supported"),
    ]
    with TokenPruner(schedule_for("llama"), scorers.Random())(model) as trace:
        for call, words in refused:
            with pytest.raises(ValueError, match=words):
                call()
            assert not trace.kept
        neutral = {"guidance_scale": 1.0, "penalty_alpha": 0.0, "num_beam_groups": 1, "token_healing": False}
        model.generate(ids, attention_mask=real, max_new_tokens=2, **neutral)
        assert trace.kept


def test_masks_and_positions_that_mean_something_else_are_refused(tiny_model):
    model = tiny_model()
    ids, real = prompt(40)
    packed = torch.cat([torch.arange(25), torch.arange(15)])[None]
    with TokenPruner(schedule_for("llama"), scorers.Random())(model), torch.no_grad():
        with pytest.raises(ValueError, match="packed sequences"):
            model(ids, position_ids=packed, use_cache=False)
        whole = model(ids, position_ids=packed, attention_mask=real, use_cache=False).logits
        assert_close(whole, model(ids, position_ids=packed).logits)
        with pytest.raises(ValueError, match=r"shape \(1, 45\): for 40 tokens after 0 in the cache it is \[1, 40\]"):
            model(ids, attention_mask=torch.ones(1, 45))
        cache = model(ids).cache
        with pytest.raises(ValueError, match=r"shape \(1, 3\): for 3 tokens after 40 in the cache it is \[1, 43\]"):
            model(ids[:, :3], attention_mask=real[:, :3], cache=cache)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1)),
            "it attends to an encoder",
        ),
        (
            lambda: BartForCausalLM(BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, vocab_size=32)),
            "its layers take encoder_hidden_states",
        ),
    ],
    ids=["encoder-decoder", "decoder of one"],
)
def test_models_with_an_encoder_are_refused(make, reason):
    model = make()
    with pytest.raises(TypeError, match=f"{type(model).__name__} is not supported: {reason}"):
        TokenPruner(schedule_for("llama"), scorers.Random())(model).__enter__()
