"""Admission under ``tidegate``: who is refused, and when it is true to come back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.decision import Place, Reject, Verdict
from tidegate.core.errors import Overloaded
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.dataplane.events import EventKind
from tidegate.dataplane.replica import parse_groups, replicas_in
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.policies.order import Ticket
from tidegate.policies.orders import make_order
from tidegate.policies.tidegate.harm import harmless
from tidegate.policies.tidegate.placement import OneCost
from tidegate.sim.loop import _Simulation
from tidegate.sim.settings import SimSettings
from tidegate.systems import make_system
from tidegate.workloads.choice import WorkloadChoice, at_rate, load_workload
from tidegate_testing import cluster, profile, request


def queue(*prompts: tuple[int, float]) -> Ledger:
    """Return one instance that takes 1 ms per token, with prompts of so many tokens and a target each."""
    ledger = cluster(1, roles=(Role.MIXED,), profile=profile())
    for number, (tokens, ttft_s) in enumerate(prompts):
        ledger.prefill_dispatched(request(f"q{number}", tokens, ttft_s=ttft_s), "i0", 0.0)
    return ledger


def asked(ledger: Ledger, tokens: int, ttft_s: float, now: float = 0.0) -> Verdict:
    new = request("new", tokens, ttft_s=ttft_s, arrival_s=now)
    snapshot = ledger.snapshot(now)
    return harmless(OneCost().place_prefill(new, snapshot), new, snapshot, 3.0)


def test_one_by_which_another_one_misses_is_refused_until_that_one_has_ended() -> None:
    ledger = queue((200, 0.25), (400, 0.65))
    verdict = asked(ledger, 350, 1.0)
    assert isinstance(verdict.decision, Reject) and verdict.decision.retry_after_s == pytest.approx(0.6)
    ledger.prefill_ended("q0", 0.2)
    ledger.prefill_ended("q1", 0.6)
    assert isinstance(asked(ledger, 350, 1.0, now=0.6).decision, Place), "it told the truth"
    assert isinstance(asked(queue((200, 0.25), (400, 1.0)), 350, 1.0).decision, Place), "all are in time"
    assert isinstance(asked(queue((200, 0.1), (400, 0.3)), 350, 1.0).decision, Place), "late already"
    assert isinstance(asked(queue((200, 0.25), (400, 0.65)), 300, 1.0).decision, Place), "for a longer one"


def test_one_that_is_late_itself_is_served_last_and_so_taken_unless_it_would_starve() -> None:
    assert isinstance(asked(queue((400, 0.45), (500, 0.95)), 300, 0.2).decision, Place)
    assert isinstance(asked(queue((23_000, 100.0)), 300, 0.2).decision, Place)
    refused = asked(queue((25_000, 100.0)), 300, 0.2).decision
    assert isinstance(refused, Reject) and refused.retry_after_s == pytest.approx(25.0)


def test_other_classes_are_taken() -> None:
    ledger = queue((400, 0.45), (500, 0.95))
    new = request("new", 300, ttft_s=1.0, priority=1)
    snapshot = ledger.snapshot(0.0)
    verdict = OneCost().place_prefill(new, snapshot)
    assert harmless(verdict, new, snapshot, 3.0) is verdict


def in_time(tickets: list[Ticket]) -> set[int]:
    """Serve all in the order; return who is in time."""
    waiting = make_order("feasible-sjf").queue()
    for at, ticket in enumerate(tickets):
        waiting.push(at, ticket)
    now, met = 0.0, set()
    for _ in tickets:
        at = waiting.pop(now)
        now += tickets[at].work_s
        if now <= tickets[at].deadline_s:
            met.add(at)
    return met


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(3, 120)), min_size=1, max_size=8),
    st.tuples(st.integers(1, 40), st.integers(3, 120)),
)
def test_nobody_is_refused_who_makes_no_other_miss(
    prompts: list[tuple[int, int]], new: tuple[int, int]
) -> None:
    """In hundredths of a second, dues half of one off, so that no two times meet."""
    tickets = [Ticket(0.0, due / 100 + 0.005, work / 100) for work, due in [*prompts, new]]
    ledger = queue(*[(10 * work, due / 100 + 0.005) for work, due in prompts])
    decision = asked(ledger, 10 * new[0], new[1] / 100 + 0.005).decision
    late = in_time(tickets[:-1]) - in_time(tickets)
    if isinstance(decision, Reject):
        assert late and decision.retry_after_s > 0
    else:
        assert all(prompts[at][0] > 1.2 * new[0] for at in late)


def test_most_that_come_back_when_told_are_taken() -> None:
    """Twice what the fleet serves, and every refused request is sent once more, after whole seconds."""
    slo = Slo(0.5, 0.05)
    workload = at_rate(load_workload(WorkloadChoice(trace="like:short:4000:3")), 1500.0, 0)
    system = make_system("tidegate", slo=slo)
    replicas = replicas_in(parse_groups(["h100_sxm/llama-3.1-8b:4"]))
    settings = SimSettings(slo=slo, admission=3.0)
    run = _Simulation(workload, system, replicas, settings, JournalWriter(None), None)
    driver, tries, refused = run._driver, dict.fromkeys(range(len(workload)), 0), [0, 0]
    ends = driver._close

    def close(live: object, error: object, now: float) -> None:
        number = live.number  # type: ignore[attr-defined]
        if isinstance(error, Overloaded):
            refused[tries[number]] += 1
            if not tries[number]:
                again_s = now + math.ceil(error.retry_after_s or 0.0)
                run._arrivals.coming[number] = workload[number]._replace(arrival_s=again_s)
                driver._events.push(again_s, EventKind.ARRIVAL, number)
            tries[number] = 1
        ends(live, error, now)  # type: ignore[arg-type]

    driver._close = close  # type: ignore[method-assign]
    run.run()
    assert refused[0] >= 20
    assert refused[1] <= 0.2 * refused[0]
