"""How a predictor errs, fitted to a measured one: what makes a simulated predictor no oracle.

A head says which share of the tokens that its horizon leaves will follow (``LengthHead``), and so does the
model: by how many tokens have come, and by how much of what the horizon leaves really follows, it has the
quantiles of the share that was predicted. Which quantile a prediction takes is a standard normal of a part
that stays with a request, a part that changes as the tokens double, and a part that is new every time.

As the head, the model knows nothing beyond its horizon: answers that go on behind it are all alike to it.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from statistics import NormalDist
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.signals.lengths.source import Floats, Integers

FROM_TOKENS: Final = (0, 1, 64, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Where a line of its own begins that is fitted; the first is the prompt's end (ours)."""
FROM_SHARES: Final = np.array((0.0, 0.1, 0.3, 0.999))
"""Where truths begin that have quantiles of their own, as shares of what the horizon leaves; the last are
those of answers that end no sooner (ours)."""
QUANTILES: Final = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
LEAST_PREDICTIONS = 50
"""In a line; with fewer there is none."""
LEAST_ALIKE = 10
"""In a part of a line; with fewer it has the quantiles of the whole line."""
FAR, NEAR = 3.0, 0.1
"""Octaves apart from which on, and up to which, two predictions tell of the part that stays, and of the part
that is new every time."""
APART: Final = (20, 100, 200, 400)
"""Tokens between two predictions of a request whose errors are compared."""

_SCORES: Final = np.array([NormalDist().inv_cdf(share) for share in QUANTILES])


class Predicted(NamedTuple):
    """Predictions, one entry each: of which request (a number), at which token, what was predicted to come,
    and what did."""

    request: Integers
    at_token: Integers
    predicted: Floats
    true: Floats


class ProgressError(msgspec.Struct, frozen=True):
    """How far ``predictions`` made from ``from_token`` tokens on are off in tokens: the mean absolute error,
    and the mean of what was predicted less the truth."""

    from_token: int
    predictions: int
    mae: float
    bias: float


class ErrorFigures(msgspec.Struct, frozen=True):
    """The errors by progress; and the correlation of the errors, in logarithms, of two predictions of a
    request, by the tokens between them."""

    by_progress: tuple[ProgressError, ...]
    correlations: dict[int, float]


class Measurement(msgspec.Struct, frozen=True):
    """The card of an error model: which head was measured, on what, when, and by which command.

    ``answers`` are the lengths of the held-out answers, which ``figures`` are of, with a prediction every
    ``every`` tokens.
    """

    head: str
    model_hash: str
    data: str
    date: str
    command: str
    every: int
    answers: tuple[int, ...]
    figures: ErrorFigures


class ErrorLine(msgspec.Struct, frozen=True):
    """The predictions that are made from ``from_token`` generated tokens on: for each of ``FROM_SHARES`` the
    quantiles of the share of what the horizon leaves that was predicted."""

    from_token: int
    shares: tuple[tuple[float, ...], ...]


class ErrorModel(msgspec.Struct, frozen=True):
    """The errors of one predictor, whose horizon is so many output tokens.

    ``lasting`` is the share of the noise's variance that stays with a request, ``fresh`` that of what is new
    with every prediction; the rest changes as the tokens double. One without ``measured`` is made up.
    """

    horizon: int
    lines: tuple[ErrorLine, ...]
    lasting: float
    fresh: float
    measured: Measurement | None = None


class Distortion:
    """What a predictor that errs as ``model`` says would predict, the same for the same arguments."""

    def __init__(self, model: ErrorModel, seed: int = 0) -> None:
        self.horizon = model.horizon
        self._seed = seed
        self._starts = np.array([line.from_token for line in model.lines])
        self._shares = np.array([line.shares for line in model.lines])
        changing = max(0.0, 1.0 - model.lasting - model.fresh)
        self._weights = np.sqrt((model.lasting, model.fresh, changing, changing))[:, None]

    def __call__(self, request: Integers, at_token: Integers, true: Floats) -> Floats:
        """Return what is predicted of requests (numbers) that have so many tokens, fewer than the horizon,
        and get ``true`` more. It is never more than what the horizon leaves."""
        line = np.maximum(self._starts.searchsorted(at_token, side="right") - 1, 0)
        left = (self.horizon - at_token).astype(np.float64)
        part = _part(true, left)
        noise = self._noise(request, at_token)
        after = np.clip(_SCORES.searchsorted(noise), 1, len(_SCORES) - 1)
        step = (noise - _SCORES[after - 1]) / (_SCORES[after] - _SCORES[after - 1])
        low, high = self._shares[line, part, after - 1], self._shares[line, part, after]
        predicted: Floats = (low + np.clip(step, 0.0, 1.0) * (high - low)) * left
        return predicted

    def _noise(self, request: Integers, at_token: Integers) -> Floats:
        octave = np.log2(at_token + 1.0)
        knot = octave.astype(np.int64)
        draws = np.stack((np.full_like(knot, -1), -2 - at_token, knot, knot + 1))
        # Sine and cosine keep the variance at 1 between two independent knots.
        turn = (octave - knot) * (math.pi / 2.0)
        weights = np.broadcast_to(self._weights, draws.shape).copy()
        weights[2] *= np.cos(turn)
        weights[3] *= np.sin(turn)
        noise: Floats = (weights * _normal(self._seed, request, draws)).sum(axis=0)
        return noise


