"""What engines say of their load: read now and then, and reconciled with the ledger.

Placements go by the ledger, which knows first what the gateway itself does. What else is on an engine, only
the engine can tell: others' requests, leaked ones, pinned KV. It enters the ledger as foreign load.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate.control.plane import ControlPlane
from tidegate.core.clock import Clock
from tidegate.core.errors import EngineError, NoDescriptors
from tidegate.engines.vllm.client import VllmClient
from tidegate.engines.vllm.metrics import CACHED, COMPUTED, PULLED, VllmMetrics
from tidegate.fleet.member import Member
from tidegate.fleet.vllm import STREAM_PIN_S
from tidegate.gateway.metrics import Metrics
from tidegate.journal.schema import LoadDriftLine
from tidegate.journal.writer import JournalWriter
from tidegate.ledger.reconcile import Difference, EngineLoad, LoadDrift, Reconciler

log = logging.getLogger(__name__)

DEADLINE_S = 2.0
"""How long a reading may take (ours): a page is rendered by the process that serves requests, too."""
LONGEST_PAUSE_S = 30.0
"""The pause between readings doubles up to this while they fail (ours)."""
STALE_S = 10.0
"""How long a correction outlives its last reading (ours)."""
READING_S = 0.0015
"""What a reading costs the gateway's loop, measured on a page of 60 kB: 1.0 to 1.6 ms."""
LOOP_SHARE = 0.03
"""The share of the loop that readings may take (ours): many engines are read less often."""

KEPT_S = 2.0 * STREAM_PIN_S
"""How long KV behind a stream is known: until a reading can show that it has gone (ours)."""

PROMPT_SOURCES = {COMPUTED: "computed", CACHED: "cached", PULLED: "pulled"}
"""vLLM's names for where a prompt's KV comes from, and ours."""

GAUGES = {
    "tidegate_engine_running_requests": "Running, as the engine says",
    "tidegate_engine_waiting_requests": "Waiting, as the engine says",
    "tidegate_engine_kv_usage_ratio": "KV in use, as the engine says",
    "tidegate_foreign_requests": "On the engine beyond the ledger's requests",
    "tidegate_foreign_tokens": "KV in use on the engine beyond the ledger's",
}
LOAD_FIELDS = (
    *("running", "waiting", "waiting_by_reason", "preemptions"),
    *("nixl_bytes", "nixl_failed_transfers", "nixl_failed_notifications", "nixl_expired"),
)


class Tally:
    """Counters of an engine since its first reading, over restarts, which begin at 0 again."""

    __slots__ = ("_last", "totals")

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._last: dict[str, int] = {}

    def read(self, name: str, value: int) -> None:
        """Take a counter's value."""
        last = self._last.get(name, value)
        self.totals[name] += value - last if value >= last else value
        self._last[name] = value


class Watched:
    """One life of a member: how to ask it, and what it last said; ``load`` is None while that is unknown."""

    def __init__(self, member: Member, client: VllmClient) -> None:
        instance = member.instance
        self.id = instance.id
        self.capacity_tokens = instance.kv_capacity_tokens
        self.client = client
        self.reconciler = Reconciler(instance.kv_capacity_tokens, instance.block_tokens)
        self.load: VllmMetrics | None = None
        self.read_at_s = 0.0
        self.task: asyncio.Task[None] | None = None
        self.kept: deque[tuple[float, int]] = deque()
        """Until when KV of ended requests may stay pinned, and its tokens."""

    def kept_tokens(self, now: float) -> int:
        """Return the KV that ended requests may still pin."""
        while self.kept and self.kept[0][0] <= now:
            self.kept.popleft()
        return sum(tokens for _, tokens in self.kept)


