"""What a source of length predictions answers, and what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tidegate.core.prediction import Prediction
from tidegate.core.request import Request

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Remaining = tuple[Floats, Floats, Floats]
"""Tokens still to be generated, one value per request: the mean, the 0.1 and the 0.9 quantile."""


class LengthSource(Protocol):
    """Predicts how many tokens requests will still generate.

    ``generated`` always counts all tokens of an answer, those before a replay included. A request may be as
    it was at any time of its life: ``prompt_tokens`` and ``max_tokens`` add up to the same, and
    ``Request.generated`` says how much of the prompt is answer. Predictions are at least 1 and at most what
    the request may still generate. A class that derives from this has to answer, and hears what it likes.
    """

    @property
    def name(self) -> str:
        """What ``Prediction.source`` says, and ``--lengths`` takes."""
        ...

    absurd: int = 0
    """How many predictions of engines were dropped, for they cannot be."""

    def remaining(self, request: Request, generated: int) -> Prediction:
        """Predict for one request that has ``generated`` tokens."""
        ...

    def remaining_many(self, requests: Sequence[Request], generated: Integers) -> Remaining:
        """Predict for many at once."""
        ...

    def reported(self, request_id: str, at_token: int, remaining: float) -> None:
        """Take what an engine predicts of a request that has ``at_token`` tokens."""
        return

    def tokens(self, requests: Sequence[Request], generated: Integers, now: float) -> None:
        """Hear how far the decoding requests are. Told now and then, of all of them at once."""
        return

    def finished(self, request: Request, generated: int, now: float) -> None:
        """Hear that a request was answered in full, with ``generated`` tokens."""
        return

    def aborted(self, request: Request, generated: int, now: float) -> None:
        """Hear that a request ended otherwise: its answer would have had more than ``generated`` tokens."""
        return


def limits(requests: Sequence[Request], generated: Integers) -> Floats:
    """Return the tokens that each request may still generate, at least 1."""
    most = np.array([request.max_tokens + request.generated for request in requests], np.float64)
    return np.maximum(most - generated, 1.0)


def limit(request: Request, generated: int) -> float:
    """Return the tokens that a request may still generate, at least 1."""
    return max(1.0, float(request.max_tokens + request.generated - generated))
