"""Fills a fleet, at the start of a run, with the requests that are in mid-answer in the long run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Protocol

from msgspec.structs import replace

from tidegate.core.request import Request
from tidegate.ledger.snapshot import Snapshot
from tidegate.signals.prefix import NO_BLOCKS
from tidegate.sim.simulated_request import SimulatedRequest
from tidegate.workloads.residents import MidAnswers
from tidegate.workloads.trace import TraceRecord

FIRST, MOST = 0.1, 1.3
"""Of the residents that there are where tokens come at the TPOT target: so many come at a time at least, and
there are never more, for then every answer misses."""
SOON_S, SOON, WINDOWS = 30.0, 300, 30
"""The fleet is as full as it gets after so long, or so many arrivals where those take longer; in so many
parts of that time residents are added."""
FAST, SLOW = 0.25, 0.04
"""Of the residents that are there: so many come in such a part, at most, until there seem to be enough, and
after that."""
_ROUNDS = 14
CROWDED = 0.1
"""Of the residents: once so many found no room, the fleet is full."""


class Resident(SimulatedRequest):
    """A request in mid-answer: ``tokens`` of it are out, and the KV that it goes on from is ``held``, by
    instance. It is in no table of requests, and its ``index`` is negative."""

    def __init__(
        self, number: int, request: Request, output_tokens: int, tokens: int, held: Mapping[str, int]
    ) -> None:
        request = replace(request, session="", turn=0)
        super().__init__(-number, -1, request, output_tokens, math.inf, NO_BLOCKS)
        self.generated = tokens
        self.first_token_s = self.last_token_s = request.arrival_s
        self._held = held

    def as_request(self) -> Request:
        """See ``LiveRequest.as_request``."""
        return replace(super().as_request(), cached=self._held)


class Joins(Protocol):
    """How a resident joins."""

    def __call__(self, record: TraceRecord, tokens: int, first_token_s: float, on: str, now: float) -> bool:
        """Have a request go on behind so many tokens of its answer, with its KV; False where there is no
        room for that."""
        ...


class Filling:
    """Adds residents until the fleet generates tokens as fast as arrivals ask for them.

    By Little's law as many answers end then as begin. How fast N residents would have their tokens the
    profiles tell, with the shares of them that the instances have. Prefills beside them take longer by what
    the control plane's windows tell: so much for each prompt token that comes in a second (the median, for a
    few long prompts make a window slow), times those that come in the long run.

    Residents come with their KV: what their prompts took to compute was spent before the run. And they come
    to where the arrivals are placed, so that the system shares them out as it would have. ``tpot_s`` is the
    target.
    """

    def __init__(self, residents: MidAnswers, tpot_s: float, join: Joins) -> None:
        self._drawn = residents.drawn()
        self._tokens_per_s = residents.tokens_per_s
        self._prompt_tokens_per_s = residents.prompt_tokens_per_s
        self._most = MOST * residents.tokens_per_s * tpot_s
        self._ends_s = max(SOON_S, SOON / residents.rate_rps)
        self._join = join
        self._gap_s = self._step_s = tpot_s
        self._slower: list[float] = []
        self._prompt_tokens = 0.0
        self._per_s = self._due = self._at_s = self._closed_s = 0.0
        self._crowded = 0
        self._near = False
        self.full = False

    def window_closed(self, view: Snapshot) -> None:
        """Set how many residents come until the next window closes."""
        there = float(view.decode_requests.sum())
        if there:
            self._note(view)
        wanted = self._wanted(view) if there else self._most
        self.full = view.at_s > self._ends_s or self._crowded > CROWDED * wanted
        self._near |= wanted <= there
        most = max(FIRST * self._most, FAST * there) if not self._near else SLOW * there
        self._per_s = max(0.0, min(wanted - there, most)) * WINDOWS / self._ends_s

    def _note(self, view: Snapshot) -> None:
        """Take note of how much slower than steps of decodes alone the tokens of a window came."""
        decodes = view.decode_requests
        told = (decodes > 0) & (view.mean_gap_s > 0)
        before_s, self._step_s = self._step_s, float(decodes.sum()) / _tokens_per_s(view, 1.0)
        if not told.any():
            return
        self._gap_s = float(decodes[told].sum() / (decodes[told] / view.mean_gap_s[told]).sum())
        if self._closed_s:
            slower = self._gap_s / (0.5 * (before_s + self._step_s)) - 1.0
            per_s = self._prompt_tokens / (view.at_s - self._closed_s)
            self._slower.append(max(0.0, slower) / max(1.0, per_s))
        self._prompt_tokens, self._closed_s = 0.0, view.at_s

    def _wanted(self, view: Snapshot) -> float:
        """Return how many residents it takes."""
        slower = 1.0 + statistics.median(self._slower or [0.0]) * self._prompt_tokens_per_s
        there = float(view.decode_requests.sum())
        low, high = 0.0, self._most / there
        if _tokens_per_s(view, high) < slower * self._tokens_per_s:
            return self._most
        for _ in range(_ROUNDS):
            middle = 0.5 * (low + high)
            enough = _tokens_per_s(view, middle) >= slower * self._tokens_per_s
            low, high = (low, middle) if enough else (middle, high)
        return high * there

    def decodes(self, on: str, prompt_tokens: int, now: float) -> None:
        """Hear that the decode of an arrival is placed, and have those join it that are due."""
        self._prompt_tokens += prompt_tokens
        self._due += self._per_s * (now - self._at_s)
        self._at_s = now
        while self._due >= 1.0 and not self.full:
            self._due -= 1.0
            record, tokens = next(self._drawn)
            self._crowded += not self._join(record, tokens, now - tokens * self._gap_s, on, now)


def _tokens_per_s(view: Snapshot, times: float) -> float:
    """Return how many tokens so many times the decodes have in a second, without prefills."""
    decodes = times * view.decode_requests
    return float((decodes / view.costs.step.seconds(decodes, times * view.decode_tokens)).sum())
