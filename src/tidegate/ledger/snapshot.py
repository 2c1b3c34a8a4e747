"""A frozen view of the cluster at one instant: all that a policy sees.

It lives beside the ledger, not in ``core``, because it carries the instances' cost table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.costs.forms import lesser
from tidegate.costs.profile import ProfileTable
from tidegate.ledger.rows import DecodeRows, RequestRows
from tidegate.ledger.sessions import SessionRows

if TYPE_CHECKING:
    from tidegate.core.load_forecast import LoadForecast
    from tidegate.ledger.ledger import Ledger

Column = NDArray[np.float64]
Mask = NDArray[np.bool_]
Matrix = NDArray[np.float64]
At = int | slice
"""Which instances: the column of one, or all (``EVERYONE``)."""
EVERYONE: Final = slice(None)
FEW = 12
"""Up to this many instances are priced one by one with floats, more of them with arrays: whole-array
arithmetic costs the same for two as for a hundred. Measured: here both cost about the same."""
Candidates = tuple[int, ...] | list[int] | NDArray[np.intp]
"""Columns of some instances, ascending; an array exactly where they are more than ``FEW``."""


def columns_of(mask: Mask) -> Candidates:
    """Return the columns where ``mask`` is true."""
    return candidates_of(mask.nonzero()[0])


def candidates_of(columns: NDArray[np.intp]) -> Candidates:
    """Return ``columns`` as they are when they are many, as a tuple when they are few."""
    return columns if len(columns) > FEW else tuple(columns.tolist())


class Labels:
    """What the labels say, worked out once after every change of one. Masks are read-only.

    ``prefilling`` and ``decoding`` do the work of that role: its own label, or MIXED.
    """

    __slots__ = ("decoding", "decoding_mask", "everyone", "prefilling", "prefilling_mask")

    def __init__(self, role: Column) -> None:
        self.prefilling_mask: Mask = role != float(Role.DECODE)
        self.decoding_mask: Mask = role != float(Role.PREFILL)
        self.prefilling_mask.setflags(write=False)
        self.decoding_mask.setflags(write=False)
        self.prefilling: Candidates = columns_of(self.prefilling_mask)
        self.decoding: Candidates = columns_of(self.decoding_mask)
        self.everyone: Candidates = columns_of(np.ones(len(role), dtype=np.bool_))


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
    RUNNING_PREFILL_S: Final = 5
    RUNNING_PREFILL_SINCE_S: Final = 6
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
    DRAINING: Final = 17
    PREFILL_SLOWNESS: Final = 18
    KV_BYTES_PER_TOKEN: Final = 19
    MOVE_PAUSE_S: Final = 20
    BLOCK_TOKENS: Final = 21
    EXTENDS_KV: Final = 22
    INBOUND_TOKENS: Final = 23
    OUTBOUND_TOKENS: Final = 24
    BUSY_S: Final = 25
    IDLE_S: Final = 26
    WORK_S: Final = 27
    HOPELESS_S: Final = 28
    STEP_TOKENS: Final = 29
    COUNT: Final = 30


class WindowAverages(NamedTuple):
    """What a named window measured, in seconds, one value per instance: the mean inter-token gap (0 without
    tokens), the mean prefill queue, and the mean TTFT of the prefills that ended there (0 without any)."""

    mean_gap_s: Column
    prefill_queue_s: Column
    mean_ttft_s: Column


class _Row:
    """A row of ``Snapshot.state`` as an attribute."""

    def __init__(self, field: int) -> None:
        self._field = field

    def __get__(self, snapshot: Snapshot, owner: type[Snapshot]) -> Column:
        row: Column = snapshot.state[self._field]
        return row


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
      ``prefill_squares_s``: the same of their squares, which tells how unequal prefills are;
    - ``prefill_slowness``: seconds with a prefill there per predicted second of those that ended, smoothed
      over the windows that had some; before them 1, and 0 where no profile predicts anything;
    - ``busy_s``: how long the instance had something to do in the last completed window, at most, and
      ``idle_s``, how much of that it may have had nothing; ``work_s`` is what its profile predicts for what
      it did then, a prefill counted with its end.

    ``cells[field, column]`` reads one number of ``state`` as a float, at a fraction of what the array takes;
    the array is only made where something asks for it.
    Nothing of a snapshot changes; it is no frozen dataclass only because making one costs more than a
    placement should.
    """

    __slots__ = (
        "_data",
        "_ledger",
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
    )  # fmt: skip

    role = _Row(Field.ROLE)
    """Labels as numbers; compare with ``Role``."""
    prefill_requests = _Row(Field.PREFILL_REQUESTS)
    prefill_tokens = _Row(Field.PREFILL_TOKENS)
    prefill_queue_s = _Row(Field.PREFILL_QUEUE_S)
    prefill_queue_avg_s = _Row(Field.PREFILL_QUEUE_AVG_S)
    prefill_demand = _Row(Field.PREFILL_DEMAND)
    prefill_squares_s = _Row(Field.PREFILL_SQUARES_S)
    prefill_slowness = _Row(Field.PREFILL_SLOWNESS)
    busy_s = _Row(Field.BUSY_S)
    idle_s = _Row(Field.IDLE_S)
    work_s = _Row(Field.WORK_S)
    hopeless_s = _Row(Field.HOPELESS_S)
    """Of ``prefill_queue_s``, what is for first tokens that would be late if it began with them now."""
    decode_requests = _Row(Field.DECODE_REQUESTS)
    decode_tokens = _Row(Field.DECODE_TOKENS)
    handoff_tokens = _Row(Field.HANDOFF_TOKENS)
    mean_gap_s = _Row(Field.MEAN_GAP_S)
    kv_capacity_tokens = _Row(Field.KV_CAPACITY_TOKENS)
    """What each KV cache holds; 0 where that is unknown."""
    free_tokens = _Row(Field.FREE_TOKENS)
    """KV capacity beside decodes and handoffs; inf where the capacity is unknown."""
    flipped_at_s = _Row(Field.FLIPPED_AT_S)
    """When each label was last written; -inf if never."""
    kv_bytes_per_token = _Row(Field.KV_BYTES_PER_TOKEN)
    """What a token's KV takes; 0 where that is unknown."""
    move_pause_s = _Row(Field.MOVE_PAUSE_S)
    """The gap between two tokens of a decode that moved here between them, smoothed; 0 before the first."""

    inbound_tokens = _Row(Field.INBOUND_TOKENS)
    """KV that decodes placed here are pulling from elsewhere, but for what is expected to be here already; a
    prefill that reads a history is not counted, for nobody tells when it has."""
    outbound_tokens = _Row(Field.OUTBOUND_TOKENS)
    """KV that decodes elsewhere are pulling from here, the same way."""
    step_tokens = _Row(Field.STEP_TOKENS)
    """The budget of every step of each; 0 where that is unknown or chosen anew for each step."""

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
        ledger: Ledger,
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
        self._ledger = ledger

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def requests(self) -> RequestRows:
        """One row per live request, worked out when asked for: read it while deciding, not later."""
        return self._ledger.request_rows(self.index)

    def decodes_on(self, column: int) -> DecodeRows:
        """Return one row per decode of one instance, at a part of what ``requests`` takes: read it while
        deciding, not later."""
        return self._ledger.decodes_on(self.ids[column])

    @property
    def sessions(self) -> SessionRows:
        """One row per session, worked out when asked for: read it while deciding, not later."""
        return self._ledger.sessions.rows(self.index)

    @property
    def session_tokens(self) -> Column:
        """How many tokens the histories have that sessions are bound with to each instance: read it while
        deciding, not later."""
        held = self._ledger.sessions.held_tokens
        return np.array([held.get(name, 0) for name in self.ids], np.float64)

    def idle_tokens_of_others(self, request: Request) -> Column:
        """Return those of ``session_tokens`` that are of sessions without a turn in flight, other than the
        request's: ask while deciding, not later."""
        sessions = self._ledger.sessions
        if not sessions.idle_tokens:
            return np.zeros(len(self))
        own = sessions.find((request.tenant, request.session))
        idle = np.array([sessions.idle_tokens.get(name, 0) for name in self.ids], np.float64)
        if own is not None and not own.live and (at := self.index.get(own.instance)) is not None:
            idle[at] -= own.context_tokens
        return idle

    @property
    def session_goes_on(self) -> float:
        """How likely a session that is idle goes on, by all turns so far: ask while deciding, not later."""
        return self._ledger.sessions.goes_on

    @property
    def forecast(self) -> LoadForecast | None:
        """The newest forecast of the load; None where nobody makes any, and in the first period."""
        return self._ledger.load_forecast

    @property
    def start_s(self) -> Mapping[Role, float]:
        """Seconds from ``AddInstance`` to the instance that joins, by its label: the longest of the newest
        starts. A label of which none was started yet is not there."""
        return self._ledger.start_s

    @property
    def held_prefills(self) -> int:
        """How many requests the control plane holds, which no instance's queue shows."""
        return self._ledger.held_prefills

    @property
    def windows(self) -> Mapping[str, WindowAverages]:
        """What the system's named windows (``System.windows``) measured, each in its last seconds with
        the ledger's open window: read it while deciding, not later."""
        return self._ledger.window_averages(self.ids)

    @property
    def state(self) -> Matrix:
        """One row per ``Field``, one column per instance."""
        state = self._state
        if state is None:
            state = self._state = np.frombuffer(self._data).reshape(Field.COUNT, len(self.ids))
        return state

    def without(self, names: Collection[str]) -> Snapshot:
        """Return the snapshot as if the instances ``names`` were not there: a retry avoids where it failed.

        ``requests`` and ``sessions`` keep every row; on a missing instance their column is NOWHERE.
        Returns the snapshot itself when nothing would be left.
        """
        keep = np.array([name not in names for name in self.ids], dtype=np.bool_)
        if keep.all() or not keep.any():
            return self
        ids = tuple(name for name in self.ids if name not in names)
        state = self.state[:, keep]
        return Snapshot(
            self.at_s,
            ids,
            {name: i for i, name in enumerate(ids)},
            self.costs.only(keep),
            state.tobytes(),
            Labels(state[Field.ROLE]),
            self.placed_prefills,
            self.placed_decodes,
            self.last_flip_to_decode_s,
            self._ledger,
        )

    def labelled(self, role: Role) -> Mask:
        """Tell which instances carry the label ``role``."""
        labelled: Mask = self.role == float(role)
        return labelled

    @property
    def flippable(self) -> Mask:
        """Tell which instances may change label."""
        marked: Mask = self.state[Field.FLIPPABLE] > 0
        return marked

    @property
    def extends_kv(self) -> Mask:
        """Tell which instances can begin a prefill with KV that is read from another."""
        marked: Mask = self.state[Field.EXTENDS_KV] > 0
        return marked

    @property
    def draining(self) -> Mask:
        """Tell which instances drain. Placements see them only where nothing else is up; controllers do."""
        marked: Mask = self.state[Field.DRAINING] > 0
        return marked

    def without_draining(self) -> Snapshot:
        """Return the snapshot without the instances that drain, or itself when all do."""
        return self.without({self.ids[at] for at in self.draining.nonzero()[0]})

    @property
    def prefill_wait_s(self) -> Column:
        """Predicted seconds until a prefill that joins the queue now would start."""
        return cast(Column, prefill_wait_s(self.state, EVERYONE, self.at_s))


def prefill_wait_s(cells: Cells, at: At, now_s: float) -> float | Column:
    """Return the queue less what the running prefill has already spent at ``now_s``."""
    spent_s = lesser(now_s - cells[Field.RUNNING_PREFILL_SINCE_S, at], cells[Field.RUNNING_PREFILL_S, at])
    return cells[Field.PREFILL_QUEUE_S, at] - spent_s
