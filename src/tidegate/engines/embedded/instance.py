"""An instance put together: engine, KV channel and HTTP server, started and stopped in order."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path
from typing import Any

from tidegate.engines.embedded.engine import EmbeddedEngine
from tidegate.engines.embedded.options import Options
from tidegate.engines.embedded.tokenizer import TokenizerCodec
from tidegate.engines.embedded.transfer import PeerPuller, PullOptions
from tidegate.engines.embedded.transfer_export import KvExporter
from tidegate.engines.serving.delivery import OutputRouter
from tidegate.engines.serving.metrics import ServerMetrics
from tidegate.engines.serving.secret import LaunchSecret
from tidegate.engines.serving.server import EngineServer, Parts
from tidegate.engines.serving.types import ServingFacts

_PIECE_BYTES = 64 << 10
_PIECES = 1024
"""Of a weight file larger than all pieces together (64 MiB), this many are read for the fingerprint."""


class EmbeddedInstance:
    """One serving instance. Build it on the event loop with an engine whose loop is not running."""

    def __init__(
        self, options: Options, engine: EmbeddedEngine, samples: list[dict[str, Any]], secret: LaunchSecret
    ) -> None:
        """Bind the KV channel. Raises ConfigError for a remote ``kv_host`` without a secret."""
        config = options.engine
        weights = weights_id(config.model, str(engine.info.kv.dtype))
        self._samples = samples
        self._engine = engine
        self._exporter = KvExporter(
            engine.pins, engine.store, secret, engine_id=config.engine_id, model=weights, host=options.kv_host
        )
        self._puller = PeerPuller(
            engine.store, PullOptions(secret, weights, shared_memory=options.shared_memory)
        )
        self._facts = ServingFacts(
            engine_id=config.engine_id,
            model=options.served_model_name,
            max_model_len=engine.max_model_len,
            vocab_size=engine.info.vocab_size,
            block_tokens=engine.store.block_tokens,
            kv_capacity_tokens=engine.store.total_blocks * engine.store.block_tokens,
            kv_bytes_per_token=engine.info.kv_bytes_per_token,
            kv_host=options.kv_host,
            kv_port=self._exporter.port,
        )
        self._router = OutputRouter(asyncio.get_running_loop())
        parts = Parts(
            engine=engine,
            codec=TokenizerCodec(engine.detokenizer.tokenizer),
            facts=self._facts,
            secret=secret,
            metrics=ServerMetrics(self._facts, engine.stats),
            router=self._router,
            release_source=self._puller.release,
        )
        self._server = EngineServer(parts, api_key=options.api_key)

    async def start(self, listener: socket.socket) -> None:
        """Compute, export and serve."""
        self._engine.scheduler.puller = self._puller
        self._engine.start(self._router.sink)
        self._exporter.start()
        await self._server.start(listener)

    async def stop(self, within_s: float) -> None:
        """Finish running requests for at most ``within_s``, then stop everything."""
        await self._server.stop(within_s)
        await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(self._puller.close)
        self._exporter.close()

    def announcement(self, listener: socket.socket) -> dict[str, Any]:
        """Return the ready line's content."""
        line = self._facts.announcement(listener.getsockname()[1])
        return line | {"kv_port": self._facts.kv_port, "profile_samples": self._samples}


def weights_id(folder: Path, kv_dtype: str) -> str:
    """Return a fingerprint that instances with interchangeable KV share.

    It covers the configuration, the KV dtype, and name, size and content of every weight file: the whole
    of a small one, evenly spread pieces of a large one, so that models which differ in some layers differ.
    """
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
