"""The ``hidden`` source of a simulation: the truth, distorted as a measured predictor errs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np

from tidegate.core.request import Request
from tidegate.signals.lengths.errors import ErrorModel
from tidegate.signals.lengths.hidden import HiddenLengths
from tidegate.signals.lengths.source import Floats, Integers

EVERY = 20
"""Tokens between two predictions (ARES takes its training data so; the serving period is not known)."""


class SimulatedHidden(HiddenLengths):
    """Reports of an engine that predicts at the first token and at every ``EVERY``-th.

    They depend on the seed, the request's id and the token alone: no decision changes what is predicted.
    """

    def __init__(self, output_tokens: Mapping[str, int], errors: ErrorModel, seed: int = 0) -> None:
        super().__init__()
        self._output_tokens = output_tokens
        self._errors = errors
        self._seed = seed
        self._numbers: dict[str, int] = {}

    def reports(self, requests: Sequence[Request], generated: Integers) -> Floats:
        """See ``HiddenLengths.reports``: without a token there is no report yet."""
        at = np.where(generated > 0, np.maximum(generated // EVERY * EVERY, 1), 0)
        output = np.array([self._output_tokens[request.id] for request in requests], np.float64)
        predicted = self._said([self._number(request.id) for request in requests], at, output)
        return np.stack((at, np.where(at > 0, predicted, math.nan)), axis=1)

    def first_reports(self, request: Request, generated: int) -> Sequence[tuple[int, float]]:
        """See ``HiddenLengths.first_reports``."""
        firsts = np.array([max(1, -(-(2**octave) // EVERY) * EVERY) for octave in range(1, 21)])
        at = np.unique(np.append(firsts[firsts < generated], 1))
        predicted = self._said([self._number(request.id)] * len(at), at, np.full(len(at), float(generated)))
        return list(zip(at.tolist(), predicted.tolist(), strict=True))

    def _forget(self, request_id: str) -> None:
        super()._forget(request_id)
        self._numbers.pop(request_id, None)

    def _number(self, request_id: str) -> int:
        number = self._numbers.get(request_id)
        if number is None:
            number = self._numbers[request_id] = crc32(request_id.encode())
        return number

    def _said(self, numbers: Sequence[int], at: Integers, output: Floats) -> Floats:
        left = np.maximum(output - at, 0.0)
        return self._errors.distorted(self._seed, np.array(numbers, np.int64), at, left)
