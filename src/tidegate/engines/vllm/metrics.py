"""The reader of a vLLM server's ``/metrics``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client.parser import text_string_to_metric_families

COMPUTED, CACHED, PULLED = "local_compute", "local_cache_hit", "external_kv_transfer"
"""vLLM's names for where the KV of prompt tokens came from: the keys of ``prompt_tokens_by_source``."""

NAMES = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "waiting_by_reason": ("vllm:num_requests_waiting_by_reason",),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "started": ("process_start_time_seconds",),
    "preemptions": ("vllm:num_preemptions_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "prompt_tokens_by_source": ("vllm:prompt_tokens_by_source_total",),
    "kv_fetches": ("vllm:num_requests_kv_fetch_by_stage",),
    "nixl_reads": ("vllm:nixl_xfer_time_seconds_count",),
    "nixl_read_s": ("vllm:nixl_xfer_time_seconds_sum",),
    "nixl_bytes": ("vllm:nixl_bytes_transferred_sum",),
    "nixl_failed_transfers": ("vllm:nixl_num_failed_transfers_total",),
    "nixl_failed_notifications": ("vllm:nixl_num_failed_notifications_total",),
    "nixl_expired": ("vllm:nixl_num_kv_expired_reqs_total",),
}
"""The samples that are read; each quantity has its newest name first, then older ones."""
COUNTS = (
    *("running", "waiting", "preemptions", "prompt_tokens", "nixl_reads", "nixl_bytes"),
    *("nixl_failed_transfers", "nixl_failed_notifications", "nixl_expired"),
)
"""Quantities that are whole numbers, summed over the engines."""
WANTED = frozenset(name for names in NAMES.values() for name in names)
CACHE_CONFIG = "vllm:cache_config_info"

_Samples = list[tuple[Mapping[str, str], float]]


@dataclass(frozen=True, slots=True)
class VllmMetrics:
    """One reading of a server, summed over its data-parallel engines; None for what it does not tell.

    ``running`` and ``waiting`` are requests now; ``kv_usage`` is the share of ``kv_blocks`` in use, pinned
    ones included. ``prompt_tokens``, those by source (``COMPUTED``, ``CACHED``, ``PULLED``), preemptions and
    what begins with ``nixl_`` count since the server started, at ``started_s`` of its Unix clock.
    ``nixl_expired`` are leases that ended. ``counts_kv_fetches`` tells whether the server counts KV loads of
    its own, which a ``kv_producer`` does not; ``shows_nixl`` whether it has any metric of NixlConnector.
    """

    running: int | None = None
    waiting: int | None = None
    waiting_by_reason: Mapping[str, int] | None = None
    kv_usage: float | None = None
    kv_blocks: int | None = None
    block_tokens: int | None = None
    prefix_caching: bool | None = None
    started_s: float | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    prompt_tokens_by_source: Mapping[str, int] | None = None
    nixl_reads: int | None = None
    nixl_read_s: float | None = None
    nixl_bytes: int | None = None
    nixl_failed_transfers: int | None = None
    nixl_failed_notifications: int | None = None
    nixl_expired: int | None = None
    counts_kv_fetches: bool = False
    shows_nixl: bool = False

    @property
    def requests(self) -> int | None:
        """Requests on the server, running or waiting; None unless it tells both."""
        return None if self.running is None or self.waiting is None else self.running + self.waiting

    @property
    def kv_capacity_tokens(self) -> int | None:
        """Tokens that the KV cache holds."""
        return self.kv_blocks * self.block_tokens if self.kv_blocks and self.block_tokens else None

    @property
    def kv_blocks_in_use(self) -> float | None:
        """KV blocks that are not free."""
        return None if self.kv_usage is None or self.kv_blocks is None else self.kv_usage * self.kv_blocks

    def source(self, name: str) -> int:
        """Return the prompt tokens whose KV came from one source so far; 0 where the server does not tell."""
        return (self.prompt_tokens_by_source or {}).get(name, 0)


def read_metrics(page: str) -> VllmMetrics:
    """Read a page of Prometheus text. Raises ValueError when it is malformed where it matters."""
    # The parser takes 9 ms for a whole page of 60 kB, nearly all of it histograms that nobody reads here.
    lines, config = [], []
    for line in page.split("\n"):
        name = _name(line)
        if name in WANTED:
            lines.append(line)
        elif name == CACHE_CONFIG:
            config.append(line)
    samples = _parse(lines)

    def present(quantity: str) -> _Samples:
        """Return the samples under the first name that there is; none if one is not a number."""
        found = next((samples[name] for name in NAMES[quantity] if name in samples), [])
        return found if all(math.isfinite(value) for _, value in found) else []

    def count(quantity: str) -> int | None:
        found = present(quantity)
        return int(sum(value for _, value in found)) if found else None

    usages = [value for _, value in present("kv_usage")]
    starts = [value for _, value in present("started")]
    reads = present("nixl_read_s")
    kv_blocks, block_tokens, prefix_caching = _cache_config(tuple(config))
    return VllmMetrics(
        waiting_by_reason=_by_label(present("waiting_by_reason"), "reason"),
        kv_usage=sum(usages) / len(usages) if usages else None,  # the engines' caches have one size
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        prefix_caching=prefix_caching,
        started_s=starts[0] if starts else None,
        prompt_tokens_by_source=_by_label(present("prompt_tokens_by_source"), "source"),
        nixl_read_s=sum(value for _, value in reads) if reads else None,
        counts_kv_fetches=bool(present("kv_fetches")),
        shows_nixl=page.startswith("vllm:nixl_") or "\nvllm:nixl_" in page,
        **{quantity: count(quantity) for quantity in COUNTS},
    )


def _parse(lines: Sequence[str]) -> Mapping[str, _Samples]:
    samples: defaultdict[str, _Samples] = defaultdict(list)
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return samples


@lru_cache(maxsize=256)  # the lines stay the same in a server's life, and cost as much as all others
def _cache_config(lines: tuple[str, ...]) -> tuple[int | None, int | None, bool | None]:
    """Return the number of KV blocks, the tokens of each, and whether a prefix cache is on."""
    engines = [labels for labels, _ in _parse(lines).get(CACHE_CONFIG, [])]
    blocks = [_whole(labels.get("num_gpu_blocks")) for labels in engines]
    caching = {labels.get("enable_prefix_caching") for labels in engines}
    return (
        sum(blocks) or None if all(blocks) else None,
        next((_whole(labels.get("block_size")) for labels in engines), 0) or None,
        {"True": True, "False": False}.get(str(caching.pop())) if len(caching) == 1 else None,
    )


def _name(line: str) -> str:
    """Return the metric a line is about, as far as the start of its labels or value."""
    end = line.find("{")
    return line[:end] if end >= 0 else line.partition(" ")[0]


def _by_label(found: _Samples, label: str) -> dict[str, int] | None:
    """Return the sum for each value of ``label``."""
    totals: defaultdict[str, float] = defaultdict(float)
    for labels, value in found:
        totals[labels.get(label, "")] += value
    return {name: int(value) for name, value in totals.items()} or None


def _whole(text: str | None) -> int:
    """Return a whole number; 0 for anything else."""
    return int(text) if text is not None and text.isdigit() else 0
