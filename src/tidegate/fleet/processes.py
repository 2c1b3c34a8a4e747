"""A fleet of embedded engines on this machine, and the ready line of our engines."""

from __future__ import annotations

import asyncio
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from tidegate.core.errors import ConfigError, SetupError
from tidegate.core.instance import Instance
from tidegate.costs.fitting import PrefillSample, StepSample
from tidegate.costs.profile import Profile
from tidegate.costs.start_profile import start_profile
from tidegate.fleet.child import Child
from tidegate.fleet.member import Capabilities, Member
from tidegate.fleet.supervision import HOST, FleetPace, ProcessFleet, Slot, inherited_environment
from tidegate.fleet.zygote import Zygote
from tidegate.policies.chunks import known_budget, make_chunks

log = logging.getLogger(__name__)

MAX_NUM_SEQS = 256
"""Requests of one engine step; fewer where a step has not a token for each of them."""


class Ready(BaseModel):
    """An engine's announcement. Fields it has beyond these are ignored. One with a KV channel names its
    port."""

    event: Literal["ready"]
    port: int = Field(gt=0, le=65535)
    engine_id: str
    pid: int
    model: str
    max_model_len: int = Field(gt=0)
    kv_capacity_tokens: int = Field(gt=0)
    block_tokens: int = Field(gt=0)
    kv_bytes_per_token: int = Field(ge=0)
    kv_host: str = HOST
    kv_port: int = Field(default=0, ge=0, le=65535)
    profile_samples: list[PrefillSample | StepSample] = []

    def member(
        self,
        instance_id: str,
        kind: str,
        profile: Profile | None,
        secret: str,
        api_key: str,
        step_tokens: int,
    ) -> Member:
        """Return the engine as the fleet's member ``instance_id``. See ``Instance.step_tokens``."""
        return Member(
            instance=Instance(
                id=instance_id,
                kv_capacity_tokens=self.kv_capacity_tokens,
                max_model_len=self.max_model_len,
                block_tokens=self.block_tokens,
                kv_bytes_per_token=self.kv_bytes_per_token,
                step_tokens=step_tokens,
            ),
            url=f"http://{HOST}:{self.port}",
            model=self.model,
            engine_id=self.engine_id,
            profile=profile,
            secret=secret,
            api_key=api_key,
            kind=kind,
            pid=self.pid,
            capabilities=Capabilities(staged=bool(self.kv_port)),
            kv_host=self.kv_host,
            kv_port=self.kv_port,
        )


Announcement = TypeVar("Announcement", bound=BaseModel)


def parse_ready(announcement: type[Announcement], line: str) -> Announcement | None:
    """Read one line of an engine's output; None when it is not an announcement. Raises ConfigError when it is
    one that lacks a field or has a wrong value."""
    if not line.startswith("{") or '"ready"' not in line:
        return None
    try:
        return announcement.model_validate_json(line)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the engine's ready line is malformed: {faults}") from None


@dataclass(frozen=True, slots=True)
class EngineLaunch:
    """What every engine of a local fleet is started with. ``max_model_len`` None leaves it to the model's
    configuration; ``command`` is the program before the flags. ``zygote``: a process that has torch imported
    forks them, where the system can (Linux). ``instances`` may become ``most``, without it any number."""

    model: Path
    instances: int = 3
    most: int | None = None
    served_model_name: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_memory_mb: int = 256
    max_batch_tokens: int = 512
    threads: int = 1
    pace: str = ""
    predictor: str = "auto"
    order: str = "fifo"
    chunks: str = "fixed"
    log_level: str = "warning"
    command: tuple[str, ...] = (sys.executable, "-m", "tidegate.engines.embedded")
    zygote: bool = False

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
            "--predictor": self.predictor,
            "--order": self.order,
            "--chunks": self.chunks,
            "--threads": self.threads,
            "--pace": self.pace,
            "--engine-id": engine_id,
            "--served-model-name": self.served_model_name or self.model.name,
            "--lease-s": 30,
            "--log-level": self.log_level,
        }
        if self.max_model_len is not None:
            flags["--max-model-len"] = self.max_model_len
        words = [word for flag, value in flags.items() for word in (flag, str(value))]
        # A budget that goes by costs needs them in every engine.
        unprofiled = () if self_profile or not make_chunks(self.chunks).steady else ("--no-self-profile",)
        return [*self.command, *words, "--exit-with-parent", "--tell-stages", *unprofiled]


