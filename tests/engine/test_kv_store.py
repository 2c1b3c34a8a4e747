"""The KV memory as a peer sees it."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from tidegate.engines.embedded.kv_store import KvShape, PagedKvStore


@pytest.fixture
def store() -> PagedKvStore:
    shape = KvShape(layers=3, kv_heads=2, head_dim=4, dtype=torch.float32)
    return PagedKvStore(shape, total_blocks=5, block_tokens=8, device=torch.device("cpu"))


def test_a_block_is_one_run_of_bytes(store: PagedKvStore) -> None:
    assert store.block_bytes == 3 * 2 * 8 * 2 * 4 * 4
    store.buffer[3] = torch.arange(store.buffer[3].numel()).view(store.buffer[3].shape)
    block = store.read_block(3)
    assert block.nbytes == store.block_bytes
    store.write_block(1, block)
    assert torch.equal(store.buffer[1], store.buffer[3])
    assert not store.buffer[2].any()


def test_rows_address_the_same_memory(store: PagedKvStore) -> None:
    store.buffer[2, 1, 1, 5] = 7.0
    row = ((2 * 3 + 1) * 2 + 1) * 8 + 5
    assert torch.equal(store.token_rows[row], torch.full((8,), 7.0))
    assert store.block_rows[(2 * 3 + 1) * 2 + 1].view(8, 8)[5].eq(7.0).all()


def test_another_process_can_map_the_memory(store: PagedKvStore) -> None:
    assert store.memory_fd is not None
    store.buffer[4] = 1.5
    peer = os.open(f"/proc/{os.getpid()}/fd/{store.memory_fd}", os.O_RDWR)
    try:
        with mmap.mmap(peer, 5 * store.block_bytes) as mapped:
            assert mapped[4 * store.block_bytes :] == bytes(store.read_block(4))
            mapped[: store.block_bytes] = mapped[4 * store.block_bytes :]
    finally:
        os.close(peer)
    assert store.buffer[0].eq(1.5).all()


def test_the_descriptor_closes_with_the_store() -> None:
    shape = KvShape(layers=1, kv_heads=1, head_dim=2, dtype=torch.float64)
    store = PagedKvStore(shape, 1, 1, torch.device("cpu"))
    fd = store.memory_fd
    assert fd is not None
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_other_bytes_than_a_block_are_refused(store: PagedKvStore) -> None:
    with pytest.raises(ValueError, match="different structures"):
        store.write_block(0, memoryview(b"short"))
