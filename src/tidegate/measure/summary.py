"""One simulated run as one JSON object: the contract of ``--json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import tidegate
from tidegate.core.stages import STAGES
from tidegate.measure.attainment import goodput, score_classes, score_table
from tidegate.measure.percentiles import PERCENTILES, p50_p90_p99
from tidegate.measure.request_table import Mask, RequestTable, Seconds
from tidegate.measure.timeline import Timeline

KEYS = (
    "system", "trace", "instances", "requests", "attained", "attainment", "classes", "rate_rps",
    "goodput_rps", "limit_rps", "share_of_limit", "achievable_rps", "share_of_achievable",
    "ttft_s", "tpot_s", "stages", "flips", "adds",
    "drains", "reversals", "migrations", "preemptions", "kv_transfer_bytes", "instance_hours", "wall_s",
    "cpu_s", "requests_per_cpu_s", "seed", "version",
)  # fmt: skip
"""The keys of ``summarize_run``'s object, in order."""


class Run(Protocol):
    """What is read of a finished simulation."""

    @property
    def requests(self) -> RequestTable: ...
    @property
    def timeline(self) -> Timeline: ...
    @property
    def flips(self) -> int: ...
    @property
    def adds(self) -> int: ...
    @property
    def drains(self) -> int: ...
    @property
    def reversals(self) -> int: ...
    @property
    def migrations(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def kv_transfer_bytes(self) -> int: ...
    @property
    def instance_hours(self) -> float: ...


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run does not know of itself. Rates are None where not computed."""

    system: str
    trace: str
    seed: int
    wall_s: float
    cpu_s: float
    goodput_rps: float | None = None
    limit_rps: float | None = None
    achievable_rps: float | None = None


def summarize_run(run: Run, facts: RunFacts) -> dict[str, Any]:
    """Return the run as an object with exactly the keys ``KEYS``.

    ``rate_rps`` is the offered rate. Percentiles are over requests answered in full; null stands for what was
    not computed or has nothing to be computed from, never NaN. Shares of rates are those of the goodput.
    """
    requests = run.requests
    attainment = score_table(requests)
    offered = goodput(attainment, requests.arrival_s)
    ok = requests.ok
    values: dict[str, Any] = {
        "system": facts.system,
        "trace": facts.trace,
        "instances": len(requests.instances),
        "requests": attainment.offered,
        "attained": attainment.attained,
        "attainment": attainment.share,
        "classes": {name: found.to_json() for name, found in score_classes(requests).items()},
        "rate_rps": offered.offered_rps,
        "goodput_rps": facts.goodput_rps,
        "limit_rps": facts.limit_rps,
        "share_of_limit": share_of(facts.goodput_rps, facts.limit_rps),
        "achievable_rps": facts.achievable_rps,
        "share_of_achievable": share_of(facts.goodput_rps, facts.achievable_rps),
        "ttft_s": percentiles(requests.ttft_s, ok),
        "tpot_s": percentiles(requests.tpot_s, ok),
        "stages": {
            stage: percentiles(requests.stages_s[stage], ok) for stage in STAGES if stage in requests.stages_s
        },
        "flips": run.flips,
        "adds": run.adds,
        "drains": run.drains,
        "reversals": run.reversals,
        "migrations": run.migrations,
        "preemptions": run.preemptions,
        "kv_transfer_bytes": run.kv_transfer_bytes,
        "instance_hours": run.instance_hours,
        "wall_s": facts.wall_s,
        "cpu_s": facts.cpu_s,
        "requests_per_cpu_s": attainment.offered / facts.cpu_s if facts.cpu_s > 0 else None,
        "seed": facts.seed,
        "version": tidegate.__version__,
    }
    return {key: values[key] for key in KEYS}


def share_of(part: float | None, whole: float | None) -> float | None:
    """Return ``part / whole``, or None where either is unknown or the whole is not positive."""
    return None if part is None or whole is None or whole <= 0 else part / whole


def percentiles(values: Seconds, among: Mask) -> dict[str, float | None]:
    """Return ``{"p50", "p90", "p99"}`` of the finite values among the chosen rows; null without any."""
    names = [f"p{p}" for p in PERCENTILES]
    found = p50_p90_p99(values[among])
    return dict.fromkeys(names) if found is None else dict(zip(names, found, strict=True))
