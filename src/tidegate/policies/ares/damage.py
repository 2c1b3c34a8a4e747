"""Seconds of SLO damage that decode instances are heading for: what ``ares-slo`` avoids (ours).

The variance of loads says nothing of harm: an idle fleet varies, too, and a full one can be even. Counted
here are the seconds that requests lose, over a horizon: the part of their token gaps beyond the TPOT target,
the time without KV of those that predicted KV leaves no room for, and the recomputation that stalls the batch
when they are preempted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import pick
from tidegate.ledger.rows import RequestRows
from tidegate.ledger.snapshot import Column, Mask, Snapshot
from tidegate.policies.ares.loads import Columns, Curves, DecodeLoads, Horizon

Outlook = NDArray[np.float64]
"""Three curves over the grid points, in rows: expected requests, expected tokens, variance of the tokens."""

LOGISTIC = math.sqrt(3.0) / math.pi
"""Scale of a logistic distribution with a standard deviation of 1."""
BUSY_FOR_S = 10.0
"""A prefill queue counts against the time of decodes beside it as if it were worked off within this time."""
MOST_BUSY = 0.95
"""Prefills take at most this share of an instance's time, as far as gaps between tokens are concerned."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What damage is worked out with; all values are ours.

    KV may fill up to the share ``usable``. ``unforeseen`` is the standard deviation of loads that no
    prediction covers, those to come, as a share of the KV: it keeps a margin where predictions leave none.
    """

    horizon: Horizon = field(default_factory=lambda: Horizon(points=8))
    usable: float = 0.98
    unforeseen: float = 0.05


class Endings:
    """When answers end: the chance that each has not ended falls linearly between its quantiles.

    The mean stands for the median, and the tail behind the 0.9 quantile is as long as the middle.
    """

    def __init__(self, low: Column, mean: Column, high: Column) -> None:
        high = np.maximum(high, low)
        middle = np.clip(mean, low, high)
        bends = (np.zeros_like(low), low, middle, high, 2.0 * high - low)
        shares = (0.1, 0.4, 0.4, 0.1)
        self._falls: Final = [
            (start, share / np.maximum(end - start, 1e-9), share)
            for start, end, share in zip(bends[:-1], bends[1:], shares, strict=True)
        ]
        self._low: Final = low
        self._certain: Final = low == high

    def chances(self, at: Column | float) -> NDArray[np.float64]:
        """Return the chance of each that it has not ended ``at`` tokens from now, which broadcasts."""
        chance = np.ones(np.broadcast_shapes(np.shape(at), self._low.shape))
        part = np.empty_like(chance)
        for start, slope, share in self._falls:
            np.subtract(at, start, out=part)
            part *= slope
            chance -= np.clip(part, 0.0, share, out=part)
        return np.where(self._certain, at < self._low, chance) if self._certain.any() else chance


def outlook(
    at: Column | float, context: Column, chance: NDArray[np.float64]
) -> tuple[Curves, Curves, Curves]:
    """Return the three curves of decodes; the arguments broadcast."""
    tokens = context + at
    expected = chance * tokens
    tokens *= expected
    tokens *= 1.0 - chance
    return chance, expected, tokens


class Damage:
    """What the instances of ``loads`` head for, and what each of the decodes adds to it.

    ``totals`` has one block per place, ``seconds`` the damage there. Instances that hold decodes under a
    label for prefill count like the others, but take no more: ``targets`` are the places that do.
    """

    def __init__(self, snapshot: Snapshot, rows: RequestRows, terms: Terms) -> None:
        loads = self.loads = DecodeLoads(snapshot, rows, terms.horizon, left_behind=True)
        self._costs = snapshot.costs
        self._at = loads.horizon.at
        decodes, columns = loads.decodes, loads.columns
        self.targets: Final[Mask] = snapshot.labels.decoding_mask[columns]
        self._low_tokens = np.fmin(rows.remaining_low_tokens[decodes.row], decodes.left_tokens)
        endings, context = self._endings(slice(None)), decodes.context_tokens
        totals = [[*map(loads.summed, outlook(at, context, endings.chances(at)))] for at in self._at]
        self.totals: Final[Outlook] = np.array(totals).transpose(2, 1, 0)
        self._usable = terms.usable * loads.capacity_tokens - loads.beside_tokens
        known = np.where(np.isfinite(loads.capacity_tokens), loads.capacity_tokens, 0.0)
        self._noise = (terms.unforeseen * known) ** 2
        busy = snapshot.prefill_demand[columns] + snapshot.prefill_queue_s[columns] / BUSY_FOR_S
        self._stretch = 1.0 / (1.0 - np.minimum(busy, MOST_BUSY))
        self.tpot_s: Final[Column] = rows.tpot_s[decodes.row]
        self._targets_s = loads.summed(self.tpot_s)
        self._members = loads.summed(np.ones(len(decodes.row)))
        self.seconds: Column = self.of(self.totals, np.arange(len(columns)))

    def of(self, outlooks: Outlook, places: Columns, joins_s: Column | float = 0.0) -> NDArray[np.float64]:
        """Return the request-seconds that instances lose over the horizon if they had these outlooks.

        ``outlooks`` ends in the three curves; what comes before broadcasts with ``places``. ``joins_s`` is
        the TPOT target of a request that joins, or less that of one that leaves: all are held to the mean.
        """
        columns = self.loads.columns[places]
        requests, tokens, variance = outlooks[..., 0, :], outlooks[..., 1, :], outlooks[..., 2, :]
        spread = LOGISTIC * np.sqrt(np.maximum(variance, 0.0) + self._noise[places][..., None]) + 1.0
        over = spread * np.logaddexp(0.0, (tokens - self._usable[places][..., None]) / spread)
        over = np.minimum(over, tokens)
        context = np.maximum(tokens / np.maximum(requests, 1e-9), 1.0)
        stalled = over / context
        step = pick(self._costs.step, (columns, None))
        gap_s = step.seconds(requests - stalled, tokens - over) * self._stretch[places][..., None]
        members = self._members[places] + np.sign(joins_s)
        target_s = ((self._targets_s[places] + joins_s) / np.maximum(members, 1.0))[..., None]
        lost_s = requests * np.maximum(gap_s - target_s, 0.0) + stalled * gap_s
        prefill = pick(self._costs.prefill, (columns, None))
        again_s = prefill.seconds(context, attention_work(context, 0.0))
        recomputed_s = stalled * again_s * (1.0 + requests)
        return np.asarray(lost_s.sum(axis=-1) * (self._at[1] - self._at[0]) + recomputed_s.max(axis=-1))

    def outlooks(self, decodes: Columns) -> Outlook:
        """Return what each of these decodes adds: one block per row."""
        context = self.loads.decodes.context_tokens[decodes, None]
        chance = self._endings((decodes, None)).chances(self._at)
        return np.stack(outlook(self._at, context, chance), 1)

    def _endings(self, of: Any) -> Endings:
        decodes = self.loads.decodes
        return Endings(self._low_tokens[of], decodes.left_tokens[of], decodes.most_tokens[of])

    def newcomer(self, request: Request) -> Outlook:
        """Return what a request adds wherever it decodes."""
        told = request.remaining
        low, mean, high = (told.low, told.mean, told.high) if told else (request.max_tokens,) * 3
        endings = Endings(*(np.array([value], np.float64) for value in (low, mean, high)))
        context = np.array([request.prompt_tokens], np.float64)
        return np.array(outlook(self._at, context, endings.chances(self._at)))

    def add(self, place: int, block: Outlook, joins_s: float) -> None:
        """Count a newcomer with its TPOT target at an instance; both negative take one away."""
        self.totals[place] += block
        self._targets_s[place] += joins_s
        self._members[place] += np.sign(joins_s)
        self.seconds[place] = self.of(self.totals[place : place + 1], np.array([place]))[0]
