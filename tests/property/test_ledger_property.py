"""The ledger under any sequence of events, with Arrow placing and flipping."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from tidegate.core.decision import Flip, Place
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Field
from tidegate.systems import System, make_system
from tidegate_testing import instance, profile, request

ROLES = st.sampled_from(list(Role))
PROFILES = st.sampled_from([profile(), profile(prefill=(0.1, 3e-4, 1e-7), step=(0.02, 1e-4, 3e-6))])
NEVER_NEGATIVE = [
    Field.PREFILL_REQUESTS,
    Field.PREFILL_TOKENS,
    Field.PREFILL_QUEUE_S,
    Field.PREFILL_QUEUE_AVG_S,
    Field.DECODE_REQUESTS,
    Field.DECODE_TOKENS,
    Field.HANDOFF_TOKENS,
    Field.MEAN_GAP_S,
]


class LedgerMachine(RuleBasedStateMachine):
    """Events in any order, also late, repeated and about requests that never were."""

    requests = Bundle("requests")

    @initialize(
        system=st.sampled_from(
            ["arrow-lending", "arrow-v1", "static", "minimal-load", "colocated", "round-robin"]
        ),
        fleet=st.lists(st.tuples(ROLES, PROFILES), min_size=1, max_size=5),
    )
    def start(self, system: str, fleet: list[tuple[Role, object]]) -> None:
        self.ledger = Ledger()
        self.system: System = make_system(system)
        self.now = 0.0
        self.names = 0
        self.ended = 0
        self.states: dict[str, object] = {}
        for role, made_of in fleet:
            self._up(role, made_of)

    def _up(self, role: Role, made_of: object, flippable: bool = True) -> None:
        self.names += 1
        up = instance(f"i{self.names}", kv_capacity_tokens=5000, flippable=flippable)
        self.ledger.instance_up(up, made_of, role, self.now)  # type: ignore[arg-type]

    def _places(self, name: str) -> list[int]:
        """Return the columns of prefill, source and decode of a request, those that it has."""
        rows = self.ledger.snapshot(self.now).requests
        if name not in rows.ids:
            return []
        row = rows.ids.index(name)
        return [int(on[row]) for on in (rows.prefill_on, rows.source_on, rows.decode_on) if on[row] >= 0]

    def _live(self) -> tuple[str, ...]:
        return self.ledger.snapshot(self.now).requests.ids

    def _apply(self, flips: Sequence[Flip]) -> None:
        for flip in flips:
            before = self.ledger.snapshot(self.now)
            source = before.labelled(self.ledger.role_of(flip.instance))
            assert np.count_nonzero(source) > 1, "a flip emptied a pool"
            assert self.ledger.flip(flip.instance, flip.to, self.now), "a flip that cannot be applied"

    @rule(seconds=st.floats(0.0, 30.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        target=requests, tokens=st.integers(1, 6000), cached=st.integers(0, 100), slack=st.floats(0.01, 10.0)
    )
    def arrives(self, tokens: int, cached: int, slack: float) -> object:
        if not self.ledger.ids:
            return multiple()
        name = f"r{self.ledger.snapshot(self.now).placed_prefills}"
        asked = request(
            name,
            tokens,
            cached=dict.fromkeys(self.ledger.ids, min(cached, tokens)),
            ttft_s=slack,
            tpot_s=slack / 20,
        )
        verdict = self.system.prefill.place_prefill(asked, self.ledger.snapshot(self.now))
        again = self.system.prefill.place_prefill(asked, self.ledger.snapshot(self.now))
        assert (again.decision, again.flips) == (verdict.decision, verdict.flips), "a policy is a function"
        assert isinstance(verdict.decision, Place)
        assert verdict.decision.prefill_on in self.ledger.ids
        self._apply(verdict.flips)
        predicted = self.ledger.prefill_dispatched(asked, verdict.decision.prefill_on, self.now)
        assert predicted >= 0
        return name

    @rule(name=requests)
    def prefill_ends(self, name: str) -> None:
        self.ledger.prefill_ended(name, self.now)

    @rule(name=requests, resident=st.integers(1, 6000))
    def decode_is_placed(self, name: str, resident: int) -> None:
        places = self._places(name)
        if not places:
            assert not self.ledger.ids or not self.ledger.decode_dispatched(
                name, self.ledger.ids[0], resident, self.now
            )
            return
        asked, owner = request(name, resident), self.ledger.ids[places[0]]
        snapshot = self.ledger.snapshot(self.now)
        verdict = self.system.decode.place_decode(asked, snapshot, owner)
        again = self.system.decode.place_decode(asked, snapshot, owner)
        assert (again.decision, again.flips) == (verdict.decision, verdict.flips)
        assert isinstance(verdict.decision, Place)
        assert verdict.decision.decode_on in self.ledger.ids
        self._apply(verdict.flips)
        assert self.ledger.decode_dispatched(name, verdict.decision.decode_on, resident, self.now)

    @rule(name=requests)
    def transfer_ends(self, name: str) -> None:
        self.ledger.transfer_ended(name, self.now)

    @rule(name=requests, count=st.integers(1, 20))
    def produces(self, name: str, count: int) -> None:
        self.ledger.tokens(name, count, self.now)

    @rule(name=requests)
    def falls_in_step(self, name: str) -> None:
        self.ledger.tokens(name, 1, self.now)
        self.ledger.joined(name)

    @rule(data=st.data(), count=st.integers(1, 20))
    def all_step(self, data: st.DataObject, count: int) -> None:
        if self.ledger.ids:
            self.ledger.stepped(data.draw(st.sampled_from(self.ledger.ids)), count, self.now)

    @rule(name=requests)
    def pauses(self, name: str) -> None:
        self.ledger.left_step(name)

    @rule(name=requests)
    def finishes(self, name: str) -> None:
        live = bool(self._places(name))
        assert self.ledger.finished(name, self.now) == live
        self.ended += live
        assert not self.ledger.finished(name, self.now)

    @rule(name=requests)
    def is_aborted(self, name: str) -> None:
        live = bool(self._places(name))
        assert self.ledger.aborted(name, self.now) == live
        assert not self._places(name)
        self.ended += live

    @rule(data=st.data(), requests=st.integers(0, 9), tokens=st.integers(0, 9000))
    def others_use_it(self, data: st.DataObject, requests: int, tokens: int) -> None:
        if not self.ledger.ids:
            return
        name = data.draw(st.sampled_from(self.ledger.ids))
        column = self.ledger.ids.index(name)
        own, before = self.ledger.booked(name), self._live()
        for said in ((requests, tokens), (requests, tokens)):
            assert self.ledger.foreign_load(name, *said)
            seen = self.ledger.snapshot(self.now)
            assert seen.decode_requests[column] == len(self.ledger.residents(name).decodes) + requests
            kv = seen.decode_tokens[column] + seen.handoff_tokens[column]
            assert kv == own.decode_tokens + own.handoff_tokens + tokens
            assert seen.free_tokens[column] == 5000 - kv
        assert (self.ledger.booked(name), self._live()) == (own, before), "nothing of its own"

    @rule(role=ROLES, made_of=PROFILES, flippable=st.booleans())
    def comes_up(self, role: Role, made_of: object, flippable: bool) -> None:
        if len(self.ledger.ids) < 6:
            self._up(role, made_of, flippable)

    @rule(data=st.data())
    def goes_down(self, data: st.DataObject) -> None:
        if not self.ledger.ids:
            return
        gone = data.draw(st.sampled_from(self.ledger.ids))
        kept = tuple(i for i in self.ledger.ids if i != gone)
        on_it = self.ledger.residents(gone)
        affected = self.ledger.instance_down(gone, self.now)
        assert sorted(affected) == sorted(on_it.prefills + on_it.handoffs + on_it.decodes)
        assert self.ledger.ids == kept
        self.ended += sum(not self._places(name) for name in affected)

    @rule()
    def ticks(self) -> None:
        self.ledger.window_closed(self.now)
        for controller in self.system.controllers:
            snapshot = self.ledger.snapshot(self.now)
            state = self.states.setdefault(controller.name, controller.initial())
            decision = controller.decide(snapshot, state)
            assert decision == controller.decide(snapshot, state)
            self.states[controller.name] = decision.state
            self._apply([action for action in decision.actions if isinstance(action, Flip)])

    @invariant()
    def the_books_are_right(self) -> None:
        self.ledger.check_integrity()
        snapshot = self.ledger.snapshot(self.now)
        assert np.all(snapshot.state[NEVER_NEGATIVE] >= 0)
        assert np.all(snapshot.prefill_wait_s >= 0)
        assert np.all(snapshot.prefill_wait_s <= snapshot.prefill_queue_s)

    @invariant()
    def every_request_is_somewhere_or_ended_once(self) -> None:
        snapshot = self.ledger.snapshot(self.now)
        assert snapshot.placed_prefills == len(snapshot.requests.ids) + self.ended


LedgerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLedger = LedgerMachine.TestCase
