"""SLO attainment and goodput of one run, over the requests that were offered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.measure.request_table import RequestTable, Seconds

DEFAULT_LEVEL = 0.90


@dataclass(frozen=True, slots=True)
class Observation:
    """What scoring needs of one offered request; ``ok`` is false for failed and rejected ones."""

    arrival_s: float
    ok: bool
    ttft_s: float | None
    tpot_s: float | None
    slo: Slo

    @property
    def ttft_met(self) -> bool:
        return self.ok and self.ttft_s is not None and self.ttft_s <= self.slo.ttft_s

    @property
    def tpot_met(self) -> bool:
        """An answer of one token has no TPOT and meets the target."""
        return self.ok and self.ttft_s is not None and (self.tpot_s is None or self.tpot_s <= self.slo.tpot_s)

    @property
    def attained(self) -> bool:
        return self.ttft_met and self.tpot_met


@dataclass(frozen=True, slots=True)
class Attainment:
    """Counts of offered requests that met both targets, TTFT alone and TPOT alone.

    Failed and rejected requests are misses in all three. An answer of one token has no TPOT and
    meets that target.
    """

    offered: int
    attained: int
    ttft_attained: int
    tpot_attained: int

    @property
    def share(self) -> float:
        """Return the SLO attainment, 0 when nothing was offered."""
        return self.attained / self.offered if self.offered else 0.0

    @property
    def ttft_share(self) -> float:
        return self.ttft_attained / self.offered if self.offered else 0.0

    @property
    def tpot_share(self) -> float:
        return self.tpot_attained / self.offered if self.offered else 0.0


@dataclass(frozen=True, slots=True)
class ClassAttainment:
    """What the requests of one SLO class attained, and their targets."""

    slo: Slo
    attainment: Attainment

    def to_json(self) -> dict[str, Any]:
        """Return the class as an object of the ``--json`` contracts."""
        seen = self.attainment
        return {
            "slo": str(self.slo),
            "requests": seen.offered,
            "attained": seen.attained,
            "attainment": seen.share,
            "ttft_attainment": seen.ttft_share,
            "tpot_attainment": seen.tpot_share,
        }


NO_CLASS = "(no class)"
"""How reports name the requests without an SLO class, where others have one."""


def class_title(name: str, slo: str) -> str:
    """Return how reports name a class with its targets."""
    return f"{name or NO_CLASS}, {slo}"


def score(observations: Iterable[Observation]) -> Attainment:
    """Count attainment, each request against its own SLO."""
    offered = attained = ttft_attained = tpot_attained = 0
    for seen in observations:
        offered += 1
        ttft_attained += seen.ttft_met
        tpot_attained += seen.tpot_met
        attained += seen.attained
    return Attainment(offered, attained, ttft_attained, tpot_attained)


def score_table(requests: RequestTable) -> Attainment:
    """Count attainment over the rows of a table, each against its own targets."""
    kinds = (requests.attained, requests.ttft_met, requests.tpot_met)
    return Attainment(len(requests), *(int(np.count_nonzero(kind)) for kind in kinds))


def score_classes(requests: RequestTable) -> dict[str, ClassAttainment]:
    """Count attainment by SLO class; empty where no request has one."""
    classes = np.array(requests.slo_class)
    kinds = (requests.attained, requests.ttft_met, requests.tpot_met)
    found = {}
    for name in sorted(set(requests.slo_class)) if any(requests.slo_class) else ():
        rows = classes == name
        first = int(rows.argmax())
        slo = Slo(float(requests.ttft_target_s[first]), float(requests.tpot_target_s[first]))
        counts = (int(np.count_nonzero(kind & rows)) for kind in kinds)
        found[name] = ClassAttainment(slo, Attainment(int(rows.sum()), *counts))
    return found


@dataclass(frozen=True, slots=True)
class Goodput:
    """What one run says about goodput.

    ``offered_rps`` is the mean arrival rate and ``attained_rps`` the part of it that met the SLO.
    Goodput proper, the highest rate at which attainment is at least ``level``, takes several runs;
    one run only tells whether it lies at ``offered_rps`` or above (``level_met``) or below.
    """

    level: float
    level_met: bool
    offered_rps: float | None
    attained_rps: float | None


def goodput(
    attainment: Attainment, arrivals_s: Sequence[float] | Seconds, level: float = DEFAULT_LEVEL
) -> Goodput:
    """Relate attainment to the offered rate; the rates are None when no time passed between arrivals.

    The rate is gaps between arrivals over the time they span, so it does not depend on how long
    the run waited for the last answers. Raises ConfigError unless 0 < level <= 1.
    """
    if not 0 < level <= 1:
        raise ConfigError(f"the attainment level is a share between 0 and 1, got {level}")
    span_s = float(np.ptp(arrivals_s)) if len(arrivals_s) else 0.0
    offered_rps = (len(arrivals_s) - 1) / span_s if span_s > 0 else None
    attained_rps = None if offered_rps is None else offered_rps * attainment.share
    met = attainment.offered > 0 and attainment.share >= level
    return Goodput(level, met, offered_rps, attained_rps)


LEAST_SPAN_S = 30.0
"""Of arrivals: in less, queues have no time to build up."""
LEAST_MISSES = 10
"""That a level allows: with fewer, one request more or less decides."""


def too_short(offered: int, span_s: float | None, level: float) -> str:
    """Return why a run of ``offered`` arrivals in ``span_s`` says little of ``level``; empty where it says
    enough."""
    if not offered:
        return ""
    if span_s is not None and span_s < LEAST_SPAN_S:
        return (
            f"too short to mean anything: {offered:,} requests in {span_s:.1f} s; queues need "
            f"{LEAST_SPAN_S:g} s or more to show"
        )
    allowed = (1.0 - level) * offered
    if allowed < LEAST_MISSES:
        return (
            f"too few requests for {100 * level:g} %: of {offered:,}, {allowed:.0f} may miss, so a few decide"
        )
    return ""
