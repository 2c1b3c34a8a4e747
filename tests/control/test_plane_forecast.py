"""Forecasts of the load, from what a plane hears to what its controllers read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from tests.control.plane_harness import PlainRequest, decoding, make_plane
from tidegate.control.effects import StartInstance
from tidegate.control.inputs import RecordingPlane
from tidegate.control.replayed_inputs import decide_again
from tidegate.core.decision import ControlDecision
from tidegate.core.instance import Role
from tidegate.core.load_forecast import LoadForecast
from tidegate.core.slo import Slo
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.signals.forecast.choice import ForecastSettings, deployed_feed, simulated_feed
from tidegate.signals.forecast.feed import FITTING
from tidegate.signals.forecast.load import SERIES
from tidegate.signals.prefix import PrefixIndex
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate_testing import instance


@dataclass
class Reading:
    """A controller that keeps every forecast that it sees."""

    seen: list[LoadForecast | None] = field(default_factory=list)
    period_s: float = 30.0
    name: str = "reading"
    needs: frozenset[Signal] = frozenset({Signal.FORECAST})

    def initial(self) -> int:
        return 0

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        self.seen.append(snapshot.forecast)
        return ControlDecision(state)


def test_a_period_becomes_a_forecast_and_a_missed_one_a_gap() -> None:
    feed = simulated_feed("ewma", Workload.of(()), 10.0)
    plane = make_plane(load=feed)
    for number, prompt in enumerate((100, 300)):
        live = PlainRequest(f"r{number}", prompt, 50)
        decoding(plane, live, float(number))
        live.generated = 20
        plane.ended(live, None, 5.0 + number)
    plane.tick(9.0)
    assert plane.snapshot(9.0).forecast is None
    plane.tick(10.5)
    first = plane.snapshot(10.5).forecast
    assert first is not None and (first.at_s, first.period_s) == (10.5, 10.0)
    assert first.rate_rps.mean[0] == pytest.approx(2 / 10.5)
    assert (first.input_tokens.mean[0], first.input_tokens_squared.mean[0]) == (200.0, 50_000.0)
    assert (first.output_tokens.mean[0], first.long_share.source) == (20.0, "")
    decoding(plane, PlainRequest("r2", 300, 50), 12.0)
    plane.tick(20.0)
    second = plane.snapshot(20.0).forecast
    assert second is not None and (second.long_tokens, second.long_share.mean[0]) == (200.0, 1.0)
    plane.tick(55.0)  # two periods passed unseen
    assert not feed.passed(59.0) and feed.passed(60.0)


def test_a_simulated_controller_reads_forecasts_and_the_oracle_is_right() -> None:
    rng = np.random.default_rng(2)
    arrivals = np.sort(rng.uniform(0.0, 300.0, 400))
    trace = [TraceRecord(float(at), 200, 20) for at in arrivals]
    replicas = replicas_of(packaged_profile("h100_sxm/llama-3.1-8b"), 2)
    for name in ("", "oracle"):
        reading = Reading()
        system = replace(make_system("static"), controllers=(reading,))
        simulate(trace, system, replicas, SimSettings(forecast=name))
        first = reading.seen[0]
        assert first is not None and first.rate_rps.source == (name or "ensemble")
        counts = np.histogram(arrivals, bins=30.0 * np.arange(8))[0]
        if name:
            assert first.rate_rps.mean.tolist() == pytest.approx((counts[1:7] / 30.0).tolist())


def test_a_gateway_has_a_feed_only_where_its_system_needs_one() -> None:
    auto = ForecastSettings()
    assert deployed_feed(auto, needed=False) is None and deployed_feed(auto, needed=True) is not None
    assert deployed_feed(ForecastSettings("last"), needed=False) is not None, "asked for"


def test_forecasts_starts_and_an_earlier_load_are_decided_again_from_a_journal(tmp_path: Path) -> None:
    by = ForecastSettings("ewma", period_s=10.0, steps=3)
    system = make_system("dopd", fleet=(2, 4), start_delay_s=(5.0, 5.0))
    feed = deployed_feed(by, needed=True)
    assert feed is not None
    fitted: list[int] = []
    feed.fit = lambda number, periods: fitted.append(number)
    live: list[bytes] = []
    journal = JournalWriter(live.append)
    plane = RecordingPlane(system, ["i0", "i1"], journal, None, PrefixIndex(), None, feed)
    profile = packaged_profile("h100_sxm/llama-3.1-8b").profile
    for name in ("i0", "i1"):
        plane.instance_up(instance(name), profile, 0.0)
    row = [40.0, 3000.0, 9e6, 200.0, 4e4, 0.5]
    plane.start(0.0, {"periods": [row, [None] * 6, row], "lengths": [[3000, 200]] * 70})
    first = plane.snapshot(0.0).forecast
    assert first is not None and (first.rate_rps.mean[0], first.rate_rps.reason) == (40.0, FITTING)
    expected = {name: [[50.0] * 3] * 3 + ["arima", ""] for name in SERIES}
    starts = 0
    for second in range(1, 100):
        now = float(second)
        if second % 10 == 2 and second < 60:
            plane.load_fitted(second // 10 - (second > 30), expected)  # from then on a period late
        if second == 71:
            plane.load_fitted(-1, {})  # gone for good
        for number in range(20):
            request = PlainRequest(f"r{second}-{number}", 3000, 200)
            plane.arrive(request, now)
            request.generated = 200
            plane.ended(request, None, now)
        for effect in plane.tick(now):
            if isinstance(effect, StartInstance):
                starts += 1
                if starts == 1:
                    plane.start_failed(effect.role, "no room", now + 0.5)
                else:
                    plane.instance_up(instance(f"i{starts}"), profile, now + 0.75)
    assert starts >= 2 and fitted == list(range(8))
    assert set(plane.snapshot(99.0).start_s.values()) == {0.75}
    lines = [orjson.loads(line) for line in live]
    sources = [row["series"]["rate_rps"][4:] for row in lines if row["type"] == "forecast"]
    assert ["arima", ""] in sources and sources[-1] == ["ewma", ""] and ["ewma", FITTING] in sources
    events = {row["event"] for row in lines if row["type"] == "instance"}
    assert {"starting", "start_failed", "up"} <= events

    header: list[bytes] = []
    JournalWriter(header.append).header(
        version="", system="dopd", slo=Slo(), roles=[("i0", Role.PREFILL), ("i1", Role.DECODE)]
    )
    path = tmp_path / "live.jsonl"
    path.write_bytes(b"".join(header + live))
    kept = [line for line in live if line.split(b'"')[3] != b"input"]
    assert decide_again(path, system, forecast=by) == kept
