"""What a comparison shows, in sentences computed from it."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.reports.answers import margin, sentences
from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison
from tidegate.systems import split_order

BEST_STATIC = "static:best"


def findings(comparison: Comparison) -> list[str]:
    """Return a few sentences per trace: who leads at each level, by how much, how sure, and what it took."""
    several = len(comparison.traces) > 1
    return [
        f"{trace.title}: {sentence}" if several else sentence
        for trace in comparison.traces
        for sentence in (*sentences(comparison, trace), *_of_trace(trace, comparison.tolerance))
    ]


def _of_trace(trace: TraceComparison, tolerance: float) -> Iterator[str]:
    if trace.entries[0].levels and max(map(_goodput, trace.entries)) > 0:
        yield from _adaptive(trace, tolerance)
        yield from _ordered(trace, tolerance)
        yield from _misses(trace)


def _goodput(entry: ComparedSystem) -> float:
    return entry.levels[0].goodput_rps


def _equal(one: ComparedSystem, other: ComparedSystem, tolerance: float) -> bool:
    found = margin(one.levels[0], other.title, other.levels[0], tolerance)
    return found.tied or found.unsettled


def _adaptive(trace: TraceComparison, tolerance: float) -> Iterator[str]:
    """Say for each system that flips, in its own order, how it does beside the best static split."""
    static = next((entry for entry in trace.entries if entry.system == BEST_STATIC), None)
    if static is None or _goodput(static) <= 0:
        return
    for entry in trace.entries:
        flips = (entry.at_goodput or {}).get("flips") or 0
        if not flips or "+" in entry.system:
            continue
        times = "once" if flips == 1 else f"{flips} times"
        does = (
            "does as well as"
            if _equal(entry, static, tolerance)
            else f"serves {_goodput(entry) / _goodput(static):.2f} times as much as"
        )
        yield (
            f"{entry.system} changed a role {times} at its goodput and {does} the best static split "
            f"({static.chosen}), which takes knowing the traffic beforehand."
        )


def _ordered(trace: TraceComparison, tolerance: float) -> Iterator[str]:
    """Say for each system with an order what the order adds, beside the same system without."""
    plain = {entry.system: entry for entry in trace.entries}
    for entry in trace.entries:
        base, order = split_order(entry.system)
        if not order or base not in plain or _goodput(plain[base]) <= 0:
            continue
        if _equal(entry, plain[base], tolerance):
            yield f"Serving prompts by {order} changes little for {base}."
        else:
            ratio = _goodput(entry) / _goodput(plain[base])
            yield f"Serving prompts by {order} makes it {ratio:.2f} times the goodput of {base}."


def _misses(trace: TraceComparison) -> Iterator[str]:
    """Say what became of those that missed, for the best and the worst at the common rate."""
    seen = [
        (entry.view.missed_ttft_p99_s, entry)
        for entry in trace.entries
        if entry.view is not None and entry.view.missed_ttft_p99_s is not None
    ]
    if len(seen) < 2:
        return
    low, high = min(seen, key=lambda pair: pair[0]), max(seen, key=lambda pair: pair[0])
    if f"{low[0]:.1f}" == f"{high[0]:.1f}":
        yield (
            f"At {trace.common_rate_rps:.1f} requests/s, the slowest 1 % of the requests that missed waited "
            f"{low[0]:.1f} s or more for a first token under every system."
        )
        return
    yield (
        f"At {trace.common_rate_rps:.1f} requests/s, the slowest 1 % of the requests that missed waited "
        f"{low[0]:.1f} s or more for a first token under {low[1].title}, {high[0]:.1f} s or more under "
        f"{high[1].title}."
    )
