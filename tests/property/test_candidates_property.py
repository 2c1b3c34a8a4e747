"""A few instances, priced one by one, and many, priced at once, give the same choice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import EVERYONE, Snapshot
from tidegate.policies.arrow.lending import pressure
from tidegate.policies.candidates import Price, at_least, at_most, best, best_within, price_at, with_room
from tidegate.policies.pricing import QUEUED_TOKENS, RESIDENT_TOKENS, step_s, tokens_over_limit, ttft_s
from tidegate_testing import REFERENCE, instance, profile, request

ASKED = Request("new", 300, 50, 0.0, Slo(0.3, 0.03))
PRICES: list[Callable[[Snapshot], Price]] = [
    lambda seen: ttft_s(seen, ASKED),
    lambda seen: ttft_s(seen, replace(ASKED, cached={"i0": 299, "i2": 128, "gone": 64})),
    lambda seen: step_s(ASKED, scale=2.0),
    lambda seen: tokens_over_limit(ASKED),
    lambda seen: RESIDENT_TOKENS,
    lambda seen: pressure(ASKED, 300.0, 0.85),
]
loads = st.tuples(st.sampled_from([0, 50, 300]), st.sampled_from([0, 400, 900]), st.sampled_from([0, 1]))


@given(
    fleet=st.lists(loads, min_size=1, max_size=5),
    price=st.sampled_from(PRICES),
    alike=st.booleans(),
    late_s=st.sampled_from([0.0, 0.01, 5.0]),
)
def test_floats_and_arrays_choose_alike(
    fleet: list[tuple[int, int, int]], price: Callable[[Snapshot], Price], alike: bool, late_s: float
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
    priced, lead = price(seen), QUEUED_TOKENS
    few, many = tuple(range(len(fleet))), np.arange(len(fleet))
    everywhere = np.asarray(priced(seen.state, EVERYONE, seen.costs))
    assert [price_at(seen, priced, column) for column in few] == everywhere.tolist()
    assert best(seen, few, priced) == best(seen, many, priced)
    assert best(seen, few, priced, lead=lead) == best(seen, many, priced, lead=lead)
    for limit in (-1.0, 0.0, 0.05, float(np.median(everywhere))):
        assert best_within(seen, few, priced, limit, lead=lead) == best_within(
            seen, many, priced, limit, lead=lead
        )
        assert list(at_most(seen, few, priced, limit)) == list(at_most(seen, many, priced, limit))
        assert list(at_least(seen, few, priced, limit)) == list(at_least(seen, many, priced, limit))
    for held_on in (None, "i0", "gone"):
        for reserve in (0.0, 0.2):
            found = with_room(seen, few, 300, held_on, reserve)
            assert list(found) == list(with_room(seen, many, 300, held_on, reserve))
