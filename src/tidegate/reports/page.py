"""A comparison as one HTML page that needs nothing else: no network, no files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tidegate.reports.answers import Answer, answers, shortness
from tidegate.reports.charts import Bars, Chart
from tidegate.reports.comparison import (
    ComparedSystem,
    Comparison,
    TraceComparison,
    class_rows,
    cost_per_million,
)
from tidegate.reports.html import (
    answer_box,
    document,
    dot,
    figure,
    note,
    part_names,
    part_rows,
    table,
    warning,
)
from tidegate.reports.looks import looks

WORDS = """
A request attains its SLO when its TTFT (arrival to first token) and its TPOT (mean time per token after
the first) are both within target; rejected and failed requests are misses. Attainment is the share of offered
requests that attain; goodput is the highest offered rate whose attainment is at least the level. Rates
scale a trace's time, which keeps its bursts. Another seed permutes the requests within each minute. The fluid
limit is a bound for any schedule on the same instances, computed with knowledge of the whole trace.
"""


def render_page(
    comparison: Comparison, charts: Sequence[Chart], findings: Sequence[str], by: str = "compare"
) -> str:
    """Return the page of the command ``by``. ``findings`` are sentences for its top."""
    found = answers(comparison)
    seeds = f"{comparison.seeds} seed{'s' if comparison.seeds > 1 else ''}"
    parts = [
        f"<h1>{escape(_headline(comparison, found))}</h1>",
        f'<p class="lead">{comparison.instances} instances of {escape(comparison.profile)}, '
        f"SLO {escape(comparison.slo)}, {seeds}, tidegate {escape(comparison.version)}</p>",
        _answer_table(found),
        *(
            warning(f"{trace.title}: {text}")
            for trace in comparison.traces
            for text in _short(comparison, trace)
        ),
        answer_box(findings),
    ]
    for trace in comparison.traces:
        parts += _section(comparison, trace, [each for each in charts if each.section == trace.title])
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in comparison.facts.items())
    parts += [
        "<h2>How this was made</h2>",
        "<h3>Command</h3>",
        f"<pre>{escape(comparison.command)}</pre>",
        f"<dl>{facts}</dl>",
        f"<h3>Words</h3>{note(WORDS)}",
    ]
    return document(", ".join(trace.title for trace in comparison.traces), parts, by)


def _headline(comparison: Comparison, found: Sequence[Answer]) -> str:
    """Return the answer in one line: who leads on the first trace, at the first level, and by how much."""
    if not found or len(comparison.systems) < 2:
        return "; ".join(_run_line(entry) for _, entry in comparison.entries)
    first = found[0]
    where = f" on {first.trace.title}" if len(comparison.traces) > 1 else ""
    if first.leader is None:
        return f"No system reaches {100 * first.level:g} % attainment{where}"
    names = first.names
    who = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    next_best = first.behind[0] if first.behind else None
    if next_best is None:
        return f"{who} tie{where}" if len(names) > 1 else f"{who} serves the most{where}"
    does = "tie and serve" if len(names) > 1 else "serves"
    return f"{who} {does} {next_best}, at {100 * first.level:g} % attainment{where}"


def _run_line(entry: ComparedSystem) -> str:
    run = entry.at_common
    if run is None:
        return entry.title
    rate = "" if run["rate_rps"] is None else f" at {run['rate_rps']:.2f} requests/s"
    met = f"{_percent(run['attainment'], 1)} of {run['requests']:,} requests"
    return f"{entry.title} meets the SLO of {met}{rate}"


def _answer_table(found: Sequence[Answer]) -> str:
    rows = []
    for answer in found:
        names, behind = answer.names, answer.behind
        if not answer.margins:
            continue
        led = "no system reaches it" if not names else ", ".join(names) + (" (a tie)" if names[1:] else "")
        rate = _number(answer.found.goodput_rps, 1) if names else "0"
        after = "; ".join(map(str, behind[:3])) or ("all tie" if names[1:] else "-")
        sure = f"95 % over {answer.found.seeds} seeds" if answer.found.seeds > 1 else "one seed: no interval"
        sure += "".join(f"; {each.system} not settled" for each in answer.unsettled)
        share = _percent(answer.found.share_of_limit)
        where = (escape(answer.trace.title), f"{100 * answer.level:g} %")
        rows.append([*where, f"<b>{escape(led)}</b>", rate, share, escape(after), sure])
    head = ["trace", "attained by", "serves the most", "requests/s", "of limit", "that is", "how sure"]
    return f'<div class="wide">{table(head, rows, text=(2, 5, 6))}</div>' if rows else ""


def _short(comparison: Comparison, trace: TraceComparison) -> list[str]:
    return shortness(trace, comparison.levels)


def _section(comparison: Comparison, trace: TraceComparison, charts: Sequence[Chart]) -> list[str]:
    late = ("roles", "over-time", "stages", "latency")
    return [
        f"<h2>{escape(trace.title)}</h2>",
        *(warning(text) for text in trace.warnings),
        "<h3>Goodput and its share of the limit</h3>",
        _goodput_table(comparison, trace),
        note(f"The limit is set by: {escape(trace.limit_binding)}.") if trace.limit_binding else "",
        note(escape(trace.achieved_by)) if trace.achieved_by else "",
        *(figure(each) for each in charts if not each.name.endswith(late)),
        "<h3>Latency and misses at one rate</h3>",
        *_run_tables(trace),
        *(part for each in charts if each.name.endswith(late) for part in _figure(each)),
        "<h3>What it costs</h3>",
        _cost_table(trace),
        note(
            "Each system at its own goodput: instance-hours per million requests answered within their SLO."
        ),
    ]


def _figure(chart: Chart) -> list[str]:
    """Return the chart and, of bars of several parts, their numbers, too."""
    bars = [panel for panel in chart.panels if isinstance(panel, Bars)]
    if not any(len(bar.parts) > 1 for panel in bars for bar in panel.bars):
        return [figure(chart)]
    head = ["mean (ms)", *part_names(bars)]
    return [figure(chart), table(head, part_rows(bars))]


def _goodput_table(comparison: Comparison, trace: TraceComparison) -> str:
    several = comparison.seeds > 1
    achieved = any(found.achievable_rps for entry in trace.entries for found in entry.levels)
    head = ["system"]
    for level in comparison.levels:
        interval = ["interval"] if several else []
        possible = ["of achievable"] if achieved else []
        head += [f"goodput at {100 * level:g} % (requests/s)", *interval, "of limit", *possible, "chosen"]
    every = [found for entry in trace.entries for found in entry.levels]
    best = {
        level: max((f.goodput_rps for f in every if f.level == level), default=0)
        for level in comparison.levels
    }
    look = looks(comparison.systems)
    rows = []
    for entry in trace.entries:
        cells = [f"{dot(look[entry.system].tone)}{escape(entry.system)}"]
        for found in entry.levels:
            value = _number(found.goodput_rps, 2)
            if found.goodput_rps == best[found.level] > 0:
                value = f"<b>{value}</b>"
            reason = f' title="{escape(found.reason, quote=True)}"' if found.reason else ""
            cells.append(f"<span{reason}>{value}{'*' if found.reason else ''}</span>")
            if several:
                ends = f"{_number(found.low_rps, 2)} to {_number(found.high_rps, 2)}"
                cells.append(ends if found.seeds > 1 else "one seed")
            cells.append(_percent(found.share_of_limit))
            if achieved:
                cells.append(_percent(found.share_of_achievable))
            cells.append(escape(found.chosen))
        rows.append(cells)
    reasons = sorted({found.reason for found in every if found.reason})
    return table(head, rows) + "".join(note(f"* {escape(reason)}") for reason in reasons)


def _run_tables(trace: TraceComparison) -> list[str]:
    """Return what the systems did at the common rate: latencies, and work."""
    runs = [
        (escape(entry.title), run, view)
        for entry in trace.entries
        if (run := entry.at_common) is not None and (view := entry.view) is not None
    ]
    if not runs:
        return ["<p>No system was run at a common rate.</p>"]
    rate = "" if trace.common_rate_rps is None else f" at {trace.common_rate_rps:.2f} requests/s"
    latencies = [
        [
            title,
            _percent(run["attainment"], 1),
            *(_milliseconds(run[name][p]) for name in ("ttft_s", "tpot_s") for p in ("p50", "p90", "p99")),
            _milliseconds(view.missed_ttft_p99_s),
            _milliseconds(view.missed_tpot_p99_s),
        ]
        for title, run, view in runs
    ]
    work = [
        [
            title,
            *(f"{run[name]:,}" for name in ("flips", "migrations", "preemptions")),
            f"{run['kv_transfer_bytes'] / 1e9:.1f} GB",
        ]
        for title, run, _ in runs
    ]
    found = class_rows(trace)
    head = ["attained", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "missed: TTFT p99", "TPOT p99"]
    return [
        table([f"system{rate}", *head], latencies),
        note('TTFT and TPOT in ms. "missed" is over the requests that missed their SLO.'),
        table([f"system{rate}", "flips", "migrations", "preemptions", "KV moved"], work),
        *(["<h3>Attained, by SLO class</h3>", _table_of_text(found)] if found else []),
    ]


def _table_of_text(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return table(head, [[escape(cell) for cell in row] for row in body])


def _cost_table(trace: TraceComparison) -> str:
    head = [
        "system", "rate (requests/s)", "attained requests", "instance-hours",
        "instance-hours per 1M attained requests",
    ]  # fmt: skip
    rows = []
    for entry in trace.entries:
        run = entry.at_goodput
        cells = ["0", "-", "-", "no rate meets the level"]
        if run is not None:
            hours, cost = _number(run["instance_hours"], 3), _number(cost_per_million(run), 1)
            cells = [_number(run["rate_rps"], 2), f"{run['attained']:,}", hours, cost]
        rows.append([escape(entry.title), *cells])
    return table(head, rows)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"
