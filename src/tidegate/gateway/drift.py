"""Whether the instances still take the times that their profiles predict."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.costs.drift import FOLLOWED, ProfileDrift
from tidegate.costs.profile import Profile
from tidegate.engines.seam import LegTimes
from tidegate.fleet.member import Member
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.ledger.windows import DEMAND_S

log = logging.getLogger(__name__)

FORMS = ("prefill", "step")
STEADY = 1.5
"""Batches that differ by more than this factor over a window say little about one step."""


@dataclass(slots=True)
class SharedProfile:
    """How far instances are from the profile that they share, and by what it was multiplied so far."""

    drifts: dict[str, ProfileDrift] = field(default_factory=lambda: {form: ProfileDrift() for form in FORMS})
    factors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FORMS, 1.0))


class FleetDrift(Collector):
    """Compares prefills and decode steps with the profiles of the instances that have one.

    Only what a profile speaks of is compared: prefills that the engine timed itself or that had an instance
    to themselves, and windows in which an instance did nothing but decode. A profile that is far off is
    logged once in each life of an instance. One that was measured at the start is rescaled instead, for all
    instances that share it: ``rescale`` gets the instance and the factors of prefills and steps.
    """

    def __init__(self, rescale: Callable[[str, float, float], None] = lambda *_: None) -> None:
        self._rescale = rescale
        self._measured: dict[str, Profile] = {}
        self._shared: dict[Profile, SharedProfile] = {}
        self._profiles: dict[str, Profile] = {}
        self._drifts: dict[str, dict[str, ProfileDrift]] = {}
        self._logged: set[tuple[str, str]] = set()
        self._before: Snapshot | None = None

    def member_up(self, member: Member) -> None:
        """Begin anew: another process may be another machine. What a shared profile was rescaled by stays."""
        name, profile = member.instance.id, member.profile
        self.member_down(name)
        if profile is None:
            return
        self._drifts[name] = {form: ProfileDrift() for form in FORMS}
        self._profiles[name] = profile
        if member.measured_at_start:
            self._measured[name] = profile
            factors = self._shared.setdefault(profile, SharedProfile()).factors
            self._profiles[name] = profile.scaled(*factors.values())
            if any(factor != 1.0 for factor in factors.values()):
                self._rescale(name, *factors.values())

    def member_down(self, instance_id: str) -> None:
        """Forget an instance."""
        self._profiles.pop(instance_id, None)
        self._measured.pop(instance_id, None)
        self._drifts.pop(instance_id, None)
        self._logged -= {(instance_id, form) for form in FORMS}

    def prefill(
        self, instance_id: str, prompt_tokens: int, times: LegTimes, observed_s: float, *, alone: bool
    ) -> None:
        """Take in a prefill that ended. ``alone``: the instance had nothing else to do when it was sent.

        ``observed_s`` is what passed from sending it to its first token, less the engine's queue.
        """
        profile = self._profiles.get(instance_id)
        if profile is None or not (alone or times.prefill_s is not None):
            return
        cached = min(times.cached_tokens + times.kv_loaded_tokens, prompt_tokens - 1)
        predicted_s = profile.prefill_s(prompt_tokens - cached, cached)
        if times.prefill_s is None:
            predicted_s += profile.front_s + (times.kv_load_s or 0.0)
        self._observe(instance_id, "prefill", predicted_s, times.prefill_s or observed_s)

    def window(self, snapshot: Snapshot) -> None:
        """Take in the decode steps of the window that ends with ``snapshot``, where decodes were all."""
        before, self._before = self._before, snapshot
        if before is None:
            return
        faded = math.exp(-(snapshot.at_s - before.at_s) / DEMAND_S)
        for name, profile in self._profiles.items():
            if name not in snapshot.index or name not in before.index:
                continue
            now, then = snapshot.index[name], before.index[name]
            cell, old = snapshot.cells, before.cells
            batch, batch_then = cell[Field.DECODE_REQUESTS, now], old[Field.DECODE_REQUESTS, then]
            idle = not cell[Field.PREFILL_REQUESTS, now] and not old[Field.PREFILL_REQUESTS, then]
            dispatched = cell[Field.PREFILL_DEMAND, now] > 1e-9 + faded * old[Field.PREFILL_DEMAND, then]
            steady = 0 < max(batch, batch_then) <= STEADY * min(batch, batch_then)
            if idle and not dispatched and steady:
                context = cell[Field.DECODE_TOKENS, now] + old[Field.DECODE_TOKENS, then]
                predicted_s = float(profile.step.seconds((batch + batch_then) / 2, context / 2))
                self._observe(name, "step", predicted_s, cell[Field.MEAN_GAP_S, now])

    def ratios(self, instance_id: str) -> dict[str, float] | None:
        """Return observed over predicted seconds by form, as far as known; None without a profile."""
        drifts = self._drifts.get(instance_id)
        if drifts is None:
            return None
        known = {form: drift.ratio for form, drift in drifts.items()}
        return {form: round(ratio, 3) for form, ratio in known.items() if ratio is not None}

    def collect(self) -> Iterable[Metric]:
        """See ``Collector.collect``."""
        family = GaugeMetricFamily(
            "tidegate_profile_drift_ratio",
            "Observed over predicted seconds, where the profile's prediction applies",
            labels=["member", "form"],
        )
        for instance_id in self._drifts:
            for form, ratio in (self.ratios(instance_id) or {}).items():
                family.add_metric([instance_id, form], ratio)
        yield family

    def _observe(self, instance_id: str, form: str, predicted_s: float, observed_s: float) -> None:
        drift = self._drifts[instance_id][form]
        drift.observe(predicted_s, observed_s)
        measured = self._measured.get(instance_id)
        if measured is not None:
            self._shared[measured].drifts[form].observe(predicted_s, observed_s)
            self._follow(measured, form)
            return
        if drift.drifted and (instance_id, form) not in self._logged:
            self._logged.add((instance_id, form))
            log.warning(
                "%s: a %s takes %.2f times what its profile %s predicts; measure it with `tidegate profile`",
                *(instance_id, form, drift.ratio, self._profiles[instance_id].name),
            )

    def _follow(self, measured: Profile, form: str) -> None:
        """Rescale a form of a profile that was measured at the start, once enough speaks for it."""
        shared = self._shared[measured]
        ratio = shared.drifts[form].ratio
        if ratio is None or not shared.drifts[form].off_by(FOLLOWED):
            return
        shared.drifts[form] = ProfileDrift()
        shared.factors[form] *= ratio
        alike = [name for name, profile in self._measured.items() if profile == measured]
        change = {**dict.fromkeys(FORMS, 1.0), form: ratio}
        for name in alike:
            self._profiles[name] = measured.scaled(*shared.factors.values())
            self._drifts[name][form] = ProfileDrift()
            self._rescale(name, *change.values())
        log.info(
            "%s: a %s takes %.2f times what was measured at the start; predictions follow",
            *(", ".join(alike), form, ratio),
        )
