"""The exporting side: pinned KV blocks served to peers of the launch on a TCP side channel.

After the handshake a puller sends requests, one at a time:

    {"op": "pull", "request_id", "engine_id", "block_ids", "stream"} -> {"ok": true} (+ block bytes if
        "stream") or {"error": why}; without "stream" the puller reads the blocks from mapped memory
    {"op": "release", "request_id"} -> {"valid": whether the pin held until now}
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.embedded.pins import Pins
from tidegate.engines.embedded.transfer_wire import (
    STREAM_CHUNK_BYTES,
    KvSocket,
    TransferFailed,
    TransferLimits,
    describe_store,
    greet_puller,
)
from tidegate.engines.serving.secret import LaunchSecret, is_loopback

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 256


class KvExporter:
    """Listens from construction on; serves after ``start``, one thread per connected peer."""

    def __init__(
        self,
        pins: Pins,
        store: PagedKvStore,
        secret: LaunchSecret,
        *,
        engine_id: str,
        model: str = "",
        host: str = "127.0.0.1",
        port: int = 0,
        limits: TransferLimits | None = None,
    ) -> None:
        """Bind. Raises ConfigError for a non-loopback ``host`` without a secret, OSError if it is taken."""
        if not secret and not is_loopback(host):
            raise ConfigError(f"the KV channel serves only loopback without a launch secret, not {host}")
        self._pins = pins
        self._store = store
        self._secret = secret
        self._facts = describe_store(store, engine_id=engine_id, model=model)
        self._limits = limits or TransferLimits()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=128)
        self._lock = threading.Lock()
        self._wires: set[KvSocket] = set()
        self._closed = False
        self.host = host
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self._accept, name="kv-export", daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop every connection; a pull under way fails on the puller's side."""
        with self._lock:
            self._closed = True
            wires = list(self._wires)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for wire in wires:
            wire.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire = KvSocket(sock, self._limits.read_s)
            with self._lock:
                welcome = not self._closed and len(self._wires) < MOST_CONNECTIONS
                if welcome:
                    self._wires.add(wire)
            if not welcome:
                wire.close()
                continue
            threading.Thread(target=self._serve, args=(wire,), name="kv-peer", daemon=True).start()

    def _serve(self, wire: KvSocket) -> None:
        try:
            wire.limit(self._limits.read_s)
            greet_puller(wire, self._secret, self._facts)
            wire.limit(None)
            while True:
                self._answer(wire, wire.receive(wait_s=2 * self._limits.idle_s))
        except TransferFailed as failure:
            log.debug("KV peer left: %s", failure.message)
        except Exception:
            log.exception("serving a KV peer failed")
        finally:
            with self._lock:
                self._wires.discard(wire)
            wire.close()

    def _answer(self, wire: KvSocket, message: dict[str, Any]) -> None:
        request_id = str(message.get("request_id"))
        match message.get("op"):
            case "pull":
                self._send_blocks(wire, request_id, message)
            case "release":
                wire.send({"valid": self._pins.release(request_id)})
            case op:
                raise TransferFailed(f"unknown operation {op!r}")

    def _send_blocks(self, wire: KvSocket, request_id: str, message: dict[str, Any]) -> None:
        if message.get("engine_id") != self._facts.engine_id:
            wire.send({"error": f"this is engine {self._facts.engine_id}; the handle names another"})
            return
        pinned = self._pins.pinned(request_id)
        if pinned is None:
            wire.send({"error": "the KV is not pinned: released, expired or never existed"})
            return
        wanted = message.get("block_ids")
        if not isinstance(wanted, list) or tuple(wanted) != pinned.block_ids[: len(wanted)]:
            wire.send({"error": "the handle's blocks are not those pinned for this request"})
            return
        wire.send({"ok": True})
        if message.get("stream"):
            self._stream(wire, wanted)

    def _stream(self, wire: KvSocket, block_ids: list[int]) -> None:
        """Send the blocks' bytes in order, small blocks gathered so that a send is worth its call."""
        wire.limit(self._limits.pull_s)
        at_once = max(1, STREAM_CHUNK_BYTES // self._store.block_bytes)
        for start in range(0, len(block_ids), at_once):
            views = [self._store.read_block(b) for b in block_ids[start : start + at_once]]
            wire.send_raw(views[0] if len(views) == 1 else b"".join(views))
        wire.limit(None)
