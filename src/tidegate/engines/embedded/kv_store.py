"""The paged KV memory of one instance: a single buffer that the model computes in and a peer can map.

Layout: ``(blocks, layers, 2, block_tokens, kv_heads, head_dim)``; index 0 of the third axis is K, 1 is V.
A block is contiguous, so it moves with one copy. On CPU the memory is an anonymous file (``memfd``), which a
peer process maps through ``/proc/PID/fd/FD``.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's KV consists of."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of all layers of one token."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


class PagedKvStore:
    """A KvStore of ``total_blocks`` blocks of ``block_tokens`` tokens of every layer."""

    def __init__(self, shape: KvShape, total_blocks: int, block_tokens: int, device: torch.device) -> None:
        self.shape = shape
        self.total_blocks = total_blocks
        self.block_tokens = block_tokens
        self.block_bytes = shape.bytes_per_token * block_tokens
        self.device = device
        self.planes = shape.layers * 2
        """Rows of ``block_rows`` per block: K and V of every layer."""
        self._fd: int | None = None
        dims = (total_blocks, shape.layers, 2, block_tokens, shape.kv_heads, shape.head_dim)
        if device.type == "cpu":
            size = total_blocks * self.block_bytes
            self._fd = os.memfd_create("tidegate-kv", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
            self._bytes = memoryview(self._map)
            self.buffer = torch.frombuffer(self._map, dtype=shape.dtype).view(dims)
        else:
            self.buffer = torch.zeros(dims, dtype=shape.dtype, device=device)
        width = shape.kv_heads * shape.head_dim
        self.token_rows = self.buffer.view(-1, width)
        """``(blocks * layers * 2 * block_tokens, kv_heads * head_dim)``: one row per token and plane."""
        self.block_rows = self.buffer.view(-1, block_tokens * width)
        """``(blocks * layers * 2, block_tokens * kv_heads * head_dim)``: one row per block and plane."""

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)

    @property
    def memory_fd(self) -> int | None:
        """Descriptor of the anonymous file that holds the store; None when the KV is on a GPU."""
        return self._fd

    def read_block(self, block_id: int) -> memoryview:
        """Return the bytes of one block: a live view on CPU, a staged copy on CUDA."""
        if self._fd is not None:
            return self._bytes[block_id * self.block_bytes : (block_id + 1) * self.block_bytes]
        staged = self.buffer[block_id].contiguous().view(torch.uint8).cpu()
        flat: Any = staged.numpy().reshape(-1)
        return memoryview(flat)

    def write_block(self, block_id: int, data: memoryview) -> None:
        """Overwrite one block. Raises ValueError unless ``data`` is exactly one block of bytes."""
        if self._fd is not None:
            self._bytes[block_id * self.block_bytes : (block_id + 1) * self.block_bytes] = data.cast("B")
            return
        staged = torch.frombuffer(bytearray(data), dtype=self.shape.dtype)
        self.buffer[block_id].copy_(staged.view(self.buffer.shape[1:]))

    def clear_blocks(self, block_ids: list[int]) -> None:
        """Zero blocks: attention reads the unused tail of a block and hides it, which a NaN would survive."""
        self.buffer.index_fill_(0, torch.tensor(block_ids, device=self.device), 0)
