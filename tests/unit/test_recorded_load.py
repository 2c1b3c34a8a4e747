"""What forecasts begin with: the load of an earlier run, from its journal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tidegate.core.errors import TraceError
from tidegate.journal.schema import ControlLine, HeaderLine, JournalLine, OutcomeLine
from tidegate.journal.writer import encode_line
from tidegate.signals.forecast import SERIES
from tidegate.signals.forecast.choice import ForecastSettings, deployed_feed
from tidegate.signals.forecast.recorded import RecordedLoad

T0 = 1_800_000_000.0
BY = ForecastSettings("last", period_s=10.0, steps=2)


def journal(path: Path, *lines: JournalLine) -> Path:
    path.write_bytes(b"".join(encode_line(line) + b"\n" for line in lines))
    return path


def answered(at_s: float, prompt: int, answer: int, took_s: float = 1.0, outcome: str = "ok") -> OutcomeLine:
    return OutcomeLine(
        t_s=at_s + took_s,
        timestamp_ms=1000 * at_s,
        input_tokens=prompt,
        output_tokens=answer,
        outcome=outcome,
    )


def test_a_restart_is_a_gap_and_quiet_periods_are_zero_on_the_wall_clock(tmp_path: Path) -> None:
    path = journal(
        tmp_path / "j.jsonl",
        HeaderLine(0.0, started_unix_s=T0),
        answered(0.5, 100, 10),
        answered(1.0, 300, 30, took_s=12.0),
        answered(2.0, 200, 0, outcome="overloaded"),
        answered(3.0, 9, 9, outcome="bad_request"),
        ControlLine(30.0, "holding", 0),
        HeaderLine(60.0, started_unix_s=T0),
        answered(61.0, 400, 40),
        ControlLine(80.0, "holding", 0),
    )
    found = RecordedLoad.read(path, 10.0, T0 + 90.0).earlier(10.0, T0 + 90.0)
    rates, prompts, _, answers, _, long_share = np.array(found["periods"], np.float64).T
    nan = np.nan
    assert rates == pytest.approx([0.3, 0.0, 0.0, nan, nan, nan, 0.1, 0.0, nan], nan_ok=True)
    assert prompts == pytest.approx([200.0, nan, nan, nan, nan, nan, 400.0, nan, nan], nan_ok=True)
    assert answers[:2] == pytest.approx([10.0, 30.0]), "an answer counts where it ended"
    assert long_share[0] == pytest.approx(1 / 3)
    assert found["lengths"] == [[100.0, 10.0], [300.0, 30.0], [400.0, 40.0]]

    feed = deployed_feed(BY, needed=True)
    assert feed is not None
    feed.start(5.0, found)
    forecast = feed.forecast
    assert forecast is not None and forecast.at_s == 5.0
    assert forecast.rate_rps.mean.tolist() == [0.0, 0.0], "the last known period was quiet"
    assert forecast.input_tokens.mean[0] == 400.0
    assert feed.passed(15.0) and feed.forecast is not forecast
    assert set(feed.observed._fields) == set(SERIES)


def test_a_simulated_journal_counts_as_ending_now(tmp_path: Path) -> None:
    path = journal(tmp_path / "j.jsonl", HeaderLine(0.0), answered(1.0, 100, 10), ControlLine(20.0, "x", 0))
    rates = [period[0] for period in RecordedLoad.read(path, 10.0, T0).periods(10.0, T0)]
    assert rates == [0.1, 0.0]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([HeaderLine(0.0, started_unix_s=T0)], "there is no request in any whole period of 10 s"),
        (
            [HeaderLine(0.0, started_unix_s=T0 - 1e8), answered(1.0, 9, 9), ControlLine(30.0, "x", 0)],
            "of the last 2.3 days",
        ),
        ([HeaderLine(0.0, started_unix_s=T0), answered(1.0, 9, 9)], "no request in any whole period"),
        ([answered(1.0, 9, 9)], "it has no 'header' line"),
        ([], "no request"),
    ],
)
def test_a_journal_that_says_nothing_of_the_load_is_refused(
    tmp_path: Path, lines: list[JournalLine], said: str
) -> None:
    path = journal(tmp_path / "j.jsonl", *lines)
    with pytest.raises(TraceError, match=said) as caught:
        RecordedLoad.read(path, 10.0, T0 + 30.0)
    assert str(path) in str(caught.value)
