"""Drift compares only what a profile speaks of."""

from __future__ import annotations

import json

import pytest

from tidegate.control.inputs import RecordingPlane
from tidegate.control.settings import ControlSettings
from tidegate.core.instance import Role
from tidegate.costs.drift import FEWEST
from tidegate.costs.profile import Profile
from tidegate.engines.seam import LegTimes
from tidegate.fleet.member import Member
from tidegate.gateway.drift import FleetDrift
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.ledger import Ledger
from tidegate.systems import make_system
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


def test_a_profile_measured_at_the_start_follows_what_is_observed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tidegate.gateway.drift")
    told: list[tuple[str, float, float]] = []
    drift = FleetDrift(lambda *change: told.append(change))
    members = [
        Member(instance(f"i{n}"), "http://a", "m", f"i{n}-1", profile=PROFILE, measured_at_start=n < 2)
        for n in range(3)
    ]
    for member in members:
        drift.member_up(member)
    slow = LegTimes(prefill_s=3.0 * PROFILE.prefill_s(100))
    for number in range(FEWEST):
        drift.prefill(f"i{number % 2}", 100, slow, 9.0, alone=False)
        drift.prefill("i2", 100, slow, 9.0, alone=False)
    assert told == [("i0", pytest.approx(3.0), 1.0), ("i1", pytest.approx(3.0), 1.0)], "they share it"
    assert drift.ratios("i0") == {} and drift.ratios("i2") == {"prefill": pytest.approx(3.0)}
    for _ in range(4 * FEWEST):
        drift.prefill("i0", 100, slow, 9.0, alone=False)
    assert len(told) == 2 and drift.ratios("i0") == {"prefill": pytest.approx(1.0)}
    assert "i0, i1: a prefill takes 3.00 times what was measured at the start" in caplog.text
    assert sum("measure it with" in record.getMessage() for record in caplog.records) == 1, "of i2 alone"
    drift.member_down("i1")
    drift.member_up(members[1])
    assert told[2:] == [("i1", pytest.approx(3.0), 1.0)], "a restart does not forget it"


def test_a_rescaled_profile_changes_what_is_predicted_from_then_on() -> None:
    lines: list[bytes] = []
    plane = RecordingPlane(
        make_system("static"), ("i0", "i1"), JournalWriter(lines.append), ControlSettings()
    )
    for name in ("i0", "i1"):
        plane.instance_up(instance(name), PROFILE, 1.0)
    before = plane.snapshot(1.0).costs
    plane.profile_scaled("i0", 3.0, 2.0, 2.0)
    plane.profile_scaled("i7", 3.0, 2.0, 2.0)
    after = plane.snapshot(2.0).costs
    assert after.at(0).prefill.seconds(100, 5000) == pytest.approx(
        3 * before.at(0).prefill.seconds(100, 5000)
    )
    assert after.at(0).step.seconds(2, 900) == pytest.approx(2 * before.at(0).step.seconds(2, 900))
    assert after.at(1).prefill == before.at(1).prefill
    written = [line for line in map(json.loads, lines) if line["type"] in ("profile", "input")]
    assert {"type": "profile", "t": 2.0, "instance": "i0", "prefill": 3.0, "step": 2.0} in written
    assert any(line.get("verb") == "profile_scaled" for line in written), "replays go through it, too"
