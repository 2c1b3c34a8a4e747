"""Processes on this machine that a fleet starts and keeps alive, whatever runs in them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import aiohttp

from tidegate.core.errors import FleetFull, SetupError
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.child import Child, EngineStartFailed, Parse
from tidegate.fleet.health import HealthPace, end_watch, until_unhealthy
from tidegate.fleet.member import FleetListener, Member

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
WITHHELD = ("TIDEGATE_API_KEY", "TIDEGATE_VLLM_API_KEY", "TIDEGATE_LAUNCH_SECRET_FILE")
"""Variables of the gateway that an engine has no use for and must not see."""

Announced = TypeVar("Announced")


@dataclass(frozen=True, slots=True)
class FleetPace:
    """``ready_s`` bounds a start, ``grace_s`` a polite stop. Restarts wait ``backoff_s``, doubling up to
    ``backoff_max_s``; after a life of ``settled_s`` the wait is ``backoff_s`` again."""

    health: HealthPace = field(default_factory=HealthPace)
    ready_s: float = 600.0
    grace_s: float = 5.0
    backoff_s: float = 0.2
    backoff_max_s: float = 10.0
    settled_s: float = 60.0


class Slot:
    """A place for one process after another, with the instances ``ids`` in each of them. ``added``: it was
    not there at the fleet's start; ``up``: its process serves."""

    def __init__(self, name: str, ids: tuple[str, ...], *, added: bool) -> None:
        self.name = name
        self.ids = ids
        self.added = added
        self.up = False
        self.child: Child[Any] | None = None
        self.suspicion = asyncio.Event()
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The outcome of the first start: empty, or why it failed."""
        self.removed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done, with the reason, once no process may run here any more."""

    def report_first(self, outcome: str) -> None:
        if not self.first.done():
            self.first.set_result(outcome)


