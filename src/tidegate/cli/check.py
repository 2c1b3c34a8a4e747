"""``tidegate check``: prove what vLLM servers can do before they get traffic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tidegate.check.context import CheckSettings
from tidegate.check.run import check_fleet
from tidegate.check.verdict import CheckReport, CheckVerdict, Finding
from tidegate.cli.instance_keys import shared_key
from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.terminal import FAILURE, plain_table, share_bar
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.fleet.static import server_of

EXAMPLES = """
    tidegate check --vllm http://gpu1:8000 --vllm http://gpu2:8000

Hold their speed against targets, and wait until leases end:

    tidegate check --vllm U1 --vllm U2 --slo ttft:500,tpot:50 --thorough

What has to be changed, by server:

    tidegate check --vllm U1 --vllm U2 --json | jq '.findings[] | select(.verdict == "red")'

[bold]Exit codes[/bold]

0 everything that is required is green; 1 something has to be changed; 2 wrong usage; 130 interrupted.
"""

VERDICT_STYLES = {
    CheckVerdict.GREEN: "green",
    CheckVerdict.YELLOW: "yellow",
    CheckVerdict.RED: "bold red",
    CheckVerdict.SKIPPED: "dim",
}

CHECKED = OptionGroup(
    CheckSettings,
    {
        "slo": Flag("Targets that an idle server has to meet.", "ttft:MS,tpot:MS", read=Slo.parse),
        "thorough": Flag("Wait until pinned KV is given up (a minute)."),
        "lease_s": Flag("How long pinned KV has to stay.", "S", "--lease", more={"min": 1.0}),
        "api_key": Flag(
            "The servers' API key.", "KEY", shown=False, more={"envvar": "TIDEGATE_VLLM_API_KEY"}
        ),
    },
)


def run(
    settings: Annotated[partial[CheckSettings], CHECKED],
    vllm: Annotated[
        list[str] | None,
        Flag("A vLLM server; prefill=URL or decode=URL if it keeps a role.", "URL", shown=False),
    ] = None,
    url: Annotated[list[str] | None, Flag("The same.", "URL", shown=False)] = None,
    as_json: Annotated[bool, Flag("Print all findings as JSON.", name="--json")] = False,
) -> None:
    """Prove what a fleet of vLLM servers can do, before traffic does.

    Compares models, tokenizers, versions and block sizes; moves KV between
    every two servers, both ways, and checks every token; stops a stream and
    continues it elsewhere; pretends that a peer is dead. Takes some ten
    seconds, wants idle servers, and leaves no KV pinned.
    """
    servers = [server_of(each) for each in [*(vllm or []), *(url or [])]]
    urls = [each for each, _ in servers]
    if not urls:
        raise typer.BadParameter("give the servers: --vllm URL --vllm URL ...")
    twice = sorted({each for each in urls if urls.count(each) > 1})
    if twice:
        raise ConfigError(f"given more than once: {', '.join(twice)}")
    checked = settings(tuple(servers))
    known = shared_key(urls)
    if known is not None:
        checked = replace(checked, api_key=known.api_key, ours=True)
    with share_bar() as advance:
        report = asyncio.run(check_fleet(checked, advance))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_check(report, Console(highlight=False))
    raise typer.Exit(0 if report.ok else FAILURE)


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
        verdict, style = found[0].verdict, VERDICT_STYLES[found[0].verdict]
        where = _places(found, len(report.servers))
        table.add_row(f"[{style}]{verdict.value}[/]", found[0].probe, where, _observed(found))
    console.print("", table, "", _outcome(report), sep="\n")


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


def _outcome(report: CheckReport) -> str:
    counts = report.counts()
    names = {
        CheckVerdict.RED: "to change",
        CheckVerdict.SKIPPED: "not probed",
        CheckVerdict.YELLOW: "to know of",
        CheckVerdict.GREEN: "green",
    }
    words = [f"{counts[verdict]} {name}" for verdict, name in names.items() if counts.get(verdict)]
    outcome = "[green]ready to serve[/]" if report.ok else "[bold red]not ready[/]"
    return f"{outcome}: {', '.join(words)}, in {report.seconds:.1f} s"
