"""Whatever happens to sessions, a placement is told of no KV that is not there, and of nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.plane_harness import only
from tests.control.test_plane_sessions import BLOCK, Turn, make_case
from tidegate.control.effects import StartMigration
from tidegate.core.decision import Migrate
from tidegate.core.errors import TidegateError
from tidegate.signals.think_times import BINS_PER_OCTAVE, ENOUGH, LEAST_TTL_S, MARGIN, UNLEARNT_S, ThinkTimes
from tidegate_testing import REFERENCE, instance

TENANTS, NAMES, UP = ("a", "b"), ("", "s", "t"), ("i0", "i1", "i2")

STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("turn"),
            st.sampled_from(TENANTS),
            st.sampled_from(NAMES),
            st.lists(st.integers(0, 2), min_size=1, max_size=6),
            st.sampled_from(UP),
            st.sampled_from(UP),
        ),
        st.tuples(st.just("end"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("move"), st.integers(0, 9), st.sampled_from(UP)),
        st.tuples(st.just("bounce"), st.sampled_from(UP)),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 700.0])),
    ),
    max_size=40,
)


class Model:
    """Plays steps, and keeps what whole turns each tenant's sessions have had."""

    def __init__(self, kv_tokens: int) -> None:
        self.case = make_case(kv_tokens=kv_tokens)
        self.kv_tokens = kv_tokens
        self.now = 0.0
        self.count = 0
        self.flying: list[Turn] = []
        self.had: dict[tuple[str, str], list[tuple[int, ...]]] = {}

    def turn(self, tenant: str, name: str, said: Sequence[int], prefill_on: str, decode_on: str) -> None:
        # A block stands for all before it, as the chained hashes of real prompts do.
        keys = tuple(hash((tenant, tuple(said[: end + 1]))) for end in range(len(said)))
        turn = Turn(f"r{self.count}", keys, name, tenant)
        self.count += 1
        self.case.told.prefill_on, self.case.told.decode_on = prefill_on, decode_on
        run = self.case.begin(turn, self.now)
        for asked in self.case.told.asked[-2:]:
            history = asked.history
            if history is None:
                continue
            assert history.on in self.case.plane.ledger.ids
            assert 0 < history.tokens < asked.prompt_tokens
            blocks = history.tokens // BLOCK
            earlier = self.had.get((tenant, name), [])
            assert any(keys[:blocks] == one[:blocks] and len(one) >= blocks for one in earlier)
        if run.place.read_from is not None:
            assert run.place.read_from in self.case.plane.ledger.ids
            assert run.place.read_from != run.place.prefill_on
        self.flying.append(turn)

    def end(self, which: int, whole: bool) -> None:
        if not self.flying:
            return
        turn = self.flying.pop(which % len(self.flying))
        if not whole:
            self.case.plane.ended(turn, TidegateError("the client left"), self.now)
            return
        self.case.end(turn, self.now)
        request = turn.request
        self.had.setdefault((request.tenant, request.session), []).append(tuple(turn.blocks.keys))

    def move(self, which: int, to: str) -> None:
        if not self.flying:
            return
        turn = self.flying[which % len(self.flying)]
        ids = self.case.plane.ledger.ids
        if turn.decode_on not in ids or to not in ids or to == turn.decode_on or turn.migrate is not None:
            return
        if only(self.case.plane.act([Migrate(turn.id, turn.decode_on, to)], self.now), StartMigration):
            self.case.plane.migration_begun(turn, self.now)
            self.case.plane.migration_done(turn, turn.request.prompt_tokens + 1, self.now)

    def bounce(self, name: str) -> None:
        while self.flying:
            self.end(0, False)
        self.case.plane.instance_down(name, "died", self.now)
        self.case.plane.instance_up(instance(name, kv_capacity_tokens=self.kv_tokens), REFERENCE, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.case.plane.tick(self.now)

    def check(self) -> None:
        sessions = self.case.plane.ledger.sessions
        for name in UP:
            held = sum(entry.context_tokens for entry in sessions.bound_to(name))
            assert sessions.held_tokens.get(name, 0) == held
            idle = sum(entry.context_tokens for entry in sessions.bound_to(name) if not entry.live)
            assert sessions.idle_tokens.get(name, 0) == idle
            assert all(entry.instance == name for entry in sessions.bound_to(name))
        self.case.plane.ledger.check_integrity()


@given(STEPS, st.sampled_from([1500, 100_000]))
@settings(max_examples=150, deadline=None)
def test_histories_are_true_whatever_happens(steps: list[tuple[Any, ...]], kv_tokens: int) -> None:
    model = Model(kv_tokens)
    for name, *arguments in steps:
        getattr(model, name)(*arguments)
        model.check()
    while model.flying:
        model.end(0, True)
    model.check()


@given(st.lists(st.floats(0.001, 10_000.0), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_kv_is_kept_for_as_long_as_nearly_all_clients_think(pauses_s: list[float]) -> None:
    think = ThinkTimes()
    for pause_s in pauses_s:
        think.observed("a", pause_s)
    if len(pauses_s) < ENOUGH:
        assert think.ttl_s("a") == UNLEARNT_S and think.returns("a", 1e9) == 1.0
        return
    longest = max(LEAST_TTL_S, MARGIN * max(max(pauses_s), 0.01) * 2 ** (1 / BINS_PER_OCTAVE))
    assert LEAST_TTL_S <= think.ttl_s("a") <= longest
    assert think.ttl_s("b") == think.ttl_s("a"), "a tenant that is not known has everybody's"
    shares = [think.returns("a", idle_s) for idle_s in (0.0, 1.0, 100.0, 1e9)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(shares))
    assert (shares[0], shares[-1]) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))
