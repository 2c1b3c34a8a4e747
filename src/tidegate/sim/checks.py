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


def oversize_warnings(oversize: Sequence[tuple[int, int]], context: int) -> list[str]:
    """Return what there is to say of requests that no instance could hold, each as (tokens, number)."""
    if not oversize:
        return []
    largest, number = max(oversize, key=lambda each: each[0])
    return [
        f"{len(oversize)} requests were refused: they need more tokens than the longest context of any "
        f"instance, {context}; the largest is request {number} with {largest}"
    ]
