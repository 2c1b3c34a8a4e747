"""The ``hidden`` source of a simulation: the truth, distorted as a measured predictor errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from zlib import crc32

import numpy as np

from tidegate.core.request import Request
from tidegate.signals.lengths.errors import Distortion, ErrorModel
from tidegate.signals.lengths.hidden import NONE, HiddenLengths
from tidegate.signals.lengths.source import Floats, Integers

EVERY = 20
"""Tokens between two predictions (ARES takes its training data so; the serving period is not known)."""

FIRSTS = sorted({0, *(-(-(2**octave) // EVERY) for octave in range(1, 21))})
"""Which predictions are the first ones in an octave of tokens."""


class SimulatedHidden(HiddenLengths):
    """Reports of an engine that predicts at the first token and at every ``EVERY``-th.

    They depend on the seed, the request's id and the token alone: no decision changes what is predicted.
    ``outputs`` are the lengths of all answers of the workload (see ``Distortion``).
    """

    def __init__(
        self, output_tokens: Mapping[str, int], outputs: Integers, errors: ErrorModel, seed: int = 0
    ) -> None:
        super().__init__()
        self._output_tokens = output_tokens
        self._distorted = Distortion(errors, outputs, seed)
        self._said: dict[str, list[tuple[float, float]]] = {}

    def reports(self, requests: Sequence[Request], generated: Integers) -> Floats:
        """See ``HiddenLengths.reports``: without a token there is no report yet."""
        said = self._said
        found = [
            (said.get(request.id) or self._say(request.id))[count // EVERY] if count else NONE
            for request, count in zip(requests, generated.tolist(), strict=True)
        ]
        return np.array(found, np.float64).reshape(-1, 2)

    def first_reports(self, request: Request, generated: int) -> Sequence[tuple[float, float]]:
        """See ``HiddenLengths.first_reports``."""
        said = self._said.get(request.id, ())
        return [said[number] for number in FIRSTS if number < len(said)]

    def _forget(self, request_id: str) -> None:
        super()._forget(request_id)
        self._said.pop(request_id, None)

    def _say(self, request_id: str) -> list[tuple[float, float]]:
        """Work out all reports of a request."""
        output = self._output_tokens[request_id]
        at = np.arange(0, output + 1, EVERY)
        at[0] = 1
        number = np.full(len(at), crc32(request_id.encode()), np.int64)
        predicted = self._distorted(number, at, np.maximum(output - at, 0.0))
        said = self._said[request_id] = list(zip(at.tolist(), predicted.tolist(), strict=True))
        return said
