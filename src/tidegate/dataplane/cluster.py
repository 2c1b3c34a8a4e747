"""The simulated data plane: instances, and the links between them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Fleet

from tidegate.core.errors import InternalError
from tidegate.dataplane.events import Event, EventQueue, Kind
from tidegate.dataplane.instance import Listener, SimInstance
from tidegate.dataplane.links import Link
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import ENDED, LOADING, NEW, Pin, Sequence
from tidegate.policies.order import Fifo, Order


class Cluster:
    """Runs legs and moves KV.

    An instance receives over a link of its own, of its profile's transfer cost, unless its replica names
    one that it shares.
    """

    def __init__(
        self,
        replicas: Fleet[Replica],
        events: EventQueue,
        listener: Listener,
        *,
        leap: bool,
        order: Order | None = None,
    ) -> None:
        order = order or Fifo()
        self.instances = [
            SimInstance(index, replica, order.queue(), events, listener, leap=leap)
            for index, replica in enumerate(replicas)
        ]
        self._events = events
        self._links: list[Link] = []
        self._link_of: list[int] = []
        named: dict[str, int] = {}
        for replica in replicas:
            link = named.setdefault(replica.link or f"\0{replica.instance.id}", len(named))
            if link == len(self._links):
                self._links.append(Link(replica.profile.transfer))
            self._link_of.append(link)
        self._lease_ends: list[tuple[float, int, Pin]] = []
        self._lease_event_s: float | None = None
        self._leases = 0
        self._pulls: dict[int, tuple[Sequence, Pin, int]] = {}
        self._pulled = 0

    def report(self, now: float) -> None:
        """Have the instances that leap tell of the steps that ended by ``now``."""
        for instance in self.instances:
            if instance.report_due_s <= now:
                instance.report(now)

    def submit(self, instance: int, sequence: Sequence, now: float) -> None:
        """Queue a leg at an instance."""
        self.instances[instance].submit(sequence, now)

    def abort(self, sequence: Sequence, now: float) -> None:
        """Free at once all that a leg holds anywhere: in its instance, on a link, behind its pins.

        Nothing more is told of it, but for the steps that ended by ``now``. A leg that has ended only gives
        up the KV that waits for its decode; once a decode took that KV, it is the decode's.
        """
        if sequence.pin is not None:
            self.drop(sequence.pin, now)
        if sequence.state == LOADING:
            self._cancel_pull(sequence, now)
        elif sequence.source is not None:
            self.drop(sequence.source, now)
        if sequence.state == NEW:
            sequence.state = ENDED
        elif sequence.state != ENDED:
            self.instances[sequence.on].abort(sequence, now)

    def handle(self, event: Event) -> None:
        """Do what an event of the data plane announces. Raises InternalError for any other event."""
        now, kind, whose, version = event
        # The frequent ones first.
        if kind is Kind.STEP_END:
            self.step_end(whose, version, now)
        elif kind is Kind.STEP_START:
            self.instances[whose].start(now)
        elif kind is Kind.LINK:
            self.leave_link(whose, version, now)
        elif kind is Kind.LINK_ENTRY:
            self.enter_link(version, now)
        elif kind is Kind.LEASE:
            self.end_leases(now)
        else:
            raise InternalError(f"{kind!r} is not an event of the data plane")

    def pull(self, sequence: Sequence, to: int, now: float) -> int:
        """Bring the KV behind the sequence's source to instance ``to``; return how many bytes that are."""
        pin = sequence.source
        assert pin is not None
        self._pulled += 1
        self._pulls[self._pulled] = (sequence, pin, to)
        entry_s = now + self._links[self._link_of[to]].latency_s
        self._events.push(entry_s, Kind.LINK_ENTRY, sequence.request, self._pulled)
        return self._bytes_to_pull(sequence, pin)

    def enter_link(self, number: int, now: float) -> None:
        """Have a pull take its share of the bandwidth, unless it was called off."""
        if number not in self._pulls:
            return
        sequence, pin, to = self._pulls[number]
        self._links[self._link_of[to]].enter(number, self._bytes_to_pull(sequence, pin), now)
        self._announce(self._link_of[to])

    def leave_link(self, link: int, version: int, now: float) -> None:
        """Finish a pull: its source's blocks are free, and its leg may run."""
        if version != self._links[link].version:
            return
        number = self._links[link].leave(now)
        self._announce(link)
        sequence, pin, to = self._pulls.pop(number)
        sequence.loaded_s = now
        self.instances[pin.on].unpin(pin, now)
        self.instances[to].loaded(sequence, pin.tokens, now)

    def begin_lease(self, pin: Pin, now: float) -> None:
        """Keep KV for a decode, for as long as its instance's lease lasts."""
        ends_s = now + self.instances[pin.on].replica.engine.lease_s
        self._leases += 1
        heapq.heappush(self._lease_ends, (ends_s, self._leases, pin))
        if self._lease_event_s is None or ends_s < self._lease_event_s:
            self._announce_lease()

    def end_leases(self, now: float) -> None:
        """Free the KV whose lease is over, and look ahead to the next lease that still counts."""
        self._lease_event_s = None
        while self._lease_ends and (self._lease_ends[0][0] <= now or self._lease_ends[0][2].taken):
            self.drop(heapq.heappop(self._lease_ends)[2], now)
        self._announce_lease()

    def drop(self, pin: Pin, now: float) -> None:
        """Free KV that no decode has come for."""
        if not pin.taken and not pin.gone:
            pin.gone = True
            self.instances[pin.on].unpin(pin, now)

    def step_end(self, index: int, version: int, now: float) -> None:
        """Finish an instance's stretch, unless it was cut short since."""
        instance = self.instances[index]
        if version == instance.version:
            instance.end(now)

    def _cancel_pull(self, sequence: Sequence, now: float) -> None:
        number = next(number for number, pull in self._pulls.items() if pull[0] is sequence)
        _, pin, to = self._pulls.pop(number)
        link = self._link_of[to]
        self._links[link].cancel(number, now)
        self._announce(link)
        pin.gone = True
        self.instances[pin.on].unpin(pin, now)

    def _announce_lease(self) -> None:
        if self._lease_ends:
            self._lease_event_s = self._lease_ends[0][0]
            self._events.push(self._lease_event_s, Kind.LEASE, 0)

    def _announce(self, link: int) -> None:
        at_s = self._links[link].next_end_s()
        self._links[link].version += 1
        if at_s is not None:
            self._events.push(at_s, Kind.LINK, link, self._links[link].version)

    def _bytes_to_pull(self, sequence: Sequence, pin: Pin) -> int:
        """Return the bytes behind a pin that the cache at the other end lacks."""
        shared = sequence.shared
        cached = 0 if shared is None else len(shared.held) * shared.unit_tokens
        return (pin.tokens - cached) * self.instances[pin.on].replica.instance.kv_bytes_per_token
