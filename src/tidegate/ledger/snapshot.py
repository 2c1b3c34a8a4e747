"""A frozen view of the cluster at one instant: all that a policy sees.

It lives beside the ledger, not in ``core``, because it carries the instances' cost table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role
from tidegate.costs.forms import lesser
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.labels import Column, Labels, Mask
from tidegate.ledger.rows import RequestRows
from tidegate.ledger.sessions import SessionBook, SessionRows

__all__ = ["EVERYONE", "At", "Cells", "Column", "Field", "Mask", "Matrix", "Snapshot", "prefill_wait_s"]

Matrix = NDArray[np.float64]
At = int | slice
"""Which instances: the column of one, or all (``EVERYONE``)."""
EVERYONE: Final = slice(None)


class Cells(Protocol):
    """The ledger's numbers: ``Snapshot.cells`` to read one instance, ``Snapshot.state`` to read all."""

    def __getitem__(self, key: tuple[int, Any], /) -> float | Column:
        """Return the field of one instance as a float, or of all as an array."""
        ...


class Field:
    """Rows of the ledger's state matrix; one column per instance that is up.

    Plain numbers: reading a member of an enum costs as much as reading two cells.
    """

    ROLE: Final = 0
    FLIPPABLE: Final = 1
    PREFILL_REQUESTS: Final = 2
    PREFILL_TOKENS: Final = 3
    PREFILL_QUEUE_S: Final = 4
    HEAD_S: Final = 5
    HEAD_STARTED_S: Final = 6
    PREFILL_QUEUE_AVG_S: Final = 7
    DECODE_REQUESTS: Final = 8
    DECODE_TOKENS: Final = 9
    HANDOFF_TOKENS: Final = 10
    MEAN_GAP_S: Final = 11
    KV_CAPACITY_TOKENS: Final = 12
    FREE_TOKENS: Final = 13
    FLIPPED_AT_S: Final = 14
    PREFILL_DEMAND: Final = 15
    PREFILL_SQUARES_S: Final = 16
    COUNT: Final = 17


class WindowAverages(NamedTuple):
    """What a named window measured, one value per instance: the mean inter-token gap in seconds (0 without
    tokens) and the mean prefill queue in seconds."""

    mean_gap_s: Column
    prefill_queue_s: Column


class Book(Protocol):
    """What a snapshot reads in place, without a copy of the world: the ledger."""

    def request_rows(self) -> RequestRows:
        """Return one row per live request."""
        ...

    def session_rows(self) -> SessionRows:
        """Return one row per session."""
        ...

    @property
    def windows(self) -> Mapping[str, WindowAverages]:
        """The averages of the named windows that ended last."""
        ...


