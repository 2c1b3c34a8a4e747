"""MixDrift of the phase mix: the input:output ratio moves while the rate and each request's tokens stay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.workloads.trace import Workload, optional

FORMS = "linear:FROM:TO:OVER_S or sine:FACTOR:PERIOD_S"


class MixDrift(Protocol):
    """What the input:output ratio is multiplied by, over time."""

    def factor(self, at_s: float) -> float:
        """Return the factor at a time of the trace; positive."""
        ...


@dataclass(frozen=True, slots=True)
class LinearDrift:
    """From ``start`` at 0 to ``end`` at ``over_s`` on a straight line, and ``end`` from there on."""

    start: float
    end: float
    over_s: float

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in (self.start, self.end, self.over_s)):
            raise ConfigError(f"a linear drift needs positive FROM, TO and OVER_S, got {self}")

    def factor(self, at_s: float) -> float:
        return self.start + (self.end - self.start) * min(1.0, at_s / self.over_s)


@dataclass(frozen=True, slots=True)
class SineDrift:
    """Between ``1/swing`` and ``swing``, in a sine of the logarithm; rising from 1 at time 0."""

    swing: float
    period_s: float

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in (self.swing, self.period_s)):
            raise ConfigError(f"a sine drift needs a positive FACTOR and PERIOD_S, got {self}")

    def factor(self, at_s: float) -> float:
        return float(self.swing ** math.sin(2.0 * math.pi * at_s / self.period_s))


def parse_drift(text: str) -> MixDrift:
    """Read ``linear:0.5:2:3600`` or ``sine:2:1800``; raises ConfigError."""
    kind, *numbers = text.split(":")
    try:
        match kind, list(map(float, numbers)):
            case "linear", [start, end, over_s]:
                return LinearDrift(start, end, over_s)
            case "sine", [swing, period_s]:
                return SineDrift(swing, period_s)
    except ValueError:
        pass
    raise ConfigError(f"drift {text!r}: expected {FORMS}")


def drift_mix(workload: Workload, drift: MixDrift) -> Workload:
    """Multiply each request's input:output ratio by ``drift.factor(arrival)``, rounded to whole tokens.

    Arrivals stay, and so does ``input + output`` of every request, hence the rate of tokens. Both parts
    keep at least one token. Prefix ids are kept as far as the old and the new prompt have whole blocks.
    """
    factor = np.array([drift.factor(at_s) for at_s in workload.arrival_s.tolist()])
    moved = factor != 1.0
    old = workload.input_tokens
    total = old + workload.output_tokens
    weighted = old * factor
    ideal = np.rint(total * weighted / (weighted + workload.output_tokens)).astype(np.int64)
    inputs = np.where(moved, np.minimum(total - 1, np.maximum(1, ideal)), old)
    blocks = workload.hash_ids
    if blocks is not None:
        kept = np.minimum(inputs, old) // workload.column("block_tokens")
        rows = zip(blocks, moved.tolist(), kept.tolist(), strict=True)
        blocks = optional("hash_ids", [ids[:whole] if cut else ids for ids, cut, whole in rows])
    return replace(workload, input_tokens=inputs, output_tokens=total - inputs, hash_ids=blocks)
