"""``tidegate check``: prove what vLLM servers can do before they get traffic."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.check.context import CheckSettings
from tidegate.check.run import check_fleet
from tidegate.check.verdict import CheckReport
from tidegate.cli.check_table import show_report
from tidegate.cli.process import FAILURE
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.fleet.member import LEASE_S
from tidegate.fleet.static import server_of

EPILOG = """
[bold]Examples[/bold]

    tidegate check --vllm http://gpu1:8000 --vllm http://gpu2:8000

Hold their speed against targets, and wait until leases end:

    tidegate check --vllm U1 --vllm U2 --slo ttft:500,tpot:50 --thorough

What has to be changed, by server:

    tidegate check --vllm U1 --vllm U2 --json | jq '.findings[] | select(.verdict == "red")'

[bold]Exit codes[/bold]

0 everything that is required is green; 1 something has to be changed; 2 wrong usage; 130 interrupted.
"""


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""
    app.command("check", epilog=EPILOG, rich_help_panel="Serve")(check)


def check(
    vllm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="A vLLM server; prefill=URL or decode=URL if it keeps a role.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="The same.", show_default=False)
    ] = None,
    slo: Annotated[
        str,
        typer.Option(metavar="ttft:MS,tpot:MS", help="Targets that an idle server has to meet."),
    ] = "",
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Wait until pinned KV is given up (a minute).")
    ] = False,
    lease: Annotated[
        float, typer.Option(metavar="S", min=1.0, help="How long pinned KV has to stay.")
    ] = LEASE_S,
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY", envvar="TIDEGATE_VLLM_API_KEY", help="The servers' API key.", show_default=False
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as JSON.")] = False,
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
    settings = CheckSettings(
        tuple(servers), api_key, Slo.parse(slo) if slo else None, thorough=thorough, lease_s=lease
    )
    report = _checked(settings)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report, Console(highlight=False))
    raise typer.Exit(0 if report.ok else FAILURE)


def _checked(settings: CheckSettings) -> CheckReport:
    """Check, with a progress bar on a terminal."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def advance(share: float, what: str) -> None:
            progress.update(task, completed=share, description=what)

        return asyncio.run(check_fleet(settings, advance))
