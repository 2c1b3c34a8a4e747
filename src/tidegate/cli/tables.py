"""What verbs print: tables and blocks of lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidegate.check.verdict import CheckVerdict

if TYPE_CHECKING:
    from pathlib import Path

    from tidegate.bound.phase_load import PhaseLoad
    from tidegate.check.verdict import CheckReport, Finding
    from tidegate.cli.trace_files import Described
    from tidegate.costs.saved_profile import MeasuredLink, SavedProfile
    from tidegate.reports.comparison import ComparedSystem, Comparison, TraceComparison
    from tidegate.sim.replay import Compared, JournalReplay
    from tidegate.workloads.trace_statistics import ArrivalStatistics, Spread, Statistics

REPLAY_WIDTH = 74
VERDICT_STYLES = {
    CheckVerdict.GREEN: "green",
    CheckVerdict.YELLOW: "yellow",
    CheckVerdict.RED: "bold red",
    CheckVerdict.SKIPPED: "dim",
}
NARROW = 100
"""Columns of a terminal below which a table leaves the intervals to the report."""
STATE_COLUMNS = {
    "id": "id",
    "pool": "pool",
    "prefill_requests": "prefill",
    "prefill_wait_s": "wait",
    "decode_requests": "decode",
    "decode_tokens": "tokens",
    "kv_capacity_tokens": "KV",
    "mean_gap_s": "gap",
    "drift": "drift",
    "flipped_ago_s": "flip",
}
"""The columns of the table, in order, narrow enough for 80 characters. --json shows everything.

``drift`` is the farthest of the ratios of observed to predicted seconds.
"""

LOAD_COLUMNS = {
    "id": "id",
    "running": "running",
    "waiting": "waiting",
    "kv_share": "KV",
    "foreign_requests": "foreign",
    "foreign_tokens": "tokens",
    "drifts": "drifts",
    "computed": "computed",
    "cached": "cached",
    "pulled": "pulled",
}
"""The second table, of instances that tell their load: what they say, what of it is not the gateway's, how
often that came to differ, and where the KV of their prompts came from."""


def plain_table(**options: Any) -> Table:
    """Return a table without lines around it."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **options)


def show_check(report: CheckReport, console: Console) -> None:
    """Print who was checked, one row for each probe and outcome, and what it comes to."""
    for name, facts in report.servers.items():
        console.print(f"[bold]{name}[/]  {escape(_server(facts))}")
    table = plain_table()
    table.add_column("verdict", no_wrap=True)
    table.add_column("probe", no_wrap=True)
    table.add_column("where")
    table.add_column("observed, and [bold]what to change[/]")
    for found in grouped(report.findings):
        first = found[0]
        style = VERDICT_STYLES[first.verdict]
        table.add_row(
            f"[{style}]{first.verdict.value}[/]",
            first.probe,
            _places(found, len(report.servers)),
            _observed(found),
        )
    console.print()
    console.print(table)
    console.print()
    console.print(_check_outcome(report))


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Put together what is one row: a probe's green findings, and others that say the same."""
    rows: dict[tuple[str, ...], list[Finding]] = {}
    for each in findings:
        said = () if each.verdict is CheckVerdict.GREEN else (each.observed, each.change)
        rows.setdefault((each.probe, each.verdict.value, *said), []).append(each)
    return list(rows.values())


def _server(facts: dict[str, object]) -> str:
    words = [str(facts["url"])]
    if "model" in facts:
        words += [str(facts["model"]), f"vLLM {facts['version']}"]
    if facts.get("block_tokens"):
        words.append(f"blocks of {facts['block_tokens']} tokens")
    if facts.get("kv_capacity_tokens"):
        words.append(f"{facts['kv_capacity_tokens']:,} tokens of KV")
    return " · ".join(words)


def _places(found: Sequence[Finding], servers: int) -> str:
    wheres = [each.where for each in found if each.where]
    if not wheres:
        return "all"
    pairs = [where for where in wheres if len(where) == 2]
    if len(wheres) == len(pairs) and len(pairs) > 2:
        return f"{len(pairs)} pairs"
    if not pairs and len(wheres) == servers > 2:
        return "all"
    return ", ".join("->".join(where) for where in wheres)


def _observed(found: Sequence[Finding]) -> str:
    first = found[0]
    several = len({each.observed for each in found}) > 1
    text = escape(f"{'as ' + '->'.join(first.where) + ': ' if several else ''}{first.observed}")
    return f"{text}\n[bold]{escape(first.change)}[/]" if first.change else text


