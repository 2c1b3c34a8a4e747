"""The emulated instances of one process: one HTTP server each, one data plane for all."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
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
        ids = [f"{replica.instance.id}-{secrets.token_hex(4)}" for replica in replicas]
        self.host = Host(list(replicas), ids, order=order, front_s=front_s)
        self._model = model
        self._secret = secret
        self._api_key = api_key
        self._ports: list[int] = []
        self._served = [self._serve(place) for place in self.host.places]

    async def start(self, listeners: Sequence[socket.socket]) -> None:
        """Serve each instance on its own bound socket."""
        for (_, server), listener in zip(self._served, listeners, strict=True):
            await server.start(listener)
            self._ports.append(listener.getsockname()[1])

    async def stop(self, within_s: float) -> None:
        """Finish running requests for at most ``within_s``, then stop everything."""
        await asyncio.gather(*(server.stop(within_s) for _, server in self._served))
        for engine, _ in self._served:
            engine.stop()
        self.host.pump.stop()

    def announcement(self) -> dict[str, Any]:
        """Return the ready line's content."""
        ready = [
            {
                "event": "ready",
                "port": port,
                "engine_id": place.engine_id,
                "pid": os.getpid(),
                "model": self._model,
                "max_model_len": place.replica.instance.max_model_len,
                "kv_capacity_tokens": place.replica.instance.kv_capacity_tokens,
                "block_tokens": place.replica.instance.block_tokens,
                "kv_bytes_per_token": place.replica.instance.kv_bytes_per_token,
            }
            for place, port in zip(self.host.places, self._ports, strict=True)
        ]
        return {"event": "ready", "instances": ready}

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
