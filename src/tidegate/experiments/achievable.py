"""A rate that can be attained: what a clairvoyant search reaches with the simulator itself.

The fluid limit says what no schedule can exceed, this what some schedule does reach; the best possible system
lies between. The search knows arrivals and lengths. It gives up requests before they cost anything, as many
as the level allows, has the others served by one of many systems, and speeds the trace up until none of them
attains the level any more. Which requests are given up is learned from runs: those whose work stands before
most of the requests that missed; and where no more may be given up, the cheapest are served after all in
exchange for dearer ones.

Every simulation is a job of its own, so a search that was stopped goes on where it was. The result is a
function of the arguments.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tidegate.bound.demand import Batching
from tidegate.core.errors import ConfigError
from tidegate.costs.forms import Values, attention_work
from tidegate.experiments.jobs import Workers
from tidegate.experiments.run import job_of, unlimited
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import Candidate, even_split
from tidegate.measure.request_table import Counts, Mask, RequestTable
from tidegate.sim import simulate
from tidegate.workloads.choice import at_rate, own_rate_rps, requests_of
from tidegate.workloads.trace import Workload

SERVED_BY = (
    Candidate("colocated+edf", chunks="slack"),
    *(Candidate("colocated+edf", None, chunk) for chunk in (512, 2048, 8192)),
    Candidate("colocated+sjf", chunks="slack"),
    Candidate("colocated+sjf", None, 2048),
    Candidate("tidegate"),
    Candidate("tidegate+edf"),
    Candidate("arrow-lending+feasible-sjf"),
)
"""What is given up is chosen here; the rest is served under each of these, and by some static splits."""
GIVEN_UP = 0.25
"""Of the requests that still miss, how many others are given up, or exchanged, before the next simulation."""
PATIENCE = 4
NOISE = 0.3
"""Exchanges in a row that gain nothing before a candidate is left; each is chosen with more noise by that."""
NEAR = 4
"""Requests on either side that tell how long one would wait."""
FAR = 1.25
"""Where more than this many times what may miss does, the rate is left at once."""
RACES = 2
RIVALS = 3
"""At so many of the rates that the leaders barely miss all are tried once; so many of the best lead then."""
GROWTH = 1.5
FINEST = 1.02
"""The rate grows by the first factor, by its root whenever none attains, until that is below the second."""
SIMULATIONS = 70


@dataclass(frozen=True, slots=True)
class Achieved:
    """``candidate`` attains the level at ``rate_rps`` if the requests of ``given_up`` are not served at all.

    ``attained`` of ``len(given_up)`` offered requests, those of ``given_up`` included; they are in order of
    arrival. ``rate_rps`` is 0, without a candidate, where none was found to attain it.
    """

    rate_rps: float
    attained: int
    candidate: Candidate | None
    given_up: Mask
    simulations: int

    @property
    def attainment(self) -> float:
        return self.attained / len(self.given_up)


def candidates_for(instances: int) -> tuple[Candidate, ...]:
    """Return ``SERVED_BY`` and static splits: the even one, and one with three prefill instances in four."""
    if instances < 2:
        return SERVED_BY
    most = max(1, instances * 3 // 4)
    splits = dict.fromkeys((even_split(instances), (most, instances - most)))
    return SERVED_BY + tuple(Candidate("static+feasible-sjf", split) for split in splits)


def served(setting: Setting, rate_rps: float, seed: int, given_up: Sequence[int]) -> dict[str, list[Any]]:
    """Simulate all but the requests of ``given_up``, by number in order of arrival.

    Return the numbers of those that missed their TTFT target, were refused or failed (``late``), of those
    that missed their TPOT target alone (``slow``), and for each of ``given_up`` about how many would miss if
    it were served, too (``harm``).
    """
    requests = at_rate(requests_of(setting.workload), rate_rps, seed)
    kept: Counts = np.setdiff1d(np.arange(len(requests)), given_up)
    table = simulate(
        requests[kept], setting.make_system(), setting.fleet.replicas(), setting.settings
    ).requests
    slow = table.ttft_met & ~table.tpot_met
    harm = _harm(setting, requests[np.asarray(given_up, np.int64)], table)
    return {
        "late": kept[~table.attained & ~slow].tolist(),
        "slow": kept[slow].tolist(),
        "harm": [round(each, 3) for each in harm.tolist()],
    }


def proposed(setting: Setting, rate_rps: float, seed: int, level: float) -> list[int]:
    """Return whom the bound's program gives up at a rate (see ``bound.sacrifice``)."""
    from tidegate.bound.sacrifice import sacrificed  # brings a solver along: half a second

    replicas, engine = setting.fleet.replicas(), setting.fleet.engine
    return sacrificed(
        at_rate(requests_of(setting.workload), rate_rps, seed),
        [replica.profile for replica in replicas],
        [replica.instance for replica in replicas],
        setting.settings.loosest_slo,
        Batching(engine.max_batch_tokens, engine.max_num_seqs, engine.host_s),
        level=level,
    )


