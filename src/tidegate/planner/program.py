"""The program: how many replicas of which kind, and who gets which part of the arrivals.

A mixed-integer linear program after AMPD (section 5, an ILP over replicas by phase and tensor-parallel
size), completed. Per kind of replica and role it has a whole count, an indicator that it is used at all, and
the rate that it is sent; a mixed replica divides its time between whole requests, prefills and decodes. At
least one replica serves each phase. What a pool serves depends on its count, and arrivals are split, where
the paper's latency of a kind depends on neither. Solved by HiGHS. Before the next solution is asked for, the
last one's choice of kinds and roles is excluded; other counts of it are found by search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tidegate.core.instance import Role
from tidegate.planner.capacity import Affine
from tidegate.planner.deployment import Deployment, Offer, PoolOf, ReplicaKind, deployment

TIME_LIMIT_S = 10.0
GAP = 0.002
"""Relative distance from the best that is good enough: far below what the coefficients are worth."""
_COST_WEIGHT = 1e-6
"""Of dollars beside requests/s: decides between equals."""


@dataclass(frozen=True, slots=True)
class Option:
    """A kind of replica in a role, and what it serves: alone in the role, and as ``prefill`` or ``decode``
    beside others where it is mixed."""

    role: Role
    kind: ReplicaKind
    chunk_tokens: int
    serves: Affine
    prefill: Affine
    decode: Affine


@dataclass(frozen=True, slots=True)
class Asked:
    """A family of deployments under a budget: the most that they serve, or where ``rate_rps`` is given the
    cheapest that serve it. ``least`` says of which roles there has to be somebody."""

    system: str
    options: Sequence[Option]
    offers: Sequence[Offer]
    least: Sequence[Role]
    rate_rps: float | None = None


def solutions(asked: Asked) -> Iterator[Deployment]:
    """Yield deployments, the best by the model first; ends when there is no other."""
    program = _Program(asked)
    while (counts := program.solve()) is not None:
        program.exclude(counts)
        pools = [
            PoolOf(option.role, option.kind, count, option.chunk_tokens)
            for option, count in zip(asked.options, counts, strict=True)
        ]
        yield deployment(asked.system, pools)


class _Program:
    """Columns: the rate, then per option count, used, and rates of whole requests, prefills and decodes."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._many = len(asked.options)
        self._columns = 1 + 5 * self._many
        self._rows: list[tuple[dict[int, float], float, float]] = []
        budget = {offer.gpu: offer.count for offer in asked.offers}
        self._most = [budget[option.kind.gpu] // option.kind.tp for option in asked.options]
        self._state()

    def _at(self, part: int, option: int) -> int:
        return 1 + part * self._many + option

    def _state(self) -> None:
        asked, at = self._asked, self._at
        options = list(enumerate(asked.options))
        for each in asked.offers:
            tps = {at(0, i): float(o.kind.tp) for i, o in options if o.kind.gpu == each.gpu}
            self._rows.append((tps, 0.0, float(each.count)))
        for i, option in options:
            # used <= count <= most * used
            self._rows.append(({at(0, i): 1.0, at(1, i): -1.0}, 0.0, np.inf))
            self._rows.append(({at(0, i): 1.0, at(1, i): -float(self._most[i])}, -np.inf, 0.0))
            self._rows.append((self._time(i, option), -np.inf, 0.0))
        for role, kind in {(o.role, o.kind) for o in asked.options}:  # one chunk for each kind in a role
            same = {at(1, i): 1.0 for i, o in options if (o.role, o.kind) == (role, kind)}
            self._rows.append((same, 0.0, 1.0))
        for role in asked.least:
            some = {at(1, i): 1.0 for i, o in options if o.role is role}
            self._rows.append((some, 1.0, np.inf))
        for part in (3, 4):  # prefills and decodes of requests that no replica serves whole
            split = {at(part, i): 1.0 for i, _ in options} | {at(2, i): 1.0 for i, _ in options} | {0: -1.0}
            self._rows.append((split, 0.0, 0.0))

    def _time(self, i: int, option: Option) -> dict[int, float]:
        """Return the row that no replica works more than all the time: what it is sent, less what its count
        serves."""
        at, serves = self._at, option.serves
        row = {at(0, i): -1.0, at(1, i): serves.lost_rps / max(serves.each_rps, 1e-9)}
        for part, rates in ((2, serves), (3, option.prefill), (4, option.decode)):
            if self._takes(option, part) and rates.each_rps > 0.0:
                row[at(part, i)] = 1.0 / rates.each_rps
        return row

    @staticmethod
    def _takes(option: Option, part: int) -> bool:
        return option.role is {2: Role.MIXED, 3: Role.PREFILL, 4: Role.DECODE}[part] or (
            option.role is Role.MIXED
        )

    def exclude(self, counts: Sequence[int]) -> None:
        """Rule one solution's choice of options out: some other is used, or some of them is not."""
        row = {self._at(1, i): -1.0 if count else 1.0 for i, count in enumerate(counts)}
        self._rows.append((row, 1.0 - sum(count > 0 for count in counts), np.inf))

    def solve(self) -> list[int] | None:
        """Return the counts of the best solution that is not excluded, None where there is none."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # half a second to import
        from scipy.sparse import csr_array

        asked, many = self._asked, self._many
        upper = np.full(self._columns, 1.0)
        upper[0] = np.inf
        upper[1 : 1 + many] = self._most
        lower = np.zeros(self._columns)
        for part in (2, 3, 4):
            for i, option in enumerate(asked.options):
                rates = (option.serves, option.prefill, option.decode)[part - 2]
                able = self._takes(option, part) and rates.each_rps > 0.0
                upper[self._at(part, i)] = np.inf if able else 0.0
        cost = np.zeros(self._columns)
        prices = [option.kind.price_per_h for option in asked.options]
        if asked.rate_rps is None:
            cost[0] = -1.0
            cost[1 : 1 + many] = _COST_WEIGHT * np.array(prices)
        else:
            lower[0] = upper[0] = asked.rate_rps
            cost[1 : 1 + many] = np.array(prices) + 1e-4
        integral = np.zeros(self._columns)
        integral[1 : 1 + 2 * many] = 1
        matrix, low, high = self._matrix(csr_array)
        found = milp(
            cost,
            integrality=integral,
            bounds=Bounds(lower, upper),
            constraints=LinearConstraint(matrix, low, high),
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": GAP},
        )
        if found.x is None or (asked.rate_rps is None and found.x[0] <= 1e-9):
            return None
        return [round(value) for value in found.x[1 : 1 + many]]

    def _matrix(self, sparse: type) -> tuple[object, NDArray[np.float64], NDArray[np.float64]]:
        entries = [(r, c, v) for r, (row, _, _) in enumerate(self._rows) for c, v in row.items()]
        rows, columns, values = zip(*entries, strict=True)
        shape = len(self._rows), self._columns
        low, high = (np.array([row[end] for row in self._rows]) for end in (1, 2))
        return sparse((values, (rows, columns)), shape=shape), low, high


def options_of(
    roles: Sequence[Role],
    kinds: Sequence[ReplicaKind],
    chunks: Mapping[Role, Sequence[int]],
    serves: Mapping[tuple[Role, ReplicaKind, int], Affine],
) -> list[Option]:
    """Return every kind in every role with every chunk; those that serve nothing are left out."""
    found = []
    for role in roles:
        for kind in kinds:
            for chunk in chunks[role]:
                own = serves[role, kind, chunk]
                if own.each_rps <= 0.0:
                    continue
                prefill = serves[Role.PREFILL, kind, chunk] if role is Role.MIXED else own
                decode = serves[Role.DECODE, kind, chunk] if role is Role.MIXED else own
                found.append(Option(role, kind, chunk, own, prefill, decode))
    return found
