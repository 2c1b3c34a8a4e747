"""The deployments next to one: a replica more here or there, another size, another budget of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tidegate.core.instance import Role
from tidegate.planner.deployment import Deployment, PoolOf, deployment
from tidegate.planner.question import CHUNKS_TOKENS, Question


def fits(question: Question, chosen: Deployment) -> bool:
    """Tell whether a deployment is within the budget and serves both phases."""
    roles = {pool.role for pool in chosen.pools}
    both = Role.MIXED in roles or {Role.PREFILL, Role.DECODE} <= roles
    have = {offer.gpu: offer.count for offer in question.offers}
    return both and all(count <= have.get(gpu, 0) for gpu, count in chosen.gpus.items())


def neighbours(question: Question, chosen: Deployment) -> list[Deployment]:
    """Return the deployments a move away that fit the budget, each once, of the same family.

    A move takes one replica out of a pool, or all, or none, and fills the GPUs that are free with replicas of
    one kind in one role; or it takes another budget of a step for all pools of a role, or another system.
    """
    others = (name for name in question.systems[chosen.family] if name != chosen.system)
    found = dict.fromkeys(replace(chosen, system=name) for name in others)
    for pools in (*_refilled(question, chosen), *_chunks(chosen.pools)):
        made = deployment(chosen.system, pools)
        if made != chosen and made.family == chosen.family and fits(question, made):
            found[made] = None
    return list(found)


def _refilled(question: Question, chosen: Deployment) -> Iterator[list[PoolOf]]:
    pools = chosen.pools
    chunks = {pool.role: pool.chunk_tokens for pool in reversed(pools)}
    have = {offer.gpu: offer.count for offer in question.offers}
    left = [list(pools)]
    for at, pool in enumerate(pools):
        others = [p for i, p in enumerate(pools) if i != at]
        left += [[*others, replace(pool, count=pool.count - 1)], others]
    for kept in left:
        taken = deployment(chosen.system, kept).gpus
        yield kept
        for role, chunk in chunks.items():
            for kind in question.kinds:
                room = (have[kind.gpu] - taken[kind.gpu]) // kind.tp
                yield from ([*kept, PoolOf(role, kind, many, chunk)] for many in {1, room} if many > 0)


def _chunks(pools: Sequence[PoolOf]) -> Iterator[list[PoolOf]]:
    for role in dict.fromkeys(pool.role for pool in pools):
        for chunk in CHUNKS_TOKENS[role]:
            yield [replace(pool, chunk_tokens=chunk) if pool.role is role else pool for pool in pools]
