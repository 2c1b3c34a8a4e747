"""What is left of an answer, as predicted."""

from __future__ import annotations

import msgspec


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The tokens that a request will still generate, as predicted once it had generated ``at_token``.

    ``mean`` is the expectation, ``low`` and ``high`` are the 0.1 and 0.9 quantiles; all are tokens after the
    ``at_token``-th. ``source`` says who predicts: ``oracle``, ``max-tokens``, ``histogram`` or ``hidden``.
    """

    mean: float
    low: float
    high: float
    at_token: int
    source: str
