"""The emulated instances of one process: one HTTP server each, one data plane for all."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from pydantic import StrictStr

from tidegate.dataplane.replica import Replica
from tidegate.engines.emulated.host import EmulatedInstance, Host
from tidegate.engines.emulated.vocabulary import VOCAB_SIZE, Codec
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.server import EngineServer, Parts
from tidegate.engines.serving.types import ServingFacts
from tidegate.policies.chunks import ChunkBudget
from tidegate.policies.order import Order
from tidegate.protocol.bodies import RequestBody, parse_body
from tidegate.protocol.http_front import FrontRunner, Handler, answering_errors, json_answer, read_object

MOST_BODY_BYTES = 4096
_CLIENT_PORT = 1
"""Stands in handles where other engines name their KV port; emulated KV goes through no socket."""


@dataclass(frozen=True, slots=True)
class ServedInstance:
    """An instance behind its HTTP server; ``ready`` is its announcement."""

    instance: EmulatedInstance
    server: EngineServer
    ready: dict[str, Any]


class EmulatedInstances:
    """Serves instances under ``model``. Build it on the event loop."""

    def __init__(
        self,
        model: str,
        secret: LaunchSecret,
        *,
        api_key: str = "",
        order: Order | None = None,
        chunks: ChunkBudget | None = None,
        front_s: float = 0.0,
    ) -> None:
        self.host = Host(order=order, chunks=chunks, front_s=front_s)
        self._model = model
        self._secret = secret
        self._api_key = api_key
        self._served: dict[str, ServedInstance] = {}

    async def add(self, replica: Replica, listener: socket.socket) -> dict[str, Any]:
        """Serve one more instance on a bound socket; return its announcement."""
        instance = self.host.add(replica, f"{replica.instance.id}-{secrets.token_hex(4)}")
        facts = ServingFacts(
            engine_id=instance.engine_id,
            model=self._model,
            max_model_len=replica.instance.max_model_len,
            vocab_size=VOCAB_SIZE,
            block_tokens=replica.instance.block_tokens,
            kv_capacity_tokens=replica.instance.kv_capacity_tokens,
            kv_bytes_per_token=replica.instance.kv_bytes_per_token,
            kv_host="127.0.0.1",
            kv_port=_CLIENT_PORT,
        )
        router = OutputRouter(asyncio.get_running_loop())
        instance.sink = router.deliver
        metrics = ServerMetrics(facts, instance.stats)
        timer = self.host.timer
        metrics.add_gauge(
            "tidegate:emulation_lag_seconds",
            "The latest that simulated events were handled of late; one that lags shows wrong figures",
            lambda: timer.lag.worst_s(timer.now()),
        )
        parts = Parts(instance, Codec(), facts, self._secret, metrics, router, self.host.release_source)
        server = EngineServer(parts, api_key=self._api_key)
        await server.start(listener)
        ready = facts.announcement(listener.getsockname()[1])
        self._served[instance.engine_id] = ServedInstance(instance, server, ready)
        return ready

    async def remove(self, engine_id: str) -> bool:
        """Abort what runs on an instance and close its port; False when there is none of that id."""
        served = self._served.pop(engine_id, None)
        if served is None:
            return False
        self.host.remove(served.instance)
        await served.server.stop(0.0)
        return True

    async def stop(self, within_s: float) -> None:
        """Finish running requests for at most ``within_s``, then stop everything."""
        await asyncio.gather(*(served.server.stop(within_s) for served in self._served.values()))
        for served in self._served.values():
            served.instance.stop()
        self.host.timer.stop()

    def announcement(self) -> dict[str, Any]:
        """Return the ready line's content."""
        return {"event": "ready", "instances": [served.ready for served in self._served.values()]}


class RemoveBody(RequestBody):
    engine_id: StrictStr


class FleetServer:
    """The port of the process itself, where the fleet adds and removes instances. For members of the launch
    only, but for ``/health``. ``one_more`` makes the replica of an added instance, ``bind`` a socket for
    it."""

    def __init__(
        self,
        instances: EmulatedInstances,
        secret: LaunchSecret,
        one_more: Callable[[], Replica],
        bind: Callable[[], socket.socket],
    ) -> None:
        self._instances = instances
        self._secret = secret
        self._one_more = one_more
        self._bind = bind
        app = web.Application(
            middlewares=[answering_errors(), self._check_secret],
            client_max_size=MOST_BODY_BYTES,
        )
        app.router.add_get("/health", self.health)
        app.router.add_post("/tidegate/instances", self.add)
        app.router.add_post("/tidegate/instances/remove", self.remove)
        self._runner = FrontRunner(app, shutdown_timeout_s=0.5)

    async def start(self) -> int:
        """Serve; return the port."""
        listener = self._bind()
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def add(self, request: web.Request) -> web.Response:
        """Serve one more instance; the answer is its announcement."""
        return json_answer(await self._instances.add(self._one_more(), self._bind()))

    async def remove(self, request: web.Request) -> web.Response:
        """Drop an instance with all that is on it."""
        body = parse_body(await read_object(request), RemoveBody)
        return json_answer({"removed": await self._instances.remove(body.engine_id)})

    @web.middleware
    async def _check_secret(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != "/health":
            self._secret.require(request, request.path)
        return await handler(request)
