"""The scheduling loop in wall time: observe, decide, act, journal."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from tidegate.core.clock import Clock
from tidegate.core.decision import Flip, Hold, Place, Reject, Verdict
from tidegate.core.errors import ClientGone, NoInstance, Overloaded, ShuttingDown, TidegateError
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.profile import Profile
from tidegate.fleet.member import Member
from tidegate.gateway.drift import FleetDrift
from tidegate.gateway.load_view import LoadGauges
from tidegate.gateway.loads import LoadWatch
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.migrations import Migrations, Movable
from tidegate.gateway.sessions import Sessions
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.upstream import Handles, Upstream, connect
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.policies.order import Ticket, WaitingQueue, prefill_ticket
from tidegate.policies.pricing import fastest_prefill_seconds, predicted_on
from tidegate.systems.system import System

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
"""What a client is told to wait when nothing is up: about the time a local engine needs to return (ours)."""
AVOID_S = 5.0
"""How long an instance that failed a leg gets no new one while others are up (ours): one that fails fast
looks idle and would draw every request."""
CONFIRM_S = 0.25
"""How long a failed call waits for the fleet's word before it tries again (ours)."""
WINDOW_S = 1.0
"""Length of the inter-token-gap window where no pool control sets one (Narwhal's interval)."""

UNMEASURED = Profile(
    "unmeasured",
    PrefillCost(0.01, 1e-4, 1e-9),
    StepCost(0.01, 1e-5, 1e-8),
    MixedCost(0.01, 1e-4, 1e-9, 2e-8),
    TransferCost(0.001, 1e9),
    source="placeholder for an instance nobody measured; systems that need profiles refuse it",
)


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A placed prefill, with its predicted seconds on that instance (without the wait before it), what the
    instance's order goes by, and whether the instance had nothing else to do."""

    place: Place
    predicted_prefill_s: float
    ticket: Ticket
    alone: bool = False


