"""Shared memory between instances on one host: naming an exporter's store and mapping it read-only."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from tidegate.engines.embedded.transfer_wire import ExporterFacts
from tidegate.engines.embedded.types import KvStore

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def describe_store(store: KvStore, *, engine_id: str, model: str) -> ExporterFacts:
    """Return the facts an exporter of ``store`` sends, with the identity of its memory if it has an fd."""
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
