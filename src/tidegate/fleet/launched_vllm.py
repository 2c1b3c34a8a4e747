"""A fleet of stock ``vllm serve`` processes on this machine, started and kept alive by the gateway."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tidegate.core.errors import EngineError, FleetFull, SetupError
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.child import EngineStartFailed
from tidegate.fleet.health import HealthPace
from tidegate.fleet.member import LEASE_S, FleetListener, Member
from tidegate.fleet.step_choice import StepChoice, choose_step
from tidegate.fleet.supervision import HOST, FleetPace, ProcessFleet, Slot
from tidegate.fleet.vllm import ServeArguments, describe_member, free_ports, profiles_by_id

log = logging.getLogger(__name__)

PACE = FleetPace(
    health=HealthPace(deadline_s=5.0), ready_s=1800.0, grace_s=20.0, backoff_s=1.0, backoff_max_s=60.0
)
"""Slower than for our own engines: weights load for minutes, and a start that fails costs much."""
FACTS_S = 10.0
CPU_KV_SHARE, CPU_KV_BYTES = 0.2, 4 << 30
"""Without GPUs, all KV caches together take this share of the memory, and one of them at most so much."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
KEEPER = (sys.executable, "-m", "tidegate.fleet.keeper")


@dataclass(frozen=True, slots=True)
class VllmLaunch:
    """What every server is started with: ``program`` is vLLM's command, ``arguments`` what the user adds to
    ``vllm serve``. Instance i0 logs to ``i0.log`` in ``logs``. An empty ``api_key`` means a random one.
    ``instances`` may become ``most``, without it as many as the machine has GPUs for. Steps are to keep
    ``tpot_s``."""

    model: Path
    program: Path
    logs: Path
    instances: int = 3
    most: int | None = None
    arguments: ServeArguments = field(default_factory=lambda: ServeArguments(()))
    api_key: str = ""
    tpot_s: float | None = None


class _Start(NamedTuple):
    """Where one process of a slot is found, and what it calls itself to its peers."""

    engine_id: str
    first_port: int
    bootstrap_port: int
    side_channel_port: int


class LaunchedVllmFleet(ProcessFleet[int]):
    """``launch.instances`` vLLM servers named i0, i1, ..., which hand KV to each other.

    Each has free ports of its own, and where the machine has GPUs as many as its parallel sizes multiply to,
    in order. An added one takes GPUs that no other has; without GPUs it gets what each of the first ones got.
    ``profiles`` holds one for all or one for each, and an added one has the last. From them comes how much a
    step takes. Raises SetupError when there are too few GPUs.
    """

    def __init__(
        self, launch: VllmLaunch, *, profiles: Sequence[Profile] = (), pace: FleetPace | None = None
    ) -> None:
        ids = tuple(f"i{index}" for index in range(launch.instances))
        slots, most = {name: (name,) for name in ids}, launch.most or launch.instances
        super().__init__(slots, pace or PACE, kept_process, most=launch.most, keepers=True)
        self._profiles = profiles_by_id(ids, profiles)
        self._added_profile = profiles[-1] if profiles else None
        self._api_key = launch.api_key or self._api_key
        self._launch = launch
        self._shares = hardware(os.environ, most, launch.arguments.gpus)
        self._hardware = dict(zip(ids, self._shares, strict=False))
        self._on_gpus = VISIBLE in self._shares[0]
        self._memory = [] if self._on_gpus else cpu_memory(most)
        self._starts: dict[str, _Start] = {}

    def step_of(self, name: str) -> StepChoice:
        """Return the budget of the steps of an instance, which may be one to be added."""
        profile, launch = self._profiles.get(name, self._added_profile), self._launch
        return choose_step(launch.arguments, profile, launch.tpot_s, on_gpus=self._on_gpus)

    async def start(self, listener: FleetListener) -> None:
        try:
            self._launch.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"cannot write logs to {self._launch.logs}: {error.strerror}") from None
        await super().start(listener)

    def begin_added(self, name: str) -> None:
        """See ``ProcessFleet.begin_added``. It gets free GPUs, or the cores, which all share."""
        taken = [self._hardware[other] for other in self._slots] if self._on_gpus else []
        spare = next((share for share in self._shares if share not in taken), None)
        if spare is None:
            raise FleetFull(f"no {self._launch.arguments.gpus} GPUs are free for one more server")
        self._hardware[name] = spare
        super().begin_added(name)

    def argv(self, slot: Slot) -> list[str]:
        """See ``ProcessFleet.argv``. Every start has other ports: the last ones may still be in use."""
        others = [start.first_port for name, start in self._starts.items() if name in self._slots]
        port = free_ports(others)
        start = _Start(f"{slot.name}-{secrets.token_hex(4)}", port, port + 1, port + 2)
        self._starts[slot.name] = start
        launch, step = self._launch, self.step_of(slot.name)
        return [
            *KEEPER,
            *(f"http://{HOST}:{port}/health", str(launch.logs / f"{slot.name}.log")),
            *(str(launch.program), "serve", str(launch.model), "--served-model-name", launch.model.name),
            *("--host", HOST, "--port", str(port)),
            *self._memory,
            *launch.arguments.command_line(start.engine_id, step.tokens if step.chosen else 0),
        ]

    def environment(self, slot: Slot) -> dict[str, str]:
        start = self._starts[slot.name]
        lease_s = self._launch.arguments.kv_transfer.lease_s or LEASE_S
        return {
            **self._hardware[slot.name],
            "VLLM_API_KEY": self._api_key,
            "VLLM_HOST_IP": HOST,
            "VLLM_NIXL_SIDE_CHANNEL_HOST": HOST,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(start.side_channel_port),
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(start.bootstrap_port),
            "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(math.ceil(lease_s)),
        }

    async def members(self, slot: Slot, announced: int) -> list[Member]:
        start = self._starts[slot.name]
        assert self._session is not None
        url, bootstrap_url = (f"http://{HOST}:{port}" for port in (start.first_port, start.bootstrap_port))
        try:
            member = await describe_member(
                VllmClient(self._session, url, instance=slot.name, api_key=self._api_key, deadline_s=FACTS_S),
                self._launch.arguments.kv_transfer,
                bootstrap=VllmClient(self._session, bootstrap_url, deadline_s=FACTS_S),
                api_key=self._api_key,
                profile=self._profiles.get(slot.name, self._added_profile),
                engine_id=start.engine_id,
                pid=announced,
                step_tokens=self.step_of(slot.name).tokens,
            )
        except (EngineError, SetupError) as error:
            raise EngineStartFailed(f"does not describe itself: {error}") from None
        return [member]


