"""KV blocks: who holds which, which full ones are found again by their tokens, which are pinned for peers.

A block is *held* (reference count above 0), *cached* (free, but its content is known by a key and can
be reused until evicted, oldest first) or *blank*. Cached and blank blocks are both free.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

from tidegate.core.clock import Clock
from tidegate.engines.serving.types import PinnedKv

KEY_BYTES = 16


def root_key(salt: str) -> bytes:
    """Return the parent key of a tenant's first block; tenants with different salts share nothing."""
    return blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"tidegate-kv-root").digest()


def extend_keys(
    keys: list[bytes], root: bytes, token_ids: Sequence[int], block_tokens: int, upto: int
) -> None:
    """Append the chain keys of the full blocks within the first ``upto`` tokens that ``keys`` lacks."""
    for index in range(len(keys), upto // block_tokens):
        parent = keys[-1] if keys else root
        chunk = array("q", token_ids[index * block_tokens : (index + 1) * block_tokens])
        keys.append(blake2b(chunk.tobytes(), key=parent, digest_size=KEY_BYTES).digest())


class BlockPool:
    """Allocates blocks with reference counts and remembers the content of full ones. Not thread-safe: only
    the compute thread touches it."""

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self._refs = [0] * total_blocks
        self._blank = list(range(total_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that an allocation can have; cached ones count."""
        return len(self._blank) + len(self._cached)

    def is_shared(self, block_id: int) -> bool:
        """Tell whether another holder has the block, or later requests can find it by its content."""
        return self._refs[block_id] > 1 or block_id in self._key_of

    def allocate(self, count: int) -> list[int] | None:
        """Hold ``count`` blocks and return them, or change nothing and return None when too few are free.
        Blank blocks go first, then the cached ones that were released longest ago."""
        if count > self.free_blocks:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._refs[block] = 1
            taken.append(block)
        return taken

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix of ``keys`` without holding them."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def retain(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each block."""
        for block in block_ids:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one holder of each block. The last blocks of a chain are evicted before its first ones."""
        for block in reversed(block_ids):
            refs = self._refs[block] - 1
            if refs < 0:
                raise AssertionError(f"block {block} is released more often than held")
            self._refs[block] = refs
            if refs == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def publish(self, block_id: int, key: bytes) -> None:
        """Make a held, fully computed block findable by ``key``; the first block of a key stays."""
        if key not in self._block_of and block_id not in self._key_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def forget(self) -> None:
        """Drop every key: no later request finds earlier content."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._key_of.clear()
        self._block_of.clear()


class Pins:
    """The pins of an instance. Any thread may ask and release; only the compute thread pins and collects. A
    released or expired pin's blocks stay untouched until the compute thread collects them, so a ``release``
    that answers True vouches for everything read before it."""

    def __init__(self, lease_s: float, clock: Clock, wake: Callable[[], None]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._wake = wake
        self._lock = threading.Lock()
        self._pins: dict[str, PinnedKv] = {}
        self._returned: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._pins)

    def pin(
        self, request_id: str, block_ids: Sequence[int], num_tokens: int, *, lease_s: float | None = None
    ) -> PinnedKv:
        """Take over the caller's hold on the blocks for one lease, or for ``lease_s``; an older pin of the id
        ends."""
        ends_s = self._clock.now() + (self._lease_s if lease_s is None else lease_s)
        pin = PinnedKv(request_id, tuple(block_ids), num_tokens, ends_s)
        with self._lock:
            older = self._pins.pop(request_id, None)
            if older is not None:
                self._returned.append(older.block_ids)
            self._pins[request_id] = pin
        return pin

    def pinned(self, request_id: str) -> PinnedKv | None:
        """Return the pin while its lease runs."""
        with self._lock:
            pin = self._pins.get(request_id)
        return pin if pin is not None and pin.deadline_s > self._clock.now() else None

    def release(self, request_id: str) -> bool:
        """End the pin; True when its blocks were untouched until now."""
        with self._lock:
            pin = self._pins.pop(request_id, None)
            if pin is not None:
                self._returned.append(pin.block_ids)
        if pin is not None:
            self._wake()
        return pin is not None

    def end_oldest(self, *, but: str = "") -> tuple[int, ...] | None:
        """End the pin whose lease ends first, and hand its hold on the blocks to the caller, or return None.
        ``but`` names one that stays, as do those that no lease ends."""
        with self._lock:
            ends = [(pin.deadline_s, key) for key, pin in self._pins.items() if key != but]
            deadline_s, oldest = min(ends, default=(math.inf, ""))
            return None if math.isinf(deadline_s) else self._pins.pop(oldest).block_ids

    def take(self, request_id: str) -> PinnedKv | None:
        """End the pin and hand its hold on the blocks to the caller."""
        with self._lock:
            return self._pins.pop(request_id, None)

    def collect(self) -> list[tuple[int, ...]]:
        """Return the blocks of pins that were released or have expired; the caller drops their hold."""
        now = self._clock.now()
        with self._lock:
            for request_id in [key for key, pin in self._pins.items() if pin.deadline_s <= now]:
                self._returned.append(self._pins.pop(request_id).block_ids)
            returned, self._returned = self._returned, []
        return returned

    def next_deadline_s(self) -> float:
        """Return when the next lease ends, on the clock; inf without pins."""
        with self._lock:
            return min((pin.deadline_s for pin in self._pins.values()), default=math.inf)
