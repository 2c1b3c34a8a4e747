"""Live requests as arrays: what a controller sees of single requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tidegate.ledger.records import InstanceEntry, RequestEntry

NOWHERE = -1
"""The column of a request that is not in that stage."""


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One row per live request, in order of arrival in the ledger; ``ids[k]`` and ``sessions[k]`` name row k.

    ``prefill_on``, ``source_on`` and ``decode_on`` are columns of the snapshot, or NOWHERE: where the request
    is in prefill, where its KV waits to be pulled, and where it decodes. ``context_tokens`` is its KV there
    (the prompt while it is in prefill), ``generated_tokens`` what was generated since its last placement as a
    prefill. ``arrival_s``, ``ttft_s`` and ``tpot_s`` are its arrival and targets, ``max_tokens`` what it may
    generate after that placement.
    """

    ids: tuple[str, ...]
    sessions: tuple[str, ...]
    prefill_on: NDArray[np.int64]
    source_on: NDArray[np.int64]
    decode_on: NDArray[np.int64]
    context_tokens: NDArray[np.int64]
    generated_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    arrival_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]

    @classmethod
    def of(cls, entries: Sequence[RequestEntry]) -> RequestRows:
        """Read the rows from the ledger's records, in well under a microsecond each."""
        requests = [entry.request for entry in entries]
        decodes = [entry.decode for entry in entries]
        prompt = np.array([request.prompt_tokens for request in requests], np.int64)
        steps_since = [
            0 if entry.joined_step is None or decode is None else decode.steps - entry.joined_step
            for entry, decode in zip(entries, decodes, strict=True)
        ]
        resident = np.array([entry.resident_tokens for entry in entries], np.int64)
        decode_on = _columns(decodes)
        context = np.where(decode_on == NOWHERE, prompt, resident + np.array(steps_since, np.int64))
        slos = [request.slo for request in requests]
        return cls(
            ids=tuple(request.id for request in requests),
            sessions=tuple(request.session for request in requests),
            prefill_on=_columns([entry.prefill for entry in entries]),
            source_on=_columns([entry.source for entry in entries]),
            decode_on=decode_on,
            context_tokens=context,
            generated_tokens=context - prompt,
            max_tokens=np.array([request.max_tokens for request in requests], np.int64),
            arrival_s=np.array([request.arrival_s for request in requests], np.float64),
            ttft_s=np.array([slo.ttft_s for slo in slos], np.float64),
            tpot_s=np.array([slo.tpot_s for slo in slos], np.float64),
        )


def _columns(seats: Sequence[InstanceEntry | None]) -> NDArray[np.int64]:
    return np.array([NOWHERE if seat is None else seat.column for seat in seats], np.int64)
