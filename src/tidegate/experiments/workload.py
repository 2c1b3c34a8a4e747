"""The requests of a run: the workload at a rate, drawn by a seed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from tidegate.core.errors import ConfigError
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.readers import is_timed
from tidegate.workloads.reseed import reseeded
from tidegate.workloads.trace import TraceRecord
from tidegate.workloads.transform import scale_rate


@lru_cache(maxsize=4)
def requests_of(choice: WorkloadChoice) -> tuple[TraceRecord, ...]:
    """Return the workload at its own rate; the same object again for the same choice.

    A session file without arrival times starts one session per second, as a Poisson process.
    """
    if starts_sessions(choice):
        choice = replace(choice, sessions_per_s=1.0)
    elif choice.turn_gap_s is not None:
        raise ConfigError(f"--turn-gap is for traces without times; {choice.trace} has its own")
    return tuple(load_workload(choice))


def starts_sessions(choice: WorkloadChoice) -> bool:
    """Tell whether the trace has no arrival times, so that ``requests_of`` gives its sessions some."""
    return bool(
        choice.trace
        and choice.sessions_per_s is None
        and choice.poisson is None
        and not is_timed(choice.trace)
    )


def own_rate_rps(records: tuple[TraceRecord, ...]) -> float:
    """Return the mean arrival rate. Raises ConfigError when all requests come at one instant."""
    span_s = records[-1].arrival_s - records[0].arrival_s
    if len(records) < 2 or span_s <= 0:
        raise ConfigError(
            "the workload has no rate: it needs at least two requests at different times to be scaled to one"
        )
    return (len(records) - 1) / span_s


def at_rate(records: tuple[TraceRecord, ...], rate_rps: float | None, seed: int) -> list[TraceRecord]:
    """Return the seed's draw of the workload, its time scaled to the mean rate; None keeps its own."""
    drawn = reseeded(records, seed)
    if rate_rps is None:
        return drawn
    return list(scale_rate(drawn, rate_rps / own_rate_rps(records)))
