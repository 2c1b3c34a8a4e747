"""Systems whose labels never change: what the adaptive ones are compared with."""

from __future__ import annotations

from tidegate.core.errors import ConfigError
from tidegate.policies.baselines.colocated import Colocated
from tidegate.policies.baselines.least_loaded import LeastLoaded
from tidegate.policies.baselines.minimal_load import MinimalLoad
from tidegate.policies.baselines.round_robin import RoundRobin
from tidegate.policies.starting_roles import mixed_roles
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("round-robin")
def round_robin(options: SystemOptions) -> System:
    """A static split; each phase goes around its pool."""
    policy = RoundRobin()
    return System(
        name="round-robin",
        summary="static split, each pool in turn",
        roles=options.roles(),
        prefill=policy,
        decode=policy,
    )


@SYSTEMS.register("static")
def static(options: SystemOptions) -> System:
    """A static split; each phase goes to the member with the fewest tokens (DistServe)."""
    policy = LeastLoaded()
    return System(
        name="static",
        summary="static split, fewest tokens first",
        roles=options.roles(),
        prefill=policy,
        decode=policy,
    )


@SYSTEMS.register("minimal-load")
def minimal_load(options: SystemOptions) -> System:
    """A static split; each phase goes where it is predicted to be fastest (xLLM's baseline)."""
    policy = MinimalLoad()
    return System(
        name="minimal-load",
        summary="static split, least predicted time first",
        roles=options.roles(),
        prefill=policy,
        decode=policy,
    )


@SYSTEMS.register("colocated")
def colocated(options: SystemOptions) -> System:
    """No disaggregation: both phases of a request on the instance of least predicted load."""
    if options.split is not None:
        raise ConfigError("system 'colocated' has no split: every instance runs both phases")
    policy = Colocated()
    return System(
        name="colocated",
        summary="both phases on one instance",
        roles=mixed_roles,
        prefill=policy,
        decode=policy,
    )
