"""Whether what is deployed is still the best for the traffic of a gateway's journal, window by window."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.instance import Role
from tidegate.costs.parallel import profiles_on
from tidegate.experiments.jobs import Workers
from tidegate.planner.answer import AS_GOOD, exceeds, with_seeds
from tidegate.planner.deployment import Deployment, Offer, PoolOf, ReplicaKind, deployment
from tidegate.planner.question import Question, cached_share
from tidegate.planner.search import PlanSearch
from tidegate.planner.transition import MovePrices, Transition, payback_s, transition
from tidegate.workloads.choice import WorkloadChoice, load_workload, own_rate_rps, requests_of
from tidegate.workloads.trace import Workload

FEWEST_REQUESTS = 200
"""Of a window that can be told anything of."""
SURE = 0.9
"""Probability of a gain of more than 3 % from which on a move is proposed."""
LATE_S = 60.0
"""A growing journal has a line per request that ended: a window is looked at when one that arrived so long
after it has. Answers that take longer are not in it."""
POLL_S, MOST_POLL_S = 2.0, 30.0
"""A journal that has grown is read whole again: after twice as long each time that it was in vain."""


NO_MOVE = Transition(0, 0, 0, 0, 0.0, 0.0)


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
    move: Transition = NO_MOVE
    payback_s: float = math.inf

    def sentence(self, level: float, within_s: float) -> str:
        """Say whether to move, what that gains, and what it costs; to be paid back ``within_s`` seconds."""
        at = f"from {self.start_s:.0f} s, {self.rate_rps:.3g} requests/s: what is deployed"
        has = f"serves up to {self.deployed_rps:.4g}/s and attains {self.deployed_attains:.1%}"
        if self.best is None:
            return f"{at} is still the best, {has}"
        gain = self.best_rps / self.deployed_rps - 1.0 if self.deployed_rps else float("inf")
        urgent = self.deployed_attains < level <= self.best_attains
        text = (
            f"{at} {has}, and is no longer the best: {self.best.label} serves {gain:.0%} more and attains "
            f"{self.best_attains:.1%}"
        )
        text += f"; a move ({self.move.title}) costs {self.move.cost_gpu_s:,.0f} GPU-seconds, "
        if self.move.kv_gpu_s:
            text += f"{self.move.kv_gpu_s:,.0f} of them for lost KV, "
        text += f"and pays back in {self.payback_s:,.0f} s"
        if self.payback_s > within_s:
            return text + f", not within {within_s:,.0f} s: stay"
        return text + (": move now" if urgent else ": move")


async def verdicts(
    question: Question,
    chosen: Deployment,
    every_s: float,
    workers: Workers,
    *,
    start_delay_s: float = 0.0,
    follow: bool = False,
) -> AsyncIterator[WindowVerdict]:
    """Yield a verdict for each window of the question's workload that has requests enough.

    With ``follow`` the file may grow: a window is looked at when it is over, and there is no end. A server
    takes ``start_delay_s`` to load its model. Raises ConfigError where no window has requests enough.
    """
    choice, start_s, any_of = question.setting.workload, 0.0, False
    whole = await _grown(choice, 0.0) if follow else requests_of(choice)
    while follow or start_s <= whole.arrival_s[-1]:
        if follow and whole.arrival_s[-1] < start_s + every_s + LATE_S:
            whole = await _grown(choice, start_s + every_s + LATE_S)
        inside = ((whole.arrival_s >= start_s) & (whole.arrival_s < start_s + every_s)).sum()
        if inside >= FEWEST_REQUESTS:
            any_of = True
            window = replace(choice, start_s=start_s, duration_s=every_s)
            asked = replace(question, setting=replace(question.setting, workload=window))
            yield await _verdict(asked, chosen, start_s, workers, start_delay_s)
        start_s += every_s
    if not any_of:
        raise ConfigError(f"no {every_s:g} s of the journal hold {FEWEST_REQUESTS} requests; give --every")


async def until_readable(choice: WorkloadChoice) -> None:
    """Wait until a growing journal holds a request. Raises ConfigError where it is no file."""
    await _grown(choice, 0.0)


async def _grown(choice: WorkloadChoice, until_s: float) -> Workload:
    """Return a growing file's requests once there is one that arrived at ``until_s`` or later; it is read
    again whenever its size is another. Raises ConfigError where it is no file."""
    path, seen, wait_s = Path(choice.trace), -1, POLL_S
    while True:
        size = _size(path)
        if size != seen:
            seen, wait_s = size, min(MOST_POLL_S, 2.0 * wait_s)
            try:
                found = load_workload(choice)
            except TraceError:  # it is empty, has no outcome yet, or ends in the middle of a line
                found = None
            if found is not None and len(found) and found.arrival_s[-1] >= until_s:
                return found
        await asyncio.sleep(wait_s)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"--watch {path}: {error.strerror or error}") from None


async def _verdict(
    question: Question, chosen: Deployment, start_s: float, workers: Workers, start_delay_s: float
) -> WindowVerdict:
    part, parts = question.part(question.most_instances)
    if any(pool.count % parts for pool in chosen.pools):
        part, parts = question, 1
    of_part = chosen.part(parts)
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
    best_rps, whole_best = parts * rival.goodput_rps, best.times(parts)
    traffic = requests_of(question.setting.workload)
    # Drained at the TPOT target, as a fleet that is worth leaving is near it.
    drain_s = float(traffic.output_tokens.mean()) * question.setting.settings.loosest_slo.tpot_s
    prices = MovePrices(start_delay_s, drain_s, cached_share(traffic))
    move = transition(chosen, whole_best, prices)
    pays_s = payback_s(move.cost_gpu_s, sum(chosen.gpus.values()), deployed_rps, best_rps)
    return WindowVerdict(
        start_s, rate_rps, deployed_rps, attains, whole_best, best_rps, best_attains, move, pays_s
    )
