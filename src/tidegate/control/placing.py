"""Placing: what becomes of a request that wants an instance, told as effects."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from tidegate.control.actions import Actions
from tidegate.control.effects import Effects, GiveUp, Held, RunPrefill, WakeAt
from tidegate.control.held import HeldRequests
from tidegate.control.live_request import LiveRequest, Stage
from tidegate.control.membership import Membership
from tidegate.control.refusals import held_too_long, none_up, rejected
from tidegate.control.sessions import BoundSessions
from tidegate.control.settings import ControlSettings
from tidegate.core.decision import Hold, Path, Place, Reject, Verdict
from tidegate.core.request import Request
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.policies.order import prefill_ticket
from tidegate.policies.pricing import fastest_prefill_seconds, predicted_on
from tidegate.policies.shares import TenantShares
from tidegate.signals.prefix import PrefixIndex
from tidegate.systems.system import System


class Placing:
    """Asks the system's placements, has them journalled, and brings the ledger and the request in line.

    ``held`` are the requests that wait to be asked for again, ``shares`` says whose turn it is.
    """

    def __init__(
        self,
        system: System,
        settings: ControlSettings,
        ledger: Ledger,
        membership: Membership,
        prefixes: PrefixIndex | None,
        sessions: BoundSessions,
        actions: Actions,
        journal: JournalWriter,
    ) -> None:
        self.held = HeldRequests(system.order)
        self.shares = TenantShares(settings.shares)
        self._system = system
        self._settings = settings
        self._ledger = ledger
        self._membership = membership
        self._prefixes = prefixes
        self._sessions = sessions
        self._actions = actions
        self._journal = journal

    def place_prefill(self, live: LiveRequest, kind: str, now: float) -> Effects:
        """Have a prefill placed; ``kind`` is what the journal calls the decision."""
        request = self._sessions.asked(live)
        view, may_flip = self._membership.view(now)
        if not view.ids:
            return self._without_instances(live, request, now)
        prefixes, hits = self._prefixes, None
        if prefixes is not None:
            hits = prefixes.hits(live.blocks, request.prompt_tokens)
        request = self._sessions.found(live, request, hits, view)
        if prefixes is not None and request.cached:
            request = replace(request, cached=prefixes.outlasting(request.cached, live.blocks))
        self._ledger.held_prefills = len(self.held)
        verdict = self._system.prefill.place_prefill(request, view)
        verdict = self._reads(request, verdict, view)
        if self._settings.admission and not live.replays:
            verdict = self._system.admission(verdict, request, view, self._settings.admission)
        effects = self.decided(request, kind, verdict, view, may_flip)
        decision = verdict.decision
        if isinstance(decision, Place):
            effects.append(self._dispatch(live, request, decision, view, now))
        elif isinstance(decision, Reject):
            effects.append(GiveUp(live, rejected(decision)))
        else:
            effects += self._hold(live, request, decision, now)
        return effects

    def _reads(self, request: Request, verdict: Verdict, view: Snapshot) -> Verdict:
        """Settle whether a prefill begins with KV of earlier turns that another instance holds."""
        place, history = verdict.decision, request.history
        if not isinstance(place, Place) or (history is None and place.read_from is None):
            return verdict
        on, read_from = place.prefill_on, place.read_from
        apart = history is not None and place.path is not Path.COLOCATED and on != history.on
        if request.generated or not apart or not view.cells[Field.EXTENDS_KV, view.index[on]]:
            read_from = None
        elif history is not None and read_from != history.on:
            worth = self._system.read_back
            read_from = history.on if worth is not None and worth(request, view, on) else None
        if read_from == place.read_from:
            return verdict
        return replace(verdict, decision=replace(place, read_from=read_from))

    def _dispatch(
        self, live: LiveRequest, request: Request, place: Place, view: Snapshot, now: float
    ) -> RunPrefill:
        on, column, read_s = place.prefill_on, view.index[place.prefill_on], 0.0
        if place.read_from is not None and request.history is not None:
            here = request.cached.get(on, 0)
            comes = max(request.history.tokens, here)
            read_bytes = (comes - here) * view.cells[Field.KV_BYTES_PER_TOKEN, column]
            read_s = float(view.costs.at(column).transfer.seconds(read_bytes))
            request = replace(request, cached={**request.cached, on: comes})
        seconds = self._ledger.prefill_dispatched(request, on, now)
        live.stage = Stage.PREFILL
        live.prefill_on = on
        live.decode_on = on if place.path is Path.COLOCATED else None
        live.predicted_prefill_s = seconds
        live.predicted_cached_tokens = request.cached.get(on, 0)
        if self._prefixes is not None and live.blocks.keys:
            blocks = live.blocks.within(request.prompt_tokens - request.generated)
            self._prefixes.sent(blocks, on, live.id)
        cells = view.cells
        alone = not (cells[Field.PREFILL_REQUESTS, column] or cells[Field.DECODE_REQUESTS, column])
        ticket = prefill_ticket(request, seconds + read_s, on, view.forecast, place.chunk_tokens)
        ticket = self.shares.of(request, ticket)
        return RunPrefill(live, place, ticket, alone)

    def decodes_on(
        self, live: LiveRequest, on: str, resident_tokens: int, now: float, stopped_s: float | None = None
    ) -> None:
        """Say that a decode, with so many tokens of KV, is placed on an instance."""
        self._ledger.decode_dispatched(live.id, on, resident_tokens, now, stopped_s)
        live.stage = Stage.DECODE
        live.decode_on = on
        if self._prefixes is not None and live.blocks.keys:
            self._prefixes.sent(live.blocks.within(resident_tokens - live.generated), on, live.id)

    def _without_instances(self, live: LiveRequest, request: Request, now: float) -> Effects:
        """Refuse a request whose answer has not begun: its client can go elsewhere. Another waits for an
        instance to return, as long as its deadline allows."""
        if not live.generated or now >= live.deadline_s:
            return [GiveUp(live, none_up(self._settings.retry_after_s))]
        self.held.hold(live, self.shares.of(request, prefill_ticket(request, 0.0, "", None)))
        return [Held(live, "no instance is up"), WakeAt(live.deadline_s)]

    def _hold(self, live: LiveRequest, request: Request, hold: Hold, now: float) -> Effects:
        if now >= live.deadline_s:
            return [GiveUp(live, held_too_long(hold, self._settings.retry_after_s))]
        view = self._membership.view(now)[0]
        ticket = prefill_ticket(request, fastest_prefill_seconds(view, request), "", view.forecast)
        self.held.hold(live, self.shares.of(request, ticket), with_all_behind=hold.with_all_behind)
        return [Held(live, hold.reason)]

    def retry(self, now: float) -> Effects:
        """Ask again for every held request, in the system's order."""
        return self.held.ask_again(now, lambda live: self.place_again([live], now)) if self.held else []

    def place_again(self, lives: Sequence[LiveRequest], now: float) -> Effects:
        """Have prefills placed that waited."""
        effects: Effects = []
        for live in lives:
            effects += self.place_prefill(live, "replay" if live.replays else "place_prefill", now)
        return effects

    def decided(
        self, request: Request, kind: str, verdict: Verdict, view: Snapshot, may_flip: bool
    ) -> Effects:
        """Apply a verdict's flips; journal it with its alternatives and what is predicted where it places."""
        effects = self._actions.execute(verdict.flips, view.at_s) if verdict.flips and may_flip else []
        if self._journal.enabled:
            predicted: dict[str, float] | None = None
            if isinstance(verdict.decision, Place):
                decode = kind == "place_decode"
                on = (verdict.decision.decode_on if decode else None) or verdict.decision.prefill_on
                predicted = predicted_on(on, view, request, decode=decode)
            self._journal.decision(view.at_s, request, kind, verdict, predicted)
        return effects
