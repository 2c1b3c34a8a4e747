"""``tidegate profile``: measure a live instance and fit the cost forms to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tidegate.bench.probe_run import ProbeSettings, measure_profile
from tidegate.bench.saved_profile import SavedProfile, save_profile
from tidegate.costs.library import packaged_profile, profile_names

EPILOG = """
[bold]Examples[/bold]

Measure a vLLM server for a minute, and simulate eight like it:

    tidegate profile --vllm http://gpu1:8000 --out gpu1.json
    tidegate sim --profile gpu1.json --instances 8 --trace T --system arrow

With the cost of moving KV from one instance to another:

    tidegate profile --url http://127.0.0.1:9001 --url http://127.0.0.1:9002 --out pair.json

What there is without measuring:

    tidegate profile --list

[bold]Exit codes[/bold]

0 measured; 1 the instance failed; 2 wrong usage, or an instance that cannot be measured.
"""


def register(app: typer.Typer) -> None:
    """Add the ``profile`` command."""
    app.command("profile", epilog=EPILOG, rich_help_panel="Measure")(run)


def run(
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="The instance; a second one to time transfers between both."),
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
    api_key: Annotated[str, typer.Option(envvar="TIDEGATE_API_KEY", help="Bearer token.")] = "",
    secret: Annotated[
        str,
        typer.Option(
            metavar="S", envvar="TIDEGATE_LAUNCH_SECRET", help="What embedded engines were launched with."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what --out saves.")] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the packaged profiles, and measure nothing.")
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
        _show_packaged(as_json)
        return
    if not urls:
        raise typer.BadParameter("give the instance's --url (or --vllm), or --list")
    settings = ProbeSettings(
        urls,
        budget_s=budget,
        name=name,
        api_key=api_key,
        secret=secret,
        max_batch_tokens=max_batch_tokens,
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


def _show_packaged(as_json: bool) -> None:
    """Print the packaged profiles, with what tells them apart."""
    found = [packaged_profile(name) for name in profile_names()]
    prefills = [float(each.profile.prefill_s(2048)) for each in found]
    steps = [float(each.profile.step.seconds(32, 32 * 2048)) for each in found]
    if as_json:
        rows = [
            {
                "name": each.name,
                "prefill_2048_s": prefill_s,
                "step_32x2048_s": step_s,
                "kv_capacity_tokens": each.kv_capacity_tokens,
                "mixed_measured": each.mixed_measured,
                "note": each.note,
            }
            for each, prefill_s, step_s in zip(found, prefills, steps, strict=True)
        ]
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    width = max(len(each.name) for each in found)
    typer.echo(f"{'name':<{width}}  {'prefill 2,048':>13}  {'step 32x2,048':>13}  {'KV tokens':>9}")
    for each, prefill_s, step_s in zip(found, prefills, steps, strict=True):
        times = f"{1000 * prefill_s:>10.1f} ms  {1000 * step_s:>10.1f} ms"
        typer.echo(f"{each.name:<{width}}  {times}  {each.kv_capacity_tokens:>9,}")
    typer.echo(
        "\nOr a file of `tidegate profile --out`, hardware:GPU/MODEL[/tpN], roofline:GPU/CONFIG.json[/tpN]."
    )


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
    console.print(f"[bold]{profile.name}[/]  {saved.engine}, {saved.max_model_len:,} tokens of context")
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
    console.print(f"front end: {1e3 * saved.front_s:.1f} ms per request  tokens of one step: {budget}")
    for note in saved.notes:
        console.print(f"[yellow]note[/] {note}")
    if out is not None:
        console.print(f"saved to {out}; use it as --profile {out}")
