"""The gateway's Prometheus metrics: base units, small closed labels, no request ids."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.control.plane import ControlPlane
from tidegate.control.record import RequestEnding, RequestRecord
from tidegate.core.instance import Role
from tidegate.core.stages import STAGES

TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
START_BUCKETS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
ERROR_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class Distribution:
    """A histogram's counts. prometheus_client's own takes a lock per bucket, ten times a request."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str] = ()) -> None:
        """Add the counts, each with those of all lesser buckets, to a family."""
        bounds = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        family.add_metric(labels, buckets, self._sum)


class Metrics(Collector):
    """Everything ``/metrics`` shows. The control plane is read when scraped: no number is kept twice."""

    def __init__(self, plane: ControlPlane, now: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("tidegate_requests", "Requests by final outcome", ["outcome"], registry=r)
        self.flips = Counter("tidegate_flips", "Label rewrites", ["to", "reason"], registry=r)
        self.replays = Counter("tidegate_replays", "Legs run again after a failure", ["reason"], registry=r)
        text = "KV handles that were not sent on"
        self.handles_refused = Counter("tidegate_kv_handles_refused", text, ["reason"], registry=r)
        text = "Times an engine and the ledger came to differ"
        self.load_drift = Counter("tidegate_load_drift", text, ["member", "kind"], registry=r)
        text = "Instances that were to be started and did not come up"
        self.starts_failed = Counter("tidegate_instance_starts_failed", text, ["role"], registry=r)
        self._starts: defaultdict[str, Distribution] = defaultdict(lambda: Distribution(START_BUCKETS))
        self._ttft, self._tpot = Distribution(TTFT_BUCKETS), Distribution(TPOT_BUCKETS)
        self._stages = {name: Distribution(TTFT_BUCKETS) for name in STAGES}
        self._prediction_error = Distribution(ERROR_BUCKETS)
        self._attained = self._prompt_tokens = self._output_tokens = self._kv_transfer_bytes = 0
        self._plane = plane
        self._now = now
        r.register(self)

    def observe(self, record: RequestRecord, ending: RequestEnding) -> None:
        """Take in a request. Called exactly once for each, at its end."""
        self.requests.labels(ending.outcome).inc()
        self._attained += ending.attained(record)
        ttft_s, tpot_s = record.ttft_s, record.tpot_s(ending.output_tokens)
        if ttft_s is None:
            return
        self._ttft.observe(ttft_s)
        if tpot_s is not None:
            self._tpot.observe(tpot_s)
        for name, value in record.stages.items():
            self._stages[name].observe(value)
        self._prompt_tokens += ending.prompt_tokens
        self._output_tokens += ending.output_tokens
        self._kv_transfer_bytes += record.kv_transfer_bytes
        observed_s = record.observed_prefill_s
        if observed_s and record.predicted_prefill_s is not None:
            self._prediction_error.observe(abs(record.predicted_prefill_s - observed_s) / observed_s)

    def started(self, role: Role, start_s: float) -> None:
        """Take in that an instance is up, so long after it was asked for."""
        self._starts[role.label].observe(start_s)

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """See ``Collector.collect``."""
        yield from self._served()
        plane = self._plane
        snapshot = plane.snapshot(self._now())
        in_flight, held = float(len(plane.requests)), float(plane.held_count)
        yield GaugeMetricFamily("tidegate_requests_in_flight", "Requests being served", in_flight)
        yield GaugeMetricFamily("tidegate_requests_held", "Requests that wait to be placed", held)
        starting = GaugeMetricFamily("tidegate_instances_starting", "Asked for and not up", labels=["role"])
        took = HistogramMetricFamily(
            "tidegate_instance_start_seconds", "From asked for to up", labels=["role"]
        )
        for role in Role:
            starting.add_metric([role.label], float(plane.membership.starting[role]))
            self._starts[role.label].add_to(took, [role.label])
        yield starting
        yield took
        migrations = CounterMetricFamily(
            "tidegate_migrations", "Migrations by what became of them", labels=["event"]
        )
        for event in ("begun", "done", "cancelled", "ignored"):
            migrations.add_metric([event], float(plane.migrations.get(event, 0)))
        yield migrations
        if plane.prefixes is not None:
            hits = CounterMetricFamily(
                "tidegate_prefix_hit_tokens",
                "Prompt tokens expected in prefix caches, and reported by engines",
                labels=["source"],
            )
            hits.add_metric(["predicted"], float(plane.prefixes.predicted_tokens))
            hits.add_metric(["reported"], float(plane.prefixes.reported_tokens))
            yield hits
        if plane.lengths is not None:
            text = "Predicted lengths of engines that cannot be, and were dropped"
            yield CounterMetricFamily("tidegate_absurd_lengths", text, float(plane.lengths.absurd))
        columns = {
            "tidegate_instance_role": ("0 prefill, 1 decode, 2 mixed", snapshot.role),
            "tidegate_instance_prefill_requests": ("In prefill", snapshot.prefill_requests),
            "tidegate_instance_prefill_wait_seconds": ("Predicted prefill queue", snapshot.prefill_wait_s),
            "tidegate_instance_decode_requests": ("Decoding", snapshot.decode_requests),
            "tidegate_instance_decode_tokens": ("Resident decode tokens", snapshot.decode_tokens),
        }
        for name, (text, values) in columns.items():
            family = GaugeMetricFamily(name, text, labels=["member"])
            for i, instance in enumerate(snapshot.ids):
                family.add_metric([instance], float(values[i]))
            yield family

    def _served(self) -> Iterable[Metric]:
        """What ``observe`` took in."""
        for name, text, value in (
            ("tidegate_requests_attained", "Requests that met their SLO", self._attained),
            ("tidegate_prompt_tokens", "Prompt tokens served", self._prompt_tokens),
            ("tidegate_output_tokens", "Tokens generated", self._output_tokens),
            ("tidegate_kv_transfer_bytes", "KV moved between instances", self._kv_transfer_bytes),
        ):
            yield CounterMetricFamily(name, text, float(value))
        error = "abs(predicted - observed) / observed prefill time"
        for name, text, distribution in (
            ("tidegate_ttft_seconds", "Arrival to first token sent", self._ttft),
            ("tidegate_tpot_seconds", "Mean inter-token time", self._tpot),
            ("tidegate_prefill_prediction_error_ratio", error, self._prediction_error),
        ):
            family = HistogramMetricFamily(name, text)
            distribution.add_to(family)
            yield family
        family = HistogramMetricFamily("tidegate_stage_seconds", "Time by stage", labels=["stage"])
        for name, distribution in self._stages.items():
            distribution.add_to(family, [name])
        yield family
