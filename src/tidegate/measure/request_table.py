"""The requests of a run, column by column: what summaries, reports and plots of a simulation start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]
Counts = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RequestTable:
    """One row per offered request, in order of arrival. Times are seconds since the run's start.

    A time that a request did not reach is NaN. ``outcome`` indexes ``outcomes``, of which number 0 is ``ok``;
    ``prefill_on`` and ``decode_on`` index ``instances``, -1 for none. ``stages_s`` has an array per stage
    of ``tidegate.core.stages.STAGES``. ``slo_class`` is empty where the workload names no class.
    """

    instances: Sequence[str]
    outcomes: Sequence[str]
    arrival_s: Seconds
    input_tokens: Counts
    output_tokens: Counts
    outcome: Counts
    first_token_s: Seconds
    last_token_s: Seconds
    end_s: Seconds
    ttft_target_s: Seconds
    tpot_target_s: Seconds
    stages_s: Mapping[str, Seconds]
    prefill_on: Counts
    decode_on: Counts
    cached_tokens: Counts
    preemptions: Counts
    migrations: Counts
    kv_transfer_bytes: Counts
    slo_class: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def ok(self) -> Mask:
        """Tell which requests were answered in full."""
        answered: Mask = self.outcome == 0
        return answered

    @property
    def ttft_s(self) -> Seconds:
        """Arrival to first token; NaN without one."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> Seconds:
        """Mean time per token after the first; NaN for fewer than two tokens."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return (self.last_token_s - self.first_token_s) / gaps

    @property
    def e2e_s(self) -> Seconds:
        """Arrival to end."""
        return self.end_s - self.arrival_s

    @property
    def ttft_met(self) -> Mask:
        """Tell which requests were answered within their TTFT target."""
        return self.ok & (self.ttft_s <= self.ttft_target_s)

    @property
    def tpot_met(self) -> Mask:
        """Tell which requests were answered within their TPOT target; one token has no TPOT to miss."""
        return self.ok & ~(self.tpot_s > self.tpot_target_s)

    @property
    def attained(self) -> Mask:
        """Tell which requests were answered within both targets."""
        return self.ttft_met & self.tpot_met