class LocalFleet(ProcessFleet[Ready]):
    """``launch.instances`` engines named i0, i1, ..., each a process of its own."""

    def __init__(self, launch: EngineLaunch, *, pace: FleetPace | None = None) -> None:
        ids = tuple(f"i{index}" for index in range(launch.instances))
        slots = {name: (name,) for name in ids}
        super().__init__(slots, pace, partial(parse_ready, Ready), most=launch.most)
        self._launch = launch
        self._first_starts: dict[str, Ready | None] = {}
        self._measured = asyncio.Event()
        self._profile: Profile | None = None
        self._zygote: Zygote | None = None

    async def spawn(self, slot: Slot, argv: Sequence[str], env: Mapping[str, str]) -> Child[Ready]:
        """See ``ProcessFleet.spawn``. What cannot be forked is started afresh."""
        if self._launch.zygote and sys.platform == "linux":
            if self._zygote is None:
                self._zygote = Zygote(self._launch.model, inherited_environment())
            flags = argv[len(self._launch.command) :]
            try:
                process = await self._zygote.fork(flags, self.environment(slot))
                return Child(slot.name, process, self._parse, keeper=False)
            except SetupError as error:
                log.warning("%s is started afresh: %s", slot.name, error.message.splitlines()[0])
        return await Child.spawn(slot.name, argv, env, self._parse, keeper=False)

    async def stop(self) -> None:
        await super().stop()
        if self._zygote is not None:
            await self._zygote.stop()

    def starting(self) -> dict[str, str]:
        """See ``Fleet.starting``."""
        done = {name for name, ready in self._first_starts.items() if ready is not None}
        forking = {
            name: "importing torch" for name, slot in self._slots.items() if self._zygote and not slot.child
        }
        waits = {name: "measured, waits for the others" for name in done if not self._measured.is_set()}
        return {name: (forking | waits).get(name, stage) for name, stage in super().starting().items()}

    def argv(self, slot: Slot) -> list[str]:
        return self._launch.argv(
            engine_id=f"{slot.name}-{secrets.token_hex(4)}",
            # What it measures is used only once, but an engine that failed at it has to try again. One that
            # was added takes the launch's profile.
            self_profile=not slot.added and self._first_starts.get(slot.name) is None,
        )

    async def members(self, slot: Slot, announced: Ready) -> list[Member]:
        """See ``ProcessFleet.members``. Waits until all instances have been measured."""
        self._note_first_start(slot, announced)
        await self._measured.wait()
        launch, keys = self._launch, (self._secret, self._api_key)
        step_tokens = known_budget(make_chunks(launch.chunks), launch.max_batch_tokens)
        member = announced.member(slot.name, "embedded", self._profile, *keys, step_tokens)
        return [replace(member, measured_at_start=True)]

    def not_started(self, slot: Slot) -> None:
        self._note_first_start(slot, None)

    def _note_first_start(self, slot: Slot, ready: Ready | None) -> None:
        """Fit the launch's profile once every instance has started or failed to (``ready`` None)."""
        if not slot.added:
            self._first_starts.setdefault(slot.name, ready)
        if len(self._first_starts) == len(self.ids) and not self._measured.is_set():
            started = [r for r in self._first_starts.values() if r is not None]
            name = f"{self._launch.device}/{started[0].model}" if started else self._launch.device
            samples = [sample for ready in started for sample in ready.profile_samples]
            self._profile = start_profile(name, self._launch.device, self._launch.model, samples)
            self._measured.set()
