"""How a request ended: one journal row, one observation of each metric."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.errors import TidegateError, status_of
from tidegate.gateway.call import Call
from tidegate.gateway.journal import Journal
from tidegate.gateway.metrics import Metrics


@dataclass(slots=True)
class Story:
    """What happened to a request: the journal's outcome row in the making. Times are the driver's clock."""

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
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token handed to the client's connection."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    def tpot_s(self, output_tokens: int) -> float | None:
        """Mean time per token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (output_tokens - 1)


def record(
    story: Story,
    call: Call,
    *,
    prompt_tokens: int,
    output_tokens: int,
    finish_reason: str | None,
    error: TidegateError | None,
    now_s: float,
    journal: Journal,
    metrics: Metrics,
) -> None:
    """Write a request's terminal state. Called exactly once per request."""
    outcome = "ok" if error is None else status_of(error).label
    ttft_s, tpot_s = story.ttft_s, story.tpot_s(output_tokens)
    attained = error is None and ttft_s is not None and call.slo.attained(ttft_s, tpot_s)
    _observe(metrics, story, outcome, ttft_s, tpot_s, prompt_tokens, output_tokens, attained)
    if not journal.enabled:
        return
    optional = {
        name: value for name, value in (("session_id", call.session), ("tenant", call.tenant)) if value
    }
    journal.write(
        "outcome",
        now_s,
        request=call.id,
        timestamp=round((story.arrival_s - journal.started_s) * 1000.0, 3),
        input_length=prompt_tokens,
        output_length=output_tokens,
        outcome=outcome,
        status=200 if error is None else status_of(error).http,
        error=None if error is None else error.message,
        finish_reason=finish_reason,
        ttft_s=_rounded(ttft_s),
        tpot_s=_rounded(tpot_s),
        e2e_s=_rounded(now_s - story.arrival_s),
        stages={name: _rounded(value) for name, value in story.stages.items()},
        prefill_on=story.prefill_on,
        decode_on=story.decode_on,
        predicted_prefill_s=_rounded(story.predicted_prefill_s),
        observed_prefill_s=_rounded(story.observed_prefill_s),
        cached_tokens=story.cached_tokens,
        kv_transfer_bytes=story.kv_transfer_bytes,
        replays=story.replays,
        slo={"ttft_s": call.slo.ttft_s, "tpot_s": call.slo.tpot_s},
        attained=attained,
        **optional,
    )


def _observe(
    metrics: Metrics,
    story: Story,
    outcome: str,
    ttft_s: float | None,
    tpot_s: float | None,
    prompt_tokens: int,
    output_tokens: int,
    attained: bool,
) -> None:
    metrics.requests.labels(outcome).inc()
    if attained:
        metrics.attained.inc()
    if ttft_s is None:
        return
    metrics.ttft.observe(ttft_s)
    if tpot_s is not None:
        metrics.tpot.observe(tpot_s)
    for name, value in story.stages.items():
        metrics.stages[name].observe(value)
    metrics.prompt_tokens.inc(prompt_tokens)
    metrics.output_tokens.inc(output_tokens)
    if story.kv_transfer_bytes:
        metrics.kv_transfer.inc(story.kv_transfer_bytes)
    observed_s = story.observed_prefill_s
    if observed_s and story.predicted_prefill_s is not None:
        metrics.prediction_error.observe(abs(story.predicted_prefill_s - observed_s) / observed_s)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
