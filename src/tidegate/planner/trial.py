"""A simulation of one deployment: on as many requests as the rate needs, with the policies in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from tidegate.experiments.jobs import Job
from tidegate.experiments.run import job_of
from tidegate.experiments.setting import Setting
from tidegate.sim import simulate
from tidegate.workloads.choice import WorkloadChoice, own_rate_rps, requests_of
from tidegate.workloads.reshape import concatenate, reseeded
from tidegate.workloads.residents import MidAnswers
from tidegate.workloads.sessions import in_rounds
from tidegate.workloads.trace import Workload
from tidegate.workloads.transform import coarsen_blocks, scale_rate

SPAN_S = 25.0
"""How long arrivals go on, at least: so that a queue that grows shows."""
LIVES = 2.0
"""How many answers of mean length, at the TPOT target, arrivals go on for, at least; sessions, where there
are rounds."""
FEWEST, MOST = 1200, 6000
"""Requests of a trial that count."""
SETTLED = 0.8
"""A fleet has settled once its residents hold so much of the KV that they hold in the long run. Where that
takes longer than ``SPAN_S``, a trial is an excerpt of a longer run."""
BEFORE_S, AFTER_S = 35.0, 12.0
"""Of an excerpt: how long requests arrive before and behind those that count. Residents join in the first
30 s; and an answer that the end cuts off has tokens enough to tell its TPOT."""
_ROUNDS = 14
BLOCK_TOKENS, MOST_BLOCKS = 64, 200_000
"""Prefix blocks are joined to this size, and a trial has so many at most: each costs time at every stage of a
request."""


@dataclass(frozen=True, slots=True)
class TrialLength:
    """``requests`` of a trial that count.

    An ``excerpt`` stands for a part of a longer run: it begins with residents, others arrive before and
    behind those that count, and it ends with the last arrival.
    """

    requests: int
    excerpt: bool = False


def length_for(workload: Workload, tpot_s: float, rate_rps: float) -> TrialLength:
    """Return how long a trial at about ``rate_rps`` is."""
    counted = _counted(workload, tpot_s, rate_rps)
    if settling_time_s(workload, tpot_s) <= SPAN_S:
        return TrialLength(counted)
    return TrialLength(int(min(counted, max(FEWEST, rate_rps * SPAN_S))), excerpt=True)


def settling_time_s(workload: Workload, tpot_s: float) -> float:
    """Return how long a fleet that begins empty takes to settle, at the TPOT target.

    A request of i prompt tokens holds (i + age) tokens of KV at an age in tokens, until its answer ends. 0
    where there are rounds: runs of those last for ``LIVES`` sessions.
    """
    if in_rounds(workload):
        return 0.0
    prompts, answers = workload.input_tokens.astype(float), workload.output_tokens.astype(float)

    def held(age_tokens: float) -> float:
        ages = np.minimum(answers, age_tokens)
        return float((prompts * ages + 0.5 * ages * ages).sum())

    low, high = 0.0, float(answers.max())
    for _ in range(_ROUNDS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if held(middle) >= SETTLED * held(float(answers.max())) else (middle, high)
    return high * tpot_s


def _counted(workload: Workload, tpot_s: float, rate_rps: float) -> int:
    wanted = min(MOST, max(FEWEST, rate_rps * max(SPAN_S, LIVES * _life_s(workload, tpot_s))))
    ids = coarsen_blocks(workload, BLOCK_TOKENS).hash_ids
    blocks = 0.0 if ids is None else sum(map(len, ids)) / len(ids)
    return int(min(wanted, max(FEWEST, MOST_BLOCKS / max(blocks, 1e-9))))


def _life_s(workload: Workload, tpot_s: float) -> float:
    """Return how long an answer of mean length lasts, where there are rounds a session of mean length."""
    answer_s = float(workload.output_tokens.mean()) * tpot_s
    if not in_rounds(workload):
        return answer_s
    rounds = len(workload) / (int(workload.units().max()) + 1)
    return rounds * answer_s + (rounds - 1.0) * float(np.nanmean(workload.column("delay_s")))


@lru_cache(maxsize=4)
def drawn(choice: WorkloadChoice, requests: int, seed: int) -> Workload:
    """Return so many requests at the workload's own rate: draws of it, one after the other.

    Where there are rounds, sessions are whole: the first ones that have so many requests.
    """
    own = coarsen_blocks(requests_of(choice), BLOCK_TOKENS)
    copies = math.ceil(requests / len(own))
    if len(own) < 2:
        return own
    gap_s = 1.0 / own_rate_rps(own)
    whole = concatenate(*(reseeded(own, copies * seed + copy) for copy in range(copies)), gap_s=gap_s)
    if not in_rounds(own):
        return whole[:requests]
    units = whole.units()
    before = np.cumsum(np.bincount(units)) - np.bincount(units)
    whole = whole[before[units] < requests]
    return whole[whole.arrival_s.argsort(kind="stable")]


def scaled_to(workload: Workload, rate_rps: float) -> Workload:
    """Return a draw at a rate: of sessions that of their starts, for later rounds come when they come."""
    if not in_rounds(workload):
        return scale_rate(workload, rate_rps / own_rate_rps(workload))
    starts_s = workload.arrival_s[np.unique(workload.units(), return_index=True)[1]]
    per_s = (len(starts_s) - 1) / max(1e-9, float(starts_s.max() - starts_s.min()))
    return scale_rate(workload, rate_rps / (per_s * len(workload) / len(starts_s)))


class _TooManyMissed(Exception):
    """Ends a run that cannot attain the level any more, with the request that told so."""


def attempt(
    setting: Setting,
    rate_rps: float,
    seed: int,
    requests: int,
    excerpt: bool = False,
    level: float = 0.0,
) -> dict[str, Any]:
    """Return what came of a run of a ``TrialLength``: the attainment of those that count, and percentiles of
    their latencies in seconds.

    A run that cannot attain ``level`` any more ends there. Then ``attainment`` is the most that it might have
    been, and all else is ``until``, the place of the request that told so as a share of all. A round waits
    for the answer before it, and its client's pause. ``gpu_hours`` and the like are left to who knows the
    deployment.
    """
    before, after = (math.ceil(rate_rps * (BEFORE_S, AFTER_S)[at]) if excerpt else 0 for at in (0, 1))
    workload = drawn(setting.workload, before + requests + after, seed)
    settings = replace(setting.settings, closed_loop=in_rounds(workload))
    counted = np.zeros(len(workload), dtype=bool)
    counted[before : len(workload) - after] = True
    count, misses = int(counted.sum()), 0

    def missed(at: int) -> None:
        nonlocal misses
        misses += bool(counted[at])
        if count - misses < level * count:
            raise _TooManyMissed(at)

    arrivals = scaled_to(workload, rate_rps)
    served = arrivals, setting.make_system(), setting.fleet.replicas(), settings
    residents, until_s = None, math.inf
    if excerpt:
        residents = MidAnswers(requests_of(setting.workload), rate_rps, seed)
        until_s = float(arrivals.arrival_s[-1])
    try:
        run = simulate(*served, missed=missed, residents=residents, until_s=until_s)
    except _TooManyMissed as ended:
        return {"attainment": (count - misses) / count, "until": ended.args[0] / len(workload)}
    table = run.requests
    ok = table.ok & counted
    ttft, tpot = table.ttft_s[ok], table.tpot_s[ok]
    return {
        "attainment": float(table.attained[counted].mean()),
        "requests": count,
        "ttft_p95_s": _p95(ttft),
        "tpot_p95_s": _p95(tpot),
        "flips": run.flips,
        "kv_transfer_bytes": run.kv_transfer_bytes,
        "within_ttft": float((table.ttft_s <= setting.settings.slo.ttft_s)[counted].mean()),
    }


def _p95(values: Any) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.percentile(known, 95)) if len(known) else None


def trial_job(
    setting: Setting, title: str, rate_rps: float, seed: int, length: TrialLength, level: float = 0.0
) -> Job:
    """Return the job of ``attempt``. Rates are rounded, so that a search finds those of another one."""
    rounded = float(f"{rate_rps:.4g}")
    run = {"rate_rps": rounded, "seed": seed, "requests": length.requests}
    special = {"excerpt": length.excerpt, "level": level}
    return job_of(attempt, setting, title, **run, **{name: value for name, value in special.items() if value})


def without_prefix_cache(setting: Setting) -> Setting:
    """Return the setting with engines that compute every prompt whole."""
    fleet = setting.fleet
    return replace(setting, fleet=replace(fleet, engine=replace(fleet.engine, prefix_cache=False)))
