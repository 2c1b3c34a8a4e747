"""From the model of ``ratio`` to whole instances: the fewest that serve a rate, or the best use of a fixed
fleet."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from tidegate.core.errors import ConfigError
from tidegate.policies.dopd.ratio import Attained, Sizing

MIXED_GAIN = 1.05
"""Goodput of a mixed fleet over that of the best split from which it is preferred: the model's error."""
Rates = tuple[float, float]
"""Requests per second that the prefill and the decode pool have to serve."""
REACHED = 0.99
"""Of what any number of instances attains: the level to size for, where the wanted one is above it."""


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """How many instances do what; either ``mixed`` or both others are 0.

    It is sized to the traffic's rate, or where ``goodput_rps`` is given a fixed fleet at that rate.
    ``prefill_needed`` and ``decode_needed`` instances would be busy with it all the time; ``attained`` is
    predicted. ``reason`` says it in a sentence.
    """

    prefill: int
    decode: int
    mixed: int
    prefill_needed: float
    decode_needed: float
    attained: Attained
    reason: str
    goodput_rps: float | None = None

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.mixed


def smallest_fleet(
    sizing: Sizing,
    level: float = 0.9,
    *,
    budget: int | None = None,
    least: int = 1,
    mixed: bool = True,
    decode_rate_rps: float | None = None,
) -> FleetPlan:
    """Return the fewest instances of which a share ``level`` of the traffic's requests attains.

    ``decode_rate_rps`` is what the decode pool has to serve where that is not the traffic's rate: it has been
    filled by what came before. A pool has at least ``least``; of equal totals the one that attains more is
    taken. Where more than
    ``budget`` would be needed, it is the best use of the budget. Without ``mixed`` it is always a split.
    Raises ConfigError for a budget that has no room for the least pools, and as ``Sizing`` does.
    """
    if budget is not None and budget < 2 * least and not (mixed and budget >= 1):
        raise ConfigError(f"a budget of {budget} instances has no room for pools of at least {least}")
    rate_rps = sizing.traffic.rate_rps
    rates_rps = rate_rps, rate_rps if decode_rate_rps is None else decode_rate_rps
    if not any(rates_rps):
        return FleetPlan(
            least, least, 0, 0.0, 0.0, sizing.at_best, f"nothing comes: {least} + {least} are the least"
        )
    wanted = min(level, REACHED * sizing.at_best.both)
    pools = _smallest_split(sizing, rates_rps, wanted, least)
    plan = _described(sizing, rates_rps, *pools, level)
    total = sum(pools)
    if mixed:
        fewer = _first(
            total, lambda count: sizing.mixed_attains(max(rates_rps), count).both >= max(wanted, 1e-9)
        )
        if fewer < total:
            plan = _mixed(
                sizing, max(rates_rps), fewer, f"two would be {pools[0]} + {pools[1]}, for it {plan.reason}"
            )
    if budget is None or plan.total <= budget:
        return plan
    best = best_split(sizing, budget, level, mixed=mixed)
    held = f"a budget of {budget} holds, where {plan.total} would be needed: {best.reason}"
    return replace(best, reason=held)


def smallest_mixed(sizing: Sizing, rate_rps: float, level: float, most: int) -> tuple[int, str]:
    """Return the fewest instances up to ``most`` that attain ``level`` where all do both, with why."""
    wanted = min(level, REACHED * sizing.at_best.both)
    count = _first(most, lambda each: sizing.mixed_attains(rate_rps, each).both >= max(wanted, 1e-9))
    attained = sizing.mixed_attains(rate_rps, count)
    reason = (
        f"{rate_rps:.3g} requests/s would keep {rate_rps * sizing.work_s:.1f} instances busy with prompts, "
        f"{rate_rps * sizing.decode_work_s:.1f} with answers; {count} that do both keep "
        f"{100 * attained.ttft:.0f} % of first tokens within {sizing.slo.ttft_s:.3g} s and "
        f"{100 * attained.tpot:.0f} % of answers within {1e3 * sizing.slo.tpot_s:.3g} ms a token"
    )
    return count, reason


