"""Steps of one composition: their ends in closed form."""

from __future__ import annotations

import math


class Stretch:
    """``steps`` steps from ``start_s`` on, of which step i (from 0) takes ``first_s + i * growth_s``.

    A batch whose composition stays grows by the same number of tokens per step, and costs are linear in
    tokens; so the end of step k is quadratic in k.
    """

    __slots__ = ("first_s", "growth_s", "start_s", "steps")

    def __init__(self) -> None:
        self.begin(0.0, 0.0, 0.0, 1)

    def begin(self, start_s: float, first_s: float, growth_s: float, steps: int) -> None:
        """Become another stretch."""
        self.start_s = start_s
        self.first_s = first_s
        self.growth_s = growth_s
        self.steps = steps

    def end_s(self, steps: int) -> float:
        """Return when the first ``steps`` steps are over."""
        return self.start_s + steps * (self.first_s + 0.5 * self.growth_s * (steps - 1))

    def advance(self, steps: int) -> None:
        """Become what remains once the first ``steps`` steps are over."""
        first_s = self.first_s + steps * self.growth_s
        self.begin(self.end_s(steps), first_s, self.growth_s, self.steps - steps)

    def done_by(self, now: float) -> int:
        """Return how many of the steps are over at ``now``."""
        if self.steps == 1 or now < self.start_s + self.first_s:
            return self.steps if now >= self.end_s(self.steps) else 0
        done = min(self.steps, self._estimate(now - self.start_s))
        while done < self.steps and self.end_s(done + 1) <= now:
            done += 1
        while done > 0 and self.end_s(done) > now:
            done -= 1
        return done

    def _estimate(self, spent_s: float) -> int:
        """Solve the quadratic; off by one at most, for rounding, which ``done_by`` mends."""
        half = 0.5 * self.growth_s
        linear = self.first_s - half
        root = math.sqrt(max(0.0, linear * linear + 4.0 * half * spent_s))
        # The form that does not cancel; the sum is positive, for a step takes time.
        return int(2.0 * spent_s / (linear + root)) if linear + root > 0 else self.steps
