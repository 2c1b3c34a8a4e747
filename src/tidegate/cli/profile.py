"""``tidegate profile``: measure a live instance and fit the cost forms to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tidegate.cli.profile_list import show_profiles
from tidegate.costs.saved_profile import MeasuredLink, SavedProfile, save_profile
from tidegate.profiling.run import ProbeSettings, measure_profile

EPILOG = """
[bold]Examples[/bold]

Measure a vLLM server for a minute, and simulate eight like it:

    tidegate profile --vllm http://gpu1:8000 --out gpu1.json
    tidegate sim --profile gpu1.json --instances 8 --trace T --system arrow-lending

With the cost of moving KV, for every ordered pair, and a gateway that goes by it:

    tidegate profile --vllm http://gpu1:8000 --vllm http://gpu2:8000 --out pair.json
    tidegate serve --vllm http://gpu1:8000 --vllm http://gpu2:8000 --profile pair.json

What there is without measuring, and how old one's own are:

    tidegate profile --list
    tidegate profile --list profiles/

[bold]Exit codes[/bold]

0 measured; 1 the instance failed; 2 wrong usage, or an instance that cannot be measured.
"""


def register(app: typer.Typer) -> None:
    """Add the ``profile`` command."""
    app.command("profile", epilog=EPILOG, rich_help_panel="Measure")(run)


def run(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="With --list: measured profiles, or folders that hold some.",
            show_default="the current folder",
        ),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="The instance; others to time transfers between all of them."),
    ] = None,
    vllm: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="The same: a vLLM server.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Where to save it.")] = None,
    name: Annotated[str, typer.Option(help="Its name; default: engine/model.")] = "",
    budget: Annotated[float, typer.Option(metavar="S", help="Seconds to measure for.")] = 60.0,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of one step at most; default: found out."),
    ] = None,
    busy: Annotated[
        bool, typer.Option("--busy", help="Measure instances that serve other requests, too.")
    ] = False,
    hardware: Annotated[
        str, typer.Option(help="GPU or CPU to note; default: found out on this machine.", show_default=False)
    ] = "",
    kv_bytes_per_token: Annotated[
        int,
        typer.Option(metavar="N", help="For engines that do not count what they move.", show_default=False),
    ] = 0,
    api_key: Annotated[
        str, typer.Option(envvar=["TIDEGATE_VLLM_API_KEY", "TIDEGATE_API_KEY"], help="Bearer token.")
    ] = "",
    secret: Annotated[
        str,
        typer.Option(
            metavar="S", envvar="TIDEGATE_LAUNCH_SECRET", help="What embedded engines were launched with."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what --out saves.")] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show what profiles there are, and measure nothing.")
    ] = False,
) -> None:
    """Measure a live, idle instance and fit the latency models that policies and simulator use.

    A few hundred short requests tell prefill, decode and mixed steps and the
    front end's time per request apart. Errors are those on points that the
    fit did not see. Host time per step is part of the steps.
    """
    urls = [*(url or []), *(vllm or [])]
    if show_list:
        if urls:
            raise typer.BadParameter("--list measures nothing: drop --url and --vllm")
        show_profiles(paths or [Path()], as_json)
        return
    if paths:
        raise typer.BadParameter(f"{paths[0]}: paths are for --list; an instance is given as --url or --vllm")
    if not urls:
        raise typer.BadParameter("give the instance's --url (or --vllm), or --list")
    settings = ProbeSettings(
        urls,
        budget_s=budget,
        name=name,
        api_key=api_key,
        secret=secret,
        max_batch_tokens=max_batch_tokens,
        busy=busy,
        hardware=hardware,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"no such folder: {out.parent}")
    saved = _measured(settings)
    if out is not None:
        save_profile(out, saved)
    if as_json:
        typer.echo(json.dumps(saved.to_json(), indent=1, allow_nan=False))
    else:
        _show(saved, out)


def _measured(settings: ProbeSettings) -> SavedProfile:
    """Measure, with a progress bar on a terminal."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("warming up", total=1.0)

        def advance(share: float, what: str) -> None:
            progress.update(task, completed=share, description=what)

        return measure_profile(settings, advance)


def _show(saved: SavedProfile, out: Path | None) -> None:
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
