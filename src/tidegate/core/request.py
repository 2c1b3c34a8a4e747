"""What a policy knows about a request."""

from __future__ import annotations

from typing import Final

from tidegate.core.slo import Slo

NO_SLO: Final = Slo()
"""The targets of a request that comes without any."""


class Request:
    """One completion call.

    ``prompt_tokens`` is the length to prefill; on a replay after an instance died it includes
    the tokens generated so far. ``cached_tokens`` is the prefix expected to be cached already.
    ``arrival_s`` is on the driver's clock.

    Nothing of a request changes; it is no frozen dataclass only because making one takes three times as long.
    """

    __slots__ = (
        "arrival_s", "cached_tokens", "id", "max_tokens", "prompt_tokens", "session", "slo", "tenant", "turn",
    )  # fmt: skip

    def __init__(
        self,
        id: str,  # noqa: A002
        prompt_tokens: int,
        max_tokens: int,
        arrival_s: float,
        slo: Slo = NO_SLO,
        tenant: str = "",
        session: str = "",
        turn: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        self.id: Final = id
        self.prompt_tokens: Final = prompt_tokens
        self.max_tokens: Final = max_tokens
        self.arrival_s: Final = arrival_s
        self.slo: Final = slo
        self.tenant: Final = tenant
        self.session: Final = session
        self.turn: Final = turn
        self.cached_tokens: Final = cached_tokens

    def __repr__(self) -> str:
        return f"Request({self.id!r}, {self.prompt_tokens} prompt tokens, at most {self.max_tokens} more)"
