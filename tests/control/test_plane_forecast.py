"""Forecasts of the load, from what a plane hears to what its controllers read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.control.plane_harness import PlainRequest, decoding, make_plane
from tidegate.core.decision import ControlDecision
from tidegate.core.load_forecast import LoadForecast
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.replica import replicas_of
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.signals.forecast.choice import ForecastSettings, deployed_feed, simulated_feed
from tidegate.sim import SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord, Workload


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
