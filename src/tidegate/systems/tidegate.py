"""The system ``tidegate``: flips, forecasts, migrations and rounds in one, with one owner per clock (ours)."""

from __future__ import annotations

from tidegate.policies.ampd.routing import WINDOW, WINDOW_S
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
    """One cost in seconds places, shortest-feasible orders; every instance does both until the arithmetic says
    otherwise."""
    both, lengths = OneCost(), RecentLengths()
    return System(
        name="tidegate",
        summary="one cost for every place, labels that follow what comes",
        roles=mixed_roles if options.split is None else options.roles(),
        prefill=both,
        decode=both,
        controllers=(FleetShape(lengths, options.slo),),
        observers=(lengths,),
        order=make_order("feasible-sjf"),
        chunks=make_chunks("slack"),
        read_back=None,
        window_s=options.tick_s,
    )
