"""A check's report as one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidegate.check.verdict import CheckReport, CheckVerdict, Finding

STYLE = {
    CheckVerdict.GREEN: "green",
    CheckVerdict.YELLOW: "yellow",
    CheckVerdict.RED: "bold red",
    CheckVerdict.SKIPPED: "dim",
}


def show_report(report: CheckReport, console: Console) -> None:
    """Print who was checked, one row for each probe and outcome, and what it comes to."""
    for name, facts in report.servers.items():
        console.print(f"[bold]{name}[/]  {escape(_described(facts))}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("verdict", no_wrap=True)
    table.add_column("probe", no_wrap=True)
    table.add_column("where")
    table.add_column("observed, and [bold]what to change[/]")
    for found in grouped(report.findings):
        first = found[0]
        style = STYLE[first.verdict]
        table.add_row(
            f"[{style}]{first.verdict.value}[/]",
            first.probe,
            _places(found, len(report.servers)),
            _told(found),
        )
    console.print()
    console.print(table)
    console.print()
    console.print(_sum(report))


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Put together what is one row: a probe's green findings, and others that say the same."""
    rows: dict[tuple[str, ...], list[Finding]] = {}
    for each in findings:
        said = () if each.verdict is CheckVerdict.GREEN else (each.observed, each.change)
        rows.setdefault((each.probe, each.verdict.value, *said), []).append(each)
    return list(rows.values())


def _described(facts: dict[str, object]) -> str:
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


def _told(found: Sequence[Finding]) -> str:
    first = found[0]
    several = len({each.observed for each in found}) > 1
    text = escape(f"{'as ' + '->'.join(first.where) + ': ' if several else ''}{first.observed}")
    return f"{text}\n[bold]{escape(first.change)}[/]" if first.change else text


def _sum(report: CheckReport) -> str:
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
