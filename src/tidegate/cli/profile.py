"""``tidegate profile``: measure a live instance and fit the cost forms to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tidegate.cli.instance_keys import shared_key
from tidegate.cli.options import Flag, OptionGroup
from tidegate.cli.outputs import claim_file
from tidegate.cli.terminal import note, share_bar
from tidegate.core.errors import ConfigError
from tidegate.costs.library import PackagedProfile, packaged_profile, profile_names
from tidegate.costs.named_profile import OLD_DAYS, profile_line
from tidegate.costs.saved_profile import MeasuredLink, SavedProfile, is_profile, read_profile, save_profile
from tidegate.profiling.run import ProbeSettings, measure_profile
from tidegate.profiling.unfinished import unfinished_path

EXAMPLES = """
Measure a vLLM server for a minute, and simulate eight like it:

    tidegate profile --vllm http://gpu1:8000 --out gpu1.json
    tidegate sim --profile gpu1.json --instances 8 --trace T --system tidegate

With the cost of moving KV, for every ordered pair, and a gateway that goes by it:

    tidegate profile --vllm http://gpu1:8000 --vllm http://gpu2:8000 --out pair.json
    tidegate serve --vllm http://gpu1:8000 --vllm http://gpu2:8000 --profile pair.json

What there is without measuring, and how old one's own are:

    tidegate profile --list
    tidegate profile --list profiles/

[bold]Exit codes[/bold]

0 measured; 1 the instance failed; 2 wrong usage, or an instance that cannot be measured;
130 interrupted (with --out, the same command goes on).
"""


PROBE = OptionGroup(
    ProbeSettings,
    {
        "name": Flag("Its name; default: engine/model."),
        "budget_s": Flag("Seconds to measure for.", "S", "--budget"),
        "max_batch_tokens": Flag("Tokens of one step at most; default: found out.", "N"),
        "busy": Flag("Measure instances that serve other requests, too."),
        "hardware": Flag("GPU or CPU to note; default: found out on this machine."),
        "kv_bytes_per_token": Flag("For engines that do not count what they move.", "N", shown=False),
        "api_key": Flag("Bearer token.", more={"envvar": ["TIDEGATE_VLLM_API_KEY", "TIDEGATE_API_KEY"]}),
        "secret": Flag(
            "What embedded engines were launched with.", "S", more={"envvar": "TIDEGATE_LAUNCH_SECRET"}
        ),
    },
)


def run(
    probe: Annotated[partial[ProbeSettings], PROBE],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...",
            help="With --list: measured profiles, or folders that hold some.",
            show_default="the current folder",
        ),
    ] = None,
    url: Annotated[
        list[str] | None, Flag("The instance; others to time transfers between all of them.", "URL")
    ] = None,
    vllm: Annotated[list[str] | None, Flag("The same: a vLLM server.", "URL")] = None,
    out: Annotated[Path | None, Flag("Where to save it.", "FILE.json")] = None,
    as_json: Annotated[bool, Flag("Print what --out saves.", name="--json")] = False,
    show_list: Annotated[
        bool, Flag("Show what profiles there are, and measure nothing.", name="--list")
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
    if out is not None:
        claim_file(out, "profile")
    settings = probe(urls)
    known = shared_key(urls)
    if known is not None:
        settings = replace(settings, api_key=known.api_key, secret=known.secret)
    part = None if out is None else unfinished_path(out)
    if part is not None and part.exists():
        note(f"{part} is of an interrupted run; what it timed of this instance is not timed again")
    try:
        with share_bar("warming up") as advance:
            saved = measure_profile(settings, advance, part)
    except KeyboardInterrupt:
        kept = part is not None and part.exists()
        goes_on = f"{part} keeps what was timed, and the same command goes on from there"
        note(f"interrupted; {goes_on if kept else 'nothing is kept; --out keeps what was timed'}")
        raise
    if out is not None and part is not None:
        save_profile(out, saved)
        part.unlink(missing_ok=True)
    if as_json:
        typer.echo(json.dumps(saved.to_json(), indent=1, allow_nan=False))
    else:
        show_profile(saved, out)


def show_profiles(paths: Sequence[Path], as_json: bool) -> None:
    """Print the packaged profiles and the measured ones at ``paths``, files or folders of some.

    Raises ConfigError for a path that does not exist, or a file that is no profile.
    """
    packaged, measured, now = _packaged_rows(), _measured_at(paths), datetime.now(UTC)
    if as_json:
        rows = [*packaged, *(_measured_row(path, saved, now) for path, saved in measured)]
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    width = max(len(row["name"]) for row in packaged)
    typer.echo(f"{'name':<{width}}  {'prefill 2,048':>13}  {'step 32x2,048':>13}  {'KV tokens':>9}")
    for row in packaged:
        times = f"{1000 * row['prefill_2048_s']:>10.1f} ms  {1000 * row['step_32x2048_s']:>10.1f} ms"
        typer.echo(f"{row['name']:<{width}}  {times}  {row['kv_capacity_tokens']:>9,}")
    if measured:
        typer.echo("\nmeasured")
    width = max((len(str(path)) for path, _ in measured), default=0)
    for path, saved in measured:
        old = " (old: measure it again)" if saved.age_days(now) > OLD_DAYS else ""
        typer.echo(f"{path!s:<{width}}  {profile_line(saved, now)}{old}")
    typer.echo(
        "\nOr a file of `tidegate profile --out`, hardware:GPU/MODEL[/tpN], roofline:GPU/CONFIG.json[/tpN]."
    )


def _measured_at(paths: Sequence[Path]) -> list[tuple[Path, SavedProfile]]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"no such file or folder: {path}")
        # Other files in a folder are passed over; a broken profile is refused when it is named.
        files += (
            [file for file in sorted(path.glob("*.json")) if is_profile(file)] if path.is_dir() else [path]
        )
    return [(file, read_profile(file)) for file in files]


def _packaged_rows() -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            **_costs(each),
            "mixed_measured": each.mixed_measured,
            "note": each.note,
        }
        for each in map(packaged_profile, profile_names())
    ]


def _costs(each: PackagedProfile | SavedProfile) -> dict[str, Any]:
    return {
        "prefill_2048_s": float(each.profile.prefill_s(2048)),
        "step_32x2048_s": float(each.profile.step.seconds(32, 32 * 2048)),
        "kv_capacity_tokens": each.kv_capacity_tokens,
    }


def _measured_row(path: Path, saved: SavedProfile, now: datetime) -> dict[str, Any]:
    links = [{key: value for key, value in asdict(link).items() if key != "samples"} for link in saved.links]
    return {
        "file": str(path),
        "name": saved.profile.name,
        **{name: getattr(saved, name) for name in ("model", "engine", "hardware", "tidegate", "created")},
        "age_days": round(saved.age_days(now), 2),
        **_costs(saved),
        "links": links,
        "notes": saved.notes,
    }


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
    for text in saved.notes:
        console.print(f"[yellow]note[/] {text}")
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
