"""Arrow v2, section 5.5: how loaded each pool is, as a share of the SLO target."""

from __future__ import annotations

import numpy as np

from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Column, Mask, Snapshot
from tidegate.policies.candidates import marked_members

L_EXPAND = 1.0
"""A decode pool at or above this load needs instances. Narwhal; 1 is exactly at the target."""
L_SHRINK = 0.5
"""A pool at or below this load can spare instances. Narwhal."""


def prefill_pool_load(snapshot: Snapshot, slo: Slo) -> float:
    """Return the mean over instances that prefill of their predicted queue seconds / ttft.

    Each counts the larger of its queue now and its average over the last window: at low rates a queue
    is empty at most instants, and a zero read there would lend a busy instance away (Narwhal). Work,
    not only the label, makes an instance a member (Narwhal).
    """
    working = marked_members(snapshot, Role.PREFILL) | (snapshot.prefill_requests > 0)
    load = np.maximum(snapshot.prefill_queue_s, snapshot.prefill_queue_avg_s) / slo.ttft_s
    return _mean(load, working)


def decode_pool_load(snapshot: Snapshot, slo: Slo) -> float:
    """Return the mean over instances labelled for decode of (gap - k0) / (tpot - k0), at least 0.

    The gap is the last window's mean, or the longest open one on an instance that stalls. k0, the
    predicted step of one request, is subtracted because an engine ticking at its natural pace is idle,
    not half loaded (Narwhal); where k0 exceeds the target, the plain ratio gap / tpot remains. An
    instance without decodes counts 0.
    """
    gap = snapshot.mean_gap_s * (snapshot.decode_requests > 0)
    floor = snapshot.costs.step.seconds(1.0, 0.0)
    return _mean(_above_floor(gap, floor, slo.tpot_s), marked_members(snapshot, Role.DECODE))


def _above_floor(gap: Column, floor: float | Column, target_s: float) -> Column:
    if isinstance(floor, np.ndarray):
        reachable = floor < target_s
        floor = np.where(reachable, floor, 0.0)
    elif floor >= target_s:
        floor = 0.0
    return np.maximum(gap - floor, 0.0) / (target_s - floor)


def _mean(load: Column, among: Mask) -> float:
    count = int(np.count_nonzero(among))
    return float(load.dot(among)) / count if count else 0.0
