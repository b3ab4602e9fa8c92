"""Ways of calling a model with one prompt or batch, each with what it must give under a pruner.

A mode takes a `Trial` and returns the largest |Δ logit| it saw, at every step and row that means something. It raises
`MismatchError` for what is wrong in another way, `NotRunError` where the mode does not apply, and lets the pruner's
refusals through. Without a pruner in the trial every mode is one of the unpruned model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sdtp.pruning.prefill import Trace
from sdtp.verification.hidden_keys import takes_position_ids
from sdtp.verification.trial import MismatchError, NotRunError, Trial, largest, same_tokens, worst, worst_step


def plain_forward(trial: Trial) -> float:
    """One forward over the prompt, at every survivor; and with the last position's logits alone."""
    with trial.pruned() as trace:
        found = trial.forward(trial.prompt).logits
        last = trial.forward(trial.prompt, logits_to_keep=1).logits
    expected = trial.expected(trace, trial.prompt)
    at = trial.survivors(trace)
    return largest([worst(found, expected[:, at]), worst(last, expected[:, -1:])])


def nothing_removed(trial: Trial) -> float:
    """At ratio 1.0 logits and tokens are the unpruned model's, bit for bit."""
    unpruned = trial.forward(trial.prompt).logits
    tokens = trial.generate(trial.prompt).sequences
    with trial.pruned(ratio=1.0):
        found = trial.forward(trial.prompt).logits
        generated = trial.generate(trial.prompt).sequences
    if not torch.equal(found, unpruned):
        raise MismatchError(f"logits differ by {worst(found, unpruned):.1e} where not a bit may")
    if not torch.equal(generated, tokens):
        raise MismatchError("other tokens are generated")
    return 0.0


def another_ratio(trial: Trial) -> float:
    """`ratio=` of one call in place of the schedule's own fractions."""
    if trial.pruner is None:
        return plain_forward(trial)
    with trial.pruned(ratio=0.5) as trace:
        found = trial.forward(trial.prompt).logits
    counts = [kept.shape[1] for kept in trace.kept]
    due = trial.pruner.schedule.with_ratio(0.5).surviving(trial.prompt.shape[1])
    if counts != due:
        raise MismatchError(f"{counts} tokens survive where {due} are due")
    return worst(found, trial.expected(trace, trial.prompt)[:, trace.kept[-1][0]])


def protected_tokens(trial: Trial) -> float:
    """Tokens marked by `protect=` survive every stage."""
    if trial.pruner is None:
        return plain_forward(trial)
    marked = torch.arange(trial.prompt.shape[1]) % 7 == 5
    with trial.pruned(protect=marked[None].to(trial.prompt.device)) as trace:
        found = trial.forward(trial.prompt).logits
    if any(not torch.isin(marked.nonzero()[:, 0], kept[0].cpu()).all() for kept in trace.kept):
        raise MismatchError("a marked token was removed")
    return worst(found, trial.expected(trace, trial.prompt)[:, trace.kept[-1][0]])


def greedy(trial: Trial, **settings: Any) -> float:
    """Greedy decoding."""
    with trial.pruned() as trace:
        out = trial.generate(trial.prompt, **settings)
    return _at_every_step(trial, trace, out)


def _at_every_step(trial: Trial, trace: Trace, out: Any) -> float:
    columns = trial.prompt.shape[1]
    if len(out.logits) != out.sequences.shape[1] - columns:
        raise MismatchError(f"{len(out.logits)} steps for {out.sequences.shape[1] - columns} new tokens")
    return worst_step(out.logits, trial.expected(trace, out.sequences), columns)


