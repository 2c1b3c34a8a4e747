"""The ledger's numbers: one matrix, one row per quantity, one column per instance that is up."""

from __future__ import annotations

import enum
from typing import cast

import numpy as np

from tidegate.core.instance import Instance, Role
from tidegate.ledger.live_table import NOWHERE, LiveTable
from tidegate.ledger.records import InstanceEntry, RequestEntry
from tidegate.ledger.snapshot import Field, Matrix


class WindowRow(enum.IntEnum):
    """Rows behind the public ones: what the open window has gathered so far."""

    QUEUE_SINCE_S = Field.COUNT
    """When the window opened, or the queue last changed; the rows behind are sums over the window."""
    QUEUE_INTEGRAL = enum.auto()
    GAP_SUM_S = enum.auto()
    GAP_TOKENS = enum.auto()
    TTFT_SUM_S = enum.auto()
    TTFT_COUNT = enum.auto()
    PREFILL_WORK_S = enum.auto()
    PREFILL_WORK_S2 = enum.auto()
    PREFILL_BUSY_S = enum.auto()
    PREFILL_ENDED_S = enum.auto()
    LATELY_BUSY_S = enum.auto()
    """This and the next one outlast the window: the two before them, of late."""
    LATELY_ENDED_S = enum.auto()
    FIRST_DECODES = enum.auto()
    """This and the next one: how many decodes there were when the window opened, and what they held."""
    FIRST_DECODE_TOKENS = enum.auto()


ROWS = Field.COUNT + len(WindowRow)
PAUSE_WEIGHT = 0.1
"""Weight of the newest migration in an instance's mean pause (ours)."""


class _RowViews:
    """A writable view of each row that events touch, named like its row."""

    role: memoryview[float]
    prefill_requests: memoryview[float]
    prefill_tokens: memoryview[float]
    prefill_queue_s: memoryview[float]
    running_prefill_s: memoryview[float]
    running_prefill_since_s: memoryview[float]
    decode_requests: memoryview[float]
    decode_tokens: memoryview[float]
    handoff_tokens: memoryview[float]
    free_tokens: memoryview[float]
    inbound_tokens: memoryview[float]
    outbound_tokens: memoryview[float]
    hopeless_s: memoryview[float]
    flipped_at_s: memoryview[float]
    draining: memoryview[float]
    move_pause_s: memoryview[float]
    queue_since_s: memoryview[float]
    queue_integral: memoryview[float]
    gap_sum_s: memoryview[float]
    gap_tokens: memoryview[float]
    ttft_sum_s: memoryview[float]
    ttft_count: memoryview[float]
    prefill_work_s: memoryview[float]
    prefill_work_s2: memoryview[float]
    prefill_busy_s: memoryview[float]
    prefill_ended_s: memoryview[float]


