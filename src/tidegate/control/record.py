"""The record of a request and of its ending: what the journal, the metrics and the reports know of it."""

from __future__ import annotations

from msgspec import UNSET, Struct, field

from tidegate.core.errors import TidegateError, status_of
from tidegate.core.slo import Slo
from tidegate.journal.schema import OutcomeLine, PredictedLength


class RequestRecord(Struct):
    """What happened to a request so far. Times are seconds on the driver's clock; drivers fill it in."""

    arrival_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    prefill_on: str | None = None
    decode_on: str | None = None
    predicted_prefill_s: float | None = None
    observed_prefill_s: float | None = None
    cached_tokens: int = 0
    kv_transfer_bytes: int = 0
    replays: int = 0
    migrations: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage (see ``tidegate.core.stages``)."""
    read_back_tokens: int = 0
    """Tokens of earlier rounds whose KV was offered to the prefill from where they were decoded: it took what
    its own cache lacked."""
    predicted_lengths: list[PredictedLength] = field(default_factory=list)
    unmovable: str = ""
    """The field of the request whose state no other engine can take up; "" when it can move."""

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token handed to the client's connection; None before it."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Return the mean time per token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (output_tokens - 1)


class RequestEnding(Struct, frozen=True):
    """How a request ended, at ``end_s`` on the driver's clock, and what it was."""

    request: str
    slo: Slo
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None
    error: TidegateError | None
    end_s: float
    session: str = ""
    tenant: str = ""

    @property
    def outcome(self) -> str:
        """``ok`` or the error's metric label."""
        return "ok" if self.error is None else status_of(self.error).label

    def attained(self, record: RequestRecord) -> bool:
        """Tell whether the request was answered within its targets."""
        ttft_s = record.ttft_s
        if self.error is not None or ttft_s is None:
            return False
        return self.slo.attained(ttft_s, record.tpot_s(self.output_tokens))


COPIED = ("prefill_on", "decode_on", "cached_tokens", "kv_transfer_bytes", "replays", "migrations")
"""What a record and a journal's line call alike."""


def outcome_line(record: RequestRecord, ending: RequestEnding, started_s: float) -> OutcomeLine:
    """Return the journal's line of a request's end; ``started_s`` is when the journal began."""
    error = ending.error
    return OutcomeLine(
        t_s=round(ending.end_s - started_s, 6),
        request=ending.request,
        timestamp_ms=round((record.arrival_s - started_s) * 1000.0, 3),
        input_tokens=ending.prompt_tokens,
        output_tokens=ending.output_tokens,
        outcome=ending.outcome,
        status=200 if error is None else status_of(error).http,
        error=None if error is None else error.message,
        finish_reason=ending.finish_reason,
        ttft_s=_rounded(record.ttft_s),
        tpot_s=_rounded(record.tpot_s(ending.output_tokens)),
        e2e_s=_rounded(ending.end_s - record.arrival_s),
        stages_s={name: round(seconds, 6) for name, seconds in record.stages.items()},
        predicted_prefill_s=_rounded(record.predicted_prefill_s),
        observed_prefill_s=_rounded(record.observed_prefill_s),
        **{name: getattr(record, name) for name in COPIED},
        slo=ending.slo,
        attained=ending.attained(record),
        session_id=ending.session or UNSET,
        tenant=ending.tenant or UNSET,
        unmovable=record.unmovable or UNSET,
        read_back_tokens=record.read_back_tokens or UNSET,
        predicted_lengths=record.predicted_lengths or UNSET,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
