"""The orders of waiting prefills by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tidegate.core.errors import ConfigError
from tidegate.policies.ampd.reorder import ReorderedQueue, best_permutation, most_in_time
from tidegate.policies.order import (
    FIFO,
    HELD,
    STARVATION_BOUND,
    FeasibleQueue,
    LengthAwareQueue,
    Order,
    RankedQueue,
    by_deadline,
    by_work,
)
from tidegate.policies.registry import Registry

WINDOW = 3
"""How many of the first tasks AMPD reorders, and how often it postpones one (section 4.6)."""
LONG_WINDOW = 64
"""How many of the first tasks ``slack`` looks at (ours)."""
LONG_POSTPONEMENTS = 16
"""How often ``slack`` postpones a task (ours)."""

ORDERS: Registry[Callable[[float], Order]] = Registry("order", group="tidegate.orders")
"""Factories of orders from a starvation bound. A third party names one under the entry point group
``tidegate.orders``."""

ORDERS.register("fifo")(lambda bound: FIFO)
ORDERS.register("edf")(lambda bound: Order("edf", partial(RankedQueue, by_deadline, bound)))
ORDERS.register("sjf")(lambda bound: Order("sjf", partial(RankedQueue, by_work, bound)))
ORDERS.register("length-aware")(lambda bound: Order("length-aware", partial(LengthAwareQueue, bound)))
ORDERS.register("feasible-first")(
    lambda bound: Order("feasible-first", partial(FeasibleQueue, by_deadline, bound))
)
ORDERS.register("feasible-sjf")(lambda bound: Order("feasible-sjf", partial(FeasibleQueue, by_work, bound)))
ORDERS.register("reorder")(
    lambda bound: Order("reorder", partial(ReorderedQueue, best_permutation, WINDOW, WINDOW))
)
ORDERS.register("slack")(
    lambda bound: Order("slack", partial(ReorderedQueue, most_in_time, LONG_WINDOW, LONG_POSTPONEMENTS))
)


def make_order(name: str, *, starvation_bound: float = STARVATION_BOUND) -> Order:
    """Return the order ``name``; ``starvation_bound`` counts in TTFT targets of the waiting request. A
    name that begins with ``HELD`` is an order that the control plane keeps.

    ``reorder`` and ``slack`` have a bound of their own, in postponements. Raises ConfigError for an unknown
    name, listing those that exist, and for a bound below 1: a request is not starved while it can still meet
    its deadline.
    """
    if not starvation_bound >= 1.0:
        raise ConfigError(f"the starvation bound must be at least 1 TTFT target, got {starvation_bound}")
    if name.startswith(HELD):
        return ORDERS.get(name.removeprefix(HELD))(starvation_bound).holding()
    return ORDERS.get(name)(starvation_bound)