class ProcessFleet(ABC, Generic[Announced]):
    """Starts one process per entry of ``slots``, which names the instances in it, and restarts processes
    that end or hang.

    A hang shows in health checks, and its process is killed. A restarted instance keeps its name and has a
    new ``engine_id``. Each fleet draws one secret for its engines and passes it in their environment, with a
    key without which they serve no completion: nobody gets round the gateway's own key by asking an engine.
    An added instance whose first start fails is given up. ``stop`` reports no ``member_down``.

    With ``most`` it never has more instances than so many, those included that start or are being stopped.
    """

    def __init__(
        self,
        slots: Mapping[str, tuple[str, ...]],
        pace: FleetPace | None,
        parse: Parse[Announced],
        *,
        most: int | None = None,
        keepers: bool = False,
    ) -> None:
        """``parse`` reads announcements; ``keepers``: the processes keep others (``fleet.keeper``)."""
        self._ids_in = slots
        self._pace = pace or FleetPace()
        self._parse = parse
        self._most = most
        self._keepers = keepers
        self._secret = secrets.token_hex(32)
        self._api_key = secrets.token_hex(32)
        self._slots: dict[str, Slot] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._listener: FleetListener | None = None
        self._named = len(self.ids)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(instance_id for ids in self._ids_in.values() for instance_id in ids)

    async def start(self, listener: FleetListener) -> None:
        self._session, self._listener = aiohttp.ClientSession(), listener
        slots = [self._begin(name, ids) for name, ids in self._ids_in.items()]
        try:
            outcomes = await asyncio.gather(*(slot.first for slot in slots))
            if all(outcomes):
                raise SetupError(_no_instance(dict(zip(self._ids_in, outcomes, strict=True))))
        except BaseException:
            await self.stop()
            raise

    def suspect(self, instance_id: str) -> None:
        for slot in self._slots.values():
            if instance_id in slot.ids:
                slot.suspicion.set()

    def add(self) -> str:
        """See ``FleetControl.add``; a name is used once."""
        if self._listener is None:
            raise FleetFull("the fleet does not run")
        if self._most is not None and self.count >= self._most:
            raise FleetFull(f"the fleet has {self.count} instances, and may have {self._most}")
        name = f"i{self._named}"
        self.begin_added(name)
        self._named += 1
        return name

    def begin_added(self, name: str) -> None:
        """Begin the start of one more instance, here a process more. Raises FleetFull where it cannot."""
        self._begin(name, (name,), added=True)

    @property
    def count(self) -> int:
        """How many instances there are, those included that start or are being stopped."""
        return sum(len(slot.ids) for slot in self._slots.values())

    def remove(self, instance_id: str, reason: str) -> bool:
        """See ``FleetControl.remove``. Its process gets ``grace_s`` to end, unless others are in it."""
        slot = next((slot for slot in self._slots.values() if slot.ids == (instance_id,)), None)
        if slot is None:
            return False
        if not slot.removed.done():
            slot.removed.set_result(reason)
        return True

    def _begin(self, name: str, ids: tuple[str, ...], *, added: bool = False) -> Slot:
        """Supervise one more slot."""
        assert self._listener is not None and self._session is not None
        slot = self._slots[name] = Slot(name, ids, added=added)
        task = self._create_task(self._supervise(slot, self._listener, self._session), f"fleet {name}")
        task.add_done_callback(partial(self._supervisor_ended, slot, self._listener))
        return slot

    def _create_task(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        """Start a task that ends with the fleet."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def stop(self) -> None:
        self._listener = None
        await end_watch(self._tasks, self._session)

    @abstractmethod
    def argv(self, slot: Slot) -> list[str]:
        """Return the command line of the slot's next process. It never holds a secret."""

    @abstractmethod
    async def members(self, slot: Slot, announced: Announced) -> list[Member]:
        """Return what has come up, one member for each of the slot's ``ids``."""

    async def spawn(self, slot: Slot, argv: Sequence[str], env: Mapping[str, str]) -> Child[Announced]:
        """Start the slot's next process. Raises EngineStartFailed when it cannot be."""
        return await Child.spawn(slot.name, argv, env, self._parse, keeper=self._keepers)

    def starting(self) -> dict[str, str]:
        """See ``Fleet.starting``."""
        return {
            instance_id: (slot.child.stage if slot.child else "") or "waiting for its process"
            for slot in self._slots.values()
            if not slot.up
            for instance_id in slot.ids
        }

    def health_url(self, slot: Slot, members: list[Member]) -> str:
        """Return the base URL whose ``/health`` checks the slot's process."""
        return members[0].url

    def not_started(self, slot: Slot) -> None:
        """Do what follows when the slot's process did not become ready."""

    def environment(self, slot: Slot) -> dict[str, str]:
        """Return the variables that the slot's next process gets beside the gateway's own."""
        return {"TIDEGATE_LAUNCH_SECRET": self._secret, "TIDEGATE_ENGINE_API_KEY": self._api_key}

    async def _supervise(self, slot: Slot, listener: FleetListener, session: aiohttp.ClientSession) -> None:
        pace = self._pace
        wait_s = pace.backoff_s
        while not slot.removed.done():
            try:
                lived_s = await self._one_life(slot, listener, session)
            except EngineStartFailed as error:
                if not slot.removed.done():
                    log.error("%s did not start: it %s", slot.name, error.message.splitlines()[0])
                slot.report_first(error.message)
                self.not_started(slot)
                if slot.added and slot.first.result():
                    return
                lived_s = 0.0
            if lived_s >= pace.settled_s:
                wait_s = pace.backoff_s
            if not slot.removed.done():
                log.debug("%s restarts in %.1f s", slot.name, wait_s)
                await asyncio.wait({slot.removed}, timeout=wait_s)
                wait_s = min(2 * wait_s, pace.backoff_max_s)

    async def _one_life(self, slot: Slot, listener: FleetListener, session: aiohttp.ClientSession) -> float:
        """Run one process from start to end and return the seconds it was up; it is reaped in any case."""
        clock = asyncio.get_running_loop().time
        argv = self.argv(slot)
        env = inherited_environment() | self.environment(slot)
        child = slot.child = await self.spawn(slot, argv, env)
        try:
            members = await self._until_ready(slot, child)
            up_at = clock()
            slot.suspicion.clear()
            slot.up = True
            for member in members:
                listener.member_up(member)
            slot.report_first("")
            reason = await self._watch(slot, child, self.health_url(slot, members), session)
            if slot.removed.done():
                log.info("%s is stopped: %s", slot.name, reason)
            else:
                child.kill()
                log.warning("%s is down: it %s", slot.name, reason)
            self._down(slot, listener, reason)
            return clock() - up_at
        finally:
            slot.child = None
            await child.stop(self._pace.grace_s)

    async def _until_ready(self, slot: Slot, child: Child[Announced]) -> list[Member]:
        """Return what has come up. Raises EngineStartFailed also when the slot is removed meanwhile."""

        async def start() -> list[Member]:
            return await self.members(slot, await child.ready(self._pace.ready_s))

        starting = asyncio.create_task(start())
        try:
            either: set[asyncio.Future[Any]] = {starting, slot.removed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                raise EngineStartFailed(f"was removed: {slot.removed.result()}")
            return starting.result()
        finally:
            starting.cancel()

    def _down(self, slot: Slot, listener: FleetListener, reason: str) -> None:
        if slot.up:
            slot.up = False
            for instance_id in slot.ids:
                listener.member_down(instance_id, reason)

    def _supervisor_ended(self, slot: Slot, listener: FleetListener, task: asyncio.Task[None]) -> None:
        """Drop a slot: the fleet stops, its instance was removed or given up, or its supervisor failed."""
        self._slots.pop(slot.name, None)
        if task.cancelled():
            slot.report_first("the fleet was stopped")
            return
        error = task.exception()
        if error is not None:
            log.error("the supervisor of %s failed", slot.name, exc_info=error)
            self._down(slot, listener, f"its supervisor failed: {error}")
        if not slot.first.done():
            self.not_started(slot)
            if error is not None and not slot.added:
                slot.first.set_exception(error)
                return
            slot.first.set_result(slot.removed.result() if error is None else str(error))
        if slot.added and slot.first.result():
            for instance_id in slot.ids:
                listener.start_failed(instance_id, slot.first.result())

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


def inherited_environment() -> dict[str, str]:
    """Return the gateway's variables that its engines get."""
    return {name: value for name, value in os.environ.items() if name not in WITHHELD}


def _no_instance(failures: dict[str, str]) -> str:
    """Tell why nothing started; instances that failed alike are named together."""
    alike: dict[str, list[str]] = {}
    for instance_id, failure in failures.items():
        alike.setdefault(failure, []).append(instance_id)
    reasons = [f"  {', '.join(ids)}: {failure}" for failure, ids in alike.items()]
    return "\n".join(["no instance could start", *reasons])
