"""How many instances should prefill and how many decode: DOPD's optimal ratio, completed.

*Balance.* A decode instance runs C answers at once, C limited by its KV and by the largest batch whose step
keeps the TPOT. Each stays for the steps of its answer, so the instance ends ``C / (steps * step(C))``
requests per second; a prefill instance ends ``1 / work``. Equal rates give the paper's ratio

    ratio = P / D = C * work / (steps * step(C)).

By Little's law ``rate * steps * step(C)`` answers run at once, which takes ``N_D = that / C`` instances, and
``N_P = ratio * N_D = rate * work``. Where the released code departs from this we do not follow: it takes the
number of requests in an interval for a concurrency, and does not multiply the ratio by N_D.

*Lengths* are a weighted sample. Prefill is convex in the length, so ``work`` is a mean of costs and no cost
of a mean; a decode's mean context is counted by the steps that it stays for. *Corrections* are observed over
predicted times of either phase, and enter ``work`` and ``step`` both (``ServingModel``).

*Margin.* At the balance both pools are busy all the time, and waits have no bound. What a pool serves in time
comes from its queue (``queueing``): the share of prompts whose wait leaves the TTFT target enough for their
own prefill, and of requests that meet a decode pool with few enough others. A request attains if both hold,
which are taken as independent. Counts are whole, and no rounding rule is right for all: ``plan`` tries
the neighbours.

*Mixed.* The same two queues describe a fleet where each instance does both: its steps hold prompt tokens
beside decodes (the mixed form), which lengthens the gap between tokens; none of it idles while the other pool
is full. It is chosen where it needs fewer instances, or of a fixed fleet where it serves clearly more
(``plan``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tidegate.core.slo import Slo
from tidegate.policies.dopd.queueing import Occupancy, Waits
from tidegate.policies.dopd.service import Decode, Mixed, Prefill, ServingModel, Traffic, Values

FAR_GAPS = 3.0
"""Times the longest gap that is in time: decode pools so full are a tail that need not be worked out."""
WAITED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Parts of a step that a newcomer waits for, equally likely."""
_ROUNDS = 30
"""Of the bisection for a goodput."""


@dataclass(frozen=True, slots=True)
class Attained:
    """The predicted share of requests in time: by TTFT, and by TPOT."""

    ttft: float
    tpot: float

    @property
    def both(self) -> float:
        return self.ttft * self.tpot


