"""Which requests to give up so that the others fit best: the program of ``planes`` read the other way.

The bound asks how few requests must miss. Asked for a trace in which all work is worth the more the slacker
real schedules are than the bound's, the same program names those whose absence leaves every interval of time
the most room. Nothing is proved here: a proposal for a search that simulates what it proposes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tidegate.bound.demand import Batching, demand_of, hopeless, kinds_of
from tidegate.bound.planes import Planes
from tidegate.bound.search import Market, price_lists
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.workloads.trace import TraceRecord

MOST_SLACK = 8.0
"""Work is made dearer by this much at most."""
HALVINGS = 7


def sacrificed(
    records: Sequence[TraceRecord],
    profiles: Sequence[Profile],
    instances: Sequence[Instance],
    slo: Slo,
    batching: Batching,
    *,
    level: float,
) -> list[int]:
    """Return as many requests as may miss at ``level``, by number in order of arrival, at the trace's rate.

    Those that miss even alone are among them, all of them where they are more. Takes about a second of CPU.
    Raises ConfigError for an empty fleet.
    """
    kinds, demand = kinds_of(profiles, instances), demand_of(records)
    lost = hopeless(demand, kinds, slo, batching)
    hopeful = np.flatnonzero(~lost)
    spare = len(demand) - math.ceil(level * len(demand) - 1e-9) - int(lost.sum())
    if spare <= 0 or not len(hopeful):
        return np.flatnonzero(lost).tolist()
    market = Market.of(demand.only(~lost), kinds, batching, slo)
    lists = price_lists(market, level)
    if not lists:
        return np.flatnonzero(lost).tolist()
    worth = market.worth(lists)
    kept, low, high = np.ones(len(hopeful)), 1.0, MOST_SLACK
    for _ in range(HALVINGS):
        factor = math.sqrt(low * high)
        planes = Planes(market.demand, slo, worth.times(factor))
        found = planes.fitting(1.0, spare)
        if found is None:
            high = factor
        else:
            low, kept = factor, found
    total = (worth.prefill + worth.answer).mean(axis=1)
    order = np.lexsort((-total, kept))
    return sorted([*np.flatnonzero(lost).tolist(), *hopeful[order[:spare]].tolist()])
