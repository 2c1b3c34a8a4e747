"""Numbers of the live requests, kept by events, so that reading them all takes no walk over requests."""

from __future__ import annotations

import enum
import math
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.ledger.records import RequestEntry

NOWHERE = -1
"""The column of a request that is not in that stage, and of an instance that the snapshot does not have."""
LEAST_SLOTS = 64


class Row(enum.IntEnum):
    """Rows of the table: what its arrival says of a request, and what events change.

    ``PREFILL_ON``, ``SOURCE_ON`` and ``DECODE_ON`` are the ledger's columns. ``TOKENS`` is the KV counted
    where it decodes, less the instance's steps so far while it is ``IN_STEP``. ``MOVES`` is 1 while a
    migration is under way.
    """

    PROMPT_TOKENS = 0
    GENERATED = enum.auto()
    MAX_TOKENS = enum.auto()
    ARRIVAL_S = enum.auto()
    TTFT_S = enum.auto()
    TPOT_S = enum.auto()
    PREFILL_ON = enum.auto()
    SOURCE_ON = enum.auto()
    DECODE_ON = enum.auto()
    TOKENS = enum.auto()
    IN_STEP = enum.auto()
    MOVES = enum.auto()
    MOVED_AT_S = enum.auto()


STAGES: Final = slice(Row.PREFILL_ON, Row.DECODE_ON + 1)


class LiveTable:
    """One matrix: one row per quantity, and a slot per request, in order of arrival in the ledger.

    A slot whose request ended is left empty until there is no slot behind the last one; then those that live
    move up. Cells are written through memoryviews, as in ``LedgerMatrix``, which keeps the stages.
    """

    prefill_on: memoryview[float]
    source_on: memoryview[float]
    decode_on: memoryview[float]
    tokens: memoryview[float]
    in_step: memoryview[float]
    moves: memoryview[float]
    moved_at_s: memoryview[float]

    def __init__(self) -> None:
        self._entries: list[RequestEntry | None] = []
        self._adopt(self._empty(LEAST_SLOTS))

    @property
    def entries(self) -> list[RequestEntry]:
        """The live requests, in the order of ``slots``."""
        return [entry for entry in self._entries if entry is not None]

    @property
    def requests(self) -> list[Request]:
        """Their requests."""
        return [entry.request for entry in self._entries if entry is not None]

    def entries_in(self, slots: NDArray[np.intp]) -> list[RequestEntry]:
        """Return the requests in some of ``slots``."""
        return [cast(RequestEntry, self._entries[slot]) for slot in slots.tolist()]

    def requests_in(self, slots: NDArray[np.intp]) -> list[Request]:
        """Return what the requests in some of ``slots`` ask for."""
        return [entry.request for entry in self.entries_in(slots)]

    @property
    def slots(self) -> NDArray[np.intp]:
        """The slots that are taken: those of requests that are somewhere."""
        return np.flatnonzero((self.array[STAGES] != NOWHERE).any(axis=0))

    def enter(self, entry: RequestEntry, column: int) -> None:
        """Give a request that is in prefill on an instance the next slot."""
        if len(self._entries) == self.array.shape[1]:
            self._move_up()
        slot = entry.slot = len(self._entries)
        self._entries.append(entry)
        request = entry.request
        self.array[: Row.PREFILL_ON + 1, slot] = (
            request.prompt_tokens,
            request.generated,
            request.max_tokens,
            request.arrival_s,
            request.slo.ttft_s,
            request.slo.tpot_s,
            column,
        )

    def leave(self, entry: RequestEntry) -> None:
        """Forget a request that is nowhere any more."""
        self._entries[entry.slot] = None

    def column_removed(self, column: int) -> None:
        """Follow the columns behind an instance that went down; nobody is there any more."""
        stages = self.array[STAGES]
        stages[stages > column] -= 1

    def _move_up(self) -> None:
        slots, entries = self.slots, self.entries
        array = self._empty(max(LEAST_SLOTS, 2 * len(slots)))
        array[:, : len(slots)] = self.array[:, slots]
        for slot, entry in enumerate(entries):
            entry.slot = slot
        self._entries = list(entries)
        self._adopt(array)

    def _empty(self, slots: int) -> NDArray[np.float64]:
        array = np.zeros((len(Row), slots))
        array[STAGES] = NOWHERE
        array[Row.MOVED_AT_S] = -math.inf
        return array

    def _adopt(self, array: NDArray[np.float64]) -> None:
        self.array = array
        for name in type(self).__annotations__:
            setattr(self, name, memoryview(cast("memoryview[float]", array[Row[name.upper()]])))
