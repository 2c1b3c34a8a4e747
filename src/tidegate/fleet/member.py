"""The contract of fleets: which instances are up, and who learns when that changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile

LEASE_S = 30.0
"""How long vLLM pins KV unless its ``kv_lease_duration`` says otherwise."""
MOONCAKE_LEASE_S = 480.0
"""How long MooncakeConnector does, unless its VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT says otherwise."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an instance can do beyond plain serving; the gateway asks for nothing else.

    ``kv_transfer``: other members can pull its KV by handle, and it can pull theirs. Without it a
    decode leg recomputes the prompt or finds it in its prefix cache. ``continues``: given the number of a
    prompt's tokens that are earlier output, it goes on exactly: characters and stop strings across the seam,
    seeded sampling, penalties, guided decoding. Without it the gateway keeps text whole itself, and a request
    whose state ids do not hold can only begin anew. ``orders``: it serves waiting prefills by their tickets,
    in the order it was started with; without it only ``fifo`` systems may use it. ``tells_load``: its
    ``/metrics`` show its load in vLLM's names; the gateway knows the load of the others. ``staged``: it takes
    running decodes of other ``staged`` members over in stages, and leaves its own to them; without it a
    decode moves by ending its leg, pinning its KV and beginning another.
    """

    kv_transfer: bool = True
    continues: bool = True
    orders: bool = True
    tells_load: bool = False
    staged: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """An instance that is up and ready to serve.

    ``url`` is its HTTP base without a trailing slash. ``engine_id`` changes when the process restarts (KV
    handles of an older engine id are dead). ``secret`` authorises KV and internal calls inside one launch,
    ``api_key`` the engine's ``/v1`` routes; both are empty when not needed and never logged. ``kind`` is
    ``embedded``, ``emulated`` or ``vllm``. ``connector`` names the KV connector of a vLLM server that has
    ``kv_transfer``, which pins KV for ``lease_s``; MooncakeConnector's peers find it at ``bootstrap_url`` as
    ``kv_engine_id``. A server with a ``fixed_role`` keeps its label, and only hands KV on (PREFILL) or only
    takes it (DECODE). ``measured_at_start``: its profile is a short measurement, which follows what is
    observed later. A ``staged`` member's KV channel listens at ``kv_host``:``kv_port``.
    """

    instance: Instance
    url: str
    model: str
    engine_id: str
    profile: Profile | None = None
    secret: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)
    kind: str = "embedded"
    pid: int | None = None
    capabilities: Capabilities = Capabilities()
    connector: str = ""
    lease_s: float = LEASE_S
    bootstrap_url: str = ""
    kv_engine_id: str = ""
    fixed_role: Role | None = None
    measured_at_start: bool = False
    kv_host: str = ""
    kv_port: int = 0

    @property
    def produces_kv(self) -> bool:
        """Whether others can pull its KV."""
        return self.capabilities.kv_transfer and self.fixed_role is not Role.DECODE

    @property
    def consumes_kv(self) -> bool:
        """Whether it can pull KV of others."""
        return self.capabilities.kv_transfer and self.fixed_role is not Role.PREFILL


class FleetListener(Protocol):
    """Receives membership changes on the event loop."""

    def member_up(self, member: Member) -> None:
        """``member`` is ready. An id that was up before comes back only after ``member_down``."""
        ...

    def member_down(self, instance_id: str, reason: str) -> None:
        """The instance is gone or no longer healthy; its KV is lost."""
        ...

    def start_failed(self, instance_id: str, reason: str) -> None:
        """An instance that ``FleetControl.add`` was to start will not come. Its name is not used again."""
        ...


class FleetControl(Protocol):
    """What the control plane may ask of a fleet. No call waits; the listener hears what came of it."""

    def suspect(self, instance_id: str) -> None:
        """Say that calls to the instance fail: the fleet checks it at once and reports it down if it is."""
        ...

    def add(self) -> str:
        """Start one more instance and return its name; it reports ``member_up`` once it serves, or
        ``start_failed``. Raises FleetFull, with neither to come, when none can be started."""
        ...

    def remove(self, instance_id: str, reason: str) -> bool:
        """Stop an instance for good, which reports ``member_down``; False when the fleet cannot stop it."""
        ...


class Fleet(FleetControl, Protocol):
    """A source of instances. ``ids`` names those that it starts with, up or not, in a fixed order."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    def starting(self) -> dict[str, str]:
        """Return what those that are not up are doing."""
        ...

    async def start(self, listener: FleetListener) -> None:
        """Begin; return once every instance is up or has failed its first start. Raises SetupError when none
        can come up at all, with the last lines each one logged."""
        ...

    async def stop(self) -> None:
        """Stop everything this fleet started; idempotent."""
        ...
