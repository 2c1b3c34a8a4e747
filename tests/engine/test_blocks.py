"""The block book adds up after any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.engine.block_checks import check_pool
from tidegate.engines.embedded.blocks import BlockPool, extend_keys, root_key

TOTAL = 12


class Book(RuleBasedStateMachine):
    """Holders come and go; a model of who holds what checks the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL, 4)
        self.holders: list[list[int]] = []
        self.content: dict[bytes, int] = {}

    @rule(count=st.integers(0, TOTAL))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            held = {block for holder in self.holders for block in holder}
            assert len(set(blocks)) == count and not held & set(blocks)
            self.content = {key: block for key, block in self.content.items() if block not in blocks}
            self.holders.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holders:
            self.pool.release(self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1))))

    @rule(data=st.data(), key=st.integers(0, 20))
    def publish(self, data: st.DataObject, key: int) -> None:
        held = [block for holder in self.holders for block in holder]
        if held:
            name = key.to_bytes(16, "big")
            block = data.draw(st.sampled_from(held))
            if name not in self.content and block not in self.content.values():
                self.content[name] = block
            self.pool.publish(block, name)

    @rule(keys=st.lists(st.integers(0, 20), max_size=4))
    def reuse(self, keys: list[int]) -> None:
        names = [key.to_bytes(16, "big") for key in keys]
        hits = self.pool.lookup(names)
        assert hits == [self.content[name] for name in names[: len(hits)]]
        assert len(hits) == len(names) or names[len(hits)] not in self.content
        self.pool.retain(hits)
        self.holders.append(hits)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.content.clear()

    @invariant()
    def adds_up(self) -> None:
        held = {block for holder in self.holders for block in holder}
        check_pool(self.pool, len(held))
        assert self.pool.free_blocks == TOTAL - len(held)
        for block in range(TOTAL):
            assert self.pool._refs[block] == sum(holder.count(block) for holder in self.holders)


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30)


def keys_of(tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, root_key(salt), tokens, 4, len(tokens))
    return keys


def test_keys_depend_on_salt_and_on_everything_before() -> None:
    keys = keys_of(list(range(10)))
    assert len(keys) == 2
    assert keys_of(list(range(8))) == keys
    assert not set(keys_of(list(range(8)), salt="tenant")) & set(keys)
    assert keys_of([9, *range(1, 8)])[1] != keys[1]
    grown = keys[:1]
    extend_keys(grown, root_key(""), list(range(10)), 4, 10)
    assert grown == keys


def test_eviction_takes_the_longest_released_chain_from_its_end() -> None:
    pool = BlockPool(4, 4)
    old = pool.allocate(2)
    new = pool.allocate(2)
    assert old is not None and new is not None
    for index, block in enumerate([*old, *new]):
        pool.publish(block, bytes([index]) * 16)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.allocate(2) == [old[0], new[1]]


def test_a_double_release_is_noticed() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)
