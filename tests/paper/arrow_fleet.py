"""A small fleet with round numbers, and work to put on it, for the tests of Arrow v2.

A prompt token takes 1 ms, a step 10 ms plus 10 us per resident token, so the default targets (1 s, 50 ms)
allow 1,000 queued prompt tokens and 4,000 resident ones.
"""

from __future__ import annotations

from tidegate.core.decision import Place, Verdict
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.policies.arrow.published import ArrowPlacement
from tidegate_testing import cluster, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
ARROW = ArrowPlacement()


def fleet(*roles: Role) -> Ledger:
    return cluster(len(roles), roles=roles, profile=profile())


def queue(ledger: Ledger, on: str, tokens: int, now: float = 0.0) -> str:
    """Leave a prefill on ``on``; return its id."""
    name = f"p-{on}-{tokens}-{ledger.snapshot(0.0).placed_prefills}"
    ledger.prefill_dispatched(request(name, tokens), on, now)
    return name


def decode(ledger: Ledger, on: str, tokens: int, now: float = 0.0) -> str:
    """Leave a decode of ``tokens`` on ``on``; return its id."""
    name = queue(ledger, on, tokens, now)
    ledger.decode_dispatched(name, on, tokens, now)
    return name


def pace(ledger: Ledger, request_ids: list[str], gap_s: float, start: float = 0.0) -> float:
    """Let decodes produce ten tokens each, ``gap_s`` apart, in one window; return its end."""
    for name in request_ids:
        ledger.tokens(name, 1, start)
    ledger.window_closed(start)
    for name in request_ids:
        ledger.tokens(name, 10, start + 10 * gap_s)
    ledger.window_closed(start + 10 * gap_s)
    return start + 10 * gap_s


def place_prefill(ledger: Ledger, tokens: int = 100, now: float = 0.0) -> Verdict:
    return ARROW.place_prefill(request("new", tokens), ledger.snapshot(now))


def place_decode(ledger: Ledger, ran_on: str, tokens: int = 100, now: float = 0.0) -> Verdict:
    return ARROW.place_decode(request("new", tokens), ledger.snapshot(now), ran_on)


def prefill_on(verdict: Verdict) -> str:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.prefill_on


def decode_on(verdict: Verdict) -> str | None:
    assert isinstance(verdict.decision, Place)
    return verdict.decision.decode_on
