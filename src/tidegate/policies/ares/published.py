"""ARES as published, in its second version STAR (arXiv 2510.13668): placement and rescheduling of decodes.

The paper's text is not public to us. Known are the structure (classify by current and predicted load against
the cluster's mean, filter by transfer time, simulate each move, commit the one that lowers the variance of
loads most, periodically) and the inputs of the first placement; the formulas and every constant are our
reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tidegate.core.decision import ControlDecision, Migrate, Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.costs.profile import pick
from tidegate.ledger.snapshot import EVERYONE, Column, Mask, Matrix, Snapshot
from tidegate.policies.ares.loads import Columns, DecodeLoads, Horizon, LoadBoard
from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.policies.protocols import Signal

PERIOD_S = 1.0
MOST_SEARCHED = 32
"""So many of the overloaded instances, the fullest, and of the underloaded ones, the emptiest, are searched
(ours): a round costs no more the larger the fleet is."""


BLOCK = 256
"""So many candidates are simulated at once: for more, BLAS wakes threads, which costs more than it saves."""


@dataclass(frozen=True, slots=True)
class AresConstants:
    """The constants of a round; all are ours.

    An instance is over- or underloaded beyond ``theta`` of the mean. KV may fill up to the share ``safety``.
    A decode moves when what is left of it takes ``kappa`` times its transfer, at most once per
    ``cooldown_s``, and when that takes more off the variance than the share ``epsilon`` of what two instances
    contribute to it: of the whole, one move could not in a large fleet. ``most_moves`` a round.
    """

    horizon: Horizon = field(default_factory=Horizon)
    theta: float = 0.1
    safety: float = 0.95
    kappa: float = 5.0
    epsilon: float = 0.05
    most_moves: int = 4
    cooldown_s: float = 10.0


@dataclass(frozen=True, slots=True)
class AresPlacement:
    """Decodes go where the variance of the loads becomes least.

    The paper places them by input length, predicted length and loads; it has no rule for prefills.
    """

    board: LoadBoard[DecodeLoads]
    constants: AresConstants = field(default_factory=AresConstants)
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.LENGTHS})

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Simulate the decode on every instance; of those that can hold it take the least variance.

        Only the sum of (its curve times the load) differs between instances: the rest of the variance is
        the same wherever it goes. Where nobody can hold it, it goes where the most room is.
        """
        loads = self.board.latest(snapshot)
        if not len(loads.columns):
            return MINIMAL_LOAD.place_decode(request, snapshot, prefill_on)
        curve, last = loads.newcomer(request)
        room = loads.room(self.constants.safety)[:, last]
        imbalance = loads.loads @ (loads.horizon.weights * curve)
        fits = room >= request.prompt_tokens
        chosen = int(np.where(fits, imbalance, np.inf).argmin() if fits.any() else room.argmax())
        loads.add(chosen, curve)
        why = "least variance of the predicted loads" if fits.any() else "nobody has room: the most room"
        place = Place(prefill_on, loads.ids[loads.columns[chosen]], Path.DISAGGREGATED)
        alternatives = loads.compared(
            {"imbalance": imbalance, "missing_tokens": request.prompt_tokens - room}
        )
        return Verdict(place, (), alternatives, why)


@dataclass(frozen=True, slots=True)
class AresRescheduler:
    """One round per period: classify, filter, simulate, pick, up to ``most_moves`` times."""

    board: LoadBoard[DecodeLoads]
    constants: AresConstants = field(default_factory=AresConstants)
    period_s: float = PERIOD_S
    name: str = "reschedule"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.LENGTHS})

    def initial(self) -> None:
        """Return no state: what a round needs to know of former ones is in the snapshot."""

    def decide(self, snapshot: Snapshot, state: None) -> ControlDecision[None]:
        """Return the moves of this round."""
        rows = snapshot.requests
        loads = self.board.renewed(snapshot, rows)
        if len(loads.columns) < 2:
            return ControlDecision(None)
        over, under = classify(loads, self.constants)
        moves = Moves(snapshot, loads, over, under, self.constants)
        actions: list[Migrate] = []
        while len(actions) < self.constants.most_moves:
            found = moves.best(over, under)
            least = self.constants.epsilon * loads.variance() * 2.0 / len(loads.columns)
            if found is None or moves.gain[found] <= least:
                break
            decode, src, dst = moves.commit(found)
            ids = snapshot.ids
            actions.append(Migrate(rows.requests[decode].id, ids[src], ids[dst], "less variance"))
            over, under = classify(loads, self.constants)
        return ControlDecision(None, tuple(actions), moves_made(actions))


def moves_made(actions: Sequence[Migrate]) -> str:
    """Return what a round says of itself in the journal."""
    return f"moves {len(actions)}" if actions else "no move pays"


def classify(loads: DecodeLoads, constants: AresConstants) -> tuple[Mask, Mask]:
    """Return who is overloaded and who is underloaded: by W against its mean, and by predicted KV."""
    weighted = loads.weighted()
    mean = weighted.mean() if len(weighted) else 0.0
    full = loads.peaks() > constants.safety * loads.capacity_tokens
    over = (weighted > (1.0 + constants.theta) * mean) | full
    under = (weighted < (1.0 - constants.theta) * mean) & ~full
    return over, under


