"""How a request ended: one journal row, one observation of each metric."""

from __future__ import annotations

from tidegate.gateway.journal import Journal
from tidegate.gateway.metrics import Metrics
from tidegate.measure.rows import Ending, Story, outcome_row


def record(story: Story, ending: Ending, *, journal: Journal, metrics: Metrics) -> None:
    """Write a request's terminal state. Called exactly once per request."""
    _observe(metrics, story, ending)
    if journal.enabled:
        journal.write("outcome", ending.end_s, **outcome_row(story, ending, journal.started_s))


def _observe(metrics: Metrics, story: Story, ending: Ending) -> None:
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
