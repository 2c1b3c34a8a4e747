"""What a forecast expects, as the model of the ratio takes it: the traffic, and the instance."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from tidegate.core.load_forecast import LoadForecast, SeriesForecast
from tidegate.costs.profile import Profile
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.dopd.service import ServingModel, Traffic, Values

FEWEST = 64
"""Answered requests from which their lengths are the sample (ours)."""
QUANTILES = 128
"""Entries of a sample that is made of moments."""
LONGEST_SPREAD = 4.0
"""Largest standard deviation of a logarithm of lengths: beyond it a forecast of squares is noise."""
UNKNOWN_CAPACITY_TOKENS = 10**9


def peak_rate_rps(forecast: LoadForecast, horizon_s: float, upper: float) -> float:
    """Return the highest rate of the periods up to ``horizon_s``; NaN where it is unknown.

    Of each it is the mean plus the share ``upper`` of the way to its 0.9 quantile.
    """
    mean, high = (
        each[: _periods(forecast, horizon_s)] for each in (forecast.rate_rps.mean, forecast.rate_rps.high)
    )
    return float(np.max(mean + upper * (high - mean)))


def decode_rate_rps(
    forecast: LoadForecast, horizon_s: float, upper: float, there: float, lifetime_s: float
) -> float:
    """Return the rate that keeps as many decodes running as are expected to run at the horizon.

    Answers live for ``lifetime_s``, so a pool forgets exponentially: of the ``there`` that run or are to run
    now a share ``exp(-horizon / lifetime)`` is left, and those that come make up for the others. What comes
    in a lifetime varies less than what comes in a period, by the root of their number.
    """
    mean, high = (
        each[: _periods(forecast, horizon_s)] for each in (forecast.rate_rps.mean, forecast.rate_rps.high)
    )
    spread = upper / math.sqrt(max(1.0, lifetime_s / forecast.period_s))
    coming_rps = float(np.mean(mean + spread * (high - mean)))
    left = math.exp(-horizon_s / lifetime_s)
    return left * there / lifetime_s + (1.0 - left) * coming_rps


def _periods(forecast: LoadForecast, horizon_s: float) -> int:
    return max(1, math.ceil(horizon_s / forecast.period_s - 1e-9))


def expected_traffic(forecast: LoadForecast, gaps_scv: float) -> Traffic | None:
    """Return traffic of the next period's rate and lengths; None while no length is known.

    The lengths are those of the newest requests that were answered, prompts and answers apart multiplied
    towards the means that are forecast: by the share that a period's requests are of all that tell, for few
    long ones make such a mean. While too few are known, they are log-normal with the forecast moments,
    prompts and answers independent.
    """
    series = (forecast.input_tokens, forecast.output_tokens)
    squares = (forecast.input_tokens_squared, forecast.output_tokens_squared)
    means = [float(each.mean[0]) for each in series]
    if not all(mean > 0 for mean in means):
        return None
    if len(forecast.lengths) >= FEWEST:
        requests = float(forecast.rate_rps.mean[0]) * forecast.period_s
        share = requests / (requests + len(forecast.lengths))
        known = zip(forecast.lengths.T, means, strict=True)
        columns = [column * (mean / column.mean()) ** share for column, mean in known]
    else:
        columns = [_log_normal(mean, square) for mean, square in zip(means, squares, strict=True)]
        # Each prompt with another quantile of the answers: a step coprime to the count visits all.
        columns[1] = columns[1][np.arange(QUANTILES) * 79 % QUANTILES]
    inputs, outputs = (np.maximum(1.0, np.rint(column)) for column in columns)
    return Traffic.of(float(forecast.rate_rps.mean[0]), inputs, outputs, gaps_scv)


def _log_normal(mean: float, squares: SeriesForecast) -> Values:
    """Return quantiles at equal distances, scaled to the mean in spite of the missing tail."""
    square = float(squares.mean[0])
    spread = math.sqrt(max(0.0, math.log(square / mean**2))) if square > mean**2 else 0.0
    normal = NormalDist(0.0, max(1e-9, min(LONGEST_SPREAD, spread)))
    found = np.exp([normal.inv_cdf((at + 0.5) / QUANTILES) for at in range(QUANTILES)])
    return np.asarray(found * (mean / found.mean()))


def serving_model(snapshot: Snapshot, prefill_correction: float, step_correction: float) -> ServingModel:
    """Return the first instance that is up, for all: the model knows fleets of equal ones only.

    An unknown capacity counts as no limit.
    """
    costs = snapshot.costs.at(0)
    profile = Profile("", costs.prefill, costs.step, costs.mixed, costs.transfer)
    capacity_tokens = int(snapshot.kv_capacity_tokens[0]) or UNKNOWN_CAPACITY_TOKENS
    return ServingModel(
        profile,
        capacity_tokens,
        int(snapshot.kv_bytes_per_token[0]),
        prefill_correction=prefill_correction,
        step_correction=step_correction,
    )