class LoadWatch(Collector):
    """Reads the load of every member that tells it, and keeps the ledger right about what is foreign.

    It never stands in the way of a request: readings have a deadline and connections of their own, and take
    ``LOOP_SHARE`` of the loop at most. Who does not answer is asked less and less often, and what it said is
    forgotten after ``STALE_S``. When scraped it shows what it holds; nothing for what is unknown.

    ``watched`` holds the members by id, ``tallies`` and ``drifts`` what was counted of each, over its lives.
    """

    def __init__(
        self,
        plane: ControlPlane,
        clock: Clock,
        journal: JournalWriter,
        metrics: Metrics,
        suspect: Callable[[str], None],
        every_s: float,
    ) -> None:
        self._plane = plane
        self._ledger = plane.ledger
        self._clock = clock
        self._journal = journal
        self._metrics = metrics
        self._suspect = suspect
        self._every_s = every_s
        self._session: aiohttp.ClientSession | None = None
        self.watched: dict[str, Watched] = {}
        self.tallies: dict[str, Tally] = {}
        self.drifts: dict[str, Counter[Difference]] = {}
        metrics.registry.register(self)

    # membership

    def follow(self, member: Member) -> None:
        """Begin with a member that is up, if it tells its load."""
        if not member.capabilities.tells_load:
            return
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        name, api_key = member.instance.id, member.api_key
        client = VllmClient(self._session, member.url, instance=name, api_key=api_key, deadline_s=DEADLINE_S)
        watched = self.watched[name] = Watched(member, client)
        self.tallies.setdefault(watched.id, Tally())
        watched.task = asyncio.create_task(self._watch(watched), name=f"load {watched.id}")

    def forget(self, instance_id: str) -> None:
        """End with a member that is down; what was foreign there went with it."""
        watched = self.watched.pop(instance_id, None)
        if watched is not None:
            assert watched.task is not None
            watched.task.cancel()
            self._report(watched, watched.reconciler.unheard())

    async def stop(self) -> None:
        """End with all members."""
        tasks = [watched.task for watched in self.watched.values() if watched.task is not None]
        for name in list(self.watched):
            self.forget(name)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def kept(self, instance_id: str, tokens: int) -> None:
        """Say that a stream which pulled KV ended on an instance: vLLM keeps its KV for a moment."""
        watched = self.watched.get(instance_id)
        if watched is not None:
            watched.kept.append((self._clock.now() + KEPT_S, tokens))

    # what it holds

    def state(self, instance_id: str, now: float) -> dict[str, Any]:
        """Return what the state says of an instance's load; nothing for one that does not tell it.

        ``load`` is the engine's own word, ``foreign_*`` what the ledger was corrected by, ``drifts`` counts
        differences by kind, ``prompt_tokens`` tells where the KV of prompts came from.
        """
        watched = self.watched.get(instance_id)
        if watched is None:
            return {}
        load, state = watched.load, None
        if load is not None:
            state = {name: getattr(load, name) for name in LOAD_FIELDS}
            state["kv_share"] = None if load.kv_usage is None else round(load.kv_usage, 4)
            state["read_ago_s"] = round(now - watched.read_at_s, 3)
        return {
            "load": state,
            "foreign_requests": watched.reconciler.foreign_requests,
            "foreign_tokens": watched.reconciler.foreign_tokens,
            "drifts": {kind.value: count for kind, count in self.drifts.get(instance_id, Counter()).items()},
            "prompt_tokens": dict(self.tallies[instance_id].totals),
        }

    def prompt_tokens(self) -> dict[str, int]:
        """Return all prompt tokens by where their KV came from, since each instance was first read."""
        total: Counter[str] = Counter()
        for tally in self.tallies.values():
            total.update(tally.totals)
        return dict(total)

    def collect(self) -> Iterable[Metric]:
        """See ``Collector.collect``."""
        gauges = [GaugeMetricFamily(name, text, labels=["member"]) for name, text in GAUGES.items()]
        for watched in self.watched.values():
            load, reconciler = watched.load, watched.reconciler
            reading = (None, None, None) if load is None else (load.running, load.waiting, load.kv_usage)
            foreign = (reconciler.foreign_requests, reconciler.foreign_tokens)
            for gauge, value in zip(gauges, (*reading, *foreign), strict=True):
                if value is not None:
                    gauge.add_metric([watched.id], float(value))
        prompts = CounterMetricFamily(
            "tidegate_engine_prompt_tokens",
            "Prompt tokens by where their KV came from",
            labels=["member", "source"],
        )
        for instance_id, tally in self.tallies.items():
            for source, tokens in tally.totals.items():
                prompts.add_metric([instance_id, source], float(tokens))
        return [*gauges, prompts]

    # readings

    async def _watch(self, watched: Watched) -> None:
        failures = 0
        while True:
            try:
                await self._read(watched)
                failures = 0
            except (EngineError, NoDescriptors) as error:
                failures += 1
                if failures == 1:
                    log.warning("the load of %s is unknown: %s", watched.id, error)
                if watched.load is not None and self._clock.now() - watched.read_at_s > STALE_S:
                    watched.load = None
                    self._report(watched, watched.reconciler.unheard())
                    self._correct_ledger(watched)
            except Exception:
                failures += 1
                log.exception("reading the load of %s failed; it goes on", watched.id)
            pause_s = max(self._every_s, len(self.watched) * READING_S / LOOP_SHARE)
            await asyncio.sleep(min(pause_s * 2**failures, max(pause_s, LONGEST_PAUSE_S)))

    async def _read(self, watched: Watched) -> None:
        """Read once and reconcile. Raises EngineError when nothing usable was said."""
        before = self._ledger.booked(watched.id)
        watched.load = load = await watched.client.metrics()
        watched.read_at_s = now = self._clock.now()
        kv_tokens = None if load.kv_usage is None else round(load.kv_usage * watched.capacity_tokens)
        reported = EngineLoad(load.requests, kv_tokens)
        after = self._ledger.booked(watched.id)
        drifts = watched.reconciler.compare(before, after, reported, watched.kept_tokens(now))
        self._report(watched, drifts)
        self._correct_ledger(watched)
        tally = self.tallies[watched.id]
        for source, tokens in (load.prompt_tokens_by_source or {}).items():
            tally.read(PROMPT_SOURCES.get(source, source), tokens)

    def _correct_ledger(self, watched: Watched) -> None:
        reconciler = watched.reconciler
        self._plane.foreign_load(watched.id, reconciler.foreign_requests, reconciler.foreign_tokens)

    def _report(self, watched: Watched, drifts: Iterable[LoadDrift]) -> None:
        for drift in drifts:
            kind = drift.kind.value
            if drift.lasting:
                self.drifts.setdefault(watched.id, Counter())[drift.kind] += 1
                self._metrics.load_drift.labels(watched.id, kind).inc()
                log.warning(
                    "%s differs from the ledger in %s: the engine says %s, the ledger %s",
                    *(watched.id, kind, drift.engine, drift.ledger),
                )
                if drift.kind is Difference.MISSING:
                    self._suspect(watched.id)
            if self._journal.enabled:
                line = LoadDriftLine(
                    t_s=self._journal.elapsed_s(self._clock.now()),
                    instance=watched.id,
                    kind=kind,
                    event="begun" if drift.lasting else "ended",
                    ledger=drift.ledger,
                    engine=drift.engine,
                    lasting=drift.lasting,
                )
                self._journal.write(line)
