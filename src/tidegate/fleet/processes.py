"""A fleet of engine processes on this machine, started and kept alive by the gateway."""

from __future__ import annotations

import asyncio
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from tidegate.costs.profile import Profile
from tidegate.fleet.member import FleetListener, Member
from tidegate.fleet.ready import Ready, pooled_profile
from tidegate.fleet.supervision import HOST, FleetPace, ProcessFleet, Slot

MAX_NUM_SEQS = 256
"""Requests of one engine step; fewer where a step has not a token for each of them."""


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


class LocalFleet(ProcessFleet[Ready]):
    """``launch.instances`` engines named i0, i1, ..., each a process of its own."""

    def __init__(self, launch: EngineLaunch, *, pace: FleetPace | None = None) -> None:
        ids = tuple(f"i{index}" for index in range(launch.instances))
        super().__init__({instance_id: (instance_id,) for instance_id in ids}, pace)
        self._launch = launch
        self._first_starts: dict[str, Ready | None] = {}
        self._profile: asyncio.Future[Profile | None] | None = None

    async def start(self, listener: FleetListener) -> None:
        self._profile = asyncio.get_running_loop().create_future()
        await super().start(listener)

    def argv(self, slot: Slot) -> list[str]:
        """See ``ProcessFleet.argv``."""
        return self._launch.argv(
            engine_id=f"{slot.name}-{secrets.token_hex(4)}",
            # What it measures is used only once, but an engine that failed at it has to try again. One that
            # was added takes the launch's profile.
            self_profile=not slot.added and self._first_starts.get(slot.name) is None,
        )

    def parse(self, line: str) -> Ready | None:
        """See ``ProcessFleet.parse``."""
        return Ready.parse(line)

    async def members(self, slot: Slot, announced: Ready, pid: int) -> list[Member]:
        """See ``ProcessFleet.members``. Waits until all instances have been measured."""
        self._note_first_start(slot, announced)
        assert self._profile is not None
        profile = await asyncio.shield(self._profile)
        return [
            Member(
                instance=announced.instance(slot.name),
                url=f"http://{HOST}:{announced.port}",
                model=announced.model,
                engine_id=announced.engine_id,
                profile=profile,
                secret=self._secret,
                api_key=self._api_key,
                pid=pid,
            )
        ]

    def not_started(self, slot: Slot) -> None:
        """See ``ProcessFleet.not_started``."""
        self._note_first_start(slot, None)

    def _note_first_start(self, slot: Slot, ready: Ready | None) -> None:
        """Fit the launch's profile once every instance has started or failed to (``ready`` None)."""
        if not slot.added:
            self._first_starts.setdefault(slot.name, ready)
        assert self._profile is not None
        if len(self._first_starts) == len(self.ids) and not self._profile.done():
            started = [r for r in self._first_starts.values() if r is not None]
            self._profile.set_result(pooled_profile(started, self._launch.device))
