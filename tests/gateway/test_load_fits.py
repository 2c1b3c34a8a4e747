"""The process that fits forecasts beside the gateway."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tests.control.plane_harness import make_plane
from tidegate.core.load_forecast import LoadForecast
from tidegate.gateway.load_fits import GONE, LoadFits
from tidegate.ledger.snapshot import Snapshot
from tidegate.signals.forecast import LoadFeed
from tidegate.signals.forecast.choice import ForecastSettings, deployed_feed
from tidegate.signals.forecast.feed import FITTING

AUTO = ForecastSettings()


def ended(feed: LoadFeed, number: int) -> None:
    feed.revised(number, {})


def forecast_of(snapshot: Snapshot) -> LoadForecast:
    assert snapshot.forecast is not None
    return snapshot.forecast


async def test_a_fit_replaces_the_simple_forecast_unless_it_is_late() -> None:
    feed = deployed_feed(AUTO, needed=True)
    assert feed is not None
    plane = make_plane(load=feed)
    answers: asyncio.Queue[tuple[int, Mapping[str, Any]]] = asyncio.Queue()

    def answered(number: int, expected: Mapping[str, Any]) -> None:
        answers.put_nowait((number, expected))
        if not expected:
            plane.load_fitted(number, expected)

    fits = LoadFits(AUTO, answered)
    feed.fit = fits.fit
    feed.arrived(100)
    plane.tick(30.0)
    simple = forecast_of(plane.snapshot(30.0))
    assert (simple.rate_rps.source, simple.rate_rps.reason) == ("ensemble", FITTING)
    async with asyncio.timeout(60):
        first = await answers.get()
    plane.load_fitted(*first)
    fitted = forecast_of(plane.snapshot(31.0))
    assert (fitted.rate_rps.source, fitted.rate_rps.reason) == ("ensemble", "")
    assert fitted.input_tokens.mean.tolist() == [100.0] * 6
    assert fitted.output_tokens.source == "", "no answer has ended"
    plane.tick(60.0)
    plane.load_fitted(*first)
    assert forecast_of(plane.snapshot(61.0)).rate_rps.reason == FITTING
    fits.close()
    plane.tick(90.0)
    assert forecast_of(plane.snapshot(90.0)).rate_rps.reason == ""


async def test_a_period_shorter_than_a_fit_is_said_and_leaves_the_simple_forecasts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    feed = deployed_feed(AUTO, needed=True)
    assert feed is not None
    answers: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()

    def answered(number: int, expected: Mapping[str, Any]) -> None:
        answers.put_nowait((number, feed.revised(number, expected)))

    fits = LoadFits(AUTO, answered)
    feed.fit = fits.fit
    feed.start(0.0)
    for at_s in (30.0, 60.0, 90.0):
        feed.arrived(100)
        assert feed.passed(at_s)
    async with asyncio.timeout(60):
        assert [await answers.get() for _ in range(3)] == [(1, False), (2, False), (3, True)]
    assert caplog.text.count("a fit of the load took longer than a period of 30 s") == 1
    feed.arrived(100)
    assert feed.passed(120.0) and feed.forecast is not None
    assert (feed.forecast.rate_rps.source, feed.forecast.rate_rps.reason) == ("ensemble", FITTING)
    fits.close()
    feed.revised(GONE, {})
    assert "no more fits" not in caplog.text, "it was asked to end"


async def test_a_process_that_dies_leaves_the_simple_forecasts(caplog: pytest.LogCaptureFixture) -> None:
    feed = deployed_feed(AUTO, needed=True)
    assert feed is not None
    fits = LoadFits(AUTO, lambda number, expected: ended(feed, number), (sys.executable, "-c", "input()"))
    feed.fit = fits.fit
    feed.start(0.0)
    assert feed.passed(30.0) and feed.forecast is not None and feed.forecast.rate_rps.reason == FITTING
    async with asyncio.timeout(60):
        at_s = 60.0
        while feed.passed(at_s) and feed.forecast.rate_rps.reason == FITTING:
            at_s += 30.0
            await asyncio.sleep(0.05)
    assert feed.forecast.rate_rps.source == "ensemble"
    assert "no more fits of the load, simpler sources forecast alone" in caplog.text
    fits.close()
