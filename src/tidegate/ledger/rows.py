"""Live requests as arrays: what a policy sees of single ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidegate.core.request import Request
from tidegate.ledger.live_table import NOWHERE, LiveTable, Row

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

Forecast = Callable[[Sequence[Request], Integers], tuple[Floats, Floats, Floats]]
"""Tells of requests that have generated so many tokens each how many are left: mean, 0.1 and 0.9 quantile."""


class RequestRows:
    """One row per live request, in order of arrival in the ledger: ``requests``; ``ids`` and ``sessions``.

    ``prefill_on``, ``source_on`` and ``decode_on`` are columns of the snapshot, or NOWHERE: where the request
    is in prefill, where its KV waits to be pulled, and where it decodes; ``moving_to`` is where a migration
    under way takes it, and ``moved_at_s`` when its last one began or ended (-inf without).
    ``context_tokens`` is its KV there (the prompt while it is in prefill), ``generated_tokens`` what was
    generated since its last placement as a prefill. ``arrival_s``, ``ttft_s`` and ``tpot_s`` are its arrival
    and targets, ``max_tokens`` what it may generate after that placement.

    ``remaining_tokens`` is what it is predicted to generate from here on (the mean),
    ``remaining_low_tokens`` and ``remaining_high_tokens`` are the 0.1 and 0.9 quantiles; NaN where the
    deployment does not predict lengths.

    A placement's snapshot may lack instances that are up. A request there has its row, and NOWHERE as column.
    A column is read from the ledger's table when it is asked for first.
    """

    def __init__(
        self,
        table: LiveTable,
        steps: Integers,
        index: Mapping[str, int],
        seen: Integers | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        """``steps`` has what each of the ledger's columns has stepped. ``index`` has the columns of the
        snapshot, and ``seen`` those of the ledger's columns, where they differ, with NOWHERE at the end."""
        self._table: Final = table
        self._steps: Final = steps
        self._index: Final = index
        self._seen: Final = seen
        self._forecast: Final = forecast

    def __len__(self) -> int:
        return len(self._slots)

    @cached_property
    def _slots(self) -> NDArray[np.intp]:
        return self._table.slots

    @cached_property
    def requests(self) -> list[Request]:
        return self._table.requests

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple([request.id for request in self.requests])

    @cached_property
    def sessions(self) -> tuple[str, ...]:
        return tuple([request.session for request in self.requests])

    @cached_property
    def prefill_on(self) -> Integers:
        return self._columns(Row.PREFILL_ON)

    @cached_property
    def source_on(self) -> Integers:
        return self._columns(Row.SOURCE_ON)

    @cached_property
    def decode_on(self) -> Integers:
        return self._columns(Row.DECODE_ON)

    @cached_property
    def moving_to(self) -> Integers:
        columns = np.full(len(self), NOWHERE)
        moving = np.flatnonzero(self._read(Row.MOVES))
        if len(moving):
            entries = self._table.entries_in(self._slots[moving])
            columns[moving] = [self._index.get(entry.moving_to, NOWHERE) for entry in entries]
        return columns

    @cached_property
    def context_tokens(self) -> Integers:
        on = self._integers(Row.DECODE_ON)
        stepped = np.append(self._steps, 0)[on] * self._integers(Row.IN_STEP)
        prompt = self._integers(Row.PROMPT_TOKENS)
        return np.where(on == NOWHERE, prompt, self._integers(Row.TOKENS) + stepped)

    @cached_property
    def generated_tokens(self) -> Integers:
        return self.context_tokens - self._integers(Row.PROMPT_TOKENS)

    @cached_property
    def max_tokens(self) -> Integers:
        return self._integers(Row.MAX_TOKENS)

    @cached_property
    def arrival_s(self) -> Floats:
        return self._read(Row.ARRIVAL_S)

    @cached_property
    def ttft_s(self) -> Floats:
        return self._read(Row.TTFT_S)

    @cached_property
    def tpot_s(self) -> Floats:
        return self._read(Row.TPOT_S)

    @cached_property
    def moved_at_s(self) -> Floats:
        return self._read(Row.MOVED_AT_S)

    @property
    def remaining_tokens(self) -> Floats:
        return self._remaining[0]

    @property
    def remaining_low_tokens(self) -> Floats:
        return self._remaining[1]

    @property
    def remaining_high_tokens(self) -> Floats:
        return self._remaining[2]

    @cached_property
    def _remaining(self) -> tuple[Floats, Floats, Floats]:
        if self._forecast is None:
            unknown = np.full(len(self), np.nan)
            return unknown, unknown, unknown
        return self._forecast(self.requests, self.answer_tokens)

    @property
    def answer_tokens(self) -> Integers:
        """What was generated of each answer, before its last placement as a prefill and after."""
        return self._integers(Row.GENERATED) + self.generated_tokens

    def _read(self, row: Row) -> Floats:
        values: Floats = self._table.array[row].take(self._slots)
        return values

    def _integers(self, row: Row) -> Integers:
        return self._read(row).astype(np.int64)

    def _columns(self, row: Row) -> Integers:
        columns = self._integers(row)
        return columns if self._seen is None else np.asarray(self._seen[columns])


class DecodeRows(NamedTuple):
    """One row per decode of one instance: the tokens of its answer so far, how many more are predicted (the
    mean; None where the deployment does not predict lengths), and its TPOT target."""

    answer_tokens: Floats
    remaining_tokens: Floats | None
    tpot_s: Floats


def decode_rows(table: LiveTable, column: int, steps: int, forecast: Forecast | None) -> DecodeRows:
    """Return the decodes on the instance in the ledger's ``column``, which has stepped ``steps`` times; the
    other requests are not read for that."""
    slots = (table.array[Row.DECODE_ON] == column).nonzero()[0]
    rows = table.array.take(slots, axis=1)
    resident = rows[Row.TOKENS] + steps * rows[Row.IN_STEP]
    answered = rows[Row.GENERATED] + resident - rows[Row.PROMPT_TOKENS]
    remaining = None
    if forecast is not None:
        remaining = forecast(table.requests_in(slots), answered.astype(np.int64))[0]
    return DecodeRows(answered, remaining, rows[Row.TPOT_S])