@dataclass(frozen=True)
class Sizing:
    """Lengths on an instance: what any number of such instances serves within ``slo``.

    Raises ConfigError where not even one request of mean context fits an instance's KV.
    """

    traffic: Traffic
    model: ServingModel
    slo: Slo

    @cached_property
    def prefill(self) -> Prefill:
        return Prefill(self.traffic, self.model, self.slo)

    @cached_property
    def decode(self) -> Decode:
        return Decode(self.traffic, self.model, self.slo)

    @cached_property
    def mixed(self) -> Mixed:
        return Mixed(self.decode)

    @cached_property
    def work_s(self) -> float:
        """Seconds of a prefill instance per request."""
        return self.traffic.mean(self.prefill.work_s)

    @cached_property
    def convexity(self) -> float:
        """Prefill work over that of prompts which all have the mean length."""
        traffic = self.traffic
        mean = Traffic.of(1.0, np.array([traffic.mean(traffic.input_tokens)]), np.array([1.0]))
        return self.work_s / float(Prefill(mean, self.model, self.slo).work_s[0])

    @cached_property
    def decode_work_s(self) -> float:
        """Seconds of a decode instance per request."""
        batch = self.decode.batch
        return float(self.traffic.steps * self.decode.step_s(np.array(batch)) / batch)

    @cached_property
    def lifetime_s(self) -> float:
        """Seconds that an answer takes in the largest batch."""
        return self.decode_work_s * self.decode.batch

    @cached_property
    def ratio(self) -> float:
        """Prefill instances per decode instance, at the balance."""
        return self.work_s / self.decode_work_s if self.decode_work_s else float("inf")

    @cached_property
    def at_best(self) -> Attained:
        """What attains when nobody else is there: no number of instances does better."""
        return self.split_attains(0.0, 1, 1)

    def split_attains(self, rate_rps: float, prefill: int, decode: int) -> Attained:
        """Return what ``prefill`` and ``decode`` instances attain at a rate."""
        return Attained(self.ttft_share(rate_rps, prefill), self.tpot_share(rate_rps, decode))

    def ttft_share(self, rate_rps: float, instances: int) -> float:
        """Return the share of first tokens in time from ``instances`` that only prefill."""
        return self._ttft_share(self.prefill, rate_rps, instances)

    def _ttft_share(self, prefill: Prefill, rate_rps: float, instances: int, lag_s: float = 0.0) -> float:
        traffic, work_s = self.traffic, prefill.work_s
        mean_s = traffic.mean(work_s)
        scv = max(0.0, traffic.mean(work_s**2) / mean_s**2 - 1.0)
        waits = Waits.of(rate_rps, instances, mean_s, 0.5 * (traffic.gaps_scv + scv))
        own_s = prefill.alone_s + self.model.costs.front_s + lag_s
        return traffic.mean(waits.within(self.slo.ttft_s - own_s))

    def tpot_share(self, rate_rps: float, instances: int) -> float:
        """Return the share of answers in time from ``instances`` that only decode."""
        return self._tpot_share(self.decode.step_s, rate_rps, instances, self.decode.joining)

    def _tpot_share(
        self, step_s: Callable[[Values], Values], rate_rps: float, instances: int, joining: float = 0.0
    ) -> float:
        decode = self.decode
        # A newcomer comes at any time of a step: of short answers not all are in time with its mean wait.
        limits_s = np.array([decode.longest_gap_after_s(waited + joining) for waited in WAITED])
        if not self.traffic.steps or not rate_rps:
            alone = step_s(np.array([1.0]))[0] <= limits_s
            return self.traffic.mean(alone.mean(axis=0))

        def gap_s(requests: Values) -> Values:
            present = np.maximum(1.0, requests / instances)
            return decode.waiting_gap_s(present, step_s(np.minimum(present, decode.kv_batch)))

        far_s = FAR_GAPS * float(limits_s[np.isfinite(limits_s)].max(initial=0.0))
        most = float(instances)
        while gap_s(np.array([most]))[0] < far_s:
            most *= 1.5
        there = Occupancy.of(rate_rps, self.traffic.steps, gap_s, most)
        allowed = np.searchsorted(gap_s(there.count), limits_s, side="right")
        shares = np.concatenate(([0.0], there.share))[allowed]
        return self.traffic.mean(np.where(np.isfinite(limits_s), shares, 1.0).mean(axis=0))

    def mixed_attains(self, rate_rps: float, instances: int) -> Attained:
        """Return what ``instances`` attain that all do both."""
        each_rps = rate_rps / instances
        batches, gaps_s = self.mixed.batches, self.mixed.gaps_s(each_rps)

        def gap_s(batch: Values) -> Values:
            return np.interp(batch, batches, gaps_s)

        running = each_rps * self.traffic.steps * gaps_s
        usual = float(batches[min(len(batches) - 1, int(np.count_nonzero(running > batches)))])
        held = Prefill(self.traffic, self.model, self.slo, usual, usual * self.decode.context_tokens)
        lag_s = 0.5 * float(self.decode.step_s(np.array(usual)))
        ttft = self._ttft_share(held, rate_rps, instances, lag_s)
        return Attained(ttft, self._tpot_share(gap_s, rate_rps, instances))

    def goodput_rps(self, attains: Callable[[float], Attained], instances: int, level: float) -> float:
        """Return the highest rate at which both targets are attained by the share ``level``."""
        low_rps, high_rps = 0.0, 2.0 * instances / self.work_s
        for _ in range(_ROUNDS):
            middle_rps = 0.5 * (low_rps + high_rps)
            if attains(middle_rps).both >= level:
                low_rps = middle_rps
            else:
                high_rps = middle_rps
        return low_rps

    def split_goodput_rps(self, prefill: int, decode: int, level: float) -> float:
        """Return the predicted goodput of a split."""
        return self.goodput_rps(lambda rps: self.split_attains(rps, prefill, decode), prefill, level)

    def mixed_goodput_rps(self, instances: int, level: float) -> float:
        """Return the predicted goodput of instances that all do both."""
        return self.goodput_rps(lambda rps: self.mixed_attains(rps, instances), instances, level)
