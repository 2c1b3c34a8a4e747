"""The cost formulas, each written once, for scalars and for arrays over instances alike.

Coefficients are seconds. A coefficient may be a float (one instance) or an array with one entry per
instance; the formulas only add, multiply and compare, so both work and there is no second copy.
The forms are those that measured step latencies of A100 to B200 GPUs support (prefill 1-5 % median
error, decode 1-3 % on dense models, mixture-of-experts 2-4 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@overload
def attention_work(new_tokens: float, cached_tokens: float) -> float: ...
@overload
def attention_work(new_tokens: float | Values, cached_tokens: float | Values) -> float | Values: ...
def attention_work(new_tokens: float | Values, cached_tokens: float | Values) -> float | Values:
    """Return n*n/2 + n*cached: query-key pairs of ``new_tokens`` appended to ``cached_tokens``."""
    return new_tokens * (0.5 * new_tokens + cached_tokens)


def positive_part(value: float | Values) -> float | Values:
    """Return max(0, value), for a float or entry by entry."""
    if isinstance(value, np.ndarray):
        return np.maximum(value, 0.0)
    return value if value > 0 else 0.0


def lesser(one: float | Values, other: float | Values) -> float | Values:
    """Return the smaller of two values: two floats, or entry by entry where ``one`` is an array."""
    if isinstance(one, float):
        return one if one < other else other
    return np.minimum(one, other)


def greater(one: float | Values, other: float | Values) -> float | Values:
    """Return the larger of two values: two floats, or entry by entry where ``one`` is an array."""
    if isinstance(one, float):
        return one if one > other else other
    return np.maximum(one, other)


def experts_touched(
    batch: float | Values, experts: float | Values, active_experts: float | Values
) -> float | Values:
    """Return the expected number of experts that ``batch`` tokens read, each choosing evenly."""
    return experts * (1.0 - (1.0 - active_experts / experts) ** batch)


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """``a + b*max(0, N - n0) + c*A``: seconds of a pure prefill step.

    N is the sum of new tokens, A the sum of ``attention_work``. ``n0`` is the number of tokens that
    the weight read hides; 0 gives the plain quadratic form of Arrow (section 3.1).
    """

    a_s: float | Values
    b_s: float | Values
    c_s: float | Values
    n0: float | Values = 0.0

    def seconds(self, new_tokens: float | Values, attention: float | Values) -> float | Values:
        """Return the step time for N ``new_tokens`` and A ``attention`` (both sums over the batch)."""
        return self.a_s + self.b_s * positive_part(new_tokens - self.n0) + self.c_s * attention


@dataclass(frozen=True, slots=True)
class StepCost:
    """``a + b*B + c*C + e*E*(1 - (1 - k/E)^B)``: seconds of a pure decode step.

    B is the number of running requests, C the sum of their resident tokens. The last term is the
    expected number of experts read (E experts, k active per token); it is absent for dense models.
    """

    a_s: float | Values
    b_s: float | Values
    c_s: float | Values
    e_s: float | Values = 0.0
    experts: float | Values = 1.0
    active_experts: float | Values = 0.0

    def seconds(self, batch: float | Values, context_tokens: float | Values) -> float | Values:
        """Return the step time of ``batch`` requests holding ``context_tokens`` in all."""
        return self._without_context(batch) + self.c_s * context_tokens

    def max_context_tokens(self, target_s: float, batch: float | Values) -> float | Values:
        """Return the most resident tokens for which a step of ``batch`` stays within ``target_s``.

        Arrow's MT(i, S), with the batch term kept: 0 when the step exceeds the target already.
        """
        return positive_part(target_s - self._without_context(batch)) / self.c_s

    def _without_context(self, batch: float | Values) -> float | Values:
        dense = self.a_s + self.b_s * batch
        if isinstance(self.e_s, float) and self.e_s == 0.0:
            return dense
        return dense + self.e_s * experts_touched(batch, self.experts, self.active_experts)


@dataclass(frozen=True, slots=True)
class MixedCost:
    """``a + b*max(0, N - n0) + c*A + d*C``: seconds of a step with prefill chunks beside decodes.

    N counts chunk tokens plus one per decode, A the chunks' attention work, C the decodes' resident
    tokens. ``d`` is its own coefficient: a resident token costs up to three times more beside a
    chunk than in a pure decode step.
    """

    a_s: float | Values
    b_s: float | Values
    c_s: float | Values
    d_s: float | Values
    n0: float | Values = 0.0

    def seconds(
        self, tokens: float | Values, attention: float | Values, context_tokens: float | Values
    ) -> float | Values:
        """Return the step time for N ``tokens``, A ``attention`` and C ``context_tokens``."""
        chunks = self.a_s + self.b_s * positive_part(tokens - self.n0) + self.c_s * attention
        return chunks + self.d_s * context_tokens


@dataclass(frozen=True, slots=True)
class TransferCost:
    """``latency + bytes/bandwidth``: seconds to move KV between two instances on an idle link."""

    latency_s: float | Values
    bytes_per_s: float | Values

    def seconds(self, n_bytes: float | Values) -> float | Values:
        """Return the time for ``n_bytes``."""
        return self.latency_s + n_bytes / self.bytes_per_s
