"""What a forecast expects, as the model of the ratio takes it: the traffic, and the instance."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.costs.profile import UNMEASURED, Profile
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.service import ServingModel, Traffic, Values

FEWEST = 64
"""Answered requests from which their lengths are the sample (ours)."""
QUANTILES = 128
"""Entries of a sample that is made of moments."""
LONGEST_SPREAD = 4.0
"""Largest standard deviation of a logarithm of lengths: beyond it a forecast of squares is noise."""
UNKNOWN_CAPACITY_TOKENS = 10**9


def peak_rate_rps(forecast: LoadForecast, horizon_s: float) -> float:
    """Return the highest rate of the periods up to ``horizon_s``: the 0.9 quantile of each, NaN unknown."""
    periods = max(1, math.ceil(horizon_s / forecast.period_s - 1e-9))
    return float(np.max(forecast.rate_rps.high[:periods]))


def expected_traffic(forecast: LoadForecast, rate_rps: float, gaps_scv: float) -> Traffic | None:
    """Return traffic of the next period's lengths at ``rate_rps``; None while no length is known.

    The lengths are those of the newest requests that were answered, prompts and answers apart multiplied so
    that their means are the forecast ones. While too few are known, they are log-normal with the forecast
    moments, prompts and answers independent.
    """
    series = (forecast.input_tokens, forecast.output_tokens)
    squares = (forecast.input_tokens_squared, forecast.output_tokens_squared)
    means = [float(each.mean[0]) for each in series]
    if not all(mean > 0 for mean in means):
        return None
    if len(forecast.lengths) >= FEWEST:
        columns = [
            column * (mean / column.mean()) for column, mean in zip(forecast.lengths.T, means, strict=True)
        ]
    else:
        columns = [_log_normal(mean, square) for mean, square in zip(means, squares, strict=True)]
        # Each prompt with another quantile of the answers: a step coprime to the count visits all.
        columns[1] = columns[1][np.arange(QUANTILES) * 79 % QUANTILES]
    inputs, outputs = (np.maximum(1.0, np.rint(column)) for column in columns)
    return Traffic.of(rate_rps, inputs, outputs, gaps_scv)


def _log_normal(mean: float, squares: SeriesForecast) -> Values:
    """Return quantiles at equal distances, scaled to the mean in spite of the missing tail."""
    square = float(squares.mean[0])
    spread = math.sqrt(max(0.0, math.log(square / mean**2))) if square > mean**2 else 0.0
    normal = NormalDist(0.0, max(1e-9, min(LONGEST_SPREAD, spread)))
    found = np.exp([normal.inv_cdf((at + 0.5) / QUANTILES) for at in range(QUANTILES)])
    return np.asarray(found * (mean / found.mean()))


def serving_model(snapshot: Snapshot, prefill_correction: float, step_correction: float) -> ServingModel:
    """Return the first instance that is up, for all: the model knows fleets of equal ones only.

    An unknown capacity counts as no limit. The mixed form is a placeholder, for nothing here is mixed.
    """
    costs = snapshot.costs.at(0)
    profile = Profile("", costs.prefill, costs.step, UNMEASURED.mixed, costs.transfer)
    capacity_tokens = int(snapshot.kv_capacity_tokens[0]) or UNKNOWN_CAPACITY_TOKENS
    return ServingModel(
        profile,
        capacity_tokens,
        int(snapshot.kv_bytes_per_token[0]),
        prefill_correction=prefill_correction,
        step_correction=step_correction,
    )
