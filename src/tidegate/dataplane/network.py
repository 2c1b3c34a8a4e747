"""KV on the way: transfers, the links that they share, and which link each takes.

Every instance receives over two ports of its own: one from its node, one from elsewhere. All that comes in
over a port shares it. The sender's side does not contend: its port is as wide, and it is the decodes that
pull, so transfers meet at the receiver.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice

from tidegate.core.errors import InternalError
from tidegate.costs.forms import TransferCost
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import Pin, SimSequence


@dataclass(slots=True, eq=False)
class Transfer:
    """``n_bytes`` of a sequence's KV on their way; ``pin`` is what a pull takes, None for a migration.

    It takes a share of its link's bandwidth from ``entry_s`` on; ``number`` counts transfers as they begin.
    """

    sequence: SimSequence
    src: int
    dst: int
    n_bytes: int
    pin: Pin | None = None
    number: int = -1
    entry_s: float = math.nan


class Link:
    """One link. Transfers that are on it at one time get equal shares of its bandwidth.

    ``latency_s`` passes before a transfer enters. Progress is kept as bytes per transfer since the link
    began (``_level``): a transfer that enters at level v with n bytes ends at level v + n, whatever comes
    and goes meanwhile. ``_ahead`` is that state where the first ``_looked`` of the transfers still to enter
    have done so: (time, level, number on the link, level at which the next one ends).

    ``end_s`` is when the next transfer ends if none begins before, infinite while idle, and ``version``
    counts its changes.
    """

    def __init__(self, cost: TransferCost) -> None:
        self.latency_s = float(cost.latency_s)
        self.version = 0
        self.end_s = math.inf
        self._bytes_per_s = float(cost.bytes_per_s)
        self._level = 0.0
        self._at_s = 0.0
        self._ends: list[tuple[float, int, Transfer]] = []
        self._entering: deque[Transfer] = deque()
        self._ahead = (0.0, 0.0, 0, math.inf)
        self._looked = 0

    def begin(self, transfer: Transfer, now: float) -> bool:
        """Send off a transfer; tell whether that changes ``end_s``.

        However short the latency is, time passes: what a step's start sends off is over in a moment after it.
        """
        entry_s = now + self.latency_s
        if entry_s <= now:
            entry_s = math.nextafter(now, math.inf)
        transfer.entry_s = entry_s
        self._entering.append(transfer)
        if self.end_s == math.inf:  # it has the link to itself, as yet
            self._ahead = entry_s, 0.0, 1, float(transfer.n_bytes)
            self._looked = 1
            self.end_s = entry_s + transfer.n_bytes / self._bytes_per_s
            self.version += 1
            return True
        if entry_s >= self.end_s:
            return False
        self._look_ahead()
        return True

    def leave(self, now: float) -> Transfer:
        """Take out the transfer that ends at ``now``, which is ``end_s``."""
        if self._looked == 1 and not self._ends:  # it had the link to itself
            transfer = self._entering.popleft()
            self._at_s, self._level = now, 0.0
            if not self._entering:
                self.end_s = math.inf
                self.version += 1
                return transfer
        else:
            for _ in range(self._looked):  # those that enter before
                self._enter()
            self._advance(now)
            level, _, transfer = heappop(self._ends)
            self._level = level if self._ends else 0.0
        self._look_again()
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take out a transfer that is not to end."""
        while self._entering and self._entering[0].entry_s <= now:
            self._enter()
        self._advance(now)
        if transfer in self._entering:
            self._entering.remove(transfer)
        else:
            self._ends = [end for end in self._ends if end[2] is not transfer]
            heapify(self._ends)
        if not self._ends:
            self._level = 0.0
        self._look_again()

    def pull_of(self, sequence: SimSequence) -> Transfer | None:
        """Return the pull that a loading sequence waits for; None when it is not on this link."""
        under_way = [*self._entering, *(end[2] for end in self._ends)]
        return next((t for t in under_way if t.sequence is sequence and t.pin is not None), None)

    def _enter(self) -> None:
        transfer = self._entering.popleft()
        self._advance(transfer.entry_s)
        heappush(self._ends, (self._level + transfer.n_bytes, transfer.number, transfer))

    def _advance(self, now: float) -> None:
        if self._ends:
            self._level += (now - self._at_s) * self._bytes_per_s / len(self._ends)
        self._at_s = now

    def _look_again(self) -> None:
        ends = self._ends
        self._ahead = self._at_s, self._level, len(ends), ends[0][0] if ends else math.inf
        self._looked = 0
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Work out ``end_s``, with the transfers that enter before it: the arithmetic of ``_enter``."""
        at_s, level, count, least = self._ahead
        bytes_per_s = self._bytes_per_s
        end_s = at_s + max(0.0, least - level) * count / bytes_per_s if count else math.inf
        entering = self._entering
        for transfer in islice(entering, self._looked, None) if self._looked else entering:
            if transfer.entry_s >= end_s:
                break
            if count:
                level += (transfer.entry_s - at_s) * bytes_per_s / count
            at_s = transfer.entry_s
            count += 1
            if level + transfer.n_bytes < least:
                least = level + transfer.n_bytes
            end_s = at_s + max(0.0, least - level) * count / bytes_per_s
            self._looked += 1
        self._ahead = at_s, level, count, least
        self.end_s = end_s
        self.version += 1


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
        if self._links[at].begin(transfer, now):
            self._announce(at)

    def leave(self, at: int, version: int, now: float) -> Transfer | None:
        """Return the transfer that has ended on link ``at``; None when the event was called off."""
        link = self._links[at]
        if version != link.version:
            return None
        transfer = link.leave(now)
        self._announce(at)
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take back a transfer that has not ended."""
        at = self._link_between[transfer.src, transfer.dst]
        self._links[at].cancel(transfer, now)
        self._announce(at)

    def pull_of(self, sequence: SimSequence) -> Transfer:
        """Return the pull that a loading sequence waits for. Raises InternalError when there is none."""
        for link in self._links:
            transfer = link.pull_of(sequence)
            if transfer is not None:
                return transfer
        raise InternalError(f"nothing is on its way to the leg of request {sequence.request}")

    def _announce(self, at: int) -> None:
        """Announce the next end of a transfer on link ``at``, if there is one."""
        link = self._links[at]
        if link.end_s < math.inf:
            heappush(self._heap, (link.end_s, EventKind.LINK, at, link.version))

    def _find_link(self, src: int, dst: int) -> int:
        to = self._replicas[dst]
        cost, name = to.profile.transfer, to.link or f"\0{to.instance.id}"
        if to.inter_node is not None and self._replicas[src].node != to.node:
            cost, name = to.inter_node, f"{name}\0"
        link = self._link_of.setdefault(name, len(self._links))
        if link == len(self._links):
            self._links.append(Link(cost))
        return link
