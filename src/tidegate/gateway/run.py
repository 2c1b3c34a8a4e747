"""Start, serve, drain: the life of a gateway process."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Callable

from aiohttp import web

from tidegate import __version__
from tidegate.core.clock import WallClock
from tidegate.core.errors import ConfigError
from tidegate.fleet.member import Fleet
from tidegate.gateway.dispatcher import Dispatcher
from tidegate.gateway.front import Front
from tidegate.gateway.journal import JournalFile
from tidegate.gateway.settings import GatewaySettings
from tidegate.journal.reader import is_yet_to_come
from tidegate.protocol.http_front import FrontRunner
from tidegate.signals.forecast.recorded import NothingRecorded, RecordedLoad
from tidegate.systems.system import System

_log = logging.getLogger(__name__)
DRAIN_S = 30.0
"""How long a stopping gateway lets running requests finish (ours)."""
BACKLOG = 4096
"""Connections the kernel may queue while the loop is busy: a burst is not refused (ours)."""


class Gateway:
    """One gateway over one fleet."""

    def __init__(self, settings: GatewaySettings, fleet: Fleet, system: System) -> None:
        clock = WallClock()
        self._settings = settings
        self._fleet = fleet
        self._began_s = clock.now()
        self._journal = JournalFile(settings.journal, self._began_s)
        self.dispatcher = Dispatcher(system, settings, fleet.ids, clock, self._journal, fleet)
        self._front = Front(settings, self.dispatcher)
        self._runner = FrontRunner(self._front.application(), shutdown_timeout_s=2.0, onward=1)
        self._site: web.TCPSite | None = None

    async def start(self) -> str:
        """Open the port and the journal, start the fleet, and return the base URL.

        Raises SetupError when the port is taken, the journal cannot be written, the fleet cannot start,
        the system lacks a signal, or forecasts cannot begin with the journal that is given for that.
        """
        settings, dispatcher = self._settings, self.dispatcher
        known = self._recorded_load()
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, settings.host, settings.port, backlog=BACKLOG)
        try:
            await self._site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; choose another --port"
            ) from None
        # Only now: a gateway that cannot have the port must not touch the journal of the one that has it.
        self._journal.open()
        self._journal.header(
            version=__version__,
            system=dispatcher.system.name,
            slo=settings.slo,
            roles=dispatcher.plane.membership.labels.items(),
            now_s=self._began_s,
            now_unix_s=time.time(),
        )
        await self._fleet.start(dispatcher)
        dispatcher.system.check_signals(dispatcher.signals())
        dispatcher.start(None if known is None else known.earlier(settings.forecast.period_s, time.time()))
        host, port = settings.host, self._runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _recorded_load(self) -> RecordedLoad | None:
        """Return what forecasts begin with. The gateway's own journal may tell nothing yet."""
        source, journal = self._settings.forecast_from, self._settings.journal
        if source is None:
            return None
        try:
            if not is_yet_to_come(source, journal):
                return RecordedLoad.read(source, self._settings.forecast.period_s, time.time())
        except NothingRecorded:
            if journal is None or journal.resolve() != source.resolve():
                raise
        _log.warning("forecasts begin with nothing: %s, which goes on, tells of no load yet", source)
        return None

    async def drain(self, stop_early: asyncio.Task[int]) -> None:
        """Take no new request and wait for the running ones, at most DRAIN_S or until ``stop_early`` ends."""
        self._front.draining = True
        if self._site is not None:
            await self._site.stop()
        try:
            async with asyncio.timeout(DRAIN_S):
                while self.dispatcher.plane.requests and not stop_early.done():
                    await asyncio.wait({stop_early}, timeout=0.05)
        except TimeoutError:
            pass

    async def stop(self) -> None:
        """Stop everything; what still runs is cut off, with an error that says so."""
        await self._front.cut_off()
        await self._runner.cleanup()
        await self.dispatcher.stop()
        await self._fleet.stop()
        self._journal.close()


async def run_gateway(
    settings: GatewaySettings, fleet: Fleet, system: System, *, on_ready: Callable[[str], None]
) -> bool:
    """Serve until SIGINT or SIGTERM, then drain; a second signal stops at once.

    ``on_ready`` gets the base URL once the fleet is up and the port is open. Returns whether it served
    and drained: False when a signal cut the start or the drain short. Raises SetupError as
    ``Gateway.start`` does.
    """
    signals = _signals()
    # Requests make no cycles worth hunting for, and a full collection would stall every stream.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gateway = Gateway(settings, fleet, system)
    try:
        starting = asyncio.create_task(gateway.start())
        stopping = asyncio.create_task(signals.get())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return False
        on_ready(await starting)
        await stopping
        again = asyncio.create_task(signals.get())
        await gateway.drain(again)
        patient = not again.done()
        again.cancel()
        return patient
    finally:
        await gateway.stop()


def _signals() -> asyncio.Queue[int]:
    """Return a queue that receives SIGINT and SIGTERM."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, queue.put_nowait, int(number))
    return queue