async def find_achievable(
    setting: Setting,
    level: float,
    seed: int,
    workers: Workers,
    *,
    start_rps: float | None = None,
    known: Mapping[Candidate, float] | None = None,
    candidates: Sequence[Candidate] = (),
    simulations: int = SIMULATIONS,
) -> Achieved:
    """Return the highest rate found at which the level is attained, for one draw of the setting's workload.

    ``known`` are goodputs of this draw; the result is never below the best of them. Without any the search
    begins at ``start_rps``, by default the workload's own rate. ``candidates`` are by default those of
    ``candidates_for``; those that are known come along. ``workers`` are credited one run per simulation that
    may be spent. Raises ConfigError where the limit has no meaning either (see ``unlimited``), and for a
    budget of nothing.
    """
    if why := unlimited(setting):
        raise ConfigError(f"no request is given up ahead here: {why}")
    if simulations < 1:
        raise ConfigError(f"a search needs at least one simulation, got {simulations}")
    asked = tuple(candidates) or candidates_for(setting.fleet.size)
    search = _Search(setting, level, seed, workers, simulations)
    system, rate_rps = max((known or {}).items(), key=lambda each: each[1], default=(None, 0.0))
    if system is not None and rate_rps > 0.0:
        await search.attains(system, rate_rps)
        rate_rps *= GROWTH
    else:
        rate_rps = start_rps or own_rate_rps(search.requests)
    every = list(dict.fromkeys([*(known or ()), *asked]))
    await search.climb(rate_rps, [asked[0]], every)
    workers.credit(max(0, simulations - search.used))
    return replace(search.best, simulations=search.used)


def title_of(candidate: Candidate | None) -> str:
    """Say how a candidate serves."""
    if candidate is None:
        return "nothing"
    split = "" if candidate.split is None else ":{}:{}".format(*candidate.split)
    chunks = candidate.chunks or (candidate.chunk_tokens and f"{candidate.chunk_tokens:,} tokens")
    return f"{candidate.system}{split}" + (f", chunks of {chunks}" if chunks else "")


