"""The simulation's loop: events in their total order, each handed to whom it is about."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import IO

import tidegate
from tidegate.core.errors import ConfigError
from tidegate.dataplane.events import EventQueue, Kind
from tidegate.dataplane.replica import Replica
from tidegate.journal.writer import JournalWriter
from tidegate.policies.seams import Signal
from tidegate.sim.arrivals import Arrivals
from tidegate.sim.checks import slo_warnings
from tidegate.sim.membership import Membership
from tidegate.sim.results import InstanceUse, SimRun
from tidegate.sim.serving import Serving
from tidegate.sim.settings import SimSettings
from tidegate.systems.registry import check_signals
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord

HEARTBEAT, CONTROL, MEMBERSHIP = 0, 1, 2
"""Whose a TICK is, in the order in which they happen at one time; changes of membership count on."""

GC_THRESHOLD = 100_000
"""Objects that a run may gain before the interpreter looks for cycles among them."""


def simulate(
    trace: Iterable[TraceRecord],
    system: System,
    replicas: Sequence[Replica],
    settings: SimSettings | None = None,
    *,
    journal: IO[bytes] | None = None,
) -> SimRun:
    """Serve ``trace`` with ``system`` on ``replicas`` to the last request.

    The same arguments give the same result and the same journal, byte for byte. An open loop reads the trace
    as a stream. Raises ConfigError for a fleet, system or settings that cannot serve, and for a trace that
    goes back in time, has empty requests or names an unknown SLO class.
    """
    writer = JournalWriter(None if journal is None else journal.write)
    return _Simulation(trace, system, replicas, settings or SimSettings(), writer).run()


class _Simulation:
    """One run: takes requests from the trace as their time comes, until every one has ended."""

    def __init__(
        self,
        trace: Iterable[TraceRecord],
        system: System,
        replicas: Sequence[Replica],
        settings: SimSettings,
        journal: JournalWriter,
    ) -> None:
        check_signals(system, frozenset({Signal.PROFILE}))
        self._ids = [replica.instance.id for replica in replicas]
        if len(set(self._ids)) != len(replicas):
            raise ConfigError("two instances have one id")
        self._replicas = replicas
        self._settings = settings
        self._membership = Membership(self._ids, settings)
        self._events = events = EventQueue()
        self._arrivals = Arrivals(trace, events, closed_loop=settings.closed_loop)
        ended = self._arrivals.ended if settings.closed_loop else None
        self._serving = Serving(system, replicas, settings, journal, events, self._membership, ended)
        self._ticks = 0
        self._heartbeats = 0
        self._tick_s = self._serving.control.tick_s or settings.window_s
        journal.header(
            version=tidegate.__version__,
            system=system.name,
            slo=settings.slo,
            roles=[
                (name, role)
                for name, role in zip(self._ids, self._serving.control.first_roles, strict=True)
                if role is not None
            ],
        )

    def run(self) -> SimRun:
        """Handle events until every request has ended."""
        thresholds = gc.get_threshold()
        # Next to nothing here refers to itself, so looking for cycles is a fifth of the time for nothing.
        gc.set_threshold(GC_THRESHOLD, *thresholds[1:])
        try:
            return self._run()
        finally:
            gc.set_threshold(*thresholds)

    def _run(self) -> SimRun:
        handled, now = 0, 0.0
        self._announce_tick()
        if self._settings.heartbeat_s > 0:
            self._announce_heartbeat()
        for number, change in enumerate(self._membership.changes):
            self._events.push(change.at_s, Kind.TICK, MEMBERSHIP + number)
        serving, arrivals, events = self._serving, self._arrivals, self._events
        cluster, flights = serving.cluster, serving.flights
        while flights or arrivals.left:
            event = events.pop()
            now, kind, whose, version = event
            handled += 1
            if kind == Kind.ARRIVAL:
                serving.arrive(whose, arrivals.take(whose), now)
            elif kind == Kind.LEG:
                serving.submit(whose, version, now)
            elif kind == Kind.TICK:
                self._tick(whose, now)
            else:
                cluster.handle(event)
        serving.control.ledger.check_integrity()
        return self._finished(now, handled)

    def _tick(self, whose: int, now: float) -> None:
        if whose == CONTROL:
            self._serving.tick(now)
            self._announce_tick()
        elif whose == HEARTBEAT:
            self._serving.heartbeat(now)
            self._announce_heartbeat()
        else:
            change = self._membership.changes[whose - MEMBERSHIP]
            if change.up:
                self._serving.instance_up(change.instance, now)
            else:
                self._serving.instance_down(change.instance, now)

    def _announce_tick(self) -> None:
        self._ticks += 1
        self._events.push(self._ticks * self._tick_s, Kind.TICK, CONTROL)

    def _announce_heartbeat(self) -> None:
        self._heartbeats += 1
        self._events.push(self._heartbeats * self._settings.heartbeat_s, Kind.TICK, HEARTBEAT)

    def _finished(self, now: float, handled: int) -> SimRun:
        serving = self._serving
        timeline = serving.control.sampler.timeline()
        uses = self._uses(now)
        return SimRun(
            requests=serving.columns.table(self._ids, serving.arrived),
            instances=uses,
            timeline=timeline,
            flips=len(timeline.flips),
            migrations=serving.migrator.done,
            preemptions=serving.preemptions,
            kv_transfer_bytes=serving.kv_transfer_bytes,
            instance_hours=sum(use.up_s for use in uses) / 3600.0,
            end_s=now,
            events=handled,
            warnings=[*self._slo_warnings(), *serving.oversize.warnings()],
        )

    def _uses(self, now: float) -> list[InstanceUse]:
        serving = self._serving
        labels = zip(serving.control.first_roles, serving.control.labels(), strict=True)
        return [
            InstanceUse(
                id=name,
                first_role=first.label if first is not None else "",
                last_role=last.label if last is not None else "",
                steps=serving.reports.counts[number],
                kv_blocks=serving.cluster.instances[number].batcher.blocks.total,
                most_kv_blocks=serving.cluster.instances[number].batcher.blocks.most_used,
                up_s=self._membership.up_s(number, now),
            )
            for number, (name, (first, last)) in enumerate(zip(self._ids, labels, strict=True))
        ]

    def _slo_warnings(self) -> list[str]:
        warnings = slo_warnings(self._replicas, self._settings.slo)
        for name, slo in sorted(self._settings.slo_classes.items()):
            warnings += [f"SLO class {name}: {warning}" for warning in slo_warnings(self._replicas, slo)]
        return warnings
