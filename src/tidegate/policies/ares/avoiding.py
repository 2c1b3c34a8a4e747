"""ARES with another objective: moves avoid seconds of SLO damage, at a price (ours)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tidegate.core.decision import ControlDecision, Migrate, Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Column, Mask, Matrix, Snapshot
from tidegate.policies.ares.damage import Damage, Terms
from tidegate.policies.ares.loads import Columns, LoadBoard
from tidegate.policies.ares.published import PERIOD_S, amortised, moves_made, transfer_s
from tidegate.policies.baselines import MINIMAL_LOAD
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class AvoidingConstants:
    """The constants of a round; all are ours.

    A move has to avoid ``least_s`` seconds of damage beyond its price, and what is left of the decode has to
    take ``kappa`` transfers. A decode moves at most once per ``cooldown_s``; ``most_moves`` a round. Looked
    at are the ``tried`` decodes of most relief on the ``sources`` worst instances, and the ``destinations``
    best instances. A move leaves the share ``kv_reserve`` of its destination's KV free, as placements do:
    what a newcomer needs for its first token, or to decode without any move, no move takes (0: all may go).
    """

    terms: Terms = field(default_factory=Terms)
    least_s: float = 1.0
    kappa: float = 5.0
    cooldown_s: float = 5.0
    most_moves: int = 4
    sources: int = 8
    tried: int = 32
    destinations: int = 16
    kv_reserve: float = 0.0


@dataclass(frozen=True, slots=True)
class AvoidingPlacement:
    """Decodes go where they add least damage."""

    board: LoadBoard[Damage]
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.LENGTHS})

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Place the decode where the damage grows least; among equals where the least is held meanwhile."""
        damage = self.board.latest(snapshot)
        loads = damage.loads
        if not damage.targets.any():
            return MINIMAL_LOAD.place_decode(request, snapshot, prefill_on)
        block, everyone = damage.newcomer(request), np.arange(len(loads.columns))
        added_s = damage.of(damage.totals + block, everyone, request.slo.tpot_s) - damage.seconds
        held = damage.totals[:, 1] @ (loads.horizon.weights * block[1])
        order = np.lexsort((held, np.round(added_s, 1)))
        chosen = int(order[damage.targets[order]][0])
        damage.add(chosen, block, request.slo.tpot_s)
        place = Place(prefill_on, loads.ids[loads.columns[chosen]], Path.DISAGGREGATED)
        alternatives = loads.compared({"added_damage_s": added_s, "beside_tokens2": held})
        return Verdict(place, (), alternatives, "least SLO damage added")


@dataclass(frozen=True, slots=True)
class AvoidingRescheduler:
    """Once per period moves the decodes whose moves avoid most damage, as long as that exceeds their price.

    Decodes on an instance that prefills, left behind by a flip or put there when decode instances were full,
    move by the same rule: prefills stretch their gaps, which is damage as far as it misses their target.
    """

    board: LoadBoard[Damage]
    constants: AvoidingConstants = field(default_factory=AvoidingConstants)
    period_s: float = PERIOD_S
    name: str = "reschedule"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.LENGTHS})

    def initial(self) -> None:
        """Return no state: what a round needs to know of former ones is in the snapshot."""

    def decide(self, snapshot: Snapshot, state: None) -> ControlDecision[None]:
        """Return the moves of this round."""
        rows = snapshot.requests
        damage = self.board.renewed(snapshot, rows)
        choice = Reliefs(snapshot, damage, self.constants)
        actions: list[Migrate] = []
        while len(actions) < self.constants.most_moves:
            move = choice.best()
            if move is None:
                break
            decode, target, avoided_s = move
            decodes, ids = damage.loads.decodes, snapshot.ids
            src, dst = ids[decodes.on[decode]], ids[damage.loads.columns[target]]
            why = f"avoids {avoided_s:.1f} s of SLO damage"
            actions.append(Migrate(rows.requests[decodes.row[decode]].id, src, dst, why))
            choice.commit(decode, target)
        return ControlDecision(None, tuple(actions), moves_made(actions))


