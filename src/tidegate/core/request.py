"""What a policy knows about a request."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.slo import Slo


@dataclass(frozen=True, slots=True)
class Request:
    """One completion call.

    ``prompt_tokens`` is the length to prefill; on a replay after an instance died it includes
    the tokens generated so far. ``cached_tokens`` is the prefix expected to be cached already.
    ``arrival_s`` is on the driver's clock.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    slo: Slo = field(default_factory=Slo)
    tenant: str = ""
    session: str = ""
    turn: int = 0
    cached_tokens: int = 0
