"""One request's way through the simulated cluster, and the packed rows of those that have ended."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.control.live_request import LiveRequest
from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.core.errors import InternalError, TidegateError
from tidegate.core.request import Request
from tidegate.core.stages import STAGES
from tidegate.dataplane.sequence import Pin, SimSequence
from tidegate.measure.request_table import RequestTable
from tidegate.policies.order import Ticket
from tidegate.signals.prefix import PromptBlocks

UNREACHED = math.nan
"""A time that a request did not come to."""


_TIMES = ("arrival_s", "first_token_s", "last_token_s", "end_s", "ttft_target_s", "tpot_target_s")
_COUNTS = (
    "input_tokens", "output_tokens", "outcome", "prefill_on", "decode_on", "cached_tokens", "preemptions",
    "migrations", "kv_transfer_bytes",
)  # fmt: skip
_ROW = struct.Struct(f"<{len(_TIMES) + len(STAGES)}d{len(_COUNTS)}q")
_FIELDS = [(name, "<f8") for name in (*_TIMES, *STAGES)] + [(name, "<i8") for name in _COUNTS]
_GROWTH = 4096
"""Rows that are added at a time."""
_UNSET = b"\xff" * (_ROW.size * _GROWTH)
"""Rows without an end: every time NaN, every count -1."""


class AwaitedRead(NamedTuple):
    """The prefill leg that is to follow once another instance has pinned what it reads: ``_dispatch``'s."""

    on: int
    hand_over: bool
    ticket: Ticket | None