def _check_outcome(report: CheckReport) -> str:
    counts = report.counts()
    words = [
        f"{counts[verdict]} {name}"
        for verdict, name in (
            (CheckVerdict.RED, "to change"),
            (CheckVerdict.SKIPPED, "not probed"),
            (CheckVerdict.YELLOW, "to know of"),
            (CheckVerdict.GREEN, "green"),
        )
        if counts.get(verdict)
    ]
    outcome = "[green]ready to serve[/]" if report.ok else "[bold red]not ready[/]"
    return f"{outcome}: {', '.join(words)}, in {report.seconds:.1f} s"


def show_comparison(comparison: Comparison, findings: Sequence[str]) -> None:
    """Print a table per trace, then the findings. What is no terminal has lines of any length."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for trace in comparison.traces:
        console.print(
            _goodputs(comparison, trace, intervals=comparison.seeds > 1 and console.width >= NARROW)
        )
        notes = {f.reason for entry in trace.entries for f in entry.levels if f.reason}
        for text in sorted(notes):
            console.print(f"* {escape(text)}", style="dim")
        console.print()
    for sentence in findings:
        console.print(escape(sentence), highlight=False, soft_wrap=not console.is_terminal)


def _goodputs(comparison: Comparison, trace: TraceComparison, *, intervals: bool) -> Table:
    table = plain_table(
        title=f"{escape(trace.title)}: goodput (requests/s) at {escape(comparison.slo)}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("system", overflow="fold", min_width=16)
    for level in comparison.levels:
        table.add_column(f"at {100 * level:g} %", justify="right", no_wrap=True)
        if intervals:
            table.add_column("interval", justify="right", style="dim", no_wrap=True)
        table.add_column("of limit", justify="right")
    rate = "" if trace.common_rate_rps is None else f" at {_rate(trace.common_rate_rps)}"
    table.add_column(f"flips{rate}", justify="right", max_width=9)
    table.add_column("p99 TTFT of misses", justify="right", max_width=9)
    table.add_column("p99 TPOT of misses", justify="right", max_width=9)
    for entry in trace.entries:
        table.add_row(*_goodput_cells(entry, intervals))
    return table


def _goodput_cells(entry: ComparedSystem, interval: bool) -> list[str]:
    cells = [escape(entry.title)]
    for found in entry.levels:
        share = found.share_of_limit
        cells.append(f"[bold]{_rate(found.goodput_rps)}[/]{'*' if found.reason else ''}")
        if interval:
            cells.append(f"{_rate(found.low_rps)}-{_rate(found.high_rps)}")
        cells.append("-" if share is None else f"{100 * share:.0f} %")
    flips, view = (entry.at_common or {}).get("flips"), entry.view
    cells.append("-" if flips is None else str(flips))
    misses = (None, None) if view is None else (view.missed_ttft_p99_s, view.missed_tpot_p99_s)
    return cells + [_time(each) for each in misses]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def show_profile(saved: SavedProfile, out: Path | None) -> None:
    """Print what was measured, how well it is fitted, and where it was saved."""
    profile = saved.profile
    console = Console(highlight=False)
    where = f" on {saved.hardware}" if saved.hardware else ""
    console.print(
        f"[bold]{profile.name}[/]  {saved.engine}{where}, {saved.max_model_len:,} tokens of context"
    )
    held = {row.form: row for row in saved.held_out}
    table = Table("form", "samples", "fit p50", "p95", "held out p50", "p95", box=None, pad_edge=False)
    for form, p50, p95 in profile.errors:
        unseen = held.get(form)
        rest = (f"{unseen.p50:.1%}", f"{unseen.p95:.1%}") if unseen else ("-", "-")
        table.add_row(form, str(len(saved.samples[form])), f"{p50:.1%}", f"{p95:.1%}", *rest)
    console.print(table)
    for n in (512, 2048, 8192):
        if n <= (saved.max_batch_tokens or saved.max_model_len):
            console.print(f"prefill of {n:,} tokens: {1e3 * profile.prefill_s(n):.1f} ms", end="  ")
    console.print(f"step of 1 x 1,024: {1e3 * float(profile.step.seconds(1, 1024)):.1f} ms")
    budget = f"{saved.max_batch_tokens:,}" if saved.max_batch_tokens else "not reached"
    console.print(f"front end: {1e3 * profile.front_s:.1f} ms per request  tokens of one step: {budget}")
    if saved.links:
        console.print(_link_table(saved.links))
        console.print(f"KV: {saved.kv_bytes_per_token:,} bytes per token")
    for note in saved.notes:
        console.print(f"[yellow]note[/] {note}")
    if out is not None:
        console.print(f"saved to {out}; use it as --profile {out}")


def _link_table(links: Sequence[MeasuredLink]) -> Table:
    """Return the links with what was seen from outside and what the engine says of its own reads."""
    table = Table("KV from", "to", "latency", "GB/s", "error p50", "engine's own", box=None, pad_edge=False)
    for link in links:
        told = "-"
        if link.read_bytes_per_s is not None and link.read_latency_s is not None:
            told = f"{1e3 * link.read_latency_s:.1f} ms, {link.read_bytes_per_s / 1e9:.1f} GB/s"
        seen = (f"{1e3 * link.latency_s:.1f} ms", f"{link.bytes_per_s / 1e9:.1f}", f"{link.error_p50:.0%}")
        table.add_row(*(url.removeprefix("http://") for url in (link.source, link.target)), *seen, told)
    table.caption = "; ".join(sorted({f"links are fitted {link.by}" for link in links}))
    return table


def show_state(answer: Mapping[str, Any]) -> None:
    """Print what a gateway answered: facts in a line, then its instances."""
    console = Console(highlight=False)
    facts = {name: value for name, value in answer.items() if name != "instances"}
    console.print("[dim] · [/]".join(_fact(name, value) for name, value in facts.items()))
    rows = [row for row in answer.get("instances", []) if isinstance(row, dict)]
    rows.sort(key=lambda row: str(row.get("id")))
    if not any(name in row for row in rows for name in STATE_COLUMNS):
        console.print("no instance is up")
        return
    console.print(_rows_table(rows, STATE_COLUMNS))
    loads = [_load_row(row) for row in rows if isinstance(row.get("load"), dict)]
    if loads:
        console.print("\n[dim]what the engines say[/]")
        console.print(_rows_table(loads, LOAD_COLUMNS))


def _load_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return what an instance says of its load as one flat row."""
    return {**row, **row["load"], **row.get("prompt_tokens", {})}


