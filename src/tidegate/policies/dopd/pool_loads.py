"""Two pools as they are, and when they are so short that no period is waited for (emergency scaling)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.planners import LoadConstants

LIMITS = LoadConstants()
SPARE = 0.7
"""How busy a pool may be with one instance less, if that is lent to the other one in an emergency (ours)."""


@dataclass(frozen=True, slots=True)
class PoolLoads:
    """The instances that prefill and that decode, one that does both among either, and their load.

    Per prefill instance: prompts that ``waiting`` counts wait there, and all of them take ``queue_s`` as
    predicted. ``demand`` is what comes, in prefill seconds per second of the whole pool. The decode
    instances' KV is used to ``kv_share``, ``unroomed`` requests per instance have no room there, and
    ``gap_s`` is the mean time between two tokens of those that only decode, decodes counted alike: one that
    also prefills spends what its decodes have won on prompts, so a long gap there tells nothing.
    ``requests`` are all that prefill or decode.
    """

    prefill: int
    decode: int
    waiting: float
    queue_s: float
    demand: float
    kv_share: float
    unroomed: float
    gap_s: float
    requests: float

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Return the pools of a snapshot."""
        prefilling, decoding = snapshot.labels.prefilling_mask, snapshot.labels.decoding_mask
        prefill, decode = int(np.count_nonzero(prefilling)), int(np.count_nonzero(decoding))
        running = snapshot.decode_requests[decoding]
        held = float(snapshot.decode_tokens[decoding].sum())
        capacity = float(snapshot.kv_capacity_tokens[decoding].sum())
        count = float(running.sum())
        over = max(0.0, held - capacity) if capacity else 0.0
        only = snapshot.labelled(Role.DECODE)
        decodes = snapshot.decode_requests[only]
        gaps_s = float(snapshot.mean_gap_s[only] @ decodes)
        each = max(1, prefill)
        return cls(
            prefill,
            decode,
            float(np.maximum(0.0, snapshot.prefill_requests[prefilling] - 1.0).sum()) / each,
            float(snapshot.prefill_queue_s[prefilling].sum()) / each,
            float(snapshot.prefill_demand.sum()),
            held / capacity if capacity else 0.0,
            over * count / held / max(1, decode) if held else 0.0,
            gaps_s / float(decodes.sum()) if decodes.any() else 0.0,
            float(snapshot.prefill_requests.sum() + snapshot.decode_requests.sum()),
        )

    @property
    def kv_pressure(self) -> float:
        """The share of KV in use, and what waits for room on top (Dynamo's load planner)."""
        return self.kv_share + LIMITS.waiting_kv * self.unroomed


@dataclass(frozen=True, slots=True)
class Emergency:
    """Which pools are short, and why; "" where one is not."""

    prefill: str
    decode: str

    @classmethod
    def of(cls, pools: PoolLoads, queues: Sequence[float], slo: Slo) -> Self:
        """Return it by DOPD's rule with the thresholds of Dynamo's load planner.

        ``queues`` are the prompts that waited per prefill instance of late, the newest last. Both the queue
        and its trend have to exceed the threshold. Ours: short prompts may queue deeply within their target,
        so the queue counts from half of the TTFT target on, and few long ones count at all of it; decode is
        also short where its tokens come slower than the TPOT target.
        """
        first, last = (queues[0], queues[-1]) if queues else (0.0, 0.0)
        trend = last + LIMITS.ahead * (last - first)
        deep = min(last, trend) > LIMITS.queue_up and pools.queue_s > 0.5 * slo.ttft_s
        prefill = decode = ""
        if deep or (pools.queue_s > slo.ttft_s and last >= first):
            prefill = (
                f"{pools.waiting:.1f} prompts wait per prefill instance, {1e3 * pools.queue_s:.0f} ms of work"
            )
        if pools.kv_pressure > LIMITS.kv_up:
            decode = f"decodes take {100 * pools.kv_pressure:.0f} % of their KV"
        elif pools.gap_s > slo.tpot_s:
            decode = f"tokens come every {1e3 * pools.gap_s:.1f} ms on average"
        return cls(prefill, decode)

    def lasts(self, pools: PoolLoads, start_delay_s: float, slo: Slo) -> bool:
        """Tell whether an instance that starts would still find work: a prefill queue may be gone by then.

        Without one more the queue changes by what comes less what the pool does.
        """
        left_s = pools.queue_s + start_delay_s * (pools.demand / max(1, pools.prefill) - 1.0)
        return bool(self.decode) or left_s > 0.5 * slo.ttft_s

    def lends(self, pools: PoolLoads, slo: Slo) -> bool:
        """Tell whether the pool that is not short can do with one instance less."""
        if self.prefill and self.decode:
            return False
        if self.decode:
            return pools.prefill > 1 and pools.demand < SPARE * (pools.prefill - 1)
        fuller = pools.decode / max(1, pools.decode - 1)
        return pools.decode > 1 and max(pools.kv_pressure, pools.gap_s / slo.tpot_s) * fuller < SPARE
