"""A progress line on a terminal while a run lasts."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.bench.client import LoadClient
from tidegate.bench.recorder import Recorder

REFRESH_S = 0.25


async def show_progress(console: Console, client: LoadClient, recorder: Recorder, total: int) -> None:
    """Redraw until cancelled: requests ended of all, in flight, failed, attained so far."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("starting", total=total)
        while True:
            ended = len(recorder.results)
            share = f", {100 * recorder.attained / ended:.1f} % attained" if ended else ""
            text = f"{client.sent} sent, {client.in_flight} in flight, {recorder.failed} failed{share}"
            progress.update(task, completed=ended, description=text)
            progress.refresh()
            await asyncio.sleep(REFRESH_S)