def fit_errors(table: Predicted, horizon: int) -> ErrorModel:
    """Fit the model to measured predictions of a head. Raises ConfigError where there are too few of them."""
    left = (horizon - table.at_token).astype(np.float64)
    share, part = np.clip(table.predicted / left, 0.0, 1.0), _part(table.true, left)
    at = np.searchsorted(FROM_TOKENS, table.at_token, side="right") - 1
    lines: list[ErrorLine] = []
    noise = np.full(len(share), np.nan)
    for number, from_token in enumerate(FROM_TOKENS):
        here = at == number
        if np.count_nonzero(here) < LEAST_PREDICTIONS:
            continue
        rows: list[tuple[float, ...]] = []
        for alike in (here & (part == each) for each in range(len(FROM_SHARES))):
            taken = alike if np.count_nonzero(alike) >= LEAST_ALIKE else here
            rows.append(tuple(np.quantile(share[taken], QUANTILES).round(4).tolist()))
            noise[alike] = _scores(share[alike])
        lines.append(ErrorLine(from_token, tuple(rows)))
    if not lines:
        raise ConfigError(f"no errors to fit: fewer than {LEAST_PREDICTIONS} predictions at any progress")
    lasting, fresh = _parts_of_variance(table.request, table.at_token, noise)
    return ErrorModel(horizon, tuple(lines), round(lasting, 3), round(fresh, 3))


def error_figures(table: Predicted) -> ErrorFigures:
    """Return how far predictions are off, and how alike the errors along a request are."""
    off = table.predicted - table.true
    at = np.searchsorted(FROM_TOKENS, table.at_token, side="right") - 1
    rows: list[ProgressError] = []
    for number in np.unique(at).tolist():
        here = off[at == number]
        mae, bias = (round(float(each.mean()), 1) for each in (np.abs(here), here))
        rows.append(ProgressError(FROM_TOKENS[number], len(here), mae, bias))
    key = table.request * 2**32 + table.at_token
    order = key.argsort()
    key, error = key[order], (np.log1p(table.predicted) - np.log1p(table.true))[order]
    correlations: dict[int, float] = {}
    for apart in APART:
        other = np.minimum(key.searchsorted(key + apart), len(key) - 1)
        pairs = key[other] == key + apart
        if np.count_nonzero(pairs) >= LEAST_PREDICTIONS:
            correlation = np.corrcoef(error[pairs], error[other[pairs]])[0, 1]
            correlations[apart] = round(float(correlation), 2)
    return ErrorFigures(tuple(rows), correlations)


@cache
def packaged_errors() -> ErrorModel:
    """Return the model that comes with tidegate."""
    return read_errors(files("tidegate.signals.lengths").joinpath("hidden_errors.json").read_bytes())


def read_errors(raw: bytes) -> ErrorModel:
    """Read a model from JSON. Raises ConfigError for what is none."""
    try:
        model = msgspec.json.decode(raw, type=ErrorModel)
    except msgspec.DecodeError as error:
        raise ConfigError(f"no error model of a length predictor: {error}") from None
    starts = [line.from_token for line in model.lines]
    rows = [row for line in model.lines for row in line.shares]
    whole = {len(line.shares) for line in model.lines} == {len(FROM_SHARES)}
    whole = whole and {len(row) for row in rows} == {len(QUANTILES)} and starts == sorted(set(starts))
    shares = [
        model.lasting,
        model.fresh,
        1.0 - model.lasting - model.fresh,
        *(each for row in rows for each in row),
    ]
    if not whole or min(shares) < -1e-9 or max(shares) > 1.0 + 1e-9 or model.horizon < 1:
        raise ConfigError(
            "no error model of a length predictor: its lines ascend and are whole, shares are within 0 and 1"
        )
    return model


def _part(true: Floats, left: Floats) -> Integers:
    return FROM_SHARES.searchsorted(true / left, side="right") - 1


def _scores(values: Floats) -> Floats:
    """Return the standard normal that has each value's rank."""
    rank = values.argsort(kind="stable").argsort(kind="stable")
    return np.array([NormalDist().inv_cdf((each + 0.5) / len(values)) for each in rank.tolist()])


def _parts_of_variance(request: Integers, at_token: Integers, noise: Floats) -> tuple[float, float]:
    """Return the shares of the noise's variance that stay, and that are new every time."""
    far: list[float] = []
    near: list[float] = []
    order = np.lexsort((at_token, request))
    request, octave, noise = request[order], np.log2(at_token[order] + 1.0), noise[order]
    for apart in range(1, int(np.bincount(request).max())):
        same = (request[apart:] == request[:-apart]) & ~np.isnan(noise[apart:] + noise[:-apart])
        distance = octave[apart:] - octave[:-apart]
        product = noise[apart:] * noise[:-apart]
        far += product[same & (distance >= FAR)].tolist()
        near += product[same & (distance <= NEAR)].tolist()
    together = float(np.clip(np.mean(near), 0.0, 1.0)) if near else 1.0
    lasting = float(np.clip(np.mean(far), 0.0, together)) if far else 0.0
    return lasting, 1.0 - together


def _normal(seed: int, *parts: Integers) -> Floats:
    """Return a standard normal for each combination of whole numbers (Box-Muller on SplitMix64's bits)."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = np.full(1, seed % 2**63, np.uint64)
        for part in parts:
            mixed = _mixed(
                mixed ^ np.asarray(part, np.int64).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            )
        one, other = (_unit(_mixed(mixed + np.uint64(offset))) for offset in (1, 2))
    normal: Floats = np.sqrt(-2.0 * np.log(one)) * np.cos(2.0 * math.pi * other)
    return normal


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _unit(bits: NDArray[np.uint64]) -> Floats:
    unit: Floats = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return unit
