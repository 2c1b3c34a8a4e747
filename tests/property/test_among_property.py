"""Choosing among a few instances and among many is the same choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.among import Cost, best, best_within
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Field, PrefillWait, Reading, Snapshot
from tidegate.policies.candidates import fitting
from tidegate.policies.pricing import StepSeconds, Sum, TokensOverLimit, Ttft
from tidegate.testing import REFERENCE, instance, profile, request

ASKED = Request("new", 300, 50, 0.0, Slo(0.3, 0.03))
COSTS: list[Callable[[Snapshot], Cost]] = [
    lambda seen: Ttft(seen, ASKED),
    lambda seen: StepSeconds(seen, ASKED, scale=2.0),
    lambda seen: TokensOverLimit(seen, ASKED),
    lambda seen: Reading(seen, Field.DECODE_TOKENS),
    lambda seen: Sum(PrefillWait(seen), StepSeconds(seen, ASKED)),
]
loads = st.tuples(st.sampled_from([0, 50, 300]), st.sampled_from([0, 400, 900]), st.sampled_from([0, 1]))


@given(
    fleet=st.lists(loads, min_size=1, max_size=5),
    cost=st.sampled_from(COSTS),
    alike=st.booleans(),
    late_s=st.sampled_from([0.0, 0.01, 5.0]),
)
def test_floats_and_arrays_choose_alike(
    fleet: list[tuple[int, int, int]], cost: Callable[[Snapshot], Cost], alike: bool, late_s: float
) -> None:
    ledger = Ledger()
    for index, (queued, decoding, kind) in enumerate(fleet):
        name = f"i{index}"
        made_of = REFERENCE if alike or kind else profile(step=(0.001, 1e-4, 1e-7))
        ledger.instance_up(instance(name, kv_capacity_tokens=kind * 1000), made_of, Role(kind), 0.0)
        if queued:
            ledger.prefill_dispatched(request(f"{name}-p", queued), name, 0.0)
        if decoding:
            ledger.prefill_dispatched(request(f"{name}-d", decoding), name, 0.0)
            ledger.decode_dispatched(f"{name}-d", name, decoding, 0.0)
    seen = ledger.snapshot(late_s)
    priced, lead = cost(seen), Reading(seen, Field.PREFILL_TOKENS)
    few, many = tuple(range(len(fleet))), np.arange(len(fleet))
    assert [priced.at(column) for column in few] == priced.column().tolist()
    assert best(priced, few) == best(priced, many)
    assert best(priced, few, lead=lead) == best(priced, many, lead=lead)
    for limit in (-1.0, 0.0, 0.05, float(np.median(priced.column()))):
        assert best_within(priced, few, limit, lead=lead) == best_within(priced, many, limit, lead=lead)
    for held_on in (None, "i0", "gone"):
        assert list(fitting(seen, few, 300, held_on)) == list(fitting(seen, many, 300, held_on))
