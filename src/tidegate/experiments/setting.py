"""What one simulation is made of, as plain data: sent to worker processes, and hashed into a name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.costs.library import PackagedProfile
from tidegate.dataplane.replica import EngineSettings, Group, Replica, replicas_in
from tidegate.experiments.code_digest import code_digest
from tidegate.policies.starting_roles import GivenRoles
from tidegate.signals.answered import answered_in
from tidegate.sim import SimSettings
from tidegate.systems import make_system
from tidegate.systems.system import System
from tidegate.workloads.choice import WorkloadChoice
from tidegate.workloads.likes import LIKE_PREFIX
from tidegate.workloads.source import SAMPLE_PREFIX


@dataclass(frozen=True, slots=True)
class SimulatedFleet:
    """Groups of equal instances, one after the other. ``kv_tokens`` replaces every profile's KV capacity.

    Where given, ``chunk_tokens`` has each group's own budget of a step, and ``labels`` the role that its
    instances have at the start, in place of the system's.
    """

    groups: tuple[tuple[PackagedProfile, int], ...]
    engine: EngineSettings = field(default_factory=EngineSettings)
    kv_tokens: int | None = None
    chunk_tokens: tuple[int, ...] = ()
    labels: tuple[Role, ...] = ()

    @property
    def size(self) -> int:
        return sum(count for _, count in self.groups)

    @property
    def title(self) -> str:
        """The profiles' names, with counts when there are several."""
        if len(self.groups) == 1:
            return self.groups[0][0].name
        return " ".join(f"{profile.name}:{count}" for profile, count in self.groups)

    def replicas(self) -> list[Replica]:
        """Return the instances ``i0``, ``i1``, ... Raises ConfigError for an impossible engine or KV size."""
        chunks: tuple[int | None, ...] = self.chunk_tokens or (None,) * len(self.groups)
        groups = [Group(*group, chunk_tokens=chunk) for group, chunk in zip(self.groups, chunks, strict=True)]
        return replicas_in(groups, engine=self.engine, kv_tokens=self.kv_tokens)


@dataclass(frozen=True, slots=True)
class Setting:
    """A system on a fleet under a workload. A run adds a rate and a seed.

    ``system`` may carry an order (``arrow+edf``); ``split`` is (prefill, decode), None for the system's own.
    A system that sizes the fleet keeps it within ``bounds``, by default between those that are up at the
    start and all; with ``advise`` it only says what it would do. ``chunks`` names the chunk budget, None for
    the system's own. ``warm_start`` is a journal or a trace with whose
    lengths the system begins (``answered_in``), "" none.
    """

    workload: WorkloadChoice
    fleet: SimulatedFleet
    system: str
    split: tuple[int, int] | None = None
    settings: SimSettings = field(default_factory=SimSettings)
    bounds: tuple[int, int] | None = None
    advise: bool = False
    chunks: str | None = None
    warm_start: str = ""

    def make_system(self) -> System:
        """Build the composition. Raises ConfigError for an option that it cannot take."""
        settings, size = self.settings, self.fleet.size
        made = make_system(
            self.system,
            slo=settings.slo,
            chunks=self.chunks,
            split=self.split,
            fleet=self.bounds or ((size - settings.spares, size) if settings.spares else None),
            start_delay_s=settings.start_delays_s,
            advise=self.advise,
            answered=answered_in(self.warm_start) if self.warm_start else None,
        )
        if self.fleet.labels:
            pairs = zip(self.fleet.labels, self.fleet.groups, strict=True)
            labels = tuple(label for label, (_, count) in pairs for _ in range(count))
            made = replace(made, roles=GivenRoles(labels))
        made.roles(max(1, size - settings.spares))
        return made

    def digest(self, **run: Any) -> str:
        """Name a run by all that its result depends on: setting, ``run``, the inputs' contents, the code."""
        inputs = {
            "setting": asdict(self),
            "run": run,
            "files": [_content(name) for name in _files_of(self.workload, self.warm_start)],
            "code": code_digest(self.system, self.split),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _files_of(workload: WorkloadChoice, warm_start: str) -> list[str]:
    names = (workload.trace, workload.lengths_from, workload.rate_curve.rpartition(":")[0], warm_start)
    return [name for name in names if name]


@cache
def _content(name: str) -> str:
    """Return a digest of a trace file's content, the name itself for a packaged sample or what is made."""
    if name.startswith((SAMPLE_PREFIX, LIKE_PREFIX)):
        return name
    try:
        with Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from None
