"""For how long instances were up, by a journal."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.journal.schema import InstanceLine


def up_s(events: Iterable[InstanceLine], end_s: float, start_s: float = 0.0) -> float:
    """Return the seconds from ``start_s`` to ``end_s`` in which instances were up, summed over them.

    One that comes up twice without going down, as under a gateway that was killed, counts from the second
    time on.
    """
    since_s: dict[str, float] = {}
    total_s = 0.0
    for event in events:
        if event.event == "up":
            since_s[event.instance] = max(start_s, event.t_s)
        elif event.event == "down" and event.instance in since_s:
            total_s += max(0.0, min(event.t_s, end_s) - since_s.pop(event.instance))
    return total_s + sum(max(0.0, end_s - at_s) for at_s in since_s.values())
