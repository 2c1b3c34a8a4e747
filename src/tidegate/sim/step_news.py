"""When the control plane hears of the steps of simulated instances."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.ledger.ledger import Ledger


class StepNews:
    """Tells the ledger of steps: at once, or with ``late`` as of the last heartbeat or answer only."""

    def __init__(self, ledger: Ledger, ids: Sequence[str], *, late: bool) -> None:
        self.late = late
        self._ledger = ledger
        self._ids = ids
        self._untold: list[list[tuple[int, float]]] = [[] for _ in ids]

    def stepped(self, instance: int, count: int, now: float) -> None:
        """Hear of ``count`` steps of an instance, the last of which ended at ``now``."""
        if self.late:
            self._untold[instance].append((count, now))
        else:
            self._ledger.stepped(self._ids[instance], count, now)

    def tell(self, instance: int) -> None:
        """Have the ledger know all steps of an instance so far: before who steps together there changes.

        A response tells more than its own token: what brings an instance's answer (a first token, an end, a
        preemption) brings the steps before it, too. Nothing for instance -1, which is none.
        """
        if self.late and instance >= 0:
            for count, at_s in self._untold[instance]:
                self._ledger.stepped(self._ids[instance], count, at_s)
            self._untold[instance].clear()

    def tell_all(self) -> None:
        """Have the ledger know all steps of every instance so far."""
        for instance in range(len(self._ids)):
            self.tell(instance)
