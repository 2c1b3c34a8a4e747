"""The ledger's audit: every sum recomputed from the per-request records."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tidegate.core.errors import InternalError
from tidegate.ledger.records import InstanceEntry, RequestEntry
from tidegate.ledger.sheet import LedgerMatrix
from tidegate.ledger.snapshot import Field


def check_integrity(
    sheet: LedgerMatrix, seats: Mapping[str, InstanceEntry], entries: Mapping[str, RequestEntry]
) -> None:
    """Raise InternalError listing every sum, place or owner that contradicts the records."""
    problems = [problem for name, seat in seats.items() for problem in _seat_problems(sheet, name, seat)]
    for column, seat in enumerate(seats.values()):
        if seat.column != column:
            problems.append(f"{seat.instance.id}: column {seat.column}, expected {column}")
    if sheet.matrix.shape[1] != len(seats):
        problems.append(f"{sheet.matrix.shape[1]} columns for {len(seats)} instances")
    for request_id, entry in entries.items():
        problems += _entry_problems(request_id, entry, seats)
    on_seats = sum(len(s.prefills) + len(s.decodes) + len(s.handoffs) for s in seats.values())
    placed = sum(
        (e.prefill is not None) + (e.decode is not None) + (e.source is not None) for e in entries.values()
    )
    if on_seats != placed:
        problems.append(f"{on_seats} requests on instances, {placed} expected")
    if problems:
        raise InternalError("the ledger contradicts itself: " + "; ".join(problems))


def _seat_problems(sheet: LedgerMatrix, name: str, seat: InstanceEntry) -> list[str]:
    prefills, decodes, handoffs = seat.prefills.values(), seat.decodes.values(), seat.handoffs.values()
    resident = sum(e.tokens_now for e in decodes) + seat.foreign_resident_tokens
    held = sum(e.held_tokens for e in handoffs) + seat.foreign_held_tokens
    expected = {
        "FLIPPABLE": float(seat.instance.flippable),
        "KV_CAPACITY_TOKENS": float(seat.instance.kv_capacity_tokens),
        "FREE_TOKENS": (seat.instance.kv_capacity_tokens or math.inf) - resident - held,
        "PREFILL_REQUESTS": float(len(prefills)),
        "PREFILL_TOKENS": float(sum(e.request.prompt_tokens for e in prefills)),
        "PREFILL_QUEUE_S": sum((e.seconds for e in prefills), 0.0),
        "HEAD_S": seat.head.seconds if seat.head is not None else 0.0,
        "DECODE_REQUESTS": float(len(decodes) + seat.foreign_requests),
        "DECODE_TOKENS": float(resident),
        "HANDOFF_TOKENS": float(held),
    }
    found = {name: float(sheet.matrix[getattr(Field, name), seat.column]) for name in expected}
    problems = [
        f"{name}: {field} is {found[field]!r}, records say {value!r}"
        for field, value in expected.items()
        if found[field] != value
    ]
    if seat.in_step != sum(e.joined_step is not None for e in decodes):
        problems.append(f"{name}: {seat.in_step} decodes in step, records say otherwise")
    if (seat.head is None) != (not seat.prefills) or (seat.head is not None and seat.head not in prefills):
        problems.append(f"{name}: the running prefill is not one of its prefills")
    return problems


def _entry_problems(request_id: str, entry: RequestEntry, seats: Mapping[str, InstanceEntry]) -> list[str]:
    problems = []
    if entry.request.id != request_id:
        problems.append(f"request {entry.request.id} is filed under {request_id}")
    if entry.prefill is not None and (entry.source is not None or entry.decode is not None):
        problems.append(f"request {request_id} is in two stages")
    if entry.prefill is None and entry.source is None and entry.decode is None:
        problems.append(f"request {request_id} is nowhere")
    if entry.source is not None and entry.source is entry.decode:
        problems.append(f"request {request_id} pulls its KV from where it decodes")
    for kind, seat in (("prefills", entry.prefill), ("handoffs", entry.source), ("decodes", entry.decode)):
        if seat is None:
            continue
        if seats.get(seat.instance.id) is not seat:
            problems.append(f"request {request_id} sits on {seat.instance.id}, which is not up")
        elif getattr(seat, kind).get(request_id) is not entry:
            problems.append(f"request {request_id} is missing from the {kind} of {seat.instance.id}")
    return problems
