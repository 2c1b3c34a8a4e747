"""A fleet of engine processes on this machine, started and kept alive by the gateway."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp

from tidegate.core.errors import SetupError
from tidegate.costs.profile import Profile
from tidegate.fleet.child import Child, EngineStartFailed
from tidegate.fleet.health import HealthPace, end_watch, until_unhealthy
from tidegate.fleet.member import FleetListener, Member
from tidegate.fleet.ready import Ready, pooled_profile

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
SECRET_VARIABLE = "TIDEGATE_LAUNCH_SECRET"
KEY_VARIABLE = "TIDEGATE_ENGINE_API_KEY"
MAX_NUM_SEQS = 256
"""Requests of one engine step; fewer where a step has not a token for each of them."""
WITHHELD = ("TIDEGATE_API_KEY", "TIDEGATE_VLLM_API_KEY", "TIDEGATE_LAUNCH_SECRET_FILE")
"""Variables of the gateway that an engine has no use for and must not see."""


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """What every engine of a local fleet is started with.

    ``max_model_len`` None leaves it to the model's configuration. ``command`` is the program before
    the flags; tests put their own there.
    """

    model: Path
    instances: int = 3
    served_model_name: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_memory_mb: int = 256
    max_batch_tokens: int = 512
    order: str = "fifo"
    log_level: str = "warning"
    command: tuple[str, ...] = (sys.executable, "-m", "tidegate.engines.embedded")

    def argv(self, engine_id: str, *, self_profile: bool = True) -> list[str]:
        """Return the command line of one engine. It never holds a secret."""
        flags: dict[str, object] = {
            "--model": self.model,
            "--host": HOST,
            "--port": 0,
            "--device": self.device,
            "--dtype": self.dtype,
            "--kv-memory-mb": self.kv_memory_mb,
            "--block-tokens": 16,
            "--max-batch-tokens": self.max_batch_tokens,
            "--max-num-seqs": min(MAX_NUM_SEQS, self.max_batch_tokens),
            "--order": self.order,
            "--threads": 1,
            "--engine-id": engine_id,
            "--served-model-name": self.served_model_name or self.model.name,
            "--lease-s": 30,
            "--log-level": self.log_level,
        }
        if self.max_model_len is not None:
            flags["--max-model-len"] = self.max_model_len
        words = [word for flag, value in flags.items() for word in (flag, str(value))]
        unprofiled = () if self_profile else ("--no-self-profile",)
        return [*self.command, *words, "--exit-with-parent", *unprofiled]


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


class _Slot:
    """One place in the fleet, which successive processes fill."""

    def __init__(self, instance_id: str, pace: FleetPace) -> None:
        self.id = instance_id
        self.suspicion = asyncio.Event()
        self.backoff = Backoff(pace)
        self.first: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The outcome of the first start: empty, or why it failed."""

    def report_first(self, outcome: str) -> None:
        if not self.first.done():
            self.first.set_result(outcome)


