"""The KV channel, on which an instance exports pinned KV blocks to peers, over TCP or shared memory.

    exporter -> puller   {"kv": 1, "nonce": S}
    puller -> exporter   {"nonce": P, "proof": MAC("puller", S, P)}
    exporter -> puller   {"proof": MAC("exporter", P, S), "facts": {...}}   or {"error": why}

and then, one at a time, from the puller:

    {"op": "pull", "request_id", "engine_id", "block_ids", "stream"} -> {"ok": true} (+ block bytes if
        "stream") or {"error": why}; without "stream" the puller reads the blocks from mapped memory. The
        blocks are some of those that are pinned, one behind the other
    {"op": "release", "request_id"} -> {"valid": whether the pin held until now}

    {"op": "stage", "engine_id", "stream", and a StageQuestion} -> {"ok": true, "stage": a StageAnswer}
        (+ block bytes if "stream") or {"error": why}; it may pause the decode
    {"op": "commit", "request_id"} -> {"valid": whether the paused decode is the peer's now}
    {"op": "stay", "request_id"} -> {"ok": true}; the paused decode goes on here, as when the connection ends

A frame is a big-endian 32-bit length and that many bytes of JSON; raw block bytes follow some
answers. The handshake proves membership on both sides without sending the secret. It does not
encrypt: the channel is meant for loopback and private networks.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from tidegate.core.errors import ConfigError
from tidegate.engines.embedded.blocks import Pins
from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.embedded.stages import Leaving, NotMovable, StageQuestion
from tidegate.engines.serving.secret import LaunchSecret, is_loopback

log = logging.getLogger(__name__)

VERSION = 1
MOST_CONNECTIONS = 256
HANDSHAKE_FRAME_BYTES = 4096
FRAME_BYTES = 16 << 20
STREAM_CHUNK_BYTES = 1 << 20
NONCE_BYTES = 32
_LENGTH = struct.Struct("!I")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class TransferFailed(Exception):
    """A pull failed; its blocks must not be used. Callers of the KV channel get ``message``."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class TransferTimedOut(TransferFailed):
    """A deadline of the KV channel passed."""


@dataclass(frozen=True, slots=True)
class TransferLimits:
    """Deadlines in seconds: of a connect, of a wait for the next bytes, of a whole pull, of an idle link."""

    connect_s: float = 2.0
    read_s: float = 5.0
    pull_s: float = 60.0
    idle_s: float = 120.0


@dataclass(frozen=True, slots=True)
class ExporterFacts:
    """What an exporter says about itself after the handshake. ``model`` identifies weights and KV layout;
    ``fd``, with what follows ``total_blocks``, the memory to map, or None when there is none."""

    engine_id: str
    model: str
    block_bytes: int
    block_tokens: int
    total_blocks: int
    pid: int
    boot_id: str
    fd: int | None = None
    device: int = 0
    inode: int = 0


