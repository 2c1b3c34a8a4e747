"""How far predicted lengths were off, by how much of the answer had come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from msgspec import UNSET

from tidegate.journal.schema import OutcomeLine

FROM_TOKENS = (0, 1, 64, 256, 1024, 4096, 16384)
"""Where a row of its own begins: before the first token, behind it, and so on."""


@dataclass(frozen=True, slots=True)
class LengthErrors:
    """Errors of one source's predictions of what was left, made at ``from_token`` generated tokens or more.

    ``mae_tokens`` is the mean absolute error, ``bias_tokens`` the mean error, positive when too much was
    predicted, and ``left_tokens`` the mean of what was left.
    """

    source: str
    from_token: int
    count: int
    mae_tokens: float
    bias_tokens: float
    left_tokens: float


def length_errors(good: Iterable[OutcomeLine]) -> tuple[LengthErrors, ...]:
    """Return the errors of what was predicted of answered requests, by source and progress."""
    errors: dict[tuple[str, int], list[tuple[float, int]]] = {}
    for outcome in good:
        for each in () if outcome.predicted_lengths is UNSET else outcome.predicted_lengths:
            row = int(np.searchsorted(FROM_TOKENS, each.at_token, side="right")) - 1
            left = outcome.output_tokens - each.at_token
            errors.setdefault((each.source, FROM_TOKENS[row]), []).append(
                (each.remaining_tokens - left, left)
            )
    return tuple(_row(*key, np.array(found, np.float64)) for key, found in sorted(errors.items()))


def length_rows(errors: Iterable[LengthErrors]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table: source, progress, count, mean absolute error, bias, what was left."""
    for each in errors:
        numbers = (each.mae_tokens, each.bias_tokens, each.left_tokens)
        cells = (f"{numbers[0]:,.0f}", f"{numbers[1]:+,.0f}", f"{numbers[2]:,.0f}")
        yield each.source, f"from token {each.from_token:,}", f"{each.count:,}", *cells


def _row(source: str, from_token: int, found: np.ndarray) -> LengthErrors:
    error, left = found.T
    return LengthErrors(
        source, from_token, len(found), float(np.abs(error).mean()), float(error.mean()), float(left.mean())
    )
