"""The system ``tidegate`` (ours)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tidegate.policies.chunks import SlackBudget, make_chunks
from tidegate.policies.dopd.controller import DopdController
from tidegate.policies.orders import make_order
from tidegate.policies.protocols import Controller
from tidegate.policies.starting_roles import mixed_roles
from tidegate.policies.tidegate.harm import harmless
from tidegate.policies.tidegate.labels import FleetShape
from tidegate.policies.tidegate.placement import OneCost
from tidegate.policies.tidegate.shape import RecentLengths
from tidegate.policies.tidegate.size import OnePool
from tidegate.policies.tidegate.speed import ObservedSpeed
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("tidegate")
def tidegate(options: SystemOptions) -> System:
    """One cost in seconds places both phases. All instances do both, and some only prefill where that serves
    more. Chunks follow the slack of decodes; of the prompts that can be in time the shortest is next. Within
    a range of instances, DOPD's forecast and caution say how many there are."""
    both, lengths = OneCost(), RecentLengths(options.answered or ())
    shape = FleetShape(lengths, options.slo)
    speed = ObservedSpeed(options.tick_s)
    controllers: tuple[Controller[Any], ...] = (speed, shape)
    chunks = make_chunks("slack")
    if options.fleet is not None:
        start_s = max(options.start_delay_s)
        size = DopdController(
            options.slo, options.fleet, (start_s, start_s), options.advise, pools=OnePool(), name="size"
        )
        controllers = (speed, size, replace(shape, most=options.fleet[1]))
        chunks = SlackBudget(behind_share=1.0 - size.constants.level)
    return System(
        name="tidegate",
        summary="one cost for every place, both phases everywhere until a split serves more",
        roles=mixed_roles if options.split is None else options.roles(),
        prefill=both,
        decode=both,
        controllers=controllers,
        order=make_order("feasible-sjf"),
        chunks=chunks,
        observers=(lengths,),
        read_back=None,
        admission=harmless,
        window_s=options.tick_s,
    )
