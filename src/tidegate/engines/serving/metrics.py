"""The instance's Prometheus metrics, under vLLM's names, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tidegate.engines.serving.types import EngineStats, RequestTimes, ServingFacts

_LABELS = ("engine", "model_name")
# vLLM's buckets, with finer ones below its first where a small model needs them.
_FIRST_TOKEN_S: tuple[float, ...] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_NEXT_TOKEN_S: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S: tuple[float, ...] = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class ServerMetrics:
    """Latency histograms fed by the server, and gauges and counters read from the engine at a scrape."""

    def __init__(self, facts: ServingFacts, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._labels = ("0", facts.model)
        self._registry.register(_StatsCollector(self._labels, stats))
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN_S
        )
        self.next_token = self._histogram("inter_token_latency_seconds", "Between two tokens", _NEXT_TOKEN_S)
        self.request = self._histogram("e2e_request_latency_seconds", "Arrival to last token", _REQUEST_S)
        self.queue = self._histogram("request_queue_time_seconds", "Submit to admission", _REQUEST_S)
        self.prefill = self._histogram("request_prefill_time_seconds", "Admission to first token", _REQUEST_S)
        self.decode = self._histogram("request_decode_time_seconds", "First to last token", _REQUEST_S)
        self.kv_load = self._histogram(
            "kv_load_time_seconds", "Waiting for pulled KV", _REQUEST_S, "tidegate"
        )
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests by reason",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        info = ("block_size", "num_gpu_blocks", "engine")
        gauge = Gauge("vllm:cache_config_info", "KV cache configuration", info, registry=self._registry)
        gauge.labels(str(facts.block_tokens), str(facts.kv_capacity_tokens // facts.block_tokens), "0").set(1)

    def finished(self, reason: str, times: RequestTimes | None) -> None:
        """Count a request that ended for ``reason``."""
        self._finished.labels(*self._labels, reason).inc()
        if times is None:
            return
        self.queue.observe(times.queue_s)
        self.prefill.observe(times.prefill_s)
        self.decode.observe(times.decode_s)
        if times.kv_loaded_tokens:
            self.kv_load.observe(times.kv_load_s)

    def add_gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show what ``value`` returns at a scrape."""
        gauge = Gauge(name, text, _LABELS, registry=self._registry)
        gauge.labels(*self._labels).set_function(value)

    def exposition(self) -> bytes:
        """Return the Prometheus text."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], room: str = "vllm") -> Histogram:
        made = Histogram(f"{room}:{name}", text, _LABELS, buckets=buckets, registry=self._registry)
        return made.labels(*self._labels)


class _StatsCollector(Collector):
    """Reads the engine's stats once per scrape."""

    def __init__(self, labels: tuple[str, str], stats: Callable[[], EngineStats]) -> None:
        self._labels = labels
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        now = self._stats()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests being computed", now.running),
            ("vllm:num_requests_waiting", "Requests waiting for room or for KV", now.waiting + now.loading),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", now.kv_usage),
            ("tidegate:num_requests_loading_kv", "Requests whose KV is being pulled", now.loading),
            ("tidegate:num_requests_pinned", "Finished requests whose KV a peer may pull", now.pinned),
            ("tidegate:kv_free_blocks", "Free KV blocks", now.free_blocks),
            (
                "tidegate:remaining_tokens",
                "Tokens that running requests are predicted to generate still",
                now.remaining_tokens,
            ),
        ):
            if value is None:
                continue
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in (
            ("vllm:num_preemptions", "Preemptions", now.preemptions),
            ("vllm:prompt_tokens", "Prompt tokens processed", now.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated", now.generation_tokens),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", now.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache", now.prefix_hits),
            ("tidegate:kv_transfer_bytes", "Bytes of KV pulled from peers", now.pulled_bytes),
            ("tidegate:kv_transfer_failures", "Pulls that failed", now.pull_failures),
            ("tidegate:engine_steps", "Engine steps", now.steps),
            ("tidegate:length_predictions", "Predictions of lengths", now.predictions),
            ("tidegate:absurd_predictions", "Predictions that were dropped", now.absurd_predictions),
        ):
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where their KV came from",
            labels=(*_LABELS, "source"),
        )
        sources.add_metric((*self._labels, "local_compute"), now.computed_prompt_tokens)
        sources.add_metric((*self._labels, "local_cache_hit"), now.cached_prompt_tokens)
        sources.add_metric((*self._labels, "external_kv_transfer"), now.pulled_prompt_tokens)
        yield sources
