"""KV on the way: transfers, the ports that they share, and which ports each takes.

Every instance sends over two ports of its own and receives over two: one to or from its node, one for what
lies elsewhere. A transfer takes one port at each end and gets the lesser of its equal shares of the two. That
is never more than a port carries, and never more than what max-min fairness would give: there every transfer
has at least an equal share of the port that holds it back. What one end leaves unused is not dealt out
again, which would tie the rates of all transfers in a cluster together; here a beginning or an end concerns
those at its own two ports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from tidegate.core.errors import InternalError
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import Pin, SimSequence


@dataclass(slots=True, eq=False)
class Transfer:
    """``n_bytes`` of a sequence's KV on their way; ``pin`` is what a pull takes, None for a migration.

    ``number`` counts transfers as they begin.
    """

    sequence: SimSequence
    src: int
    dst: int
    n_bytes: int
    pin: Pin | None = None
    number: int = -1


@dataclass(slots=True, eq=False)
class Port:
    """One end of the ways that ``ways`` lists where anything is on them: ``count`` transfers in all."""

    bytes_per_s: float
    count: int = 0
    ways: list[Way] = field(default_factory=list)


class Way:
    """The way from one port to another. Transfers that are on it at one time go equally fast.

    ``latency_s`` passes before a transfer enters. Progress is kept as bytes per transfer since the way was
    last empty (``_level``): a transfer that enters at level v with n bytes ends at level v + n, whatever
    comes and goes meanwhile.

    ``end_s`` is when the next transfer ends if nothing changes before, infinite while idle, and ``version``
    counts its changes.
    """

    def __init__(self, index: int, source: Port, target: Port, latency_s: float) -> None:
        self.index = index
        self.source = source
        self.target = target
        self.latency_s = latency_s
        self.entering: dict[int, Transfer] = {}
        self.end_s = math.inf
        self.version = 0
        self._bytes_per_s = 0.0
        self._level = 0.0
        self._at_s = 0.0
        self._ends: list[tuple[float, int, Transfer]] = []

    def enter(self, number: int, now: float) -> None:
        """Put on a transfer whose latency is over."""
        transfer = self.entering.pop(number)
        if self._ends:
            self._settle(now)
        else:
            self._at_s, self._level, self._bytes_per_s = now, 0.0, 0.0
            self.source.ways.append(self)
            self.target.ways.append(self)
        heappush(self._ends, (self._level + transfer.n_bytes, number, transfer))
        self._taken(1)

    def leave(self, now: float) -> Transfer:
        """Take out the transfer that ends at ``now``, which is ``end_s``."""
        self._level, _, transfer = heappop(self._ends)
        self._at_s = now
        self._taken(-1)
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take out a transfer that is not to end."""
        if self.entering.pop(transfer.number, None) is None:
            self._settle(now)
            self._ends = [end for end in self._ends if end[2] is not transfer]
            heapify(self._ends)
            self._taken(-1)

    def pull_of(self, sequence: SimSequence) -> Transfer | None:
        """Return the pull that a loading sequence waits for; None when it is not on this way."""
        under_way = [*self.entering.values(), *(end[2] for end in self._ends)]
        return next((t for t in under_way if t.sequence is sequence and t.pin is not None), None)

    def rate(self, now: float, *, changed: bool) -> bool:
        """Go on as fast as the ports allow from ``now`` on; tell whether ``end_s`` is another.

        ``changed``: a transfer has come or gone on this way itself.
        """
        source, target = self.source, self.target
        bytes_per_s = min(source.bytes_per_s / source.count, target.bytes_per_s / target.count)
        if bytes_per_s != self._bytes_per_s:
            self._settle(now)
            self._bytes_per_s = bytes_per_s
        elif not changed:
            return False
        self.end_s = self._at_s + max(0.0, self._ends[0][0] - self._level) / bytes_per_s
        self.version += 1
        return True

    def _settle(self, now: float) -> None:
        self._level += (now - self._at_s) * self._bytes_per_s
        self._at_s = now

    def _taken(self, count: int) -> None:
        self.source.count += count
        self.target.count += count
        if not self._ends:
            self.end_s = math.inf
            self.version += 1
            self.source.ways.remove(self)
            self.target.ways.remove(self)


class Network:
    """The ways among ``replicas``. Announced are what enters each, and its next end, and no more."""

    def __init__(self, replicas: Sequence[Replica], events: EventQueue) -> None:
        self._replicas = replicas
        self._heap = events.heap
        self._ways: list[Way] = []
        self._ports: dict[str, Port] = {}
        self._way_of: dict[tuple[str, str], Way] = {}
        self._way_between: dict[tuple[int, int], Way] = {}
        self._begun = 0

    def begin(self, transfer: Transfer, now: float) -> None:
        """Send off a transfer.

        However short the latency is, time passes: what a step's start sends off is over in a moment after it.
        """
        self._begun += 1
        transfer.number = self._begun
        way = self._way_between.get((transfer.src, transfer.dst))
        if way is None:
            way = self._add_way(transfer.src, transfer.dst)
        entry_s = now + way.latency_s
        if entry_s <= now:
            entry_s = math.nextafter(now, math.inf)
        way.entering[self._begun] = transfer
        heappush(self._heap, (entry_s, EventKind.LINK, way.index, -self._begun))

    def leave(self, at: int, version: int, now: float) -> Transfer | None:
        """Return the transfer that has ended on way ``at``.

        None where one enters instead, and where the event was called off.
        """
        way = self._ways[at]
        if version < 0:
            if -version in way.entering:
                way.enter(-version, now)
                self._share(way, now)
            return None
        if version != way.version:
            return None
        transfer = way.leave(now)
        self._share(way, now)
        return transfer

    def cancel(self, transfer: Transfer, now: float) -> None:
        """Take back a transfer that has not ended."""
        way = self._way_between[transfer.src, transfer.dst]
        way.cancel(transfer, now)
        self._share(way, now)

    def pull_of(self, sequence: SimSequence) -> Transfer:
        """Return the pull that a loading sequence waits for. Raises InternalError when there is none."""
        way = sequence.source and self._way_between.get((sequence.source.on, sequence.on))
        transfer = way and way.pull_of(sequence)
        if transfer:
            return transfer
        raise InternalError(f"nothing is on its way to the leg of request {sequence.request}")

    def _share(self, changed: Way, now: float) -> None:
        """Share the ports of ``changed`` anew, and announce the next ends that are others now."""
        for port in (changed.source, changed.target):
            for way in port.ways:
                if way is changed and port is changed.target:
                    continue
                if way.rate(now, changed=way is changed):
                    heappush(self._heap, (way.end_s, EventKind.LINK, way.index, way.version))

    def _add_way(self, src: int, dst: int) -> Way:
        """Return the way between two instances: that of all between the same two ports."""
        sender, receiver = self._replicas[src], self._replicas[dst]
        out, into = sender.profile.transfer, receiver.profile.transfer
        names = f">{sender.instance.id}", receiver.link or f"<{receiver.instance.id}"
        if receiver.inter_node is not None and sender.node != receiver.node:
            out, into = sender.inter_node or out, receiver.inter_node
            names = f"{names[0]}\0", f"{names[1]}\0"
        source = self._ports.setdefault(names[0], Port(float(out.bytes_per_s)))
        target = self._ports.setdefault(names[1], Port(float(into.bytes_per_s)))
        way = self._way_of.setdefault(names, Way(len(self._ways), source, target, float(into.latency_s)))
        if way.index == len(self._ways):
            self._ways.append(way)
        self._way_between[src, dst] = way
        return way
