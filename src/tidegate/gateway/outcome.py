"""How a request ended: one journal line, one observation of each metric."""

from __future__ import annotations

from tidegate.control.record import RequestEnding, RequestRecord, outcome_line
from tidegate.gateway.metrics import Metrics
from tidegate.journal.writer import JournalWriter


def record(story: RequestRecord, ending: RequestEnding, *, journal: JournalWriter, metrics: Metrics) -> None:
    """Write a request's terminal state. Called exactly once per request."""
    _observe(metrics, story, ending)
    if journal.enabled:
        journal.write(outcome_line(story, ending, journal.started_s))


def _observe(metrics: Metrics, story: RequestRecord, ending: RequestEnding) -> None:
    metrics.requests.labels(ending.outcome).inc()
    if ending.attained(story):
        metrics.attained.inc()
    ttft_s, tpot_s = story.ttft_s, story.tpot_s(ending.output_tokens)
    if ttft_s is None:
        return
    metrics.ttft.observe(ttft_s)
    if tpot_s is not None:
        metrics.tpot.observe(tpot_s)
    for name, value in story.stages.items():
        metrics.stages[name].observe(value)
    metrics.prompt_tokens.inc(ending.prompt_tokens)
    metrics.output_tokens.inc(ending.output_tokens)
    if story.kv_transfer_bytes:
        metrics.kv_transfer.inc(story.kv_transfer_bytes)
    observed_s = story.observed_prefill_s
    if observed_s and story.predicted_prefill_s is not None:
        metrics.prediction_error.observe(abs(story.predicted_prefill_s - observed_s) / observed_s)
