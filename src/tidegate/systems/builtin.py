"""The systems that come with tidegate: Arrow, whose labels follow the load, and baselines with fixed ones."""

from __future__ import annotations

from typing import Any

from tidegate.core.errors import ConfigError
from tidegate.policies.arrow.lending import LendingMonitor, LendingPlacement
from tidegate.policies.arrow.pools_v1 import ArrowV1Monitor, ArrowV1Placement
from tidegate.policies.arrow.published import ArrowMonitor, ArrowPlacement
from tidegate.policies.arrow.repair import Placements, RepairingMonitor, RepairingPlacement
from tidegate.policies.baselines import LEAST_LOADED, MINIMAL_LOAD, Colocated, RoundRobin
from tidegate.policies.candidates import pool_with_room
from tidegate.policies.protocols import Controller
from tidegate.policies.starting_roles import mixed_roles
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("arrow")
def arrow(options: SystemOptions) -> System:
    """Arrow v2 (arXiv 2505.11916v2) as published: placement that flips inline, and a monitor for decode.

    Of a pool it compares those with room for the request's KV (ours), where ``ArrowPlacement`` alone compares
    all of it: the paper does not say what a full instance does.
    """
    placement = ArrowPlacement(slo=options.slo, candidates=pool_with_room)
    monitor = ArrowMonitor(slo=options.slo, period_s=options.tick_s)
    return _repaired("arrow", "Arrow as published, version 2", options, placement, monitor)


@SYSTEMS.register("arrow-lending")
def arrow_lending(options: SystemOptions) -> System:
    """Arrow v2 where pools lend by what they would be left with (ours)."""
    placement = LendingPlacement(slo=options.slo)
    monitor = LendingMonitor(slo=options.slo, period_s=options.tick_s)
    return _repaired("arrow-lending", "SLO-aware placement with role flips", options, placement, monitor)


@SYSTEMS.register("arrow-v1")
def arrow_v1(options: SystemOptions) -> System:
    """Arrow v1 (xLLM report, section 3.2): four elastic pools and a threshold monitor."""
    monitor = ArrowV1Monitor(slo=options.slo, period_s=options.tick_s)
    return _repaired("arrow-v1", "four elastic pools", options, ArrowV1Placement(), monitor)


def _repaired(
    name: str, summary: str, options: SystemOptions, placement: Placements, monitor: Controller[Any]
) -> System:
    both = RepairingPlacement(placement)
    return System(
        name=name,
        summary=summary,
        roles=options.roles(),
        prefill=both,
        decode=both,
        controllers=(RepairingMonitor(monitor),),
        window_s=options.tick_s,
    )


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
