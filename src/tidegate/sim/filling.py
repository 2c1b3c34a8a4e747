"""Fills a fleet, at the start of a run, with the requests that are in mid-answer in the long run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Protocol

from msgspec.structs import replace

from tidegate.core.request import NOTHING_CACHED, Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.sim.simulated_request import SimulatedRequest
from tidegate.workloads.residents import Residents
from tidegate.workloads.trace import TraceRecord

FIRST, MOST = 0.1, 1.3
"""Of the residents that there are where tokens come at the TPOT target: so many begin, and there are never
more, for then every answer misses."""
FAR = 0.1
"""Of the residents: where so many are lacking, twice as many are added."""
WINDOWS = 20
"""In which residents are added, at most."""


class Resident(SimulatedRequest):
    """A request in mid-answer, whose KV is on whichever instance it is placed first.

    Its ``index`` is negative, for it is in no table of requests. ``kv_on``: what every instance seems to have
    of it until then.
    """

    kv_on: Mapping[str, int] = NOTHING_CACHED

    def as_request(self) -> Request:
        """See ``LiveRequest.as_request``."""
        request = super().as_request()
        return request if self.legs else replace(request, cached=self.kv_on)


class Joins(Protocol):
    def __call__(self, record: TraceRecord, tokens: int, first_token_s: float, now: float) -> bool:
        """Have a request join with its KV and so many tokens of its answer; tell whether there was room."""
        ...


class Filling:
    """Adds residents until the fleet generates tokens as fast as arrivals ask for them.

    By Little's law as many answers end then as begin. Each of the control plane's windows tells how long
    tokens take beside the residents so far, and so how many it takes at that pace. They come with their KV:
    what their prompts took to compute was spent before the run. The fleet is full where one finds no room;
    that one computes its KV again, as after a preemption. ``tpot_s`` is the target.
    """

    def __init__(self, residents: Residents, tpot_s: float, join: Joins) -> None:
        self._drawn = residents.drawn()
        self._tokens_per_s = residents.tokens_per_s
        self._tpot_s = tpot_s
        self._join = join
        self._windows = 0

    def add(self, view: Snapshot) -> bool:
        """Add the residents that the fleet lacks; tell whether to ask again once the next window has
        closed."""
        decodes, at_target = view.decode_requests, self._tokens_per_s * self._tpot_s
        there = int(decodes.sum())
        if self._windows:
            told = (decodes > 0) & (view.mean_gap_s > 0)
            if not told.any():
                return False
            gap_s = float(decodes[told].sum() / (decodes[told] / view.mean_gap_s[told]).sum())
            wanted = self._tokens_per_s * gap_s
            if wanted > (1.0 + FAR) * there:
                wanted += wanted - there
        else:
            gap_s, wanted = self._tpot_s, FIRST * at_target
        self._windows += 1
        lacking = int(min(wanted, MOST * at_target)) - there
        for record, tokens in islice(self._drawn, max(0, lacking)):
            if not self._join(record, tokens, view.at_s - tokens * gap_s, view.at_s):
                return False
        return lacking > 0 and self._windows < WINDOWS
