"""From what a prober timed to a profile: the front end's share, the fits, and errors on held-out points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TypeVar

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.fitting import (
    MixedSample,
    PrefillSample,
    StepSample,
    fit_mixed,
    fit_profile,
    fit_step,
)
from tidegate.costs.forms import MixedCost, attention_work
from tidegate.costs.library import GPUS, assumed_links
from tidegate.costs.profile import Profile
from tidegate.costs.saved_profile import HeldOut

Sample = TypeVar("Sample", PrefillSample, StepSample, MixedSample)

ASSUMED_TRANSFER = assumed_links(GPUS["l40s"].port_bytes_per_s, 1)[0]
"""Where no transfer was measured: PCIe 4.0 x16 inside a node."""
HELD_OUT_EVERY = 4
FEWEST_TO_HOLD_OUT = 8
TRIMS, TRIM, TRIM_FLOOR = 4, 3.0, 0.15
"""How often samples are dropped that the fit is off by more than so many times the median, and by so much."""
FEWEST_MIXED = 5
"""The mixed form has four coefficients."""
EXPERTS = ((8, 2), (16, 2), (32, 4), (64, 6), (64, 8), (128, 4), (128, 8), (256, 8), (384, 8), (512, 10))
"""Layouts of published mixtures of experts."""
DENSE_ERROR = 0.05
FRONT_TOKENS = 64
"""Prompts up to this long tell the front end's time: reading the weights hides their own."""


@dataclass(slots=True)
class Timed:
    """What was timed, in seconds. ``ttft`` is by (new tokens, cached tokens), with all repeats."""

    ttft: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    step: list[StepSample] = field(default_factory=list)
    mixed: list[MixedSample] = field(default_factory=list)

    def first_token_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """Return the median time to first token of a prompt that was sent."""
        return median(self.ttft[new_tokens, cached_tokens])


@dataclass(frozen=True, slots=True)
class Fitted:
    """A profile, how well its forms predict, and the prefills they were fitted to."""

    profile: Profile
    held_out: tuple[HeldOut, ...]
    prefill: tuple[PrefillSample, ...]


def front_seconds(timed: Timed) -> float:
    """Return the time a request spends outside the engine's steps.

    A short prompt's time to first token on the idle instance, less the time of the step that computes such a
    prompt beside decodes: those steps are seen from outside as gaps between the decodes' tokens. The mixed
    form takes the decodes' own share out. Where an engine computes a prompt alone in other time than beside a
    decode, the difference is counted to the front end. Raises ConfigError when too little was timed.
    """
    if len(timed.mixed) < FEWEST_MIXED:
        raise ConfigError("too few prompts were timed beside decodes; give a larger --budget")
    mixed = _steady_mixed(timed.mixed)
    beside = [
        timed.first_token_s(new) - float(mixed.seconds(new, attention_work(new, 0), 0))
        for new, cached in timed.ttft
        if new <= FRONT_TOKENS and not cached
    ]
    return max(0.0, median(beside))


def fit_timed(name: str, timed: Timed, *, source: str) -> Fitted:
    """Fit all forms but the transfer, which is assumed. Raises ConfigError when one has too few samples."""
    front_s = front_seconds(timed)
    prefill = tuple(
        PrefillSample(new, cached, median(seconds) - front_s)
        for (new, cached), seconds in sorted(timed.ttft.items())
        if median(seconds) > front_s
    )
    step = sorted(timed.step, key=lambda s: (s.batch, s.context_tokens))
    mixed = sorted(timed.mixed, key=lambda s: (s.batch, s.context_tokens, s.new_tokens))
    experts, active = likely_experts(step)

    def fit(p: Sequence[PrefillSample], s: Sequence[StepSample], m: Sequence[MixedSample]) -> Profile:
        fitted = fit_profile(
            name, p, s, ASSUMED_TRANSFER, source=source, mixed=m, experts=experts, active_experts=active
        )
        for _ in range(TRIMS):
            p, s, m = _near(fitted, p, 3), _near(fitted, s, 4), _near(fitted, m, 4)
            fitted = fit_profile(
                name, p, s, ASSUMED_TRANSFER, source=source, mixed=m, experts=experts, active_experts=active
            )
        return fitted

    shown = fit(_kept(prefill), _kept(step), _kept(mixed))
    held_out = [
        _errors(shown, "prefill", _held(prefill)),
        _errors(shown, "step", _held(step)),
        _errors(shown, "mixed", _held(mixed)),
    ]
    profile = replace(fit(prefill, step, mixed), front_s=front_s)
    return Fitted(profile, tuple(h for h in held_out if h is not None), prefill)


