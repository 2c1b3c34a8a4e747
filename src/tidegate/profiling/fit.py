"""From the times of tokens to a profile: steps, the front end's share, fits, errors on held-out points.

Pure functions. Times are seconds of one clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
POWERS = tuple(2**k for k in range(6, 18))
"""What token budgets are in practice."""
WINDOW = 4
BEFORE = 4
FULL_CHUNK, LAST_CHUNK = 0.6, 0.2
MISCOUNT = 0.2
REMAINDER_SAFE = 1.343
"""A prompt of this times a power of two leaves a last chunk of a third of any smaller budget or more."""


def step_seconds(times: Sequence[Sequence[float]], since: Sequence[int], until: Sequence[int]) -> float:
    """Return the time of a pure decode step from tokens ``since[i]`` to ``until[i]`` of each stream.

    The mean over the streams and WINDOW steps at once take out the jitter of delivery, the median takes out
    what else the machine did.
    """
    steps = min(b - a for a, b in zip(since, until, strict=True))
    window = min(WINDOW, steps)
    ends = [np.asarray(t[b - steps : b + 1])[::window] for t, b in zip(times, until, strict=True)]
    return float(np.median(np.mean(np.diff(ends, axis=1), axis=0))) / window


def gap_of_chunk(times: Sequence[Sequence[float]], first_token_s: float) -> float:
    """Return the time of the step that computed a prompt whose first token came at ``first_token_s``.

    In each stream, the token nearest to the prompt's ended the same step, or the next one if the prompt's was
    late; the token before may be late, too. So two steps are taken together, less a pure one as long as the
    BEFORE ones that precede them. The median over the streams is the answer.
    """
    seconds = []
    for stream in times:
        at = np.asarray(stream)
        nearest = max(1, int(np.argmin(np.abs(at - first_token_s))))
        low = max(0, nearest - 2)
        pure = np.diff(at[max(0, low - BEFORE) : low + 1])
        step_s = float(np.mean(pure)) if len(pure) else 0.0
        seconds.append(at[nearest] - at[low] - (nearest - low - 1) * step_s)
    return float(np.median(seconds))


def chunks_between(stream: Sequence[float], sent_s: float, first_token_s: float, step_s: float) -> int:
    """Return how many steps beside one decode a prompt took, counting gaps between that decode's tokens.

    All chunks but the last take about as long as the longest. The last one ends with the prompt's first token
    and, at REMAINDER_SAFE's length, takes at least LAST_CHUNK of that. Other gaps are no chunks.
    """
    at = np.asarray(stream)
    ends, gaps = at[1:], np.diff(at)
    inside = (ends > sent_s) & (ends < first_token_s + 0.5 * step_s) & (gaps > 1.5 * step_s)
    if not inside.any():
        return 1
    longest = float(np.max(gaps[inside]))
    full = inside & (gaps > FULL_CHUNK * longest)
    last = int(np.argmin(np.abs(ends - first_token_s)))
    rest = not full[last] and inside[last] and gaps[last] > LAST_CHUNK * longest
    return int(np.sum(full)) + int(rest)


def token_budget(prompt_tokens: int, chunks: int) -> int | None:
    """Return the most tokens of a step, when a prompt beside one decode took ``chunks`` steps: a power of two
    that would take about as many, else what the steps hold at least; None for one chunk, which shows no
    bound."""
    if chunks < 2:
        return None
    off = {power: abs(math.ceil(prompt_tokens / (power - 1)) - chunks) for power in POWERS}
    nearest = min(off, key=lambda power: off[power])
    return nearest if off[nearest] <= MISCOUNT * chunks else math.ceil(prompt_tokens / chunks) + 1


@dataclass(slots=True)
class Timed:
    """What was timed, in seconds. ``ttft`` has all repeats by (new tokens, cached tokens)."""

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

    It is a short prompt's TTFT on the idle instance, less the time of a step that computes such a prompt
    beside decodes, less the decodes' share of that by the mixed form. Raises ConfigError when too little was
    timed.
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
        for _ in range(TRIMS + 1):
            fitted = fit_profile(
                name, p, s, ASSUMED_TRANSFER, source=source, mixed=m, experts=experts, active_experts=active
            )
            predict = partial(predicted_s, fitted)
            p, s, m = _near(p, predict, 4), _near(s, predict, 5), _near(m, predict, FEWEST_MIXED)
        return fitted

    shown = fit(_kept(prefill), _kept(step), _kept(mixed))
    held_out = [
        _held_out(shown, "prefill", _held(prefill)),
        _held_out(shown, "step", _held(step)),
        _held_out(shown, "mixed", _held(mixed)),
    ]
    profile = replace(fit(prefill, step, mixed), front_s=front_s)
    return Fitted(profile, tuple(h for h in held_out if h is not None), prefill)


def likely_experts(step: Sequence[StepSample]) -> tuple[int, int]:
    """Return the experts, and how many a token reads, that explain the steps; (1, 0) for a dense model, which
    the linear form fits to a few per cent. A layout in EXPERTS has to halve the error."""
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


def _errors(samples: Sequence[Sample], predict: Callable[[Sample], float]) -> list[float]:
    return [abs(predict(sample) / sample.seconds - 1.0) for sample in samples]


def _near(samples: Sequence[Sample], predict: Callable[[Sample], float], fewest: int) -> Sequence[Sample]:
    """Drop what the fit is far from: times that something else on the machine made, long or short."""
    errors = _errors(samples, predict)
    most = max(TRIM_FLOOR, TRIM * median(errors)) if errors else 0.0
    near = [sample for sample, error in zip(samples, errors, strict=True) if error <= most]
    return near if len(near) >= fewest else samples


def _steady_mixed(samples: Sequence[MixedSample]) -> MixedCost:
    """Fit the mixed form alone, dropping what it is far from."""
    for _ in range(TRIMS):
        samples = _near(samples, partial(_mixed_s, fit_mixed(samples)[0]), FEWEST_MIXED)
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


def _held_out(profile: Profile, form: str, held: Sequence[Sample]) -> HeldOut | None:
    if not held:
        return None
    errors = _errors(held, partial(predicted_s, profile))
    return HeldOut(form, float(np.percentile(errors, 50)), float(np.percentile(errors, 95)), len(held))
