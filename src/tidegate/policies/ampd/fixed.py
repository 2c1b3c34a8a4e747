"""Rules for rounds of a conversation that do not look at the load: what AMPD is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from tidegate.core.decision import Path, Place, Verdict
from tidegate.core.request import Request
from tidegate.costs.forms import attention_work
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate.policies.ampd.paths import (
    ROUND_SIGNALS,
    Home,
    binding_history,
    bound_decode,
    home_of,
    least,
    local,
    path_costs,
    prefill_workers,
    remote,
)
from tidegate.policies.ampd.routing import WINDOW_S
from tidegate.policies.baselines import Colocated
from tidegate.policies.protocols import Signal


@dataclass(frozen=True, slots=True)
class AlwaysRemote:
    """Every round on the prefill instance of least predicted time to the first token (as Dynamo).

    With ``read`` that reads the history from the session's decode instance, else it computes what its own
    cache lacks. The decode pulls what its cache lacks.
    """

    read: bool = False
    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill on a prefill instance."""
        return self.fastest(request, snapshot, home_of(request, snapshot), "every prefill is remote")

    def fastest(self, request: Request, snapshot: Snapshot, home: Home, reason: str) -> Verdict:
        """Return the remote path of least time to the first token."""
        paths, workers = path_costs(request, snapshot, home, read=self.read), prefill_workers(snapshot)
        at = least(paths.first_token.seconds, workers)
        return remote(snapshot, home, at, reason, paths.alternatives(snapshot, workers), read=self.read)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Decode where the session is bound."""
        return bound_decode(request, snapshot, prefill_on)


REMOTE = AlwaysRemote(read=True)


@dataclass(frozen=True, slots=True)
class AlwaysLocal:
    """Every round that has history on the decode instance that holds it; a first one as ``AlwaysRemote``."""

    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place the prefill at home, if there is one."""
        home = home_of(request, snapshot)
        if home.tokens:
            return local(snapshot, home, "its history is there")
        return REMOTE.fastest(request, snapshot, home, "a first round")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Decode where the session is bound."""
        return bound_decode(request, snapshot, prefill_on)


@dataclass(frozen=True, slots=True)
class AppendPrefill:
    """PPD (2603.13358): a later round is appended on its decode instance where a table says that this is
    worth it: ``ttft_weight`` times what the TTFT gains there exceeds ``tpot_weight`` times what the
    residents' TPOT loses, each as a share of its target.

    The paper measures its table beforehand, by cells; here the profile fills it: new tokens, history and
    resident decodes are rounded up to powers of two, and an append adds its time to the gaps of the tokens
    that a resident gets in ``WINDOW_S``. It knows of no queue.
    """

    ttft_weight: float = 1.0
    tpot_weight: float = 1.0
    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Append a later round or send it away; send away a first one."""
        home = home_of(request, snapshot)
        if not home.tokens:
            return REMOTE.fastest(request, snapshot, home, "a first round")
        if self._score(request, snapshot, home) > 0.0:
            return local(snapshot, home, "the table appends it")
        return REMOTE.fastest(request, snapshot, home, "the table sends it away")

    def _score(self, request: Request, snapshot: Snapshot, home: Home) -> float:
        cells, costs = snapshot.cells, snapshot.costs.at(home.at)
        new, held = _cell(request.prompt_tokens - home.tokens), _cell(home.tokens)
        batch, tokens = (
            _cell(cells[Field.DECODE_REQUESTS, home.at]),
            _cell(cells[Field.DECODE_TOKENS, home.at]),
        )
        token_bytes = cells[Field.KV_BYTES_PER_TOKEN, home.at]
        append_s = float(costs.prefill.seconds(new, attention_work(new, held)))
        step_s = float(costs.step.seconds(batch, tokens))
        gained_s = float(costs.transfer.seconds(held * token_bytes))
        lost_s = append_s * step_s / WINDOW_S if batch else 0.0
        slo = request.slo
        return self.ttft_weight * gained_s / slo.ttft_s - self.tpot_weight * lost_s / slo.tpot_s

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Decode where the session is bound."""
        return bound_decode(request, snapshot, prefill_on)


def _cell(count: float) -> float:
    """Return the least power of two that is not below ``count``; 0 for nothing."""
    return 2.0 ** ceil(log2(count)) if count > 0 else 0.0


COLOCATED = Colocated()


@dataclass(frozen=True, slots=True)
class StickyColocated:
    """Both phases in one leg; a session stays where its first round went, which ``Colocated`` chose."""

    needs: frozenset[Signal] = ROUND_SIGNALS

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        """Place both phases where the session is."""
        history = binding_history(request, snapshot)
        if history is None:
            return COLOCATED.place_prefill(request, snapshot)
        return Verdict(Place(history.on, history.on, Path.COLOCATED), reason="its session is there")

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        """Keep the decode where the prefill ran."""
        return COLOCATED.place_decode(request, snapshot, prefill_on)
