"""Fit the cost forms to measured samples: relative least squares with non-negative coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import (
    MixedCost,
    PrefillCost,
    StepCost,
    TransferCost,
    Values,
    attention_work,
    experts_touched,
)
from tidegate.costs.profile import Profile

HINGES = (0, 32, 64, 128, 192, 256, 320, 384, 512, 768)
"""Candidates for ``n0``; the range that fits to measured GPUs fall into."""
SLOPE_FLOOR_S = 1e-12
"""A fitted slope of zero would promise unlimited context; this floor keeps inversion finite."""
BANDWIDTH_CEILING = 1e12
"""Bytes/s that no fitted link exceeds."""


@dataclass(frozen=True, slots=True)
class PrefillSample:
    """One measured prefill step of a single sequence."""

    new_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepSample:
    """One measured decode step: ``batch`` sequences holding ``context_tokens`` in all."""

    batch: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MixedSample:
    """One measured step with a chunk of one prompt beside ``batch`` decodes holding ``context_tokens``."""

    new_tokens: int
    cached_tokens: int
    batch: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TransferSample:
    """One measured transfer: ``n_bytes`` of KV of a prompt of ``tokens`` tokens."""

    tokens: int
    n_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients in the order of the columns, with relative errors over the samples."""

    coefficients: tuple[float, ...]
    error_p50: float
    error_p95: float
    loss: float


def fit_columns(columns: Sequence[Values], seconds: Values) -> Fit:
    """Fit ``seconds ~ sum(k_j * columns[j])`` with k_j >= 0, minimising squared relative error.

    With the few columns used here, trying every subset of active columns finds the exact optimum.
    Raises ConfigError when there are fewer samples than columns or a time is not positive.
    """
    if len(seconds) < len(columns):
        raise ConfigError(
            f"{len(seconds)} samples cannot fit {len(columns)} coefficients; measure more points"
        )
    if not np.all(seconds > 0):
        raise ConfigError("measured times must be positive")
    design = np.stack(columns, axis=1) / seconds[:, None]
    best: tuple[float, Values] | None = None
    for size in range(1, len(columns) + 1):
        for active in combinations(range(len(columns)), size):
            part, *_ = np.linalg.lstsq(design[:, active], np.ones(len(seconds)), rcond=None)
            if np.any(part < 0):
                continue
            full = np.zeros(len(columns))
            full[list(active)] = part
            loss = float(np.sum((design @ full - 1.0) ** 2))
            if best is None or loss < best[0]:
                best = (loss, full)
    if best is None:
        raise ConfigError("no non-negative fit exists for these samples")
    relative = np.abs(design @ best[1] - 1.0)
    return Fit(
        tuple(float(k) for k in best[1]),
        float(np.percentile(relative, 50)),
        float(np.percentile(relative, 95)),
        best[0],
    )


def fit_prefill(samples: Sequence[PrefillSample]) -> tuple[PrefillCost, Fit]:
    """Fit the hinge form, choosing ``n0`` among HINGES by loss."""
    new = np.array([s.new_tokens for s in samples], dtype=np.float64)
    work = np.array([attention_work(s.new_tokens, s.cached_tokens) for s in samples])
    n0, fit = _fit_hinge(new, [work], np.array([s.seconds for s in samples]))
    a, b, c = fit.coefficients
    return PrefillCost(a, b, c, n0), fit


def fit_mixed(samples: Sequence[MixedSample]) -> tuple[MixedCost, Fit]:
    """Fit the form of steps that hold a chunk beside decodes, choosing ``n0`` among HINGES by loss."""
    tokens = np.array([s.new_tokens + s.batch for s in samples], dtype=np.float64)
    work = np.array([attention_work(s.new_tokens, s.cached_tokens) for s in samples])
    context = np.array([s.context_tokens for s in samples], dtype=np.float64)
    n0, fit = _fit_hinge(tokens, [work, context], np.array([s.seconds for s in samples]))
    a, b, c, d = fit.coefficients
    return MixedCost(a, b, c, d, n0), fit


def fit_step(
    samples: Sequence[StepSample], *, experts: int = 1, active_experts: int = 0
) -> tuple[StepCost, Fit]:
    """Fit the linear form, with the expert term when ``active_experts`` of ``experts`` run per token.

    The context slope never falls below SLOPE_FLOOR_S.
    """
    batch = np.array([s.batch for s in samples], dtype=np.float64)
    context = np.array([s.context_tokens for s in samples], dtype=np.float64)
    columns = [np.ones_like(batch), batch, context]
    if active_experts:
        columns.append(np.asarray(experts_touched(batch, experts, active_experts)))
    fit = fit_columns(columns, np.array([s.seconds for s in samples]))
    a, b, c, e = (*fit.coefficients, 0.0)[:4]
    return StepCost(a, b, max(c, SLOPE_FLOOR_S), e, float(experts), float(active_experts)), fit


