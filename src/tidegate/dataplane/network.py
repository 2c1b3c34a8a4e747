"""Which link a transfer takes, and how far it is.

Every instance receives over two ports of its own: one from its node, one from elsewhere. All that comes in
over a port shares it. The sender's side does not contend: its port is as wide, and it is the decodes that
pull, so transfers meet at the receiver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Fleet

from tidegate.dataplane.events import EventQueue, Kind
from tidegate.dataplane.links import Link
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import Pin, Sequence


class Transfer:
    """``n_bytes`` of a sequence's KV on their way; ``pin`` is what a pull takes, None for a migration."""

    __slots__ = ("dst", "n_bytes", "number", "pin", "sequence", "src")

    def __init__(self, sequence: Sequence, src: int, dst: int, n_bytes: int, pin: Pin | None = None) -> None:
        self.sequence = sequence
        self.src = src
        self.dst = dst
        self.n_bytes = n_bytes
        self.pin = pin
        self.number = -1


class Network:
    """The links among ``replicas``, and the transfers that wait for one or are on one."""

    def __init__(self, replicas: Fleet[Replica], events: EventQueue) -> None:
        self._replicas = replicas
        self._events = events
        self._links: list[Link] = []
        self._link_of: dict[str, int] = {}
        self._link_between: dict[tuple[int, int], int] = {}
        self._transfers: dict[int, Transfer] = {}
        self._begun = 0

    def begin(self, transfer: Transfer, now: float) -> None:
        """Send off a transfer; its link's latency passes before it takes a share of the bandwidth.

        However short that is, time passes: what a step's start sends off is over in a moment after it.
        """
        self._begun += 1
        transfer.number = self._begun
        self._transfers[transfer.number] = transfer
        entry_s = max(now + self._links[self._link(transfer)].latency_s, math.nextafter(now, math.inf))
        self._events.push(entry_s, Kind.LINK_ENTRY, transfer.sequence.request, transfer.number)

    def enter(self, number: int, now: float) -> None:
        """Have a transfer take its share of the bandwidth, unless it was called off."""
        transfer = self._transfers.get(number)
        if transfer is not None:
            link = self._link(transfer)
            self._links[link].enter(number, transfer.n_bytes, now)
            self._announce(link)

    def leave(self, link: int, version: int, now: float) -> Transfer | None:
        """Return the transfer that has ended; None when the event was called off."""
        if version != self._links[link].version:
            return None
        number = self._links[link].leave(now)
        self._announce(link)
        return self._transfers.pop(number)

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take back a transfer that has not ended."""
        del self._transfers[transfer.number]
        link = self._link(transfer)
        self._links[link].cancel(transfer.number, now)
        self._announce(link)

    def pull_of(self, sequence: Sequence) -> Transfer:
        """Return the pull that a loading sequence waits for."""
        return next(t for t in self._transfers.values() if t.sequence is sequence and t.pin is not None)

    def _link(self, transfer: Transfer) -> int:
        between = (transfer.src, transfer.dst)
        link = self._link_between.get(between, -1)
        if link < 0:
            link = self._link_between[between] = self._find_link(transfer.src, transfer.dst)
        return link

    def _find_link(self, src: int, dst: int) -> int:
        to = self._replicas[dst]
        cost, name = to.profile.transfer, to.link or f"\0{to.instance.id}"
        if to.inter_node is not None and self._replicas[src].node != to.node:
            cost, name = to.inter_node, f"{name}\0"
        link = self._link_of.setdefault(name, len(self._links))
        if link == len(self._links):
            self._links.append(Link(cost))
        return link

    def _announce(self, link: int) -> None:
        at_s = self._links[link].next_end_s()
        self._links[link].version += 1
        if at_s is not None:
            self._events.push(at_s, Kind.LINK, link, self._links[link].version)
