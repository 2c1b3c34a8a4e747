"""One request's way through the simulated cluster."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.errors import TidegateError
from tidegate.core.request import Request
from tidegate.dataplane.sequence import Pin, Sequence
from tidegate.measure.rows import Ending, Story
from tidegate.sim.results import SimResult


@dataclass(slots=True, eq=False)
class Flight:
    """State of a live request. ``story`` is what the journal will say of it; times are virtual.

    ``leg`` is the sequence on its way to, or inside, instance ``on``. ``decoding`` is set once a decode is
    in the ledger; ``generated`` counts tokens as far as the control plane was told of them.
    """

    index: int
    request: Request
    output_tokens: int
    story: Story
    leg: Sequence | None = None
    on: int = -1
    handing_over: bool = False
    decoding: bool = False
    generated: int = 0
    pin: Pin | None = None
    placed_s: float = 0.0
    leg_first_s: float | None = None
    legs: int = 0
    preemptions: int = 0

    def resident(self) -> Request:
        """Return the request as a decode placement sees it: with what was generated as part of its prompt."""
        request = self.request
        return Request(
            request.id,
            request.prompt_tokens + self.generated,
            self.output_tokens - self.generated,
            request.arrival_s,
            request.slo,
            request.tenant,
            request.session,
            request.turn,
        )

    def begin_leg(self, on: int, sequence: Sequence, now: float) -> None:
        """Note that a leg is dispatched to instance ``on``."""
        self.leg, self.on = sequence, on
        self.placed_s = now
        self.leg_first_s = None
        self.legs += 1

    def note_prefill(self, sequence: Sequence) -> None:
        """Fill in the stages up to the first token."""
        story, admitted_s, first_s = self.story, sequence.admitted_s, self.leg_first_s
        assert admitted_s is not None and first_s is not None
        story.observed_prefill_s = first_s - admitted_s
        story.stages["queue"] = admitted_s - story.arrival_s
        story.stages["prefill"] = first_s - admitted_s

    def note_decode(self, sequence: Sequence) -> None:
        """Fill in the stages after the first token."""
        story, admitted_s, first_s = self.story, sequence.admitted_s, self.leg_first_s
        assert admitted_s is not None and first_s is not None and story.last_token_s is not None
        if self.legs > 1:
            transfer_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
            queue_s = admitted_s - self.placed_s
            story.stages["transfer"] = transfer_s
            story.stages["decode_queue"] = queue_s
            story.stages["first_step"] = first_s - self.placed_s - transfer_s - queue_s
        story.stages["decode"] = story.last_token_s - first_s

    def ending(self, error: TidegateError | None, now: float) -> Ending:
        """Return how the request ended."""
        request = self.request
        return Ending(
            request.id,
            request.slo,
            request.prompt_tokens,
            self.generated,
            "length" if error is None else None,
            error,
            now,
            session=request.session,
            tenant=request.tenant,
        )

    def result(self, ending: Ending) -> SimResult:
        """Return what a simulation reports of the request."""
        story = self.story
        return SimResult(
            index=self.index,
            arrival_s=story.arrival_s,
            input_tokens=ending.prompt_tokens,
            output_tokens=ending.output_tokens,
            outcome=ending.outcome,
            first_token_s=story.first_token_s,
            last_token_s=story.last_token_s,
            end_s=ending.end_s,
            stages_s=story.stages,
            prefill_on=story.prefill_on,
            decode_on=story.decode_on,
            preemptions=self.preemptions,
            kv_transfer_bytes=story.kv_transfer_bytes,
            slo=ending.slo,
            attained=ending.attained(story),
        )