def fit_transfer(samples: Sequence[TransferSample]) -> tuple[TransferCost, Fit]:
    """Fit latency and bandwidth, which BANDWIDTH_CEILING bounds where bytes do not show in the time."""
    n_bytes = np.array([s.n_bytes for s in samples], dtype=np.float64)
    fit = fit_columns([np.ones_like(n_bytes), n_bytes], np.array([s.seconds for s in samples]))
    latency, per_byte = fit.coefficients
    return TransferCost(latency, 1.0 / max(per_byte, 1.0 / BANDWIDTH_CEILING)), fit


def _fit_hinge(tokens: Values, others: Sequence[Values], seconds: Values) -> tuple[float, Fit]:
    """Fit ``a + b*max(0, tokens - n0) + ...`` for each candidate ``n0`` and return the best one's fit."""
    fits = [
        (float(n0), fit_columns([np.ones_like(tokens), np.maximum(0.0, tokens - n0), *others], seconds))
        for n0 in HINGES
        if n0 == 0 or n0 < tokens.max() / 2
    ]
    return min(fits, key=lambda item: item[1].loss)


def fit_profile(
    name: str,
    prefill: Sequence[PrefillSample],
    step: Sequence[StepSample],
    transfer: TransferCost,
    *,
    source: str,
    mixed: Sequence[MixedSample] = (),
    mixed_context_ratio: float = 2.0,
    experts: int = 1,
    active_experts: int = 0,
) -> Profile:
    """Fit a whole profile.

    Without ``mixed`` samples the mixed form shares the prefill form's coefficients, and its context slope
    is the decode slope times ``mixed_context_ratio`` (measured engines lie between 1 and 3.4).
    ``experts`` and ``active_experts`` are ``fit_step``'s.
    """
    prefill_cost, prefill_fit = fit_prefill(prefill)
    step_cost, step_fit = fit_step(step, experts=experts, active_experts=active_experts)
    fits = {"prefill": prefill_fit, "step": step_fit}
    if mixed:
        mixed_cost, fits["mixed"] = fit_mixed(mixed)
    else:
        mixed_cost = _mixed_of(prefill_cost, step_cost, mixed_context_ratio)
    errors = tuple((form, fit.error_p50, fit.error_p95) for form, fit in fits.items())
    return Profile(name, prefill_cost, step_cost, mixed_cost, transfer, source, errors)


def fit_few(
    name: str,
    prefill: Sequence[PrefillSample],
    step: Sequence[StepSample],
    transfer: TransferCost,
    prior: Profile,
    *,
    source: str,
) -> tuple[Profile, str]:
    """Fit a profile to however few samples, and say what they lacked; empty if nothing.

    A form whose samples do not determine its coefficients is that of ``prior`` times one factor: the median
    of observed over predicted seconds in its own samples, else in the other form's, else 1.
    """
    ratios = {
        "prefill": [s.seconds / prior.prefill_s(s.new_tokens, s.cached_tokens) for s in prefill],
        "step": [s.seconds / float(prior.step.seconds(s.batch, s.context_tokens)) for s in step],
    }
    enough = {
        "prefill": _determined(
            [(1, s.new_tokens, attention_work(s.new_tokens, s.cached_tokens)) for s in prefill]
        ),
        "step": _determined([(1, s.batch, s.context_tokens) for s in step]),
    }
    if all(enough.values()):
        return fit_profile(name, prefill, step, transfer, source=source), ""
    either = [*ratios["prefill"], *ratios["step"]] or [1.0]
    scaled = prior.scaled(*(float(np.median(of_form or either)) for of_form in ratios.values()))
    prefill_cost = fit_prefill(prefill)[0] if enough["prefill"] else scaled.prefill
    step_cost = fit_step(step)[0] if enough["step"] else scaled.step
    lacking = ", ".join(
        f"{len(ratios[form])} {form} point{'s' * (len(ratios[form]) != 1)}"
        for form in enough
        if not enough[form]
    )
    how = f"{lacking} scale what the model's size suggests"
    mixed = _mixed_of(prefill_cost, step_cost)
    return Profile(name, prefill_cost, step_cost, mixed, transfer, f"{source}; {how}"), how


def _determined(rows: Sequence[tuple[float, ...]]) -> bool:
    """Tell whether samples with these values determine a coefficient for each column."""
    if not rows:
        return False
    design = np.array(rows, dtype=np.float64)
    return bool(np.linalg.matrix_rank(design / design.max(axis=0)) == design.shape[1])


def _mixed_of(prefill: PrefillCost, step: StepCost, context_ratio: float = 2.0) -> MixedCost:
    """Derive the mixed form from the others."""
    return MixedCost(prefill.a_s, prefill.b_s, prefill.c_s, step.c_s * context_ratio, prefill.n0)
