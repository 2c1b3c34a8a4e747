"""The simulation's loop: events in their total order, each handed to whom it is about."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from heapq import heappop
from typing import IO

import tidegate
from tidegate.core.errors import ConfigError
from tidegate.dataplane.events import EventKind, EventQueue
from tidegate.dataplane.replica import Replica
from tidegate.journal.writer import JournalWriter
from tidegate.measure.scaling import reversals
from tidegate.policies.protocols import Signal
from tidegate.signals.forecast.choice import simulated_feed
from tidegate.signals.forecast.series import ENSEMBLE
from tidegate.signals.lengths.choice import DEFAULT
from tidegate.sim.arrivals import TraceArrivals
from tidegate.sim.driver import SimDriver
from tidegate.sim.membership import CONTROL, ENDING, FILLING, HEARTBEAT, MEMBERSHIP, FleetSchedule
from tidegate.sim.results import InstanceUse, SimRun, oversize_warnings, slo_warnings, unstarted_warnings
from tidegate.sim.settings import SimSettings
from tidegate.systems.system import System
from tidegate.workloads.residents import MidAnswers
from tidegate.workloads.trace import TraceRecord, Workload

GC_THRESHOLD = 100_000
"""Objects that a run may gain before the interpreter looks for cycles among them."""


def simulate(
    trace: Iterable[TraceRecord],
    system: System,
    replicas: Sequence[Replica],
    settings: SimSettings | None = None,
    *,
    journal: IO[bytes] | None = None,
    watch: Callable[[int], None] | None = None,
    missed: Callable[[int], None] | None = None,
    residents: MidAnswers | None = None,
    until_s: float = math.inf,
) -> SimRun:
    """Serve ``trace`` with ``system`` on ``replicas`` to the last request.

    The same arguments give the same result and the same journal, byte for byte. ``watch`` is told now and
    then how many requests have arrived; ``missed`` of each request that will not attain its SLO, as soon as
    that is known, by its place in the order of arrival. What they raise ends the run.

    A run may stand for a moment of a longer one. With ``residents`` it begins with requests in mid-answer, as
    many as there are in the long run (see ``Filling``), which are in no result. At ``until_s``, which is not
    before the last arrival, it ends: an answer that has begun counts as far as it has come.

    Raises ConfigError for a fleet, system or settings that cannot serve, and for a trace that goes back in
    time, has empty requests or names an unknown SLO class.
    """
    return _Simulation(
        trace,
        system,
        replicas,
        settings or SimSettings(),
        JournalWriter(None if journal is None else journal.write),
        watch,
        missed,
        residents,
        until_s,
    ).run()


class _Simulation:
    """One run: takes requests from the trace as their time comes, until every one has ended."""

    def __init__(
        self,
        trace: Iterable[TraceRecord],
        system: System,
        replicas: Sequence[Replica],
        settings: SimSettings,
        journal: JournalWriter,
        watch: Callable[[int], None] | None,
        missed: Callable[[int], None] | None = None,
        residents: MidAnswers | None = None,
        until_s: float = math.inf,
    ) -> None:
        if not settings.lengths and Signal.LENGTHS in system.needs:
            settings = replace(settings, lengths=DEFAULT)
        if not settings.forecast and Signal.FORECAST in system.needs:
            settings = replace(settings, forecast=ENSEMBLE)
        hits = [Signal.PREFIX_HITS] if settings.prefix_hits else []
        lengths = [Signal.LENGTHS] if settings.lengths else []
        forecast = [Signal.FORECAST] if settings.forecast else []
        system.check_signals([Signal.PROFILE, Signal.HISTORY, *hits, *lengths, *forecast])
        self._ids = [replica.instance.id for replica in replicas]
        if len(set(self._ids)) != len(replicas):
            raise ConfigError("two instances have one id")
        self._replicas = replicas
        self._settings = settings
        self._membership = FleetSchedule(self._ids, settings)
        self._events = events = EventQueue()
        workload = Workload.of(trace)
        self._arrivals = TraceArrivals(workload, events, closed_loop=settings.closed_loop, watch=watch)
        ended = self._arrivals.ended if settings.closed_loop else None
        periods = settings.forecast_period_s, settings.forecast_steps
        load = simulated_feed(settings.forecast, workload, *periods) if settings.forecast else None
        self._driver = SimDriver(
            system, replicas, settings, journal, events, self._membership, ended, load, missed, residents
        )
        self._until_s = until_s
        self._heartbeats = 0
        journal.header(
            version=tidegate.__version__,
            system=system.name,
            slo=settings.slo,
            roles=self._driver.plane.membership.labels.items(),
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
        now = 0.0
        if self._settings.heartbeat_s > 0:
            self._announce_heartbeat()
        for number, change in enumerate(self._membership.changes):
            self._events.push(change.at_s, EventKind.TICK, MEMBERSHIP + number)
        self._driver.start()
        if self._driver.filling is not None:
            self._events.push(0.0, EventKind.TICK, FILLING)
        if self._until_s < math.inf:
            self._events.push(self._until_s, EventKind.TICK, ENDING)
        driver, arrivals = self._driver, self._arrivals
        requests, coming, handled = driver.requests, arrivals.coming, 0
        handlers = driver.cluster.handlers | {
            EventKind.ARRIVAL: self._arrive,
            EventKind.LEG: driver.legs.arrive,
            EventKind.TICK: self._tick,
        }
        handle = [handlers[kind] for kind in range(len(handlers))]
        events = self._events
        heap, starting, start = events.heap, events.starting, handlers[EventKind.STEP_START]
        while requests or coming:
            if starting and not (heap and heap[0][0] <= now):
                start(heappop(starting), 0, now)
            else:
                now, kind, whose, version = heappop(heap)
                handle[kind](whose, version, now)
            handled += 1
        driver.plane.ledger.check_integrity()
        return self._finished(now, handled)

    def _arrive(self, whose: int, version: int, now: float) -> None:
        self._driver.arrive(whose, self._arrivals.take(whose), now)

    def _tick(self, whose: int, version: int, now: float) -> None:
        if whose == CONTROL:
            self._driver.tick(now)
        elif whose == HEARTBEAT:
            self._driver.heartbeat(now)
            self._announce_heartbeat()
        elif whose == FILLING:
            self._fill(now)
        elif whose == ENDING:
            self._driver.cut_off(now)
        else:
            change = self._membership.changes[whose - MEMBERSHIP]
            if change.up:
                self._driver.instance_up(change.instance, now)
            elif self._membership.is_up(change.instance):
                self._driver.instance_down(change.instance, now)

    def _fill(self, now: float) -> None:
        plane, filling = self._driver.plane, self._driver.filling
        assert filling is not None
        filling.window_closed(plane.snapshot(now))
        if filling.full:
            self._driver.filling = None
        else:
            self._events.push(plane.window_ends_s, EventKind.TICK, FILLING)

    def _announce_heartbeat(self) -> None:
        self._heartbeats += 1
        self._events.push(self._heartbeats * self._settings.heartbeat_s, EventKind.TICK, HEARTBEAT)

    def _finished(self, now: float, handled: int) -> SimRun:
        driver = self._driver
        timeline = driver.sampler.timeline()
        uses = self._uses(now)
        return SimRun(
            requests=driver.columns.table(self._ids, driver.arrived, driver.slo_class),
            instances=uses,
            timeline=timeline,
            flips=len(timeline.flips),
            adds=sum(event.kind == "add" for event in driver.sampler.scaling),
            drains=sum(event.kind == "drain" for event in driver.sampler.scaling),
            reversals=reversals(driver.sampler.scaling),
            migrations=driver.migrations,
            preemptions=driver.preemptions,
            kv_transfer_bytes=driver.kv_transfer_bytes,
            instance_hours=sum(use.up_s for use in uses) / 3600.0,
            end_s=now,
            events=handled,
            warnings=[
                *self._slo_warnings(),
                *oversize_warnings(driver.oversize, driver.context),
                *unstarted_warnings(driver.unstarted),
            ],
        )

    def _uses(self, now: float) -> list[InstanceUse]:
        driver = self._driver
        labels = zip(driver.first_roles, driver.labels(), strict=True)
        return [
            InstanceUse(
                id=name,
                first_role=first.label if first is not None else "",
                last_role=last.label if last is not None else "",
                steps=driver.steps[number],
                kv_blocks=driver.cluster.instances[number].batcher.blocks.total,
                most_kv_blocks=driver.cluster.instances[number].batcher.blocks.most_used,
                up_s=self._membership.up_s(number, now),
            )
            for number, (name, (first, last)) in enumerate(zip(self._ids, labels, strict=True))
        ]

    def _slo_warnings(self) -> list[str]:
        warnings = slo_warnings(self._replicas, self._settings.slo)
        for name, slo in sorted(self._settings.slo_classes.items()):
            warnings += [f"SLO class {name}: {warning}" for warning in slo_warnings(self._replicas, slo)]
        return warnings
