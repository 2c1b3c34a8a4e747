"""The KV channel's wire: frames, deadlines and the mutual handshake.

    exporter -> puller   {"kv": 1, "nonce": S}
    puller -> exporter   {"nonce": P, "proof": MAC("puller", S, P)}
    exporter -> puller   {"proof": MAC("exporter", P, S), "facts": {...}}   or {"error": why}

A frame is a big-endian 32-bit length and that many bytes of JSON; raw block bytes follow some
answers. The handshake proves membership on both sides without sending the secret. It does not
encrypt: the channel is meant for loopback and private networks.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from tidegate.engines.serving.secret import LaunchSecret

VERSION = 1
HANDSHAKE_FRAME_BYTES = 4096
FRAME_BYTES = 16 << 20
STREAM_CHUNK_BYTES = 1 << 20
NONCE_BYTES = 32
_LENGTH = struct.Struct("!I")


class TransferFailed(Exception):
    """A pull failed; its blocks must not be used.

    Outside the one error tree: it stays inside the KV channel, whose callers get ``message``.
    """

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

    ``model`` identifies weights and KV layout; ``fd`` (with ``pid``, ``boot_id``, ``device`` and
    ``inode``) identifies the memory to map, or is None when there is none.
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