class KvSocket:
    """One connection. Every operation raises TransferFailed at its deadline or when the peer is gone."""

    def __init__(self, sock: socket.socket, read_s: float) -> None:
        self._sock = sock
        self._read_s = read_s
        self._end_s: float | None = None

    def limit(self, seconds: float | None) -> None:
        """Set how long the operations from here on may take together; None lifts it."""
        self._end_s = None if seconds is None else time.monotonic() + seconds

    def send(self, message: dict[str, Any]) -> None:
        payload = orjson.dumps(message)
        self.send_raw(_LENGTH.pack(len(payload)) + payload)

    def send_raw(self, data: bytes | memoryview) -> None:
        try:
            self._arm(self._read_s)
            self._sock.sendall(data)
        except OSError as error:
            raise _broken(error) from None

    def receive(self, *, most: int = FRAME_BYTES, wait_s: float | None = None) -> dict[str, Any]:
        """Return the next frame; ``wait_s`` replaces the read deadline for its first byte."""
        head = bytearray(_LENGTH.size)
        self.receive_into(memoryview(head), wait_s=wait_s)
        (length,) = _LENGTH.unpack(head)
        if length > most:
            raise TransferFailed(f"the peer sent a frame of {length} bytes; the limit is {most}")
        body = bytearray(length)
        self.receive_into(memoryview(body))
        try:
            message = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise TransferFailed("the peer does not speak the KV protocol") from None
        if not isinstance(message, dict):
            raise TransferFailed("the peer does not speak the KV protocol")
        return message

    def receive_into(self, view: memoryview, *, wait_s: float | None = None) -> None:
        """Fill ``view``."""
        wait = self._read_s if wait_s is None else wait_s
        try:
            while view.nbytes:
                self._arm(wait)
                count = self._sock.recv_into(view)
                if count == 0:
                    raise TransferFailed("the peer closed the connection")
                view = view[count:]
                wait = self._read_s
        except OSError as error:
            raise _broken(error) from None

    def close(self) -> None:
        """Close from any thread; a blocked operation of another thread ends with TransferFailed."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _arm(self, wait_s: float) -> None:
        left = wait_s if self._end_s is None else min(wait_s, self._end_s - time.monotonic())
        if left <= 0:
            raise TransferTimedOut("the transfer took longer than its deadline")
        self._sock.settimeout(left)


def greet_puller(wire: KvSocket, secret: LaunchSecret, facts: ExporterFacts) -> None:
    """Run the exporter's side of the handshake. Raises TransferFailed for a peer without the secret."""
    ours = secrets.token_hex(NONCE_BYTES)
    wire.send({"kv": VERSION, "nonce": ours})
    answer = wire.receive(most=HANDSHAKE_FRAME_BYTES)
    theirs = _nonce(answer)
    if not secret.check_proof(answer.get("proof"), "puller", ours.encode(), theirs):
        wire.send({"error": "not a member of this launch"})
        raise TransferFailed("a peer without the launch secret was refused")
    wire.send({"proof": secret.proof("exporter", theirs, ours.encode()), "facts": asdict(facts)})


def greet_exporter(wire: KvSocket, secret: LaunchSecret) -> ExporterFacts:
    """Run the puller's side. Raises TransferFailed when refused or when the exporter lacks the secret."""
    hello = wire.receive(most=HANDSHAKE_FRAME_BYTES)
    if hello.get("kv") != VERSION:
        raise TransferFailed(f"the peer speaks KV protocol {hello.get('kv')!r}, not {VERSION}")
    theirs = _nonce(hello)
    ours = secrets.token_hex(NONCE_BYTES)
    wire.send({"nonce": ours, "proof": secret.proof("puller", theirs, ours.encode())})
    answer = wire.receive(most=HANDSHAKE_FRAME_BYTES)
    if "error" in answer:
        raise TransferFailed(f"the peer refused the connection: {answer['error']}")
    if not secret.check_proof(answer.get("proof"), "exporter", ours.encode(), theirs):
        raise TransferFailed("the peer does not know the launch secret")
    try:
        return ExporterFacts(**answer["facts"])
    except (KeyError, TypeError):
        raise TransferFailed("the peer's facts are malformed") from None


def _nonce(message: dict[str, Any]) -> bytes:
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != 2 * NONCE_BYTES:
        raise TransferFailed("the peer does not speak the KV protocol")
    return nonce.encode()


def _broken(error: OSError) -> TransferFailed:
    if isinstance(error, TimeoutError):
        return TransferTimedOut("the peer did not answer in time")
    return TransferFailed(f"the connection broke: {error.strerror or type(error).__name__}")


