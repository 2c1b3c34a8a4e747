"""The gateway's driver in virtual time: the real dispatcher and served requests over in-process instances.

The event loop's clock jumps to the next timer. The instances are those of ``tidegate.engines.emulated``,
called directly instead of over HTTP, so that nothing takes time but what the profiles say.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from tidegate.core.errors import EngineUnreachable, FleetFull, TidegateError
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica
from tidegate.engines.emulated import event_timer
from tidegate.engines.emulated.host import EmulatedInstance, Host
from tidegate.engines.seam import KvHandle, Leg, LegEnd, LegTimes, TokensSink
from tidegate.engines.serving.types import GenerateRequest, KvSource, Output, SamplingParams
from tidegate.fleet.member import FleetListener, Member
from tidegate.gateway import dispatcher as dispatcher_module
from tidegate.gateway.call import TokenEstimate, read_calls
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.served_request import ServedRequest
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.upstream import Upstream
from tidegate.journal.writer import JournalWriter
from tidegate.policies.order import Order
from tidegate.protocol.chunks import Tokens
from tidegate.systems.system import System


class _Jump(selectors.SelectSelector):
    """Waits by moving the loop's clock to the next timer."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is not None and timeout > 0:
            self.loop.virtual_s = self.loop.next_timer_s()
        assert ready or timeout is not None, "nothing is due: the loop would wait for ever"
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual."""

    def __init__(self) -> None:
        selector = _Jump()
        selector.loop = self
        self.virtual_s = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.virtual_s

    def next_timer_s(self) -> float:
        when: float = self._scheduled[0].when()  # type: ignore[attr-defined]
        return when


def run_virtual(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` on a loop of its own, from virtual time 0 on."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


class HostEngine:
    """One emulated instance as an ``Engine``."""

    def __init__(self, place: EmulatedInstance) -> None:
        self._place = place
        self._running: dict[str, tuple[TokensSink, asyncio.Future[Output]]] = {}
        place.sink = self._take

    async def run(self, leg: Leg, sink: TokensSink, *, deadline_s: float) -> LegEnd:
        assert isinstance(leg.prompt, list) and leg.max_tokens is not None
        source = None if leg.handle is None else leg.handle.params["source"]
        params = SamplingParams(max_tokens=leg.max_tokens)
        request = GenerateRequest(
            leg.request_id,
            tuple(leg.prompt),
            params,
            generated=leg.generated,
            pin_kv=leg.pin,
            source=source,
            ticket=leg.ticket,
        )
        ended: asyncio.Future[Output] = asyncio.get_running_loop().create_future()
        self._running[leg.request_id] = sink, ended
        try:
            self._place.submit(request)
            last = await ended
        finally:
            self._running.pop(leg.request_id, None)
            self._place.abort(leg.request_id)
        times = last.times
        assert times is not None
        handle = None
        if last.pinned is not None:
            pinned = last.pinned
            source = KvSource(
                self._place.engine_id, pinned.request_id, "", 1, pinned.block_ids, pinned.num_tokens
            )
            handle = KvHandle({"source": source}, self._place.engine_id, pinned.num_tokens)
        return LegEnd(
            handle,
            LegTimes(
                times.queue_s,
                times.kv_load_s,
                times.prefill_s,
                times.kv_loaded_tokens,
                0,
                times.cached_tokens,
            ),
        )

    def _take(self, outputs: list[Output]) -> None:
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            sink, ended = running
            sink.tokens(Tokens(output.text, output.token_ids, None, output.finish_reason))
            if output.finish_reason is not None and not ended.done():
                ended.set_result(output)

    def close(self, reason: str) -> None:
        running, self._running = self._running, {}
        # Connections of a dead instance break in any order; the simulator takes them in that of arrival.
        for _, (_, ended) in sorted(running.items(), key=lambda item: int(item[0][1:].split("-")[0])):
            if not ended.done():
                name = self._place.replica.instance.id
                ended.set_exception(EngineUnreachable(reason, instance=name, stage="leg"))

    def refuses(self, handle: KvHandle) -> str | None:
        return None

    def owner_gone(self, owner: str) -> None: ...

    async def tokenise(self, *_: Any) -> None:
        return None

    async def ask(self, path: str, body: bytes, *, deadline_s: float) -> bytes:
        raise NotImplementedError

    async def release(self, handle: KvHandle) -> None:
        self._place.release(handle.params["source"].request_id)

    async def decline(self, handle: KvHandle) -> None: ...

    async def release_request(self, request_id: str) -> None:
        self._place.release(request_id)


@dataclass
class Silent:
    """A client that reads everything and says nothing."""

    ids: list[int] = field(default_factory=list)

    def tokens(self, tokens: Tokens) -> None:
        self.ids += tokens.token_ids

    def plain(self, text: str, token_ids: list[int]) -> None:
        self.ids += token_ids


@dataclass(frozen=True)
class Asked:
    """One request of the script."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    session: str = ""