def best_split(sizing: Sizing, instances: int, level: float = 0.9, *, mixed: bool = True) -> FleetPlan:
    """Return the use of exactly ``instances`` with the greatest predicted goodput, whatever the traffic's
    rate.

    It begins at the balance, rounded both ways, and goes on in the direction that serves more: goodput over
    splits has one peak, for it is the lesser of one that grows with the pool and one that falls. Raises
    ConfigError for no instances, or for one without ``mixed``.
    """
    if instances < (1 if mixed else 2):
        raise ConfigError(f"{instances} instances cannot be split into two pools")
    wanted = min(level, REACHED * sizing.at_best.both)
    both_rps = sizing.mixed_goodput_rps(instances, wanted) if mixed else 0.0
    if instances == 1:
        return replace(_mixed(sizing, both_rps, 1, "one instance does both"), goodput_rps=both_rps)
    most = instances - 1
    balance = instances * sizing.ratio / (1.0 + sizing.ratio) if math.isfinite(sizing.ratio) else float(most)
    found: dict[int, float] = {}

    def goodput_rps(prefill: int) -> float:
        if prefill not in found:
            found[prefill] = sizing.split_goodput_rps(prefill, instances - prefill, wanted)
        return found[prefill]

    at = max(
        (min(max(1, whole), most) for whole in (round(balance), int(balance), int(balance) + 1)),
        key=goodput_rps,
    )
    for step in (-1, 1):
        while 1 <= at + step <= most and goodput_rps(at + step) > goodput_rps(at):
            at += step
    split = f"{at} + {instances - at}"
    if both_rps > MIXED_GAIN * found[at]:
        why = f"{both_rps:.3g} requests/s, and {found[at]:.3g} as {split}"
        return replace(_mixed(sizing, both_rps, instances, why), goodput_rps=both_rps)
    plan = _described(sizing, (found[at], found[at]), at, instances - at, level)
    reason = f"of {instances} instances {split} serve most, {found[at]:.3g} requests/s, which {plan.reason}"
    return replace(plan, reason=reason, goodput_rps=found[at])


def _smallest_split(sizing: Sizing, rates_rps: Rates, wanted: float, least: int) -> tuple[int, int]:
    """Return the split of least total that attains ``wanted``, of equal totals the one that attains most."""
    most = 2 * least + 2 * math.ceil(max(rates_rps) * (sizing.work_s + sizing.decode_work_s)) + 8

    def fewest(needed: float, share: Callable[[int], float]) -> int:
        if not wanted:
            return max(least, math.ceil(needed))
        return max(least, _first(most, lambda count: share(count) >= wanted))

    prefill_rps, decode_rps = rates_rps
    prefill = fewest(prefill_rps * sizing.work_s, lambda count: sizing.ttft_share(prefill_rps, count))
    decode = fewest(decode_rps * sizing.decode_work_s, lambda count: sizing.tpot_share(decode_rps, count))
    # Neither pool can be smaller than this; what is lacking together, one more of either may bring.
    for more in range(most):
        options = [(prefill + one, decode + more - one) for one in range(more + 1)]
        best = max(options, key=lambda pools: attains(sizing, rates_rps, *pools).both)
        if attains(sizing, rates_rps, *best).both >= wanted:
            return best
    return prefill, decode


def _first(end: int, enough: Callable[[int], bool]) -> int:
    """Return the first count from 1 to ``end`` that is enough, ``end`` if none before it is."""
    return 1 + bisect_left(range(1, end), True, key=enough)


def attains(sizing: Sizing, rates_rps: Rates, prefill: int, decode: int) -> Attained:
    """Return what a split attains where its pools have rates of their own."""
    return Attained(sizing.ttft_share(rates_rps[0], prefill), sizing.tpot_share(rates_rps[1], decode))


def _described(sizing: Sizing, rates_rps: Rates, prefill: int, decode: int, level: float) -> FleetPlan:
    """Return a split with what is predicted of it, and why it is what it is."""
    rate_rps = rates_rps[0]
    prefill_needed, decode_needed = rate_rps * sizing.work_s, rates_rps[1] * sizing.decode_work_s
    attained = attains(sizing, rates_rps, prefill, decode)
    batch, tpot = sizing.decode.batch, f"{1e3 * sizing.slo.tpot_s:.3g} ms"
    limit = "in its KV" if batch >= sizing.decode.kv_batch else f"within {tpot}"
    reason = (
        f"needs {prefill_needed:.1f} prefill instances because {rate_rps:.3g} requests/s take "
        f"{1e3 * sizing.work_s:.3g} ms each ({sizing.convexity:.2f} times what their mean length takes), and "
        f"{decode_needed:.1f} decode instances because {decode_needed * batch:.0f} answers run at once and "
        f"one decodes {batch} {limit}; {prefill} + {decode} keep {100 * attained.ttft:.0f} % of first tokens "
        f"within {sizing.slo.ttft_s:.3g} s and {100 * attained.tpot:.0f} % of answers within {tpot} a token"
    )
    if sizing.at_best.both < level:
        reason += f" (at best {100 * sizing.at_best.both:.0f} % can be in time, on however many)"
    return FleetPlan(prefill, decode, 0, prefill_needed, decode_needed, attained, reason)


def _mixed(sizing: Sizing, rate_rps: float, count: int, why: str) -> FleetPlan:
    """Return a fleet of mixed instances, with why it is no split."""
    attained = sizing.mixed_attains(rate_rps, count)
    needed = rate_rps * sizing.work_s, rate_rps * sizing.decode_work_s
    reason = f"{count} mixed, because separate pools do not pay: {why}"
    return FleetPlan(0, 0, count, *needed, attained, reason)
