"""Where a request is prefilled and decoded: where the sum of the cost's terms is least."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tidegate.core.decision import Alternatives, Path, Place, Verdict
from tidegate.core.errors import NoInstance
from tidegate.core.request import Request
from tidegate.ledger.snapshot import Column, Mask, Snapshot
from tidegate.policies.ampd.paths import ROUND_SIGNALS
from tidegate.policies.protocols import Signal
from tidegate.policies.tidegate.cost import (
    CostConstants,
    Decoding,
    decoding,
    displaced_seconds,
    first_token,
    move_seconds,
)


@dataclass(frozen=True, slots=True)
class OneCost:
    """Both phases of a request, by one cost in seconds.

    Prefills go to those labelled for it, and to one that holds a part of the prompt, as far as their KV has
    room. Where all of them are late, those that decode are compared, too. Where the prefill is on an instance
    that decodes, the decode stays.
    """

    constants: CostConstants = field(default_factory=CostConstants)
    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill where it costs least together with the best decode from there."""
        if not snapshot.ids:
            raise NoInstance("no instance is up")
        labels, constants = snapshot.labels, self.constants
        token = first_token(request, snapshot, constants)
        decode = decoding(request, snapshot, None, constants)
        stays, decode_s = labels.decoding_mask, decode.seconds
        move_s = np.zeros(len(snapshot))
        if not stays.all():
            away_s = displaced_seconds(request, snapshot, float(request.prompt_tokens), constants)
            goes_s = (decode_s + away_s)[stays].min(initial=np.inf)
            decode_s = np.where(stays, decode_s, goes_s)
            move_s = np.where(stays, 0.0, move_seconds(request, snapshot))
        cost_s = token.seconds + token.late_s + token.away_s + token.damage_s + decode_s + move_s
        candidates = _known(request, snapshot, labels.prefilling_mask)
        if not candidates.any() or not (candidates & (token.late_s == 0.0)).any():
            candidates = np.ones(len(snapshot), np.bool_)
        if (fits := candidates & (snapshot.free_tokens >= request.prompt_tokens)).any():
            candidates = fits
        at = int(np.where(candidates, cost_s, np.inf).argmin())
        terms = {"cost_s": cost_s} | token.terms() | {"decode_s": decode_s, "move_s": move_s}
        alternatives = Alternatives(snapshot.ids, lambda: terms, candidates.nonzero()[0])
        on, history = snapshot.ids[at], request.history
        reads = history is not None and bool(token.reads[at])
        if stays[at] and not reads:  # A leg of both phases reads nothing.
            return Verdict(Place(on, on, Path.COLOCATED), (), alternatives, "costs least, and decodes there")
        read_from = history.on if history is not None and reads else None
        place = Place(on, None, Path.DISAGGREGATED, read_from)
        decodes = "there, behind its history" if stays[at] else "elsewhere"
        return Verdict(place, (), alternatives, f"costs least, and decodes {decodes}")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Keep the decode where the prefill ran if that decodes; else place it where it costs least with the
        way there."""
        held = snapshot.index.get(prefill_on)
        candidates = snapshot.labels.decoding_mask
        if held is not None and candidates[held]:
            return Verdict(Place(prefill_on, prefill_on, Path.COLOCATED), reason="where the prefill ran")
        decode = decoding(request, snapshot, held, self.constants)
        move_s = move_seconds(request, snapshot)
        away_s = displaced_seconds(request, snapshot, float(request.prompt_tokens), self.constants)
        if held is not None:
            move_s[held] = away_s[held] = 0.0
        if not candidates.any():
            candidates = np.ones(len(snapshot), np.bool_)
        cost_s = decode.seconds + away_s + move_s
        at = int(np.where(candidates, cost_s, np.inf).argmin())
        return Verdict(
            Place(prefill_on, snapshot.ids[at], Path.DISAGGREGATED),
            (),
            self._compared(snapshot, candidates, cost_s, decode, away_s, move_s),
            "costs least",
        )

    def _compared(
        self,
        snapshot: Snapshot,
        candidates: Mask,
        cost_s: Column,
        decode: Decoding,
        away_s: Column,
        move_s: Column,
    ) -> Alternatives:
        terms = {"cost_s": cost_s, "crowd_s": decode.crowd_s, "kv_s": decode.kv_s, "away_s": away_s}
        terms["move_s"] = move_s
        return Alternatives(snapshot.ids, lambda: terms, candidates.nonzero()[0])


def _known(request: Request, snapshot: Snapshot, prefilling: Mask) -> Mask:
    """Return who prefills by label, and who holds a part of the prompt."""
    names = {*request.cached, *([request.history.on] if request.history is not None else [])}
    columns = [snapshot.index[name] for name in names if name in snapshot.index]
    if not columns:
        return prefilling
    known = prefilling.copy()
    known[columns] = True
    return known
