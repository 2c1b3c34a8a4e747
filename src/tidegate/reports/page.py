"""A comparison as one HTML page that needs nothing else: no network, no scripts, no files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tidegate.reports.comparison import Comparison, TraceComparison, cost_per_million
from tidegate.reports.figures import Figure
from tidegate.reports.plot_style import looks

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff;
  max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.3rem; margin-top: 2.6rem;
  border-bottom: 1px solid #ddd; padding-bottom: .2rem; } h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
p.lead { color: #555; margin-top: 0; } figure { margin: .4rem 0 1.6rem; } figcaption, .note { color: #555;
  font-size: .88rem; } svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { white-space: nowrap; } th { background: #f6f6f6; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.best td { font-weight: 600; } .dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .45em; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; word-break: break-word; } ul.found li { margin: .2rem 0; }
.warning { background: #fff6e0; border-left: 4px solid #e69f00; padding: .4rem .8rem; margin: .5rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media print { h2 { break-before: page; } figure { break-inside: avoid; } }
"""
WORDS = """
A request attains its SLO when its TTFT (arrival to first token) and its TPOT (mean time per token after
the first) are both within target; rejected and failed requests are misses. Attainment is the share of offered
requests that attain; goodput is the highest offered rate whose attainment is at least the level. Rates
scale a trace's time, which keeps its bursts. Another seed permutes the requests within each minute. The fluid
limit is a bound for any schedule on the same instances, computed with knowledge of the whole trace.
"""


def render_page(
    comparison: Comparison, figures: Sequence[Figure], findings: Sequence[str], note: str = ""
) -> str:
    """Return the page. ``findings`` are sentences for its top; ``note`` explains what is missing."""
    systems, seeds = comparison.systems, comparison.seeds
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings)
    parts = [
        f"<h1>{escape(', '.join(systems[:3]))}{' and more' if len(systems) > 3 else ''}: "
        f"{'a comparison' if len(systems) > 1 else 'a simulation'}</h1>",
        f'<p class="lead">{comparison.instances} instances of {escape(comparison.profile)}, '
        f"SLO {escape(comparison.slo)}, {seeds} seed{'s' if seeds > 1 else ''}, "
        f"tidegate {escape(comparison.version)}</p>",
        f'<ul class="found">{found}</ul>' if findings else "",
        f'<p class="warning">{escape(note)}</p>' if note else "",
    ]
    for trace in comparison.traces:
        parts += _section(comparison, trace, [each for each in figures if each.trace == trace.title])
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in comparison.facts.items())
    parts += [
        "<h2>How this was made</h2>",
        "<h3>Command</h3>",
        f"<pre>{escape(comparison.command)}</pre>",
        f"<dl>{facts}</dl>",
        f'<h3>Words</h3><p class="note">{WORDS}</p>',
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>tidegate: {escape(', '.join(t.title for t in comparison.traces))}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _section(comparison: Comparison, trace: TraceComparison, figures: Sequence[Figure]) -> list[str]:
    late = ("roles", "over-time", "stages")
    return [
        f"<h2>{escape(trace.title)}</h2>",
        *(f'<p class="warning">{escape(text)}</p>' for text in trace.warnings),
        "<h3>Goodput and its share of the limit</h3>",
        _goodput_table(comparison, trace),
        _note(f"The limit is set by: {escape(trace.limit_binding)}.") if trace.limit_binding else "",
        *(_figure(each) for each in figures if not each.name.endswith(late)),
        "<h3>Latency, misses and work at one rate</h3>",
        _latency_table(trace),
        *(_figure(each) for each in figures if each.name.endswith(late)),
        "<h3>What it costs</h3>",
        _cost_table(trace),
        _note(
            "Each system at its own goodput: instance-hours per million requests answered within their SLO."
        ),
    ]


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def _figure(figure: Figure) -> str:
    return (
        f"<h3>{escape(figure.heading)}</h3><figure>{figure.svg}"
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _goodput_table(comparison: Comparison, trace: TraceComparison) -> str:
    several = comparison.seeds > 1
    head = ["system"]
    for level in comparison.levels:
        interval = ["interval"] if several else []
        head += [f"goodput at {100 * level:g} % (requests/s)", *interval, "of limit", "chosen"]
    every = [found for entry in trace.entries for found in entry.levels]
    best = {
        level: max((f.goodput_rps for f in every if f.level == level), default=0)
        for level in comparison.levels
    }
    look = looks(comparison.systems)
    rows = []
    for entry in trace.entries:
        colour = look[entry.system].colour
        cells = [f'<span class="dot" style="background:{colour}"></span>{escape(entry.system)}']
        for found in entry.levels:
            value = _number(found.goodput_rps, 2)
            if found.goodput_rps == best[found.level] > 0:
                value = f"<b>{value}</b>"
            reason = f' title="{escape(found.reason, quote=True)}"' if found.reason else ""
            cells.append(f"<span{reason}>{value}{'*' if found.reason else ''}</span>")
            if several:
                cells.append(f"{_number(found.low_rps, 2)} to {_number(found.high_rps, 2)}")
            cells += [_percent(found.share_of_limit), escape(found.chosen)]
        rows.append(cells)
    reasons = sorted({found.reason for found in every if found.reason})
    return _table(head, rows) + "".join(_note(f"* {escape(reason)}") for reason in reasons)


def _latency_table(trace: TraceComparison) -> str:
    rate = "" if trace.common_rate_rps is None else f" at {trace.common_rate_rps:.2f} requests/s"
    head = [
        f"system{rate}", "attained", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99", "missed: TTFT p99",
        "missed: TPOT p99", "flips", "migrations", "preemptions", "KV moved",
    ]  # fmt: skip
    rows = [
        [
            escape(entry.title),
            _percent(run["attainment"], 1),
            *(_milliseconds(run[name][p]) for name in ("ttft_s", "tpot_s") for p in ("p50", "p90", "p99")),
            _milliseconds(view.missed_ttft_p99_s),
            _milliseconds(view.missed_tpot_p99_s),
            *(str(run[name]) for name in ("flips", "migrations", "preemptions")),
            f"{run['kv_transfer_bytes'] / 1e9:.1f} GB",
        ]
        for entry in trace.entries
        if (run := entry.at_common) is not None and (view := entry.view) is not None
    ]
    note = _note('TTFT and TPOT in ms. "missed" is over the requests that missed their SLO.')
    return _table(head, rows) + note if rows else "<p>No system was run at a common rate.</p>"


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
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.1f}"
