"""The book of KV blocks: who holds which, and which full blocks can be found again by their tokens.

A block is *held* (reference count above 0), *cached* (free, but its content is known by a key and can
be reused until evicted, oldest first) or *blank*. Cached and blank blocks are both free.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

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
    """Allocates blocks with reference counts and remembers the content of full ones.

    Not thread-safe: only the compute thread touches it.
    """

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

    def references(self, block_id: int) -> int:
        """Return how many holders the block has."""
        return self._refs[block_id]

    def is_published(self, block_id: int) -> bool:
        """Tell whether later requests can find the block by its content."""
        return block_id in self._key_of

    def allocate(self, count: int) -> list[int] | None:
        """Hold ``count`` blocks and return them, or change nothing and return None when too few are free.

        Blank blocks go first, then the cached ones that were released longest ago.
        """
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

    def check_integrity(self, held: int | None = None) -> None:
        """Raise AssertionError unless every block is in exactly one state and the key maps agree.

        ``held``, when given, is the number of blocks that must have a holder.
        """
        blank, cached = set(self._blank), set(self._cached)
        with_holder = {block for block, refs in enumerate(self._refs) if refs > 0}
        if len(blank) != len(self._blank) or blank & cached or (blank | cached) & with_holder:
            raise AssertionError("a block is in two states at once")
        if len(blank) + len(cached) + len(with_holder) != self.total_blocks:
            raise AssertionError("a block is in no state")
        if any(refs < 0 for refs in self._refs):
            raise AssertionError("a reference count is negative")
        if {key: block for block, key in self._key_of.items()} != self._block_of:
            raise AssertionError("the key maps disagree")
        if not cached <= self._key_of.keys() or blank & self._key_of.keys():
            raise AssertionError("a cached block has no key or a blank one has")
        if held is not None and len(with_holder) != held:
            raise AssertionError(f"{len(with_holder)} blocks have a holder, expected {held}")
