"""One request's way through the simulated cluster."""

from __future__ import annotations

import math

from tidegate.control.live_request import LiveRequest
from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.core.errors import InternalError, TidegateError
from tidegate.core.request import Request
from tidegate.dataplane.sequence import Pin, SimSequence
from tidegate.signals.prefix import PromptBlocks

UNREACHED = math.nan
"""A time that a request did not come to."""


class SimulatedRequest(LiveRequest):
    """A live request in the simulated cluster. Times are virtual, durations are those of its stages.

    ``number`` is its record's place in the trace, ``index`` its place in the order of arrival. ``leg`` is the
    sequence on its way to, or inside, instance ``on``, and ``legs`` counts them. ``handing_over`` tells that
    another leg is to continue the one that runs, from the KV that ``pin`` keeps. ``most_tokens`` are those
    of the prompt and the whole answer.
    """

    __slots__ = (
        "arrival_s", "block_ids", "block_tokens", "cached_tokens", "decode_queue_s", "decode_s",
        "first_step_s", "first_token_s", "handing_over", "index", "kv_transfer_bytes", "last_token_s", "leg",
        "leg_first_s", "legs", "most_tokens", "number", "observed_prefill_s", "on", "output_tokens", "pin",
        "placed_s", "preemptions", "prefill_s", "queue_s", "request", "transfer_s",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        number: int,
        request: Request,
        deadline_s: float,
        blocks: PromptBlocks,
        block_ids: tuple[int, ...],
        block_tokens: int,
    ) -> None:
        super().__init__(request.id, deadline_s, blocks)
        self.index = index
        self.number = number
        self.request = request
        self.output_tokens = request.max_tokens
        self.most_tokens = request.prompt_tokens + request.max_tokens
        self.block_ids = block_ids
        self.block_tokens = block_tokens
        self.arrival_s = request.arrival_s
        self.leg: SimSequence | None = None
        self.on = -1
        self.legs = 0
        self.handing_over = False
        self.pin: Pin | None = None
        self.placed_s = 0.0
        self.leg_first_s = UNREACHED
        self.first_token_s = UNREACHED
        self.last_token_s = UNREACHED
        self.queue_s = UNREACHED
        self.prefill_s = UNREACHED
        self.transfer_s = UNREACHED
        self.decode_queue_s = UNREACHED
        self.first_step_s = UNREACHED
        self.decode_s = UNREACHED
        self.observed_prefill_s = UNREACHED
        self.cached_tokens = 0
        self.preemptions = 0
        self.kv_transfer_bytes = 0

    def resident(self) -> Request:
        """See ``LiveRequest.resident``."""
        request = self.request
        if not self.generated:
            return request
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

    def begin_leg(self, on: int, sequence: SimSequence, now: float) -> None:
        """Note that a leg is dispatched to instance ``on``."""
        self.leg = sequence
        self.on = on
        self.placed_s = now
        self.leg_first_s = UNREACHED
        self.legs += 1

    def note_first_token(self, sequence: SimSequence, now: float) -> None:
        """Fill in the stages up to the request's first token."""
        admitted_s = sequence.admitted_s
        assert admitted_s is not None
        self.first_token_s = now
        self.observed_prefill_s = self.prefill_s = now - admitted_s
        self.queue_s = admitted_s - self.arrival_s
        self.cached_tokens = sequence.cached_tokens

    def note_end(self, sequence: SimSequence) -> None:
        """Fill in the stages after the first token."""
        admitted_s, first_s = sequence.admitted_s, self.leg_first_s
        if admitted_s is None:
            raise InternalError(f"{self.request.id} ended without having been admitted")
        if self.legs > 1:
            self.transfer_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
            self.decode_queue_s = admitted_s - self.placed_s
            self.first_step_s = first_s - self.placed_s - self.transfer_s - self.decode_queue_s
        self.decode_s = self.last_token_s - first_s

    def record(self) -> RequestRecord:
        """Return what the journal says of the request."""
        stages = {
            "queue": self.queue_s,
            "prefill": self.prefill_s,
            "transfer": self.transfer_s,
            "decode_queue": self.decode_queue_s,
            "first_step": self.first_step_s,
            "decode": self.decode_s,
        }
        return RequestRecord(
            self.arrival_s,
            _reached(self.first_token_s),
            _reached(self.last_token_s),
            self.prefill_on,
            self.decode_on,
            self.predicted_prefill_s,
            _reached(self.observed_prefill_s),
            self.cached_tokens,
            self.kv_transfer_bytes,
            self.replays,
            self.migrations,
            {name: seconds for name, seconds in stages.items() if seconds == seconds},
        )

    def ending(self, error: TidegateError | None, now: float) -> RequestEnding:
        """Return how the request ended, for the journal."""
        request = self.request
        return RequestEnding(
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


def _reached(at_s: float) -> float | None:
    return at_s if at_s == at_s else None
