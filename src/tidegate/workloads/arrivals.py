"""Arrival processes: endless streams of arrival times in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tidegate.core.errors import ConfigError

_CHUNK = 1024


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
        if not (0 < self.rate_rps < float("inf") and 0 < self.cv < float("inf")):
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
        rates_ok = all(0 <= rate < float("inf") and 0 < s < float("inf") for rate, s in self.phases)
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