def kept_process(line: str) -> int | None:
    """Return the server's process id from its keeper's announcement; None for any other line."""
    if not line.startswith('{"event": "ready"'):
        return None
    pid: int = json.loads(line)["pid"]
    return pid


def cpu_memory(instances: int) -> list[str]:
    """Return arguments for a KV cache in the machine's memory, of which each server would take nearly all."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    each = min(CPU_KV_BYTES, int(CPU_KV_SHARE * total) // instances)
    return ["--kv-cache-memory-bytes", str(each)]


def hardware(environment: Mapping[str, str], instances: int, gpus_each: int) -> list[dict[str, str]]:
    """Return the variables that give each instance its share of the machine; with GPUs also what would be
    the shares of further ones.

    Without GPUs all servers share the cores, and none is bound to those of another. What the environment
    sets already stays. Raises SetupError when there are GPUs, but too few.
    """
    gpus = visible_gpus(environment)
    if gpus:
        return [{VISIBLE: own} for own in share_out(gpus, max(instances, len(gpus) // gpus_each), gpus_each)]
    threads = max(1, len(os.sched_getaffinity(0)) // instances)
    shared: dict[str, Any] = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    return [{name: value for name, value in shared.items() if name not in environment}] * instances


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str]:
    """Return the NVIDIA GPUs, in words for CUDA_VISIBLE_DEVICES: those it names, else all there are."""
    named = environment.get(VISIBLE)
    if named is not None:
        return [word for word in named.replace(" ", "").split(",") if word not in ("", "-1")]
    if not devices.is_dir():
        return []
    count = sum(bool(re.fullmatch(r"nvidia\d+", entry.name)) for entry in devices.iterdir())
    return [str(index) for index in range(count)]


def share_out(gpus: list[str], instances: int, each: int) -> list[str]:
    """Return a value of CUDA_VISIBLE_DEVICES for each instance: ``each`` GPUs, none of them twice. Raises
    SetupError when there are not enough."""
    if len(gpus) < instances * each:
        raise SetupError(
            f"{instances} instances with {each} GPU{'s' * (each > 1)} each need {instances * each}, and "
            f"{len(gpus)} can be seen; take fewer --instances ({VISIBLE}= in the environment starts them "
            "without any)"
        )
    return [",".join(gpus[first : first + each]) for first in range(0, instances * each, each)]
