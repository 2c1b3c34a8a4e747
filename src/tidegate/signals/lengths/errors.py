"""How a predictor errs, fitted to a measured one: what makes a simulated predictor no oracle.

In logarithms a prediction is a line of the truth plus noise. Its numbers depend on how many tokens have come:

    log(predicted + 1) = centre + shift + slope * (log(true + 1) - centre) + sigma * e

``centre`` is the mean of log(true + 1) over the workload's answers that came so far: the predictor is taken
to have been trained on such answers. A slope below 1 is what regression to the mean does: long answers are
underrated, short ones overrated. The noise ``e`` of one request is a standard normal of a part that stays,
a part that changes as the tokens double, and a part that is new with every prediction.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.signals.lengths.source import Floats, Integers

FROM_TOKENS: Final = (0, 64, 256, 1024, 2048, 4096, 8192, 16384)
"""Where a line of its own begins that is fitted (ours)."""
LEAST_PREDICTIONS = 50
FAR, NEAR = 3.0, 0.1
"""Octaves apart from which on, and up to which, two predictions tell of the part that stays, and of the part
that is new every time."""


class ErrorLine(msgspec.Struct, frozen=True):
    """The errors of predictions that are made from ``from_token`` generated tokens on."""

    from_token: int
    shift: float
    slope: float
    sigma: float


class Predicted(NamedTuple):
    """Measured predictions, one entry each: of which request (a number), at which token, what was predicted
    to come, and what did."""

    request: Integers
    at_token: Integers
    predicted: Floats
    true: Floats


class ErrorModel(msgspec.Struct, frozen=True):
    """The errors of one predictor. ``source`` says where they come from.

    ``lasting`` is the share of the noise's variance that stays with a request, ``fresh`` that of what is new
    with every prediction; the rest changes as the tokens double.
    """

    source: str
    lines: tuple[ErrorLine, ...]
    lasting: float
    fresh: float


class Distortion:
    """What a predictor that errs as ``model`` says would predict, the same for the same arguments.

    ``outputs`` are the lengths of the workload's answers.
    """

    def __init__(self, model: ErrorModel, outputs: Integers, seed: int = 0) -> None:
        self._seed = seed
        self._starts = np.array([line.from_token for line in model.lines])
        self._lines = np.array([(line.shift, line.slope, line.sigma) for line in model.lines])
        self._centres = np.array([_centre(outputs, start) for start in self._starts.tolist()])
        changing = max(0.0, 1.0 - model.lasting - model.fresh)
        self._weights = np.sqrt((model.lasting, model.fresh, changing, changing))[:, None]

    def __call__(self, request: Integers, at_token: Integers, true: Floats) -> Floats:
        """Return what is predicted of requests (numbers) that have so many tokens and get ``true`` more."""
        line = np.maximum(self._starts.searchsorted(at_token, side="right") - 1, 0)
        (shift, slope, sigma), centre = self._lines[line].T, self._centres[line]
        expected = centre + shift + slope * (np.log1p(true) - centre)
        predicted: Floats = np.maximum(np.expm1(expected + sigma * self._noise(request, at_token)), 0.0)
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


def fit_errors(table: Predicted, source: str) -> ErrorModel:
    """Fit the model to measured predictions. Raises ConfigError where there are too few of them."""
    predicted, true = np.log1p(np.maximum(table.predicted, 0.0)), np.log1p(table.true)
    at = np.searchsorted(FROM_TOKENS, table.at_token, side="right") - 1
    lines: list[ErrorLine] = []
    noise = np.full(len(predicted), np.nan)
    for number, from_token in enumerate(FROM_TOKENS):
        here = at == number
        if np.count_nonzero(here) < LEAST_PREDICTIONS:
            continue
        centre = float(true[here].mean())
        slope, shift = np.polyfit(true[here] - centre, predicted[here] - centre, 1)
        residual = predicted[here] - (centre + shift + slope * (true[here] - centre))
        sigma = float(residual.std()) or 1e-9
        noise[here] = residual / sigma
        lines.append(ErrorLine(from_token, round(float(shift), 4), round(float(slope), 4), round(sigma, 4)))
    if not lines:
        raise ConfigError(f"no errors to fit: fewer than {LEAST_PREDICTIONS} predictions at any progress")
    lasting, fresh = _shares(table.request, table.at_token, noise)
    return ErrorModel(source, tuple(lines), round(lasting, 3), round(fresh, 3))


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
    shares = (model.lasting, model.fresh, 1.0 - model.lasting - model.fresh)
    if not starts or starts != sorted(set(starts)) or min(shares) < -1e-9:
        raise ConfigError(
            "no error model of a length predictor: its lines ascend, its shares are within 0 and 1"
        )
    return model


def _centre(outputs: Integers, at_token: int) -> float:
    left = outputs[outputs > at_token] - at_token
    return float(np.log1p(left).mean()) if len(left) else 0.0


def _shares(request: Integers, at_token: Integers, noise: Floats) -> tuple[float, float]:
    """Return the shares of the noise's variance that stay, and that are new every time."""
    far: list[float] = []
    near: list[float] = []
    order = np.lexsort((at_token, request))
    request, octave, noise = request[order], np.log2(at_token[order] + 1.0), noise[order]
    for apart in (1, 2, 4, 8, 16, 32, 64, 128):
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
