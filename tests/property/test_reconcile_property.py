"""A ledger and an engine that learn of things at different times, and others who use the engine, too."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.reconcile import KV_SHARE, READINGS, REQUESTS_SHARE, EngineLoad, Reconciler
from tidegate.ledger.snapshot import Field
from tidegate_testing import instance, profile, request

CAPACITY_TOKENS, BLOCK_TOKENS, PROMPT_TOKENS = 100_000, 16, 100
NAME = "i0"


def blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


class Reconciling(RuleBasedStateMachine):
    """Own requests are known to the ledger first and to the engine later; their ends the other way round.

    At most as many as the tolerance are on their way out at a time: that is what it means.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        up = instance(NAME, kv_capacity_tokens=CAPACITY_TOKENS)
        self.ledger.instance_up(up, profile(), Role.MIXED, 0.0)
        self.reconciler = Reconciler(CAPACITY_TOKENS, BLOCK_TOKENS)
        self.now = 0.0
        self.count = 0
        self.coming: list[str] = []
        self.running: dict[str, int] = {}
        self.leaving: dict[str, int] = {}
        self.others: list[int] = []
        self.least_others: list[int] = []
        self.most_unknown: list[int] = []

    def _told(self) -> EngineLoad:
        kv = [*self.running.values(), *self.leaving.values(), *self.others]
        return EngineLoad(len(kv), sum(blocks(tokens) for tokens in kv))

    @rule()
    def own_request_comes(self) -> None:
        self.count += 1
        name = f"r{self.count}"
        self.ledger.prefill_dispatched(request(name, PROMPT_TOKENS), NAME, self.now)
        self.coming.append(name)

    @precondition(lambda self: self.coming)
    @rule()
    def engine_begins_it(self) -> None:
        name = self.coming.pop(0)
        self.running[name] = PROMPT_TOKENS
        self.ledger.prefill_ended(name, self.now)
        self.ledger.decode_dispatched(name, NAME, PROMPT_TOKENS, self.now)

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 50))
    def it_decodes(self, count: int) -> None:
        for name in self.running:
            self.running[name] += count
            self.ledger.tokens(name, count, self.now)

    @precondition(lambda self: self.running)
    @rule()
    def it_ends(self) -> None:
        name = next(iter(self.running))
        del self.running[name]
        self.ledger.finished(name, self.now)

    @precondition(lambda self: len(self.running) > 1)
    @rule()
    def the_gateway_gives_it_up_first(self) -> None:
        rest = len(self.running) + len(self.coming) - 1
        if len(self.leaving) < math.ceil(rest * REQUESTS_SHARE):
            name = next(iter(self.running))
            self.leaving[name] = self.running.pop(name)
            self.ledger.aborted(name, self.now)

    @rule()
    def the_engine_follows(self) -> None:
        self.leaving.clear()

    @rule(tokens=st.integers(1, 20_000))
    def others_come(self, tokens: int) -> None:
        self.others.append(tokens)

    @rule(keep=st.integers(0, 2))
    def others_leave(self, keep: int) -> None:
        del self.others[keep:]

    @rule(readings=st.integers(1, READINGS))
    def reading(self, readings: int) -> None:
        """Read, a few times with nothing happening in between."""
        for _ in range(readings):
            booked, told = self.ledger.booked(NAME), self._told()
            self.reconciler.compare(booked, booked, told)
            requests, tokens = self.reconciler.foreign_requests, self.reconciler.foreign_tokens
            assert self.ledger.foreign_load(NAME, requests, tokens)
            self.most_unknown = [*self.most_unknown, len(self.others) + len(self.leaving)][-READINGS:]
            assert requests <= min(self.most_unknown), "more than ever there was"
            assert tokens <= sum(map(blocks, [*self.others, *self.leaving.values()]))
            if not self.others and len(self.coming) >= len(self.leaving):
                assert requests == 0, "nobody else is there"

    @rule()
    def a_quiet_while(self) -> None:
        """Nothing is on its way, and nothing happens for as many readings as it takes."""
        while self.coming:
            self.engine_begins_it()
        self.leaving.clear()
        for _ in range(READINGS):
            self.reading(1)
        own = len(self.running)
        if len(self.others) > math.ceil(own * REQUESTS_SHARE) or not self.others:
            assert self.reconciler.foreign_requests == len(self.others)
            snapshot = self.ledger.snapshot(self.now)
            assert snapshot.decode_requests[0] == self._told().requests, "the ledger believes the engine"
        unexplained = sum(map(blocks, self.others)) - BLOCK_TOKENS * own
        if unexplained > 2 * CAPACITY_TOKENS * KV_SHARE:
            free = self.ledger.snapshot(self.now).cells[Field.FREE_TOKENS, 0]
            really_free = CAPACITY_TOKENS - (self._told().kv_tokens or 0)
            assert abs(free - really_free) <= BLOCK_TOKENS * own

    @invariant()
    def the_books_are_right(self) -> None:
        self.ledger.check_integrity()


Reconciling.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestReconciling = Reconciling.TestCase
