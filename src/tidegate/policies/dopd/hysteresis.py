"""When plans count: a pool grows once two in a row want more, and shrinks once enough of them agree.

Plans are made of some hundred lengths and of half minutes of arrivals, so near a whole instance they differ
from one to the next at constant load. What enough of them is, is therefore learnt (ours): a pool that had
to grow again soon after it had shrunk *regrets* that, and its next shrink takes ``BACKOFF`` times as many
plans. That is so for one instance only: what is beyond it goes as soon as always, for then the load has
changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

BACKOFF = 4
"""What each regret multiplies the plans by that have to agree (ours)."""
MOST_REGRETS = 2


@dataclass(frozen=True, slots=True)
class Pool:
    """What the newest plans wanted of a pool, the newest last, and how its shrinks went.

    ``since_shrink`` are the plans since the newest one, None where there was none or the pool has grown
    since.
    """

    wanted: tuple[int, ...] = ()
    since_shrink: int | None = None
    regrets: int = 0

    def planned(self, wanted: int, agreeing: int) -> Pool:
        """Take one more plan into it."""
        kept = (*self.wanted, wanted)[-agreeing * BACKOFF**MOST_REGRETS :]
        since = None if self.since_shrink is None else self.since_shrink + 1
        return replace(self, wanted=kept, since_shrink=since)

    def held(self, has: int, agreeing: int) -> int:
        """Return the instances that it is to have: the most that any two of the newest plans in a row want.

        With 1 ``agreeing`` a plan counts alone.
        """
        soon = _confirmed(self.wanted, has, agreeing)
        if soon >= has or not self.regrets:
            return soon
        late = _confirmed(self.wanted, has, agreeing * BACKOFF**self.regrets)
        return min(late, soon + 1)

    def became(self, has: int, becomes: int, agreeing: int) -> Pool:
        """Learn from a change of its size.

        One that grows so soon after a shrink that a longer wait could have spared both regrets it; one that
        shrinks further, or grows later, regrets less.
        """
        if becomes < has:
            further = self.since_shrink is not None
            return replace(self, since_shrink=0, regrets=max(0, self.regrets - further))
        if becomes == has or self.since_shrink is None:
            return self
        soon = self.since_shrink <= agreeing * BACKOFF**MOST_REGRETS
        regrets = min(MOST_REGRETS, self.regrets + 1) if soon else max(0, self.regrets - 1)
        return replace(self, since_shrink=None, regrets=regrets)


def _confirmed(wanted: Sequence[int], has: int, agreeing: int) -> int:
    newest = wanted[-agreeing:]
    confirmed = [min(pair) for pair in pairwise(newest)] if agreeing > 1 else list(newest)
    return max(confirmed + [has] * (len(newest) < agreeing))
