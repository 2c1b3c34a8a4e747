"""A live journal served again in virtual time: predicted against observed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica
from tidegate.journal.reader import Journal
from tidegate.journal.schema import OutcomeLine
from tidegate.measure.request_table import Mask, Seconds
from tidegate.sim.loop import simulate
from tidegate.sim.results import SimRun
from tidegate.sim.settings import SimSettings
from tidegate.systems.system import System
from tidegate.workloads.trace import TraceRecord


@dataclass(frozen=True, slots=True)
class LatencySpread:
    """Mean, median and 99th percentile over requests, in seconds."""

    mean_s: float
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One latency, predicted and observed for the same requests.

    ``mean_error``, ``p50_error`` and ``p99_error`` are (predicted - observed) / observed of those figures;
    ``request_error`` is the median over requests of the absolute relative error.
    """

    requests: int
    predicted: LatencySpread
    observed: LatencySpread
    mean_error: float
    p50_error: float
    p99_error: float
    request_error: float


@dataclass(frozen=True, slots=True, eq=False)
class JournalReplay:
    """What the simulator says of a journal's requests, beside what the journal says.

    A latency is None where no request has it in both. Only requests that were answered in both are compared;
    ``left_out`` counts the others.
    """

    run: SimRun
    requests: int
    left_out: int
    ttft: Compared | None
    tpot: Compared | None
    e2e: Compared | None
    predicted_flips: int
    observed_flips: int


def replay_journal(
    journal: Journal, system: System, replicas: Sequence[Replica], settings: SimSettings | None = None
) -> JournalReplay:
    """Serve the journal's requests with ``system`` on ``replicas``, labelled as the journal's cluster was.

    Arrivals, lengths and targets are the journal's; an answer's length is what was delivered. Requests that
    were wrong in themselves are left out. Raises ConfigError when the fleet has another size than the
    journal's, TraceError when the journal has no requests.
    """
    outcomes = sorted(
        (o for o in journal.outcomes if not o.refused and o.input_tokens > 0), key=lambda o: o.arrival_s
    )
    if not outcomes:
        raise TraceError("it holds no outcome of a request to replay", file="the journal")
    if len(journal.roles) not in (0, len(replicas)):
        raise ConfigError(
            f"the journal's cluster had {len(journal.roles)} instances, this one has {len(replicas)}; "
            "give as many"
        )
    if journal.roles:
        roles = tuple(Role[label.upper()] for label in journal.roles.values())
        system = replace(system, roles=lambda count: roles)
    settings, records = _as_trace(outcomes, journal.slo, settings or SimSettings())
    run = simulate(records, system, replicas, settings)
    return _compare(run, outcomes, len(journal.flips))


def _as_trace(
    outcomes: Sequence[OutcomeLine], slo: Slo | None, settings: SimSettings
) -> tuple[SimSettings, list[TraceRecord]]:
    """Return the requests as an open-loop trace, with a class per SLO of their own."""
    default = slo or settings.slo
    classes = {str(o.slo): o.slo for o in outcomes if o.slo is not None and o.slo != default}
    records = [
        TraceRecord(
            max(0.0, o.arrival_s),
            o.input_tokens,
            max(1, o.output_tokens),
            slo_class=str(o.slo) if o.slo is not None and o.slo != default else "",
        )
        for o in outcomes
    ]
    return replace(settings, slo=default, slo_classes=classes, closed_loop=False), records


def _compare(run: SimRun, outcomes: Sequence[OutcomeLine], flips: int) -> JournalReplay:
    table = run.requests
    both = table.ok & np.array([o.ok for o in outcomes])
    return JournalReplay(
        run=run,
        requests=int(np.count_nonzero(both)),
        left_out=int(np.count_nonzero(~both)),
        ttft=_compared(table.ttft_s[both], [o.ttft_s for o in outcomes], both),
        tpot=_compared(table.tpot_s[both], [o.tpot_s for o in outcomes], both),
        e2e=_compared(table.e2e_s[both], [o.e2e_s for o in outcomes], both),
        predicted_flips=run.flips,
        observed_flips=flips,
    )


def _compared(predicted: Seconds, seen: Sequence[float | None], both: Mask) -> Compared | None:
    observed = np.array([np.nan if value is None else value for value in seen])[both]
    known = np.isfinite(predicted) & np.isfinite(observed) & (observed > 0)
    if not known.any():
        return None
    predicted, observed = predicted[known], observed[known]
    ours, theirs = _spread(predicted), _spread(observed)
    return Compared(
        requests=int(np.count_nonzero(known)),
        predicted=ours,
        observed=theirs,
        mean_error=ours.mean_s / theirs.mean_s - 1.0,
        p50_error=ours.p50_s / theirs.p50_s - 1.0,
        p99_error=ours.p99_s / theirs.p99_s - 1.0,
        request_error=float(np.median(np.abs(predicted / observed - 1.0))),
    )


def _spread(values: Seconds) -> LatencySpread:
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return LatencySpread(float(values.mean()), p50, p99)
