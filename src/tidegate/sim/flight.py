"""One request's way through the simulated cluster."""

from __future__ import annotations

import math
from collections.abc import Sequence as Fleet

from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.core.errors import InternalError, TidegateError
from tidegate.core.request import Request
from tidegate.dataplane.sequence import Pin, Sequence

UNREACHED = math.nan
"""A time that a request did not come to."""


class Flight:
    """State of a live request. Times are virtual, durations are those of its stages.

    ``number`` is its record's place in the trace, ``index`` its place in the order of arrival. ``leg`` is the
    sequence on its way to, or inside, instance ``on``. ``decoding`` is set once a decode is in the ledger;
    ``generated`` counts tokens as far as the control plane was told of them.
    """

    __slots__ = (
        "arrival_s", "block_ids", "block_tokens", "cached_tokens", "decode_on", "decode_queue_s",
        "decode_s", "decoding", "first_step_s", "first_token_s", "generated", "handing_over", "index",
        "kv_transfer_bytes", "last_token_s", "leg", "leg_first_s", "legs", "migrations", "number",
        "observed_prefill_s", "on", "output_tokens", "pin", "placed_s", "predicted_prefill_s",
        "preemptions", "prefill_on", "prefill_s", "queue_s", "replays", "request", "transfer_s",
    )  # fmt: skip

    def __init__(
        self, index: int, number: int, request: Request, block_ids: tuple[int, ...], block_tokens: int
    ) -> None:
        self.index = index
        self.number = number
        self.request = request
        self.output_tokens = request.max_tokens
        self.block_ids = block_ids
        self.block_tokens = block_tokens
        self.arrival_s = request.arrival_s
        self.leg: Sequence | None = None
        self.on = -1
        self.legs = 0
        self.handing_over = False
        self.decoding = False
        self.generated = 0
        self.pin: Pin | None = None
        self.placed_s = 0.0
        self.leg_first_s = UNREACHED
        self.prefill_on = -1
        self.decode_on = -1
        self.first_token_s = UNREACHED
        self.last_token_s = UNREACHED
        self.queue_s = UNREACHED
        self.prefill_s = UNREACHED
        self.transfer_s = UNREACHED
        self.decode_queue_s = UNREACHED
        self.first_step_s = UNREACHED
        self.decode_s = UNREACHED
        self.predicted_prefill_s = UNREACHED
        self.observed_prefill_s = UNREACHED
        self.cached_tokens = 0
        self.preemptions = 0
        self.migrations = 0
        self.kv_transfer_bytes = 0
        self.replays = 0

    def resident(self) -> Request:
        """Return the request as a placement sees it: with what was generated as part of its prompt."""
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

    def begin_leg(self, on: int, sequence: Sequence, now: float) -> None:
        """Note that a leg is dispatched to instance ``on``."""
        self.leg = sequence
        self.on = on
        self.placed_s = now
        self.leg_first_s = UNREACHED
        self.legs += 1

    def note_first_token(self, sequence: Sequence, now: float) -> None:
        """Fill in the stages up to the request's first token."""
        admitted_s = sequence.admitted_s
        assert admitted_s is not None
        self.first_token_s = now
        self.observed_prefill_s = self.prefill_s = now - admitted_s
        self.queue_s = admitted_s - self.arrival_s
        self.cached_tokens = sequence.cached_tokens

    def note_end(self, sequence: Sequence) -> None:
        """Fill in the stages after the first token."""
        admitted_s, first_s = sequence.admitted_s, self.leg_first_s
        if admitted_s is None:
            raise InternalError(f"{self.request.id} ended without having been admitted")
        if self.legs > 1:
            self.transfer_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
            self.decode_queue_s = admitted_s - self.placed_s
            self.first_step_s = first_s - self.placed_s - self.transfer_s - self.decode_queue_s
        self.decode_s = self.last_token_s - first_s

    def story(self, instances: Fleet[str]) -> RequestRecord:
        """Return what the journal says of the request; ``instances`` are the names by number."""
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
            None if self.prefill_on < 0 else instances[self.prefill_on],
            None if self.decode_on < 0 else instances[self.decode_on],
            _reached(self.predicted_prefill_s),
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
