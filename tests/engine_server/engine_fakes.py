"""Stand-ins for the compute side: a KV store in shared memory, a pin book, an engine without a model."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable

from tidegate.engines.embedded.types import KvSource, PinnedKv

WAIT_S = 10.0


def wait_until(condition: Callable[[], bool], what: str = "condition", within_s: float = WAIT_S) -> None:
    """Poll ``condition``; AssertionError when it does not hold in time."""
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, f"{what} not reached within {within_s} s"
        threading.Event().wait(0.002)


class MemoryStore:
    """A KvStore over a memfd; ``shared`` False hides the descriptor, as a GPU store does."""

    def __init__(
        self, total_blocks: int = 16, block_bytes: int = 4096, block_tokens: int = 16, shared: bool = True
    ) -> None:
        self.total_blocks = total_blocks
        self.block_bytes = block_bytes
        self.block_tokens = block_tokens
        self._shared = shared
        self._fd = os.memfd_create("test-kv", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, total_blocks * block_bytes)
        self._map = mmap.mmap(self._fd, total_blocks * block_bytes)
        self.data = memoryview(self._map)
        self.on_read: Callable[[int], None] = lambda block_id: None
        self.on_write: Callable[[int], None] = lambda block_id: None

    def close(self) -> None:
        self.data.release()
        self._map.close()
        os.close(self._fd)

    def fill(self, seed: int) -> MemoryStore:
        for block in range(self.total_blocks):
            pattern = bytes((seed * 31 + block * 7 + i) % 251 for i in range(self.block_bytes))
            self.data[block * self.block_bytes : (block + 1) * self.block_bytes] = pattern
        return self

    def block(self, block_id: int) -> bytes:
        return bytes(self.data[block_id * self.block_bytes : (block_id + 1) * self.block_bytes])

    @property
    def memory_fd(self) -> int | None:
        return self._fd if self._shared else None

    def read_block(self, block_id: int) -> memoryview:
        self.on_read(block_id)
        return self.data[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]

    def write_block(self, block_id: int, data: memoryview) -> None:
        self.on_write(block_id)
        self.data[block_id * self.block_bytes : (block_id + 1) * self.block_bytes] = data


class Pins:
    """A PinBook whose pins end only when told."""

    def __init__(self) -> None:
        self._pins: dict[str, PinnedKv] = {}
        self._lock = threading.Lock()

    def pin(self, request_id: str, block_ids: tuple[int, ...], num_tokens: int) -> PinnedKv:
        pinned = PinnedKv(request_id, block_ids, num_tokens, time.monotonic() + 30.0)
        with self._lock:
            self._pins[request_id] = pinned
        return pinned

    def __len__(self) -> int:
        return len(self._pins)

    def pinned(self, request_id: str) -> PinnedKv | None:
        return self._pins.get(request_id)

    def release(self, request_id: str) -> bool:
        with self._lock:
            return self._pins.pop(request_id, None) is not None


class PullResult:
    """Receives ``done`` of one pull."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: str | None = None
        self.moved = -1
        self.calls = 0

    def __call__(self, error: str | None, moved: int) -> None:
        self.error, self.moved = error, moved
        self.calls += 1
        self._event.set()

    def wait(self) -> PullResult:
        assert self._event.wait(WAIT_S), "the pull never ended"
        return self


def source_for(port: int, pinned: PinnedKv, engine_id: str = "engine-a", host: str = "127.0.0.1") -> KvSource:
    return KvSource(engine_id, pinned.request_id, host, port, pinned.block_ids, pinned.num_tokens)
