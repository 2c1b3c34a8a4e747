"""The simulated data plane: instances, and the links between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tidegate.core.errors import InternalError
from tidegate.dataplane.events import Event, EventKind, EventQueue
from tidegate.dataplane.instance import NEVER, Listener, SimInstance
from tidegate.dataplane.migration import Migrations
from tidegate.dataplane.network import Network, Transfer
from tidegate.dataplane.replica import Replica
from tidegate.dataplane.sequence import ENDED, LOADING, NEW, Pin, SimSequence
from tidegate.policies.chunks import FIXED, ChunkBudget
from tidegate.policies.order import FIFO, Order
from tidegate.policies.shares import shared_queue

REPORT_GROUP = 64
"""Instances whose next reports are looked at together: a list's least entry costs less than a heap, which has
to learn of every stretch, and little beside the reports themselves."""


@dataclass(slots=True)
class Leases:
    """The leases of one length, in the order in which they end. The first one's end is announced."""

    length_s: float
    ends: deque[tuple[float, Pin]] = field(default_factory=deque)


class Cluster:
    """Runs legs and moves KV. Every instance has a queue of ``order``, first come first served by default.

    Steps carry of prompts what ``chunks`` says, up to the engine's limit by default.

    ``handlers`` does what an event announces, by its kind: called with whose it is, its version and its time.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        events: EventQueue,
        listener: Listener,
        *,
        leap: bool,
        order: Order | None = None,
        chunks: ChunkBudget | None = None,
    ) -> None:
        self.instances: list[SimInstance] = []
        self._events = events
        self._listener = listener
        self._leap = leap
        self._order = order or FIFO
        self._chunks = chunks or FIXED
        self._replicas: list[Replica] = []
        self._next_reports_s: list[list[float]] = []
        self._kv_bytes_per_token: list[int] = []
        self._leases: list[Leases] = []
        self._leases_of: list[int] = []
        self._network = Network(self._replicas, events)
        self._migrations = Migrations(self.instances, self._network, listener)
        self.handlers: dict[int, Callable[[int, int, float], None]] = {
            EventKind.STEP_END: self._step_end,
            EventKind.STEP_START: self._step_start,
            EventKind.LINK: self._arrive,
            EventKind.LEASE: self._end_leases,
            EventKind.STALL: self._end_stall,
        }
        for replica in replicas:
            self.add(replica)

    def add(self, replica: Replica) -> SimInstance:
        """Add an instance, empty. Its index is the next one; none is ever used again."""
        index = len(self.instances)
        if index % REPORT_GROUP == 0:
            self._next_reports_s.append([])
        next_reports_s = self._next_reports_s[-1]
        slot = len(next_reports_s)
        next_reports_s.append(NEVER)
        self._replicas.append(replica)
        self._kv_bytes_per_token.append(replica.instance.kv_bytes_per_token)
        lengths_s = [leases.length_s for leases in self._leases]
        if replica.engine.lease_s not in lengths_s:
            self._leases.append(Leases(replica.engine.lease_s))
            lengths_s.append(replica.engine.lease_s)
        self._leases_of.append(lengths_s.index(replica.engine.lease_s))
        instance = SimInstance(
            index,
            replica,
            shared_queue(self._order),
            self._events,
            self._listener,
            next_reports_s,
            slot,
            self._migrations.left,
            leap=self._leap,
            chunks=self._chunks,
        )
        self.instances.append(instance)
        return instance

    def report(self, now: float) -> None:
        """Have the instances that leap tell of the steps that ended by ``now``."""
        first = 0
        for next_s in self._next_reports_s:
            while (earliest_s := min(next_s)) <= now:
                slot = next_s.index(earliest_s)
                next_s[slot] = self.instances[first + slot].report(now)
            first += REPORT_GROUP

    def kv_tokens_in_use(self, now: float) -> int:
        """Return the size of all blocks taken at ``now``; one that several sequences share counts once."""
        return sum(each.blocks_held(now) * each.batcher.blocks.block_tokens for each in self.instances)

    def submit(self, instance: int, sequence: SimSequence, now: float) -> None:
        """Queue a leg at an instance."""
        self.instances[instance].submit(sequence, now)

    def abort(self, sequence: SimSequence, now: float) -> None:
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
        if sequence.moving:
            self._migrations.forget(sequence, now)
        if sequence.state == NEW:
            sequence.state = ENDED
        elif sequence.state != ENDED:
            self.instances[sequence.on].abort(sequence, now)

    def handle(self, event: Event) -> None:
        """Do what an event of the data plane announces. Raises InternalError for any other event.

        A driver may call the one of ``handlers`` for the event's kind itself.
        """
        now, kind, whose, version = event
        handler = self.handlers.get(kind)
        if handler is None:
            raise InternalError(f"an event of kind {kind} is not the data plane's")
        handler(whose, version, now)

    def pull(self, sequence: SimSequence, to: int, now: float) -> int:
        """Bring the KV behind the sequence's source to instance ``to``; return how many bytes that are.

        What the prefix cache there has stays where it is.
        """
        pin, shared = sequence.source, sequence.shared
        assert pin is not None
        cached = 0 if shared is None else len(shared.held) * shared.unit_tokens
        n_bytes = (pin.tokens - cached) * self._kv_bytes_per_token[pin.on]
        self._network.begin(Transfer(sequence, pin.on, to, n_bytes, pin), now)
        return n_bytes

    def begin_migration(self, request: int, src: int, dst: int, now: float) -> bool:
        """Start to move a request's running decode, in stages; False when it cannot be moved.

        See ``tidegate.dataplane.migration``. ``Listener.migrated`` tells how it went.
        """
        return self._migrations.begin(request, src, dst, now)

    def cancel_migration(self, request: int, now: float) -> None:
        """End a request's migration before its commit, if one is under way; the decode stays."""
        self._migrations.cancel(request, now)

    def begin_lease(self, pin: Pin, now: float) -> None:
        """Keep KV for a decode, for as long as its instance's lease lasts."""
        which = self._leases_of[pin.on]
        leases = self._leases[which]
        ends_s = now + leases.length_s
        leases.ends.append((ends_s, pin))
        if len(leases.ends) == 1:
            self._events.push(ends_s, EventKind.LEASE, which)

    def hold(self, on: int, tokens: int, now: float) -> Pin | None:
        """Have instance ``on`` hold KV that was computed elsewhere, for a leg that goes on there; None where
        it has no room."""
        instance = self.instances[on]
        blocks = instance.batcher.blocks.for_tokens(tokens)
        return Pin(on, blocks, tokens) if instance.reserve(blocks, now) else None

    def drop(self, pin: Pin, now: float) -> None:
        """Free KV that no decode has come for."""
        if not pin.taken and not pin.gone:
            pin.gone = True
            self.instances[pin.on].unpin(pin, now)

    def _end_leases(self, which: int, version: int, now: float) -> None:
        """Free the KV whose lease is over, and look ahead to the next lease that still counts."""
        ends = self._leases[which].ends
        while ends and (ends[0][0] <= now or ends[0][1].taken):
            self.drop(ends.popleft()[1], now)
        if ends:
            self._events.push(ends[0][0], EventKind.LEASE, which)

    def _end_stall(self, index: int, version: int, now: float) -> None:
        """End pins of an instance, those that are due first, until the head of its queue finds room that they
        alone have kept from it: who is to pull them may be waiting for room in turn."""
        instance = self.instances[index]
        if instance.version != version or not instance.lacks_blocks(now):
            return
        head = instance.batcher.head(now)
        for _, pin in list(self._leases[self._leases_of[index]].ends):
            if not instance.lacks_blocks(now):
                break
            if pin.on == index and (head is None or pin is not head.source):
                self.drop(pin, now)

    def _step_end(self, index: int, version: int, now: float) -> None:
        self.instances[index].end(version, now)

    def _step_start(self, index: int, version: int, now: float) -> None:
        self.instances[index].start(now)

    def _arrive(self, link: int, version: int, now: float) -> None:
        """Finish a transfer: a migration's stage, or a pull, whose pin is free then and whose leg may run."""
        transfer = self._network.leave(link, version, now)
        if transfer is None:
            return
        sequence, pin = transfer.sequence, transfer.pin
        if pin is None:
            self._migrations.arrived(transfer, now)
            return
        sequence.loaded_s = now
        self.instances[pin.on].unpin(pin, now)
        self.instances[transfer.dst].loaded(sequence, pin.tokens, now)

    def _cancel_pull(self, sequence: SimSequence, now: float) -> None:
        transfer = self._network.pull_of(sequence)
        assert transfer.pin is not None
        self._network.cancel(transfer, now)
        transfer.pin.gone = True
        self.instances[transfer.src].unpin(transfer.pin, now)
