"""What a sampled token does to its sequence: text, stop conditions, and what is reported."""

from __future__ import annotations

from tidegate.engines.embedded.detokenize import Detokenizer
from tidegate.engines.embedded.sampling import Choice, Draw
from tidegate.engines.embedded.sequence import TokenSequence
from tidegate.engines.serving.assembling import say_token
from tidegate.engines.serving.types import Output, RequestTimes, TokenLogprob


def draw_for(sequence: TokenSequence, eos_ids: frozenset[int]) -> Draw:
    """Return how the sequence's next token is to be chosen."""
    params = sequence.request.sampling
    position = sequence.output_position
    if position < params.min_tokens:
        return Draw(params, position, sequence.seed, (*eos_ids, *params.stop_token_ids))
    return Draw(params, position, sequence.seed)


def take_token(
    sequence: TokenSequence, choice: Choice, eos_ids: frozenset[int], detokenizer: Detokenizer
) -> Output:
    """Append the token to the sequence and return what it shows; ``finish_reason`` is set when it ends."""
    sequence.tokens.append(choice.token_id)
    output = say_token(sequence.request, choice.token_id, sequence.new_tokens, sequence.text, eos_ids)
    if choice.logprob is not None:
        output.logprobs = [_token_logprob(choice, choice.logprob, detokenizer)]
    return output


def times_of(sequence: TokenSequence, now_s: float) -> RequestTimes:
    """Split the leg's time by stage. A leg that never got a token has no decode time."""
    admitted = now_s if sequence.admitted_s is None else sequence.admitted_s
    first = now_s if sequence.first_token_s is None else sequence.first_token_s
    return RequestTimes(
        queue_s=admitted - sequence.submitted_s,
        kv_load_s=sequence.kv_load_s,
        prefill_s=first - admitted - sequence.kv_load_s,
        decode_s=now_s - first,
        kv_loaded_tokens=sequence.loaded_tokens,
        cached_tokens=sequence.cached_tokens,
        preemptions=sequence.preemptions,
    )


def _token_logprob(choice: Choice, logprob: float, detokenizer: Detokenizer) -> TokenLogprob:
    return TokenLogprob(
        choice.token_id,
        detokenizer.piece(choice.token_id),
        logprob,
        tuple((token, detokenizer.piece(token), value) for token, value in choice.alternatives),
    )
