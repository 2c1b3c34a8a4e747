"""The order in which waiting prefills are served: by an engine's scheduler, simulated or real, and by the
gateway for requests it holds.

Orders differ in who misses when not everybody can be served in time; none of them preempts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.policies.registry import Registry
from tidegate.policies.waiting import FeasibleQueue, FifoQueue, RankedQueue, Ticket, WaitingQueue

__all__ = [
    "ORDERS",
    "STARVATION_BOUND",
    "Edf",
    "FeasibleFirst",
    "Fifo",
    "Order",
    "Sjf",
    "Ticket",
    "WaitingQueue",
    "make_order",
    "prefill_ticket",
]

T = TypeVar("T")

STARVATION_BOUND = 120.0
"""A request that has waited this many times its own TTFT target is served before all others. Ours: a bound
relative to the target scales with what the request's sender considers long. 120 is a minute at 500 ms, about
what clients wait. Once more wait for longer than the bound than can be served, every order is that of
arrival again: with 20, an overload of ten seconds undid what ordering had won (``docs/log.md``)."""


def prefill_ticket(request: Request, work_s: float) -> Ticket:
    """Return the ticket of a prefill predicted to take ``work_s`` by itself, on the clock of its arrival."""
    return Ticket(request.arrival_s, request.arrival_s + request.slo.ttft_s, work_s)


class Order(Protocol):
    """Makes queues of one order. Frozen; the queues it makes share nothing."""

    @property
    def name(self) -> str:
        """The name in ``ORDERS``."""
        ...

    def queue(self) -> WaitingQueue[T]:
        """Return an empty queue."""
        ...


@dataclass(frozen=True, slots=True)
class Fifo:
    """First come, first served, in push order: what vLLM does unless told otherwise. Nobody starves."""

    name: str = field(default="fifo", init=False)

    def queue(self) -> WaitingQueue[T]:
        return FifoQueue()


@dataclass(frozen=True, slots=True)
class Edf:
    """Earliest deadline first (Jackson 1955: least maximum lateness; Liu and Layland 1973), whoever has
    starved before all (ours). Beyond saturation it keeps serving those that are late already."""

    starvation_bound: float = STARVATION_BOUND
    name: str = field(default="edf", init=False)

    def queue(self) -> WaitingQueue[T]:
        return RankedQueue(_deadline, self.starvation_bound)


@dataclass(frozen=True, slots=True)
class Sjf:
    """Shortest predicted prefill first (Smith 1956: least mean wait); whoever starved before all (ours)."""

    starvation_bound: float = STARVATION_BOUND
    name: str = field(default="sjf", init=False)

    def queue(self) -> WaitingQueue[T]:
        return RankedQueue(_work, self.starvation_bound)


@dataclass(frozen=True, slots=True)
class FeasibleFirst:
    """Earliest deadline first among those that can still meet it; the hopeless ones last, in push order;
    whoever has starved before all.

    Ours, after Moore 1968, who minimises the number of late jobs by setting some aside; here only those are
    set aside that would be late even if they started now.
    """

    starvation_bound: float = STARVATION_BOUND
    name: str = field(default="feasible-first", init=False)

    def queue(self) -> WaitingQueue[T]:
        return FeasibleQueue(self.starvation_bound)


ORDERS: Registry[Callable[[float], Order]] = Registry("order", group="tidegate.orders")
"""Factories of orders from a starvation bound. A third party names one under the entry point group
``tidegate.orders``."""

ORDERS.register("fifo")(lambda bound: Fifo())
ORDERS.register("edf")(Edf)
ORDERS.register("sjf")(Sjf)
ORDERS.register("feasible-first")(FeasibleFirst)


def make_order(name: str, *, starvation_bound: float = STARVATION_BOUND) -> Order:
    """Return the order ``name``; ``starvation_bound`` counts in TTFT targets of the waiting request.

    Raises ConfigError for an unknown name, listing those that exist, and for a bound below 1: a request is
    not starved while it can still meet its deadline.
    """
    if not starvation_bound >= 1.0:
        raise ConfigError(f"the starvation bound must be at least 1 TTFT target, got {starvation_bound}")
    return ORDERS.get(name)(starvation_bound)


def _deadline(ticket: Ticket) -> float:
    return ticket.deadline_s


def _work(ticket: Ticket) -> float:
    return ticket.work_s
