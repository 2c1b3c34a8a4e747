"""What is achievable, beside the systems of a comparison: the mean over draws of what a search attains."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tidegate.experiments.achievable import SERVED_BY, SIMULATIONS, find_achievable, title_of
from tidegate.experiments.jobs import Workers
from tidegate.experiments.run import run_once
from tidegate.experiments.setting import Setting
from tidegate.experiments.systems import Candidate
from tidegate.reports.comparison import ComparedSystem
from tidegate.workloads.choice import requests_of

START = 0.25
"""Of the limit: where a search begins if no system attains."""
SAMPLED, SAMPLED_RPS, DEARER = 500, 2.0, 1.5
"""Requests of the run that tells how long a search takes, their rate per instance, and what one of the search
takes on average in its place."""


async def find_reference(
    setting: Setting,
    level: float,
    known: Mapping[int, Mapping[Candidate, float]],
    limit_rps: float | None,
    workers: Workers,
) -> tuple[float, str]:
    """Return the mean of what is achievable over the seeds of ``known``, and in words how.

    ``known`` has the goodputs of each seed's draw: what is achievable is not below the best of them.
    """
    start_rps = START * limit_rps if limit_rps else None
    searches = [
        find_achievable(setting, level, seed, workers, start_rps=start_rps, known=goodputs)
        for seed, goodputs in known.items()
    ]
    found = await asyncio.gather(*searches)
    rate_rps = sum(one.rate_rps for one in found) / len(found)
    first = found[0]
    return rate_rps, (
        f"{rate_rps:.2f} requests/s at {100 * level:g} %, by {title_of(first.candidate)} with "
        f"{100 * float(first.given_up.mean()):.1f} % of the requests not served"
    )


async def with_reference(
    setting: Setting,
    compared: Sequence[tuple[ComparedSystem, Sequence[Candidate]]],
    workers: Workers,
) -> tuple[list[ComparedSystem], str]:
    """Return the systems of ``compared`` with what is achievable at each level, and in words how.

    Each comes with the candidate of each of its levels.
    """
    columns, words = [], []
    for number, each in enumerate(zip(*(entry.levels for entry, _ in compared), strict=True)):
        known = {
            seed: {
                candidates[number]: found.by_seed[seed]
                for (_, candidates), found in zip(compared, each, strict=True)
                if seed < found.seeds
            }
            for seed in range(max(found.seeds for found in each))
        }
        rate_rps, how = await find_reference(setting, each[0].level, known, each[0].limit_rps, workers)
        columns.append([replace(one, achievable_rps=rate_rps) for one in each])
        words.append(how)
    rows = zip((entry for entry, _ in compared), zip(*columns, strict=True), strict=True)
    return [replace(entry, levels=levels) for entry, levels in rows], as_sentence(words)


def as_sentence(words: Sequence[str]) -> str:
    """Say how what is achievable was reached at every level."""
    return f"A clairvoyant search attains {'; '.join(words)}."


def expected_cpu_s(setting: Setting, searches: int) -> float:
    """Measure what a simulation takes here, and tell what as many searches take at most."""
    workload = replace(setting.workload, limit=SAMPLED)
    few = SERVED_BY[0].applied(replace(setting, workload=workload))
    count, offered = len(requests_of(workload)), len(requests_of(setting.workload))
    cpu_s = run_once(few, rate_rps=SAMPLED_RPS * setting.fleet.size).facts.cpu_s
    return searches * SIMULATIONS * DEARER * cpu_s * offered / count
