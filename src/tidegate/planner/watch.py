"""Whether what is deployed is still the best for the traffic of a gateway's journal, window by window."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.costs.parallel import profiles_on
from tidegate.experiments.jobs import Workers
from tidegate.planner.answer import AS_GOOD, exceeds, with_seeds
from tidegate.planner.deployment import Deployment, Offer, PoolOf, ReplicaKind, deployment
from tidegate.planner.question import Question
from tidegate.planner.search import PlanSearch
from tidegate.workloads.choice import own_rate_rps, requests_of

FEWEST_REQUESTS = 200
"""Of a window that can be told anything of."""
SURE = 0.9
"""Probability of a gain of more than 3 % from which on a move is proposed."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """What runs, of a plan.json: its budget, model and first deployment."""

    model: str
    offers: tuple[Offer, ...]
    chosen: Deployment

    @classmethod
    def read(cls, path: Path) -> Deployed:
        """Read the first deployment of a plan. Raises ConfigError for a file that is none."""
        try:
            plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if plan["format"] != "tidegate-plan":
                raise ValueError("another format")
            found = tuple(Offer(each["gpu"], each["count"], each["price_per_h"]) for each in plan["offers"])
            first = plan["plans"][0]
            pools = [_pool(each, plan["model"], found) for each in first["pools"]]
            return cls(plan["model"], found, deployment(first["system"], pools))
        except OSError as error:
            raise ConfigError(f"--deployed {path}: {error.strerror or error}") from None
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"--deployed {path} is no plan.json of `tidegate plan --out`: {error}"
            ) from None


def _pool(data: Mapping[str, Any], model: str, offered: tuple[Offer, ...]) -> PoolOf:
    gpu, tp = data["gpu"], data["tp"]
    price = next(offer.price_per_h for offer in offered if offer.gpu == gpu)
    kind = ReplicaKind(gpu, tp, profiles_on(gpu, model, [tp])[tp], tp * price)
    return PoolOf(Role[data["role"].upper()], kind, data["replicas"], data["chunk_tokens"])


@dataclass(frozen=True, slots=True)
class WindowVerdict:
    """One window, from ``start_s`` of the journal on, with the goodputs of what is deployed and of the best,
    and what each attains at the window's own rate. ``best`` is None where the deployed is as good."""

    start_s: float
    rate_rps: float
    deployed_rps: float
    deployed_attains: float
    best: Deployment | None = None
    best_rps: float = 0.0
    best_attains: float = 0.0

    def sentence(self, level: float) -> str:
        """Say whether to move, and what that gains."""
        at = f"from {self.start_s:.0f} s, {self.rate_rps:.3g} requests/s: what is deployed"
        has = f"serves up to {self.deployed_rps:.4g}/s and attains {self.deployed_attains:.1%}"
        if self.best is None:
            return f"{at} is still the best, {has}"
        gain = self.best_rps / self.deployed_rps - 1.0 if self.deployed_rps else float("inf")
        urgent = self.deployed_attains < level <= self.best_attains
        return (
            f"{at} {has}, and is no longer the best: {self.best.title} serves {gain:.0%} more and attains "
            f"{self.best_attains:.1%}" + ("; move now" if urgent else "")
        )


async def verdicts(
    question: Question, chosen: Deployment, every_s: float, workers: Workers
) -> AsyncIterator[WindowVerdict]:
    """Yield a verdict for each window of the question's workload that has requests enough.

    Raises ConfigError where no window has.
    """
    whole = requests_of(question.setting.workload)
    end_s, start_s, any_of = float(whole.arrival_s[-1]), 0.0, False
    while start_s <= end_s:
        choice = replace(question.setting.workload, start_s=start_s, duration_s=every_s)
        inside = ((whole.arrival_s >= start_s) & (whole.arrival_s < start_s + every_s)).sum()
        if inside >= FEWEST_REQUESTS:
            any_of = True
            asked = replace(question, setting=replace(question.setting, workload=choice))
            yield await _verdict(asked, chosen, start_s, workers)
        start_s += every_s
    if not any_of:
        raise ConfigError(f"no {every_s:g} s of the journal hold {FEWEST_REQUESTS} requests; give --every")


async def _verdict(question: Question, chosen: Deployment, start_s: float, workers: Workers) -> WindowVerdict:
    part, parts = question.part(question.most_instances)
    if any(pool.count % parts for pool in chosen.pools):
        part, parts = question, 1
    of_part = replace(chosen, pools=tuple(replace(pool, count=pool.count // parts) for pool in chosen.pools))
    search = PlanSearch(part, workers)
    found = await search.run(also=[of_part])
    rate_rps = own_rate_rps(requests_of(question.setting.workload))
    await search.first_measured(of_part)
    best = max(found, key=lambda each: search.known.goodput_rps[each], default=of_part)
    deployed, rival = await asyncio.gather(with_seeds(search, of_part), with_seeds(search, best))
    attains = await search.attainment(of_part, rate_rps / parts)
    deployed_rps = parts * deployed.goodput_rps
    gain = exceeds(rival, (1.0 + AS_GOOD) * np.array(deployed.by_seed))
    if best == of_part or gain < SURE:
        return WindowVerdict(start_s, rate_rps, deployed_rps, attains)
    best_attains = await search.attainment(best, rate_rps / parts)
    best_rps = parts * rival.goodput_rps
    return WindowVerdict(start_s, rate_rps, deployed_rps, attains, best.times(parts), best_rps, best_attains)
