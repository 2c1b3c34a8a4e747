"""Systems whose labels never change: what the adaptive ones are compared with."""

from __future__ import annotations

from tidegate.core.errors import ConfigError
from tidegate.policies.baselines import LEAST_LOADED, MINIMAL_LOAD, Colocated, RoundRobin
from tidegate.policies.starting_roles import mixed_roles
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("round-robin")
def round_robin(options: SystemOptions) -> System:
    """A static split; each phase goes around its pool."""
    both = RoundRobin()
    summary = "static split, each pool in turn"
    return System(name="round-robin", summary=summary, roles=options.roles(), prefill=both, decode=both)


@SYSTEMS.register("static")
def static(options: SystemOptions) -> System:
    """A static split; each phase goes to the member with the fewest tokens (DistServe)."""
    both = LEAST_LOADED
    summary = "static split, fewest tokens first"
    return System(name="static", summary=summary, roles=options.roles(), prefill=both, decode=both)


@SYSTEMS.register("minimal-load")
def minimal_load(options: SystemOptions) -> System:
    """A static split; each phase goes where it is predicted to be fastest (xLLM's baseline)."""
    both = MINIMAL_LOAD
    summary = "static split, least predicted time first"
    return System(name="minimal-load", summary=summary, roles=options.roles(), prefill=both, decode=both)


@SYSTEMS.register("colocated")
def colocated(options: SystemOptions) -> System:
    """No disaggregation: both phases of a request on the instance of least predicted load."""
    if options.split is not None:
        raise ConfigError("system 'colocated' has no split: every instance runs both phases")
    both = Colocated()
    summary = "both phases on one instance"
    return System(name="colocated", summary=summary, roles=mixed_roles, prefill=both, decode=both)
