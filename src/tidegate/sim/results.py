"""What a simulation answers: one result per request, and the run in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.slo import Slo


@dataclass(frozen=True, slots=True)
class SimResult:
    """One request. Times are seconds of virtual time; those that were not reached are None."""

    index: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    outcome: str
    first_token_s: float | None
    last_token_s: float | None
    end_s: float
    stages_s: dict[str, float]
    prefill_on: str | None
    decode_on: str | None
    preemptions: int
    kv_transfer_bytes: int
    slo: Slo
    attained: bool

    @property
    def ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """One instance over the run, with its labels at both ends.

    ``most_kv_blocks`` of ``kv_blocks`` were in use at once; ``steps`` are engine steps, however many of them
    were jumped over at a time.
    """

    id: str
    first_role: str
    last_role: str
    steps: int
    kv_blocks: int
    most_kv_blocks: int


@dataclass(frozen=True, slots=True)
class SimRun:
    """A finished simulation; ``requests`` in order of arrival. ``events`` counts what the loop handled."""

    requests: Sequence[SimResult]
    instances: Sequence[InstanceUse]
    flips: int
    end_s: float
    events: int

    @property
    def outcomes(self) -> Counter[str]:
        """How many requests ended in each way."""
        return Counter(result.outcome for result in self.requests)

    @property
    def attained(self) -> int:
        """How many requests were answered within their SLO."""
        return sum(result.attained for result in self.requests)

    @property
    def preemptions(self) -> int:
        return sum(result.preemptions for result in self.requests)

    @property
    def kv_transfer_bytes(self) -> int:
        return sum(result.kv_transfer_bytes for result in self.requests)
