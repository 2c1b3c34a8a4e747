"""When a pool may lend an instance, and when an instance takes the other phase's work beside its own (ours).

The published rules look at how loaded a pool is now. On moving traffic that fails in three ways (see
``docs/policies/arrow.md``): a pool gives away the instance without which it misses its own target; one that
is half loaded refuses to lend although the other misses everything; and KV that fills up is not load. The
rules here ask what would be left instead, from the ledger and the cost forms alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.among import Column
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.candidates import has_room
from tidegate.policies.pricing import StepSeconds, Ttft, fastest_prefill_seconds, prefill_seconds

HORIZON_S = 10.0
"""A prefill queue counts against the time that decodes leave as if it were worked off within this time."""


@dataclass(frozen=True, slots=True)
class Lending:
    """The limits up to which the rest of a pool, or an instance of the other one, may be loaded.

    ``decode_full``: what a decode pool that lends may reach, as a share of the TPOT target and of its KV.
    ``wait``: the share of the TTFT target that may pass in the queue of a prefill pool that lends.
    ``kv_reserve``: the share of a KV cache that placements leave to the growth of the decodes that are there.
    ``needy``: the fullness at which a decode pool borrows.
    """

    decode_full: float = 0.9
    wait: float = 0.25
    kv_reserve: float = 0.15
    needy: float = 0.85

    def decode_spares_one(self, snapshot: Snapshot, slo: Slo) -> bool:
        """Tell whether all decodes would fit on one instance fewer of the pool."""
        return decode_fullness(snapshot, slo, fewer=1) < self.decode_full

    def prefill_spares_one(self, snapshot: Snapshot, slo: Slo) -> bool:
        """Tell whether one instance fewer would still prefill in time what lately came."""
        return prefill_wait_s(snapshot, fewer=1) <= self.wait * slo.ttft_s

    def hopeless(self, request: Request, snapshot: Snapshot) -> bool:
        """Tell whether even an idle instance would miss the request's TTFT target."""
        return fastest_prefill_seconds(snapshot, request) > request.slo.ttft_s

    def prefill_beside(self, request: Request, snapshot: Snapshot) -> int | None:
        """Return the decode instance that meets the TTFT target and keeps its own decodes within theirs.

        Prefills may take the share of its time that its decode step leaves of the TPOT target. None when no
        instance is free enough. Of several, the least busy one.
        """
        ttft = Ttft(snapshot, request).column()
        own_s = prefill_seconds(snapshot.costs, request)
        step = StepSeconds(snapshot, request, 1.0 / request.slo.tpot_s).column()
        busy = snapshot.prefill_demand + (snapshot.prefill_queue_s + own_s) / HORIZON_S + step
        may = snapshot.labels.decoding_mask & (busy <= 1.0) & (ttft <= request.slo.ttft_s)
        may &= has_room(snapshot, request.prompt_tokens)
        return int(np.where(may, busy, np.inf).argmin()) if may.any() else None

    def least_pressed(self, request: Request, snapshot: Snapshot, held: int | None) -> tuple[int, float]:
        """Return where a decode hurts least, of those that decode and ``held``, and the pressure there.

        Pressure is the larger of the predicted gap, which prefills beside stretch, over the TPOT target, and
        the KV in use over what may be used; up to 1 is within both. ``held`` has the KV already.
        """
        stretched = StepSeconds(snapshot, request, 1.0 / request.slo.tpot_s).column()
        stretched = stretched / (1.0 - np.minimum(snapshot.prefill_demand, 0.95))
        tokens = np.full(len(snapshot), float(request.prompt_tokens))
        among = snapshot.labels.decoding_mask
        if held is not None:
            tokens[held] = 0.0
            among = among.copy()
            among[held] = True
        pressure = np.maximum(stretched, self._used(snapshot, tokens))
        chosen = int(np.where(among, pressure, np.inf).argmin())
        return chosen, float(pressure[chosen])

    def _used(self, snapshot: Snapshot, tokens: float | Column) -> Column:
        """Return KV in use with ``tokens`` more, over what may be used; 0 where the capacity is unknown."""
        capacity = snapshot.kv_capacity_tokens
        known = capacity > 0
        in_use = np.where(known, capacity - snapshot.free_tokens + tokens, 0.0)
        used: Column = in_use / np.where(known, (1.0 - self.kv_reserve) * capacity, 1.0)
        return used


def decode_fullness(snapshot: Snapshot, slo: Slo, *, fewer: int = 0) -> float:
    """Return the larger of the decode step over ``slo.tpot_s`` and the share of KV in use.

    Both as if every decode of the fleet, and the KV that waits for one, were spread evenly over the instances
    labelled for decode, ``fewer`` of them; inf when none is left.
    """
    decoding = snapshot.labelled(Role.DECODE)
    pool = int(np.count_nonzero(decoding))
    left = pool - fewer
    if left < 1:
        return math.inf
    requests = float(snapshot.decode_requests.sum())
    tokens = float(snapshot.decode_tokens.sum() + snapshot.handoff_tokens.sum())
    step_s = snapshot.costs.step.seconds(requests / left, tokens / left)
    if isinstance(step_s, np.ndarray):
        step_s = float(step_s[decoding].mean())
    capacity = float(snapshot.kv_capacity_tokens[decoding].sum()) * left / pool
    return max(step_s / slo.tpot_s, tokens / capacity if capacity else 0.0)


def prefill_wait_s(snapshot: Snapshot, *, fewer: int = 0) -> float:
    """Return the expected wait before a prefill with ``fewer`` instances labelled for it; inf where it grows.

    Sakasegawa's approximation for an M/G/c queue (1977), from the demand and the squares of the last windows:
    a large pool waits less at the same use, and unequal prompts wait more.
    """
    left = int(np.count_nonzero(snapshot.labelled(Role.PREFILL))) - fewer
    demand = float(snapshot.prefill_demand.sum())
    use = demand / left if left > 0 else math.inf
    if use >= 1.0:
        return math.inf
    if demand <= 0.0:
        return 0.0
    residual_s = float(snapshot.prefill_squares_s.sum()) / (2.0 * demand)
    return float(use ** (math.sqrt(2.0 * (left + 1)) - 1.0)) / (left * (1.0 - use)) * residual_s
