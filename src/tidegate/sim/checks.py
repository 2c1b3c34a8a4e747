"""What makes a simulation pointless, told in words instead of in a table of misses."""

from __future__ import annotations

from collections.abc import Sequence

from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica


def slo_warnings(replicas: Sequence[Replica], slo: Slo) -> list[str]:
    """Return a warning per target that no instance can meet even on an empty cluster.

    The least that counts: the prefill of a one-token prompt, and a decode step of one request.
    """
    if not replicas:
        return []
    prefill_s = min(r.profile.prefill_s(1, 0) + r.engine.host_s for r in replicas)
    step_s = min(float(r.profile.step.seconds(1.0, 1.0)) + r.engine.host_s for r in replicas)
    warnings = []
    if prefill_s > slo.ttft_s:
        warnings.append(
            f"no instance can meet the TTFT target of {slo.ttft_s * 1e3:g} ms: the prefill of a single token "
            f"takes {prefill_s * 1e3:.3g} ms"
        )
    if step_s > slo.tpot_s:
        warnings.append(
            f"no instance can meet the TPOT target of {slo.tpot_s * 1e3:g} ms: a step of a single request "
            f"takes {step_s * 1e3:.3g} ms"
        )
    return warnings


class Oversize:
    """Counts the requests that no instance could hold."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._count = 0
        self._largest = 0
        self._number = -1

    def note(self, number: int, tokens: int) -> None:
        """Take note of request ``number`` of the trace, of ``tokens`` prompt and answer tokens."""
        self._count += 1
        if tokens > self._largest:
            self._largest, self._number = tokens, number

    def warnings(self) -> list[str]:
        """Return what there is to say."""
        if not self._count:
            return []
        return [
            f"{self._count} requests were refused: they need more tokens than the longest context of any "
            f"instance, {self._context}; the largest is request {self._number} with {self._largest}"
        ]