class Reliefs:
    """Which decodes of one round may move where, and what each move is worth."""

    def __init__(self, snapshot: Snapshot, damage: Damage, constants: AvoidingConstants) -> None:
        self._snapshot, self._damage, self._constants = snapshot, damage, constants
        loads = damage.loads
        decodes = loads.decodes
        self._may_move = decodes.movable & (snapshot.at_s - decodes.moved_at_s >= constants.cooldown_s)
        everyone = np.arange(len(snapshot))
        self._links = loads.links_in_use(everyone, everyone)
        self._relief_s = np.full(len(decodes.row), np.nan)

    def best(self) -> tuple[int, int, float] | None:
        """Return the decode, its destination's place and the seconds avoided; None when nothing pays."""
        damage, constants = self._damage, self._constants
        loads = damage.loads
        candidates, relief_s = self._best_reliefs()
        if not len(candidates):
            return None
        held = damage.totals[:, 1] @ loads.horizon.weights
        order = np.lexsort((held, np.round(damage.seconds, 1)))
        targets = order[damage.targets[order]][: constants.destinations]
        if not len(targets):
            return None
        blocks = damage.outlooks(candidates)[:, None]
        joins_s = damage.tpot_s[candidates][:, None]
        harm_s = damage.of(damage.totals[targets] + blocks, targets, joins_s) - damage.seconds[targets]
        gain_s = relief_s[:, None] - harm_s - self._price_s(candidates, targets)
        sources = loads.places[candidates]
        allowed = amortised(self._snapshot, loads, candidates, targets, constants.kappa)
        allowed &= sources[:, None] != targets
        if constants.kv_reserve:
            allowed &= self._leaves_reserve(candidates, targets)
        allowed &= ~self._links[loads.decodes.on[candidates][:, None], loads.columns[targets]]
        gain_s = np.where(allowed, gain_s, -np.inf)
        candidate, target = divmod(int(gain_s.argmax()), len(targets))
        if not gain_s[candidate, target] >= constants.least_s:
            return None
        return int(candidates[candidate]), int(targets[target]), float(gain_s[candidate, target])

    def _leaves_reserve(self, candidates: Columns, targets: Columns) -> Mask:
        """Tell of each move whether the destination, as full as it is now, keeps its reserve."""
        damage, loads = self._damage, self._damage.loads
        usable = (1.0 - self._constants.kv_reserve) * loads.capacity_tokens[targets]
        room = usable - loads.beside_tokens[targets] - damage.totals[targets, 1, 0]
        return np.asarray(loads.decodes.context_tokens[candidates][:, None] <= room)

    def _best_reliefs(self) -> tuple[Columns, Column]:
        """Return the decodes whose going would relieve their instances most, and by how much."""
        damage, constants = self._damage, self._constants
        loads = damage.loads
        worst = np.argsort(-damage.seconds, kind="stable")[: constants.sources]
        worst = worst[damage.seconds[worst] >= constants.least_s]
        on_worst = np.zeros(len(loads.columns) + 1, np.bool_)
        on_worst[worst] = True  # and not the last one, where decodes elsewhere have theirs
        candidates = np.flatnonzero(self._may_move & on_worst[loads.places])
        self._relieve(candidates[np.isnan(self._relief_s[candidates])])
        relief_s = self._relief_s[candidates]
        most = np.argsort(-relief_s, kind="stable")[: constants.tried]
        most = most[relief_s[most] >= constants.least_s]
        return candidates[most], relief_s[most]

    def _relieve(self, decodes: Columns) -> None:
        """Work out what the going of these decodes would relieve their instances of."""
        damage = self._damage
        places = damage.loads.places[decodes]
        without = damage.totals[places] - damage.outlooks(decodes)
        with_s, without_s = damage.seconds[places], damage.of(without, places, -damage.tpot_s[decodes])
        self._relief_s[decodes] = with_s - without_s

    def _price_s(self, candidates: Columns, targets: Columns) -> Matrix:
        """Return what each move costs its request: the pause measured at the destination, or before there is
        one the whole transfer."""
        snapshot, loads = self._snapshot, self._damage.loads
        pause_s = snapshot.move_pause_s[loads.columns[targets]]
        return np.where(pause_s > 0, pause_s, transfer_s(snapshot, loads, candidates, targets))

    def commit(self, decode: int, target: int) -> None:
        """Count a move as made."""
        damage = self._damage
        loads = damage.loads
        source, block = int(loads.places[decode]), damage.outlooks(np.array([decode]))[0]
        damage.add(source, -block, -damage.tpot_s[decode])
        damage.add(target, block, damage.tpot_s[decode])
        self._relief_s[np.isin(loads.places, (source, target))] = np.nan
        self._may_move[decode] = False
        self._links[loads.decodes.on[decode], loads.columns[target]] = True
