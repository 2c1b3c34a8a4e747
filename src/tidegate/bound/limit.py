"""The clairvoyant fluid bound: a rate that no schedule on given hardware can serve within an SLO.

**The question.** Play a trace ``s`` times as fast. Which share of its requests could attain their SLO if
the scheduler knew the future, composed every step at will (chunks, decodes or both), and flipped roles and
moved KV for nothing? The bound answers with a share that is never too small. The limit is the smallest
``s`` at which that share is below ``level``, to half a percent; every larger ``s`` is excluded with it.

**Prices** (``limit_prices``). This is the dual of the linear program over step compositions, in plain
words. Give a second of each kind of instance a price, and every piece of work a worth: a prompt token at
its position, a decode at its context. A price list is fair if no admissible step is worth more than its
time costs. Then all work that any schedule does in some time is worth at most that time's price. Fairness
is checked, not assumed: for every batch size, with the new tokens and the contexts at the ends and kinks
between which worth less cost is linear. Which list is used is free, and a solver only proposes it; a bad
one loosens the bound and cannot break it. What makes each part valid:

- *Steps.* Time is the profile's: chunks only, decodes only and mixed steps each by their own form, plus the
  host's time. Counting only the attaining members of a step leaves its form as it is and lowers its size;
  each form grows in all of its arguments, so the step takes at least the counted members' time.
- *Prompts.* However a prompt is cut, its attention is the integral of the position over its tokens. Each
  token is worth the lesser of its worths in pure and in mixed steps, since the schedule chooses. A step
  that holds a chunk of an attaining prompt ends within the TTFT target, which bounds its size.
- *Decodes.* A token after the first is one decode, at a context that is known; again the lesser worth
  counts.
- *TPOT.* The steps of an attaining answer last ``tpot * (tokens - 1)`` in all, at most. A price on a
  decode's time in a step enters the step's cost, and the allowance is given back per answer: a multiplier
  on this inequality.
- *Memory.* Resident tokens of a step's decodes fit the KV; those in blocks that another request names, too,
  are left out, for they may be held once. Queued, pinned and moving KV is left out, too.
- *Prefix reuse.* A block's prefill counts only where its id first appears, as with one unbounded cache for
  the whole cluster. Whoever computes it does so after that arrival, and before that request's first token.
- *Alone.* Requests that miss even alone on the best idle instance (``limit_demand.hopeless``) never count
  as attained.

**Time** (``limit_weights``). An attaining request's prefill lies between its arrival and ``ttft`` later,
its decodes between its arrival and ``ttft + tpot * (tokens - 1)`` later. Give time a weight that varies; a
request's work counts with the least weight in its interval. A step lies inside the intervals of all members
it counts, so their weights are at most the step's own, and worth times weight stays below price times
weight. So the worth of what attains is at most the weighted price of all time. Misses cost nothing and are
the dearest ones: sort by worth, and count what fits. Time after the last arrival is priced like any other,
so short traces are exact about their edges. Only the weights, like the prices, come from a solver.

**Monotone.** Weights are a sum of intervals. Played faster, the same requests fit into a shorter interval
that begins with the first of their arrivals and ends with the last of their deadlines: as much worth in
less time.

**What makes it loose.** Work flows: instances are not whole, a request may be in two places, steps need not
line up. TPOT and memory hold on average over what a step mix does. A burst shorter than a window (1/40 of
the trace) is seen only in part. Decodes may run right after the arrival or all at the end of their
interval. Answers of long reasoning make those intervals long. Few price lists are used.

**What it does not cover.** Arrivals that depend on the system (a closed loop). A token that a preempted
request gets from recomputing its KV is not a decode step; it is assumed to cost at least as much.
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
"""Weights on less than this share of the trace are called a burst."""


@dataclass(frozen=True, slots=True)
class FluidLimit:
    """Above ``limit_rps`` no schedule attains the SLO for a share ``level`` of the offered requests.

    It is ``scale`` times the trace's own rate (gaps between arrivals over the time they span). Both are
    None when this trace is too short to exclude any rate, and 0 when more than 1 - ``level`` of the requests
    miss even alone; ``hopeless`` counts those. ``binding`` says in words what binds.
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
    """Bound the goodput of any system on ``instances``, entry by entry with ``profiles``; see the module.

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
    words = _binding(market, batching, found, level)
    return FluidLimit(found.scale * (len(demand) - 1) / span_s, found.scale, words, level, n_lost)


def _binding(market: Market, batching: Batching, found: Excluded, level: float) -> str:
    """Say which phase takes the fleet's time, which constraint makes it dear, and where in the trace."""
    weight = found.weights.sum(axis=1)
    prefill, answer = found.worth.prefill @ weight, found.worth.answer @ weight
    heavy = found.weights.sum(axis=0)
    deciding = heavy[found.windows.first] > 0.0
    deciding &= prefill + answer <= np.quantile(prefill + answer, level)
    if not deciding.any():
        deciding[:] = True
    share = float(prefill[deciding].sum() / max((prefill + answer)[deciding].sum(), 1e-300))
    if share >= _ONE_PHASE:
        words = "prefill compute"
    elif share <= 1.0 - _ONE_PHASE:
        words = "decode compute"
    else:
        words = f"prefill ({share:.0%}) and decode ({1 - share:.0%}) compute"
    held = _held_back(market, batching, market.demand.only(deciding))
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
    """Say in which part of the trace the weights are, unless that is most of it."""
    heavy = found.weights.sum(axis=0)
    ends_s = np.cumsum(found.windows.lengths_s) * found.scale
    used = np.flatnonzero(heavy > 0.05 * heavy.max())
    first_s = float(ends_s[used[0]] - found.windows.lengths_s[used[0]] * found.scale)
    arrival_s = market.demand.arrival_s
    span_s = float(arrival_s[-1] - arrival_s[0])
    last_s = min(float(ends_s[used[-1]]), span_s)
    share = float((found.windows.lengths_s[used] * found.scale).sum()) / span_s
    if share >= _BURST:
        return ""
    start_s = float(arrival_s[0])
    return f", in bursts between {start_s + first_s:.0f} s and {start_s + last_s:.0f} s of the trace"
