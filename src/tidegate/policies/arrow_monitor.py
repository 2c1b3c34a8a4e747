"""Arrow v2, Algorithm 2: the periodic monitor that moves instances from prefill to decode."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.decision import ControlDecision
from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.arrow_flip import COOLDOWN_S, flip, repair
from tidegate.policies.arrow_lending import Lending, decode_fullness
from tidegate.policies.arrow_loads import L_EXPAND, L_SHRINK, decode_pool_load, prefill_pool_load
from tidegate.policies.protocols import Signal

SUSTAIN_TICKS = 3
"""Consecutive ticks before the monitor acts. Narwhal; the paper says "over a period" and names no count."""
TICK_S = 1.0
"""Seconds between ticks. Narwhal."""


@dataclass(frozen=True, slots=True)
class ArrowMonitor:
    """Algorithm 2: lend to decode when it is overloaded, or when prefill idles while decode does not.

    The state is the count of consecutive ticks that called for a flip. A flip that Algorithm 3 refuses
    keeps the count, so the next tick asks again (Narwhal). Instances only come back through Algorithm 1.
    """

    slo: Slo = field(default_factory=Slo)
    expand: float = L_EXPAND
    shrink: float = L_SHRINK
    sustain: int = SUSTAIN_TICKS
    cooldown_s: float = COOLDOWN_S
    period_s: float = TICK_S
    name: str = "monitor"
    lending: Lending | None = None
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def initial(self) -> int:
        """See ``Controller.initial``."""
        return 0

    def decide(self, snapshot: Snapshot, state: int) -> ControlDecision[int]:
        """Return at most one flip; an empty pool is refilled before loads are looked at."""
        if not snapshot.ids:
            return ControlDecision(0, reason="no instance is up")
        healed = repair(snapshot)
        if healed is not None:
            return ControlDecision(0, (healed,), f"a pool was empty: flipped {healed.instance}")
        prefill, decode = prefill_pool_load(snapshot, self.slo), decode_pool_load(snapshot, self.slo)
        loads = f"prefill load {prefill:.2f}, decode load {decode:.2f}"
        if not self._calls(snapshot, prefill, decode):
            return ControlDecision(0, reason=loads)
        count = state + 1
        if count < self.sustain:
            return ControlDecision(count, reason=f"{loads}, tick {count} of {self.sustain}")
        moved = flip(snapshot, Role.DECODE, "monitor", cooldown_s=self.cooldown_s)
        if moved is None:
            return ControlDecision(count, reason=f"{loads}, no flip is legal")
        return ControlDecision(0, (moved,), f"{loads}: flipped {moved.instance}")

    def _calls(self, snapshot: Snapshot, prefill: float, decode: float) -> bool:
        """Tell whether the loads call for a flip to decode."""
        if self.lending is None:
            return decode >= self.expand or prefill <= self.shrink <= decode
        decode = max(decode, decode_fullness(snapshot, self.slo))
        needed = decode >= self.lending.needy or prefill <= self.shrink <= decode
        return needed and self.lending.prefill_spares_one(snapshot, self.slo)
