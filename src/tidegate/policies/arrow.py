"""Arrow v2, Algorithm 1: place each half of a request; flip an instance when every placement would miss."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.decision import Alternatives, Flip, Path, Place, Verdict
from tidegate.core.instance import Role
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.ledger.among import Among, best, best_within
from tidegate.ledger.snapshot import Field, Reading, Snapshot
from tidegate.policies.arrow_flip import COOLDOWN_S, flip, repair
from tidegate.policies.arrow_lending import Lending
from tidegate.policies.arrow_loads import L_SHRINK, decode_pool_load
from tidegate.policies.candidates import fitting, members, roomy
from tidegate.policies.pricing import TokensOverLimit, Ttft
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class ArrowPlacement:
    """Both placements of Arrow v2 (section 5.3, Algorithm 1).

    Candidates are the pool of the phase (Narwhal: profiles are taken in pure phases, so they mislead on
    an instance that mixes them; the paper prices every instance). Costs are pairs compared
    lexicographically. Requests are held against their own SLO; ``slo`` is what pool loads relate to.

    With ``lending`` (ours) a flip depends on what its pool would be left with, KV caches keep a reserve, and
    where no flip is due an instance takes work of the other phase as far as its own stays in time.
    """

    slo: Slo = field(default_factory=Slo)
    shrink: float = L_SHRINK
    cooldown_s: float = COOLDOWN_S
    lending: Lending | None = None
    needs: frozenset[Signal] = frozenset({Signal.PROFILE})

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill by (resident decode tokens, predicted TTFT); flip one over when all would miss.

        That flip needs a decode pool below ``shrink``: an overloaded decode side that lost an instance
        would leave requests holding KV that nobody decodes.
        """
        candidates, healed = _pool_or_repair(snapshot, Role.PREFILL)
        if healed is not None:
            return _prefill_by(healed, "no prefill instance was left")
        candidates = fitting(snapshot, candidates, request.prompt_tokens)
        resident, ttft = Reading(snapshot, Field.DECODE_TOKENS), Ttft(snapshot, request)
        alternatives = Alternatives(
            snapshot.ids, {"decode_resident_tokens": resident, "ttft_s": ttft}, candidates
        )
        chosen = best_within(ttft, candidates, request.slo.ttft_s, lead=resident)
        reason = "meets the TTFT target"
        if chosen is None:
            moved = flip(snapshot, Role.PREFILL, "inline") if self._may_lend(request, snapshot) else None
            if moved is not None:
                return _prefill_by(moved, "no prefill instance meets the TTFT target", alternatives)
            chosen = self.lending.prefill_beside(request, snapshot) if self.lending else None
            reason = "beside decodes: no prefill instance meets the TTFT target, no flip is due"
        if chosen is None:
            reason = "best effort: all miss the TTFT target, no flip is due"
            chosen = best(ttft, candidates, lead=resident)
        place = Place(snapshot.ids[chosen], None, Path.DISAGGREGATED)
        return Verdict(place, alternatives=alternatives, reason=reason)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Stay where the prefill ran if that may decode; else place by (queued prefill tokens, tokens
        over the limit), and flip one over, cooldown permitting, when all would exceed theirs."""
        held = snapshot.index.get(prefill_on)
        if held is not None and snapshot.cells[Field.ROLE, held] != Role.PREFILL:
            place = Place(prefill_on, prefill_on, Path.DISAGGREGATED)
            return Verdict(place, reason="its prefill instance decodes: no transfer")
        candidates, healed = _pool_or_repair(snapshot, Role.DECODE)
        if healed is not None:
            return _decode_by(healed, prefill_on, "no decode instance was left")
        candidates = self._roomy(request, snapshot, candidates, prefill_on)
        queued, over = Reading(snapshot, Field.PREFILL_TOKENS), TokensOverLimit(snapshot, request)
        alternatives = Alternatives(
            snapshot.ids, {"prefill_resident_tokens": queued, "tokens_over_limit": over}, candidates
        )
        chosen = best_within(over, candidates, 0.0, lead=queued)
        reason = "meets the TPOT target"
        if chosen is None:
            if self.lending is None or self.lending.prefill_spares_one(snapshot, self.slo):
                moved = flip(snapshot, Role.DECODE, "inline", cooldown_s=self.cooldown_s)
                if moved is not None:
                    why = "no decode instance meets the TPOT target"
                    return _decode_by(moved, prefill_on, why, alternatives)
            reason = "best effort: all miss the TPOT target, no flip is legal"
            if self.lending is not None:
                chosen, pressure = self.lending.least_pressed(request, snapshot, held)
                if chosen == held and pressure <= 1.0:
                    reason = "beside prefills: no decode instance meets the TPOT target, no flip is due"
            else:
                chosen = best(over, candidates, lead=queued)
        place = Place(prefill_on, snapshot.ids[chosen], Path.DISAGGREGATED)
        return Verdict(place, alternatives=alternatives, reason=reason)

    def _may_lend(self, request: Request, snapshot: Snapshot) -> bool:
        """Tell whether the decode pool may lend an instance to this prefill."""
        if self.lending is None:
            return decode_pool_load(snapshot, self.slo) < self.shrink
        return not self.lending.hopeless(request, snapshot) and self.lending.decode_spares_one(
            snapshot, self.slo
        )

    def _roomy(self, request: Request, snapshot: Snapshot, candidates: Among, prefill_on: str) -> Among:
        """Narrow the candidates of a decode to those with room; with ``lending`` perhaps to none."""
        if self.lending is None:
            return fitting(snapshot, candidates, request.prompt_tokens, prefill_on)
        return roomy(snapshot, candidates, request.prompt_tokens, prefill_on, self.lending.kv_reserve)


def _pool_or_repair(snapshot: Snapshot, role: Role) -> tuple[Among, Flip | None]:
    """Return the pool of ``role``; where it is empty, everyone, and the flip that refills it if legal."""
    pool = members(snapshot, role)
    if len(pool):
        return pool, None
    return snapshot.labels.everyone, repair(snapshot)


def _prefill_by(moved: Flip, why: str, alternatives: Alternatives | None = None) -> Verdict:
    place = Place(moved.instance, None, Path.DISAGGREGATED)
    return Verdict(place, (moved,), alternatives, f"{why}: flipped {moved.instance}")


def _decode_by(moved: Flip, prefill_on: str, why: str, alternatives: Alternatives | None = None) -> Verdict:
    place = Place(prefill_on, moved.instance, Path.DISAGGREGATED)
    return Verdict(place, (moved,), alternatives, f"{why}: flipped {moved.instance}")
