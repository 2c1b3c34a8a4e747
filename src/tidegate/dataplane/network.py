"""Which link a transfer takes.

Every instance receives over two ports of its own: one from its node, one from elsewhere. All that comes in
over a port shares it. The sender's side does not contend: its port is as wide, and it is the decodes that
pull, so transfers meet at the receiver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappush

from tidegate.core.errors import InternalError
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.links import Link, Transfer
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import SimSequence


class Network:
    """The links among ``replicas``. Of every link the next end of a transfer is announced, and no more."""

    def __init__(self, replicas: Sequence[Replica], events: EventQueue) -> None:
        self._replicas = replicas
        self._heap = events.heap
        self._links: list[Link] = []
        self._link_of: dict[str, int] = {}
        self._link_between: dict[tuple[int, int], int] = {}
        self._begun = 0

    def begin(self, transfer: Transfer, now: float) -> None:
        """Send off a transfer."""
        self._begun += 1
        transfer.number = self._begun
        between = (transfer.src, transfer.dst)
        at = self._link_between.get(between, -1)
        if at < 0:
            at = self._link_between[between] = self._find_link(transfer.src, transfer.dst)
        link = self._links[at]
        if link.begin(transfer, now):
            heappush(self._heap, (link.end_s, EventKind.LINK, at, link.version))

    def leave(self, at: int, version: int, now: float) -> Transfer | None:
        """Return the transfer that has ended on link ``at``; None when the event was called off."""
        link = self._links[at]
        if version != link.version:
            return None
        transfer = link.leave(now)
        if link.end_s < math.inf:
            heappush(self._heap, (link.end_s, EventKind.LINK, at, link.version))
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take back a transfer that has not ended."""
        at = self._link_between[transfer.src, transfer.dst]
        link = self._links[at]
        link.cancel(transfer, now)
        if link.end_s < math.inf:
            heappush(self._heap, (link.end_s, EventKind.LINK, at, link.version))

    def pull_of(self, sequence: SimSequence) -> Transfer:
        """Return the pull that a loading sequence waits for. Raises InternalError when there is none."""
        for link in self._links:
            transfer = link.pull_of(sequence)
            if transfer is not None:
                return transfer
        raise InternalError(f"nothing is on its way to the leg of request {sequence.request}")

    def _find_link(self, src: int, dst: int) -> int:
        to = self._replicas[dst]
        cost, name = to.profile.transfer, to.link or f"\0{to.instance.id}"
        if to.inter_node is not None and self._replicas[src].node != to.node:
            cost, name = to.inter_node, f"{name}\0"
        link = self._link_of.setdefault(name, len(self._links))
        if link == len(self._links):
            self._links.append(Link(cost))
        return link
