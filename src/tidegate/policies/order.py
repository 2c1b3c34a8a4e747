"""The order in which waiting prefills are served: by an engine's scheduler, simulated or real, and by the
gateway for requests it holds.

Orders differ in who misses when not everybody can be served in time; none of them preempts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, Generic, NamedTuple, TypeVar

from tidegate.core.errors import InternalError
from tidegate.core.load_forecast import LoadForecast
from tidegate.core.request import Request
from tidegate.core.slo import Slo

T = TypeVar("T")

HELD = "held-"
"""Before an order's name: the control plane keeps it."""

STARVATION_BOUND = 120.0
"""A request that has waited this many times its own TTFT target is served before all others. Ours: a bound
relative to the target scales with what the request's sender considers long. 120 is a minute at 500 ms, about
what clients wait. Once more wait for longer than the bound than can be served, every order is that of
arrival again: with 20, an overload of ten seconds undid what ordering had won (``docs/log.md``)."""

PATIENCE_S = 1.0
"""How long the head of an engine's queue waits where nothing but pinned KV is in its way, before that ends
(ours): many times a pull."""


class Ticket(NamedTuple):
    """What an instance's queue is told of one prefill: arrival and TTFT deadline on the driver's clock, the
    predicted seconds of its own prefill, the reading of a history included, and the prompt tokens that it has
    to compute. ``deadline_s`` is not before ``arrival_s``. ``long_tokens`` is the mean prompt that a forecast
    expects; 0 where there is none.

    ``priority``, ``tenant`` and ``charge`` say whose it is (``shares.py``): the class, of which lower ones go
    first, who shares it, and what is taken of that share.

    The others are no matter of order. ``chunk_tokens`` is ``Place.chunk_tokens``. ``tpot_s`` is the TPOT
    target, infinite where none is known. ``first_token_s`` tells of an answer that has begun when its first
    token went out: then nothing is left to order (``decode_ticket``).
    """

    arrival_s: float
    deadline_s: float
    work_s: float
    tokens: int = 0
    long_tokens: float = 0.0
    chunk_tokens: int | None = None
    tpot_s: float = inf
    first_token_s: float | None = None
    priority: int = 0
    tenant: str = ""
    charge: float = 0.0

    def on_clock(self, offset_s: float) -> Ticket:
        """Return the ticket for a clock that shows ``offset_s`` more than the one it was made for."""
        begun_s = self.first_token_s
        return self._replace(
            arrival_s=self.arrival_s + offset_s,
            deadline_s=self.deadline_s + offset_s,
            first_token_s=None if begun_s is None else begun_s + offset_s,
        )

    def starved_at_s(self, bound: float) -> float:
        """When the request has waited ``bound`` times its own TTFT target, ``bound`` >= 1."""
        return max(self.deadline_s, self.arrival_s + bound * (self.deadline_s - self.arrival_s))


UNKNOWN = Ticket(0.0, Slo().ttft_s, 0.0)
"""The ticket, from its submission on, of a leg that came without one: a pin of a history, say."""


def prefill_ticket(
    request: Request,
    work_s: float,
    on: str,
    forecast: LoadForecast | None,
    chunk_tokens: int | None = None,
) -> Ticket:
    """Return the ticket of a prefill predicted to take ``work_s`` by itself, on the clock of its arrival.

    ``on`` is where it is to run, "" while that is open; what is cached there is not of its tokens.
    """
    long_tokens = 0.0 if forecast is None else float(forecast.input_tokens.mean[0])
    return Ticket(
        request.arrival_s,
        request.arrival_s + request.slo.ttft_s,
        work_s,
        max(1, request.prompt_tokens - request.cached.get(on, 0)),
        long_tokens if long_tokens > 0 else 0.0,
        chunk_tokens,
        request.slo.tpot_s,
    )


def decode_ticket(request: Request, first_token_s: float) -> Ticket:
    """Return the ticket of a leg that goes on with an answer, whose first token went out then."""
    due_s = request.arrival_s + request.slo.ttft_s
    return Ticket(request.arrival_s, due_s, 0.0, tpot_s=request.slo.tpot_s, first_token_s=first_token_s)


