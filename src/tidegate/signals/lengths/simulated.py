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
"""Tokens between two predictions, as in the engine (ARES takes its training data so; the serving period is
not known)."""

FIRSTS = sorted({-(-(2**octave - 1) // EVERY) for octave in range(21)})
"""Which predictions are the first ones in an octave of tokens."""


class SimulatedHidden(HiddenLengths):
    """Reports of an engine with a head that errs as ``errors``: one with the first token and with every
    ``EVERY``-th after it, up to the head's horizon.

    They depend on the seed, the request's id and its length alone: no decision changes what is predicted. Of
    an answer that goes beyond the horizon they tell no more than that it does.
    """

    def __init__(self, output_tokens: Mapping[str, int], errors: ErrorModel, seed: int = 0) -> None:
        super().__init__()
        self._output_tokens = output_tokens
        self._distorted = Distortion(errors, seed)
        self._said: dict[str, list[tuple[float, float]]] = {}

    def reports(self, requests: Sequence[Request], generated: Integers) -> Floats:
        """See ``HiddenLengths.reports``: without a token there is no report yet."""
        said = self._said
        found = [
            _newest(said.get(request.id) or self._say(request.id), count) if count else NONE
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
        at = np.arange(0, max(1, min(output, self._distorted.horizon)), EVERY)
        number = np.full(len(at), crc32(request_id.encode()), np.int64)
        predicted = self._distorted(number, at, np.maximum(output - at, 0.0))
        # The step that predicts samples one token, with which the report comes.
        reports = zip((at + 1).tolist(), np.maximum(predicted - 1.0, 1.0).tolist(), strict=True)
        said = self._said[request_id] = list(reports)
        return said


def _newest(said: list[tuple[float, float]], generated: int) -> tuple[float, float]:
    return said[min((generated - 1) // EVERY, len(said) - 1)]
