"""``tidegate`` without each of its parts: what it serves by.

Each function is a system, as ``FILE.py:NAME``. The table of docs/policies/tidegate.md, with the two parts
that have a name of their own, the order (``tidegate+fifo``) and fixed chunks (``tidegate:2048``)::

    tidegate compare --suite traces --requests 2000 --seeds 1 --tolerance 0.02 --out DIR \
        --only "$(python benchmarks/tidegate_parts.py rows)" \
        --systems "$(python benchmarks/tidegate_parts.py)"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from tidegate.core.decision import ControlDecision, Flip
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.baselines import Colocated
from tidegate.policies.protocols import Controller, Signal
from tidegate.policies.tidegate.cost import CostConstants
from tidegate.policies.tidegate.labels import FleetShape, ShapeState
from tidegate.policies.tidegate.placement import OneCost
from tidegate.systems import System, SystemOptions, make_system

ORDER = "feasible-sjf"
"""That of ``tidegate``, named so that a row tries no other."""


@dataclass(frozen=True, slots=True)
class StayingDecodes:
    """Labels as those of ``shape``, but what decodes on an instance that becomes one for prefill stays."""

    shape: FleetShape
    name: str = "shape"

    @property
    def needs(self) -> frozenset[Signal]:
        return self.shape.needs

    @property
    def period_s(self) -> float:
        return self.shape.period_s

    def initial(self) -> ShapeState:
        return self.shape.initial()

    def decide(self, snapshot: Snapshot, state: ShapeState) -> ControlDecision[ShapeState]:
        """Flip as the shape does, for another reason: those that set a target move decodes away."""
        decided = self.shape.decide(snapshot, state)
        flips = tuple(
            replace(action, reason="monitor") if isinstance(action, Flip) else action
            for action in decided.actions
        )
        return decided._replace(actions=flips)


def without_labels(options: SystemOptions) -> System:
    """All do both, for ever."""
    whole = _whole(options)
    return replace(whole, controllers=_but_labels(whole))


def without_moves(options: SystemOptions) -> System:
    """Decodes end where they began, whatever the label becomes."""
    whole = _whole(options)
    shapes = (StayingDecodes(each) for each in whole.controllers if isinstance(each, FleetShape))
    return replace(whole, controllers=(*_but_labels(whole), *shapes))


def without_the_cost(options: SystemOptions) -> System:
    """Both phases where the predicted load is least, as ``colocated`` has it; so there are no labels."""
    both, whole = Colocated(), _whole(options)
    return replace(whole, prefill=both, decode=both, controllers=_but_labels(whole))


def without_lateness(options: SystemOptions) -> System:
    """The cost without what is beyond a target or the reserve of KV."""
    return _priced(options, CostConstants(late_weight=0.0))


def without_reserve(options: SystemOptions) -> System:
    """The cost without a reserve of KV: it counts once a cache is full."""
    return _priced(options, CostConstants(kv_reserve=1e-6))


def _but_labels(whole: System) -> tuple[Controller[Any], ...]:
    return tuple(each for each in whole.controllers if not isinstance(each, FleetShape))


def _priced(options: SystemOptions, constants: CostConstants) -> System:
    both = OneCost(constants)
    return replace(_whole(options), prefill=both, decode=both)


def _whole(options: SystemOptions) -> System:
    return make_system("tidegate", slo=options.slo, split=options.split, tick_s=options.tick_s)


PARTS = (without_labels, without_moves, without_the_cost, without_lateness, without_reserve)

ROWS = ("code", "long", "reasoning", "azure-conv")

if __name__ == "__main__":
    if sys.argv[1:] == ["rows"]:
        print(",".join(f"{row}/8xh100*8b/ideal" for row in ROWS))
        sys.exit()
    named = [f"{__file__}:{part.__name__}" for part in PARTS]
    whole = [f"tidegate+{ORDER}", "tidegate+fifo", f"tidegate:2048+{ORDER}"]
    print(",".join([*whole, *(f"{name}+{ORDER}" for name in named)]))