@dataclass(frozen=True)
class Change:
    """An instance that dies or returns."""

    at_s: float
    instance: int
    up: bool


class VirtualGateway:
    """Plays a script of requests and changes of membership through the gateway's driver."""

    def __init__(
        self,
        system: System,
        replicas: list[Replica],
        order: Order,
        lines: list[bytes],
        slo: Slo,
        front_s: float,
        patch: pytest.MonkeyPatch,
        *,
        journal_inputs: bool = False,
        admission: float = 0.0,
    ) -> None:
        patch.setattr(event_timer, "_TICK_S", 1e-9)  # else events are told to the millisecond
        patch.setattr(dispatcher_module, "connect", lambda member, _: Upstream(member, self._engine(member)))
        self._replicas = replicas
        self._order = order
        self._lines = lines
        self._system = system
        self._slo = slo
        self._front_s = front_s
        self._settings = GatewaySettings(
            slo=slo, load_every_s=0, journal_inputs=journal_inputs, admission=admission
        )
        self._lives = [0] * len(replicas)
        self.outcomes: dict[str, str] = {}

    def play(self, asked: list[Asked], changes: list[Change]) -> None:
        run_virtual(self._play(asked, changes))

    async def _play(self, asked: list[Asked], changes: list[Change]) -> None:
        loop = asyncio.get_running_loop()
        clock = _LoopClock(loop)
        ids = [replica.instance.id for replica in self._replicas]
        self.host = Host(order=self._order, front_s=self._front_s, clock=clock)
        for replica, engine_id in zip(self._replicas, ids, strict=True):
            self.host.add(replica, engine_id)
        journal = JournalWriter(self._lines.append)
        self.dispatcher = Dispatcher(self._system, self._settings, tuple(ids), clock, journal, _NoFleet())
        for number in range(len(self._replicas)):
            self.dispatcher.member_up(self._member(number))
        self.dispatcher.start()
        tasks = [asyncio.create_task(self._ask(k, one)) for k, one in enumerate(asked)]
        for change in changes:
            loop.call_at(change.at_s, self._change, change)
        await asyncio.gather(*tasks)
        self.host.timer.stop()
        self.dispatcher.stopping = True
        await self.dispatcher.stop()

    async def _ask(self, number: int, asked: Asked) -> None:
        await asyncio.sleep(asked.at_s)
        body = {"prompt": asked.prompt, "max_tokens": asked.max_tokens, "temperature": 0}
        headers = {"x-session-id": asked.session} if asked.session else {}
        call = msgspec.structs.replace(
            read_calls(body, headers, chat=False, slo=self._slo)[0], id=f"r{number}"
        )
        served = ServedRequest(
            call, self.dispatcher, TokenEstimate(), Silent(), asyncio.get_running_loop().time()
        )
        try:
            await served.run()
        except TidegateError as error:
            self.outcomes[call.id] = type(error).__name__
        else:
            self.outcomes[call.id] = "ok"

    def _change(self, change: Change) -> None:
        place = self.host.instances[change.instance]
        if change.up:
            self.dispatcher.member_up(self._member(change.instance))
            return
        self.host.timer.catch_up()
        self.dispatcher.member_down(place.replica.instance.id, "died")
        for request_id in list(place.legs):
            place.abort(request_id)
        for request_id in list(place.pins):
            place.release(request_id)

    def _member(self, number: int) -> Member:
        replica = self._replicas[number]
        name = replica.instance.id
        return Member(replica.instance, "", "model", name, replica.profile, kind="emulated")

    def _engine(self, member: Member) -> HostEngine:
        place = next(p for p in self.host.instances if p.replica.instance.id == member.instance.id)
        return HostEngine(place)


class _LoopClock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now: Callable[[], float] = loop.time


class _NoFleet:
    ids: tuple[str, ...] = ()

    def starting(self) -> dict[str, str]:
        return {}

    async def start(self, listener: FleetListener) -> None: ...

    async def stop(self) -> None: ...

    def suspect(self, instance_id: str) -> None: ...

    def add(self) -> str:
        raise FleetFull("nothing starts here")

    def remove(self, instance_id: str, reason: str) -> bool:
        return False
