"""How much load a fleet is offered (ours)."""

from __future__ import annotations

from math import exp, inf
from typing import NamedTuple

OFFERED_S = 20.0
"""Over so long what is offered now is a mean, and within it what waits should begin (ours)."""


class Offered(NamedTuple):
    """How many requests come per second, as a mean in which what came ``over_s`` ago weighs 1/e.

    ``requests`` had come by ``at_s``, each counted again when it is replayed; ``share`` of the weights of an
    endless past are of what was seen.
    """

    at_s: float = inf
    requests: int = 0
    weighed_rps: float = 0.0
    share: float = 0.0
    over_s: float = OFFERED_S

    def rps(self, waiting: float) -> float:
        """Return the mean, and what ``waiting`` requests are beside it; infinite before anything was seen."""
        return self.weighed_rps / self.share + waiting / self.over_s if self.share else inf

    def after(self, requests: int, at_s: float) -> Offered:
        """Return what is known at ``at_s``, by when so many had come."""
        if at_s <= self.at_s:
            return self._replace(at_s=at_s, requests=requests)
        old = exp((self.at_s - at_s) / self.over_s)
        # Of requests that the control plane holds some are given up there, and count no more.
        new_rps = max(requests - self.requests, 0) / (at_s - self.at_s)
        weighed_rps = old * self.weighed_rps + (1.0 - old) * new_rps
        share = old * self.share + 1.0 - old
        return Offered(at_s, requests, weighed_rps, share, self.over_s)
