"""Steps of one composition: their ends in closed form.

The end of a step depends on when its composition began and on which of its steps it is, and on nothing
else: not on how many events it took to get there. An instance that leaps over steps, one that stops at each,
and one that was asked about its progress on the way have the same ends, to the last bit. This is what makes
leaping exact: where two things happen at one time, such as the end of a step and that of a transfer which
began when such a step ended, they do so either way, and are put in order alike. Sums over single steps would
differ from the closed form by rounding, and rounding would decide what comes first.
"""

from __future__ import annotations

import math


class Stretch:
    """Steps from ``start_s`` on, of which step i (from 0) takes ``first_s + i * growth_s``.

    A batch whose composition stays grows by the same number of tokens per step, and costs are linear in
    tokens; so the end of step k is quadratic in k (``half_s`` is half of ``growth_s``). The first ``done``
    steps are over and booked, those up to ``planned`` have been announced; both count from ``start_s``.
    """

    __slots__ = ("done", "first_s", "half_s", "planned", "start_s")

    def __init__(self) -> None:
        self.begin(0.0, 0.0, 0.0)

    def begin(self, start_s: float, first_s: float, growth_s: float) -> None:
        """Become another stretch, of which nothing is planned yet."""
        self.start_s = start_s
        self.first_s = first_s
        self.half_s = 0.5 * growth_s
        self.done = 0
        self.planned = 0

    def end_s(self, steps: int) -> float:
        """Return when the first ``steps`` steps are over."""
        return self.start_s + steps * (self.first_s + self.half_s * (steps - 1))

    def done_by(self, now: float, known: int) -> int:
        """Return how many of the planned steps are over at ``now``; ``known`` of them are known to be."""
        planned = self.planned
        # ``end_s`` written out: this is asked for each instance before each decision.
        start_s, first_s, half_s = self.start_s, self.first_s, self.half_s
        if now < start_s + (known + 1) * (first_s + half_s * known):
            return known
        known += 1
        if planned <= known or now < start_s + (known + 1) * (first_s + half_s * known):
            return min(known, planned)
        if now >= start_s + planned * (first_s + half_s * (planned - 1)):
            return planned
        # The quadratic solved, in the form that does not cancel; off by one at most, for rounding.
        linear, spent_s = first_s - half_s, now - start_s
        root = math.sqrt(max(0.0, linear * linear + 4.0 * half_s * spent_s))
        done = int(2.0 * spent_s / (linear + root)) if linear + root > 0 else known  # a step takes time
        if done > planned:
            done = planned
        while start_s + (done + 1) * (first_s + half_s * done) <= now:
            done += 1
        while start_s + done * (first_s + half_s * (done - 1)) > now:
            done -= 1
        return done
