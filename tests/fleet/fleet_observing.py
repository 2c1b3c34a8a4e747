"""What the fleet tests share: a listener that remembers, and waiting for a condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from tidegate.fleet.member import Member


class Recorder:
    """A FleetListener that keeps every report in order and the members that are up."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, str]] = []
        self.ups: list[Member] = []
        self.up: dict[str, Member] = {}

    def member_up(self, member: Member) -> None:
        assert member.instance.id not in self.up, "up twice without a down between"
        self.reports.append(("up", member.instance.id))
        self.ups.append(member)
        self.up[member.instance.id] = member

    def member_down(self, instance_id: str, reason: str) -> None:
        assert reason
        self.reports.append(("down", instance_id))
        del self.up[instance_id]

    def start_failed(self, instance_id: str, reason: str) -> None:
        assert reason and instance_id not in self.up
        self.reports.append(("failed", instance_id))


async def until(condition: Callable[[], bool], deadline_s: float = 15.0) -> None:
    """Return once ``condition`` holds; fail the test when it does not within ``deadline_s``."""
    ends_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends_at, "the condition did not come true in time"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Tell whether ``pid`` runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