class Moves:
    """The moves of one round: who may leave the overloaded instances, by where to.

    ``gain[candidate, destination]`` is what the move takes off the variance, -inf where it is not to be made.
    A commit changes the loads of two instances: only the moves from the one and to the other are simulated
    again. Places are those of ``DecodeLoads``.
    """

    def __init__(
        self, snapshot: Snapshot, loads: DecodeLoads, over: Mask, under: Mask, constants: AresConstants
    ) -> None:
        self._loads = loads
        self._safety = constants.safety
        decodes, places = loads.decodes, loads.places
        rested = snapshot.at_s - decodes.moved_at_s >= constants.cooldown_s
        weighted = loads.weighted()
        destinations = self._destinations = extreme(under, weighted)
        searched = np.zeros(len(loads.columns) + 1, np.bool_)
        searched[extreme(over, -weighted)] = True  # and not the last one, where decodes elsewhere have theirs
        candidates = self._candidates = np.flatnonzero(decodes.movable & rested & searched[places])
        self._sources = places[candidates]
        self._curves = loads.curves(candidates)
        self._weighted = loads.horizon.weights * self._curves
        self._context = decodes.context_tokens[candidates]
        self._last = loads.last_point(decodes.most_tokens[candidates])
        self._allowed = amortised(snapshot, loads, candidates, destinations, constants.kappa)
        columns = loads.columns
        self._allowed &= ~loads.links_in_use(columns[self._sources], columns[destinations])
        self._at_source: Column = np.empty(len(candidates))
        self._weigh(EVERYONE)
        self.gain: Matrix = self._simulated(EVERYONE, EVERYONE)

    def _weigh(self, candidates: Columns | slice) -> None:
        """Work out the part of these candidates' gains that their sources make."""
        left = self._loads.loads[self._sources[candidates]]
        left -= self._curves[candidates]
        left *= self._weighted[candidates]
        self._at_source[candidates] = left.sum(axis=1)

    def _simulated(self, candidates: Columns | slice, destinations: Columns | slice) -> Matrix:
        """Return the gains of these candidates at these destinations (positions in the table; not arrays
        both).

        Moving curve c from s to d takes (2 / n) * sum of w * c * (load_s - load_d - c) off the variance: the
        loads' mean stays.
        """
        loads = self._loads
        places = self._destinations[destinations]
        weighted, there = self._weighted[candidates], loads.loads[places].T
        gain: Matrix = np.empty((len(weighted), len(places)))
        for start in range(0, len(weighted), BLOCK):
            rows = slice(start, start + BLOCK)
            np.matmul(weighted[rows], there, out=gain[rows])
        np.subtract(self._at_source[candidates][:, None], gain, out=gain)
        gain *= 2.0 / len(loads.loads)
        room = np.ascontiguousarray(loads.room(self._safety, places).T)
        allowed = room.take(self._last[candidates], axis=0) >= self._context[candidates][:, None]
        allowed &= self._allowed[candidates, destinations]
        gain[~allowed] = -np.inf
        return gain

    def best(self, over: Mask, under: Mask) -> tuple[int, int] | None:
        """Return the move of most gain from who is overloaded now to who is underloaded; None without one."""
        sources, destinations = over[self._sources], under[self._destinations]
        gain = np.where(sources[:, None] & destinations, self.gain, -np.inf)
        if not gain.size:
            return None
        candidate, destination = divmod(int(gain.argmax()), gain.shape[1])
        return (candidate, destination) if gain[candidate, destination] > -np.inf else None

    def commit(self, move: tuple[int, int]) -> tuple[int, int, int]:
        """Count a move as made; return its request's row, and the columns that it leaves and goes to."""
        candidate, destination = move
        loads, source, target = self._loads, self._sources[candidate], self._destinations[destination]
        loads.add(source, -self._curves[candidate])
        loads.add(target, self._curves[candidate])
        leaving = np.flatnonzero(self._sources == source)
        self._allowed[candidate] = False
        self._allowed[leaving, destination] = False  # one migration per link
        self._weigh(leaving)
        self.gain[leaving] = self._simulated(leaving, EVERYONE)
        self.gain[:, [destination]] = self._simulated(EVERYONE, np.array([destination]))
        row = int(loads.decodes.row[self._candidates[candidate]])
        return row, int(loads.columns[source]), int(loads.columns[target])


def extreme(members: Mask, key: Column) -> Columns:
    """Return the members, or the ``MOST_SEARCHED`` of them with the least ``key``."""
    found = np.flatnonzero(members)
    return (
        found if len(found) <= MOST_SEARCHED else found[np.argsort(key[found], kind="stable")[:MOST_SEARCHED]]
    )


def amortised(
    snapshot: Snapshot, loads: DecodeLoads, candidates: Columns, destinations: Columns, kappa: float
) -> NDArray[np.bool_]:
    """Tell of each candidate and destination whether what is left of the decode takes ``kappa`` transfers.

    One row per candidate.
    """
    step_s = snapshot.costs.step.seconds(snapshot.decode_requests, snapshot.decode_tokens)
    left_s = loads.decodes.left_tokens[candidates] * np.asarray(step_s)[loads.decodes.on[candidates]]
    allowed = left_s[:, None] >= kappa * transfer_s(snapshot, loads, candidates, destinations)
    return np.array(np.broadcast_to(allowed, (len(candidates), len(destinations))))


def transfer_s(snapshot: Snapshot, loads: DecodeLoads, candidates: Columns, destinations: Columns) -> Matrix:
    """Return what each destination's link takes for the KV of each candidate, one row per candidate; of one
    column where all links are alike."""
    sources = loads.decodes.on[candidates]
    n_bytes = loads.decodes.context_tokens[candidates] * snapshot.kv_bytes_per_token[sources]
    transfer = pick(snapshot.costs.transfer, loads.columns[destinations])
    return np.asarray(transfer.seconds(n_bytes[:, None]))
