"""Distributions of token counts for generated workloads."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tidegate.core.errors import ConfigError

FORMS = "N, uniform:LOW:HIGH or lognormal:MEAN:CV"


class TokenCounts(Protocol):
    """A distribution over token counts of at least 1."""

    def draw(self, rng: np.random.Generator) -> int:
        """Return one count."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always ``tokens``."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"a token count must be at least 1, got {self.tokens}")

    def draw(self, rng: np.random.Generator) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any count from ``low`` to ``high``, both included, equally likely."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ConfigError(f"uniform token counts need 1 <= LOW <= HIGH, got {self.low}:{self.high}")

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lognormal with the given mean and coefficient of variation, rounded, at least 1."""

    mean: float
    cv: float

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and 0 < self.cv < math.inf):
            raise ConfigError(f"lognormal token counts need MEAN >= 1 and CV > 0, got {self.mean}:{self.cv}")

    def draw(self, rng: np.random.Generator) -> int:
        variance = math.log1p(self.cv**2)
        return max(1, round(rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance))))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The distribution with ``tokens[k]`` at cumulative share ``shares[k]``, log-linear in between.

    Shares run from 0 to 1. Means come out within 3 % of the sources' (log-linear keeps heavy tails apart).
    """

    shares: tuple[float, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = sorted(self.shares) == list(self.shares) and sorted(self.tokens) == list(self.tokens)
        whole = len(self.shares) == len(self.tokens) > 1 and (self.shares[0], self.shares[-1]) == (0.0, 1.0)
        if not (rising and whole and self.tokens[0] >= 1):
            raise ConfigError("quantiles need shares from 0 to 1 and rising token counts of at least 1")

    def draw(self, rng: np.random.Generator) -> int:
        at = rng.random()
        k = min(bisect_right(self.shares, at), len(self.shares) - 1)
        low, high = self.tokens[k - 1], self.tokens[k]
        along = (at - self.shares[k - 1]) / (self.shares[k] - self.shares[k - 1])
        return round(low * math.pow(high / low, along))


def parse_token_counts(text: str) -> TokenCounts:
    """Read ``512``, ``uniform:128:1024`` or ``lognormal:1000:1.2``; raises ConfigError."""
    name, *arguments = text.split(":")
    try:
        match name, arguments:
            case "uniform", [low, high]:
                return Uniform(int(low), int(high))
            case "lognormal", [mean, cv]:
                return Lognormal(float(mean), float(cv))
            case number, []:
                return Fixed(int(number))
    except ValueError:
        pass
    raise ConfigError(f"token counts {text!r}: expected {FORMS}")
