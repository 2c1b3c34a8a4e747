"""The gateway's Prometheus metrics: base units, small closed labels, no request ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.core.stages import STAGES
from tidegate.ledger.snapshot import Snapshot

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """Everything ``/metrics`` shows. Each request is observed once, at its end."""

    def __init__(self, snapshot: Callable[[], Snapshot], in_flight: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("tidegate_requests", "Requests by final outcome", ["outcome"], registry=r)
        self.attained = Counter("tidegate_requests_attained", "Requests that met their SLO", registry=r)
        self.ttft = Histogram(
            "tidegate_ttft_seconds", "Arrival to first token sent", buckets=TTFT_BUCKETS, registry=r
        )
        self.tpot = Histogram(
            "tidegate_tpot_seconds", "Mean inter-token time", buckets=TPOT_BUCKETS, registry=r
        )
        stage = Histogram(
            "tidegate_stage_seconds", "Time by stage", ["stage"], buckets=TTFT_BUCKETS, registry=r
        )
        self.stages = {name: stage.labels(name) for name in STAGES}
        self.prompt_tokens = Counter("tidegate_prompt_tokens", "Prompt tokens served", registry=r)
        self.output_tokens = Counter("tidegate_output_tokens", "Tokens generated", registry=r)
        self.kv_transfer = Counter("tidegate_kv_transfer_bytes", "KV moved between instances", registry=r)
        self.flips = Counter("tidegate_flips", "Label rewrites", ["to", "reason"], registry=r)
        self.replays = Counter("tidegate_replays", "Legs run again after a failure", ["reason"], registry=r)
        self.migrations = Counter(
            "tidegate_migrations", "Migrations by how they ended", ["event"], registry=r
        )
        self.handles_refused = Counter(
            "tidegate_kv_handles_refused", "KV handles that were not sent on", ["reason"], registry=r
        )
        self.load_drift = Counter(
            "tidegate_load_drift",
            "Times an engine and the ledger came to differ",
            ["instance", "kind"],
            registry=r,
        )
        self.prediction_error = Histogram(
            "tidegate_prefill_prediction_error_ratio",
            "abs(predicted - observed) / observed prefill time",
            buckets=(0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
            registry=r,
        )
        r.register(_ClusterGauges(snapshot, in_flight))

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)


class _ClusterGauges(Collector):
    """Reads the ledger when scraped, so that no gauge is kept twice."""

    def __init__(self, snapshot: Callable[[], Snapshot], in_flight: Callable[[], int]) -> None:
        self._snapshot = snapshot
        self._in_flight = in_flight

    def collect(self) -> Iterable[Metric]:
        snapshot = self._snapshot()
        gauge = GaugeMetricFamily("tidegate_requests_in_flight", "Requests being served")
        gauge.add_metric([], float(self._in_flight()))
        yield gauge
        columns = {
            "tidegate_instance_role": ("0 prefill, 1 decode, 2 mixed", snapshot.role),
            "tidegate_instance_prefill_requests": ("In prefill", snapshot.prefill_requests),
            "tidegate_instance_prefill_wait_seconds": ("Predicted prefill queue", snapshot.prefill_wait_s),
            "tidegate_instance_decode_requests": ("Decoding", snapshot.decode_requests),
            "tidegate_instance_decode_tokens": ("Resident decode tokens", snapshot.decode_tokens),
        }
        for name, (text, values) in columns.items():
            family = GaugeMetricFamily(name, text, labels=["instance"])
            for i, instance in enumerate(snapshot.ids):
                family.add_metric([instance], float(values[i]))
            yield family
