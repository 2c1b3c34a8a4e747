"""An instance put together: engine, KV channel and HTTP server, started and stopped in order."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
from pathlib import Path
from typing import Any

from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.kv_channel import KvExporter
from tidegate.engines.embedded.kv_pull import PeerPuller, PullOptions
from tidegate.engines.embedded.options import Options
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.process import announce, stop_signal
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.server import EngineServer, Parts
from tidegate.engines.serving.types import ServingFacts

log = logging.getLogger(__name__)

GRACE_S = 5.0
_PIECE_BYTES = 64 << 10
_PIECES = 1024
"""Of a weight file larger than all pieces together (64 MiB), this many are read for the fingerprint."""


async def serve_instance(
    options: Options,
    engine: EmbeddedEngine,
    samples: list[dict[str, Any]],
    secret: LaunchSecret,
    listener: socket.socket,
) -> None:
    """Compute, export KV and serve until SIGTERM; then finish running requests for at most ``GRACE_S``. The
    engine's loop must not be running. Raises ConfigError for a remote ``kv_host`` without a secret."""
    config = options.engine
    weights = weights_id(config.model, str(engine.model.kv.dtype))
    exporter = KvExporter(
        engine.pins,
        engine.store,
        secret,
        engine_id=config.engine_id,
        decodes=engine,
        model=weights,
        host=options.kv_host,
    )
    puller = PeerPuller(engine.store, PullOptions(secret, weights, shared_memory=options.shared_memory))
    facts = ServingFacts(
        engine_id=config.engine_id,
        model=options.served_model_name,
        max_model_len=engine.max_model_len,
        vocab_size=engine.model.vocab_size,
        block_tokens=engine.store.block_tokens,
        kv_capacity_tokens=engine.store.total_blocks * engine.store.block_tokens,
        kv_bytes_per_token=engine.model.kv.bytes_per_token,
        kv_host=options.kv_host,
        kv_port=exporter.port,
    )
    router = OutputRouter(asyncio.get_running_loop())
    metrics = ServerMetrics(facts, engine.stats)
    parts = Parts(engine, engine.tokenizer, facts, secret, metrics, router, puller.release)
    server = EngineServer(parts, api_key=options.api_key)
    stop = stop_signal()
    engine.scheduler.puller = puller
    engine.start(router.sink)
    exporter.start()
    await server.start(listener)
    ready = facts.announcement(listener.getsockname()[1])
    announce(
        ready | {"kv_host": facts.kv_host, "kv_port": facts.kv_port, "profile_samples": samples},
        options.ready_fd,
    )
    await stop
    log.info("stopping")
    await server.stop(GRACE_S)
    await asyncio.to_thread(engine.stop)
    await asyncio.to_thread(puller.close)
    exporter.close()


def weights_id(folder: Path, kv_dtype: str) -> str:
    """Return a fingerprint that instances with interchangeable KV share. It covers the configuration, the KV
    dtype, and name, size and content of every weight file: the whole of a small one, evenly spread pieces of
    a large one, so that models which differ in some layers differ."""
    digest = hashlib.sha256(kv_dtype.encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in range(0, size, max(_PIECE_BYTES, size // _PIECES)):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()