def likely_experts(step: Sequence[StepSample]) -> tuple[int, int]:
    """Return the experts, and how many a token reads, that explain the steps; (1, 0) for a dense model.

    The linear form fits dense models to a few per cent. Where it does not, the layout in EXPERTS that fits
    best is taken, if it halves the error.
    """
    if len(step) < FEWEST_TO_HOLD_OUT:
        return 1, 0
    dense = fit_step(step)[1]
    fits = [(fit_step(step, experts=e, active_experts=k)[1], (e, k)) for e, k in EXPERTS]
    best, layout = min(fits, key=lambda item: item[0].loss)
    gains = dense.error_p50 > DENSE_ERROR and best.error_p50 < 0.5 * dense.error_p50
    return layout if gains else (1, 0)


def predicted_s(profile: Profile, sample: PrefillSample | StepSample | MixedSample) -> float:
    """Return what the profile says of a sample's step."""
    if isinstance(sample, StepSample):
        return float(profile.step.seconds(sample.batch, sample.context_tokens))
    if isinstance(sample, PrefillSample):
        return profile.prefill_s(sample.new_tokens, sample.cached_tokens)
    return _mixed_s(profile.mixed, sample)


def _near(profile: Profile, samples: Sequence[Sample], coefficients: int) -> list[Sample]:
    """Drop what the fit is far from: times that something else on the machine made, long or short."""
    off = [abs(predicted_s(profile, sample) / sample.seconds - 1.0) for sample in samples]
    most = max(TRIM_FLOOR, TRIM * median(off)) if off else 0.0
    near = [sample for sample, error in zip(samples, off, strict=True) if error <= most]
    return near if len(near) > coefficients else list(samples)


def _steady_mixed(samples: Sequence[MixedSample]) -> MixedCost:
    """Fit the mixed form alone, dropping what it is far from."""
    for _ in range(TRIMS):
        cost, _fit = fit_mixed(samples)
        off = [abs(_mixed_s(cost, s) / s.seconds - 1.0) for s in samples]
        most = max(TRIM_FLOOR, TRIM * median(off))
        near = [s for s, error in zip(samples, off, strict=True) if error <= most]
        samples = near if len(near) >= FEWEST_MIXED else samples
    return fit_mixed(samples)[0]


def _mixed_s(cost: MixedCost, sample: MixedSample) -> float:
    work = attention_work(sample.new_tokens, sample.cached_tokens)
    return float(cost.seconds(sample.new_tokens + sample.batch, work, sample.context_tokens))


def _kept(samples: Sequence[Sample]) -> list[Sample]:
    held = _held(samples)
    return [sample for sample in samples if sample not in held]


def _held(samples: Sequence[Sample]) -> list[Sample]:
    """Every so many samples, but none of the outermost: a fit is asked to interpolate."""
    if len(samples) < FEWEST_TO_HOLD_OUT:
        return []
    return list(samples[2 : len(samples) - 1 : HELD_OUT_EVERY])


def _errors(profile: Profile, form: str, held: Sequence[Sample]) -> HeldOut | None:
    if not held:
        return None
    errors = [abs(predicted_s(profile, sample) / sample.seconds - 1.0) for sample in held]
    return HeldOut(form, float(np.percentile(errors, 50)), float(np.percentile(errors, 95)), len(held))
