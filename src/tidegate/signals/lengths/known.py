"""The two sources that learn nothing: the truth, and the limit that the client set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.signals.lengths.source import Integers, LengthSource, Remaining, limit, limits


class OracleLengths(LengthSource):
    """Knows every answer's length: ``output_tokens`` has it by the request's id. Only simulations do."""

    name = "oracle"

    def __init__(self, output_tokens: Mapping[str, int]) -> None:
        self._output_tokens = output_tokens

    def remaining(self, request: Request, generated: int) -> Prediction:
        """See ``LengthSource.remaining``."""
        left = max(1.0, float(self._output_tokens[request.id] - generated))
        return Prediction(left, left, left, generated, self.name)

    def remaining_many(self, requests: Sequence[Request], generated: Integers) -> Remaining:
        """See ``LengthSource.remaining_many``."""
        output = np.array([self._output_tokens[request.id] for request in requests], np.float64)
        left = np.maximum(output - generated, 1.0)
        return left, left, left


class MaxTokensLengths(LengthSource):
    """Takes every answer to become as long as it may: what a scheduler assumes that knows nothing else."""

    name = "max-tokens"

    def remaining(self, request: Request, generated: int) -> Prediction:
        """See ``LengthSource.remaining``."""
        left = limit(request, generated)
        return Prediction(left, left, left, generated, self.name)

    def remaining_many(self, requests: Sequence[Request], generated: Integers) -> Remaining:
        """See ``LengthSource.remaining_many``."""
        left = limits(requests, generated)
        return left, left, left
