"""Bodies that clients upload: what memory they may take, alone and together, and how they are inflated."""

from __future__ import annotations

import asyncio
import zlib

from tidegate.core.errors import BadRequest, BodyTooLarge, Overloaded, UnsupportedEncoding

MOST_HELD_BYTES = 2**30
"""Memory that the bodies of all requests in progress may take together (ours)."""
MOST_WEIGHT_BYTES = 2**28
"""Memory that one decoded body may take (ours): some three times the longest prompt that is taken. Decoding
and checking that much holds up all else, in any thread, for less than a second on one slow core."""
UNCOUNTED_BYTES = 64 * 1024
"""A body that takes no more is not counted (ours): a connection's buffers take as much without any."""
STEP_BYTES = 2**20
"""Bytes that are inflated at a time (ours), the first time on the event loop: about 2 ms."""
RETRY_AFTER_S = 1.0
VALUE_BYTES, LIST_BYTES, OBJECT_BYTES, KEY_BYTES = 40, 56, 232, 160
"""What Python takes for a value, and what more for a list, an object and a key while it
is decoded (measured)."""
WINDOWS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""Content encodings that are inflated, as zlib's window sizes; clients send deflate with and without zlib's
header."""


class BodyMemory:
    """Counts the memory of the bodies of one server's requests."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0


class HeldBody:
    """One request's share of ``memory``."""

    __slots__ = ("_bytes", "_memory")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._bytes = 0

    def grow_to(self, total_bytes: int) -> None:
        """Count what the body takes now; it never shrinks. Raises Overloaded when all take too much."""
        more = total_bytes - self._bytes
        if more <= 0 or total_bytes <= UNCOUNTED_BYTES:
            return
        memory = self._memory
        if memory.held_bytes + more > memory.most_bytes:
            held_mb = memory.held_bytes // 2**20
            message = f"no room for a large body: those of requests in progress take {held_mb} MB"
            raise Overloaded(message, retry_after_s=RETRY_AFTER_S)
        memory.held_bytes += more
        self._bytes = total_bytes

    def release(self) -> None:
        """Give the memory back; the request is over."""
        self._memory.held_bytes -= self._bytes
        self._bytes = 0


async def inflated(raw: bytes, encoding: str, most_bytes: int, held: HeldBody) -> bytes:
    """Return ``raw`` without its content encoding, inflated in steps and off the event loop where large.

    Raises UnsupportedEncoding, BadRequest for data that are broken or not one stream, and BodyTooLarge.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return raw
    if encoding not in WINDOWS:
        raise UnsupportedEncoding(f"Content-Encoding {encoding!r} is not taken; taken: {', '.join(WINDOWS)}")
    for window in WINDOWS[encoding]:
        try:
            return await _inflated(raw, window, most_bytes, held)
        except zlib.error:
            continue
    raise BadRequest(f"the body is not valid {encoding}, or it is cut off")


async def _inflated(raw: bytes, window: int, most_bytes: int, held: HeldBody) -> bytes:
    inflater = zlib.decompressobj(window)
    done = bytearray(inflater.decompress(raw, STEP_BYTES))
    while not inflater.eof:
        if len(done) > most_bytes:
            break
        held.grow_to(len(raw) + len(done))
        step = await asyncio.to_thread(inflater.decompress, inflater.unconsumed_tail, STEP_BYTES)
        if not step:
            raise zlib.error("cut off")
        done += step
    if len(done) > most_bytes:
        raise BodyTooLarge(f"the body exceeds {most_bytes} bytes")
    if inflater.unused_data:
        raise BadRequest("the compressed body is followed by other data")
    return bytes(done)


def weight_bytes(raw: bytes) -> int:
    """Return about how much memory the JSON text takes once it is decoded. Raises BodyTooLarge where that is
    more than any served prompt needs."""
    values, keys = raw.count(b","), raw.count(b":")
    lists, objects = raw.count(b"["), raw.count(b"{")
    weight = len(raw) + VALUE_BYTES * values + KEY_BYTES * keys + LIST_BYTES * lists + OBJECT_BYTES * objects
    if weight > MOST_WEIGHT_BYTES:
        raise BodyTooLarge(f"the body has too many values: decoded it would take {weight // 2**20} MB")
    return weight
