"""``tidegate explain``: why a request was served as it was, why an instance flipped, what held at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import Flag
from tidegate.cli.terminal import note
from tidegate.core.errors import ConfigError, TraceError
from tidegate.journal.reader import JournalLines, recorded_kind
from tidegate.reports.explanation import explain_flip, explain_moment, explain_request, worst_requests

EXAMPLES = """
    tidegate sim --rate 60 --journal j.jsonl

    tidegate explain j.jsonl r17

    tidegate explain j.jsonl --flip 3

    tidegate explain j.jsonl --worst 2

    tidegate explain j.jsonl --at 120

[bold]Exit codes[/bold]

0 explained; 2 wrong usage, an unreadable file, or nothing by that name.
"""


def run(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="Of `serve` or `sim` (--journal FILE).")],
    requests: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REQUEST]...", help="Ids as in the journal: of a gateway, those that it answers with."
        ),
    ] = None,
    flip: Annotated[int | None, Flag("Explain flip number N, from 1.", "N")] = None,
    at: Annotated[float | None, Flag("Explain the fleet S seconds into the journal.", "S")] = None,
    worst: Annotated[
        int | None, Flag("Explain the N served requests that missed by most.", "N", more={"min": 1})
    ] = None,
) -> None:
    """Explain decisions of a recorded run: what was known, what was chosen, what came of it.

    A journal has every decision with its alternatives, so nothing is worked out anew.
    """
    if recorded_kind(journal) != "header":
        raise TraceError("this is not a journal: its first line is no 'header'", file=str(journal), line=1)
    if not requests and flip is None and at is None and worst is None:
        raise ConfigError("say what to explain: a request's id, --flip N, --at S or --worst N")
    recording = JournalLines(journal)
    lines = list(recording)
    if recording.truncated:
        note(f"{journal}: the last line is cut off")
    ids = list(requests or [])
    if worst is not None:
        served, elsewhere = worst_requests(lines, worst)
        ids += served
        if not served:
            note("no request that was served missed its targets")
        if elsewhere:
            said = ", ".join(f"{count:,} {outcome}" for outcome, count in elsewhere.most_common())
            note(f"{elsewhere.total():,} missed without being placed: {said}")
    parts = [explain_request(lines, each) for each in ids]
    parts += [explain_flip(lines, flip)] if flip is not None else []
    parts += [explain_moment(lines, at)] if at is not None else []
    for number, part in enumerate(parts):
        typer.echo(f"\n{part}" if number else part)
