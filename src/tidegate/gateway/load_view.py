"""The readings of a ``LoadWatch``, for ``/tidegate/state`` and ``/metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.gateway.loads import LoadWatch, Watched


def load_state(watch: LoadWatch, instance_id: str, now: float) -> dict[str, Any]:
    """Return what the state says of an instance's load; nothing for one that does not tell it.

    ``load`` is the engine's own word, ``foreign_*`` what the ledger was corrected by, ``drifts`` counts
    differences by kind, ``prompt_tokens`` tells where the KV of prompts came from.
    """
    watched = watch.watched.get(instance_id)
    if watched is None:
        return {}
    load, told = watched.load, None
    if load is not None:
        told = {
            "running": load.running,
            "waiting": load.waiting,
            "waiting_by_reason": load.waiting_by_reason,
            "kv_share": None if load.kv_usage is None else round(load.kv_usage, 4),
            "preemptions": load.preemptions,
            "nixl_bytes": load.nixl_bytes,
            "nixl_failed_transfers": load.nixl_failed_transfers,
            "nixl_failed_notifications": load.nixl_failed_notifications,
            "nixl_expired": load.nixl_expired,
            "read_ago_s": round(now - watched.read_at_s, 3),
        }
    return {
        "load": told,
        "foreign_requests": watched.reconciler.foreign_requests,
        "foreign_tokens": watched.reconciler.foreign_tokens,
        "drifts": {kind.value: count for kind, count in watch.drifts.get(instance_id, Counter()).items()},
        "prompt_tokens": dict(watch.tallies[instance_id].totals),
    }


def prompt_tokens(watch: LoadWatch) -> dict[str, int]:
    """Return the prompt tokens of all instances by where their KV came from, since each was first read."""
    total: Counter[str] = Counter()
    for tally in watch.tallies.values():
        total.update(tally.totals)
    return dict(total)


GAUGES: dict[str, tuple[str, Callable[[Watched], float | None]]] = {
    "tidegate_engine_running_requests": (
        "Running, as the engine says",
        lambda of: None if of.load is None else of.load.running,
    ),
    "tidegate_engine_waiting_requests": (
        "Waiting, as the engine says",
        lambda of: None if of.load is None else of.load.waiting,
    ),
    "tidegate_engine_kv_usage_ratio": (
        "KV in use, as the engine says",
        lambda of: None if of.load is None else of.load.kv_usage,
    ),
    "tidegate_foreign_requests": (
        "On the engine beyond the ledger's requests",
        lambda of: of.reconciler.foreign_requests,
    ),
    "tidegate_foreign_tokens": (
        "KV in use on the engine beyond the ledger's",
        lambda of: of.reconciler.foreign_tokens,
    ),
}


class LoadGauges(Collector):
    """Shows what a ``LoadWatch`` holds when scraped; nothing for what is unknown."""

    def __init__(self, watch: LoadWatch) -> None:
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        for name, (text, read) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["member"])
            for watched in self._watch.watched.values():
                value = read(watched)
                if value is not None:
                    gauge.add_metric([watched.id], float(value))
            yield gauge
        prompts = CounterMetricFamily(
            "tidegate_engine_prompt_tokens",
            "Prompt tokens by where their KV came from",
            labels=["member", "source"],
        )
        for instance_id, tally in self._watch.tallies.items():
            for source, tokens in tally.totals.items():
                prompts.add_metric([instance_id, source], float(tokens))
        yield prompts