class WaitingQueue(Generic[T]):
    """Waiting work of one instance or scheduler: here first come, first served, in other orders below.

    Items are hashable and wait at most once at a time. ``now`` is when the next one would begin: in a step
    that others share, behind them. It never decreases from call to call, but for what a prediction of a step
    errs by. Ties go by push order, so the same calls serve the same sequence. ``push``, ``pop`` and ``head``
    cost O(log n) amortised, the others O(1). A push of what waits already raises InternalError.
    """

    def __init__(self) -> None:
        self._front: OrderedDict[T, None] = OrderedDict()
        self._line: OrderedDict[T, Ticket] = OrderedDict()

    def push(self, item: T, ticket: Ticket) -> None:
        """Let ``item`` wait."""
        self._refuse_twice(item)
        self._line[item] = ticket

    def push_front(self, item: T) -> None:
        """Let ``item`` (preempted work) wait before all others, also before earlier ``push_front`` ones."""
        self.push_continued(item)
        self._front.move_to_end(item, last=False)

    def push_continued(self, item: T) -> None:
        """Let ``item``, whose first token has gone out already, wait: it has no TTFT left to meet or miss.

        It is served after ``push_front`` ones and before all with a ticket, in push order.
        """
        self._refuse_twice(item)
        self._front[item] = None

    def head(self, now: float, batched: int = 0) -> T | None:
        """Return who is next at ``now``, or None when nobody waits. Serves nobody; ``pop`` does.

        ``batched`` prompt tokens are in a step already; None also where nobody is to join them.
        """
        return next(iter(self._front or self._line), None)

    def pop(self, now: float) -> T:
        """Serve the head. Raises InternalError when nobody waits."""
        first = self._front or self._line
        if not first:
            raise InternalError("nothing waits in this queue")
        return first.popitem(last=False)[0]

    def remove(self, item: T) -> bool:
        """Take ``item`` out unserved; False when it does not wait."""
        for waiting in (self._line, self._front):
            if item in waiting:
                del waiting[item]
                return True
        return False

    def __len__(self) -> int:
        return len(self._front) + len(self._line)

    def __iter__(self) -> Iterator[T]:
        """Walk over the items: first those that wait before all tickets, then the others as pushed."""
        yield from self._front
        yield from self._line

    def _refuse_twice(self, item: T) -> None:
        if item in self._line or item in self._front:
            raise InternalError("this item waits in the queue already")


class _Entry(Generic[T]):
    """A pushed item. ``waits`` turns false once it is served or removed: heaps drop it when they meet it."""

    __slots__ = ("item", "ticket", "turn", "waits")

    def __init__(self, item: T, ticket: Ticket, turn: int) -> None:
        self.item = item
        self.ticket = ticket
        self.turn = turn
        self.waits = True


class _LazyHeap(Generic[T]):
    """Entries by a key, ties by turn. Dead entries go when they surface, or when they outnumber the rest."""

    __slots__ = ("_heap", "_limit")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Entry[T]]] = []
        self._limit = 64

    def push(self, key: float, entry: _Entry[T]) -> None:
        if len(self._heap) >= self._limit:
            self._heap = [row for row in self._heap if row[2].waits]
            heapify(self._heap)
            self._limit = max(64, 2 * len(self._heap))
        heappush(self._heap, (key, entry.turn, entry))

    def top(self) -> _Entry[T] | None:
        heap = self._heap
        while heap:
            entry = heap[0][2]
            if entry.waits:
                return entry
            heappop(heap)
        return None

    def take(self) -> None:
        heappop(self._heap)


class RankedQueue(WaitingQueue[T]):
    """Serves by least ``rank`` of the ticket, but whoever has starved first.

    Starved is who has waited more than ``bound`` times its own TTFT target; among those, whose bound
    passed first.
    """

    def __init__(self, rank: Callable[[Ticket], float], bound: float) -> None:
        super().__init__()
        self._rank = rank
        self._bound = bound
        self._turn = 0
        self._entries: dict[T, _Entry[T]] = {}
        self._ranked: _LazyHeap[T] = _LazyHeap()
        self._starving: _LazyHeap[T] = _LazyHeap()

    def push(self, item: T, ticket: Ticket) -> None:
        super().push(item, ticket)
        entry = self._entries[item] = _Entry(item, ticket, self._turn)
        self._turn += 1
        self._enter(entry)

    def head(self, now: float, batched: int = 0) -> T | None:
        if self._front:
            return super().head(now)
        entry = self._next(now)
        return None if entry is None else entry.item

    def pop(self, now: float) -> T:
        entry = None if self._front else self._next(now)
        if entry is None:
            return super().pop(now)
        self.remove(entry.item)
        return entry.item

    def remove(self, item: T) -> bool:
        entry = self._entries.pop(item, None)
        if entry is not None:
            entry.waits = False
        return super().remove(item)

    def _enter(self, entry: _Entry[T]) -> None:
        self._ranked.push(self._rank(entry.ticket), entry)
        self._starving.push(entry.ticket.starved_at_s(self._bound), entry)

    def _next(self, now: float) -> _Entry[T] | None:
        """Return who is next among the entries, or None without any."""
        return self._starved(now) or self._ranked.top()

    def _starved(self, now: float) -> _Entry[T] | None:
        first = self._starving.top()
        if first is not None and now > first.ticket.starved_at_s(self._bound):
            return first
        return None


class FeasibleQueue(RankedQueue[T]):
    """Serves by least ``rank`` among those that can still meet their deadline; the hopeless ones after them,
    first come, first served; whoever has starved before all.

    Hopeless is who would miss its deadline if it started when the next one begins; that lasts, also where a
    step ends sooner than predicted, or one that shared it would just be in time. Every starved request is
    hopeless, because its deadline has passed. Ours, after Moore 1968, who minimises the number of late jobs
    by setting some aside; here only those are set aside that would be late even if they started now.
    """

    def __init__(self, rank: Callable[[Ticket], float], bound: float) -> None:
        super().__init__(rank, bound)
        self._hopeless: _LazyHeap[T] = _LazyHeap()

    def _next(self, now: float) -> _Entry[T] | None:
        feasible = self._ranked.top()
        while feasible is not None and now > feasible.ticket.deadline_s - feasible.ticket.work_s:
            self._ranked.take()
            self._hopeless.push(feasible.turn, feasible)
            feasible = self._ranked.top()
        return self._starved(now) or feasible or self._hopeless.top()


