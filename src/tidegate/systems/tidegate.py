"""The system ``tidegate`` (ours)."""

from __future__ import annotations

from tidegate.policies.chunks import make_chunks
from tidegate.policies.orders import make_order
from tidegate.policies.starting_roles import mixed_roles
from tidegate.policies.tidegate.labels import FleetShape
from tidegate.policies.tidegate.placement import OneCost
from tidegate.policies.tidegate.shape import RecentLengths
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


@SYSTEMS.register("tidegate")
def tidegate(options: SystemOptions) -> System:
    """One cost in seconds places both phases. All instances do both, and some only prefill where that serves
    more. Chunks follow the slack of decodes; of the prompts that can be in time the shortest is next."""
    both, lengths = OneCost(), RecentLengths()
    return System(
        name="tidegate",
        summary="one cost for every place, both phases everywhere until a split serves more",
        roles=mixed_roles if options.split is None else options.roles(),
        prefill=both,
        decode=both,
        controllers=(FleetShape(lengths, options.slo),),
        order=make_order("feasible-sjf"),
        chunks=make_chunks("slack"),
        observers=(lengths,),
        read_back=None,
        window_s=options.tick_s,
    )
