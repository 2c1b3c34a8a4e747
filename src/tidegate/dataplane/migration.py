"""Moving a running decode to another instance in stages, while it goes on.

After Llumnix (OSDI 2024, section 4.2): the first stage copies the KV that is there, each further stage what
was generated meanwhile. Once ``core.migration`` says so, the decode leaves its batch at the end of the step
that runs, the rest is copied, and the decode goes on at the destination. Blocks there are reserved before
each stage; without room the migration ends. Until the last byte has arrived the source owns the decode, and a
migration that ends before leaves it there. The preemption, end or abort of the sequence ends its migration,
too. Ours: what the destination's prefix cache has is copied all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.migration import is_last_stage
from tidegate.dataplane.instance import Listener, SimInstance
from tidegate.dataplane.network import Network, Transfer
from tidegate.dataplane.sequence import PAUSED, SimSequence


@dataclass(slots=True, eq=False)
class Migration:
    """One decode on its way: ``copied`` tokens are at ``dst``, where ``blocks`` are reserved."""

    sequence: SimSequence
    src: int
    dst: int
    copied: int = 0
    blocks: int = 0
    stages: int = 0
    moved_bytes: int = 0
    transfer: Transfer | None = None


class Migrations:
    """The migrations under way, at most one per sequence."""

    def __init__(self, instances: Sequence[SimInstance], network: Network, listener: Listener) -> None:
        self._instances = instances
        self._network = network
        self._listener = listener
        self._under_way: dict[int, Migration] = {}

    def begin(self, request: int, src: int, dst: int, now: float) -> bool:
        """Start to move a request's decode; False, with nothing changed, when it cannot be moved.

        It must be in the batch of ``src`` and not be moving; ``dst`` must be another instance, take a
        sequence of its length, and have a place and blocks.
        """
        source, target = self._instances[src], self._instances[dst]
        sequence = source.decoding(request)
        if sequence is None or request in self._under_way or src == dst:
            return False
        source.settle(now)
        if sequence.last_token > target.replica.instance.max_model_len or not target.keep_place(now):
            return False
        migration = Migration(sequence, src, dst)
        if not self._reserve(migration, now):
            target.free_place(0, now)
            return False
        sequence.moving = True
        self._under_way[request] = migration
        self._copy(migration, now)
        return True

    def cancel(self, request: int, now: float) -> None:
        """End a migration, if one is under way, and leave the decode where it is."""
        migration = self._under_way.get(request)
        if migration is not None:
            self._end(migration, now)
            self._tell(migration, committed=False, now=now)

    def forget(self, sequence: SimSequence, now: float) -> None:
        """End the migration of a sequence that is being aborted, and tell nobody."""
        self._end(self._under_way[sequence.request], now)

    def left(self, sequence: SimSequence, now: float) -> None:
        """Take note that a moving sequence is out of its batch: paused, preempted or at its end."""
        migration = self._under_way.get(sequence.request)
        if migration is None or migration.sequence is not sequence:
            return
        if sequence.state == PAUSED and self._reserve(migration, now):
            self._copy(migration, now)
        else:
            self.cancel(sequence.request, now)

    def arrived(self, transfer: Transfer, now: float) -> None:
        """Take note that a stage is over: begin the next, pause the decode, or hand it over."""
        sequence = transfer.sequence
        migration = self._under_way[sequence.request]
        migration.transfer = None
        migration.moved_bytes += transfer.n_bytes
        if sequence.state == PAUSED:
            self._commit(migration, now)
            return
        source = self._instances[migration.src]
        source.settle(now)
        left = sequence.base + source.batcher.decode.ticks - migration.copied
        if is_last_stage(left, migration.stages, source.replica.instance.block_tokens):
            source.pause(sequence, now)
        elif self._reserve(migration, now):
            self._copy(migration, now)
        else:
            self.cancel(sequence.request, now)

    def _computed(self, migration: Migration) -> int:
        sequence = migration.sequence
        if sequence.state == PAUSED:
            return sequence.computed
        return sequence.base + self._instances[migration.src].batcher.decode.ticks

    def _reserve(self, migration: Migration, now: float) -> bool:
        """Have blocks at the destination for all that the source has computed."""
        target = self._instances[migration.dst]
        count = target.batcher.blocks.for_tokens(self._computed(migration)) - migration.blocks
        if not target.reserve(count, now):
            return False
        migration.blocks += count
        return True

    def _copy(self, migration: Migration, now: float) -> None:
        computed = self._computed(migration)
        per_token = self._instances[migration.src].replica.instance.kv_bytes_per_token
        n_bytes = (computed - migration.copied) * per_token
        migration.copied = computed
        migration.stages += 1
        migration.transfer = Transfer(migration.sequence, migration.src, migration.dst, n_bytes)
        self._network.begin(migration.transfer, now)

    def _commit(self, migration: Migration, now: float) -> None:
        sequence = migration.sequence
        del self._under_way[sequence.request]
        sequence.moving = False
        self._instances[migration.src].give_up(sequence, now)
        self._instances[migration.dst].arrive(sequence, now)
        self._tell(migration, committed=True, now=now)

    def _end(self, migration: Migration, now: float) -> None:
        sequence = migration.sequence
        del self._under_way[sequence.request]
        sequence.moving = False
        if migration.transfer is not None:
            self._network.cancel(migration.transfer, now)
        self._instances[migration.dst].free_place(migration.blocks, now)
        self._instances[migration.src].stay(sequence, now)

    def _tell(self, migration: Migration, *, committed: bool, now: float) -> None:
        src, dst, moved = migration.src, migration.dst, migration.moved_bytes
        self._listener.migrated(migration.sequence, src, dst, moved, committed, now)
