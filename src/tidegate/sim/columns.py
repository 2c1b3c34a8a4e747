"""The requests of a run as they end: one packed row each, read back as columns."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import InternalError
from tidegate.core.stages import STAGES
from tidegate.measure.request_table import RequestTable
from tidegate.sim.flight import SimulatedRequest

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


class RequestColumns:
    """Collects a row per request at its number in order of arrival, in 168 bytes of one buffer.

    The table's columns are views of that buffer: nothing is copied at the end.
    """

    def __init__(self) -> None:
        self.outcomes = ["ok"]
        self._codes = {"ok": 0}
        self._buffer = bytearray()
        self._written = 0

    def write(
        self, flight: SimulatedRequest, index: Mapping[str | None, int], outcome: str, end_s: float
    ) -> None:
        """Write down how a request ended; ``index`` numbers the instances by name, and None as -1."""
        code = self._codes.get(outcome)
        if code is None:
            code = self._codes[outcome] = len(self.outcomes)
            self.outcomes.append(outcome)
        at = flight.index * _ROW.size
        while at >= len(self._buffer):
            self._buffer += _UNSET
        self._written += 1
        request = flight.request
        slo = request.slo
        _ROW.pack_into(
            self._buffer,
            at,
            request.arrival_s,
            flight.first_token_s,
            flight.last_token_s,
            end_s,
            slo.ttft_s,
            slo.tpot_s,
            flight.queue_s,
            flight.prefill_s,
            flight.transfer_s,
            flight.decode_queue_s,
            flight.first_step_s,
            flight.decode_s,
            request.prompt_tokens,
            flight.generated,
            code,
            index[flight.prefill_on],
            index[flight.decode_on],
            flight.cached_tokens,
            flight.preemptions,
            flight.migrations,
            flight.kv_transfer_bytes,
        )

    def table(self, instances: Sequence[str], count: int) -> RequestTable:
        """Return the first ``count`` requests. Raises InternalError unless each has exactly one end."""
        while len(self._buffer) < count * _ROW.size:
            self._buffer += _UNSET
        rows: NDArray[np.void] = np.frombuffer(self._buffer, dtype=_FIELDS, count=count)
        if self._written != count or (rows["outcome"] < 0).any():
            raise InternalError("a request has no end, or more than one")
        return RequestTable(
            instances=tuple(instances),
            outcomes=tuple(self.outcomes),
            stages_s={stage: rows[stage] for stage in STAGES},
            **{name: rows[name] for name in (*_TIMES, *_COUNTS)},
        )
