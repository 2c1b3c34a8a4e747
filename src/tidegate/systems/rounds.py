"""Systems for conversations: AMPD, and what it is compared with."""

from __future__ import annotations

from typing import Any, Protocol

from tidegate.core.errors import ConfigError
from tidegate.policies.ampd.cost_routing import CostRouting
from tidegate.policies.ampd.fixed import AlwaysLocal, AlwaysRemote, AppendPrefill, StickyColocated
from tidegate.policies.ampd.routing import WINDOW, WINDOW_S, AmpdRouting
from tidegate.policies.order import FIFO, Order
from tidegate.policies.orders import make_order
from tidegate.policies.protocols import DecodePlacement, PrefillPlacement
from tidegate.policies.starting_roles import mixed_roles
from tidegate.systems.registry import SYSTEMS, SystemOptions
from tidegate.systems.system import System


class Routing(PrefillPlacement, DecodePlacement, Protocol):
    """Places both phases of a round."""


@SYSTEMS.register("ampd")
def ampd(options: SystemOptions) -> System:
    """AMPD (arXiv 2602.14516) as published: Algorithm 1 for each round's prefill, Algorithm 2 for queues."""
    order = make_order("reorder")
    return _split(
        "ampd", "rounds go where there is slack, queues are reordered", options, AmpdRouting(), order
    )


@SYSTEMS.register("ampd-cost")
def ampd_cost(options: SystemOptions) -> System:
    """AMPD with one cost in seconds for each way of a prefill, and queues ordered by slack (ours)."""
    order = make_order("slack")
    return _split("ampd-cost", "rounds go where they cost least", options, CostRouting(), order)


@SYSTEMS.register("always-remote")
def always_remote(options: SystemOptions) -> System:
    """A static split: every round's prefill on a prefill instance, which reads no history (Dynamo)."""
    return _split("always-remote", "every prefill remote, history computed again", options, AlwaysRemote())


@SYSTEMS.register("always-remote-return")
def always_remote_return(options: SystemOptions) -> System:
    """A static split: every round's prefill on a prefill instance that reads the history; new KV returns."""
    summary = "every prefill remote, history read over"
    return _split("always-remote-return", summary, options, AlwaysRemote(read=True))


@SYSTEMS.register("always-local")
def always_local(options: SystemOptions) -> System:
    """A static split: only first rounds are prefilled on prefill instances."""
    return _split("always-local", "later rounds where they decode", options, AlwaysLocal())


@SYSTEMS.register("ppd")
def ppd(options: SystemOptions) -> System:
    """PPD (arXiv 2603.13358): later rounds are appended where they decode if a table says so."""
    return _split("ppd", "later rounds appended by a table", options, AppendPrefill())


@SYSTEMS.register("colocated-sticky")
def colocated_sticky(options: SystemOptions) -> System:
    """No disaggregation: a session stays on one instance, both phases of all its rounds."""
    if options.split is not None:
        raise ConfigError("system 'colocated-sticky' has no split: every instance runs both phases")
    both: Any = StickyColocated()
    summary = "both phases on one instance, sessions stay"
    return System(
        name="colocated-sticky",
        summary=summary,
        roles=mixed_roles,
        prefill=both,
        decode=both,
        read_back=None,
    )


def _split(name: str, summary: str, options: SystemOptions, both: Routing, order: Order = FIFO) -> System:
    return System(
        name=name,
        summary=summary,
        roles=options.roles(),
        prefill=both,
        decode=both,
        order=order,
        read_back=None,
        window_s=min(options.tick_s, WINDOW_S),
        windows={WINDOW: WINDOW_S},
    )
