"""A frozen view of the cluster at one instant: all that a policy sees.

It lives beside the ledger, not in ``core``, because it carries the instances' cost table.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role
from tidegate.costs.profile import ProfileTable

Column = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Field(enum.IntEnum):
    """Rows of the ledger's state matrix; one column per instance that is up."""

    ROLE = 0
    FLIPPABLE = enum.auto()
    PREFILL_REQUESTS = enum.auto()
    PREFILL_TOKENS = enum.auto()
    PREFILL_QUEUE_S = enum.auto()
    HEAD_S = enum.auto()
    HEAD_STARTED_S = enum.auto()
    PREFILL_QUEUE_AVG_S = enum.auto()
    DECODE_REQUESTS = enum.auto()
    DECODE_TOKENS = enum.auto()
    HANDOFF_TOKENS = enum.auto()
    MEAN_GAP_S = enum.auto()
    KV_CAPACITY_TOKENS = enum.auto()
    FLIPPED_AT_S = enum.auto()


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The instances that are up, as arrays in one fixed order, at time ``at_s``.

    Arrays are private copies and read-only. Tokens and seconds are sums over an instance's residents:

    - ``prefill_*``: requests queued or running in prefill here; ``prefill_queue_s`` sums their
      predicted prefill times, ``prefill_wait_s`` is that less what the running one has already spent;
    - ``decode_*``: requests decoding here, with their resident tokens (prompt + generated);
    - ``handoff_tokens``: KV of requests whose prefill ended here and whose decode is not placed or
      still pulling;
    - ``mean_gap_s``: mean inter-token gap of the last completed window, or the longest open gap of an
      instance that decodes but produced nothing in it; 0 without decodes;
    - ``prefill_queue_avg_s``: time average of ``prefill_queue_s`` over the last completed window.
    """

    at_s: float
    ids: tuple[str, ...]
    index: Mapping[str, int]
    costs: ProfileTable
    state: Matrix
    placed_prefills: int
    placed_decodes: int
    last_flip_to_decode_s: float

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, names: Collection[str]) -> Snapshot:
        """Return the snapshot as if the instances ``names`` were not there: a retry avoids where it failed.

        Returns the snapshot itself when nothing would be left.
        """
        keep = np.array([name not in names for name in self.ids], dtype=np.bool_)
        if keep.all() or not keep.any():
            return self
        ids = tuple(name for name in self.ids if name not in names)
        state = self.state[:, keep]
        state.flags.writeable = False
        index = {name: i for i, name in enumerate(ids)}
        return replace(self, ids=ids, index=index, costs=self.costs.only(keep), state=state)

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
        spent = np.minimum(self.at_s - self._row(Field.HEAD_STARTED_S), self._row(Field.HEAD_S))
        return self._row(Field.PREFILL_QUEUE_S) - spent

    @property
    def prefill_queue_avg_s(self) -> Column:
        return self._row(Field.PREFILL_QUEUE_AVG_S)

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
        return self._row(Field.KV_CAPACITY_TOKENS)

    @property
    def flipped_at_s(self) -> Column:
        """When each label was last written; -inf if never."""
        return self._row(Field.FLIPPED_AT_S)

    def _row(self, field: Field) -> Column:
        row: Column = self.state[field]
        return row
