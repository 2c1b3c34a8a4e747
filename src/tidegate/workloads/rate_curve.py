"""Arrivals that follow a published curve of the rate."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from tidegate.core.errors import ConfigError, TraceError
from tidegate.workloads.arrivals import Gamma
from tidegate.workloads.source import read_lines


@dataclass(frozen=True, slots=True)
class RateCurve:
    """Requests whose rate is a step function of time: ``rates_rps[k]`` for ``step_s`` seconds, in a cycle.

    Arrivals are a renewal process of unit mean and coefficient of variation ``cv`` read on the clock of the
    curve's integral (time rescaling): with ``cv`` 1 exactly the non-homogeneous Poisson process, above 1
    burstier on the same curve. Raises ConfigError for a curve without a positive rate.
    """

    step_s: float
    rates_rps: tuple[float, ...]
    cv: float = 1.0

    def __post_init__(self) -> None:
        rates_ok = all(0 <= rate < math.inf for rate in self.rates_rps) and any(self.rates_rps)
        if not (rates_ok and 0 < self.step_s < math.inf):
            raise ConfigError("a rate curve needs steps of positive length and a rate above 0")

    @property
    def mean_rps(self) -> float:
        """Return the mean rate over one cycle."""
        return sum(self.rates_rps) / len(self.rates_rps)

    def with_mean(self, rate_rps: float) -> RateCurve:
        """Return the curve scaled to a mean rate; raises ConfigError unless that is positive."""
        if not 0 < rate_rps < math.inf:
            raise ConfigError(f"the mean rate must be positive, got {rate_rps}")
        factor = rate_rps / self.mean_rps
        return RateCurve(self.step_s, tuple(rate * factor for rate in self.rates_rps), self.cv)

    def times_s(self, rng: np.random.Generator) -> Iterator[float]:
        work = Gamma(1.0, self.cv).times_s(rng)
        due = next(work)
        done, start_s = 0.0, 0.0
        while True:
            for rate_rps in self.rates_rps:
                end = done + rate_rps * self.step_s
                while due < end:
                    yield start_s + (due - done) / rate_rps
                    due = next(work)
                done = end
                start_s += self.step_s


def read_rate_curve(text: str, cv: float = 1.0) -> RateCurve:
    """Read ``FILE:NAME``: a CSV with ``t_s`` and either a column NAME or ``workload`` and ``rate_rps``.

    In the second form NAME selects the rows; rows are a fixed step apart, and a missing step has the rate
    of the one before. Raises TraceError for a file that is not such a curve, and ConfigError when NAME is
    missing or unknown, listing those there are.
    """
    file, _, name = text.rpartition(":")
    if not file or (not Path(file).exists() and Path(text).exists()):
        file, name = text, ""
    header, rows = _table(file)
    if "workload" in header and "rate_rps" in header:
        names = list(dict.fromkeys(row["workload"] for _, row in rows))
        value = "rate_rps"
        chosen = [(line, row) for line, row in rows if row["workload"] == name]
    else:
        names = [column for column in header if column != "t_s"]
        value = name
        chosen = rows if name in names else []
    if not chosen:
        problem = f"has no curve {name!r}" if name else "has several curves"
        raise ConfigError(f"rate curve {file} {problem}; write {file}:NAME with one of {', '.join(names)}")
    return _curve(file, chosen, value, cv)


def _table(file: str) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    lines = list(read_lines(file))
    if not lines:
        raise TraceError("the file is empty", file=file)
    header = [name.strip() for name in next(csv.reader([lines[0][1]]), [])]
    if "t_s" not in header or len(header) < 2:
        raise TraceError(
            "not a rate curve: expected a CSV with t_s and columns of requests per second", file=file, line=1
        )
    rows = []
    for line, text in lines[1:]:
        fields = next(csv.reader([text]), [])
        if not fields:
            continue
        if len(fields) != len(header):
            message = f"{len(fields)} fields, expected {len(header)} as in the header"
            raise TraceError(message, file=file, line=line)
        rows.append((line, dict(zip(header, fields, strict=True))))
    return header, rows


def _curve(file: str, rows: list[tuple[int, dict[str, str]]], value: str, cv: float) -> RateCurve:
    points = [(line, _number(file, line, row, "t_s"), _number(file, line, row, value)) for line, row in rows]
    if len(points) < 2:
        raise TraceError("a rate curve needs at least two rows", file=file, line=points[0][0])
    step_s = min(b[1] - a[1] for a, b in pairwise(points))
    if not step_s > 0:
        raise TraceError("the times of a rate curve must increase", file=file, line=points[0][0])
    rates: list[float] = []
    for line, t_s, rate_rps in points:
        at = round((t_s - points[0][1]) / step_s)
        if abs((t_s - points[0][1]) / step_s - at) > 1e-6:
            raise TraceError(
                f"t_s is {t_s:g}, not a multiple of the step of {step_s:g} s", file=file, line=line
            )
        rates += [rates[-1]] * (at - len(rates)) if rates else []
        rates.append(rate_rps)
    return RateCurve(step_s, tuple(rates), cv)


def _number(file: str, line: int, row: dict[str, str], column: str) -> float:
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        before = list(row)[: list(row).index(column)]
        at = 1 + sum(len(row[name]) + 1 for name in before)
        message = f"{column} is {row[column]!r}, expected a number >= 0"
        raise TraceError(message, file=file, line=line, column=at)
    return value
