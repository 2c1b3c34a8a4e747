"""Generated workloads: arrival times with lengths drawn from a distribution, a published trace or a pool.

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

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.arrivals import ArrivalProcess
from tidegate.workloads.trace import Workload

FORMS = "N, uniform:LOW:HIGH or lognormal:MEAN:CV"
TokenCounts = Callable[[np.random.Generator], int]
"""A distribution over token counts of at least 1: each call draws one."""


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
    variance = math.log1p(cv**2)
    middle, deviation = math.log(mean) - variance / 2, math.sqrt(variance)
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
