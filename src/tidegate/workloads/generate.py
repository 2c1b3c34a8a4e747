"""Generated workloads: arrival processes, and lengths drawn from a distribution, a published trace or a pool.

``presets.json`` holds quantiles of the prompt and answer lengths of published traces, with each source's
name, commit and licence, the number of requests behind them, and the two lengths' rank correlation.
Generated lengths are independent; in all these sources the correlation is below 0.2.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from tidegate.core.errors import ConfigError, TraceError
from tidegate.workloads.formats import OWN
from tidegate.workloads.likes import lognormal_parameters
from tidegate.workloads.readers import csv_table, split
from tidegate.workloads.source import SAMPLE_PREFIX, read_lines
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_table import AtLeastZero, TraceTable

_CHUNK = 1024
FORMS = "N, uniform:LOW:HIGH or lognormal:MEAN:CV"
TokenCounts = Callable[[np.random.Generator], int]
"""A distribution over token counts of at least 1: each call draws one."""


class ArrivalProcess(Protocol):
    """Anything that yields arrival times."""

    def times_s(self, rng: np.random.Generator) -> Iterator[float]:
        """Yield arrival times in seconds from 0, never decreasing, without end."""
        ...


@dataclass(frozen=True, slots=True)
class Gamma:
    """A renewal process with gamma-distributed gaps: mean ``1/rate_rps``, coefficient of variation ``cv``.

    ``cv`` 1 is a Poisson process, above 1 is burstier. (vLLM's ``--burstiness`` is ``1/cv**2``.)
    """

    rate_rps: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.rate_rps < math.inf and 0 < self.cv < math.inf):
            raise ConfigError(
                f"arrivals need a positive rate and CV, got {self.rate_rps} requests/s, CV {self.cv}"
            )

    def times_s(self, rng: np.random.Generator) -> Iterator[float]:
        shape = 1.0 / self.cv**2
        now_s = 0.0
        while True:
            for gap_s in rng.gamma(shape, 1.0 / (self.rate_rps * shape), _CHUNK).tolist():
                now_s += gap_s
                yield now_s


def Poisson(rate_rps: float) -> Gamma:  # noqa: N802 - reads as the process it is
    """Return a Poisson process of ``rate_rps`` requests per second."""
    return Gamma(rate_rps, 1.0)


@dataclass(frozen=True, slots=True)
class Bursts:
    """Phases of Poisson traffic in a cycle, each ``(requests per second, seconds)``; a rate may be 0."""

    phases: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        rates_ok = all(0 <= rate < math.inf and 0 < s < math.inf for rate, s in self.phases)
        if not rates_ok or not any(rate > 0 for rate, _ in self.phases):
            raise ConfigError(
                f"bursts need phases of positive length and one rate above 0, got {self.phases}"
            )

    @classmethod
    def parse(cls, text: str) -> Bursts:
        """Read ``RPS:SECONDS,RPS:SECONDS``, as in ``20:10,2:30``; raises ConfigError."""
        try:
            phases = tuple((float(r), float(s)) for r, s in (part.split(":") for part in text.split(",")))
        except ValueError:
            raise ConfigError(
                f"bursts {text!r}: expected RPS:SECONDS,RPS:SECONDS as in '20:10,2:30'"
            ) from None
        return cls(phases)

    def times_s(self, rng: np.random.Generator) -> Iterator[float]:
        start_s = 0.0
        while True:
            for rate_rps, length_s in self.phases:
                count = int(rng.poisson(rate_rps * length_s))
                yield from (start_s + np.sort(rng.uniform(0.0, length_s, count))).tolist()
                start_s += length_s


@dataclass(frozen=True, slots=True)
class RateCurve:
    """Requests whose rate is a step function of time: ``rates_rps[k]`` for ``step_s`` seconds, in a cycle.

    Arrivals are a renewal process of unit mean and coefficient of variation ``cv`` read on the clock of the
    curve's integral (time rescaling): with ``cv`` 1 exactly the non-homogeneous Poisson process, above 1
    burstier on the same curve. ``missing`` are the steps whose rate its file does not have. Raises
    ConfigError for a curve without a positive rate.
    """

    step_s: float
    rates_rps: tuple[float, ...]
    cv: float = 1.0
    missing: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        rates_ok = all(0 <= rate < math.inf for rate in self.rates_rps) and any(self.rates_rps)
        if not (rates_ok and 0 < self.step_s < math.inf):
            raise ConfigError("a rate curve needs steps of positive length and a rate above 0")

    def with_mean(self, rate_rps: float) -> RateCurve:
        """Return the curve scaled to a mean rate; raises ConfigError unless that is positive."""
        if not 0 < rate_rps < math.inf:
            raise ConfigError(f"the mean rate must be positive, got {rate_rps}")
        factor = rate_rps / (sum(self.rates_rps) / len(self.rates_rps))
        return replace(self, rates_rps=tuple(rate * factor for rate in self.rates_rps))

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
    file, name = _file_and_name(text)
    curves, column_of = _curves_of(file)
    if name not in curves:
        problem = f"has no curve {name!r}" if name else "has several curves"
        raise ConfigError(f"rate curve {file} {problem}; write {file}:NAME with one of {', '.join(curves)}")
    return _curve(curves[name], column_of(name), cv)


def rate_curve_names(text: str) -> list[str]:
    """Return ``FILE:NAME`` of every curve that ``FILE`` or ``FILE:NAME`` says; none where FILE is no such
    file. Raises TraceError for one that cannot be read, and ConfigError for an unknown NAME."""
    if text.startswith(SAMPLE_PREFIX):
        return []
    file, name = _file_and_name(text)
    first = next(iter(read_lines(file)), (1, ""))[1]
    if "t_s" not in map(str.strip, split(first)):
        return []
    curves, _ = _curves_of(file)
    if name and name not in curves:
        read_rate_curve(text)
    return [f"{file}:{each}" for each in curves if name in ("", each)]


def _file_and_name(text: str) -> tuple[str, str]:
    file, _, name = text.rpartition(":")
    return (text, "") if not file or (not Path(file).exists() and Path(text).exists()) else (file, name)


def _curves_of(file: str) -> tuple[dict[str, TraceTable], Callable[[str], str]]:
    """Return the rows of each curve by its name, and the column that has its rates."""
    table = _rate_table(file)
    if "workload" in table.columns and "rate_rps" in table.columns:
        rows: dict[str, list[int]] = {}
        for row, workload in enumerate(table.columns["workload"]):
            rows.setdefault(workload, []).append(row)
        return {name: table.rows(found) for name, found in rows.items()}, lambda name: "rate_rps"
    return {column: table for column in table.columns if column != "t_s"}, lambda name: name


def _rate_table(file: str) -> TraceTable:
    lines = list(read_lines(file))
    if not lines:
        raise TraceError("the file is empty", file=file)
    header = [name.strip() for name in split(lines[0][1])]
    if "t_s" not in header or len(header) < 2:
        raise TraceError(
            "not a rate curve: expected a CSV with t_s and columns of requests per second", file=file, line=1
        )
    table, broken = csv_table(file, header, [line for line in lines[1:] if line[1]], OWN)
    if broken is not None:
        raise broken
    return table


def _curve(table: TraceTable, column: str, cv: float) -> RateCurve:
    times_s, rates_rps = (table.values(name, AtLeastZero, "a number >= 0") for name in ("t_s", column))
    first = table.lines[0][0]
    if len(times_s) < 2:
        raise TraceError("a rate curve needs at least two rows", file=table.file, line=first)
    step_s = min(later - earlier for earlier, later in pairwise(times_s))
    if not step_s > 0:
        raise TraceError("the times of a rate curve must increase", file=table.file, line=first)
    rates: list[float] = []
    missing: set[int] = set()
    for row, (t_s, rate_rps) in enumerate(zip(times_s, rates_rps, strict=True)):
        steps = (t_s - times_s[0]) / step_s
        if abs(steps - round(steps)) > 1e-6:
            raise table.error(row, "t_s", f"is {t_s:g}, not a multiple of the step of {step_s:g} s")
        missing.update(range(len(rates), round(steps)))
        rates += [rates[-1]] * (round(steps) - len(rates)) if rates else []
        rates.append(rate_rps)
    return RateCurve(step_s, tuple(rates), cv, frozenset(missing))


def parse_token_counts(text: str) -> TokenCounts:
    """Read ``512``, ``uniform:128:1024`` (both included) or ``lognormal:1000:1.2``; raises ConfigError."""
    name, *arguments = text.split(":")
    try:
        match name, arguments:
            case "uniform", [low, high]:
                return _uniform(int(low), int(high))
            case "lognormal", [mean, cv]:
                return _lognormal(float(mean), float(cv))
            case number, []:
                return _uniform(int(number), int(number))
    except ValueError:
        pass
    raise ConfigError(f"token counts {text!r}: expected {FORMS}")


def _uniform(low: int, high: int) -> TokenCounts:
    if not 1 <= low <= high:
        raise ConfigError(f"token counts must be at least 1, and LOW at most HIGH, got {low}:{high}")
    if low == high:
        return lambda rng: low
    return lambda rng: int(rng.integers(low, high, endpoint=True))


def _lognormal(mean: float, cv: float) -> TokenCounts:
    """Return the distribution with a mean and a coefficient of variation, rounded, at least 1."""
    if not (1 <= mean < math.inf and 0 < cv < math.inf):
        raise ConfigError(f"lognormal token counts need MEAN >= 1 and CV > 0, got {mean}:{cv}")
    middle, deviation = lognormal_parameters(mean, cv)
    return lambda rng: max(1, round(rng.lognormal(middle, deviation)))


def _quantiles(shares: Sequence[float], tokens: Sequence[int]) -> TokenCounts:
    """Return the distribution with ``tokens[k]`` at cumulative share ``shares[k]``, log-linear in between.

    Means come out within 3 % of the sources' (log-linear keeps heavy tails apart).
    """

    def draw(rng: np.random.Generator) -> int:
        at = rng.random()
        k = min(bisect_right(shares, at), len(shares) - 1)
        low, high = tokens[k - 1], tokens[k]
        along = (at - shares[k - 1]) / (shares[k] - shares[k - 1])
        return round(low * math.pow(high / low, along))

    return draw


@dataclass(frozen=True, slots=True)
class Preset:
    """The lengths of one published source; the means are the source's own."""

    input_mean: float
    output_mean: float
    inputs: TokenCounts
    outputs: TokenCounts
    description: str


def preset_names() -> list[str]:
    """Return the names that ``preset`` accepts."""
    return sorted(_presets())


def preset(name: str) -> Preset:
    """Return the preset of that name; raises ConfigError listing those there are."""
    try:
        return _presets()[name]
    except KeyError:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(preset_names())}") from None


