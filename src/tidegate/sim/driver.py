"""The simulation's loop: events in their total order, each handed to whom it is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import tidegate
from tidegate.core.errors import ConfigError
from tidegate.dataplane.events import Event, EventQueue, Kind
from tidegate.dataplane.replica import Replica
from tidegate.policies.seams import Signal
from tidegate.sim.journal import SimJournal
from tidegate.sim.results import InstanceUse, SimRun
from tidegate.sim.serving import Serving
from tidegate.sim.settings import SimSettings
from tidegate.systems.registry import check_signals
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord


def simulate(
    trace: Iterable[TraceRecord],
    system: System,
    replicas: Sequence[Replica],
    settings: SimSettings | None = None,
    *,
    journal: IO[bytes] | None = None,
) -> SimRun:
    """Serve ``trace`` with ``system`` on ``replicas`` to the last request.

    The same arguments give the same result and the same journal, byte for byte. Raises ConfigError for
    a fleet or system that cannot serve, and for a trace that goes back in time or has empty requests.
    """
    return _Simulation(trace, system, replicas, settings or SimSettings(), SimJournal(journal)).run()


class _Simulation:
    """One run: takes requests from the trace as their time comes, until every one has ended."""

    def __init__(
        self,
        trace: Iterable[TraceRecord],
        system: System,
        replicas: Sequence[Replica],
        settings: SimSettings,
        journal: SimJournal,
    ) -> None:
        check_signals(system, frozenset({Signal.PROFILE}))
        if len({replica.instance.id for replica in replicas}) != len(replicas):
            raise ConfigError("two instances have one id")
        self._events = EventQueue()
        self._serving = Serving(system, replicas, settings, journal, self._events)
        self._replicas = replicas
        self._trace: Iterator[TraceRecord] = iter(trace)
        self._next: TraceRecord | None = None
        self._fetched = 0
        self._ticks = 0
        self._tick_s = self._serving.control.tick_s or settings.window_s
        journal.header(
            version=tidegate.__version__,
            system=system.name,
            slo=settings.slo,
            instances=[
                {"id": replica.instance.id, "role": role.label}
                for replica, role in zip(replicas, self._serving.control.roles, strict=True)
            ],
        )

    def run(self) -> SimRun:
        """Handle events until every request has ended."""
        handled, now = 0, 0.0
        self._announce_arrival(0.0)
        self._announce_tick()
        while self._next is not None or self._serving.flights:
            event = self._events.pop()
            now = event[0]
            handled += 1
            self._handle(event)
        self._serving.control.ledger.check_integrity()
        return self._finished(now, handled)

    def _handle(self, event: Event) -> None:
        now, kind, whose, version = event
        serving = self._serving
        if kind is Kind.ARRIVAL:
            self._arrive(now)
        elif kind is Kind.LEG:
            serving.submit(whose, version, now)
        elif kind is Kind.TICK:
            serving.tick(now)
            self._announce_tick()
        else:
            serving.cluster.handle(event)

    def _arrive(self, now: float) -> None:
        record, number = self._next, self._serving.arrived
        assert record is not None
        self._fetched += 1
        self._announce_arrival(now)
        self._serving.arrive(number, record, now)

    def _announce_arrival(self, now: float) -> None:
        """Fetch the trace's next request. Raises ConfigError when it cannot be one."""
        self._next = record = next(self._trace, None)
        if record is None:
            return
        if not now <= record.arrival_s < float("inf"):
            raise ConfigError(
                f"request {self._fetched}: it arrives at {record.arrival_s} s, after one at {now} s"
            )
        if record.input_tokens < 1 or record.output_tokens < 1:
            raise ConfigError(
                f"request {self._fetched}: {record.input_tokens} input and {record.output_tokens} output "
                "tokens; each must be at least 1"
            )
        self._events.push(record.arrival_s, Kind.ARRIVAL, self._fetched)

    def _announce_tick(self) -> None:
        self._ticks += 1
        self._events.push(self._ticks * self._tick_s, Kind.TICK, 0)

    def _finished(self, now: float, handled: int) -> SimRun:
        serving = self._serving
        ids = [replica.instance.id for replica in self._replicas]
        uses = [
            InstanceUse(
                id=replica.instance.id,
                first_role=first.label,
                last_role=serving.control.ledger.role_of(replica.instance.id).label,
                steps=steps,
                kv_blocks=instance.batcher.blocks.total,
                most_kv_blocks=instance.batcher.blocks.most_used,
                up_s=now,
            )
            for replica, first, instance, steps in zip(
                self._replicas,
                serving.control.roles,
                serving.cluster.instances,
                serving.steps,
                strict=True,
            )
        ]
        timeline = serving.control.sampler.timeline()
        return SimRun(
            requests=serving.columns.table(ids, serving.arrived),
            instances=uses,
            timeline=timeline,
            flips=len(timeline.flips),
            migrations=0,
            preemptions=serving.preemptions,
            kv_transfer_bytes=serving.kv_transfer_bytes,
            instance_hours=sum(use.up_s for use in uses) / 3600.0,
            end_s=now,
            events=handled,
            warnings=(),
        )
