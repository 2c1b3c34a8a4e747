"""One load run from start to end."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from array import array
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate import __version__
from tidegate.bench.client import LoadClient
from tidegate.bench.endpoint import Endpoint, probe_endpoint
from tidegate.bench.settings import BenchSettings
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.measure.percentiles import summarize
from tidegate.measure.results import RequestResult
from tidegate.reports.bench_report import BenchReport, build_bench_report
from tidegate.workloads.trace import TraceRecord

# Below the 5 s after which uvicorn (vLLM's server) closes an idle connection: reusing one that the
# server is closing would count as a failed request.
KEEPALIVE_S = 4.0
REFRESH_S = 0.25


class Recorder:
    """Collects results and token gaps; with a file, every result is on disk when ``add`` returns."""

    def __init__(self, slo: Slo, out: TextIO | None = None) -> None:
        self.slo = slo
        self.results: list[RequestResult] = []
        self.gaps_s = array("d")
        self.failed = 0
        self.attained = 0
        self._out = out

    def close(self) -> None:
        """Close the file."""
        if self._out is not None:
            self._out.close()

    def add(self, result: RequestResult, gaps_s: array[float]) -> None:
        """Record one finished request."""
        self.results.append(result)
        if result.ok:
            self.gaps_s.extend(gaps_s)
            self.attained += result.ttft_s is not None and self.slo.attained(result.ttft_s, result.tpot_s)
        elif result.status != "interrupted":
            self.failed += 1
        self.write(result.to_json())

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of the file."""
        if self._out is not None:
            self._out.write(orjson.dumps(line).decode() + "\n")
            self._out.flush()


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A finished run; ``interrupted`` when it was stopped before its end."""

    report: BenchReport
    model: str
    prompt_form: str
    interrupted: bool


def bench(
    settings: BenchSettings,
    records: Sequence[TraceRecord],
    *,
    workload: str = "",
    level: float = DEFAULT_LEVEL,
    out: Path | None = None,
    console: Console | None = None,
) -> BenchRun:
    """Probe the endpoint, offer the load, and score it; SIGINT ends the run early.

    Every result is appended to ``out`` as it comes. ``console`` shows progress and should be a
    terminal. Raises ConfigError when the endpoint is unusable or ``out`` cannot be written.
    """
    _raise_open_file_limit()

    async def with_signal() -> BenchRun:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
        return await run_bench(
            settings, records, stop=stop, workload=workload, level=level, out=out, console=console
        )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(with_signal())


async def _probe(session: aiohttp.ClientSession, settings: BenchSettings, stop: asyncio.Event) -> Endpoint:
    """Probe unless ``stop`` is set first, which raises KeyboardInterrupt: there is nothing to report yet."""
    probe = asyncio.create_task(probe_endpoint(session, settings))
    stopper = asyncio.create_task(stop.wait())
    await asyncio.wait((probe, stopper), return_when=asyncio.FIRST_COMPLETED)
    stopper.cancel()
    if probe.done():
        return probe.result()
    probe.cancel()
    raise KeyboardInterrupt


async def run_bench(
    settings: BenchSettings,
    records: Sequence[TraceRecord],
    *,
    stop: asyncio.Event,
    workload: str = "",
    level: float = DEFAULT_LEVEL,
    out: Path | None = None,
    console: Console | None = None,
) -> BenchRun:
    """Do the work of ``bench`` inside a running loop; ``stop`` ends the run early."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=None)
    ) as session:
        endpoint = await _probe(session, settings, stop)
        try:
            file = None if out is None else out.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error.strerror or error}") from None
        with closing(Recorder(settings.slo, file)) as recorder:
            recorder.write(
                {
                    "type": "bench",
                    "version": __version__,
                    "started_unix_s": time.time(),
                    "url": settings.base,
                    "model": endpoint.model,
                    "endpoint": "chat" if settings.chat else "completions",
                    "prompt_form": endpoint.prompt_form.value,
                    "workload": workload,
                    "seed": settings.seed,
                    "requests": len(records),
                    "slo": {"ttft_s": settings.slo.ttft_s, "tpot_s": settings.slo.tpot_s},
                }
            )
            client = LoadClient(session, settings, endpoint, recorder.add)
            shown = None
            if console is not None and console.is_terminal:
                shown = asyncio.create_task(_show_progress(console, client, recorder, len(records)))
            try:
                await client.run(records, stop)
            finally:
                if shown is not None:
                    shown.cancel()
                    await asyncio.wait([shown])
            gaps_s = summarize(recorder.gaps_s)
            report = build_bench_report(
                recorder.results, settings.slo, level=level, itl_s=gaps_s, notes=endpoint.notes
            )
            recorder.write({"type": "summary", **report.to_json()})
    return BenchRun(report, endpoint.model, endpoint.prompt_form.value, stop.is_set())


async def _show_progress(console: Console, client: LoadClient, recorder: Recorder, total: int) -> None:
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


def _raise_open_file_limit() -> None:
    """Allow as many connections as the system lets this process have: an open loop has no other limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
