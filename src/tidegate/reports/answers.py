"""Which system leads, by how much, and how sure that is: per trace and level."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tidegate.measure.attainment import too_short
from tidegate.measure.percentiles import t_interval
from tidegate.reports.comparison import ComparedSystem, Comparison, LevelGoodput, TraceComparison

ONE_SEED = 0.10
"""Goodputs of one seed that are closer than this are called tied: other draws of a trace move them so far."""


@dataclass(frozen=True, slots=True)
class Margin:
    """How many times another system's goodput the leader's is, with an interval where seeds give one.

    ``ratio`` is None for a system that never reaches the level. ``tied``: the difference is less than the
    search resolves. ``unsettled``: it is more, but the seeds differ too much to tell.
    """

    system: str
    ratio: float | None
    interval: tuple[float, float] | None
    tied: bool
    unsettled: bool = False

    def __str__(self) -> str:
        if self.ratio is None:
            return f"all that {self.system} does not, which never reaches the level"
        sure = "" if self.interval is None else f" ({self.interval[0]:.2f} to {self.interval[1]:.2f})"
        return f"{self.ratio:.2f}{sure} times {self.system}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The leader of a trace at a level, and its margins, the closest first.

    ``leader`` is None where no system reaches the level.
    """

    trace: TraceComparison
    level: float
    leader: ComparedSystem | None
    found: LevelGoodput
    margins: tuple[Margin, ...]

    @property
    def tied(self) -> list[str]:
        return [margin.system for margin in self.margins if margin.tied]

    @property
    def behind(self) -> list[Margin]:
        return [margin for margin in self.margins if not margin.tied and not margin.unsettled]

    @property
    def unsettled(self) -> list[Margin]:
        return [margin for margin in self.margins if margin.unsettled]

    @property
    def names(self) -> list[str]:
        """The leader and those tied with it."""
        return [] if self.leader is None else [_title(self.leader, self.found), *self.tied]


def answers(comparison: Comparison) -> list[Answer]:
    """Return the answers of all traces at all levels, in their order."""
    return [
        _answer(trace, level, comparison.tolerance)
        for trace in comparison.traces
        for level in comparison.levels
        if any(found.level == level for entry in trace.entries for found in entry.levels)
    ]


def _answer(trace: TraceComparison, level: float, tolerance: float) -> Answer:
    found = {
        entry.system: (entry, each) for entry in trace.entries for each in entry.levels if each.level == level
    }
    ranked = sorted(found.values(), key=lambda pair: -pair[1].goodput_rps)
    leader, best = ranked[0]
    if best.goodput_rps <= 0:
        return Answer(trace, level, None, best, ())
    margins = tuple(margin(best, _title(entry, each), each, tolerance) for entry, each in ranked[1:])
    return Answer(trace, level, leader, best, margins)


def _title(entry: ComparedSystem, found: LevelGoodput) -> str:
    return f"{entry.system} ({found.chosen})" if found.chosen else entry.system


def margin(best: LevelGoodput, title: str, other: LevelGoodput, tolerance: float) -> Margin:
    """Return how many times the goodput of ``other``, the system ``title``, that of ``best`` is."""
    if other.goodput_rps <= 0:
        return Margin(title, None, None, tied=False)
    ratio = best.goodput_rps / other.goodput_rps
    paired = list(zip(best.by_seed, other.by_seed, strict=False))
    if len(paired) < 2 or min(min(pair) for pair in paired) <= 0:
        within = tolerance if len(paired) > 1 else max(tolerance, ONE_SEED)
        return Margin(title, ratio, None, tied=abs(ratio - 1) <= within)
    # Seeds are the same draws under every system, so they are compared one by one.
    _, low, high = (math.exp(end) for end in t_interval([math.log(one / two) for one, two in paired]))
    tied = abs(ratio - 1) <= tolerance
    return Margin(title, ratio, (low, high), tied, unsettled=not tied and low <= 1.0 <= high)


def sentences(comparison: Comparison, trace: TraceComparison) -> Iterator[str]:
    """Yield the answers on a trace as sentences, one per level, then how sure they are."""
    found = [answer for answer in answers(comparison) if answer.trace is trace]
    for at, answer in enumerate(found):
        yield said(answer, changed=at > 0 and _order_changes(found[0], answer))
    if any(answer.margins for answer in found):
        yield _sure(comparison, found)
    for text in shortness(trace, comparison.levels):
        yield f"Beware: {text}."


def said(answer: Answer, *, changed: bool = False) -> str:
    """Return who leads or ties at the level, and how far the others are behind."""
    at = f"At {100 * answer.level:g} %"
    if answer.leader is None:
        return f"{at} no system reaches the level at any rate: {answer.found.reason or 'all miss'}."
    share = answer.found.share_of_limit
    of = "" if share is None else f", {100 * share:.0f} % of the fluid limit"
    names = answer.names
    odd = f" ({answer.found.reason})" if answer.found.reason else ""
    rate = f"{answer.found.goodput_rps:.1f} requests/s{of}{odd}"
    first = f"{at}{' the order changes:' if changed else ''} "
    first += (
        f"{names[0]} serves the most, {rate}"
        if len(names) == 1
        else f"{' and '.join([', '.join(names[:-1]), names[-1]])} tie, at up to {rate}"
    )
    behind, unsettled = (", ".join(map(str, margins)) for margins in (answer.behind, answer.unsettled))
    first += f". That is {behind}." if behind else "."
    return f"{first} Not settled by these seeds: {unsettled}." if unsettled else first


def _order_changes(first: Answer, other: Answer) -> bool:
    if first.leader is None or other.leader is None:
        return False
    before = {name.partition(" (")[0] for name in first.names}
    return not before & {name.partition(" (")[0] for name in other.names}


def _sure(comparison: Comparison, found: Sequence[Answer]) -> str:
    seeds = max(answer.found.seeds for answer in found)
    within = f"Differences within the search's tolerance, {100 * comparison.tolerance:g} %,"
    if seeds > 1:
        return (
            f"In brackets: 95 % intervals over {seeds} seeds, each compared with itself. {within} are called "
            "ties; those whose interval has 1 in it are not settled."
        )
    return (
        f"One seed tells nothing of the spread, so there are no intervals, and differences up to "
        f"{100 * ONE_SEED:g} % are called ties: --seeds 3 or more would tell."
    )


def shortness(trace: TraceComparison, levels: Sequence[float]) -> list[str]:
    """Return why the runs of a trace say little, if they do."""
    offered = max((entry.view.offered for entry in trace.entries if entry.view is not None), default=0)
    span_s = offered / trace.common_rate_rps if trace.common_rate_rps else None
    return [text] if (text := too_short(offered, span_s, max(levels, default=0.9))) else []
