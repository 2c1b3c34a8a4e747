"""A fleet of emulated instances, all in one process on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import Profile
from tidegate.dataplane.replica import EngineSettings
from tidegate.dataplane.roster import parse_groups, replicas_in
from tidegate.fleet.child import EngineStartFailed
from tidegate.fleet.member import Member
from tidegate.fleet.ready import Ready, faults_in
from tidegate.fleet.supervision import HOST, FleetPace, ProcessFleet, Slot


@dataclass(frozen=True, slots=True)
class EmulatedLaunch:
    """``groups`` as ``PROFILE:N``. ``host_s`` is added to every step, ``front_s`` to every leg, beside what
    HTTP takes in reality."""

    groups: tuple[str, ...]
    order: str = "fifo"
    max_batch_tokens: int = EngineSettings().max_batch_tokens
    host_s: float = 0.0
    front_s: float = 0.0
    log_level: str = "warning"
    command: tuple[str, ...] = (sys.executable, "-m", "tidegate.engines.emulated")

    def argv(self) -> list[str]:
        """Return the command line of the process."""
        flags = (
            *("--order", self.order, "--max-batch-tokens", str(self.max_batch_tokens)),
            *("--host-s", str(self.host_s), "--front-s", str(self.front_s), "--log-level", self.log_level),
        )
        return [*self.command, *self.groups, *flags, "--host", HOST, "--exit-with-parent"]


class AllReady(BaseModel):
    """The announcement of a process that runs several instances."""

    event: Literal["ready"]
    instances: list[Ready]


class EmulatedFleet(ProcessFleet[AllReady]):
    """Instances i0, i1, ... through all groups. They come and go together, for they are one process.

    Their profiles are the packaged ones, which is what they go by: nothing is measured. Raises ConfigError
    for an unknown profile, or profiles of several models.
    """

    def __init__(self, launch: EmulatedLaunch, *, pace: FleetPace | None = None) -> None:
        replicas = replicas_in(parse_groups(launch.groups))
        self._profiles: Sequence[Profile] = [replica.profile for replica in replicas]
        super().__init__({"emulated": tuple(replica.instance.id for replica in replicas)}, pace)
        self._launch = launch

    def may_grow(self) -> bool:
        """See ``ProcessFleet.may_grow``: links are simulated in the one process of all instances."""
        return False

    def argv(self, slot: Slot) -> list[str]:
        """See ``ProcessFleet.argv``."""
        return self._launch.argv()

    def parse(self, line: str) -> AllReady | None:
        """See ``ProcessFleet.parse``."""
        if not line.startswith("{") or '"ready"' not in line:
            return None
        try:
            return AllReady.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"the instances' ready line is malformed: {faults_in(error)}") from None

    async def members(self, slot: Slot, announced: AllReady, pid: int) -> list[Member]:
        """See ``ProcessFleet.members``."""
        if len(announced.instances) != len(slot.ids):
            raise EngineStartFailed(
                f"announced {len(announced.instances)} instances, {len(slot.ids)} were to start"
            )
        return [
            Member(
                instance=ready.instance(instance_id),
                url=f"http://{HOST}:{ready.port}",
                model=ready.model,
                engine_id=ready.engine_id,
                profile=profile,
                secret=self._secret,
                api_key=self._api_key,
                kind="emulated",
                pid=pid,
            )
            for instance_id, ready, profile in zip(slot.ids, announced.instances, self._profiles, strict=True)
        ]
