"""Classes and fair shares: who is next of the requests of several tenants."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.policies.order import STARVATION_BOUND, Ticket, WaitingQueue
from tidegate.policies.orders import ORDERS, make_order
from tidegate.policies.shares import SERVINGS_PER_STARVED, TenantShares, shared_queue
from tidegate_testing import request

names = st.sampled_from(sorted(ORDERS.names()))
works = st.floats(0.001, 0.5)
kinds = st.sampled_from(["push", "push", "pop", "remove", "front", "continued"])
steps = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "pop", "remove", "front", "continued"]), works, st.integers(0, 9)
    ),
    max_size=60,
)


def ticket(at_s: float, work_s: float, tenant: str = "", charge: float = 0.0, priority: int = 0) -> Ticket:
    plain = Ticket(at_s, at_s + 0.5, work_s, int(1000 * work_s))
    return plain._replace(tenant=tenant, charge=charge, priority=priority)


@given(names, steps)
def test_one_tenant_in_one_class_is_served_as_by_the_order_alone(
    name: str, history: list[tuple[str, float, int]]
) -> None:
    alone: WaitingQueue[int] = make_order(name).queue()
    shared: WaitingQueue[int] = shared_queue(make_order(name))
    now = 0.0
    for turn, (kind, work_s, which) in enumerate(history):
        now += work_s / 2
        for queue in (alone, shared):
            if kind == "push":
                queue.push(turn, ticket(now, work_s))
            elif kind == "front":
                queue.push_front(turn)
            elif kind == "continued":
                queue.push_continued(turn)
        assert alone.head(now) == shared.head(now)
        assert alone.head(now, 300) == shared.head(now, 300)
        waiting = sorted(shared)
        if kind == "pop" and waiting:
            assert alone.pop(now) == shared.pop(now)
        elif kind == "remove" and waiting:
            left = waiting[which % len(waiting)]
            assert alone.remove(left) and shared.remove(left)
        assert sorted(alone) == sorted(shared)
    while len(alone):
        assert alone.pop(now) == shared.pop(now)
    assert len(shared) == 0 and shared.head(now) is None


@given(
    names,
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=80),
    st.tuples(st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.floats(0.1, 10.0)),
    st.lists(st.booleans(), max_size=120),
)
def test_what_backlogged_tenants_got_differs_by_at_most_one_request_of_each(
    name: str, came: list[tuple[int, int]], weights: tuple[float, ...], serves: list[bool]
) -> None:
    """From any moment on since which two tenants both wait, over any arrivals and servings."""
    queue: WaitingQueue[int] = shared_queue(make_order(name))
    largest = [
        max([tokens / weights[of] for whose, tokens in came if whose == of], default=0.0) for of in range(3)
    ]
    waiting = [0, 0, 0]
    got = [0.0, 0.0, 0.0]
    apart: dict[tuple[int, int], tuple[float, float]] = {}
    """By pair, the least and the most of what one got more than the other since both wait."""
    arrivals = list(enumerate(came))
    now = 0.0
    for serve in [*serves, *[False] * len(came), *[True] * len(came)]:
        if serve and any(waiting):
            now += 0.01
            at = queue.pop(now)
            tenant, tokens = came[at]
            waiting[tenant] -= 1
            got[tenant] += tokens / weights[tenant]
        elif not serve and arrivals:
            at, (tenant, tokens) = arrivals.pop(0)
            waiting[tenant] += 1
            queue.push(at, ticket(now, tokens / 100, f"t{tenant}", tokens / weights[tenant]))
        for one, other in ((0, 1), (0, 2), (1, 2)):
            if not (waiting[one] and waiting[other]):
                apart.pop((one, other), None)
                continue
            more = got[one] - got[other]
            low, high = apart.get((one, other), (more, more))
            low, high = apart[one, other] = min(low, more), max(high, more)
            assert high - low <= (largest[one] + largest[other]) * (1 + 1e-9)


@given(names, st.lists(st.tuples(st.integers(-2, 2), works), min_size=1, max_size=40))
def test_a_lower_class_number_is_never_behind_a_higher_one(name: str, came: list[tuple[int, float]]) -> None:
    queue: WaitingQueue[int] = shared_queue(make_order(name))
    for at, (priority, work_s) in enumerate(came):
        queue.push(at, ticket(0.0, work_s, f"t{at % 3}", work_s, priority))
    served = [came[queue.pop(1.0)][0] for _ in came]
    assert served == sorted(served)


def test_who_has_starved_in_a_later_class_gets_one_serving_in_ten() -> None:
    queue: WaitingQueue[str] = shared_queue(make_order("feasible-sjf"))
    for at in range(3):
        queue.push(f"late{at}", ticket(0.0, 0.01, priority=1))
    starved_s = 0.5 * STARVATION_BOUND + 0.01
    served = []
    for at in range(25):
        queue.push(f"first{at}", ticket(starved_s, 0.01))
        served.append(queue.pop(starved_s - 0.02))
    assert all(name.startswith("first") for name in served)
    served = []
    for at in range(25, 50):
        queue.push(f"first{at}", ticket(starved_s, 0.01))
        served.append(queue.pop(starved_s))
    assert [at for at, name in enumerate(served) if name.startswith("late")] == [0, 10, 20]
    assert SERVINGS_PER_STARVED == 10


def test_who_was_away_saves_nothing_up_and_owes_what_he_got() -> None:
    queue: WaitingQueue[str] = shared_queue(make_order("fifo"))
    for at in range(6):
        queue.push(f"a{at}", ticket(0.0, 0.01, "a", 10.0))
    assert [queue.pop(0.0) for _ in range(3)] == ["a0", "a1", "a2"]
    for at in range(6):
        queue.push(f"b{at}", ticket(0.0, 0.01, "b", 10.0))
    assert "".join(queue.pop(0.0)[0] for _ in range(6)) == "bababa"
    for name in list(queue):
        queue.remove(name)
    queue.push("b8", ticket(0.0, 0.01, "b", 20.0))
    for at in (7, 8, 9):
        queue.push(f"a{at}", ticket(0.0, 0.01, "a", 5.0))
    assert [queue.pop(0.0) for _ in range(2)] == ["b8", "a7"]
    queue.push("b9", ticket(0.0, 0.01, "b", 10.0))
    assert [queue.pop(0.0) for _ in range(3)] == ["a8", "b9", "a9"], "b owes"
    queue.push("b10", ticket(0.0, 0.01, "b", 10.0))
    queue.push("a10", ticket(0.0, 0.01, "a", 10.0))
    assert queue.pop(0.0) == "b10", "all are even once nobody has waited"


def test_a_queue_forgets_tenants_that_do_not_wait() -> None:
    queue: WaitingQueue[int] = shared_queue(make_order("feasible-sjf"))
    for at in range(5000):
        queue.push(at, ticket(0.01 * at, 0.01, f"t{at}", 1.0))
        assert queue.pop(0.01 * at) == at
    flows = queue._flows  # type: ignore[attr-defined]
    assert len(flows) < 200


def test_a_charge_counts_prompt_and_expected_answer_over_the_weight() -> None:
    shares = TenantShares({"a": 2.0, "*": 0.5})
    plain = Ticket(0.0, 0.5, 0.1, 1000)
    mine, other = request("r", 1000, tenant="a"), request("s", 1000, tenant="b")
    assert shares.of(mine, plain).charge == 500.0
    shares.answered(mine, 100)
    shares.answered(mine, 300)
    assert shares.of(mine, plain) == plain._replace(tenant="a", charge=600.0)
    assert shares.of(other, plain).charge == 2000.0
    assert TenantShares({}).of(mine, plain) is plain