LONG_TOKENS = 1024.0
"""The mean prompt that a queue assumes before its first one, where nothing is forecast (ours)."""
MEAN_PROMPTS = 100
"""Over so many prompts a queue smooths the mean of their tokens, where nothing is forecast (ours)."""
OVERTAKEN = 0.15
"""What may overtake a prompt, as a share of the work before it when it came (ours, like ``SLACK``)."""
SLACK = 0.05
"""What may overtake it besides, as a share of its TTFT target."""
SHARED = 0.5
"""Of the mean prompt, what a step may hold per prompt that waits (ours)."""


class LengthAwareQueue(RankedQueue[T]):
    """Serves the shortest predicted prefill, as long as nobody is overtaken by more than is allowed; then in
    order of arrival. A step holds few prompts while few wait.

    DOPD, section 3.8 in the notes on its papers: long prompts alone, short ones together up to a cap on
    tokens, by value over length. Its constants are unknown; ours were chosen by measurement
    (docs/policies/dopd.md). Every first token has the value 1: values that grow with waiting did worse.

    - *Overtaking*: a prompt that came with work w before it may be overtaken by ``OVERTAKEN`` * w, and by
      ``SLACK`` of its target. Once the oldest could be overtaken by more, it is next; so nobody is overtaken
      by more than is allowed to him or to one that waited before him when he came. In seconds of predicted
      work, not of a clock: an instance that is slower than predicted is slower for all.
    - *Sharing a step*: a prompt joins others if their tokens with its own are at most ``SHARED`` mean prompts
      per prompt that waits. Sharing saves those that wait a step's fixed cost, and delays the first tokens of
      those in the step until all are computed. So short prompts share, a long one (above the mean) is alone
      and at once unless several wait, and under overload steps are full.
    """

    def __init__(self, bound: float) -> None:
        super().__init__(by_work, bound)
        self._pushed_s = 0.0
        self._gone_s = 0.0
        self._allowed_s: dict[T, float] = {}
        self._mean_tokens = LONG_TOKENS

    def push(self, item: T, ticket: Ticket) -> None:
        super().push(item, ticket)
        before_s, target_s = self._pushed_s - self._gone_s, ticket.deadline_s - ticket.arrival_s
        self._allowed_s[item] = self._pushed_s + OVERTAKEN * before_s + SLACK * target_s
        self._pushed_s += ticket.work_s
        self._mean_tokens += (ticket.tokens - self._mean_tokens) / MEAN_PROMPTS

    def head(self, now: float, batched: int = 0) -> T | None:
        item = super().head(now)
        if item is None or not batched or item not in self._line:
            return item
        ticket = self._line[item]
        room = SHARED * (ticket.long_tokens or self._mean_tokens) * len(self._line)
        return item if batched + ticket.tokens <= room else None

    def remove(self, item: T) -> bool:
        ticket = self._line.get(item)
        if ticket is not None:
            del self._allowed_s[item]
            self._gone_s += ticket.work_s
            if len(self._line) == 1:
                self._pushed_s = self._gone_s = 0.0  # so that rounding does not add up
        return super().remove(item)

    def _next(self, now: float) -> _Entry[T] | None:
        shortest = self._ranked.top()
        if shortest is None:
            return None
        oldest = next(iter(self._line))
        if self._gone_s + shortest.ticket.work_s > self._allowed_s[oldest]:
            shortest = self._entries[oldest]
        return self._starved(now) or shortest


def by_deadline(ticket: Ticket) -> float:
    """Earliest deadline first (Jackson 1955: least maximum lateness; Liu and Layland 1973).

    Beyond saturation it keeps serving those that are late already.
    """
    return ticket.deadline_s


def by_work(ticket: Ticket) -> float:
    """Shortest predicted prefill first (Smith 1956: least mean wait)."""
    return ticket.work_s


@dataclass(frozen=True, slots=True)
class Order:
    """Makes queues of one order, which share nothing; ``name`` is that in ``ORDERS`` (``orders.py``).

    ``held``: the control plane keeps it, which holds prompts back; engines serve by arrival what they get.
    """

    name: str
    make: Callable[[], WaitingQueue[Any]]
    held: bool = False

    @property
    def in_engines(self) -> Order:
        """The order of the engines' own queues."""
        return FIFO if self.held else self

    def holding(self) -> Order:
        """Return the same order, kept by the control plane; its name begins with ``HELD``."""
        return self if self.held else Order(HELD + self.name, self.make, True)

    def queue(self) -> WaitingQueue[Any]:
        """Return an empty queue."""
        return self.make()


FIFO = Order("fifo", WaitingQueue)
"""What vLLM does unless told otherwise. Nobody starves."""