@cache
def _presets() -> dict[str, Preset]:
    file = resources.files("tidegate.workloads") / "presets.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    found = {}
    for name, entry in data["presets"].items():
        inputs, outputs = entry["input"], entry["output"]
        text = f"{name}: input mean {inputs['mean']:g}, output mean {outputs['mean']:g}; "
        found[name] = Preset(
            inputs["mean"],
            outputs["mean"],
            _quantiles(data["shares"], inputs["quantiles"]),
            _quantiles(data["shares"], outputs["quantiles"]),
            text + f"quantiles of {entry['requests']} requests of {entry['source']}",
        )
    return found


def generate(times_s: Iterable[float], inputs: TokenCounts, outputs: TokenCounts, *, seed: int) -> Workload:
    """Return a request for each arrival time, its input and output lengths independent.

    Same seed, same lengths. They draw from another stream of the seed than ``arrival_times_s`` does, so
    changing one leaves the other.
    """
    arrival_s = np.fromiter(times_s, np.float64)
    rng = _streams(seed)[1]
    lengths = np.array([(inputs(rng), outputs(rng)) for _ in arrival_s], np.int64).reshape(-1, 2)
    return Workload(arrival_s, lengths[:, 0], lengths[:, 1])


def resample(times_s: Iterable[float], pool: Workload, *, seed: int) -> Workload:
    """Return a request for each arrival time, its (input, output) pair drawn from ``pool`` with replacement.

    Pairs stay together; prefixes and sessions are dropped, for they mean nothing out of order.
    Raises ConfigError for an empty pool.
    """
    if not pool:
        raise ConfigError("there are no requests to draw lengths from")
    arrival_s = np.fromiter(times_s, np.float64)
    drawn = pool[_streams(seed)[1].integers(len(pool), size=len(arrival_s))]
    return replace(
        drawn, arrival_s=arrival_s, hash_ids=None, session_id=None, turn=None, delay_s=None, client_id=None
    )


def arrival_times_s(arrivals: ArrivalProcess, *, seed: int) -> Iterator[float]:
    """Yield the arrival times of a process without end; same seed, same times."""
    return arrivals.times_s(_streams(seed)[0])


def _streams(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    arrival_seed, length_seed = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(arrival_seed), np.random.default_rng(length_seed)
