"""What a vLLM server's ``/metrics`` says of its load."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

Samples = list[tuple[Mapping[str, str], float]]

NAMES = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "waiting_by_reason": ("vllm:num_requests_waiting_by_reason",),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "preemptions": ("vllm:num_preemptions_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
    "external_queries": ("vllm:external_prefix_cache_queries_total",),
    "external_hits": ("vllm:external_prefix_cache_hits_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "prompt_by_source": ("vllm:prompt_tokens_by_source_total",),
    "generation_tokens": ("vllm:generation_tokens_total",),
    "nixl_bytes": ("vllm:nixl_bytes_transferred_sum",),
    "nixl_failed_transfers": ("vllm:nixl_num_failed_transfers_total",),
    "nixl_failed_notifications": ("vllm:nixl_num_failed_notifications_total",),
    "nixl_expired": ("vllm:nixl_num_kv_expired_reqs_total",),
}
"""The samples that are read; each quantity has its newest name first, then older ones."""
WANTED = frozenset(name for names in NAMES.values() for name in names)


@dataclass(frozen=True, slots=True)
class Load:
    """One reading of a server, summed over its data-parallel engines; None for what it does not tell.

    ``running`` and ``waiting`` are requests now; ``kv_usage`` is the share of KV blocks in use, pinned ones
    included, 0 to 1. Everything else counts since the server started: tokens, but for ``preemptions``,
    ``nixl_bytes`` pulled, transfers and notifications that failed, and ``nixl_expired`` leases.
    ``prompt_by_source`` tells ``local_compute``, ``local_cache_hit`` and ``external_kv_transfer`` apart.
    """

    running: int | None = None
    waiting: int | None = None
    waiting_by_reason: Mapping[str, int] | None = None
    kv_usage: float | None = None
    preemptions: int | None = None
    prefix_queries: int | None = None
    prefix_hits: int | None = None
    external_queries: int | None = None
    external_hits: int | None = None
    prompt_tokens: int | None = None
    prompt_by_source: Mapping[str, int] | None = None
    generation_tokens: int | None = None
    nixl_bytes: int | None = None
    nixl_failed_transfers: int | None = None
    nixl_failed_notifications: int | None = None
    nixl_expired: int | None = None

    @property
    def requests(self) -> int | None:
        """Requests on the server, running or waiting; None unless it tells both."""
        return None if self.running is None or self.waiting is None else self.running + self.waiting


def parse_load(page: str) -> Load:
    """Read a page of Prometheus text. Raises ValueError when it is malformed where it matters."""
    samples: defaultdict[str, Samples] = defaultdict(list)
    # The parser takes 9 ms for a whole page of 60 kB, nearly all of it histograms that nobody reads here.
    lines = (line for line in page.split("\n") if _name(line) in WANTED)
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return Load(
        running=_total(_present(samples, "running")),
        waiting=_total(_present(samples, "waiting")),
        waiting_by_reason=_totals(_present(samples, "waiting_by_reason"), "reason"),
        kv_usage=_mean(_present(samples, "kv_usage")),
        preemptions=_total(_present(samples, "preemptions")),
        prefix_queries=_total(_present(samples, "prefix_queries")),
        prefix_hits=_total(_present(samples, "prefix_hits")),
        external_queries=_total(_present(samples, "external_queries")),
        external_hits=_total(_present(samples, "external_hits")),
        prompt_tokens=_total(_present(samples, "prompt_tokens")),
        prompt_by_source=_totals(_present(samples, "prompt_by_source"), "source"),
        generation_tokens=_total(_present(samples, "generation_tokens")),
        nixl_bytes=_total(_present(samples, "nixl_bytes")),
        nixl_failed_transfers=_total(_present(samples, "nixl_failed_transfers")),
        nixl_failed_notifications=_total(_present(samples, "nixl_failed_notifications")),
        nixl_expired=_total(_present(samples, "nixl_expired")),
    )


def _name(line: str) -> str:
    """Return the metric a line is about, as far as the start of its labels or value."""
    end = line.find("{")
    return line[:end] if end >= 0 else line.partition(" ")[0]


def _present(samples: Mapping[str, Samples], quantity: str) -> Samples:
    """Return the samples of a quantity under its first name that there is; none if one is not a number."""
    found = next((samples[name] for name in NAMES[quantity] if name in samples), [])
    return found if all(math.isfinite(value) for _, value in found) else []


def _total(found: Samples) -> int | None:
    return int(sum(value for _, value in found)) if found else None


def _totals(found: Samples, label: str) -> dict[str, int] | None:
    """Return the sum for each value of ``label``."""
    totals: defaultdict[str, float] = defaultdict(float)
    for labels, value in found:
        totals[labels.get(label, "")] += value
    return {name: int(value) for name, value in totals.items()} or None


def _mean(found: Samples) -> float | None:
    """Return the mean over engines, which have caches of one size."""
    return sum(value for _, value in found) / len(found) if found else None
