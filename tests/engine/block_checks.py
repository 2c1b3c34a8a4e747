"""What has to hold of the blocks of an engine between two steps."""

from __future__ import annotations

from tidegate.engines.embedded.blocks import BlockPool
from tidegate.engines.embedded.scheduler import BatchScheduler


def check_pool(pool: BlockPool, held: int) -> None:
    """AssertionError unless ``held`` blocks have a holder, each is in one state and the key maps agree."""
    blank, cached = set(pool._blank), set(pool._cached)
    with_holder = {block for block, refs in enumerate(pool._refs) if refs > 0}
    assert len(blank) == len(pool._blank) and not blank & cached and not (blank | cached) & with_holder
    assert len(blank) + len(cached) + len(with_holder) == pool.total_blocks
    assert min(pool._refs) >= 0
    assert {key: block for block, key in pool._key_of.items()} == pool._block_of
    assert cached <= pool._key_of.keys() and not blank & pool._key_of.keys()
    assert len(with_holder) == held


def check_blocks(scheduler: BatchScheduler) -> None:
    """AssertionError unless exactly the blocks of sequences and pins are held."""
    pins = scheduler.pins
    held = {block for pin in pins._pins.values() for block in pin.block_ids}
    held.update(block for blocks in pins._returned for block in blocks)
    for sequence in [*scheduler.running, *scheduler.loading]:
        held.update(sequence.blocks)
    check_pool(scheduler.pool, len(held))
