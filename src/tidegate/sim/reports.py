"""What the control plane knows of steps, and since when."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.control.plane import ControlPlane


class StepReports:
    """Tells the ledger of steps: at once, or with ``heartbeat_s`` > 0 as of the last heartbeat.

    A response tells more than its own token: what brings an instance's answer (a first token, an end, a
    preemption) brings the steps before it, too, because the ledger counts decodes that step together by
    the same steps.
    """

    def __init__(self, plane: ControlPlane, ids: Sequence[str], heartbeat_s: float) -> None:
        self.counts = [0] * len(ids)
        # Where nobody listens to tokens the ledger is all that the plane would tell.
        self._step = plane.stepped if plane.system.observers else plane.ledger.stepped
        self._ids = ids
        self._stale = heartbeat_s > 0
        self._untold: list[list[tuple[int, float]]] = [[] for _ in ids]

    def stepped(self, instance: int, count: int, now: float) -> None:
        """Take note of ``count`` steps of every decode in step on an instance."""
        self.counts[instance] += count
        if self._stale:
            self._untold[instance].append((count, now))
        else:
            self._step(self._ids[instance], count, now)

    def tell(self, instance: int) -> None:
        """Have the ledger know all steps of an instance so far: before who steps together there changes."""
        untold = self._untold[instance]
        if untold:
            for count, at_s in untold:
                self._step(self._ids[instance], count, at_s)
            untold.clear()

    def heartbeat(self) -> None:
        """Have the ledger know all steps so far."""
        for instance in range(len(self._ids)):
            self.tell(instance)
