"""Carries out the control plane's effects in wall time, and reports what came of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from tidegate.control.effects import (
    Drains,
    Effects,
    Flipped,
    GiveUp,
    Held,
    Replay,
    RunDecode,
    RunPrefill,
    StartInstance,
    StartMigration,
    StopInstance,
    Suspect,
    WakeAt,
)
from tidegate.control.inputs import RecordingPlane
from tidegate.control.membership import AwaitedStart
from tidegate.control.plane import ControlPlane
from tidegate.control.settings import ControlSettings
from tidegate.core.clock import Clock
from tidegate.core.decision import Action
from tidegate.core.errors import ClientGone, EngineUnreachable, FleetFull, ShuttingDown, TidegateError
from tidegate.costs.profile import UNMEASURED
from tidegate.fleet.member import Fleet, Member
from tidegate.gateway.drift import FleetDrift
from tidegate.gateway.load_fits import LoadFits
from tidegate.gateway.loads import LoadWatch
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.recent import Recent
from tidegate.gateway.sessions import Conversations
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.upstream import Handles, Upstream, connect
from tidegate.journal.writer import JournalWriter
from tidegate.policies.protocols import Signal
from tidegate.signals.forecast import Earlier
from tidegate.signals.forecast.choice import deployed_feed
from tidegate.signals.lengths.choice import deployed_source
from tidegate.signals.prefix import PrefixIndex
from tidegate.systems.system import System

log = logging.getLogger(__name__)

CLEAN_UP_S = 2.0
"""How long a gateway that stops waits for its clean-up (ours)."""
RETRY_AFTER_S = ControlSettings().retry_after_s

Command = RunPrefill | RunDecode | GiveUp | Held
"""An effect that is about one request, for whoever serves it."""


class Served(Protocol):
    """A request that the gateway serves, which takes the effects about it."""

    def command(self, command: Command) -> None:
        """Take what the control plane decided for this request."""
        ...

    def start_migration(self, effect: StartMigration) -> None:
        """Have the running decode move, or refuse."""
        ...


class Dispatcher:
    """The wall-time driver of one control plane. A ``FleetListener``.

    ``upstreams`` are the instances that are up, ``models`` what they serve, and ``max_model_len`` is the
    longest context that one of them offers (0 with none up). ``served`` are the requests by id, which take
    their commands. ``flips`` counts labels that were rewritten.
    """

    def __init__(
        self,
        system: System,
        settings: GatewaySettings,
        ids: tuple[str, ...],
        clock: Clock,
        journal: JournalWriter,
        fleet: Fleet,
    ) -> None:
        self.system = system
        self.settings = settings
        self.clock = clock
        self.journal = journal
        self.prefixes = PrefixIndex()
        control = ControlSettings(
            replays=settings.replays, admission=settings.admission, shares=settings.shares
        )
        plane = RecordingPlane if settings.journal_inputs else ControlPlane
        lengths = deployed_source(settings.lengths, needed=Signal.LENGTHS in system.needs)
        load = deployed_feed(settings.forecast, needed=Signal.FORECAST in system.needs)
        self.plane: ControlPlane = plane(system, ids, journal, control, self.prefixes, lengths, load)
        self._fits: LoadFits | None = None
        if load is not None and settings.forecast.fitted:
            self._fits = LoadFits(settings.forecast, self.plane.load_fitted)
            load.fit = self._fits.fit
        self.stopping = False
        self.flips = 0
        self.upstreams: dict[str, Upstream] = {}
        self.models: set[str] = set()
        self.max_model_len = 0
        self.metrics = Metrics(self.plane, clock.now)
        self.drift = FleetDrift(self._rescale)
        self.metrics.registry.register(self.drift)
        self.loads = LoadWatch(self.plane, clock, journal, self.metrics, fleet.suspect, settings.load_every_s)
        self.handles = Handles(self.upstreams, self.metrics, self.background, fleet.suspect)
        self.sessions = Conversations()
        self.recent = Recent()
        self._fleet = fleet
        self._starts: dict[str, AwaitedStart] = {}
        self._full: FleetFull | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.served: dict[str, Served] = {}

    # what happens

    def member_up(self, member: Member) -> None:
        """See ``FleetListener.member_up``."""
        instance = member.instance
        start = self._starts.pop(instance.id, None)
        self.upstreams[instance.id] = connect(member, self.settings)
        self._served_changed()
        self.loads.follow(member)
        profile = member.profile or UNMEASURED
        now = self.clock.now()
        took = ""
        if start is not None:
            took = f", {now - start.asked_s:.1f} s after it was asked for"
            self.metrics.started(start.role, now - start.asked_s)
        self.recent.happened(now, f"{instance.id} is up{took}")
        effects = self.plane.instance_up(instance, profile, now, fixed_role=member.fixed_role)
        self.drift.member_up(member)
        self.do(effects)

    def member_down(self, instance_id: str, reason: str) -> None:
        """See ``FleetListener.member_down``: what runs there fails at once, and is replayed elsewhere."""
        upstream = self.upstreams.pop(instance_id, None)
        if upstream is None:
            return
        self._served_changed()
        self.recent.happened(self.clock.now(), f"{instance_id} is down: {reason}")
        self.drift.member_down(instance_id)
        self.loads.forget(instance_id)
        effects = self.plane.instance_down(instance_id, reason, self.clock.now())
        upstream.engine.close(f"instance {instance_id} is down: {reason}")
        self.handles.owner_gone(upstream.member.engine_id)
        self.do(effects)

    def start_failed(self, instance_id: str, reason: str) -> None:
        """See ``FleetListener.start_failed``."""
        now, start = self.clock.now(), self._starts.pop(instance_id, None)
        self.recent.happened(now, f"{instance_id} could not be started: {reason}")
        if start is not None:
            self.metrics.starts_failed.labels(start.role.label).inc()
            self.plane.start_failed(start.role, f"{instance_id}: {reason}", now)

    def starting(self) -> list[dict[str, Any]]:
        """Return, for ``/tidegate/state``, which instances start, since when and how far they are."""
        now, stages = self.clock.now(), self._fleet.starting()
        return [
            {"id": name, "role": role.label, "for_s": round(now - asked_s, 3), "stage": stages.get(name, "")}
            for name, (role, asked_s) in self._starts.items()
        ]

    def act(self, actions: Sequence[Action]) -> None:
        """Execute actions that the system's controllers did not decide. Raises FleetFull where an instance
        that they add cannot be started."""
        self._full = None
        self.do(self.plane.act(actions, self.clock.now()))
        if self._full is not None:
            raise self._full

    # effects

    def do(self, effects: Effects) -> None:
        """Carry out effects, in order."""
        for effect in effects:
            match effect:
                case RunPrefill() | RunDecode() | GiveUp() | Held():
                    self.served[effect.live.id].command(effect)
                case StartMigration():
                    self.recent.carried_out(self.clock.now(), effect)
                    self.served[effect.live.id].start_migration(effect)
                case WakeAt(at_s):
                    self._wake_at(at_s)
                case Flipped():
                    self.flips += 1
                    self.recent.carried_out(self.clock.now(), effect)
                    self.metrics.flips.labels(effect.after.label, effect.reason).inc()
                case Drains():
                    self.recent.carried_out(self.clock.now(), effect)
                case Replay(_, label):
                    self.metrics.replays.labels(label).inc()
                case Suspect(instance):
                    self._fleet.suspect(instance)
                case StartInstance(role, reason):
                    now = self.clock.now()
                    self.recent.carried_out(now, effect)
                    try:
                        self._starts[self._fleet.add()] = AwaitedStart(role, now)
                    except FleetFull as full:
                        self._full = full
                        log.warning("no instance can be started (%s): %s", reason, full)
                        self.recent.happened(now, f"no instance can be started: {full}")
                        self.plane.start_failed(role, full.message, now)
                case StopInstance(instance, reason):
                    self.recent.carried_out(self.clock.now(), effect)
                    if not self._fleet.remove(instance, reason):
                        log.warning("%s cannot be stopped from here; it stays drained", instance)
                        self.recent.happened(self.clock.now(), f"{instance} cannot be stopped from here")
                        self.plane.stop_failed(instance)

    # clocks

    def start(self, earlier: Earlier | None = None) -> None:
        """Start the periodic decisions; forecasts begin with the load of an earlier run where it is known."""
        self.do(self.plane.start(self.clock.now(), earlier))

    async def stop(self) -> None:
        """Stop the periodic decisions and close every connection to the engines."""
        self.stopping = True
        if self._fits is not None:
            self._fits.close()
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=CLEAN_UP_S)
            for task in late:
                task.cancel()
        await self.loads.stop()
        for upstream in self.upstreams.values():
            upstream.engine.close("the gateway stops")

    def _wake_at(self, at_s: float) -> None:
        seconds = max(0.0, at_s - self.clock.now())
        asyncio.get_running_loop().call_later(seconds, self._tick, at_s)

    def _tick(self, due_s: float) -> None:
        if self.stopping:
            return
        now = self.clock.now()
        if now < due_s:
            # An event loop rounds its timers and may call before their time, when nothing is due yet.
            self._wake_at(due_s)
            return
        window_ended = self.plane.window_ends_s <= now
        try:
            self.do(self.plane.tick(now))
            if window_ended:
                self.drift.window(self.plane.snapshot(now))
        except Exception:
            log.exception("a periodic decision failed; the next one goes on")
            self._wake_at(self.plane.window_ends_s)

    # around requests

    def upstream(self, instance_id: str, stage: str) -> Upstream:
        """Return an instance that is up. Raises EngineUnreachable for one that went down meanwhile."""
        found = self.upstreams.get(instance_id)
        if found is None:
            message = f"instance {instance_id} went down"
            raise EngineUnreachable(message, instance=instance_id, stage=stage, refused=True)
        return found

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run clean-up that no request waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def cut_off(self) -> TidegateError:
        """Return why a request that is cancelled now ends."""
        if self.stopping:
            return ShuttingDown(
                "the gateway stopped before the answer was complete", retry_after_s=RETRY_AFTER_S
            )
        return ClientGone("the client closed the connection")

    def _rescale(self, instance_id: str, prefill: float, step: float) -> None:
        self.plane.profile_scaled(instance_id, prefill, step, self.clock.now())

    def _served_changed(self) -> None:
        members = [upstream.member for upstream in self.upstreams.values()]
        self.models = {member.model for member in members}
        self.max_model_len = max((member.instance.max_model_len for member in members), default=0)

    def signals(self) -> list[Signal]:
        """Return the signals that this deployment gives, now that the fleet is up."""
        measured = all(u.member.profile is not None for u in self.upstreams.values())
        always = [Signal.PREFIX_HITS, Signal.LENGTHS, Signal.FORECAST, Signal.HISTORY]
        return [*always, Signal.PROFILE] if measured else always