def _rows_table(rows: list[dict[str, Any]], titles: dict[str, str]) -> Table:
    """Return a table of the columns that any of ``rows`` has."""
    table = plain_table()
    columns = [name for name in titles if any(name in row for row in rows)]
    for name in columns:
        justify: Literal["left", "right"] = "left" if name in ("id", "pool") else "right"
        table.add_column(titles[name], justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(name, row.get(name)) for name in columns))
    return table


def _fact(name: str, value: object) -> str:
    title = name.removesuffix("_s").replace("_", " ")
    if isinstance(value, dict):
        inner = ", ".join(_fact(key, each) for key, each in value.items())
        return inner if name == "requests" else f"{title} {inner}"
    return f"{title} [bold]{_cell(name, value)}[/]"


def _cell(name: str, value: object) -> str:
    """Return a value as a person reads it; the name's suffix says the unit."""
    match value:
        case None | []:
            return "-"
        case dict() if name == "drift":
            farthest = max(value.values(), key=lambda ratio: max(ratio, 1 / ratio), default=None)
            return "-" if farthest is None else f"x{farthest:.2f}"
        case dict() if name == "drifts":
            return str(sum(value.values()))
        case list():
            return ", ".join(_cell(name, each) for each in value)
        case float() if name.endswith("_share"):
            return f"{value:.0%}"
        case float() if name.endswith("_s") and value >= 10:
            return f"{value:.0f} s"
        case float() if name.endswith("_s"):
            return f"{value * 1000:.0f} ms"
        case float():
            return f"{value:g}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case _:
            return str(value).replace("[", "\\[")


def replay_block(compared: JournalReplay, path: Path, system: str) -> str:
    """Return what was predicted beside what a journal observed."""
    lines = [f"{f' {path.name}: {system}, predicted and observed ':=^{REPLAY_WIDTH}}"]
    left_out = f", {compared.left_out:,} not answered in both" if compared.left_out else ""
    lines.append(f"{'Requests compared:':<24}{compared.requests:,}{left_out}")
    lines.append(f"{'Flips:':<24}{compared.predicted_flips} predicted, {compared.observed_flips} observed")
    lines.append(f"{' Latency (ms) ':-^{REPLAY_WIDTH}}")
    lines.append(f"{'':<20}{'predicted':>14}{'observed':>14}{'error':>12}")
    for title, value in (("TTFT", compared.ttft), ("TPOT", compared.tpot), ("end to end", compared.e2e)):
        lines += _latency_rows(title, value)
    lines.append("=" * REPLAY_WIDTH)
    return "\n".join(lines)


