"""The load of an earlier run, as its journal tells it: what forecasts begin with after a restart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tidegate.core.errors import TraceError
from tidegate.journal.reader import JournalLines
from tidegate.journal.schema import HeaderLine, OutcomeLine
from tidegate.signals.forecast.feed import REMEMBERED, Earlier
from tidegate.signals.forecast.load import SERIES
from tidegate.signals.forecast.series import LONGEST
from tidegate.signals.forecast.source import Floats


class NothingRecorded(TraceError):
    """A journal tells nothing of the load that forecasts look back on."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedLoad:
    """When requests came and were answered, in seconds of the wall clock.

    ``arrivals`` has time and prompt tokens of each request that was offered, ``answers`` time, prompt and
    answer tokens of each that was answered in full, both by time. ``runs`` are the spans in which a gateway
    wrote: outside of them nothing is known, inside of them no request is none.
    """

    arrivals: Floats
    answers: Floats
    runs: list[tuple[float, float]]

    @classmethod
    def read(cls, path: Path, period_s: float, now_unix_s: float) -> RecordedLoad:
        """Read a journal. One of a simulation has no wall clock, and counts as ending now.

        Raises TraceError for a file that is none, and NothingRecorded for one without a request in a whole
        period of the time that forecasts look back on.
        """
        lines = JournalLines(path)
        arrivals: list[tuple[float, float]] = []
        answers: list[tuple[float, float, float]] = []
        runs: list[tuple[float, float]] = []
        began_s = 0.0
        for line in lines:
            if isinstance(line, HeaderLine):
                began_s = line.started_unix_s
                runs.append((began_s + line.t_s, began_s + line.t_s))
            elif not runs:
                raise TraceError("this is not a journal: it has no 'header' line", file=str(path), line=1)
            runs[-1] = runs[-1][0], max(runs[-1][1], began_s + line.t_s)
            if isinstance(line, OutcomeLine) and not line.refused and line.input_tokens > 0:
                arrivals.append((began_s + line.arrival_s, line.input_tokens))
                if line.ok:
                    answers.append((began_s + line.end_s, line.input_tokens, line.output_tokens))
        shift_s = 0.0 if began_s else now_unix_s - (runs[-1][1] if runs else 0.0)
        found = cls(
            _by_time(arrivals, 2) + np.array([shift_s, 0.0]),
            _by_time(answers, 3) + np.array([shift_s, 0.0, 0.0]),
            [(start_s + shift_s, end_s + shift_s) for start_s, end_s in runs],
        )
        rates = np.array([period[0] for period in found.periods(period_s, now_unix_s)], np.float64)
        if not (rates > 0).any():
            raise NothingRecorded(
                f"forecasts cannot begin with it: there is no request in any whole period of {period_s:g} s "
                f"of the last {LONGEST * period_s / 86400.0:.1f} days",
                file=str(path),
            )
        return found

    def earlier(self, period_s: float, now_unix_s: float) -> Earlier:
        """Return what ``LoadFeed.start`` takes, of a run that begins now."""
        return {
            "periods": self.periods(period_s, now_unix_s),
            "lengths": self.answers[-REMEMBERED:, 1:].tolist(),
        }

    def periods(self, period_s: float, now_unix_s: float) -> list[list[float | None]]:
        """Return the periods from the first request to now, the last one ends now; None is unknown.

        ``long_share`` is that of prompts above the mean of them all.
        """
        if not len(self.arrivals):
            return []
        count = min(LONGEST, math.ceil((now_unix_s - self.arrivals[0, 0]) / period_s))
        start_s = now_unix_s - count * period_s
        edges = start_s + period_s * np.arange(count + 1)
        known = np.zeros(count, np.bool_)
        for run_start_s, run_end_s in self.runs:
            known |= (edges[:-1] >= run_start_s) & (edges[1:] <= run_end_s)
        at, prompts = self.arrivals.T
        ended_at, _, answers = self.answers.T
        requests = np.histogram(at, edges)[0]
        columns = (
            requests / period_s,
            _means(at, prompts, edges),
            _means(at, prompts**2, edges),
            _means(ended_at, answers, edges),
            _means(ended_at, answers**2, edges),
            _means(at, (prompts > prompts.mean()).astype(np.float64), edges),
        )
        assert len(columns) == len(SERIES)
        table = np.where(known, columns, np.nan).T
        return [[value if value == value else None for value in row] for row in table.tolist()]


def _by_time(rows: Sequence[tuple[float, ...]], width: int) -> Floats:
    table = np.array(rows, np.float64).reshape(-1, width)
    return table[table[:, 0].argsort(kind="stable")]


def _means(at: Floats, values: Floats, edges: Floats) -> Floats:
    counts = np.histogram(at, edges)[0]
    sums = np.histogram(at, edges, weights=values)[0]
    means: Floats = np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)
    return means
