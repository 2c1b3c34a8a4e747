"""``tidegate check``: prove what vLLM servers can do before they get traffic."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from tidegate.check.context import CheckSettings
from tidegate.check.run import check_fleet
from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.process import FAILURE
from tidegate.cli.tables import show_check
from tidegate.cli.terminal import share_bar
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
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
    with share_bar() as advance:
        report = asyncio.run(check_fleet(settings(tuple(servers)), advance))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        show_check(report, Console(highlight=False))
    raise typer.Exit(0 if report.ok else FAILURE)