def _latency_rows(title: str, value: Compared | None) -> list[str]:
    if value is None:
        return [f"{title:<20}{'n/a':>14}{'n/a':>14}{'n/a':>12}"]
    figures = (
        ("mean", value.predicted.mean_s, value.observed.mean_s, value.mean_error),
        ("p50", value.predicted.p50_s, value.observed.p50_s, value.p50_error),
        ("p99", value.predicted.p99_s, value.observed.p99_s, value.p99_error),
    )
    rows = [
        f"{f'{title} {name}':<20}{1000 * ours:>14,.1f}{1000 * theirs:>14,.1f}{100 * error:>+10.1f} %"
        for name, ours, theirs, error in figures
    ]
    return [*rows, f"{'  of one request':<48}{100 * value.request_error:>10.1f} %  (median, either way)"]


def show_traces(described: Sequence[Described], console: Console) -> None:
    """Print each trace as a block of lines."""
    for number, one in enumerate(described):
        if number:
            console.print()
        _show_trace(one, console)


def _show_trace(one: Described, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for label, text in _trace_lines(one):
        table.add_row(label, text)
    console.print(one.name, style="bold", highlight=False, soft_wrap=True)
    console.print(table, highlight=False)


def _trace_lines(one: Described) -> list[tuple[str, str]]:
    s = one.statistics
    lines = [("requests", f"{s.requests:,}")]
    if s.arrivals is None:
        lines.append(("arrivals", "none in the file: choose a process with trace make"))
    else:
        a = s.arrivals
        lines += [
            ("duration", _duration(a.duration_s)),
            ("rate", _arrival_rate(a)),
            ("burstiness", f"CV {_number(a.cv)} of gaps, IDC60 {_number(a.idc60)} (Poisson: 1, 1)"),
        ]
    lines += [
        ("input tokens", _spread(s.input_tokens)),
        ("output tokens", _spread(s.output_tokens)),
        ("input:output", _ratio(s)),
    ]
    if s.sessions is not None:
        agents = f", {s.sessions.agents} agents" if s.sessions.agents != s.sessions.count else ""
        lines.append(("sessions", f"{s.sessions.count:,}{agents}; rounds {_spread(s.sessions.rounds)}"))
        think = s.sessions.think_s
        lines.append(("think time", "not in the file" if think is None else f"{_spread(think)} s"))
    if s.reuse is not None:
        lines.append(("prefix reuse", f"{s.reuse.tokens:.1%} of prompt tokens, unbounded cache"))
    if one.load:
        lines.append(("estimated load", f"{one.profile}\n{_load(one.load)}"))
    return lines


def _arrival_rate(a: ArrivalStatistics) -> str:
    return f"{a.rate_rps:.3g}/s, busiest minute {a.busiest_minute_rps:.3g}/s ({a.peak_to_mean:.2f}x)"


def _ratio(s: Statistics) -> str:
    if s.ratio_range is None:
        return f"{s.ratio:.3g}"
    minutes = s.windows[0].length_s / 60 if len(s.windows) > 1 else 0
    by = f"by {minutes:g} min" if minutes else "in one window"
    return f"{s.ratio:.3g}, {by} {s.ratio_range[0]:.3g} to {s.ratio_range[1]:.3g}"


def _load(load: Sequence[PhaseLoad]) -> str:
    whole = [w for w in load if w.decode is not None]
    if len(whole) < len(load):
        return f"in {len(load) - len(whole)} of {len(load)} windows no batch keeps the TPOT: relax --slo"
    prefill = [w.prefill for w in load]
    decode = [w.decode or 0.0 for w in load]
    shares = [w.prefill_share for w in load if w.prefill_share is not None]
    mean_prefill, mean_decode = sum(prefill) / len(load), sum(decode) / len(load)
    return (
        f"prefill {mean_prefill:.3g} instances, peak {max(prefill):.3g}\n"
        f"decode {mean_decode:.3g} instances, peak {max(decode):.3g}\n"
        f"P:D {_pair(mean_prefill / ((mean_prefill + mean_decode) or 1.0))} on average, "
        f"{_pair(min(shares, default=0.0))} to {_pair(max(shares, default=0.0))} over time"
    )


def _pair(share: float) -> str:
    return f"{100 * share:.0f}:{100 * (1 - share):.0f}"


def _spread(s: Spread) -> str:
    mean = f"{s.mean:.0f}" if s.mean >= 1000 else f"{s.mean:.4g}"
    return f"mean {mean}  p50 {s.p50:g}  p90 {s.p90:g}  p99 {s.p99:g}  max {s.max:g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
