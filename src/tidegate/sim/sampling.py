"""The cluster over time, in a bounded number of samples however long the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Column, Field, Labels, Snapshot
from tidegate.measure.scaling import ScalingEvent
from tidegate.measure.timeline import FlipEvent, Timeline

MOST_SAMPLES = 2000
"""More than a plot has columns of pixels."""
SUMMED = [
    Field.PREFILL_REQUESTS,
    Field.PREFILL_QUEUE_S,
    Field.DECODE_REQUESTS,
    Field.KV_CAPACITY_TOKENS,
]
"""What a sample sums over the instances."""


class Sampler:
    """Takes a sample at every n-th tick. When full, every second sample goes and n doubles.

    ``kv_in_use`` tells how many tokens' worth of KV the cluster holds at a time, shared blocks once.
    """

    def __init__(self, instances: Sequence[str], kv_in_use: Callable[[float], int]) -> None:
        self.flips: list[FlipEvent] = []
        self.scaling: list[ScalingEvent] = []
        self._instances = tuple(instances)
        self._index = {name: i for i, name in enumerate(instances)}
        self._kv_in_use = kv_in_use
        self._every = 1
        self._ticks = 0
        self._at_s: list[float] = []
        self._sums: list[tuple[float, ...]] = []
        self._roles: list[Column] = []
        self._labels: Labels | None = None
        self._idle = False

    def flipped(self, flip: FlipEvent) -> None:
        """Take note of a flip."""
        self.flips.append(flip)
        step = (flip.to is Role.PREFILL) - (flip.before is Role.PREFILL)
        self.scaling.append(ScalingEvent(flip.at_s, "flip", step, -step))

    def scaled(self, kind: str, role: Role, count: int, now: float) -> None:
        """Take note that an instance of a label comes (1) or goes (-1)."""
        prefill = count * (role is Role.PREFILL)
        self.scaling.append(ScalingEvent(now, kind, prefill, count - prefill))

    def tick(self, snapshot: Snapshot, held: int, *, idle: bool) -> None:
        """Take note of the cluster, if it is time to; ``idle``: no request is live.

        What has not changed since the last sample is not looked at again.
        """
        self._ticks += 1
        if self._ticks % self._every:
            return
        relabelled = snapshot.labels is not self._labels
        if relabelled:
            self._labels = snapshot.labels
        self._roles.append(self._roles_of(snapshot) if relabelled else self._roles[-1])
        if relabelled or not (idle and self._idle):
            sums = snapshot.state[SUMMED].sum(axis=1).tolist()
            self._sums.append((*sums, float(self._kv_in_use(snapshot.at_s)), float(held)))
        else:
            self._sums.append(self._sums[-1])
        self._at_s.append(snapshot.at_s)
        self._idle = idle
        if len(self._sums) > MOST_SAMPLES:
            # Those that stay are the ticks that the doubled interval would have taken.
            del self._at_s[::2], self._sums[::2], self._roles[::2]
            self._every *= 2

    def timeline(self) -> Timeline:
        """Return what was sampled."""
        prefills, queue_s, decodes, capacity, kv, held = np.array(self._sums).reshape(-1, 6).T
        return Timeline(
            instances=self._instances,
            at_s=np.array(self._at_s),
            roles=np.array(self._roles).reshape(-1, len(self._instances)),
            prefill_requests=prefills,
            prefill_queue_s=queue_s,
            decode_requests=decodes,
            kv_tokens=kv,
            kv_capacity_tokens=capacity,
            held_requests=held,
            flips=tuple(self.flips),
        )

    def _roles_of(self, snapshot: Snapshot) -> Column:
        if snapshot.ids == self._instances:
            return snapshot.role.copy()
        roles = np.full(len(self._instances), np.nan)
        roles[[self._index[name] for name in snapshot.ids]] = snapshot.role
        return roles
