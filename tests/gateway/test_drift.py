"""Drift compares only what a profile speaks of."""

from __future__ import annotations

import pytest

from tidegate.core.instance import Role
from tidegate.costs.drift import FEWEST
from tidegate.costs.profile import Profile
from tidegate.engines.seam import LegTimes
from tidegate.fleet.member import Member
from tidegate.gateway.drift import FleetDrift
from tidegate.ledger.ledger import Ledger
from tidegate_testing import cluster, instance, profile, request

PROFILE = profile()
TIMES = LegTimes(prefill_s=0.3)


def drifting(*, with_profile: Profile | None = PROFILE) -> FleetDrift:
    drift = FleetDrift()
    for name in ("i0", "i1"):
        drift.member_up(Member(instance(name), "http://a", "m", f"{name}-1", profile=with_profile))
    return drift


def windows(drift: FleetDrift, ledger: Ledger, *, slower: float, prefills: bool) -> None:
    """Decode one request on i1 for some windows, each step ``slower`` than predicted."""
    now = 0.0
    ledger.prefill_dispatched(request("r", 100), "i0", now)
    ledger.prefill_ended("r", now)
    ledger.decode_dispatched("r", "i1", 101, now)
    ledger.transfer_ended("r", now)
    for number in range(FEWEST + 2):
        if prefills:
            ledger.prefill_dispatched(request(f"p{number}", 100), "i1", now)
            ledger.finished(f"p{number}", now)
        for _ in range(40):
            now += slower * float(PROFILE.step.seconds(1, 101 + 40 * number))
            ledger.tokens("r", 1, now)
        ledger.window_closed(now)
        drift.window(ledger.snapshot(now))


def test_slow_decode_steps_show_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    drift = drifting()
    windows(drift, cluster(2, roles=(Role.PREFILL, Role.DECODE), profile=PROFILE), slower=2.0, prefills=False)
    assert drift.ratios("i1") == {"step": pytest.approx(2.0, rel=0.05)}
    assert drift.ratios("i0") == {}
    assert sum("measure it with" in record.getMessage() for record in caplog.records) == 1
    (family,) = drift.collect()
    assert [sample.labels for sample in family.samples] == [{"member": "i1", "form": "step"}]
    drift.member_up(Member(instance("i1"), "http://a", "m", "i1-2", profile=PROFILE))
    assert drift.ratios("i1") == {}, "another life begins anew"


def test_steps_beside_prefills_say_nothing_of_decode_steps() -> None:
    drift = drifting()
    windows(drift, cluster(2, roles=(Role.PREFILL, Role.DECODE), profile=PROFILE), slower=2.0, prefills=True)
    assert drift.ratios("i1") == {}


def test_prefills_that_queued_are_left_out_unless_the_engine_timed_them() -> None:
    drift = drifting()
    for _ in range(FEWEST):
        drift.prefill("i0", 100, LegTimes(), 0.5, alone=False)
        drift.prefill("i1", 100, TIMES, 9.0, alone=False)
    assert drift.ratios("i0") == {} and drift.ratios("i1") == {"prefill": pytest.approx(3.0)}
    for _ in range(FEWEST):
        drift.prefill("i0", 100, LegTimes(cached_tokens=50), 0.1, alone=True)
    assert drift.ratios("i0") == {"prefill": pytest.approx(2.0)}, "50 tokens were in its cache"


def test_without_a_profile_there_is_no_drift() -> None:
    drift = drifting(with_profile=None)
    drift.prefill("i0", 100, TIMES, 0.3, alone=True)
    assert drift.ratios("i0") is None and not next(iter(drift.collect())).samples
