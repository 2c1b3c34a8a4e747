"""Settings of the control plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ControlSettings:
    """How failures, waits and retries are handled; the same numbers live and simulated (all ours).

    - ``replays``: how often a request is served again without one more token. An instance that could not be
      asked at all is not counted: nothing was tried there.
    - ``deadly``: instances that may die under a request before its first token; then it counts as the cause.
    - ``confirm_s``: how long a failed request waits for the fleet's word on the instance that failed it.
    - ``admission``: a new request is refused when its first token is predicted to take more than so many
      times its TTFT target (see ``admitted``); 0 takes all.
    - ``avoid_s``: how long an instance that failed a leg gets no new one while others are up: one that fails
      fast looks idle and would draw every request.
    - ``retry_after_s``: what a client is told to wait when it is refused: about a local engine's restart.
    - ``shares``: the weights of tenants, who then share what is served (see ``TenantShares``).
    """

    replays: int = 5
    deadly: int = 3
    confirm_s: float = 0.25
    avoid_s: float = 5.0
    admission: float = 0.0
    retry_after_s: float = 2.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.replays < 0:
            raise ConfigError(f"replays must be a count of at least 0, got {self.replays}")
        if self.admission and not self.admission >= 1.0:
            raise ConfigError(f"admission must be at least 1 TTFT target, or 0, got {self.admission}")
