"""The emulated instances of one process: one HTTP server each, one data plane for all."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.dataplane.replica import Replica
from tidegate.engines.emulated.engine import EmulatedEngine, Releaser
from tidegate.engines.emulated.host import EmulatedInstance, Host
from tidegate.engines.emulated.vocabulary import VOCAB_SIZE, Codec
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.generation import Parts
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.served import ServingFacts
from tidegate.engines.serving.server import EngineServer
from tidegate.policies.order import Order

_CLIENT_PORT = 1
"""Stands in handles where other engines name their KV port; emulated KV goes through no socket."""


@dataclass(frozen=True, slots=True)
class ServedInstance:
    """An instance behind its HTTP server."""

    place: EmulatedInstance
    engine: EmulatedEngine
    server: EngineServer
    port: int


class EmulatedInstances:
    """Serves ``replicas`` under ``model``. Build it on the event loop."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        model: str,
        secret: LaunchSecret,
        *,
        api_key: str = "",
        order: Order | None = None,
        front_s: float = 0.0,
    ) -> None:
        self.host = Host([], [], order=order, front_s=front_s)
        self._replicas = replicas
        self._model = model
        self._secret = secret
        self._api_key = api_key
        self._served: dict[str, ServedInstance] = {}

    async def start(self, listeners: Sequence[socket.socket]) -> None:
        """Serve each instance on its own bound socket."""
        for replica, listener in zip(self._replicas, listeners, strict=True):
            await self.add(replica, listener)

    async def add(self, replica: Replica, listener: socket.socket) -> dict[str, Any]:
        """Serve one more instance on a bound socket; return what the announcement says of it."""
        place = self.host.add(replica, f"{replica.instance.id}-{secrets.token_hex(4)}")
        engine, server = self._serve(place)
        await server.start(listener)
        served = ServedInstance(place, engine, server, listener.getsockname()[1])
        self._served[place.engine_id] = served
        return self._ready(served)

    async def remove(self, engine_id: str) -> bool:
        """Abort what runs on an instance and close its port; False when there is none of that id."""
        served = self._served.pop(engine_id, None)
        if served is None:
            return False
        served.engine.stop()
        self.host.remove(served.place)
        await served.server.stop(0.0)
        return True

    async def stop(self, within_s: float) -> None:
        """Finish running requests for at most ``within_s``, then stop everything."""
        await asyncio.gather(*(served.server.stop(within_s) for served in self._served.values()))
        for served in self._served.values():
            served.engine.stop()
        self.host.pump.stop()

    def announcement(self) -> dict[str, Any]:
        """Return the ready line's content."""
        return {"event": "ready", "instances": [self._ready(served) for served in self._served.values()]}

    def _ready(self, served: ServedInstance) -> dict[str, Any]:
        instance = served.place.replica.instance
        return {
            "event": "ready",
            "port": served.port,
            "engine_id": served.place.engine_id,
            "pid": os.getpid(),
            "model": self._model,
            "max_model_len": instance.max_model_len,
            "kv_capacity_tokens": instance.kv_capacity_tokens,
            "block_tokens": instance.block_tokens,
            "kv_bytes_per_token": instance.kv_bytes_per_token,
        }

    def _serve(self, place: EmulatedInstance) -> tuple[EmulatedEngine, EngineServer]:
        instance = place.replica.instance
        facts = ServingFacts(
            engine_id=place.engine_id,
            model=self._model,
            max_model_len=instance.max_model_len,
            vocab_size=VOCAB_SIZE,
            block_tokens=instance.block_tokens,
            kv_capacity_tokens=instance.kv_capacity_tokens,
            kv_bytes_per_token=instance.kv_bytes_per_token,
            kv_host="127.0.0.1",
            kv_port=_CLIENT_PORT,
        )
        engine = EmulatedEngine(self.host, place)
        router = OutputRouter(asyncio.get_running_loop())
        place.sink = router.deliver
        metrics = ServerMetrics(facts, engine.stats)
        pump = self.host.pump
        metrics.add_gauge(
            "tidegate:emulation_lag_seconds",
            "The latest that simulated events were handled of late; one that lags shows wrong figures",
            lambda: pump.lag.worst_s(pump.now()),
        )
        parts = Parts(engine, Codec(), facts, self._secret, metrics, router, Releaser(self.host))
        return engine, EngineServer(parts, api_key=self._api_key)
