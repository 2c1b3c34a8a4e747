"""A fleet of emulated instances, all in one process on this machine."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from tidegate.core.errors import EngineError, EngineFault, FleetFull
from tidegate.dataplane.replica import EngineSettings, parse_groups
from tidegate.engines.serving.secret import SECRET_HEADER
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.child import EngineStartFailed
from tidegate.fleet.member import FleetListener, Member
from tidegate.fleet.processes import Ready, parse_ready
from tidegate.fleet.supervision import HOST, FleetPace, ProcessFleet, Slot
from tidegate.policies.chunks import known_budget, make_chunks

log = logging.getLogger(__name__)

PLACE = "emulated"


@dataclass(frozen=True, slots=True)
class EmulatedLaunch:
    """``groups`` as ``PROFILE:N``, the last one also as ``PROFILE:A..B``. ``host_s`` is added to every step,
    ``front_s`` to every leg, beside what HTTP takes in reality. An added instance is up ``start_delay_s``
    after it was asked for: what a server takes to load a model."""

    groups: tuple[str, ...]
    order: str = "fifo"
    chunks: str = "fixed"
    max_batch_tokens: int = EngineSettings().max_batch_tokens
    host_s: float = 0.0
    front_s: float = 0.0
    start_delay_s: float = 0.0
    log_level: str = "warning"
    command: tuple[str, ...] = (sys.executable, "-m", "tidegate.engines.emulated")

    def argv(self, groups: Sequence[str]) -> list[str]:
        """Return the command line of a process that runs ``groups``."""
        flags = (
            *("--order", self.order, "--chunks", self.chunks),
            *("--max-batch-tokens", str(self.max_batch_tokens), "--log-level", self.log_level),
            *("--host-s", str(self.host_s), "--front-s", str(self.front_s)),
        )
        return [*self.command, *groups, *flags, "--host", HOST, "--exit-with-parent"]


class AllReady(BaseModel):
    """The announcement of a process that runs several instances; ``port`` is where it takes more."""

    event: Literal["ready"]
    port: int = Field(gt=0, le=65535)
    instances: list[Ready]


class EmulatedFleet(ProcessFleet[AllReady]):
    """Instances i0, i1, ... through all groups, in one process, which goes by their profiles.

    On request the process serves one more replica of the last group, or drops one. After a restart it serves
    what it served before. Raises ConfigError for an unknown profile, or profiles of several models.
    """

    def __init__(self, launch: EmulatedLaunch, *, pace: FleetPace | None = None) -> None:
        groups = parse_groups(launch.groups)
        self._profiles = [(group.named, group.packaged.profile) for group in groups]
        numbers = [number for number, group in enumerate(groups) for _ in range(group.count)]
        self._group_of = {f"i{index}": number for index, number in enumerate(numbers)}
        most = len(numbers) + groups[-1].spares if groups[-1].spares else None
        super().__init__({PLACE: tuple(self._group_of)}, pace, partial(parse_ready, AllReady), most=most)
        self._launch = launch
        self._engine_ids: dict[str, str] = {}
        self._opening: set[str] = set()
        self._process: VllmClient | None = None

    def begin_added(self, name: str) -> None:
        """See ``ProcessFleet.begin_added``. Not while the process starts."""
        slot = self._slots.get(PLACE)
        if slot is not None and not slot.up:
            raise FleetFull("the process of all emulated instances is not up")
        self._group_of[name] = len(self._profiles) - 1
        if slot is None:
            self._begin(PLACE, (name,), added=True)
        else:
            assert self._listener is not None
            self._opening.add(name)
            self._create_task(self._open(slot, name, self._listener), f"start {name}")

    @property
    def count(self) -> int:
        """See ``ProcessFleet.count``."""
        return super().count + len(self._opening)

    def starting(self) -> dict[str, str]:
        """See ``Fleet.starting``."""
        return super().starting() | dict.fromkeys(sorted(self._opening), "loading the model, as if")

    def remove(self, instance_id: str, reason: str) -> bool:
        """See ``FleetControl.remove``. Not while the process starts; it ends with its last instance."""
        slot = self._slots.get(PLACE)
        if self._listener is None or slot is None or not slot.up or instance_id not in slot.ids:
            return False
        if len(slot.ids) == 1:
            return super().remove(instance_id, reason)
        slot.ids = tuple(other for other in slot.ids if other != instance_id)
        self._create_task(self._close(instance_id, reason, self._listener), f"stop {instance_id}")
        return True

    async def _open(self, slot: Slot, name: str, listener: FleetListener) -> None:
        await asyncio.sleep(self._launch.start_delay_s)
        process = self._process
        assert process is not None
        try:
            if not slot.up:
                raise EngineFault("the process has ended")
            reply = await process.ask("/tidegate/instances", {})
            if reply.status != 200:
                raise EngineFault(reply.error)
            ready = Ready.model_validate(reply.body)
            if not slot.up or process is not self._process:
                raise EngineFault("the process has ended")
        except (EngineError, ValidationError) as error:
            log.error("%s did not start: %s", name, error)
            listener.start_failed(name, str(error))
            return
        finally:
            self._opening.discard(name)
        slot.ids += (name,)
        listener.member_up(self._member(name, ready))

    async def _close(self, instance_id: str, reason: str, listener: FleetListener) -> None:
        process = self._process
        assert process is not None
        log.info("%s is stopped: %s", instance_id, reason)
        listener.member_down(instance_id, reason)
        try:
            await process.ask("/tidegate/instances/remove", {"engine_id": self._engine_ids.pop(instance_id)})
        except EngineError as error:
            log.debug("the process of %s has ended: %s", instance_id, error)

    def argv(self, slot: Slot) -> list[str]:
        groups = groupby(self._group_of[instance_id] for instance_id in slot.ids)
        return self._launch.argv([f"{self._profiles[number][0]}:{len(list(of))}" for number, of in groups])

    def health_url(self, slot: Slot, members: list[Member]) -> str:
        """See ``ProcessFleet.health_url``: any instance may go."""
        assert self._process is not None
        return self._process.url

    async def members(self, slot: Slot, announced: AllReady) -> list[Member]:
        if len(announced.instances) != len(slot.ids):
            raise EngineStartFailed(
                f"announced {len(announced.instances)} instances, {len(slot.ids)} were to start"
            )
        assert self._session is not None
        url, headers = f"http://{HOST}:{announced.port}", {SECRET_HEADER: self._secret}
        self._process = VllmClient(self._session, url, instance=slot.name, headers=headers)
        return [self._member(*each) for each in zip(slot.ids, announced.instances, strict=True)]

    def _member(self, instance_id: str, ready: Ready) -> Member:
        self._engine_ids[instance_id] = ready.engine_id
        _, profile = self._profiles[self._group_of[instance_id]]
        launch, keys = self._launch, (self._secret, self._api_key)
        step_tokens = known_budget(make_chunks(launch.chunks), launch.max_batch_tokens)
        return ready.member(instance_id, "emulated", profile, *keys, step_tokens)
