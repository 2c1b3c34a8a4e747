"""What a policy knows about a request."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from tidegate.core.prediction import Prediction
from tidegate.core.session import History
from tidegate.core.slo import Slo

NO_SLO: Final = Slo()
"""The targets of a request that comes without any."""
NOTHING_CACHED: Final[Mapping[str, int]] = MappingProxyType({})
"""The prefix hits of a request whose prompt no instance is known to hold."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One completion call, as a placement sees it.

    ``prompt_tokens`` is the length to prefill; on a replay after an instance died, and for a decode
    placement, it includes the tokens generated so far. ``max_tokens`` is what may still be generated.
    ``arrival_s`` is on the driver's clock. ``cached`` maps an instance's id to the tokens at the prompt's
    beginning that its prefix cache is expected to hold; an instance that is not in it holds none.
    ``generated`` of the prompt tokens are of the answer so far. ``remaining`` is what a placement is told of
    the tokens to come; None where the deployment does not predict them. ``history`` is what the instance
    holds to which the request's session is bound; None where it is bound to none that is up: in its first
    round, or once its KV has expired or is lost. Of waiting requests those of a lower ``priority`` go first.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    arrival_s: float
    slo: Slo = NO_SLO
    tenant: str = ""
    session: str = ""
    turn: int = 0
    cached: Mapping[str, int] = NOTHING_CACHED
    generated: int = 0
    remaining: Prediction | None = None
    history: History | None = None
    priority: int = 0
