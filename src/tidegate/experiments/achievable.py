"""A rate that can be attained: what a clairvoyant search reaches with the simulator itself.

The fluid limit says what no schedule can exceed, this what some schedule does reach; the best possible system
lies between. The search knows arrivals and lengths. It gives up requests before they cost anything, as many
as the level allows, has the others served by each of a few systems, and speeds the trace up until none of
them attains the level any more. Which requests are given up is improved by what a run shows: those go whose
work stands before most of the requests that missed.

Everything is a function of its arguments and a number of simulations; a bound on CPU time only ends the
search earlier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import Values, attention_work
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import Candidate
from tidegate.measure.request_table import Counts, Mask
from tidegate.sim import simulate
from tidegate.workloads.choice import at_rate, own_rate_rps, requests_of
from tidegate.workloads.trace import Workload

CANDIDATES = tuple(
    Candidate(system, None, chunk)
    for chunk in (512, 2048, 8192)
    for system in ("colocated+sjf", "colocated+edf")
)
"""Served under all of these by default. None says no to a request: what is given up is chosen here."""
GIVEN_UP = 0.25
"""Of the requests that still miss, how many are given up before the next simulation."""
PATIENCE = 6
"""Simulations of one candidate at one rate, at most."""
RIVALS = 2
"""Candidates that are still tried once none attains at some rate: those that attained last."""
GROWTH = 2.0
FINEST = 1.02
"""The rate grows by the first factor, by its root whenever none attains, until that is below the second."""


@dataclass(frozen=True, slots=True)
class Achieved:
    """``candidate`` attains the level at ``rate_rps`` if the requests of ``given_up`` are not served at all.

    The shares are of all offered requests; ``given_up`` is in order of arrival. ``rate_rps`` is 0, without a
    candidate, where none was found to attain it.
    """

    rate_rps: float
    attainment: float
    candidate: Candidate | None
    given_up: Mask
    simulations: int


@dataclass(slots=True)
class _Budget:
    """What the search may still spend, and whom it tells."""

    simulations: int
    until_cpu_s: float
    tell: Callable[[float, float], None]
    used: int = 0

    def left(self) -> bool:
        return self.used < self.simulations and time.process_time() < self.until_cpu_s


def find_achievable(
    setting: Setting,
    level: float,
    seed: int,
    *,
    start_rps: float | None = None,
    candidates: Sequence[Candidate] = CANDIDATES,
    simulations: int = 60,
    cpu_s: float = math.inf,
    tell: Callable[[float, float], None] = lambda share, rate_rps: None,
) -> Achieved:
    """Return the highest rate found at which the level is attained, for one draw of the setting's workload.

    The search begins at ``start_rps``, by default the workload's own rate. ``tell`` hears what share of the
    budget is spent and the best rate so far. The same arguments give the same result unless ``cpu_s`` ends
    the search. Raises ConfigError for a closed loop, whose arrivals depend on the answers, and for a budget
    of nothing.
    """
    if setting.settings.closed_loop:
        raise ConfigError("nothing is given up ahead in a closed loop: its arrivals depend on the answers")
    if simulations < 1 or not candidates:
        raise ConfigError("a search needs at least one simulation and one candidate")
    requests = requests_of(setting.workload)
    rate_rps = start_rps or own_rate_rps(requests)
    served = np.zeros(len(requests), bool)
    best = Achieved(0.0, 0.0, None, served, 0)
    budget = _Budget(simulations, time.process_time() + cpu_s, tell)
    work_s = _work_s(setting, at_rate(requests, rate_rps, seed))
    order, factor = list(candidates), GROWTH
    while budget.left() and factor >= FINEST:
        found = None
        for candidate in order:
            drawn = at_rate(requests, rate_rps, seed)
            found = _attained(candidate.applied(setting), drawn, work_s, level, best.given_up, budget)
            budget.tell(budget.used / simulations, best.rate_rps)
            if found is not None:
                share, given_up = found
                best = Achieved(rate_rps, share, candidate, given_up, budget.used)
                order = [candidate, *(each for each in order if each is not candidate)]
                break
            if not budget.left():
                break
        if found is not None:
            rate_rps *= factor
        elif best.candidate is None:
            rate_rps /= 2.0
        else:
            order, factor = order[:RIVALS], math.sqrt(factor)
            rate_rps = best.rate_rps * factor
    return replace(best, simulations=budget.used)


def title_of(candidate: Candidate | None) -> str:
    """Say how a candidate serves."""
    if candidate is None:
        return "nothing"
    return f"{candidate.system} with chunks of {candidate.chunk_tokens}"


def _attained(
    setting: Setting, requests: Workload, work_s: Values, level: float, given_up: Mask, budget: _Budget
) -> tuple[float, Mask] | None:
    """Give up more and more until the rest attains the level.

    Return the share that attains and what is given up; None where more miss than may.
    """
    count = len(requests)
    spare = count - math.ceil(level * count - 1e-9)
    replicas, least = setting.fleet.replicas(), count + 1
    for _ in range(PATIENCE):
        if not budget.left():
            return None
        budget.used += 1
        kept: Counts = np.flatnonzero(~given_up)
        table = simulate(requests[kept], setting.make_system(), replicas, setting.settings).requests
        missed = kept[~table.attained]
        dropped = int(given_up.sum())
        misses = dropped + len(missed)
        if misses <= spare:
            return 1.0 - misses / count, given_up
        more = min(math.ceil(GIVEN_UP * len(missed)), spare - dropped)
        if more <= 0 or misses >= least:
            return None
        least = misses
        blame = work_s * _missed_behind(requests.arrival_s, missed, setting.settings.loosest_slo.ttft_s)
        blame[given_up] = -1.0
        given_up = given_up.copy()
        given_up[np.argsort(-blame, kind="stable")[:more]] = True
    return None


def _missed_behind(arrival_s: Values, missed: Counts, window_s: float) -> Values:
    """Count for each request those of ``missed`` that came with it or within ``window_s`` after it."""
    at_s = arrival_s[missed]
    first, last = np.searchsorted(at_s, arrival_s), np.searchsorted(at_s, arrival_s + window_s, "right")
    return np.asarray(last - first, dtype=np.float64)


def _work_s(setting: Setting, requests: Workload) -> Values:
    """Return about how long each request takes an instance: its prefill, and its share of decode steps."""
    profile = setting.fleet.replicas()[0].profile
    prompt, decodes = requests.input_tokens.astype(float), np.maximum(requests.output_tokens - 1.0, 0.0)
    compute_s = profile.prefill.b_s * prompt + profile.prefill.c_s * attention_work(prompt, 0.0)
    alone = np.asarray(profile.step.seconds(2.0, prompt) - profile.step.seconds(1.0, 0.0 * prompt))
    return np.asarray(compute_s + decodes * alone, dtype=np.float64)
