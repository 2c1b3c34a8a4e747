"""A server's ``/metrics`` at one moment, as far as the probes read it."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

EXTERNAL, LOCAL_HIT, COMPUTED = "external_kv_transfer", "local_cache_hit", "local_compute"
"""Where the KV of prompt tokens came from: the labels of ``vllm:prompt_tokens_by_source_total``."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over the server's data-parallel engines; None where the server shows no such metric.

    ``kv_usage`` is the share of KV blocks in use, pinned ones included. ``shows_kv_fetch`` tells whether the
    server counts its own KV loads, which one started as ``kv_producer`` does not.
    """

    by_source: dict[str, float] | None
    nixl_bytes: float | None
    nixl_expired: float | None
    kv_usage: float | None
    kv_blocks: int | None
    block_tokens: int | None
    prefix_caching: bool | None
    requests: float | None
    shows_kv_fetch: bool

    @property
    def blocks_in_use(self) -> float | None:
        """KV blocks that are not free."""
        if self.kv_usage is None or self.kv_blocks is None:
            return None
        return self.kv_usage * self.kv_blocks

    def source(self, name: str) -> float:
        """Return the prompt tokens from one source so far."""
        return (self.by_source or {}).get(name, 0.0)


def read_counters(text: str) -> Counters:
    """Read Prometheus text. Raises ValueError when it is none."""
    sums: dict[str, float] = {}
    by_source: dict[str, float] = {}
    usages: list[float] = []
    cache: list[dict[str, str]] = []
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("vllm:"):
            continue
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:").removesuffix("_total")
            if name == "cache_config_info":
                cache.append(sample.labels)
            elif name == "prompt_tokens_by_source":
                source = sample.labels.get("source", "")
                by_source[source] = by_source.get(source, 0.0) + sample.value
            elif name == "kv_cache_usage_perc":
                usages.append(sample.value)
            elif not name.endswith(("_bucket", "_created")):
                sums[name] = sums.get(name, 0.0) + sample.value
    blocks = [_whole(labels.get("num_gpu_blocks")) for labels in cache]
    sizes = [_whole(labels.get("block_size")) for labels in cache]
    caching = {labels.get("enable_prefix_caching") for labels in cache}
    return Counters(
        by_source=by_source or None,
        nixl_bytes=sums.get("nixl_bytes_transferred_sum"),
        nixl_expired=sums.get("nixl_num_kv_expired_reqs"),
        kv_usage=sum(usages) / len(usages) if usages else None,
        kv_blocks=sum(n for n in blocks if n) or None,
        block_tokens=next((n for n in sizes if n), None),
        prefix_caching={"True": True, "False": False}.get(str(caching.pop())) if len(caching) == 1 else None,
        requests=_together(sums, "num_requests_running", "num_requests_waiting"),
        shows_kv_fetch="num_requests_kv_fetch_by_stage" in sums,
    )


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _together(sums: dict[str, float], *names: str) -> float | None:
    found = [sums[name] for name in names if name in sums]
    return sum(found) if found else None
