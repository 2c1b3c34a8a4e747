"""Emptying decode instances that a low load does not need, and taking them back when it returns (ours).

Placements that avoid damage spread decodes over all instances, so that at night every one holds a few, and
none can be stopped or flipped. Here one after the other is drained, without being removed, as long as the
rest would carry a good deal more than what is there and predicted. What was drained stands ready, and is
taken back as soon as the rest would not carry a little more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tidegate.core.decision import Action, ControlDecision, Drain, Undrain
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.ares.damage import Damage, Terms
from tidegate.policies.ares.loads import Columns
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class ConsolidationConstants:
    """The constants of the controller; all are ours.

    Instances carry a load when the damage that they head for under it is at most ``most_s`` seconds. One is
    drained after the others would have carried ``spare`` times the load for ``steady_s``; one is taken back
    where those left would not carry ``needed`` times the load. After that none is drained for ``cooldown_s``.
    """

    terms: Terms = field(default_factory=Terms)
    most_s: float = 1.0
    spare: float = 2.0
    needed: float = 1.2
    steady_s: float = 30.0
    cooldown_s: float = 300.0


class Emptied(NamedTuple):
    """The names of those drained, in that order; since when one more could be spared (inf: it could not), and
    when one was taken back last."""

    names: tuple[str, ...] = ()
    spare_since_s: float = math.inf
    back_at_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class Consolidation:
    """Drains the decode instance that holds least while the load is low, and takes it back when it returns.

    The executor of a drain moves the decodes to where the system would place them. An instance that someone
    else drains is neither counted nor touched, and the last one that decodes is never drained.
    """

    constants: ConsolidationConstants = field(default_factory=ConsolidationConstants)
    period_s: float = 5.0
    name: str = "consolidate"
    needs: frozenset[Signal] = frozenset({Signal.PROFILE, Signal.LENGTHS})

    def initial(self) -> Emptied:
        """Return that nothing is drained."""
        return Emptied()

    def decide(self, snapshot: Snapshot, state: Emptied) -> ControlDecision[Emptied]:
        """Return at most one drain, or the returns that the load calls for."""
        constants, at_s = self.constants, snapshot.at_s
        draining, index = snapshot.draining, snapshot.index
        names = tuple(each for each in state.names if each not in index or draining[index[each]])
        damage = Damage(snapshot, snapshot.requests, constants.terms)
        decoding = np.flatnonzero(damage.targets)
        up = [each for each in names if each in index]
        back = _lacking(damage, decoding, len(up), constants)
        if back:
            up.sort(key=lambda each: (snapshot.decode_requests[index[each]], names.index(each)))
            taken = up[-back:]
            left = tuple(each for each in names if each not in taken)
            back_at_s = at_s if taken else state.back_at_s
            actions = [Undrain(each, "the load needs it again") for each in taken]
            return _decided(Emptied(left, back_at_s=back_at_s), *actions)
        labelled = decoding[snapshot.labelled(Role.DECODE)[damage.loads.columns[decoding]]]
        least = int(labelled[damage.totals[labelled, 1, 0].argmin()]) if len(labelled) else -1
        others = decoding[decoding != least]
        if least < 0 or not _carry(damage, others, constants.spare, constants):
            return _decided(Emptied(names, back_at_s=state.back_at_s))
        since_s = min(state.spare_since_s, at_s)
        rested = at_s - state.back_at_s >= constants.cooldown_s
        if at_s - since_s < constants.steady_s or not rested:
            return _decided(Emptied(names, since_s, state.back_at_s))
        name = damage.loads.ids[damage.loads.columns[least]]
        why = f"the others would carry {constants.spare:g} times the load"
        return _decided(Emptied((*names, name), at_s, state.back_at_s), Drain(name, reason=why))


def _lacking(damage: Damage, decoding: Columns, most: int, constants: ConsolidationConstants) -> int:
    """Return how many instances more, taken to be like those that decode, the load needs: at most
    ``most``, but 1 where there is none and it needs some."""
    now = len(decoding)
    least = 1 if not now or damage.seconds.sum() > constants.most_s else 0
    for more in range(least, most + 1):
        if _carry(damage, decoding, constants.needed * now / (now + more), constants):
            return more
    return max(most, 1)


def _carry(damage: Damage, places: Columns, times: float, constants: ConsolidationConstants) -> bool:
    """Tell whether these instances carry ``times`` all decodes, those on instances that drain included,
    spread evenly over them. None carry nothing."""
    decodes = np.arange(len(damage.tpot_s))
    if not len(places) or not len(decodes):
        return len(places) > 0
    each = damage.outlooks(decodes).sum(axis=0) * (times / len(places))
    shares = np.broadcast_to(each, (len(places), *each.shape))
    seconds = damage.of(shares, places, float(damage.tpot_s.mean())).sum()
    return bool(seconds <= constants.most_s)


def _decided(state: Emptied, *actions: Action) -> ControlDecision[Emptied]:
    return ControlDecision(state, actions, f"{len(state.names)} drained: {', '.join(state.names) or 'none'}")
