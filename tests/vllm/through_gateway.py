"""A gateway in front of real servers, clients of both over real HTTP, and what legs the gateway ran."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from tidegate.core.decision import Migrate
from tidegate.core.slo import Slo
from tidegate.costs.profile import Profile
from tidegate.engines.seam import KvHandle, Leg, LegEnd, TokensSink
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.fleet.health import HealthPace
from tidegate.fleet.static import StaticFleet, StaticPace
from tidegate.fleet.vllm import KvSetup
from tidegate.gateway.run import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.ledger.snapshot import Snapshot
from tidegate.protocol.parameters import GUARDABLE
from tidegate.systems import System, make_system
from tidegate_testing import profile
from tidegate_testing.chaos import NOT_FORCED, Forced, chaos

Json = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROFILE = profile(prefill=(5e-3, 5e-5, 0.0), step=(4e-3, 0.0, 1e-7), transfer=(5e-3, 1e9), name="tiny/cpu")
"""Of the size of what the tiny models take on a CPU: one for all servers."""
LEASE_S = 30.0
"""What the servers are started with."""


@dataclass
class Said:
    """One answer, streamed or not, in one form. ``gaps_s`` are the pauses between its pieces."""

    status: int = 200
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    usage: tuple[int, int] | None = None
    logprob_tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: Any = None
    id: str = ""
    extras: Json = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)

    def told(self) -> tuple[Any, ...]:
        """Return what has to be the same in every run of a greedy request."""
        return (
            *(self.status, self.ids, self.text, self.finish_reason, self.stop_reason, self.usage),
            *(self.logprob_tokens, self.error),
        )

    def add(self, body: Json) -> None:
        """Take a whole answer, or an event of a streamed one."""
        self.error = self.error or body.get("error")
        self.id = body.get("id") or self.id
        if body.get("usage"):
            self.usage = (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
        for choice in body.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or choice
            self.text += part.get("content" if part is not choice else "text") or ""
            if part is not choice:
                more = {k: v for k, v in part.items() if v and k not in ("role", "content")}
                self.extras |= more
            self.ids += choice.get("token_ids") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if choice.get("stop_reason") is not None:
                self.stop_reason = choice["stop_reason"]
            self._add_logprobs(choice.get("logprobs") or {})

    def _add_logprobs(self, logprobs: Json) -> None:
        rows = logprobs.get("content") or []
        self.logprob_tokens += [row["token"] for row in rows] + (logprobs.get("tokens") or [])
        self.logprobs += [row["logprob"] for row in rows] + (logprobs.get("token_logprobs") or [])


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    path: str,
    body: Json,
    each: Callable[[Said], None] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Said:
    """POST ``body`` and read the answer to its end, each event as it comes when ``body`` asks for them.

    ``each`` is told after every event what has come so far.
    """
    said = Said()
    async with session.post(url + path, data=orjson.dumps(body), headers=headers) as response:
        said.status = response.status
        if not body.get("stream") or response.status != 200:
            said.add(orjson.loads(await response.read()))
            return said
        last_s = None
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            now_s = time.monotonic()
            if last_s is not None:
                said.gaps_s.append(now_s - last_s)
            last_s = now_s
            said.add(orjson.loads(line[6:]))
            if each is not None:
                each(said)
    return said


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A session for many requests at once."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    headers = {"Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        yield session


@dataclass
class LegRun:
    """A leg as the gateway ran it. ``end`` is None while it runs, and when it was cut or failed."""

    instance: str
    engine_id: str
    leg: Leg
    began_s: float
    end: LegEnd | None = None
    error: BaseException | None = None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.end is None and self.error is None

    @property
    def request(self) -> str:
        """The id of the request it is a part of."""
        return self.leg.request_id.rpartition("-")[0]

    @property
    def handle(self) -> KvHandle | None:
        return self.leg.handle


def record_legs(monkeypatch: pytest.MonkeyPatch) -> list[LegRun]:
    """Return a list that gets every leg that a gateway of this process runs on a vLLM server."""
    runs: list[LegRun] = []
    run = VllmEngine.run

    async def recorded(engine: VllmEngine, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        now_s = asyncio.get_running_loop().time()
        note = LegRun(engine.instance, engine.engine_id, leg, now_s)
        runs.append(note)
        try:
            note.end = await run(engine, leg, sink, deadline_s=deadline_s)
            return note.end
        except BaseException as error:
            note.error = error
            raise

    monkeypatch.setattr(VllmEngine, "run", recorded)
    return runs


@dataclass
class Running:
    """A gateway that serves."""

    gateway: Gateway
    url: str
    journal: Path

    def outcomes(self) -> dict[str, Json]:
        """Return the journal's outcome rows so far, by request."""
        self.gateway._journal.flush()
        rows = [orjson.loads(line) for line in self.journal.read_bytes().splitlines()]
        return {row["request"]: row for row in rows if row["type"] == "outcome"}

    def snapshot(self) -> Snapshot:
        """Return the cluster as the control plane sees it."""
        dispatcher = self.gateway.dispatcher
        return dispatcher.plane.snapshot(dispatcher.clock.now())

    def metric(self, name: str, **labels: str) -> float:
        """Return a counter of the gateway, summed over the labels that are not given."""
        total = 0.0
        for family in self.gateway.dispatcher.metrics.registry.collect():
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def move(self, request: str) -> bool:
        """Have a decode move to another instance at its next token; False when it cannot now."""
        plane = self.gateway.dispatcher.plane
        live = plane.requests.get(request)
        src = None if live is None else live.decode_on or live.prefill_on
        if live is None or src is None:
            return False
        others = [name for name in plane.ledger.ids if name != src]
        self.gateway.dispatcher.act([Migrate(request, src, others[len(request) % len(others)], "forced")])
        return live.migrate is not None

    async def until(self, condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
        """Let the gateway run until ``condition`` holds."""
        async with asyncio.timeout(deadline_s):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(
    urls: Sequence[str],
    folder: Path,
    *,
    system: str | System = "arrow-lending",
    kv: KvSetup | None = None,
    profiles: Sequence[Profile] = (PROFILE,),
    forced: Forced = NOT_FORCED,
    trusted_proxies: Sequence[str] = (),
) -> AsyncIterator[Running]:
    """A gateway over the servers at ``urls``, which are the instances i0, i1, ... in that order."""
    fleet = StaticFleet(
        urls,
        profiles=profiles,
        kv=kv or KvSetup(lease_s=LEASE_S, bidirectional=True),
        pace=StaticPace(HealthPace(every_s=0.5), retry_s=0.2),
    )
    journal = folder / f"journal-{time.monotonic_ns()}.jsonl"
    composed = make_system(system, slo=Slo()) if isinstance(system, str) else system
    # Generous: servers that share few cores are slow to accept.
    resolved = GatewaySettings(
        port=0,
        journal=journal,
        connect_s=10.0,
        admission=0.0,
        allow_fields=tuple(GUARDABLE),
        trusted_proxies=trusted_proxies,
    )
    gateway = Gateway(resolved, fleet, composed)
    url = await gateway.start()
    try:
        async with chaos(gateway.dispatcher, forced):
            yield Running(gateway, url, journal)
    finally:
        await gateway.stop()