class Snapshot:
    """The instances that are up, as arrays in one fixed order, at time ``at_s``.

    Arrays are private copies and read-only. Tokens and seconds are sums over an instance's residents:

    - ``prefill_*``: requests queued or running in prefill here; ``prefill_queue_s`` sums their
      predicted prefill times, ``prefill_wait_s`` is that less what the running one has already spent;
    - ``decode_*``: requests decoding here, with their resident tokens (prompt + generated);
    - ``handoff_tokens``: KV of requests whose prefill ended here and whose decode is not placed or
      still pulling;
    - both include what is foreign (``Ledger.foreign_load``);
    - ``mean_gap_s``: mean inter-token gap of the last completed window, or the longest open gap of an
      instance that decodes but produced nothing in it; 0 without decodes;
    - ``prefill_queue_avg_s``: time average of ``prefill_queue_s`` over the last completed window;
    - ``prefill_demand``: predicted prefill seconds dispatched here per second, smoothed over the windows;
      ``prefill_squares_s``: the same of their squares, which tells how unequal prefills are.

    ``cells[field, column]`` reads one number of ``state`` as a float, at a fraction of what the array takes;
    the array is only made where something asks for it.
    Nothing of a snapshot changes; it is no frozen dataclass only because making one costs more than a
    placement should.
    """

    __slots__ = (
        "_book",
        "_data",
        "_state",
        "at_s",
        "cells",
        "costs",
        "ids",
        "index",
        "labels",
        "last_flip_to_decode_s",
        "placed_decodes",
        "placed_prefills",
    )

    def __init__(
        self,
        at_s: float,
        ids: tuple[str, ...],
        index: Mapping[str, int],
        costs: ProfileTable,
        data: bytes,
        labels: Labels,
        placed_prefills: int,
        placed_decodes: int,
        last_flip_to_decode_s: float,
        book: Book | None = None,
    ) -> None:
        self.at_s: Final = at_s
        self.ids: Final = ids
        self.index: Final = index
        self.costs: Final = costs
        self._data: Final = data
        self._state: Matrix | None = None
        cells = memoryview(data)
        self.cells: Final = cells.cast("d", (Field.COUNT, len(ids))) if ids else cells.cast("d")
        self.labels: Final = labels
        self.placed_prefills: Final = placed_prefills
        self.placed_decodes: Final = placed_decodes
        self.last_flip_to_decode_s: Final = last_flip_to_decode_s
        self._book = book

    @property
    def requests(self) -> RequestRows:
        """One row per live request, worked out when asked for: read it while deciding, not later."""
        return self._book.request_rows() if self._book is not None else RequestRows.of(())

    @property
    def sessions(self) -> SessionRows:
        """One row per session, worked out when asked for: read it while deciding, not later."""
        return self._book.session_rows() if self._book is not None else SessionBook().rows({})

    @property
    def windows(self) -> Mapping[str, WindowAverages]:
        """What the system's named windows (``System.windows``) measured, each when it ended last."""
        return self._book.windows if self._book is not None else {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def state(self) -> Matrix:
        """One row per ``Field``, one column per instance."""
        state = self._state
        if state is None:
            state = self._state = np.frombuffer(self._data).reshape(Field.COUNT, len(self.ids))
        return state

    def without(self, names: Collection[str]) -> Snapshot:
        """Return the snapshot as if the instances ``names`` were not there: a retry avoids where it failed.

        Returns the snapshot itself when nothing would be left.
        """
        keep = np.array([name not in names for name in self.ids], dtype=np.bool_)
        if keep.all() or not keep.any():
            return self
        ids = tuple(name for name in self.ids if name not in names)
        state = self.state[:, keep]
        index = {name: i for i, name in enumerate(ids)}
        return Snapshot(
            self.at_s,
            ids,
            index,
            self.costs.only(keep),
            state.tobytes(),
            Labels(state[Field.ROLE]),
            self.placed_prefills,
            self.placed_decodes,
            self.last_flip_to_decode_s,
        )

    @property
    def role(self) -> Column:
        """Labels as numbers; compare with ``Role``."""
        return self._row(Field.ROLE)

    def labelled(self, role: Role) -> Mask:
        """Tell which instances carry the label ``role``."""
        labelled: Mask = self._row(Field.ROLE) == float(role)
        return labelled

    @property
    def flippable(self) -> Mask:
        """Tell which instances may change label."""
        marked: Mask = self._row(Field.FLIPPABLE) > 0
        return marked

    @property
    def prefill_requests(self) -> Column:
        return self._row(Field.PREFILL_REQUESTS)

    @property
    def prefill_tokens(self) -> Column:
        return self._row(Field.PREFILL_TOKENS)

    @property
    def prefill_queue_s(self) -> Column:
        return self._row(Field.PREFILL_QUEUE_S)

    @property
    def prefill_wait_s(self) -> Column:
        """Predicted seconds until a prefill that joins the queue now would start."""
        return cast(Column, prefill_wait_s(self.state, EVERYONE, self.at_s))

    @property
    def free_tokens(self) -> Column:
        """KV capacity beside decodes and handoffs; inf where the capacity is unknown."""
        return self._row(Field.FREE_TOKENS)

    @property
    def prefill_queue_avg_s(self) -> Column:
        return self._row(Field.PREFILL_QUEUE_AVG_S)

    @property
    def prefill_demand(self) -> Column:
        return self._row(Field.PREFILL_DEMAND)

    @property
    def prefill_squares_s(self) -> Column:
        return self._row(Field.PREFILL_SQUARES_S)

    @property
    def decode_requests(self) -> Column:
        return self._row(Field.DECODE_REQUESTS)

    @property
    def decode_tokens(self) -> Column:
        return self._row(Field.DECODE_TOKENS)

    @property
    def handoff_tokens(self) -> Column:
        return self._row(Field.HANDOFF_TOKENS)

    @property
    def mean_gap_s(self) -> Column:
        return self._row(Field.MEAN_GAP_S)

    @property
    def kv_capacity_tokens(self) -> Column:
        """What each KV cache holds; 0 where that is unknown."""
        return self._row(Field.KV_CAPACITY_TOKENS)

    @property
    def flipped_at_s(self) -> Column:
        """When each label was last written; -inf if never."""
        return self._row(Field.FLIPPED_AT_S)

    def _row(self, field: int) -> Column:
        row: Column = self.state[field]
        return row


def prefill_wait_s(cells: Cells, at: At, now_s: float) -> float | Column:
    """Return the queue less what the running prefill has already spent at ``now_s``."""
    spent_s = lesser(now_s - cells[Field.HEAD_STARTED_S, at], cells[Field.HEAD_S, at])
    return cells[Field.PREFILL_QUEUE_S, at] - spent_s
