"""AMPD's routing of prefills as published: Algorithm 1 (section 4.5)."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from tidegate.core.decision import Verdict
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.ampd.paths import (
    ROUND_SIGNALS,
    bound_decode,
    home_of,
    least,
    local,
    path_costs,
    prefill_workers,
    remote,
)
from tidegate.policies.protocols import Signal

ALPHA = 0.9
"""Share of the TTFT target up to which a prefill instance has slack."""
BETA = 0.85
"""Share of the TPOT target up to which a decode instance has slack."""
WINDOW_S = 10.0
"""The window of both means."""
WINDOW = "ampd"
"""Its name in ``System.windows``."""


@dataclass(frozen=True, slots=True)
class AmpdRouting:
    """A round goes to a prefill instance with slack, else home if that has slack, else where it is fastest.

    Slack is by what was observed in the last seconds; a window without observations counts 0 (papers are
    silent). Of several prefill instances with slack the paper takes the first of a random scan, which is any
    of them with equal chance; here a hash of the request's id draws. A first round is bound to an instance
    when its decode is placed, by what is free then.
    """

    alpha: float = ALPHA
    beta: float = BETA
    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Algorithm 1."""
        home, workers = home_of(request, snapshot), np.asarray(prefill_workers(snapshot))
        window, slo = snapshot.windows[WINDOW], request.slo
        slack = workers[window.mean_ttft_s[workers] <= self.alpha * slo.ttft_s]
        if len(slack):
            at = int(slack[crc32(request.id.encode()) % len(slack)])
            return remote(snapshot, home, at, "a prefill instance has slack")
        if window.mean_gap_s[home.at] <= self.beta * slo.tpot_s:
            return local(snapshot, home, "its decode instance has slack")
        paths = path_costs(request, snapshot, home, read=True)
        candidates = np.append(workers, home.at)
        at = least(paths.total_s, candidates)
        return remote(snapshot, home, at, "nobody has slack", paths.alternatives(snapshot, candidates))

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Decode where the session is bound."""
        return bound_decode(request, snapshot, prefill_on)
