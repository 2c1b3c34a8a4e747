"""The journal of a simulation: the gateway's format, from virtual time, byte-equal for equal inputs."""

from __future__ import annotations

from typing import IO

from tidegate.core.slo import Slo
from tidegate.measure.rows import Row, encode_row


class SimJournal:
    """Writes a line per event to ``out``; without it nothing is written. ``t`` is virtual time."""

    def __init__(self, out: IO[bytes] | None) -> None:
        self.enabled = out is not None
        self._out = out

    def header(self, *, version: str, system: str, slo: Slo, instances: list[dict[str, str]]) -> None:
        """Write the first line. No wall time: that would differ between runs."""
        targets = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        row: Row = {"version": version, "system": system, "started_unix_s": 0.0, "slo": targets}
        self.write("header", 0.0, row | {"instances": instances})

    def write(self, kind: str, now_s: float, row: Row) -> None:
        """Append a line of type ``kind``."""
        if self._out is not None:
            self._out.write(encode_row(kind, now_s, row) + b"\n")