@dataclass(slots=True)
class _Search:
    """The search for one draw: what it has spent, and the best schedule so far."""

    setting: Setting
    level: float
    seed: int
    workers: Workers
    simulations: int
    used: int = 0
    near: bool = False
    proposed_at: set[float] = field(default_factory=set)
    requests: Workload = field(init=False)
    work_s: Values = field(init=False)
    best: Achieved = field(init=False)
    given_up: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.requests = requests_of(self.setting.workload)
        drawn = at_rate(self.requests, own_rate_rps(self.requests), self.seed)
        self.work_s = _work_s(self.setting, drawn)
        self.given_up = np.zeros(len(drawn), bool)
        self.best = Achieved(0.0, 0, None, self.given_up, 0)

    @property
    def left(self) -> bool:
        return self.used < self.simulations

    async def climb(self, rate_rps: float, leaders: list[Candidate], every: Sequence[Candidate]) -> None:
        """Raise the rate while one of ``leaders`` attains, now and then replaced by the best of ``every``."""
        factor, races = GROWTH, 0
        while self.left and factor >= FINEST:
            found = await self.first_of(leaders, rate_rps)
            if found is None and races < RACES and self.near and self.left:
                races += 1
                leaders = await self.race(every, rate_rps)
                found = await self.first_of(leaders, rate_rps)
            if found is not None:
                leaders = [found, *(each for each in leaders if each is not found)]
                rate_rps *= factor
            elif self.best.candidate is None:
                rate_rps /= 2.0
            else:
                factor = math.sqrt(factor)
                rate_rps = self.best.rate_rps * factor

    async def first_of(self, leaders: Sequence[Candidate], rate_rps: float) -> Candidate | None:
        """Return the first that attains the level; None, without asking all, where that is far off."""
        for candidate in leaders:
            if await self.attains(candidate, rate_rps):
                return candidate
            if not self.near:
                break
        return None

    async def race(self, every: Sequence[Candidate], rate_rps: float) -> list[Candidate]:
        """Return the few that miss least of what is not given up now."""
        every = every[: self.simulations - self.used]
        found = await asyncio.gather(*(self.run(each, rate_rps, self.given_up) for each in every))
        counts = {each: run.misses for each, run in zip(every, found, strict=True)}
        return sorted(every, key=lambda each: counts[each])[:RIVALS]

    async def attains(self, candidate: Candidate, rate_rps: float) -> bool:
        """Tell whether the level is attained, with what is given up now and improved by what runs show."""
        count = len(self.requests)
        spare = count - math.ceil(self.level * count - 1e-9)
        drawn = at_rate(self.requests, rate_rps, self.seed)
        arrival_s, slo = drawn.arrival_s, self.setting.settings.loosest_slo
        life_s = slo.ttft_s + slo.tpot_s * np.maximum(drawn.output_tokens - 1.0, 0.0)
        given_up, least, stalls = self.given_up, count + 1, 0
        trial, fresh = given_up, await self.proposal(rate_rps)
        while self.left and stalls < PATIENCE:
            run = await self.run(candidate, rate_rps, trial)
            misses = int(trial.sum()) + run.misses
            if misses <= spare:
                self.given_up = trial
                self.best = Achieved(rate_rps, count - misses, candidate, trial, self.used)
                return True
            stalls = 0 if misses < least else stalls + 1
            if misses <= least:
                given_up, least, seen = trial, misses, run
            if fresh is not None:
                trial, fresh = fresh, None
                continue
            self.near = least <= FAR * spare + 1
            if not self.near:
                break
            noise = np.random.default_rng(self.used).lognormal(0.0, NOISE * stalls, count)
            changed = math.ceil((GIVEN_UP if not stalls else 1.0 / (1 + stalls)) * seen.misses)
            trial = given_up.copy()
            reach = _Reach(arrival_s, life_s, slo.ttft_s, self.work_s * noise)
            chosen = reach.in_the_way(given_up, seen, changed)
            dropped = np.flatnonzero(given_up)
            back = max(0, len(dropped) + len(chosen) - spare)
            rank = np.lexsort((self.work_s[dropped], seen.harm * noise[dropped]))
            trial[dropped[rank[:back]]] = False
            trial[chosen] = True
        self.given_up = given_up
        return False

    async def proposal(self, rate_rps: float) -> Mask | None:
        """Return whom the bound gives up at a rate, None where that was asked for already."""
        if rate_rps in self.proposed_at:
            return None
        self.proposed_at.add(rate_rps)
        anyone = replace(self.setting, system="", split=None)
        title = f"whom to give up at {rate_rps:.2f} requests/s"
        job = job_of(proposed, anyone, title, rate_rps=rate_rps, seed=self.seed, level=self.level)
        given_up = np.zeros(len(self.requests), bool)
        given_up[await self.workers.do(job)] = True
        return given_up

    async def run(self, candidate: Candidate, rate_rps: float, given_up: Mask) -> _Run:
        """Simulate what is not given up."""
        self.used += 1
        arguments: dict[str, Any] = {
            "rate_rps": rate_rps,
            "seed": self.seed,
            "given_up": np.flatnonzero(given_up).tolist(),
        }
        title = f"what {title_of(candidate)} can attain at {rate_rps:.2f} requests/s"
        found = await self.workers.do(job_of(served, candidate.applied(self.setting), title, **arguments))
        self.workers.credit(1)
        return _Run(
            np.array(found["late"], np.int64),
            np.array(found["slow"], np.int64),
            np.array(found["harm"], float),
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """What ``served`` returns, as arrays."""

    late: Counts
    slow: Counts
    harm: Values

    @property
    def misses(self) -> int:
        return len(self.late) + len(self.slow)


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far in time requests stand in each other's way: their arrivals, how long their answers may last,
    the TTFT target, and the work of each."""

    arrival_s: Values
    life_s: Values
    ttft_s: float
    work_s: Values

    def in_the_way(self, given_up: Mask, run: _Run, most: int) -> list[int]:
        """Return up to ``most`` requests whose work stands before most that missed, one after the other.

        It delays first tokens of what comes within a TTFT target after it, and slows answers down that last
        while its own does. Giving one up makes room for as many of the average work of a request that missed
        as it has, itself among them: these count no more.
        """
        late, slow = run.late, run.slow
        missed = np.concatenate([late, slow])
        mean_s = float(self.work_s[missed].mean())
        arrival_s, work_s = self.arrival_s, np.where(given_up, 0.0, self.work_s)
        slow_s = float(self.life_s[slow].mean()) if len(slow) else 0.0
        chosen: list[int] = []
        while len(chosen) < most and len(late) + len(slow):
            behind = _between(arrival_s[late], arrival_s, arrival_s + self.ttft_s)
            beside = _between(arrival_s[slow], arrival_s - slow_s, arrival_s + self.life_s)
            each = int(np.argmax(work_s * (behind + beside)))
            if not work_s[each] * (behind + beside)[each] > 0.0:
                break
            chosen.append(each)
            room = max(1, round(float(self.work_s[each]) / mean_s))
            work_s[each] = 0.0
            late, slow = late[late != each], slow[slow != each]
            first = int(np.searchsorted(late, each))
            freed = late[first : first + min(room, int(behind[each]))]
            late = np.setdiff1d(late, freed)
            near = np.argsort(np.abs(arrival_s[slow] - arrival_s[each]), kind="stable")
            slow = np.delete(slow, near[: max(0, room - len(freed))])
        return chosen


def _harm(setting: Setting, dropped: Workload, table: RequestTable) -> Values:
    """Return for each request of ``dropped`` about how many of the run of ``table`` would miss beside it.

    One that comes within a TTFT target after it and has less time left than it takes, if both happen to be on
    the same instance; and itself, by what others near it waited.
    """
    work_s, own_s = _work_s(setting, dropped), _work_s(setting, table)
    left_s = np.where(table.attained, table.ttft_target_s - table.ttft_s, np.inf)
    wait_s = np.nan_to_num(table.ttft_s - own_s, nan=np.inf)
    target_s, harm = setting.settings.loosest_slo.ttft_s, np.zeros(len(dropped))
    for number, at_s in enumerate(dropped.arrival_s.tolist()):
        first, last = np.searchsorted(table.arrival_s, [at_s, at_s + target_s])
        hurt = float((left_s[first:last] < work_s[number]).sum()) / setting.fleet.size
        near = wait_s[max(0, first - NEAR) : first + NEAR]
        late = len(near) > 0 and float(np.median(near)) + work_s[number] > target_s
        harm[number] = hurt + late
    return harm


def _between(at_s: Values, first_s: Values, last_s: Values) -> Counts:
    """Count for each interval those of ``at_s``, which is sorted, that lie in it."""
    found = np.searchsorted(at_s, last_s, "right") - np.searchsorted(at_s, first_s)
    return np.asarray(found, dtype=np.int64)


def _work_s(setting: Setting, requests: Workload | RequestTable) -> Values:
    """Return about how long each request takes an instance: its prefill, and its share of decode steps."""
    profile = setting.fleet.replicas()[0].profile
    prompt, decodes = requests.input_tokens.astype(float), np.maximum(requests.output_tokens - 1.0, 0.0)
    compute_s = profile.prefill.b_s * prompt + profile.prefill.c_s * attention_work(prompt, 0.0)
    alone = np.asarray(profile.step.seconds(2.0, prompt) - profile.step.seconds(1.0, 0.0 * prompt))
    return np.asarray(compute_s + decodes * alone, dtype=np.float64)