def sampling(trial: Trial, rows: int = 1) -> float:
    """Sampling: logits along whatever was drawn; the same seed draws the same again."""
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 20, "num_return_sequences": rows}
    with trial.pruned() as trace:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            out = trial.generate(trial.prompt, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            again = trial.generate(trial.prompt, **settings)
    if not torch.equal(out.sequences, again.sequences):
        raise MismatchError("the same seed drew other tokens")
    return _at_every_step(trial, trace, out)


def return_sequences(trial: Trial) -> float:
    """Three sequences sampled from one prompt."""
    return sampling(trial, rows=3)


def beam_search(trial: Trial) -> float:
    """Three beams, of which two are returned: logits along each, and its score."""
    with trial.pruned() as trace:
        out = trial.generate(trial.prompt, num_beams=3, num_return_sequences=2, output_scores=True)
    if trace.kept and any(not torch.equal(kept[0], row) for kept in trace.kept for row in kept):
        raise MismatchError("beams of one prompt kept different tokens")
    kept = Trace([kept[:2] for kept in trace.kept])
    expected = trial.expected(kept, out.sequences)
    first = trial.prompt.shape[1] - 1
    differences = []
    for row, beams in enumerate(out.beam_indices.tolist()):
        new = out.sequences[row, first + 1 :]
        due = expected[row, first : first + len(new)]
        differences += [worst(out.logits[step][beams[step]], due[step]) for step in range(len(new))]
        score = due.log_softmax(-1).gather(1, new[:, None]).mean()
        differences.append(worst(out.sequences_scores[row].to(score.dtype), score))
    return largest(differences)


def prompt_lookup(trial: Trial) -> float:
    """Prompt lookup on a prompt that repeats itself: greedy decoding's tokens."""
    quarter = trial.prompt[:, : -(-trial.prompt.shape[1] // 4)]
    return _assisted(trial, quarter.repeat(1, 4)[:, : trial.prompt.shape[1]], prompt_lookup_num_tokens=3)


def assisted_decoding(trial: Trial) -> float:
    """Assisted decoding: greedy decoding's tokens. The assistant is a tiny random model of the same vocabulary."""
    config = LlamaConfig(
        vocab_size=trial.config.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4 * trial.prompt.shape[1],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assistant: Any = LlamaForCausalLM(config)
    assistant.to(trial.prompt.device, trial.inner.dtype).eval()
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0  # or it would stop at its first, unsure draft
    return _assisted(trial, trial.prompt, assistant_model=assistant)


def _assisted(trial: Trial, prompt: torch.Tensor, **settings: Any) -> float:
    with trial.pruned() as trace:
        plain = trial.generate(prompt)
        kept = list(trace.kept)
        out = trial.generate(prompt, **settings)
    if any(not torch.equal(a, b) for a, b in zip(kept, trace.kept, strict=True)):
        raise MismatchError("other prompt tokens survive than under greedy decoding")
    expected = trial.expected(trace, plain.sequences)
    new = slice(prompt.shape[1], None)
    steps = expected[0, prompt.shape[1] - 1 : -1]
    same_tokens(out.sequences[0, new], plain.sequences[0, new], steps, trial.tolerance)
    return largest([_at_every_step(trial, trace, plain), _at_every_step(trial, trace, out)])


def _ragged(trial: Trial) -> tuple[torch.Tensor, list[int]]:
    """Three prompts of different length: LongTensor [3, tokens] and the lengths; short ones are yet to be padded."""
    tokens = trial.prompt.shape[1]
    lengths = [tokens, max(2, 2 * tokens // 3), max(1, tokens // 8)]
    return torch.cat([trial.prompt, trial.tokens(tokens, seed=1, rows=2)]), lengths


def left_padded_batch(trial: Trial) -> float:
    """Generation from three prompts of different length."""
    ids, lengths = _ragged(trial)
    columns = ids.shape[1]
    real = torch.stack([torch.arange(columns) >= columns - n for n in lengths]).long().to(ids.device)
    with trial.pruned() as trace:
        out = trial.generate(ids, attention_mask=real)
    everything = torch.cat([real, real.new_ones(len(lengths), out.sequences.shape[1] - columns)], dim=1)
    return worst_step(out.logits, trial.expected(trace, out.sequences, attention_mask=everything), columns)


def right_padded_forward(trial: Trial) -> float:
    """One forward over three prompts of different length, padded on the right."""
    ids, lengths = _ragged(trial)
    real = torch.stack([torch.arange(ids.shape[1]) < n for n in lengths]).long().to(ids.device)
    with trial.pruned() as trace:
        found = trial.forward(ids, attention_mask=real).logits
    expected = trial.expected(trace, ids, attention_mask=real)
    if not trace.kept:
        return largest([worst(found[row, :n], expected[row, :n]) for row, n in enumerate(lengths)])
    rows = [kept[kept >= 0].to(ids.device) for kept in trace.kept[-1]]  # positions are columns here
    return largest([worst(found[row, -len(kept) :], expected[row, kept]) for row, kept in enumerate(rows)])


def inputs_embeds(trial: Trial) -> float:
    """Generation from embeddings in place of token ids."""
    with trial.pruned() as trace:
        out = trial.generate(inputs_embeds=trial.model.get_input_embeddings()(trial.prompt))
    sequences = torch.cat([trial.prompt, out.sequences], dim=1)
    return worst_step(out.logits, trial.expected(trace, sequences), trial.prompt.shape[1])


def custom_position_ids(trial: Trial) -> float:
    """Generation with the caller's own position ids, which leave a gap in the middle of the prompt."""
    if not takes_position_ids(trial.model):
        raise NotRunError(f"{type(trial.inner).__name__} takes no position_ids")
    tokens = trial.prompt.shape[1]
    where = torch.arange(tokens + trial.new_tokens, device=trial.prompt.device)[None]
    where = where + 7 * (where >= tokens // 2)
    with trial.pruned() as trace:
        out = trial.generate(trial.prompt, position_ids=where[:, :tokens])
    ids = out.sequences
    return worst_step(out.logits, trial.expected(trace, ids, position_ids=where[:, : ids.shape[1]]), tokens)


class _Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Nothing to flush."""


def processor_criteria_streamer(trial: Trial) -> float:
    """A logits processor, a stopping criterion and a streamer of the caller's own."""
    columns, stop_at = trial.prompt.shape[1], max(1, trial.new_tokens // 2)

    def processed(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -scores  # the least likely token

    def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((1,), input_ids.shape[1] >= columns + stop_at, device=input_ids.device)

    streamer = _Collected()
    with trial.pruned() as trace:
        out = trial.generate(
            trial.prompt,
            logits_processor=LogitsProcessorList([processed]),
            stopping_criteria=StoppingCriteriaList([stop]),
            streamer=streamer,
        )
    new = out.sequences[0, columns:]
    if len(new) != stop_at:
        raise MismatchError(f"{len(new)} new tokens where the stopping criterion allows {stop_at}")
    if streamer.tokens != out.sequences[0].tolist():
        raise MismatchError("the streamer got other tokens than were generated")
    expected = trial.expected(trace, out.sequences)
    steps = expected[0, columns - 1 : -1]
    same_tokens(new, steps.argmin(-1), steps, trial.tolerance)
    return worst_step(out.logits, expected, columns)