class SimulatedRequest(LiveRequest):
    """A live request in the simulated cluster. Times are virtual, durations are those of its stages.

    ``number`` is its record's place in the trace, ``index`` its place in the order of arrival. ``leg`` is the
    sequence on its way to, or inside, instance ``on``, and ``legs`` counts them, with the ``read_legs`` that
    only pin history. ``handing_over`` tells that
    another leg is to continue the one that runs, from the KV that ``pin`` keeps. ``output_tokens``
    is the length of the answer, which ``request.max_tokens`` does not tell, and ``most_tokens`` are those of
    the prompt and the whole answer. While ``reads`` is set the leg is one that pins what the prefill
    it speaks of begins with; ``read_tokens`` of that had to come.
    """

    leg: SimSequence | None = None
    on = -1
    legs = 0
    handing_over = False
    pin: Pin | None = None
    reads: AwaitedRead | None = None
    read_tokens = 0
    read_legs = 0
    placed_s = 0.0
    leg_first_s = UNREACHED
    first_token_s = UNREACHED
    last_token_s = UNREACHED
    queue_s = UNREACHED
    prefill_s = UNREACHED
    other_s = UNREACHED
    transfer_s = UNREACHED
    decode_queue_s = UNREACHED
    first_step_s = UNREACHED
    decode_s = UNREACHED
    cached_tokens = 0
    preemptions = 0
    kv_transfer_bytes = 0

    def __init__(
        self,
        index: int,
        number: int,
        request: Request,
        output_tokens: int,
        deadline_s: float,
        blocks: PromptBlocks,
    ) -> None:
        super().__init__(request.id, deadline_s, blocks, named=bool(request.session))
        self.index = index
        self.number = number
        self.request = request
        self.output_tokens = output_tokens
        self.most_tokens = request.prompt_tokens + output_tokens

    def as_request(self) -> Request:
        """See ``LiveRequest.as_request``."""
        request = self.request
        if not self.generated:
            return request
        return Request(
            request.id,
            request.prompt_tokens + self.generated,
            request.max_tokens - self.generated,
            request.arrival_s,
            request.slo,
            request.tenant,
            request.session,
            request.turn,
            generated=self.generated,
        )

    @property
    def begins_late(self) -> bool:
        """Whether the first token came behind its target."""
        return self.first_token_s - self.request.arrival_s > self.request.slo.ttft_s

    @property
    def attains(self) -> bool:
        """Whether what came of the answer so far is within both targets."""
        request, gaps = self.request, self.generated - 1
        tpot_s = (self.last_token_s - self.first_token_s) / gaps if gaps > 0 else None
        return request.slo.attained(self.first_token_s - request.arrival_s, tpot_s)

    def note_first_token(self, sequence: SimSequence, front_s: float, now: float) -> None:
        """Fill in the stages up to the request's first token. ``front_s`` passed on the way to the engine."""
        admitted_s = sequence.admitted_s
        assert admitted_s is not None
        self.first_token_s = now
        self.prefill_s = now - admitted_s
        self.queue_s = admitted_s - self.request.arrival_s - front_s
        self.other_s = front_s
        self.cached_tokens = sequence.cached_tokens

    def note_end(self, sequence: SimSequence) -> None:
        """Fill in the stages after the first token."""
        admitted_s, first_s = sequence.admitted_s, self.leg_first_s
        if admitted_s is None:
            raise InternalError(f"{self.request.id} ended without having been admitted")
        if self.legs - self.read_legs > 1:
            self.transfer_s = 0.0 if sequence.loaded_s is None else sequence.loaded_s - admitted_s
            self.decode_queue_s = admitted_s - self.placed_s
            self.first_step_s = first_s - self.placed_s - self.transfer_s - self.decode_queue_s
        self.decode_s = self.last_token_s - first_s

    def record(self) -> RequestRecord:
        """Return what the journal says of the request."""
        stages = {name: seconds for name in STAGES if (seconds := getattr(self, f"{name}_s")) == seconds}
        return RequestRecord(
            self.request.arrival_s,
            _reached(self.first_token_s),
            _reached(self.last_token_s),
            self.prefill_on,
            self.decode_on,
            self.predicted_prefill_s,
            _reached(self.prefill_s),
            self.cached_tokens,
            self.kv_transfer_bytes,
            self.replays,
            self.migrations,
            stages,
            self.read_tokens and self.read_tokens + self.cached_tokens,
            predicted_lengths=self.predicted,
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


class RequestColumns:
    """Collects a row per request at its number in order of arrival, in 176 bytes of one buffer.

    The table's columns are views of that buffer: nothing is copied at the end. ``missed`` is told once of
    each request that will not attain its SLO, by that number: at its first token where that is late, else
    when it ends.
    """

    def __init__(self, missed: Callable[[int], None] | None = None) -> None:
        self._missed = missed
        self.outcomes = ["ok"]
        self._codes = {"ok": 0}
        self._buffer = bytearray()
        self._written = 0

    def began(self, live: SimulatedRequest) -> None:
        """Hear of a request's first token."""
        if self._missed is not None and live.begins_late:
            self._missed(live.index)

    def write(
        self, live: SimulatedRequest, index: Mapping[str | None, int], outcome: str, end_s: float
    ) -> None:
        """Write down how a request ended; ``index`` numbers the instances by name, and None as -1."""
        code = self._codes.get(outcome)
        if code is None:
            code = self._codes[outcome] = len(self.outcomes)
            self.outcomes.append(outcome)
        at = live.index * _ROW.size
        while at >= len(self._buffer):
            self._buffer += _UNSET
        self._written += 1
        request = live.request
        slo = request.slo
        _ROW.pack_into(
            self._buffer,
            at,
            request.arrival_s,
            live.first_token_s,
            live.last_token_s,
            end_s,
            slo.ttft_s,
            slo.tpot_s,
            live.queue_s,
            live.prefill_s,
            live.other_s,
            live.transfer_s,
            live.decode_queue_s,
            live.first_step_s,
            live.decode_s,
            request.prompt_tokens,
            live.generated,
            code,
            index[live.prefill_on],
            index[live.decode_on],
            live.cached_tokens,
            live.preemptions,
            live.migrations,
            live.kv_transfer_bytes,
        )
        if self._missed is not None and not live.begins_late and (code or not live.attains):
            self._missed(live.index)

    def table(self, instances: Sequence[str], count: int, slo_class: Sequence[str]) -> RequestTable:
        """Return the first ``count`` requests. Raises InternalError unless each has exactly one end."""
        while len(self._buffer) < count * _ROW.size:
            self._buffer += _UNSET
        rows: NDArray[np.void] = np.frombuffer(self._buffer, dtype=_FIELDS, count=count)
        if self._written != count or (rows["outcome"] < 0).any():
            raise InternalError("a request has no end, or more than one")
        return RequestTable(
            instances=tuple(instances),
            outcomes=tuple(self.outcomes),
            slo_class=slo_class,
            stages_s={stage: rows[stage] for stage in STAGES},
            **{name: rows[name] for name in (*_TIMES, *_COUNTS)},
        )