class LocalFleet:
    """Starts ``launch.instances`` engines named i0, i1, ... and restarts the ones that end or hang.

    An exit is noticed at once, a hang by health checks and answered with SIGKILL. A restarted
    instance keeps its name and has a new ``engine_id``. Each fleet draws one secret for its
    engines and passes it in their environment, with a key without which they serve no completion:
    the gateway's own key cannot be gone round by asking an engine. ``stop`` reports no ``member_down``.
    """

    def __init__(self, launch: EngineLaunch, *, pace: FleetPace | None = None) -> None:
        self._launch = launch
        self._pace = pace or FleetPace()
        self._secret = secrets.token_hex(32)
        self._api_key = secrets.token_hex(32)
        self._ids = tuple(f"i{index}" for index in range(launch.instances))
        self._slots: dict[str, _Slot] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self._first_starts: dict[str, Ready | None] = {}
        self._profile: asyncio.Future[Profile | None] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        return self._ids

    async def start(self, listener: FleetListener) -> None:
        self._session = session = aiohttp.ClientSession()
        self._profile = asyncio.get_running_loop().create_future()
        for instance_id in self._ids:
            slot = self._slots[instance_id] = _Slot(instance_id, self._pace)
            task = asyncio.create_task(self._supervise(slot, listener, session), name=f"fleet {slot.id}")
            task.add_done_callback(partial(_on_supervisor_end, slot))
            self._tasks.append(task)
        try:
            outcomes = await asyncio.gather(*(slot.first for slot in self._slots.values()))
            if all(outcomes):
                raise SetupError(_no_instance(dict(zip(self._slots, outcomes, strict=True))))
        except BaseException:
            await self.stop()
            raise

    def suspect(self, instance_id: str) -> None:
        slot = self._slots.get(instance_id)
        if slot is not None:
            slot.suspicion.set()

    async def stop(self) -> None:
        await end_watch(self._tasks, self._session)

    async def _supervise(self, slot: _Slot, listener: FleetListener, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                lived_s = await self._one_life(slot, listener, session)
            except EngineStartFailed as error:
                log.error("%s did not start: it %s", slot.id, error.message.splitlines()[0])
                slot.report_first(error.message)
                self._note_first_start(slot, None)
                lived_s = 0.0
            wait_s = slot.backoff.after(lived_s)
            log.debug("%s restarts in %.1f s", slot.id, wait_s)
            await asyncio.sleep(wait_s)

    async def _one_life(self, slot: _Slot, listener: FleetListener, session: aiohttp.ClientSession) -> float:
        """Run one process from start to end and return the seconds it was up; it is reaped in any case."""
        clock = asyncio.get_running_loop().time
        child = await self._spawn(slot)
        try:
            member = await self._await_member(slot, child)
            up_at = clock()
            slot.suspicion.clear()
            listener.member_up(member)
            slot.report_first("")
            reason = await self._watch(slot, child, member.url, session)
            child.kill()
            log.warning("%s is down: it %s", slot.id, reason)
            listener.member_down(slot.id, reason)
            return clock() - up_at
        finally:
            await child.stop(self._pace.grace_s)

    async def _spawn(self, slot: _Slot) -> Child:
        env = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        argv = self._launch.argv(
            engine_id=f"{slot.id}-{secrets.token_hex(4)}",
            # What it measures is used only once, but an engine that failed at it has to try again.
            self_profile=self._first_starts.get(slot.id) is None,
        )
        keys = {SECRET_VARIABLE: self._secret, KEY_VARIABLE: self._api_key}
        return await Child.spawn(slot.id, argv, env | keys)

    async def _await_member(self, slot: _Slot, child: Child) -> Member:
        ready = await child.ready(self._pace.ready_s)
        self._note_first_start(slot, ready)
        assert self._profile is not None
        profile = await asyncio.shield(self._profile)
        return Member(
            instance=ready.instance(slot.id),
            url=f"http://{HOST}:{ready.port}",
            model=ready.model,
            engine_id=ready.engine_id,
            profile=profile,
            secret=self._secret,
            api_key=self._api_key,
            pid=child.pid,
        )

    def _note_first_start(self, slot: _Slot, ready: Ready | None) -> None:
        """Fit the launch's profile once every instance has started or failed to (``ready`` None)."""
        self._first_starts.setdefault(slot.id, ready)
        assert self._profile is not None
        if len(self._first_starts) == len(self._ids) and not self._profile.done():
            started = [r for r in self._first_starts.values() if r is not None]
            self._profile.set_result(pooled_profile(started, self._launch.device))

    async def _watch(self, slot: _Slot, child: Child, url: str, session: aiohttp.ClientSession) -> str:
        """Return why the instance is down, as soon as it is."""
        hang = asyncio.create_task(
            until_unhealthy(session, url, slot.suspicion, self._pace.health, refused_is_gone=False)
        )
        try:
            await asyncio.wait({hang, child.exited}, return_when=asyncio.FIRST_COMPLETED)
            return child.exit_reason() if child.exited.done() else hang.result()
        finally:
            hang.cancel()


def _on_supervisor_end(slot: _Slot, task: asyncio.Task[None]) -> None:
    """A supervisor only ends by cancellation; anything else is a fault that must not pass in silence."""
    if task.cancelled():
        slot.report_first("the fleet was stopped")
        return
    error = task.exception()
    log.error("the supervisor of %s failed", slot.id, exc_info=error)
    if error is not None and not slot.first.done():
        slot.first.set_exception(error)


def _no_instance(failures: dict[str, str]) -> str:
    """Tell why nothing started; instances that failed alike are named together."""
    alike: dict[str, list[str]] = {}
    for instance_id, failure in failures.items():
        alike.setdefault(failure, []).append(instance_id)
    reasons = [f"  {', '.join(ids)}: {failure}" for failure, ids in alike.items()]
    return "\n".join(["no instance could start", *reasons])
