"""The seams between the embedded engine's KV memory and its transfer."""

from __future__ import annotations

from typing import Protocol

from tidegate.engines.serving.types import PinnedKv


class KvStore(Protocol):
    """The paged KV memory of an instance, as the transfer sees it.

    A block is one contiguous run of ``block_bytes`` bytes holding ``block_tokens`` tokens of every
    layer, so that a block moves with one copy. Blocks are addressed by index.
    """

    block_tokens: int
    block_bytes: int
    total_blocks: int

    @property
    def memory_fd(self) -> int | None:
        """A file descriptor whose mapping is the whole store (blocks in order), or None (CUDA)."""
        ...

    def read_block(self, block_id: int) -> memoryview:
        """Return the bytes of one block (a view on CPU, a staged copy on CUDA)."""
        ...

    def write_block(self, block_id: int, data: memoryview) -> None:
        """Overwrite one block."""
        ...


class PinBook(Protocol):
    """The exporting side's book, safe to call from any thread."""

    def pinned(self, request_id: str) -> PinnedKv | None:
        """Return the pinned KV, or None when it expired or never existed."""
        ...

    def release(self, request_id: str) -> bool:
        """Unpin; True when the KV was still pinned, so that everything read before is valid."""
        ...
