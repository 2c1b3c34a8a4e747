"""What happened lately, for who watches: latencies beside their targets, and what became of instances."""

from __future__ import annotations

import math
import struct
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidegate.control.effects import Drains, Flipped, StartInstance, StartMigration, StopInstance
from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.measure.percentiles import summarize

WINDOW_S = 60.0
MOST_REQUESTS = 2000
MOST_EVENTS = 40
_ROW = struct.Struct("=5d")
"""End, TTFT and TPOT in seconds (NaN for none), and whether it failed and attained."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at ``at_s``; ``text`` is a sentence for a person."""

    at_s: float
    kind: str
    text: str


class Recent:
    """The requests of the last minute and the last events.

    Requests are kept as bare numbers: thousands of objects that die late cost every later request memory
    that no cache holds, about a tenth of all that it takes.
    """

    def __init__(self) -> None:
        self._rows = bytearray(MOST_REQUESTS * _ROW.size)
        self._ended = 0
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)

    def ended(self, record: RequestRecord, ending: RequestEnding) -> None:
        """Take in a request, at its end."""
        ttft_s, tpot_s = record.ttft_s, record.tpot_s(ending.output_tokens)
        _ROW.pack_into(
            self._rows,
            self._ended % MOST_REQUESTS * _ROW.size,
            ending.end_s,
            math.nan if ttft_s is None else ttft_s,
            math.nan if tpot_s is None else tpot_s,
            ending.error is not None,
            ending.attained(record),
        )
        self._ended += 1

    def happened(self, at_s: float, text: str, kind: str = "instance") -> None:
        """Note an event of a ``kind``: flip, migration, drain or instance."""
        self._events.append(Event(at_s, kind, text))

    def carried_out(
        self, at_s: float, effect: Flipped | Drains | StartInstance | StartMigration | StopInstance
    ) -> None:
        """Note what was decided, with its reason."""
        kind, why = "instance", effect.migrate.reason if isinstance(effect, StartMigration) else effect.reason
        match effect:
            case Flipped(instance, before, after):
                kind, text = "flip", f"{instance} from {before.label} to {after.label}"
                why = effect.why or why
            case StartMigration(_, migrate):
                kind, text = "migration", f"a decode moves from {migrate.src} to {migrate.dst}"
            case Drains(instance, _, remove, ended):
                drains = "drains, to be removed" if remove else "drains"
                kind, text = "drain", f"{instance} {'drains no more' if ended else drains}"
            case StartInstance(role):
                text = f"one more instance starts, for {role.label}"
            case StopInstance(instance):
                text = f"{instance} is removed"
        self.happened(at_s, f"{text}: {why}" if why else text, kind)

    def state(self, now: float) -> dict[str, Any]:
        """Return both for ``/tidegate/state``: ``recent`` and, the latest first, ``events``."""
        rows = np.frombuffer(self._rows).reshape(MOST_REQUESTS, -1)[: self._ended]
        end_s, ttft_s, tpot_s, failed, attained = rows[rows[:, 0] >= now - WINDOW_S].T
        recent = {
            "window_s": WINDOW_S,
            "requests": end_s.size,
            "failed": int(failed.sum()),
            "attained_share": float(attained.mean()) if end_s.size else None,
        }
        for name, seconds in (("ttft", ttft_s), ("tpot", tpot_s)):
            found = summarize(seconds[~np.isnan(seconds)].tolist())
            recent[f"{name}_p50_s"] = None if found is None else round(found.p50, 6)
            recent[f"{name}_p99_s"] = None if found is None else round(found.p99, 6)
        events = [
            {"ago_s": round(now - each.at_s, 1), "kind": each.kind, "text": each.text}
            for each in reversed(self._events)
        ]
        return {"recent": recent, "events": events}
