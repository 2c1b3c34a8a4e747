"""The KV channel between two instances: frames, deadlines, the mutual handshake, shared memory.

    exporter -> puller   {"kv": 1, "nonce": S}
    puller -> exporter   {"nonce": P, "proof": MAC("puller", S, P)}
    exporter -> puller   {"proof": MAC("exporter", P, S), "facts": {...}}   or {"error": why}

A frame is a big-endian 32-bit length and that many bytes of JSON; raw block bytes follow some
answers. The handshake proves membership on both sides without sending the secret. It does not
encrypt: the channel is meant for loopback and private networks.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from tidegate.engines.embedded.kv_store import PagedKvStore
from tidegate.engines.serving.secret import LaunchSecret

VERSION = 1
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
    """What an exporter says about itself after the handshake.

    ``model`` identifies weights and KV layout; ``fd``, with what follows ``total_blocks``, the memory to
    map, or None when there is none.
    """

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

    __slots__ = ("_end_s", "_read_s", "_sock")

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


def describe_store(store: PagedKvStore, *, engine_id: str, model: str) -> ExporterFacts:
    """Return the facts of an exporter of ``store``, with the identity of its memory if it has an fd."""
    fd = store.memory_fd
    stat = None if fd is None else os.fstat(fd)
    return ExporterFacts(
        engine_id=engine_id,
        model=model,
        block_bytes=store.block_bytes,
        block_tokens=store.block_tokens,
        total_blocks=store.total_blocks,
        pid=os.getpid(),
        boot_id=_boot_id(),
        fd=fd,
        device=0 if stat is None else stat.st_dev,
        inode=0 if stat is None else stat.st_ino,
    )


class MappedStore:
    """A peer's store, mapped read-only. The mapping outlives the peer, so contents may be stale:
    the peer's answer to RELEASE says whether what was read is valid."""

    __slots__ = ("_block_bytes", "_map", "_view")

    def __init__(self, mapping: mmap.mmap, block_bytes: int) -> None:
        self._map = mapping
        self._view = memoryview(mapping)
        self._block_bytes = block_bytes

    def read_block(self, block_id: int) -> memoryview:
        """Return the bytes of one block of the peer; release the view before ``close``."""
        start = block_id * self._block_bytes
        return self._view[start : start + self._block_bytes]

    def close(self) -> None:
        self._view.release()
        self._map.close()


def map_store(facts: ExporterFacts) -> MappedStore | None:
    """Map the exporter's store, or return None when it is not reachable as shared memory.

    Process ids mean something only inside one kernel and one pid namespace, so the opened file
    counts only if boot id, device, inode and size are those the exporter names.
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
        return MappedStore(mmap.mmap(fd, size, prot=mmap.PROT_READ), facts.block_bytes)
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
