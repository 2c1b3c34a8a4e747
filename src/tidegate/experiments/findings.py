"""What a comparison shows, in sentences computed from it."""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison

EQUAL_WITHIN = 0.02
"""Goodputs closer than this are called equal: about what a search resolves."""
BEST_STATIC = "static:best"


def findings(comparison: Comparison) -> list[str]:
    """Return a few sentences per trace: who leads and by how much, against what is possible, what it took."""
    several = len(comparison.traces) > 1
    return [
        f"{trace.title}: {sentence}" if several else sentence
        for trace in comparison.traces
        for sentence in _of_trace(trace, comparison.levels[0])
    ]


def _of_trace(trace: TraceComparison, level: float) -> Iterator[str]:
    ranked = sorted(trace.entries, key=lambda entry: -_goodput(entry))
    top = ranked[0].levels[0]
    if top.goodput_rps <= 0:
        yield f"No system reaches {100 * level:g} % attainment at any rate: {top.reason or 'all miss'}."
        return
    share = "" if top.share_of_limit is None else f", {100 * top.share_of_limit:.0f} % of the fluid limit"
    yield (
        f"{ranked[0].title} serves the most: {top.goodput_rps:.1f} requests/s with at least "
        f"{100 * level:g} % attained{share}{f' ({top.reason})' if top.reason else ''}."
    )
    yield from _against(ranked[0], ranked[1:])
    yield from _adaptive(trace)
    yield from _ordered(trace)
    yield from _misses(trace)


def _goodput(entry: ComparedSystem) -> float:
    return entry.levels[0].goodput_rps


def _against(best: ComparedSystem, others: list[ComparedSystem]) -> Iterator[str]:
    """Compare the best with every other system, in one sentence."""
    parts = []
    for entry in others:
        if _goodput(entry) <= 0:
            parts.append(f"all that {entry.title} does not, which never reaches the level")
        elif _equal(best, entry):
            parts.append(f"as much as {entry.title}")
        else:
            parts.append(f"{_goodput(best) / _goodput(entry):.2f} times {entry.title}")
    if parts:
        yield f"That is {', '.join(parts)}."


def _equal(one: ComparedSystem, other: ComparedSystem) -> bool:
    return abs(_goodput(one) / _goodput(other) - 1) <= EQUAL_WITHIN


def _adaptive(trace: TraceComparison) -> Iterator[str]:
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
            if _equal(entry, static)
            else f"serves {_goodput(entry) / _goodput(static):.2f} times as much as"
        )
        yield (
            f"{entry.system} changed a role {times} at its goodput and {does} the best static split "
            f"({static.chosen}), which takes knowing the traffic beforehand."
        )


def _ordered(trace: TraceComparison) -> Iterator[str]:
    """Say for each system with an order what the order adds, beside the same system without."""
    plain = {entry.system: entry for entry in trace.entries}
    for entry in trace.entries:
        base, _, order = entry.system.partition("+")
        if not order or base not in plain or _goodput(plain[base]) <= 0:
            continue
        if _equal(entry, plain[base]):
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
