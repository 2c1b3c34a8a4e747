"""The cheapest deployment that serves a rate."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tidegate.planner.deployment import Deployment
from tidegate.planner.moves import neighbours

if TYPE_CHECKING:
    from tidegate.planner.search import PlanSearch

ROUNDS = 5
MARGINS = (1.0, 1.05, 1.12, 1.2, 1.35, 1.6)
"""Times the rate, for which the program is asked until one of its deployments serves the rate itself."""


async def cheapest(search: PlanSearch, rate_rps: float) -> list[Deployment]:
    """Return deployments that serve ``rate_rps`` at the level, the cheapest first; none where none was found.

    Every family is asked for more and more until a proposal serves the rate. From each of those the search
    goes on to cheaper neighbours.
    """
    level, serving = search.question.level, dict[Deployment, float]()

    async def serves(chosen: Deployment) -> bool:
        if chosen not in serving:
            serving[chosen] = await search.attainment(chosen, rate_rps)
        return serving[chosen] >= level

    async def first_of(family: str) -> Deployment | None:
        for margin in MARGINS:
            for chosen in search.by_every_system(search.proposals(family, 2, margin * rate_rps)):
                if await serves(chosen):
                    return chosen
        return None

    starts = await asyncio.gather(*map(first_of, search.question.families))
    for start in starts:
        at = start
        for _ in range(ROUNDS):
            if at is None:
                break
            price = at.price_per_h
            near = [n for n in neighbours(search.question, at) if n.price_per_h < price - 1e-9]
            near.sort(key=lambda each: each.price_per_h)
            verdicts = await asyncio.gather(*map(serves, near))
            at = next((each for each, good in zip(near, verdicts, strict=True) if good), None)
    found = [each for each, share in serving.items() if share >= level]
    found.sort(key=lambda each: (each.price_per_h, -serving[each]))
    kept = found[: search.question.top]
    for family in search.question.families:
        kept += [each for each in found if each.family == family and each not in kept][:1]
    await asyncio.gather(*(search.first_measured(each, rate_rps) for each in kept))
    return kept
