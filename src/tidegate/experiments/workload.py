"""The requests of a run: the workload at a rate, drawn by a seed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from tidegate.core.errors import ConfigError
from tidegate.workloads.choice import WorkloadChoice, load_workload
from tidegate.workloads.readers import has_arrivals
from tidegate.workloads.reshape import reseeded
from tidegate.workloads.trace import Workload
from tidegate.workloads.transform import scale_rate


@lru_cache(maxsize=4)
def requests_of(choice: WorkloadChoice) -> Workload:
    """Return the workload at its own rate; the same object again for the same choice.

    A session file without arrival times starts one session per second, as a Poisson process.
    """
    if starts_sessions(choice):
        choice = replace(choice, sessions_per_s=1.0)
    elif choice.turn_gap_s is not None:
        raise ConfigError(f"--turn-gap is for traces without times; {choice.trace} has its own")
    return load_workload(choice)


def starts_sessions(choice: WorkloadChoice) -> bool:
    """Tell whether the trace has no arrival times, so that ``requests_of`` gives its sessions some."""
    return bool(
        choice.trace
        and choice.sessions_per_s is None
        and choice.poisson is None
        and not has_arrivals(choice.trace)
    )


def own_rate_rps(workload: Workload) -> float:
    """Return the mean arrival rate. Raises ConfigError when all requests come at one instant."""
    span_s = float(workload.arrival_s[-1] - workload.arrival_s[0])
    if len(workload) < 2 or span_s <= 0:
        raise ConfigError(
            "the workload has no rate: it needs at least two requests at different times to be scaled to one"
        )
    return (len(workload) - 1) / span_s


def at_rate(workload: Workload, rate_rps: float | None, seed: int) -> Workload:
    """Return the seed's draw of the workload, its time scaled to the mean rate; None keeps its own."""
    drawn = reseeded(workload, seed)
    if rate_rps is None:
        return drawn
    return scale_rate(drawn, rate_rps / own_rate_rps(workload))