class LedgerMatrix(_RowViews):
    """The matrix, its rows, and what a change of a request's stage adds to an instance's sums or takes.

    A cell is read or written through a memoryview in about 50 ns, a third of what numpy needs for a scalar;
    whole rows go through ``array``, of which ``public`` is what snapshots copy. All see the same memory.
    Adding or removing a column replaces the array and every view: hold the matrix, never a view.

    Changes of stage change the sums and the records at once; none checks whether the change is legal.
    """

    def __init__(self) -> None:
        self._adopt(np.zeros((ROWS, 0)))
        self.requests = LiveTable()

    def add_column(self, instance: Instance, role: Role, *, measured: bool) -> int:
        """Append the column of an instance that is empty and was never flipped, and return its index.

        ``measured``: its profile predicts something."""
        column: int = self.array.shape[1]
        self._adopt(np.concatenate([self.array, np.zeros((ROWS, 1))], axis=1))
        cells = self.array[:, column]
        cells[Field.ROLE : Field.FLIPPABLE + 1] = role, instance.flippable
        cells[Field.FLIPPED_AT_S] = -np.inf
        cells[Field.KV_CAPACITY_TOKENS] = instance.kv_capacity_tokens
        cells[Field.FREE_TOKENS] = instance.kv_capacity_tokens or np.inf
        cells[Field.PREFILL_SLOWNESS] = float(measured)
        cells[Field.KV_BYTES_PER_TOKEN] = instance.kv_bytes_per_token
        cells[Field.BLOCK_TOKENS : Field.EXTENDS_KV + 1] = instance.block_tokens, instance.extends_kv
        cells[Field.STEP_TOKENS] = instance.step_tokens
        return column

    def remove_column(self, column: int) -> None:
        """Drop ``column``; the ones behind it move down by one."""
        self._adopt(np.delete(self.array, column, axis=1))
        self.requests.column_removed(column)

    def _adopt(self, array: Matrix) -> None:
        self.array = np.ascontiguousarray(array)
        self.public = memoryview(cast("memoryview[float]", self.array[: Field.COUNT]))
        for name in _RowViews.__annotations__:
            row = name.upper()
            index = WindowRow[row] if row in WindowRow.__members__ else getattr(Field, row)
            setattr(self, name, memoryview(self.array[index]))

    def change_queue(self, column: int, seconds: float, now: float) -> None:
        """Add ``seconds`` of predicted prefill to a queue, or take them; first book the queue until now."""
        queue_s = self.prefill_queue_s[column]
        if queue_s:
            span_s = now - self.queue_since_s[column]
            self.queue_integral[column] += queue_s * span_s
            self.prefill_busy_s[column] += span_s
        self.queue_since_s[column] = now
        self.prefill_queue_s[column] = queue_s + seconds

    def set_foreign(self, instance: InstanceEntry, requests: int, tokens: int) -> None:
        """Count what others have on an instance, in place of what was counted before."""
        column = instance.column
        resident, held = (tokens, 0) if requests else (0, tokens)
        self.decode_requests[column] += requests - instance.foreign_requests
        self.decode_tokens[column] += resident - instance.foreign_resident_tokens
        self.handoff_tokens[column] += held - instance.foreign_held_tokens
        self.free_tokens[column] -= tokens - instance.foreign_resident_tokens - instance.foreign_held_tokens
        instance.foreign_requests = requests
        instance.foreign_resident_tokens, instance.foreign_held_tokens = resident, held

    def set_head(self, instance: InstanceEntry, entry: RequestEntry | None, now: float) -> None:
        """Take ``entry`` for the running prefill, begun now."""
        instance.head = entry
        self.running_prefill_s[instance.column] = entry.seconds if entry is not None else 0.0
        self.running_prefill_since_s[instance.column] = now

    def note_pause(self, column: int, seconds: float) -> None:
        """Count the gap between two tokens of a decode that moved to an instance between them."""
        before_s = self.move_pause_s[column]
        self.move_pause_s[column] = before_s + PAUSE_WEIGHT * (seconds - before_s) if before_s else seconds

    def leave_prefill(self, entry: RequestEntry, now: float) -> None:
        """Take a request out of its instance's prefills."""
        instance = entry.prefill
        assert instance is not None
        column = instance.column
        entry.prefill = None
        self.requests.prefill_on[entry.slot] = NOWHERE
        del instance.prefills[entry.request.id]
        self.prefill_requests[column] -= 1
        self.prefill_tokens[column] -= entry.request.prompt_tokens
        self.change_queue(column, -entry.seconds, now)
        if entry.hopeless:
            self.hopeless_s[column] -= entry.seconds
        if instance.head is entry:
            self.set_head(instance, next(iter(instance.prefills.values()), None), now)

    def note_hopeless(self, entry: RequestEntry) -> None:
        """Count a prefill whose first token will be late; nothing where it is over."""
        if entry.prefill is not None and not entry.hopeless:
            entry.hopeless = True
            self.hopeless_s[entry.prefill.column] += entry.seconds

    def note_first_token(self, column: int, entry: RequestEntry, now: float) -> None:
        """Count a prefill that ended; its TTFT, too, unless the request had tokens before."""
        self.prefill_ended_s[column] += entry.seconds
        if not entry.request.generated:
            self.ttft_sum_s[column] += now - entry.request.arrival_s
            self.ttft_count[column] += 1

    def hold(self, entry: RequestEntry, instance: InstanceEntry, tokens: int) -> None:
        """Have an instance hold ``tokens`` of a request's KV until it is pulled."""
        entry.source = instance
        self.requests.source_on[entry.slot] = instance.column
        entry.held_tokens = tokens
        instance.handoffs[entry.request.id] = entry
        self.handoff_tokens[instance.column] += tokens
        self.free_tokens[instance.column] -= tokens

    def release_source(self, entry: RequestEntry) -> None:
        """Free the KV that waited for a pull."""
        instance = entry.source
        assert instance is not None
        self._count_pull(entry, -1)
        column, tokens = instance.column, entry.held_tokens
        entry.source = None
        self.requests.source_on[entry.slot] = NOWHERE
        del instance.handoffs[entry.request.id]
        self.handoff_tokens[column] -= tokens
        self.free_tokens[column] += tokens

    def enter_decode(self, entry: RequestEntry, instance: InstanceEntry, resident_tokens: int) -> None:
        """Count a request among its instance's decodes."""
        entry.decode, entry.resident_tokens = instance, resident_tokens
        self.requests.decode_on[entry.slot] = column = instance.column
        self.requests.tokens[entry.slot] = resident_tokens
        instance.decodes[entry.request.id] = entry
        self.decode_requests[column] += 1
        self.decode_tokens[column] += resident_tokens
        self.free_tokens[column] -= resident_tokens
        self._count_pull(entry, 1)

    def _count_pull(self, entry: RequestEntry, sign: int) -> None:
        """Count what a decode pulls, with its decode set and its source: or take it back."""
        if entry.source is not None and entry.decode is not None:
            tokens = sign * entry.pulled_tokens
            self.outbound_tokens[entry.source.column] += tokens
            self.inbound_tokens[entry.decode.column] += tokens

    def join_step(self, entry: RequestEntry) -> None:
        """Count a decode by its instance's steps from here on."""
        instance = entry.decode
        assert instance is not None
        instance.in_step += 1
        entry.joined_step = instance.steps
        self.requests.in_step[entry.slot] = 1
        self.requests.tokens[entry.slot] = entry.resident_tokens - instance.steps

    def leave_step(self, entry: RequestEntry) -> None:
        """Count a decode on its own again, no longer by its instance's steps."""
        instance = entry.decode
        assert instance is not None
        entry.resident_tokens, entry.last_at_s = entry.tokens_now, entry.token_at_s
        entry.joined_step = None
        self.requests.in_step[entry.slot] = 0
        self.requests.tokens[entry.slot] = entry.resident_tokens
        instance.in_step -= 1

    def leave_decode(self, entry: RequestEntry) -> None:
        """Take a request out of its instance's decodes."""
        instance = entry.decode
        assert instance is not None
        if entry.joined_step is not None:
            self.leave_step(entry)
        self._count_pull(entry, -1)
        column = instance.column
        entry.decode = None
        self.requests.decode_on[entry.slot] = NOWHERE
        del instance.decodes[entry.request.id]
        self.decode_requests[column] -= 1
        self.decode_tokens[column] -= entry.resident_tokens
        self.free_tokens[column] += entry.resident_tokens
