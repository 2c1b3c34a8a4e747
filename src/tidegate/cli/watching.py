"""The picture that ``tidegate state --watch`` draws; it fits 60 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidegate.cli.durations import latency
from tidegate.cli.terminal import plain_table

BAR = 8
MOST_EVENTS = 8
ROLE_STYLES = {"prefill": "yellow", "decode": "blue", "mixed": "green"}
ROLES = tuple(ROLE_STYLES)


def watched(answer: Mapping[str, Any], width: int, trouble: str = "") -> Group:
    """Return a gateway's state for a terminal of ``width`` columns: targets, instances by role, events."""
    requests = answer.get("requests", {})
    head = Text.assemble(
        (str(answer.get("system")), "bold"),
        f" up {_span(answer.get('uptime_s', 0.0))}, {requests.get('in_flight', 0)} in flight, "
        f"{requests.get('held', 0)} held, {answer.get('flips', 0)} flips, "
        f"{answer.get('migrations', 0)} migrations",
    )
    parts: list[RenderableType] = [head]
    if trouble:
        parts.append(Text(trouble, style="bold red"))
    if answer.get("down"):
        parts.append(Text(f"down: {', '.join(map(str, answer['down']))}", style="red"))
    if answer.get("starting"):
        starts = (f"{each['id']} for {each['role']} ({_span(each['for_s'])})" for each in answer["starting"])
        parts.append(Text(f"starting: {', '.join(starts)}", style="cyan"))
    parts += [Text(), _targets(answer), Text(), _instances(answer), Text()]
    for name, reason in answer.get("controllers", {}).items():
        parts += [Text.assemble((name, "bold"), f" {reason}"), Text()]
    events: Sequence[Mapping[str, Any]] = answer.get("events", ())
    parts += [_event(event, width) for event in events[:MOST_EVENTS]]
    return Group(*parts)


def _targets(answer: Mapping[str, Any]) -> Table:
    """Latencies of the last minute beside their targets."""
    recent, slo = answer.get("recent") or {}, answer.get("slo") or {}
    table = plain_table()
    for title in ("last minute", "p50", "p99", "target"):
        table.add_column(title, justify="left" if title == "last minute" else "right")
    for name in ("ttft", "tpot"):
        p99, target = recent.get(f"{name}_p99_s"), slo.get(f"{name}_s")
        missed = p99 is not None and target is not None and p99 > target
        shown = Text(latency(p99), style="red" if missed else "green" if p99 is not None else "")
        table.add_row(name.upper(), latency(recent.get(f"{name}_p50_s")), shown, latency(target))
    share, failed = recent.get("attained_share"), recent.get("failed", 0)
    lost = Text(f"{failed} failed", style="red" if failed else "")
    table.add_row(
        "attained", "-" if share is None else f"{share:.1%}", lost, f"of {recent.get('requests', 0)}"
    )
    return table


def _instances(answer: Mapping[str, Any]) -> RenderableType:
    rows = sorted(
        answer.get("instances", ()),
        key=lambda row: (ROLES.index(row.get("role", "mixed")), str(row.get("id"))),
    )
    if not rows:
        return Text("no instance is up", style="red")
    table = plain_table()
    for title in ("id", "role", "prefill", "wait", "decode", "gap", "KV"):
        table.add_column(title, justify="left" if title in ("id", "role", "KV") else "right", no_wrap=True)
    for row in rows:
        role = row.get("role", "mixed")
        table.add_row(
            Text(str(row.get("id")), style="bold"),
            Text("draining" if row.get("draining") else role, style=ROLE_STYLES[role]),
            str(row.get("prefill_requests", "-")),
            latency(row.get("prefill_wait_s") if row.get("prefill_requests") else None),
            str(row.get("decode_requests", "-")),
            latency((row.get("mean_gap_s") or None) if row.get("decode_requests") else None),
            _fill(row),
        )
    return table


def _fill(row: Mapping[str, Any]) -> str:
    capacity = row.get("kv_capacity_tokens") or 0
    if not capacity:
        return "-"
    share = min(1.0, (row.get("decode_tokens", 0) + row.get("handoff_tokens", 0)) / capacity)
    return f"{'#' * round(BAR * share):.<{BAR}} {share:.0%}"


def _event(event: Mapping[str, Any], width: int) -> Table:
    """An event whose text wraps beside its age."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=8, justify="right", style="dim", no_wrap=True)
    table.add_column(width=max(20, width - 10))
    table.add_row(f"{_span(event.get('ago_s', 0.0))} ago", Text(str(event.get("text", ""))))
    return table


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"
