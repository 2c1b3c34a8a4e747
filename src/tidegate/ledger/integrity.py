"""The ledger's audit: every sum recomputed from the per-request records."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tidegate.core.errors import InternalError
from tidegate.ledger.live_table import NOWHERE, LiveTable, Row
from tidegate.ledger.matrix import LedgerMatrix
from tidegate.ledger.records import InstanceEntry, RequestEntry
from tidegate.ledger.snapshot import Field


def check_integrity(
    matrix: LedgerMatrix, instances: Mapping[str, InstanceEntry], entries: Mapping[str, RequestEntry]
) -> None:
    """Raise InternalError listing every sum, place or owner that contradicts the records."""
    problems = []
    if matrix.array.shape[1] != len(instances):
        problems.append(f"{matrix.array.shape[1]} columns for {len(instances)} instances")
    for column, (name, instance) in enumerate(instances.items()):
        if instance.column != column:
            problems.append(f"{name}: column {instance.column}, expected {column}")
        problems += _instance_problems(matrix, name, instance)
    for request_id, entry in entries.items():
        problems += _entry_problems(request_id, entry, instances)
    problems += _table_problems(matrix.requests, list(entries.values()))
    on_instances = sum(len(i.prefills) + len(i.decodes) + len(i.handoffs) for i in instances.values())
    placed = sum(
        (e.prefill is not None) + (e.decode is not None) + (e.source is not None) for e in entries.values()
    )
    if on_instances != placed:
        problems.append(f"{on_instances} requests on instances, {placed} expected")
    if problems:
        raise InternalError("the ledger contradicts itself: " + "; ".join(problems))


def _instance_problems(matrix: LedgerMatrix, name: str, instance: InstanceEntry) -> list[str]:
    prefills, decodes = instance.prefills.values(), instance.decodes.values()
    resident = sum(e.tokens_now for e in decodes) + instance.foreign_resident_tokens
    held = sum(e.held_tokens for e in instance.handoffs.values()) + instance.foreign_held_tokens
    expected = {
        "FLIPPABLE": float(instance.spec.flippable),
        "KV_CAPACITY_TOKENS": float(instance.spec.kv_capacity_tokens),
        "FREE_TOKENS": (instance.spec.kv_capacity_tokens or math.inf) - resident - held,
        "PREFILL_REQUESTS": float(len(prefills)),
        "PREFILL_TOKENS": float(sum(e.request.prompt_tokens for e in prefills)),
        "PREFILL_QUEUE_S": sum((e.seconds for e in prefills), 0.0),
        "HOPELESS_S": sum((e.seconds for e in prefills if e.hopeless), 0.0),
        "RUNNING_PREFILL_S": instance.head.seconds if instance.head is not None else 0.0,
        "DECODE_REQUESTS": float(len(decodes) + instance.foreign_requests),
        "DECODE_TOKENS": float(resident),
        "HANDOFF_TOKENS": float(held),
        "INBOUND_TOKENS": float(sum(e.pulled_tokens for e in decodes if e.source is not None)),
        "OUTBOUND_TOKENS": float(sum(e.pulled_tokens for e in instance.handoffs.values())),
    }
    found = {field: float(matrix.array[getattr(Field, field), instance.column]) for field in expected}
    problems = [
        f"{name}: {field} is {found[field]!r}, records say {value!r}"
        for field, value in expected.items()
        if found[field] != value
    ]
    if instance.in_step != sum(e.joined_step is not None for e in decodes):
        problems.append(f"{name}: {instance.in_step} decodes in step, records say otherwise")
    if (instance.head is None) != (not prefills) or (instance.head and instance.head not in prefills):
        problems.append(f"{name}: the running prefill is not one of its prefills")
    return problems


def _entry_problems(
    request_id: str, entry: RequestEntry, instances: Mapping[str, InstanceEntry]
) -> list[str]:
    problems = []
    if entry.request.id != request_id:
        problems.append(f"request {entry.request.id} is filed under {request_id}")
    if entry.prefill is not None and (entry.source is not None or entry.decode is not None):
        problems.append(f"request {request_id} is in two stages")
    if entry.prefill is None and entry.source is None and entry.decode is None:
        problems.append(f"request {request_id} is nowhere")
    if entry.source is not None and entry.source is entry.decode:
        problems.append(f"request {request_id} pulls its KV from where it decodes")
    for kind, on in (("prefills", entry.prefill), ("handoffs", entry.source), ("decodes", entry.decode)):
        if on is None:
            continue
        if instances.get(on.spec.id) is not on:
            problems.append(f"request {request_id} is on {on.spec.id}, which is not up")
        elif getattr(on, kind).get(request_id) is not entry:
            problems.append(f"request {request_id} is missing from the {kind} of {on.spec.id}")
    return problems


def _table_problems(table: LiveTable, entries: list[RequestEntry]) -> list[str]:
    if table.entries != entries or table.slots.tolist() != [entry.slot for entry in entries]:
        return ["the table's requests are not those that live, in their order"]
    problems = []
    for entry in entries:
        resident = entry.resident_tokens if entry.decode is not None else None
        expected = {
            Row.PROMPT_TOKENS: entry.request.prompt_tokens,
            Row.PREFILL_ON: NOWHERE if entry.prefill is None else entry.prefill.column,
            Row.SOURCE_ON: NOWHERE if entry.source is None else entry.source.column,
            Row.DECODE_ON: NOWHERE if entry.decode is None else entry.decode.column,
            Row.TOKENS: None if resident is None else resident - (entry.joined_step or 0),
            Row.IN_STEP: entry.joined_step is not None,
            Row.MOVES: bool(entry.moving_to),
        }
        problems += [
            f"request {entry.request.id}: {row.name} is {table.array[row, entry.slot]}, records say {value}"
            for row, value in expected.items()
            if value is not None and table.array[row, entry.slot] != value
        ]
    return problems
