"""``tidegate state``: what a running gateway knows, as a table."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tidegate.cli.options import Flag
from tidegate.cli.terminal import plain_table
from tidegate.core.errors import ConfigError, SetupError, TidegateError

TIMEOUT_S = 5.0
WATCH_S = 1.0
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
    "step_tokens": "step",
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
"""The second table, of instances that tell their load: the budget of their steps, where it is known, what
they say, what of it is not the gateway's, how often that came to differ, and where the KV of their prompts
came from."""


EXAMPLES = """
    tidegate state

    tidegate state --watch

    tidegate state --url http://10.0.0.5:8000 --json | jq '.instances\\[].role'
"""


def run(
    url: Annotated[str, Flag("The gateway.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str, Flag("Its API key.", "KEY", shown=False, more={"envvar": "TIDEGATE_API_KEY"})
    ] = "",
    as_json: Annotated[bool, Flag("Print what the gateway answered, as JSON.", name="--json")] = False,
    watch: Annotated[bool, Flag("Go on showing it, every second.")] = False,
) -> None:
    """Show the instances of a running gateway: their roles, their work and their last flips."""
    base_url = url.rstrip("/").removesuffix("/v1")
    if watch:
        if as_json:
            raise ConfigError("--watch draws on a terminal; leave out --json")
        watch_state(lambda: _ask(base_url, api_key), Console(highlight=False))
        return
    answer = _ask(base_url, api_key)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        show_state(answer)


def _ask(base_url: str, api_key: str) -> dict[str, Any]:
    """Fetch the state. Raises SetupError when the address or key is wrong, TidegateError when it fails."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(f"{base_url}/tidegate/state", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 401:
            raise SetupError(f"{base_url} wants an API key: --api-key or TIDEGATE_API_KEY") from None
        if error.code != 404:
            raise TidegateError(f"{base_url} answered {error.code} {error.reason}") from None
        answer = None
    except json.JSONDecodeError:
        answer = None
    except ValueError as error:
        raise SetupError(f"{base_url!r} is not a URL: {error}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TidegateError(f"no gateway answers at {base_url}: {reason}") from None
    if not isinstance(answer, dict):
        raise SetupError(f"{base_url} is not a tidegate gateway")
    return answer


SHOWN_APART = ("instances", "events", "recent", "controllers")


def show_state(answer: Mapping[str, Any]) -> None:
    """Print what a gateway answered: in a line the facts that there are, then its instances."""
    console = Console(highlight=False)
    facts = {
        name: value for name, value in answer.items() if name not in SHOWN_APART and value not in ({}, [])
    }
    console.print("[dim] · [/]".join(_fact(name, value) for name, value in facts.items()))
    for name, reason in answer.get("controllers", {}).items():
        console.print(f"[dim]{name}[/] {escape(str(reason))}")
    rows = sorted(answer.get("instances", []), key=lambda row: str(row.get("id")))
    if not any(name in row for row in rows for name in STATE_COLUMNS):
        console.print("no instance is up")
        return
    console.print(_rows_table(rows, STATE_COLUMNS))
    loads = [{**row, **row["load"], **row.get("prompt_tokens", {})} for row in rows if row.get("load")]
    if loads:
        console.print("\n[dim]what the engines say[/]")
        console.print(_rows_table(loads, LOAD_COLUMNS))


def watch_state(ask: Callable[[], dict[str, Any]], console: Console) -> None:
    """Draw the state every second until interrupted; a gateway that does not answer is said and asked again.

    Raises what the first ``ask`` raises.
    """
    from rich.live import Live

    from tidegate.cli.watching import watched

    answer, trouble = ask(), ""
    with Live(watched(answer, console.width), console=console, auto_refresh=False) as live:
        while True:
            live.update(watched(answer, console.width, trouble), refresh=True)
            time.sleep(WATCH_S)
            try:
                answer, trouble = ask(), ""
            except TidegateError as error:
                trouble = error.message


def _rows_table(rows: list[dict[str, Any]], titles: dict[str, str]) -> Table:
    """Return a table of the columns that any of ``rows`` has."""
    table = plain_table()
    columns = [name for name in titles if any(name in row for row in rows)]
    for name in columns:
        table.add_column(titles[name], justify="left" if name in ("id", "pool") else "right", no_wrap=True)
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
        case {"id": instance, "role": role, "for_s": seconds}:
            return f"{instance} for {role}, {seconds:.0f} s"
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
