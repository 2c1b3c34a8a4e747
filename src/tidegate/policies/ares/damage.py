"""Seconds of SLO damage that decode instances are heading for: what ``ares-slo`` avoids (ours).

The variance of loads says nothing of harm: an idle fleet varies, too, and a full one can be even. Counted
here are the seconds that requests lose, over a horizon: the part of their token gaps beyond the TPOT target,
the time without KV of those that predicted KV leaves no room for, and the recomputation that stalls the batch
when they are preempted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.costs.forms import PrefillCost, StepCost, attention_work
from tidegate.ledger.rows import RequestRows
from tidegate.ledger.snapshot import Column, Mask, Snapshot
from tidegate.policies.ares.loads import Columns, DecodeLoads, Horizon

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


def chances(at: Column, low: Column, mean: Column, high: Column) -> NDArray[np.float64]:
    """Return the chance that each answer has not ended at each grid point, linear between its quantiles.

    The mean stands for the median, and the tail behind the 0.9 quantile is as long as the middle.
    """
    low, high = low[:, None], np.maximum(high, low)[:, None]
    middle = np.clip(mean[:, None], low, high)
    bends = (np.zeros_like(low), low, middle, high, 2.0 * high - low)
    chance = np.ones((len(low), len(at)))
    for start, end, share in zip(bends[:-1], bends[1:], (0.1, 0.4, 0.4, 0.1), strict=True):
        slope = share / np.maximum(end - start, 1e-9)
        chance -= np.clip((at - start) * slope, 0.0, share)
    return np.where(low == high, at < low, chance)


def outlook(at: Column, context: Column, chance: NDArray[np.float64]) -> Outlook:
    """Return the outlook of each decode: one block of three curves per row."""
    tokens = context[:, None] + at
    blocks = np.empty((len(context), 3, len(at)))
    blocks[:, 0] = chance
    np.multiply(chance, tokens, out=blocks[:, 1])
    blocks[:, 2] = blocks[:, 1] * tokens * (1.0 - chance)
    return blocks


class Damage:
    """What the instances of ``loads`` head for, and what each of the decodes adds to it.

    ``outlooks`` has one block per decode, ``totals`` one per place, ``seconds`` the damage there. Instances
    that hold decodes under a label for prefill count like the others, but take no more: ``targets`` are the
    places that do.
    """

    def __init__(self, snapshot: Snapshot, rows: RequestRows, terms: Terms) -> None:
        loads = self.loads = DecodeLoads(snapshot, rows, terms.horizon, left_behind=True)
        self._costs = snapshot.costs
        self._at = loads.horizon.at
        decodes, columns = loads.decodes, loads.columns
        self.targets: Final[Mask] = snapshot.labels.decoding_mask[columns]
        low = np.fmin(rows.remaining_low_tokens[decodes.row], decodes.left_tokens)
        chance = chances(self._at, low, decodes.left_tokens, decodes.most_tokens)
        self.outlooks: Final[Outlook] = outlook(self._at, decodes.context_tokens, chance)
        self.totals: Final[Outlook] = loads.summed(self.outlooks)
        self._usable = terms.usable * loads.capacity_tokens - loads.beside_tokens
        known = np.where(np.isfinite(loads.capacity_tokens), loads.capacity_tokens, 0.0)
        self._noise = (terms.unforeseen * known) ** 2
        busy = snapshot.prefill_demand[columns] + snapshot.prefill_queue_s[columns] / BUSY_FOR_S
        self._stretch = 1.0 / (1.0 - np.minimum(busy, MOST_BUSY))
        self.tpot_s: Final[Column] = rows.tpot_s[decodes.row]
        self._targets_s = loads.summed(self.tpot_s[:, None])[:, 0]
        self._members = loads.summed(np.ones((len(decodes.row), 1)))[:, 0]
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
        step = at_columns(self._costs.step, columns)
        gap_s = step.seconds(requests - stalled, tokens - over) * self._stretch[places][..., None]
        members = self._members[places] + np.sign(joins_s)
        target_s = ((self._targets_s[places] + joins_s) / np.maximum(members, 1.0))[..., None]
        lost_s = requests * np.maximum(gap_s - target_s, 0.0) + stalled * gap_s
        prefill = at_columns(self._costs.prefill, columns)
        again_s = prefill.seconds(context, attention_work(context, 0.0))
        recomputed_s = stalled * again_s * (1.0 + requests)
        return np.asarray(lost_s.sum(axis=-1) * (self._at[1] - self._at[0]) + recomputed_s.max(axis=-1))

    def newcomer(self, request: Request) -> Outlook:
        """Return what a request adds wherever it decodes."""
        told = request.remaining
        low, mean, high = (told.low, told.mean, told.high) if told else (request.max_tokens,) * 3
        chance = chances(self._at, *(np.array([value], np.float64) for value in (low, mean, high)))
        block: Outlook = outlook(self._at, np.array([request.prompt_tokens], np.float64), chance)[0]
        return block

    def add(self, place: int, block: Outlook, joins_s: float) -> None:
        """Count a newcomer with its TPOT target at an instance; both negative take one away."""
        self.totals[place] += block
        self._targets_s[place] += joins_s
        self._members[place] += np.sign(joins_s)
        self.seconds[place] = self.of(self.totals[place : place + 1], np.array([place]))[0]


Form = TypeVar("Form", PrefillCost, StepCost)


def at_columns(form: Form, columns: Columns) -> Form:
    """Return the costs of these instances, to be used with one curve each."""
    arrays = {f.name: getattr(form, f.name) for f in fields(form)}
    return replace(
        form, **{name: v[columns][..., None] for name, v in arrays.items() if isinstance(v, np.ndarray)}
    )
