"""The scheduling loop in virtual time: observe, decide, act, journal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tidegate.core.decision import Flip, Hold, Migrate, Place, Reject, Verdict
from tidegate.core.errors import NoInstance
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.dataplane.replica import Replica
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Snapshot
from tidegate.measure.timeline import FlipEvent
from tidegate.policies.pricing import predicted_on
from tidegate.policies.starting_roles import joining_role
from tidegate.sim.sampling import Sampler
from tidegate.systems.system import System

RETRY_AFTER_S = 2.0
"""What a client is told to wait when no instance takes its decode (the gateway's)."""


class Control:
    """Owns the ledger and applies a system's decisions, in the gateway's order.

    ``report`` brings the ledger up to the given time: instances that leap tell of their steps only then.
    ``migrate`` moves a decode. ``kv_in_use`` is what ``Sampler`` samples. ``up`` tells which replicas are up
    at the start; ``first_roles`` are the labels with which they came up, None before.
    """

    def __init__(
        self,
        system: System,
        replicas: Sequence[Replica],
        journal: JournalWriter,
        report: Callable[[float], None],
        migrate: Callable[[Migrate, float], None],
        up: Sequence[bool],
        kv_in_use: Callable[[float], int],
    ) -> None:
        self.ledger = Ledger()
        self.sampler = Sampler([replica.instance.id for replica in replicas], kv_in_use)
        self._system = system
        self._prefill = system.prefill
        self._decode = system.decode
        self._journal = journal
        self._report = report
        self._pool_state: object = None
        self._reason = ""
        self._audited = False
        self._migrate = migrate
        self._replicas = replicas
        self.first_roles: list[Role | None] = [None] * len(replicas)
        self.last_roles: list[Role | None] = [None] * len(replicas)
        for number, role in enumerate(system.roles(len(replicas))):
            if up[number]:
                self._up(number, role, 0.0)

    @property
    def tick_s(self) -> float | None:
        """The period of pool control; None without one."""
        return self._system.pool.tick_s if self._system.pool else None

    def instance_up(self, number: int, now: float) -> None:
        """Add an instance, with the label that the fleet lacks most."""
        role = joining_role(self._system.roles, self.snapshot(now))
        self._up(number, role, now)
        if self._journal.enabled:
            self._journal.instance_up(now, self._replicas[number].instance.id, role)

    def instance_down(self, number: int, reason: str, now: float) -> None:
        """Drop an instance."""
        name = self._replicas[number].instance.id
        self.last_roles[number] = self.ledger.role_of(name)
        self.ledger.instance_down(name, now)
        if self._journal.enabled:
            self._journal.instance_down(now, name, reason)

    def labels(self) -> list[Role | None]:
        """Return the last label of every instance; None for one that never came up."""
        up = set(self.ledger.ids)
        return [
            self.ledger.role_of(replica.instance.id) if replica.instance.id in up else last
            for replica, last in zip(self._replicas, self.last_roles, strict=True)
        ]

    def place_prefill(self, request: Request, kind: str, now: float) -> Place | Hold | Reject:
        """Place a request's prefill; ``kind`` is the journal's word for it. Nothing is entered yet."""
        try:
            seen = self._seen(now)
            verdict = self._prefill.place_prefill(request, seen)
        except NoInstance as error:
            return Hold(error.message)
        if verdict.flips:
            self._apply(verdict.flips, now)
        if self._journal.enabled:
            self._note(kind, request, verdict, seen)
        return verdict.decision

    def place_decode(self, request: Request, prefill_on: str, now: float) -> str | Reject:
        """Place a request's decode and enter it in the ledger; ``request.prompt_tokens`` is resident."""
        try:
            seen = self._seen(now)
            verdict = self._decode.place_decode(request, seen, prefill_on)
        except NoInstance as error:
            return Reject(error.message, RETRY_AFTER_S)
        if verdict.flips:
            self._apply(verdict.flips, now)
        if self._journal.enabled:
            self._note("place_decode", request, verdict, seen)
        if not isinstance(verdict.decision, Place) or verdict.decision.decode_on is None:
            return Reject("no instance takes the decode", RETRY_AFTER_S)
        decode_on = verdict.decision.decode_on
        self.ledger.decode_dispatched(request.id, decode_on, request.prompt_tokens, now)
        return decode_on

    def tick(self, now: float, *, idle: bool, held: int) -> None:
        """Close the gap window, audit the ledger once it is idle, let the pool control decide."""
        self._report(now)
        self.ledger.window_closed(now)
        if idle and not self._audited:
            self.ledger.check_integrity()
        self._audited = idle
        snapshot = self.ledger.snapshot(now)
        self.sampler.tick(snapshot, held)
        pool = self._system.pool
        if pool is None or not len(snapshot):
            return
        control = pool.step(snapshot, self._pool_state)
        self._pool_state = control.state
        if control.reason != self._reason:
            self._reason = control.reason
            if self._journal.enabled:
                self._journal.control(now, control.reason, len(control.flips))
        self._apply(control.flips, now)
        for migrate in control.migrations:
            self._migrate(migrate, now)

    def snapshot(self, now: float) -> Snapshot:
        """Return the cluster as the control plane knows it."""
        self._report(now)
        return self.ledger.snapshot(now)

    def _up(self, number: int, role: Role, now: float) -> None:
        replica = self._replicas[number]
        self.first_roles[number] = role
        self.ledger.instance_up(replica.instance, replica.profile, role, now)

    def _seen(self, now: float) -> Snapshot:
        self._report(now)
        snapshot = self.ledger.snapshot(now)
        if not len(snapshot):
            raise NoInstance("no instance is up")
        return snapshot

    def _apply(self, flips: tuple[Flip, ...], now: float) -> None:
        for flip in flips:
            before = self.ledger.role_of(flip.instance)
            if self.ledger.flip(flip.instance, flip.to, now):
                self.sampler.flips.append(FlipEvent(now, flip.instance, before, flip.to, flip.reason))
                if self._journal.enabled:
                    self._journal.flip(now, flip, Role(before))

    def _note(self, kind: str, request: Request, verdict: Verdict, seen: Snapshot) -> None:
        predicted: dict[str, float] | None = None
        if isinstance(verdict.decision, Place):
            decode = kind == "place_decode"
            on = (verdict.decision.decode_on if decode else None) or verdict.decision.prefill_on
            predicted = predicted_on(on, seen, request, decode=decode)
        self._journal.decision(seen.at_s, request.id, kind, verdict, predicted)
