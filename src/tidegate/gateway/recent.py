"""What happened lately, for who watches: latencies beside their targets, and what became of instances."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from tidegate.control.effects import Drains, Flipped, StartInstance, StartMigration, StopInstance
from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.measure.percentiles import summarize

WINDOW_S = 60.0
MOST_REQUESTS = 2000
MOST_EVENTS = 40


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at ``at_s``; ``text`` is a sentence for a person."""

    at_s: float
    kind: str
    text: str


class Recent:
    """The requests of the last minute and the last events."""

    def __init__(self) -> None:
        self._ended: deque[tuple[RequestRecord, RequestEnding]] = deque(maxlen=MOST_REQUESTS)
        self._events: deque[Event] = deque(maxlen=MOST_EVENTS)

    def ended(self, record: RequestRecord, ending: RequestEnding) -> None:
        """Take in a request, at its end."""
        self._ended.append((record, ending))

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
        while self._ended and self._ended[0][1].end_s < now - WINDOW_S:
            self._ended.popleft()
        seen = list(self._ended)
        ttft_s = summarize(record.ttft_s for record, _ in seen)
        tpot_s = summarize(record.tpot_s(ending.output_tokens) for record, ending in seen)
        recent = {
            "window_s": WINDOW_S,
            "requests": len(seen),
            "failed": sum(ending.error is not None for _, ending in seen),
            "attained_share": sum(ending.attained(record) for record, ending in seen) / len(seen)
            if seen
            else None,
            "ttft_p50_s": None if ttft_s is None else round(ttft_s.p50, 6),
            "ttft_p99_s": None if ttft_s is None else round(ttft_s.p99, 6),
            "tpot_p50_s": None if tpot_s is None else round(tpot_s.p50, 6),
            "tpot_p99_s": None if tpot_s is None else round(tpot_s.p99, 6),
        }
        events = [
            {"ago_s": round(now - each.at_s, 1), "kind": each.kind, "text": each.text}
            for each in reversed(self._events)
        ]
        return {"recent": recent, "events": events}
