"""AMPD's routing at its limits, and what no way of a round may do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tidegate.core.decision import Path, Place
from tidegate.core.instance import Instance, Role
from tidegate.core.request import Request
from tidegate.core.session import History
from tidegate.costs.forms import attention_work
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.ampd.cost_routing import CostRouting
from tidegate.policies.ampd.paths import Home, path_costs
from tidegate.policies.ampd.routing import WINDOW, AmpdRouting
from tidegate_testing import REFERENCE, request

P, D = Role.PREFILL, Role.DECODE


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Request, Snapshot]:
    """Draw a loaded split, and a round whose session may be bound to one of its decode instances."""
    prefill, decode = draw(st.integers(1, 4)), draw(st.integers(1, 14))
    ledger = Ledger(1.0, {WINDOW: 10.0})
    profiles = (REFERENCE, REFERENCE.scaled(3.0, 2.0) if draw(st.booleans()) else REFERENCE)
    names = [f"p{index}" for index in range(prefill)] + ["d" * (1 + index) for index in range(decode)]
    for name in names:
        spec = Instance(name, 1_000_000, 131_072, kv_bytes_per_token=131_072)
        ledger.instance_up(spec, profiles[len(name) % 2], P if name[0] == "p" else D, 0.0)
    for number in range(draw(st.integers(0, 30))):
        asked, on = request(f"r{number}", draw(st.integers(1, 30_000))), draw(st.sampled_from(names))
        ledger.prefill_dispatched(asked, on, 0.0)
        if on[0] == "d" or draw(st.booleans()):
            ledger.prefill_ended(asked.id, draw(st.floats(0.1, 30.0)))
            holder = draw(st.sampled_from(names[prefill:]))
            ledger.decode_dispatched(asked.id, holder, asked.prompt_tokens, 30.0)
            ledger.tokens(asked.id, 1, 30.0)
            ledger.tokens(asked.id, 1, 30.0 + draw(st.floats(0.001, 1.0)))
    prompt = draw(st.integers(4, 50_000))
    asked = request("new", prompt)
    if draw(st.booleans()):
        bound = History(draw(st.sampled_from(names[prefill:])), draw(st.integers(1, prompt - 1)))
        asked = replace(asked, history=bound)
    cached = draw(st.dictionaries(st.sampled_from(names), st.integers(1, prompt - 1), max_size=3))
    return replace(asked, cached=cached), ledger.snapshot(32.0)


@given(drawn=rounds())
def test_an_endless_alpha_is_always_remote(drawn: tuple[Request, Snapshot]) -> None:
    asked, snapshot = drawn
    place = AmpdRouting(alpha=math.inf).place_prefill(asked, snapshot).decision
    assert isinstance(place, Place) and place.path is Path.DISAGGREGATED and place.prefill_on[0] == "p"
    assert place.read_from == (asked.history.on if asked.history is not None else None)


@given(drawn=rounds())
def test_an_alpha_that_nothing_meets_and_an_endless_beta_is_always_local(
    drawn: tuple[Request, Snapshot],
) -> None:
    asked, snapshot = drawn
    place = AmpdRouting(alpha=-1.0, beta=math.inf).place_prefill(asked, snapshot).decision
    assert isinstance(place, Place) and place.path is Path.COLOCATED
    assert asked.history is None or place.prefill_on == asked.history.on


@given(drawn=rounds())
def test_with_slack_nowhere_the_least_sum_of_the_paper_wins(drawn: tuple[Request, Snapshot]) -> None:
    asked, snapshot = replace(drawn[0], cached={}), drawn[1]
    place = AmpdRouting(alpha=-1.0, beta=-1.0).place_prefill(asked, snapshot).decision
    assert isinstance(place, Place)
    held = 0 if asked.history is None else asked.history.tokens
    home = place.prefill_on if place.path is Path.COLOCATED else None
    if asked.history is not None:
        home = asked.history.on
    if home is None:
        return
    new_s = snapshot.costs.prefill.seconds(
        asked.prompt_tokens - held, attention_work(asked.prompt_tokens - held, held)
    )
    each_s = dict(zip(snapshot.ids, np.broadcast_to(new_s, len(snapshot)).tolist(), strict=True))
    kv = REFERENCE.transfer
    waits_s = dict(zip(snapshot.ids, snapshot.prefill_wait_s.tolist(), strict=True))
    over_s = float(kv.seconds(held * 131_072)) if held else 0.0
    over_s += float(kv.seconds((asked.prompt_tokens - held) * 131_072))
    sums_s = {name: waits_s[name] + each_s[name] + over_s for name in snapshot.ids if name[0] == "p"}
    sums_s[home] = waits_s[home] + each_s[home]
    assert sums_s[place.prefill_on] <= min(sums_s.values()) + 1e-9


@given(drawn=rounds())
def test_the_cheapest_way_is_taken_and_every_verdict_says_its_terms(
    drawn: tuple[Request, Snapshot],
) -> None:
    asked, snapshot = drawn
    verdict = CostRouting().place_prefill(asked, snapshot)
    place = verdict.decision
    assert isinstance(place, Place) and verdict.alternatives is not None
    best = verdict.alternatives.top(1)[0]
    assert best["instance"] == place.prefill_on
    parts = [value for name, value in best.items() if name not in ("instance", "cost_s")]
    assert math.isclose(sum(map(float, parts)), float(best["cost_s"]), rel_tol=1e-6, abs_tol=1e-4)
    if place.path is Path.COLOCATED:
        assert asked.history is None or place.prefill_on == asked.history.on
    else:
        assert place.read_from in (None, asked.history.on if asked.history is not None else None)


def test_a_long_prompt_at_home_leaves_room_for_who_is_to_come_and_busy_links_are_dear() -> None:
    ledger = Ledger(1.0, {WINDOW: 10.0})
    for name, role in (("p", P), ("d", D)):
        spec = Instance(name, 1_000_000, 131_072, kv_bytes_per_token=131_072)
        ledger.instance_up(spec, REFERENCE, role, 0.0)
    for number in range(50):
        ledger.prefill_dispatched(request(f"r{number}", 10_000), "p", 0.0)
    asked = replace(request("new", 20_000, ttft_s=30.0), history=History("d", 5_000))
    place = CostRouting().place_prefill(asked, ledger.snapshot(0.0)).decision
    assert isinstance(place, Place) and place.path is Path.COLOCATED and place.chunk_tokens is not None
    idle = path_costs(asked, ledger.snapshot(0.0), Home(1, 5_000), read=None)
    for number in range(50):
        ledger.prefill_ended(f"r{number}", 1.0)
        ledger.decode_dispatched(f"r{number}", "d", 10_001, 1.0)
    busy = path_costs(asked, ledger.snapshot(1.0), Home(1, 5_000), read=None)
    assert busy.return_s[0] == pytest.approx(2 * idle.return_s[0])
