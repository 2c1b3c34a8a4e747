"""Processes on this machine that a fleet starts and keeps alive, whatever runs in them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import aiohttp

from tidegate.core.errors import SetupError
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.child import Child, EngineStartFailed
from tidegate.fleet.health import HealthPace, end_watch, until_unhealthy
from tidegate.fleet.member import FleetListener, Member

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
SECRET_VARIABLE = "TIDEGATE_LAUNCH_SECRET"
KEY_VARIABLE = "TIDEGATE_ENGINE_API_KEY"
WITHHELD = ("TIDEGATE_API_KEY", "TIDEGATE_VLLM_API_KEY", "TIDEGATE_LAUNCH_SECRET_FILE")
"""Variables of the gateway that an engine has no use for and must not see."""

Announced = TypeVar("Announced")


@dataclass(frozen=True, slots=True)
class FleetPace:
    """The clocks of supervision, in seconds.

    ``ready_s`` bounds a start, ``grace_s`` a polite stop. Restarts wait ``backoff_s``, doubling up to
    ``backoff_max_s``; an instance that lived ``settled_s`` starts over at ``backoff_s``.
    """

    health: HealthPace = field(default_factory=HealthPace)
    ready_s: float = 600.0
    grace_s: float = 5.0
    backoff_s: float = 0.2
    backoff_max_s: float = 10.0
    settled_s: float = 60.0


class Backoff:
    """The wait before the next restart of one instance."""

    def __init__(self, pace: FleetPace) -> None:
        self._pace = pace
        self._next_s = pace.backoff_s

    def after(self, lived_s: float) -> float:
        """Return the wait after a life of ``lived_s`` and double the one that follows it."""
        if lived_s >= self._pace.settled_s:
            self._next_s = self._pace.backoff_s
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, self._pace.backoff_max_s)
        return wait_s


class Slot:
    """One place in the fleet, which successive processes fill: the instances ``ids`` live in each of them."""

    def __init__(self, name: str, ids: tuple[str, ...], pace: FleetPace) -> None:
        self.name = name
        self.ids = ids
        self.suspicion = asyncio.Event()
        self.backoff = Backoff(pace)
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The outcome of the first start: empty, or why it failed."""
        self.removed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, once the place is to be empty for good."""

    def report_first(self, outcome: str) -> None:
        if not self.first.done():
            self.first.set_result(outcome)


class ProcessFleet(ABC, Generic[Announced]):
    """Starts one process per entry of ``places``, which names the instances in it, and restarts the ones
    that end or hang.

    An exit is noticed at once, a hang by health checks and answered with SIGKILL. A restarted
    instance keeps its name and has a new ``engine_id``. Each fleet draws one secret for its
    engines and passes it in their environment, with a key without which they serve no completion:
    the gateway's own key cannot be gone round by asking an engine. ``stop`` reports no ``member_down``.
    """

    through_keepers = False
    """Whether the processes are keepers of others (``fleet.keeper``)."""

    def __init__(self, places: Mapping[str, tuple[str, ...]], pace: FleetPace | None) -> None:
        self._places = places
        self._pace = pace or FleetPace()
        self._secret = secrets.token_hex(32)
        self._api_key = secrets.token_hex(32)
        self._slots: dict[str, Slot] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._listener: FleetListener | None = None
        self._named = len(self.ids)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(instance_id for ids in self._places.values() for instance_id in ids)

    async def start(self, listener: FleetListener) -> None:
        self._session, self._listener = aiohttp.ClientSession(), listener
        for name, ids in self._places.items():
            self._begin(name, ids)
        try:
            outcomes = await asyncio.gather(*(slot.first for slot in self._slots.values()))
            if all(outcomes):
                raise SetupError(_no_instance(dict(zip(self._slots, outcomes, strict=True))))
        except BaseException:
            await self.stop()
            raise

    def suspect(self, instance_id: str) -> None:
        for slot in self._slots.values():
            if instance_id in slot.ids:
                slot.suspicion.set()

    def add(self) -> bool:
        """See ``FleetControl.add``: one more process, with an instance whose name was never used."""
        if self._session is None or not self.may_grow():
            return False
        name = f"i{self._named}"
        self._named += 1
        self._begin(name, (name,))
        return True

    def remove(self, instance_id: str, reason: str) -> bool:
        """See ``FleetControl.remove``. An instance that shares its process with others stays."""
        slot = next((slot for slot in self._slots.values() if slot.ids == (instance_id,)), None)
        if slot is None:
            return False
        if not slot.removed.done():
            slot.removed.set_result(reason)
        return True

    def _begin(self, name: str, ids: tuple[str, ...]) -> None:
        """Supervise one more place."""
        assert self._listener is not None and self._session is not None
        slot = self._slots[name] = Slot(name, ids, self._pace)
        work = self._supervise(slot, self._listener, self._session)
        task = asyncio.create_task(work, name=f"fleet {name}")
        task.add_done_callback(partial(_on_supervisor_end, slot))
        self._tasks.append(task)

    async def stop(self) -> None:
        await end_watch(self._tasks, self._session)

    # what runs in the processes

    @abstractmethod
    def argv(self, slot: Slot) -> list[str]:
        """Return the command line of the slot's next process. It never holds a secret."""

    @abstractmethod
    def parse(self, line: str) -> Announced | None:
        """Read one line of output; None when it is not the announcement.

        Raises ConfigError when it is a malformed one.
        """

    @abstractmethod
    async def members(self, slot: Slot, announced: Announced, pid: int) -> list[Member]:
        """Return what has come up, one member for each of the slot's ``ids``."""

    def may_grow(self) -> bool:
        """Tell whether one more process has a place on this machine."""
        return True

    def not_started(self, slot: Slot) -> None:
        """Take note that the slot's process did not become ready."""

    def environment(self, slot: Slot) -> dict[str, str]:
        """Return what the slot's next process finds in its environment beside the gateway's own."""
        return {SECRET_VARIABLE: self._secret, KEY_VARIABLE: self._api_key}

    # supervision

    async def _supervise(self, slot: Slot, listener: FleetListener, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                lived_s = await self._one_life(slot, listener, session)
            except EngineStartFailed as error:
                log.error("%s did not start: it %s", slot.name, error.message.splitlines()[0])
                slot.report_first(error.message)
                self.not_started(slot)
                lived_s = 0.0
            if not slot.removed.done():
                wait_s = slot.backoff.after(lived_s)
                log.debug("%s restarts in %.1f s", slot.name, wait_s)
                await asyncio.wait({slot.removed}, timeout=wait_s)
            if slot.removed.done():
                slot.report_first(slot.removed.result())
                del self._slots[slot.name]
                return

    async def _one_life(self, slot: Slot, listener: FleetListener, session: aiohttp.ClientSession) -> float:
        """Run one process from start to end and return the seconds it was up; it is reaped in any case."""
        clock = asyncio.get_running_loop().time
        child = await self._spawn(slot)
        try:
            ready = await child.ready(self._pace.ready_s)
            members = await self.members(slot, ready, child.pid)
            up_at = clock()
            slot.suspicion.clear()
            for member in members:
                listener.member_up(member)
            slot.report_first("")
            reason = await self._watch(slot, child, members[0].url, session)
            if slot.removed.done():
                log.info("%s is stopped: %s", slot.name, reason)
            else:
                child.kill()
                log.warning("%s is down: it %s", slot.name, reason)
            for instance_id in slot.ids:
                listener.member_down(instance_id, reason)
            return clock() - up_at
        finally:
            await child.stop(self._pace.grace_s)

    async def _spawn(self, slot: Slot) -> Child[Announced]:
        env = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        argv = self.argv(slot)
        return await Child.spawn(
            slot.name, argv, env | self.environment(slot), self.parse, keeper=self.through_keepers
        )

    async def _watch(
        self, slot: Slot, child: Child[Announced], url: str, session: aiohttp.ClientSession
    ) -> str:
        """Return why the process is down, as soon as it is."""
        pace = self._pace.health
        client = VllmClient(session, url, instance=slot.name, deadline_s=pace.deadline_s)
        hang = asyncio.create_task(until_unhealthy(client, slot.suspicion, pace, refused_is_gone=False))
        try:
            watched: set[asyncio.Future[Any]] = {hang, child.exited, slot.removed}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if slot.removed.done():
                return slot.removed.result()
            return child.exit_reason() if child.exited.done() else hang.result()
        finally:
            hang.cancel()


def _on_supervisor_end(slot: Slot, task: asyncio.Task[None]) -> None:
    """A supervisor ends by cancellation or removal; anything else must not pass in silence."""
    if task.cancelled():
        slot.report_first("the fleet was stopped")
        return
    error = task.exception()
    if error is None and slot.removed.done():
        return
    log.error("the supervisor of %s failed", slot.name, exc_info=error)
    if error is not None and not slot.first.done():
        slot.first.set_exception(error)


def _no_instance(failures: dict[str, str]) -> str:
    """Tell why nothing started; instances that failed alike are named together."""
    alike: dict[str, list[str]] = {}
    for instance_id, failure in failures.items():
        alike.setdefault(failure, []).append(instance_id)
    reasons = [f"  {', '.join(ids)}: {failure}" for failure, ids in alike.items()]
    return "\n".join(["no instance could start", *reasons])
