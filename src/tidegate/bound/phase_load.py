"""How much of each phase a trace asks for, in instances: an estimate before any simulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.forms import attention_work
from tidegate.costs.profile import Profile
from tidegate.workloads.trace import Workload
from tidegate.workloads.trace_statistics import cached_tokens

MAX_NUM_SEQS = 1024
"""Requests that an instance decodes at once, at most: vLLM's default on a large GPU."""


@dataclass(frozen=True, slots=True)
class PhaseLoad:
    """Instance-seconds per second that ``length_s`` seconds of a trace need, by phase.

    ``decode`` is None when no batch, not even a single request, keeps the TPOT; ``batch`` is the batch that
    it assumes.
    """

    start_s: float
    length_s: float
    prefill: float
    decode: float | None
    batch: int

    @property
    def prefill_share(self) -> float | None:
        """Return prefill's share of the two phases, or None when it is not defined."""
        if self.decode is None or self.prefill + self.decode == 0:
            return None
        return self.prefill / (self.prefill + self.decode)


def phase_load(
    workload: Workload, profile: Profile, *, tpot_s: float, kv_tokens: int, window_s: float
) -> list[PhaseLoad]:
    """Estimate the load of every window of ``window_s``, in order of time.

    Prefill: the time of each prompt alone, without the tokens that an unbounded prefix cache holds. Decode:
    the answers' tokens at the largest batch of the window's mean context that keeps ``tpot_s`` and fits
    ``kv_tokens``. Both count at arrival; queues, transfers and interference are left out. Raises ConfigError
    for an empty trace or sizes that are not positive.
    """
    if not workload:
        raise ConfigError("the trace holds no requests")
    if not (tpot_s > 0 and kv_tokens > 0 and window_s > 0):
        raise ConfigError("TPOT, KV capacity and window must be positive")
    since_s = workload.arrival_s - workload.arrival_s[0]
    window = (since_s / window_s).astype(np.int64)
    # The last token of a prompt is always computed.
    cached = np.minimum(cached_tokens(workload), workload.input_tokens - 1.0)
    new = workload.input_tokens - cached
    prefill_s = np.bincount(window, profile.prefill.seconds(new, attention_work(new, cached)))
    # The first token is prefill's; the others see a context that grows from prompt to answer.
    steps = workload.output_tokens - 1
    context = steps * (workload.input_tokens + 0.5 * workload.output_tokens)
    sums = np.column_stack([prefill_s, np.bincount(window, steps), np.bincount(window, context)])
    loads = []
    for index, (prefill, tokens, total_context) in enumerate(sums.tolist()):
        start_s = index * window_s
        # The last window ends with the trace.
        length_s = min(window_s, float(since_s[-1]) - start_s) or window_s
        mean_context = total_context / tokens if tokens else 0.0
        most = min(MAX_NUM_SEQS, int(kv_tokens // max(1.0, mean_context)))
        batches = np.arange(1.0, most + 1)
        steps_s = np.asarray(profile.step.seconds(batches, batches * mean_context))
        batch = int(np.searchsorted(steps_s, tpot_s, side="right"))
        decode = 0.0 if not tokens else None
        if tokens and batch:
            decode = tokens * float(steps_s[batch - 1]) / batch / length_s
        loads.append(PhaseLoad(start_s, length_s, prefill / length_s, decode, batch))
    return loads
