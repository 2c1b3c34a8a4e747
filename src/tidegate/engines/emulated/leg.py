"""One leg of a request inside an emulated instance: its tokens, and when it got them."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.dataplane.sequence import Pin, SimSequence
from tidegate.engines.emulated.vocabulary import answer, block_ids, pieces
from tidegate.engines.serving.assembling import ByteDecoder, TextAssembler, say_token
from tidegate.engines.serving.types import GenerateRequest, Output, PinnedKv, RequestTimes, TokenLogprob

_NO_EOS: frozenset[int] = frozenset()
"""Nothing ends an answer but its limit and the client's stops."""


@dataclass(slots=True, eq=False)
class EmulatedLeg:
    """State of a leg. ``sequence`` is what the instance sees of it; times are those of its events.

    ``pending`` collects what was not delivered yet, ``tokens`` are all that the leg generates, and
    ``loaded_tokens`` come with a pull.
    """

    request: GenerateRequest
    sequence: SimSequence
    tokens: list[int]
    text: TextAssembler
    submitted_s: float
    pending: Output
    new_tokens: int = 0
    first_token_s: float | None = None
    loaded_tokens: int = 0

    def advance(self, count: int, now: float) -> None:
        """Generate the next ``count`` tokens."""
        if self.first_token_s is None:
            self.first_token_s = now
        pending = self.pending
        for _ in range(count):
            token = self.tokens[self.new_tokens]
            self.new_tokens += 1
            output = say_token(self.request, token, self.new_tokens, self.text, _NO_EOS)
            pending.token_ids.append(token)
            pending.text += output.text
            pending.finish_reason, pending.stop_reason = output.finish_reason, output.stop_reason
            if self.request.sampling.logprobs is not None:
                piece = pieces()[token].decode("utf-8", "replace")
                pending.logprobs = [*(pending.logprobs or []), TokenLogprob(token, piece, 0.0)]

    def finish(self, now: float, pinned: PinnedKv | None = None, reason: str | None = None) -> None:
        """Complete the last output; ``reason`` is why the leg ends before its last token."""
        self.pending.pinned = pinned
        self.pending.finish_reason = reason or self.pending.finish_reason
        self.pending.times = self._times(now)

    def take(self) -> Output:
        """Return the output since the last call."""
        output, self.pending = self.pending, Output(self.request.id, [], "")
        return output

    def _times(self, now: float) -> RequestTimes:
        sequence = self.sequence
        admitted_s = now if sequence.admitted_s is None else sequence.admitted_s
        first_s = now if self.first_token_s is None else self.first_token_s
        load_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
        return RequestTimes(
            queue_s=admitted_s - self.submitted_s,
            kv_load_s=load_s,
            prefill_s=first_s - admitted_s - load_s,
            decode_s=now - first_s,
            kv_loaded_tokens=self.loaded_tokens if sequence.loaded_s is not None else 0,
            cached_tokens=sequence.cached_tokens,
            preemptions=sequence.preemptions,
        )


def new_leg(
    number: int, request: GenerateRequest, source: Pin | None, block_tokens: int, now: float
) -> EmulatedLeg:
    """Return the leg of ``request``, numbered ``number`` for its instance, submitted at ``now``.

    The answer is known beforehand, and so is where a stop ends it.
    """
    prompt, params = list(request.prompt_token_ids), request.sampling
    asked = len(prompt) - request.generated
    tokens = answer(prompt[:asked], request.generated, params.max_tokens)
    tokens = tokens[: _length(request, tokens)]
    sequence = SimSequence(
        number,
        len(prompt),
        len(prompt) + len(tokens),
        hand_over=request.pin_kv,
        source=source,
        block_ids=block_ids([*prompt, *tokens], block_tokens, request.salt),
        hash_block_tokens=block_tokens,
        ticket=None if request.ticket is None else request.ticket.on_clock(now),
    )
    return EmulatedLeg(request, sequence, tokens, _assembler(request), now, Output(request.id, [], ""))


def _assembler(request: GenerateRequest) -> TextAssembler:
    text = TextAssembler(ByteDecoder(pieces()), request.sampling.stop)
    asked = len(request.prompt_token_ids) - request.generated
    text.replay(request.prompt_token_ids[asked:], request.sampling.min_tokens)
    return text


def _length(request: GenerateRequest, tokens: list[int]) -> int:
    """Return how many of ``tokens`` come before one of the client's stops, or all."""
    params = request.sampling
    if params.stop or params.stop_token_ids:
        text = _assembler(request)
        for count, token in enumerate(tokens, start=1):
            if say_token(request, token, count, text, _NO_EOS).finish_reason is not None:
                return count
    return len(tokens)
