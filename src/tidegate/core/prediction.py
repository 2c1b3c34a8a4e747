"""What is left of an answer, as predicted."""

from __future__ import annotations

import msgspec


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The tokens that a request will still generate behind those that it has when it is asked about.

    ``mean`` is the expectation, ``low`` and ``high`` are the 0.1 and 0.9 quantiles. ``at_token`` is how many
    tokens there were when it was predicted: fewer than now where an engine's prediction has been counted down
    since. ``source`` says who predicts: ``oracle``, ``max-tokens``, ``histogram`` or ``hidden``.
    """

    mean: float
    low: float
    high: float
    at_token: int
    source: str
