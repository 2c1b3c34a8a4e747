"""One load run from start to end."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import orjson
import uvloop

from tidegate import __version__
from tidegate.bench.client import LoadClient
from tidegate.bench.endpoint import Endpoint, probe_endpoint
from tidegate.bench.settings import BenchSettings
from tidegate.core.errors import ConfigError
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.measure.percentiles import summarize
from tidegate.measure.results import RequestResult, Targets
from tidegate.reports.bench_report import BenchReport, build_bench_report
from tidegate.workloads.sessions import followed
from tidegate.workloads.trace import DTYPES, TraceRecord, Workload

# Below the 5 s after which uvicorn (vLLM's server) closes an idle connection: reusing one that the
# server is closing would count as a failed request.
KEEPALIVE_S = 4.0
REFRESH_S = 0.25

Watch = Callable[[int, str], None]
"""Is told how many requests have ended, and what else there is to say."""


class Recorder:
    """Collects results and token gaps; with a file, every result is on disk when ``add`` returns."""

    def __init__(self, targets: Targets, out: TextIO | None = None) -> None:
        self.targets = targets
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
            slo = self.targets.of(result)
            self.attained += result.ttft_s is not None and slo.attained(result.ttft_s, result.tpot_s)
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
    facts: Mapping[str, Any] | None = None,
    level: float = DEFAULT_LEVEL,
    out: Path | None = None,
    watch: Watch | None = None,
) -> BenchRun:
    """Probe the endpoint, offer the load, and score it; SIGINT ends the run early.

    Every result is appended to ``out`` as it comes; ``facts`` are for its first line. ``watch`` is called now
    and then. Raises ConfigError when the endpoint is unusable, or ``out`` cannot be written or exists.
    """
    _raise_open_file_limit()

    async def with_signal() -> BenchRun:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
        return await run_bench(settings, records, stop=stop, facts=facts, level=level, out=out, watch=watch)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(with_signal())


def asked(
    settings: BenchSettings, records: Sequence[TraceRecord], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a run is made of: equal for two runs of one load. ``facts`` are what the caller adds."""
    workload = Workload.of(records)
    columns = [column.tolist() for name in DTYPES if (column := getattr(workload, name)) is not None]
    return {
        "url": settings.base,
        "endpoint": "chat" if settings.chat else "completions",
        "concurrency": settings.concurrency,
        "seed": settings.seed,
        **({"sessions": True} if settings.sessions else {}),
        "temperature": settings.temperature,
        "ignore_eos": settings.ignore_eos,
        "timeout_s": settings.timeout_s,
        **Targets(settings.slo, settings.slo_classes).to_json(),
        "requests": len(workload),
        "workload_digest": sha256(repr(columns).encode()).hexdigest()[:16],
        **(facts or {}),
    }


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
    facts: Mapping[str, Any] | None = None,
    level: float = DEFAULT_LEVEL,
    out: Path | None = None,
    watch: Watch | None = None,
) -> BenchRun:
    """Do the work of ``bench`` inside a running loop; ``stop`` ends the run early."""
    if settings.sessions and not followed(Workload.of(records)):
        raise ConfigError(
            "--sessions: no turn of this workload waits for an answer; that takes a session, a turn and a "
            "delay (--turn-gap S gives a session file its pauses)"
        )
    targets = Targets(settings.slo, settings.slo_classes)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=None)
    ) as session:
        endpoint = await _probe(session, settings, stop)
        try:
            file = None if out is None else out.open("x", encoding="utf-8")
        except FileExistsError:
            raise ConfigError(f"{out} exists; a run is never written over another") from None
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error.strerror or error}") from None
        with closing(Recorder(targets, file)) as recorder:
            began: dict[str, Any] = {"type": "bench", "version": __version__, "started_unix_s": time.time()}
            found = {"model": endpoint.model, "prompt_form": endpoint.prompt_form.value}
            recorder.write({**began, **asked(settings, records, facts), **found})
            client = LoadClient(session, settings, endpoint, recorder.add)
            shown = asyncio.create_task(_show_progress(watch, client, recorder))
            try:
                await client.run(records, stop)
            finally:
                shown.cancel()
                await asyncio.wait([shown])
            gaps_s = summarize(recorder.gaps_s)
            report = build_bench_report(
                recorder.results,
                targets,
                level=level,
                itl_s=gaps_s,
                concurrency=settings.concurrency,
                notes=endpoint.notes,
            )
            recorder.write({"type": "summary", **report.to_json()})
    return BenchRun(report, endpoint.model, endpoint.prompt_form.value, stop.is_set())


async def _show_progress(watch: Watch | None, client: LoadClient, recorder: Recorder) -> None:
    """Tell until cancelled: requests ended, in flight, failed, attained so far."""
    while watch is not None:
        ended = len(recorder.results)
        share = f", {100 * recorder.attained / ended:.1f} % attained" if ended else ""
        watch(ended, f"{client.in_flight} in flight, {recorder.failed} failed{share}")
        await asyncio.sleep(REFRESH_S)


def _raise_open_file_limit() -> None:
    """Allow as many connections as the system lets this process have: an open loop has no other limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
