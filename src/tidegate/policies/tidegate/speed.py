"""Which instances are slower or faster than the others of their fleet, for what their profiles say (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf
from statistics import median_low
from typing import NamedTuple

from tidegate.core.decision import ControlDecision, Rescale
from tidegate.costs.drift import FOLLOWED, MOST_RATIO
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal


class Lately(NamedTuple):
    """What is known of an instance since it was rescaled, the older the less: it was busy for ``busy_s``, of
    which it may have been idle for ``idle_s``, and ended what was predicted to take ``work_s``, of which what
    took ``begun_s`` may have been done before."""

    busy_s: float = 0.0
    idle_s: float = 0.0
    work_s: float = 0.0
    begun_s: float = 0.0

    def after(self, window: Lately, memory_s: float) -> Lately:
        """Return what is known after another window."""
        fades = exp(-window.busy_s / memory_s)
        return Lately(*(fades * before + now for before, now in zip(self, window, strict=True)))

    @property
    def ratio(self) -> float:
        """Seconds busy per predicted second."""
        return (self.busy_s - 0.5 * self.idle_s) / self.work_s

    def bounds(self, begun_s: float) -> tuple[float, float]:
        """Return what ``ratio`` is at least and at most, where prefills of ``begun_s`` have begun and not
        ended."""
        least = (self.busy_s - self.idle_s) / (self.work_s + begun_s)
        surely_s = self.work_s - self.begun_s
        return least, self.busy_s / surely_s if surely_s > 0.0 else inf


Speeds = Mapping[str, Lately]


@dataclass(frozen=True, slots=True)
class ObservedSpeed:
    """Once per window compares what instances took for what they did with what their profiles predict, and
    each with the fleet's median: what is wrong for all of them alike changes no comparison.

    An instance that is off by more than ``follow`` for sure, either way, is rescaled by what it is off, at
    most by ``MOST_RATIO`` at once: a stall is no speed. Of a prefill it is only known when it was queued and
    when it ended, so that what is done of those in the queue is not sure. Nothing is said of an instance
    before ``fewest_s`` busy seconds, and a second counts 1/e after ``memory_s`` more. ``period_s`` is the
    ledger's window.
    """

    period_s: float = 1.0
    follow: float = FOLLOWED
    fewest_s: float = 4.0
    memory_s: float = 30.0
    name: str = "speed"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def initial(self) -> Speeds:
        """Return the state for the first decision."""
        return {}

    def decide(self, snapshot: Snapshot, state: Speeds) -> ControlDecision[Speeds]:
        """Return what rescales the instances that are off."""
        queues_s = dict(zip(snapshot.ids, snapshot.prefill_queue_s.tolist(), strict=True))
        rows = (row.tolist() for row in (snapshot.busy_s, snapshot.idle_s, snapshot.work_s))
        windows = [Lately(*each) for each in zip(*rows, strict=True)]
        lately = {
            name: state[name].after(window, self.memory_s)
            if name in state
            else Lately(begun_s=queues_s[name])
            for name, window in zip(snapshot.ids, windows, strict=True)
        }
        known = {
            name: each for name, each in lately.items() if each.busy_s >= self.fewest_s and each.work_s > 0.0
        }
        if len(known) < 2:
            return ControlDecision(lately)
        usual = median_low(each.ratio for each in known.values())
        actions = []
        for name, each in known.items():
            least, most = each.bounds(queues_s[name])
            if least > self.follow * usual or most < usual / self.follow:
                factor = min(max(each.ratio / usual, 1.0 / MOST_RATIO), MOST_RATIO)
                actions.append(Rescale(name, factor, factor, f"takes {factor:.2f} times as long"))
                lately[name] = Lately(begun_s=queues_s[name])
        told = ", ".join(f"{each.instance} {each.reason}" for each in actions)
        return ControlDecision(lately, tuple(actions), told)
