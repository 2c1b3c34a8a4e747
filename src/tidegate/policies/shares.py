"""Who goes first of requests of different priorities and tenants: classes, and weighted fair shares in each.

An order (``order.py``) says who is next among the requests of one tenant in one class; here is who is next
among those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from math import isfinite
from typing import Any, Generic, TypeVar

from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.policies.order import STARVATION_BOUND, Order, Ticket, WaitingQueue

T = TypeVar("T")

OTHERS = "*"
"""Names the weight of tenants that are not named; 1 unless given."""
SERVINGS_PER_STARVED = 10
"""Of so many servings at most one goes to who has starved in a later class (ours): a class that is asked for
more than there is would else take all from those before it, once its first ones have starved."""
MOST_FLOWS = 64
"""From so many tenants on, a queue forgets those that do not wait and have nothing to make up for."""
MOST_TENANTS = 4096
"""Of so many tenants, those with the newest answers, it is kept how long their answers are."""
ANSWERS = 100
"""Over so many answers the mean length of a tenant's answers is smoothed (ours)."""


def parse_shares(texts: Iterable[str]) -> dict[str, float]:
    """Read ``alice=2``, a text per tenant. Raises ConfigError for another text, a weight that is not above 0,
    and a tenant given twice."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, weight = text.rpartition("=")
        try:
            share = float(weight)
        except ValueError:
            share = 0.0
        if not name or not (isfinite(share) and share > 0):
            raise ConfigError(f"share {text!r}: expected TENANT=WEIGHT, above 0; {OTHERS} is all others")
        if name in found:
            raise ConfigError(f"the share of tenant {name!r} is given more than once")
        found[name] = share
    return found


class TenantShares:
    """Writes on tickets whose they are and what they take of a tenant's share.

    With ``weights`` by tenant every tenant has a share, one that is not named that of ``OTHERS``; without any
    all requests are of one. A request takes its prompt tokens to compute and the tokens that its answer is
    expected to have, over the weight: what is predicted of it, else the mean of its tenant's newest answers.
    After VTC (Sheng et al., OSDI 2024), which charges output tokens as they are made; a queue of prefills is
    not told of those. Weights are positive.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._answers: dict[str, tuple[int, float]] = {}

    def of(self, request: Request, ticket: Ticket) -> Ticket:
        """Return ``ticket`` with the class of ``request``, and with its tenant where there are shares."""
        if not self._weights:
            return ticket._replace(priority=request.priority) if request.priority else ticket
        tenant = request.tenant
        weight = self._weights.get(tenant, self._weights.get(OTHERS, 1.0))
        answer = self._answers.get(tenant, (0, 0.0))[1]
        if request.remaining is not None:
            answer = request.remaining.mean
        charge = (ticket.tokens + answer) / weight
        return ticket._replace(priority=request.priority, tenant=tenant, charge=charge)

    def answered(self, request: Request, tokens: int) -> None:
        """Learn from an answer of so many tokens."""
        if self._weights:
            count, mean = self._answers.pop(request.tenant, (0, 0.0))
            count = min(count + 1, ANSWERS)
            self._answers[request.tenant] = count, mean + (tokens - mean) / count
            if len(self._answers) > MOST_TENANTS:
                del self._answers[next(iter(self._answers))]


class _Flow(Generic[T]):
    """What waits of one tenant in one class. ``served`` is what it was charged; ``listed``: the heap has an
    entry with that."""

    __slots__ = ("listed", "priority", "queue", "served")

    def __init__(self, priority: int, queue: WaitingQueue[T]) -> None:
        self.priority = priority
        self.queue = queue
        self.served = 0.0
        self.listed = False


class SharedQueue(WaitingQueue[T]):
    """Serves the class of least ``Ticket.priority``, in it the tenant that was charged least, of its requests
    the one that an order says: ``make`` makes that order's queues.

    Start-time fair queueing (Goyal, Vin and Cheng 1996), with the charges of VTC: who comes back after having
    waited for nothing begins where the last one served stood, so nobody saves up, and once nobody waits all
    are even. While two tenants of a class both wait, what they are charged differs by at most one charge of
    each.

    If the one that came first of all has waited more than ``bound`` times its own TTFT target, its tenant is
    next whatever its class, once in ``SERVINGS_PER_STARVED``. With one class and one tenant this is the order
    itself.
    """

    def __init__(self, make: Callable[[], WaitingQueue[T]], bound: float = STARVATION_BOUND) -> None:
        super().__init__()
        self._make = make
        self._bound = bound
        self._flows: dict[tuple[int, str], _Flow[T]] = {}
        self._heap: list[tuple[int, float, int, _Flow[T]]] = []
        self._entries = 0
        self._floors: dict[int, float] = {}
        self._most: dict[int, float] = {}
        self._since_starved = SERVINGS_PER_STARVED
        self._limit = MOST_FLOWS

    def push(self, item: T, ticket: Ticket) -> None:
        super().push(item, ticket)
        key = ticket.priority, ticket.tenant
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= self._limit:
                self._forget()
            flow = self._flows[key] = _Flow(ticket.priority, self._make())
        if not flow.queue:
            floor = self._floors.get(ticket.priority, 0.0)
            if flow.served < floor:
                flow.served, flow.listed = floor, False
            if not flow.listed:
                self._list(flow)
        flow.queue.push(item, ticket)

    def head(self, now: float, batched: int = 0) -> T | None:
        if self._front:
            return super().head(now)
        flow = self._next(now)
        return None if flow is None else flow.queue.head(now, batched)

    def pop(self, now: float) -> T:
        flow = None if self._front else self._next(now)
        if flow is None:
            return super().pop(now)
        if flow is self._heap[0][-1]:
            self._since_starved += 1
            self._floors[flow.priority] = flow.served
        else:
            self._since_starved = 1
        item = flow.queue.pop(now)
        charge = self._line.pop(item).charge
        if charge:
            flow.served += charge
            flow.listed = False
            self._most[flow.priority] = max(self._most.get(flow.priority, 0.0), flow.served)
            if flow.queue:
                self._list(flow)
            elif not self._line:
                self._floors.update(self._most)
        return item

    def remove(self, item: T) -> bool:
        ticket = self._line.get(item)
        if ticket is not None:
            self._flows[ticket.priority, ticket.tenant].queue.remove(item)
        return super().remove(item)

    def _list(self, flow: _Flow[T]) -> None:
        heappush(self._heap, (flow.priority, flow.served, self._entries, flow))
        self._entries += 1
        flow.listed = True

    def _next(self, now: float) -> _Flow[T] | None:
        """Return whose request is next, or None without any."""
        heap = self._heap
        while heap:
            _, served, _, flow = heap[0]
            if served == flow.served and flow.queue:
                break
            heappop(heap)
            if served == flow.served:
                flow.listed = False
        if not heap:
            return None
        if len(heap) > 1 and self._since_starved >= SERVINGS_PER_STARVED:
            ticket = next(iter(self._line.values()))
            if ticket.priority > flow.priority and now > ticket.starved_at_s(self._bound):
                return self._flows[ticket.priority, ticket.tenant]
        return flow

    def _forget(self) -> None:
        self._flows = {
            key: flow
            for key, flow in self._flows.items()
            if flow.queue or flow.served > self._floors.get(flow.priority, 0.0)
        }
        self._limit = max(MOST_FLOWS, 2 * len(self._flows))


def shared_queue(order: Order) -> WaitingQueue[Any]:
    """Return an empty queue that serves by class and share, then by ``order``."""
    return SharedQueue(order.queue)
