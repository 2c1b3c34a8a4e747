"""How much of each phase a trace asks for, in instances: an estimate before any simulation."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import Profile
from tidegate.workloads.trace import TraceRecord, Workload
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
    workload: Workload,
    profile: Profile,
    *,
    tpot_s: float,
    kv_tokens: int,
    window_s: float,
    max_num_seqs: int = MAX_NUM_SEQS,
) -> list[PhaseLoad]:
    """Estimate the load of every window of ``window_s``, in order of time.

    Prefill: the time of each prompt alone, without the tokens that an unbounded prefix cache holds. Decode:
    the answers' tokens at the largest batch of the window's mean context that keeps ``tpot_s`` and fits
    ``kv_tokens``. Both count at arrival; queues, transfers and interference are left out. Raises ConfigError
    for an empty trace or sizes that are not positive.
    """
    if not workload:
        raise ConfigError("the trace holds no requests")
    if not (tpot_s > 0 and kv_tokens > 0 and window_s > 0 and max_num_seqs > 0):
        raise ConfigError("TPOT, KV capacity, window and batch must be positive")
    origin_s = float(workload.arrival_s[0])
    duration_s = float(workload.arrival_s[-1]) - origin_s
    windows: dict[int, list[tuple[TraceRecord, int]]] = {}
    for record, cached in zip(workload, cached_tokens(workload), strict=True):
        windows.setdefault(int((record.arrival_s - origin_s) / window_s), []).append((record, cached))
    loads = []
    for index in range(max(windows) + 1):
        start_s = index * window_s
        requests = windows.get(index, [])
        # The last window ends with the trace.
        length_s = min(window_s, duration_s - start_s) or window_s
        loads.append(_window(start_s, length_s, requests, profile, tpot_s, kv_tokens, max_num_seqs))
    return loads


def _window(
    start_s: float,
    length_s: float,
    requests: list[tuple[TraceRecord, int]],
    profile: Profile,
    tpot_s: float,
    kv_tokens: int,
    max_num_seqs: int,
) -> PhaseLoad:
    prefill_s = 0.0
    tokens = context = 0.0
    for record, cached in requests:
        cached = min(cached, record.input_tokens - 1)  # the last token is always computed
        prefill_s += profile.prefill_s(record.input_tokens - cached, cached)
        # The first token is prefill's; the others see a context that grows from prompt to answer.
        steps = record.output_tokens - 1
        tokens += steps
        context += steps * (record.input_tokens + 0.5 * record.output_tokens)
    mean_context = context / tokens if tokens else 0.0
    batch = _largest_batch(
        profile, tpot_s, mean_context, min(max_num_seqs, int(kv_tokens // max(1.0, mean_context)))
    )
    if not tokens:
        return PhaseLoad(start_s, length_s, prefill_s / length_s, 0.0, batch)
    if not batch:
        return PhaseLoad(start_s, length_s, prefill_s / length_s, None, 0)
    step_s = float(profile.step.seconds(batch, batch * mean_context))
    return PhaseLoad(start_s, length_s, prefill_s / length_s, tokens * step_s / batch / length_s, batch)


def _largest_batch(profile: Profile, tpot_s: float, context_tokens: float, most: int) -> int:
    """Return the largest batch up to ``most`` whose step takes at most ``tpot_s``; 0 when none does."""
    fits, exceeds = 0, most + 1
    while exceeds - fits > 1:
        batch = (fits + exceeds) // 2
        if profile.step.seconds(batch, batch * context_tokens) <= tpot_s:
            fits = batch
        else:
            exceeds = batch
    return fits