class Scheduler:
    """Owns the ledger and applies a system's decisions. A ``FleetListener``."""

    def __init__(
        self,
        system: System,
        settings: GatewaySettings,
        ids: tuple[str, ...],
        clock: Clock,
        journal: JournalWriter,
        suspect: Callable[[str], None],
    ) -> None:
        self.system = system
        self._suspect = suspect
        self.settings = settings
        self.clock = clock
        self.journal = journal
        self.ledger = Ledger()
        self.flights: dict[str, Movable] = {}
        self.stopping = False
        self.flips = 0
        self.metrics = Metrics(lambda: self.ledger.snapshot(clock.now()), lambda: self.in_flight)
        self.labels: dict[str, Role] = dict(zip(ids, system.roles(len(ids)), strict=True))
        self.upstreams: dict[str, Upstream] = {}
        self.drift = FleetDrift()
        self.metrics.registry.register(self.drift)
        self.loads = LoadWatch(self.ledger, clock, journal, self.metrics, suspect, settings.load_every_s)
        self.metrics.registry.register(LoadGauges(self.loads))
        self._waiting: WaitingQueue[asyncio.Future[None]] = system.order.queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()
        self._pool_state: object = None
        self._control_reason = ""
        self._failing: dict[str, float] = {}
        self._rng = random.Random(settings.seed)
        self.handles = Handles(self.upstreams, self.metrics, self.background, suspect)
        self.sessions = Sessions()
        self.migrations = Migrations(self.flights, self.ledger, clock, journal, self.metrics)

    @property
    def in_flight(self) -> int:
        """How many requests are being served."""
        return len(self.flights)

    # membership

    def member_up(self, member: Member) -> None:
        """Add an instance under its last label (its first one, at start)."""
        instance = member.instance
        now = self.clock.now()
        self.upstreams[instance.id] = connect(member, self.settings)
        self.drift.member_up(member)
        self._failing.pop(instance.id, None)
        role = self._label(member)
        self.ledger.instance_up(instance, member.profile or UNMEASURED, role, now)
        self.loads.follow(member)
        if self.journal.enabled:
            self.journal.instance_up(now, instance.id, role)
        self._wake()

    def _label(self, member: Member) -> Role:
        """Return a member's label; one whose fixed role is another one changes places with who has it."""
        name, fixed = member.instance.id, member.fixed_role
        role = self.labels.setdefault(name, Role.MIXED)
        if fixed is None or role in (fixed, Role.MIXED):
            return role
        self.labels[name] = fixed
        for other, label in self.labels.items():
            upstream = self.upstreams.get(other)
            free = upstream is None or upstream.member.fixed_role is None
            if other != name and label is fixed and free:
                self._apply((Flip(other, role, "repair"),))
                self.labels[other] = role
                break
        return fixed

    def member_down(self, instance_id: str, reason: str) -> None:
        """Drop an instance; what runs there fails at once and its requests are replayed elsewhere."""
        upstream = self.upstreams.pop(instance_id, None)
        if upstream is None:
            return
        now = self.clock.now()
        self.drift.member_down(instance_id)
        self.loads.forget(instance_id)
        self.ledger.instance_down(instance_id, now)
        if self.journal.enabled:
            self.journal.instance_down(now, instance_id, reason)
        upstream.engine.close(f"instance {instance_id} is down: {reason}")
        self.handles.owner_gone(upstream.member.engine_id)
        self.sessions.forget_instance(instance_id)
        self._wake()

    # decisions

    def snapshot(self) -> Snapshot:
        """Return the cluster as it is now."""
        return self.ledger.snapshot(self.clock.now())

    async def place_prefill(
        self, request: Request, *, kind: str, recovery_s: float, deadline_s: float
    ) -> Dispatched:
        """Place a request's prefill and enter it in the ledger.

        While the policy holds, waits for the next change of the cluster until ``deadline_s``. With no
        instance up it waits at most ``recovery_s`` for one. Raises NoInstance or Overloaded.
        """
        recover_by_s = min(self.clock.now() + recovery_s, deadline_s)
        while True:
            seen = self._seen()
            try:
                if not len(seen):
                    raise NoInstance("no instance is up", retry_after_s=RETRY_AFTER_S)
                verdict = self.system.prefill.place_prefill(request, seen)
            except NoInstance:
                if self.clock.now() >= recover_by_s:
                    raise
                await self._next_change(recover_by_s - self.clock.now(), _ticket(request, seen))
                continue
            self._flip_with(verdict, seen)
            self._note(kind, request, verdict, seen)
            match verdict.decision:
                case Place() as place:
                    predicted_s = self.ledger.prefill_dispatched(request, place.prefill_on, seen.at_s)
                    ticket = prefill_ticket(request, predicted_s)
                    return Dispatched(place, predicted_s, ticket, alone=_idle(seen, place.prefill_on))
                case Reject(reason, retry_after_s):
                    raise Overloaded(reason, retry_after_s=retry_after_s)
                case Hold(reason):
                    if self.clock.now() >= deadline_s:
                        raise Overloaded(f"held until its deadline: {reason}", retry_after_s=RETRY_AFTER_S)
                    wait_s = min(WINDOW_S, deadline_s - self.clock.now())
                    await self._next_change(wait_s, _ticket(request, seen))

    def place_decode(self, request: Request, prefill_on: str) -> str:
        """Place a request's decode and enter it in the ledger. Raises NoInstance or Overloaded.

        ``request.prompt_tokens`` is the resident length.
        """
        seen = self._seen()
        if not len(seen):
            raise NoInstance("no instance is up", retry_after_s=RETRY_AFTER_S)
        verdict = self.system.decode.place_decode(request, seen, prefill_on)
        self._flip_with(verdict, seen)
        self._note("place_decode", request, verdict, seen)
        if not isinstance(verdict.decision, Place) or verdict.decision.decode_on is None:
            raise Overloaded("no instance takes the decode", retry_after_s=RETRY_AFTER_S)
        decode_on = verdict.decision.decode_on
        self.ledger.decode_dispatched(request.id, decode_on, request.prompt_tokens, seen.at_s)
        return decode_on

    def _seen(self) -> Snapshot:
        """Return the cluster without the instances that failed a leg a moment ago, if others are up."""
        snapshot = self.snapshot()
        failing = [name for name, until_s in self._failing.items() if until_s > snapshot.at_s]
        return snapshot.without(failing) if failing else snapshot

    def _flip_with(self, verdict: Verdict, seen: Snapshot) -> None:
        """Apply a placement's flips, unless it saw only a part of the cluster: no pool is really short."""
        if len(seen) == len(self.upstreams):
            self._apply(verdict.flips)

    def _apply(self, flips: tuple[Flip, ...]) -> None:
        for flip in flips:
            before, now = self.labels.get(flip.instance), self.clock.now()
            if before is None or not self.ledger.flip(flip.instance, flip.to, now):
                continue
            self.labels[flip.instance] = flip.to
            self.flips += 1
            self.metrics.flips.labels(flip.to.label, flip.reason).inc()
            if self.journal.enabled:
                self.journal.flip(now, flip, before)

    def _note(self, kind: str, request: Request, verdict: Verdict, seen: Snapshot) -> None:
        """Journal a verdict with its alternatives and what is predicted for the chosen instance."""
        if not self.journal.enabled:
            return
        predicted: dict[str, float] | None = None
        if isinstance(verdict.decision, Place):
            decode_on = verdict.decision.decode_on if kind == "place_decode" else None
            on = decode_on or verdict.decision.prefill_on
            upstream = self.upstreams.get(on)
            if upstream is not None and upstream.member.profile is not None:
                predicted = predicted_on(on, seen, request, decode=kind == "place_decode")
        self.journal.decision(seen.at_s, request.id, kind, verdict, predicted)

    # clocks

    def start(self) -> None:
        """Start the periodic decisions."""
        self._tasks.append(asyncio.create_task(self._tick_forever()))
        if self.settings.flip_every_s > 0:
            self._tasks.append(asyncio.create_task(self._flip_forever()))
        if self.settings.migrate_every_s > 0:
            self._tasks.append(asyncio.create_task(self._migrate_forever()))

    async def stop(self) -> None:
        """Stop the periodic decisions and close every connection to the engines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._background, return_exceptions=True)
        await self.loads.stop()
        for upstream in self.upstreams.values():
            upstream.engine.close("the gateway stops")

    async def _tick_forever(self) -> None:
        pool = self.system.pool
        while True:
            await asyncio.sleep(pool.tick_s if pool else WINDOW_S)
            try:
                self._tick()
            except Exception:
                log.exception("a control tick failed; the next one goes on")

    def _tick(self) -> None:
        """Close the gap window, audit the idle ledger, let the pool control decide."""
        now = self.clock.now()
        self.ledger.window_closed(now)
        if self.in_flight == 0:
            self.ledger.check_integrity()
        snapshot = self.snapshot()
        self.drift.window(snapshot)
        pool = self.system.pool
        if pool is None or not self.upstreams:
            return
        control = pool.step(snapshot, self._pool_state)
        self._pool_state = control.state
        if control.reason != self._control_reason:
            self._control_reason = control.reason
            if self.journal.enabled:
                self.journal.control(now, control.reason, len(control.flips))
        self._apply(control.flips)
        for migrate in control.migrations:
            self.migrations.begin(migrate)
        if control.flips:
            self._wake()

    async def _flip_forever(self) -> None:
        """Flip a random instance again and again, never emptying a pool: a test of statelessness."""
        while True:
            await asyncio.sleep(self.settings.flip_every_s)
            snapshot = self.snapshot()
            for name in self._rng.sample(snapshot.ids, len(snapshot.ids)):
                role = self.labels[name]
                if role is not Role.MIXED and int(snapshot.labelled(role).sum()) > 1:
                    to = Role.DECODE if role is Role.PREFILL else Role.PREFILL
                    self._apply((Flip(name, to, "forced"),))
                    break

    async def _migrate_forever(self) -> None:
        """Move a random decode again and again."""
        while True:
            await asyncio.sleep(self.settings.migrate_every_s)
            self.migrations.force(self._rng)

    @property
    def max_model_len(self) -> int:
        """The longest context an instance that is up offers; 0 with none up."""
        return max((u.member.instance.max_model_len for u in self.upstreams.values()), default=0)

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Run clean-up that no request waits for."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # waiting

    def _wake(self) -> None:
        """Let everybody who waits look again. They run in the order in which they are woken."""
        now = self.clock.now()
        while len(self._waiting):
            future = self._waiting.pop(now)
            if not future.done():
                future.set_result(None)

    async def _next_change(self, timeout_s: float, ticket: Ticket | None = None) -> None:
        """Wait for a membership or label change or the end of a request, at most ``timeout_s``.

        Those with a ticket are held requests and look again in the system's order, after the others.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if ticket is None:
            self._waiting.push_continued(future)
        else:
            self._waiting.push(future, ticket)
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await future
        except TimeoutError:
            pass
        finally:
            self._waiting.remove(future)

    async def confirm_failure(self, instance_id: str) -> None:
        """Have the fleet check an instance whose call failed, and give it a moment to report it down.

        Without this a request would spend its replays on a dead instance before anybody noticed.
        """
        if instance_id in self.upstreams:
            self._failing[instance_id] = self.clock.now() + AVOID_S
            self._suspect(instance_id)
            await self._next_change(CONFIRM_S)

    def cut_off(self) -> TidegateError:
        """Return why a request that is cancelled now ends."""
        if self.stopping:
            return ShuttingDown(
                "the gateway stopped before the answer was complete", retry_after_s=RETRY_AFTER_S
            )
        return ClientGone("the client closed the connection")

    def released(self) -> None:
        """Say that a request ended, so that held ones are asked about again."""
        if len(self._waiting):
            self._wake()


def _idle(seen: Snapshot, instance_id: str) -> bool:
    """Tell whether an instance neither prefills nor decodes."""
    column = seen.index[instance_id]
    return not (seen.cells[Field.PREFILL_REQUESTS, column] or seen.cells[Field.DECODE_REQUESTS, column])


def _ticket(request: Request, seen: Snapshot) -> Ticket:
    """Return the ticket of a request that is not placed yet: its prefill is priced where it is fastest."""
    return prefill_ticket(request, fastest_prefill_seconds(seen, request))
