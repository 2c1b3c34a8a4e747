"""Arrow's vectorised decisions against a plain reading of the algorithms, one instance at a time."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.decision import Flip, Place
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.policies.arrow.published import COOLDOWN_S, L_SHRINK, ArrowPlacement
from tidegate_testing import instance, profile, request

P, D = Role.PREFILL, Role.DECODE
MADE_OF = (profile(), profile(prefill=(0.1, 3e-4, 1e-7), step=(0.02, 0.0, 3e-6)))


@dataclass(frozen=True)
class One:
    """An instance in one round number each: label, profile, queued prompts, decode tokens, mean gap."""

    role: Role
    made_of: int
    prompts: tuple[int, ...]
    decodes: tuple[int, ...]
    gap_s: float


fleets = st.lists(
    st.builds(
        One,
        st.sampled_from([P, D]),
        st.integers(0, 1),
        st.lists(st.sampled_from([50, 300, 700]), max_size=3).map(tuple),
        st.lists(st.sampled_from([500, 1500, 3000]), max_size=3).map(tuple),
        st.sampled_from([0.01, 0.028, 0.032, 0.06]),
    ),
    min_size=2,
    max_size=6,
).filter(lambda fleet: {one.role for one in fleet} == {P, D})


def build(fleet: list[One]) -> Ledger:
    ledger = Ledger()
    for index, one in enumerate(fleet):
        name = f"i{index}"
        ledger.instance_up(instance(name, kv_capacity_tokens=0), MADE_OF[one.made_of], one.role, 0.0)
        for n, tokens in enumerate(one.decodes):
            ledger.prefill_dispatched(request(f"{name}d{n}", tokens), name, 0.0)
            ledger.decode_dispatched(f"{name}d{n}", name, tokens - 2, 0.0)
            ledger.tokens(f"{name}d{n}", 1, 0.0)
    ledger.window_closed(0.0)
    for index, one in enumerate(fleet):
        for n in range(len(one.decodes)):
            ledger.tokens(f"i{index}d{n}", 1, one.gap_s)
    ledger.window_closed(1.0)
    for index, one in enumerate(fleet):
        for n, tokens in enumerate(one.prompts):
            ledger.prefill_dispatched(request(f"i{index}p{n}", tokens), f"i{index}", 1.0)
    return ledger


def prefill_time(one: One, tokens: int) -> float:
    return MADE_OF[one.made_of].prefill_s(tokens)


def queue_s(one: One) -> float:
    return sum(prefill_time(one, tokens) for tokens in one.prompts)


def decode_load(fleet: list[One], tpot_s: float) -> float:
    pool = [one for one in fleet if one.role == D]
    loads = []
    for one in pool:
        k0 = float(MADE_OF[one.made_of].step.a_s)
        above = max(0.0, one.gap_s - k0) / (tpot_s - k0)
        loads.append(above if one.decodes else 0.0)
    return sum(loads) / len(loads)


def plain_flip(fleet: list[One], to: Role) -> int | None:
    source = P if to == D else D
    pool = [i for i, one in enumerate(fleet) if one.role == source]
    if len(pool) <= 1:
        return None
    if source == P:
        return min(pool, key=lambda i: (not fleet[i].decodes, round(queue_s(fleet[i]), 6)))
    return min(pool, key=lambda i: (not fleet[i].prompts, sum(fleet[i].decodes)))


def chosen(place: object) -> Place:
    assert isinstance(place, Place)
    return place


@given(fleets, st.sampled_from([40, 260, 650]), st.sampled_from([0.5, 1.0, 2.0]))
def test_prefill_placement(fleet: list[One], tokens: int, ttft_s: float) -> None:
    pool = [i for i, one in enumerate(fleet) if one.role == P]
    cost = {
        i: (sum(fleet[i].decodes), round(queue_s(fleet[i]) + prefill_time(fleet[i], tokens), 6)) for i in pool
    }
    meets = [i for i in pool if cost[i][1] <= ttft_s]
    flipped = None
    if not meets and decode_load(fleet, 0.05) < L_SHRINK:
        flipped = plain_flip(fleet, P)
    expected = flipped if flipped is not None else min(meets or pool, key=lambda i: cost[i])

    verdict = ArrowPlacement().place_prefill(
        request("new", tokens, ttft_s=ttft_s + 1e-6), build(fleet).snapshot(1.0)
    )
    flips = () if flipped is None else (Flip(f"i{flipped}", P, "inline"),)
    assert verdict.flips == flips
    on = int(chosen(verdict.decision).prefill_on[1:])
    assert on == expected or cost[on] == cost[expected]


@given(fleets, st.sampled_from([40, 1003]), st.booleans())
def test_decode_placement(fleet: list[One], tokens: int, cooling: bool) -> None:
    ledger = build(fleet)
    now = 1.0 + COOLDOWN_S
    if cooling:
        moved = next(f"i{i}" for i, one in enumerate(fleet) if one.role == D)
        ledger.flip(moved, P, now - 1)
        ledger.flip(moved, D, now - 1)
    ran_on = next(f"i{i}" for i, one in enumerate(fleet) if one.role == P)
    pool = [i for i, one in enumerate(fleet) if one.role == D]
    cost = {}
    for i in pool:
        step = MADE_OF[fleet[i].made_of].step
        limit = (0.05 - float(step.a_s)) / float(step.c_s)
        cost[i] = (sum(fleet[i].prompts), round(sum(fleet[i].decodes) + tokens - limit, 6))
    meets = [i for i in pool if cost[i][1] <= 0]
    flipped = None if meets or cooling else plain_flip(fleet, D)
    expected = flipped if flipped is not None else min(meets or pool, key=lambda i: cost[i])

    verdict = ArrowPlacement().place_decode(request("new", tokens), ledger.snapshot(now), ran_on)
    flips = () if flipped is None else (Flip(f"i{flipped}", D, "inline"),)
    assert verdict.flips == flips
    on = int((chosen(verdict.decision).decode_on or "")[1:])
    assert on == expected or cost[on] == cost[expected]