def map_store(facts: ExporterFacts) -> mmap.mmap | None:
    """Map the exporter's store read-only, or return None when it is not reachable as shared memory.

    Process ids mean something only inside one kernel and one pid namespace, so the opened file
    counts only if boot id, device, inode and size are those the exporter names. The mapping outlives the
    exporter: only its answer to a release says whether what was read is valid.
    """
    if facts.fd is None or not facts.boot_id or facts.boot_id != _boot_id():
        return None
    size = facts.total_blocks * facts.block_bytes
    try:
        fd = os.open(f"/proc/{facts.pid}/fd/{facts.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        stat = os.fstat(fd)
        if (stat.st_dev, stat.st_ino) != (facts.device, facts.inode) or stat.st_size < size:
            return None
        return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class KvExporter:
    """Listens from construction on; serves after ``start``, one thread per connected peer."""

    def __init__(
        self,
        pins: Pins,
        store: PagedKvStore,
        secret: LaunchSecret,
        *,
        engine_id: str,
        decodes: Leaving | None = None,
        model: str = "",
        host: str = "127.0.0.1",
        limits: TransferLimits | None = None,
    ) -> None:
        """Bind to a free port. ``decodes`` are those that peers may take over. Raises ConfigError for a
        non-loopback ``host`` without a secret."""
        if not secret and not is_loopback(host):
            raise ConfigError(f"the KV channel serves only loopback without a launch secret, not {host}")
        self._pins = pins
        self._decodes = decodes
        self._store = store
        self._secret = secret
        fd = store.memory_fd
        memory = None if fd is None else os.fstat(fd)
        self._facts = ExporterFacts(
            engine_id=engine_id,
            model=model,
            block_bytes=store.block_bytes,
            block_tokens=store.block_tokens,
            total_blocks=store.total_blocks,
            pid=os.getpid(),
            boot_id=_boot_id(),
            fd=fd,
            device=0 if memory is None else memory.st_dev,
            inode=0 if memory is None else memory.st_ino,
        )
        self._limits = limits or TransferLimits()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self._lock = threading.Lock()
        self._wires: set[KvSocket] = set()
        self._closed = False
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
        paused: set[str] = set()
        try:
            wire.limit(self._limits.read_s)
            greet_puller(wire, self._secret, self._facts)
            wire.limit(None)
            while True:
                self._answer(wire, wire.receive(wait_s=2 * self._limits.idle_s), paused)
        except TransferFailed as failure:
            log.debug("KV peer left: %s", failure.message)
        except Exception:
            log.exception("serving a KV peer failed")
        finally:
            with self._lock:
                self._wires.discard(wire)
            wire.close()
            for request_id in paused:
                self._stay(request_id)

    def _answer(self, wire: KvSocket, message: dict[str, Any], paused: set[str]) -> None:
        request_id = str(message.get("request_id"))
        match message.get("op"):
            case "stage":
                self._send_stage(wire, message, paused)
            case "commit":
                paused.discard(request_id)
                wire.send({"valid": self._decodes is not None and self._decodes.commit(request_id)})
            case "stay":
                paused.discard(request_id)
                self._stay(request_id)
                wire.send({"ok": True})
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
        wanted, pins = message.get("block_ids"), pinned.block_ids
        at = pins.index(wanted[0]) if isinstance(wanted, list) and wanted and wanted[0] in pins else 0
        if not isinstance(wanted, list) or tuple(wanted) != pins[at : at + len(wanted)]:
            wire.send({"error": "the handle's blocks are not those pinned for this request"})
            return
        wire.send({"ok": True})
        if message.get("stream"):
            self._stream(wire, wanted)

    def _send_stage(self, wire: KvSocket, message: dict[str, Any], paused: set[str]) -> None:
        """Answer a question about a running decode; ``paused`` are those that this peer has stopped."""
        if self._decodes is None or message.get("engine_id") != self._facts.engine_id:
            wire.send({"error": f"this is engine {self._facts.engine_id}; the decode is of another"})
            return
        asked: dict[str, Any] = {name: message.get(name) for name in StageQuestion.__dataclass_fields__}
        try:
            answer = self._decodes.stage(StageQuestion(**asked))
        except (NotMovable, TransferFailed) as error:
            wire.send({"error": str(error)})
            return
        if answer.state is not None:
            paused.add(str(message.get("request_id")))
        wire.send({"ok": True, "stage": asdict(answer)})
        if message.get("stream"):
            self._stream(wire, answer.block_ids)

    def _stay(self, request_id: str) -> None:
        if self._decodes is not None:
            self._decodes.stay(request_id)

    def _stream(self, wire: KvSocket, block_ids: list[int]) -> None:
        """Send the blocks' bytes in order, small blocks gathered so that a send is worth its call."""
        wire.limit(self._limits.pull_s)
        at_once = max(1, STREAM_CHUNK_BYTES // self._store.block_bytes)
        for start in range(0, len(block_ids), at_once):
            views = [self._store.read_block(b) for b in block_ids[start : start + at_once]]
            wire.send_raw(views[0] if len(views) == 1 else b"".join(views))
        wire.limit(None)
