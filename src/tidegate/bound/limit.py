"""The clairvoyant fluid bound: a rate that no schedule on given hardware can serve within an SLO.

Every second of an instance has a price and every piece of work a worth, such that no admissible step is
worth more than its time costs; weights over time find where a trace cannot be served. A solver proposes
prices and intervals; both are checked, so a bad proposal loosens the bound and cannot break it.
``docs/fluid-limit.md`` has the argument for each part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidegate.bound.demand import Batching, Demand, DemandKind, demand_of, hopeless, kinds_of
from tidegate.bound.prices import answer_worth, prompt_worth
from tidegate.bound.search import Excluded, Market, Search
from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.workloads.trace import TraceRecord

_ONE_PHASE = 0.9
"""Share of the deciding work from which on one phase is said to bind alone."""
_RELIEF = 0.98
"""A constraint is named when doubling it lowers the cost of the deciding work below this."""
_BURST = 0.6
"""Intervals that take less than this share of the trace are called bursts."""


@dataclass(frozen=True, slots=True)
class FluidLimit:
    """Above ``limit_rps`` no schedule attains the SLO for a share ``level`` of the offered requests.

    It is ``scale`` times the trace's own rate (gaps between arrivals over the time they span). Both are
    None when this trace is too short to exclude any rate, and 0 when more than 1 - ``level`` of the requests
    miss even alone (``hopeless`` counts those) or come at one moment with others. ``binding`` says in words
    what binds.
    """

    limit_rps: float | None
    scale: float | None
    binding: str
    level: float
    hopeless: int


def fluid_limit(
    records: Sequence[TraceRecord],
    profiles: Sequence[Profile],
    instances: Sequence[Instance],
    slo: Slo,
    *,
    level: float,
    max_batch_tokens: int,
    max_num_seqs: int,
    host_s: float = 0.0,
) -> FluidLimit:
    """Bound the goodput of any system on ``instances``, entry by entry with ``profiles``.

    ``max_batch_tokens``, ``max_num_seqs`` and ``host_s`` are the engine's; where instances differ, the
    largest, largest and smallest. Takes a few seconds of CPU. Raises ConfigError for an empty fleet or
    trace, a level outside (0, 1], or a batch without room.
    """
    if not 0 < level <= 1:
        raise ConfigError(f"the attainment level is a share between 0 and 1, got {level}")
    if max_batch_tokens < 1 or max_num_seqs < 1 or not 0 <= host_s < float("inf"):
        raise ConfigError(
            "a batch needs room for at least one token of one sequence, and a host time of 0 or more"
        )
    if not records:
        raise ConfigError("a limit needs a trace with at least one request")
    kinds = kinds_of(profiles, instances)
    batching = Batching(max_batch_tokens, max_num_seqs, host_s)
    demand = demand_of(records)
    lost = hopeless(demand, kinds, slo, batching)
    n_lost = int(lost.sum())
    if (len(demand) - n_lost) / len(demand) < level:
        words = (
            f"{n_lost / len(demand):.1%} of the requests miss the SLO {slo} even alone on an idle instance"
        )
        return FluidLimit(0.0, 0.0, words, level, n_lost)
    span_s = float(demand.arrival_s[-1] - demand.arrival_s[0])
    if span_s <= 0.0:
        return FluidLimit(None, None, "nothing: all requests arrive at once", level, n_lost)
    market = Market.of(demand.only(~lost), kinds, batching, slo)
    found = Search(market, level, n_lost).run()
    if found is None:
        words = "nothing: the trace is too short to miss at any rate"
        return FluidLimit(None, None, words, level, n_lost)
    words = _binding(market, batching, found)
    if found.scale == 0.0:
        words = f"requests that come at one moment: {words}"
    return FluidLimit(found.scale * (len(demand) - 1) / span_s, found.scale, words, level, n_lost)


def _binding(market: Market, batching: Batching, found: Excluded) -> str:
    """Say which phase takes the fleet's time, which constraint makes it dear, and where in the trace."""
    prefill, answer = found.certificate.weighed(found.spans, found.worth)
    deciding = prefill + answer > 0.0
    kept = deciding & (prefill + answer <= 1.0)
    if kept.any():
        deciding = kept
    share = float(prefill[deciding].sum() / max((prefill + answer)[deciding].sum(), 1e-300))
    if share >= _ONE_PHASE:
        words = "prefill compute"
    elif share <= 1.0 - _ONE_PHASE:
        words = "decode compute"
    else:
        words = f"prefill ({share:.0%}) and decode ({1 - share:.0%}) compute"
    work = replace(
        market.demand,
        new_tokens=market.demand.new_tokens * (prefill > 0.0),
        decodes=market.demand.decodes * (answer > 0.0),
    )
    held = _held_back(market, batching, work.only(deciding))
    return "".join([words, f", held back by {held}" if held else "", _burst(market, found)])


def _held_back(market: Market, batching: Batching, work: Demand) -> str:
    """Name the constraint whose doubling makes ``work`` cheaper by most, if any does by enough."""

    def cost(kinds: Sequence[DemandKind], slo: Slo, batching: Batching) -> float:
        changed = Market.of(work, kinds, batching, slo)
        prices = changed.prices(work)
        if prices is None:
            return float("inf")
        return float((prompt_worth(prices, work) + answer_worth(prices, work, slo.tpot_s)).sum())

    kinds, slo = market.kinds, market.slo
    roomy = [replace(kind, kv_tokens=2 * kind.kv_tokens) for kind in kinds]
    usual = cost(kinds, slo, batching)
    relieved = {
        "KV memory": cost(roomy, slo, batching),
        "the TPOT target": cost(kinds, replace(slo, tpot_s=2 * slo.tpot_s), batching),
        "the TTFT target": cost(kinds, replace(slo, ttft_s=2 * slo.ttft_s), batching),
        "max_num_seqs": cost(kinds, slo, replace(batching, max_num_seqs=2 * batching.max_num_seqs)),
        "max_batch_tokens": cost(
            kinds, slo, replace(batching, max_batch_tokens=2 * batching.max_batch_tokens)
        ),
    }
    name = min(relieved, key=lambda one: relieved[one])
    return name if relieved[name] < _RELIEF * usual else ""


def _burst(market: Market, found: Excluded) -> str:
    """Say in which part of the trace the heaviest intervals are, unless they cover most of it."""
    spans, intervals = found.spans, found.certificate.intervals
    heavy = found.certificate.multipliers * [spans.length(each) for each in intervals]
    arrival_s = market.demand.arrival_s
    covered = np.zeros(len(arrival_s))
    for each, weight in zip(intervals, heavy, strict=True):
        if weight > 0.05 * heavy.max():
            inside = np.flatnonzero(spans.prefill_end[each.first :] <= spans.end(each))
            covered[each.first] += 1.0
            covered[each.first + inside[-1]] -= 1.0
    covered = np.cumsum(covered)
    share = float(np.diff(arrival_s)[covered[:-1] > 0.0].sum() / (arrival_s[-1] - arrival_s[0]))
    used = np.flatnonzero(covered > 0.0)
    if share >= _BURST or not len(used):
        return ""
    start_s, end_s = arrival_s[used[0]], arrival_s[used[-1] + 1]
    return f", in bursts between {start_s:.0f} s and {end_s:.0f} s of the trace"
