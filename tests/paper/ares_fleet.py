"""Decode instances with known answers, for the tests of ARES.

A step takes 10 ms plus 10 us per resident token; KV of 1,000 bytes a token moves at 1 GB/s, a token in 1 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tidegate.core.instance import Role
from tidegate.core.prediction import Prediction
from tidegate.core.request import Request
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.rows import Floats, Integers
from tidegate_testing import instance, profile, request

PROFILE = profile()


class KnownAnswers:
    """A ledger of decode instances ``d0``, ``d1``, ..., with the tokens that each decode has left.

    ``spread`` makes the 0.1 and the 0.9 quantile that many times less and more than the mean.
    """

    def __init__(
        self,
        *pools: Sequence[tuple[int, float]],
        kv: int = 100_000,
        spread: float = 1.0,
        tpot_s: float = 0.05,
    ) -> None:
        """Each of ``pools`` is an instance: its decodes' tokens so far, and left."""
        self.left: dict[str, float] = {}
        self.spread = spread
        self.tpot_s = tpot_s
        self.ledger = Ledger(forecast=self._forecast)
        shape = replace(instance(kv_capacity_tokens=kv), kv_bytes_per_token=1000)
        for index in range(len(pools)):
            self.ledger.instance_up(replace(shape, id=f"d{index}"), PROFILE, Role.DECODE, 0.0)
        for index, decodes in enumerate(pools):
            for number, (context, left) in enumerate(decodes):
                self.decode(f"d{index}-{number}", f"d{index}", context, left)

    def decode(self, name: str, on: str, context: int, left: float) -> None:
        """Add a decode that has its first token."""
        self.left[name] = left
        asked = request(name, context - 1, max_tokens=100_000, tpot_s=self.tpot_s)
        self.ledger.prefill_dispatched(asked, on, 0.0)
        self.ledger.decode_dispatched(name, on, context - 1, 0.0)
        self.ledger.tokens(name, 1, 0.0)

    def _forecast(self, requests: Sequence[Request], generated: Integers) -> tuple[Floats, Floats, Floats]:
        mean = np.array([self.left.get(each.id, 100.0) for each in requests], np.float64)
        return mean, mean / self.spread, mean * self.spread


def asking(context: int, left: float, most: float | None = None) -> Request:
    """Return a request that a decode placement is asked for."""
    told = Prediction(left, left, left if most is None else most, 1, "oracle")
    return Request("new", context, 100_000, 0.0, remaining=told)
