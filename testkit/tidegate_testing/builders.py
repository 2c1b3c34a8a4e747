"""What tests are made of, with defaults, so that a test names only what it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tidegate.core.instance import Instance, Role
from tidegate.core.request import NOTHING_CACHED, Request
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, TransferCost
from tidegate.costs.profile import Profile
from tidegate.ledger.ledger import Ledger
from tidegate.policies.starting_roles import even_roles


def profile(
    *,
    prefill: tuple[float, float, float] = (0.0, 1e-3, 0.0),
    step: tuple[float, float, float] = (1e-2, 0.0, 1e-5),
    transfer: tuple[float, float] = (0.0, 1e9),
    name: str = "round/numbers",
) -> Profile:
    """Return a profile with coefficients that are easy on the head.

    By default a prompt takes 1 ms per token, a step 10 ms plus 10 us per resident token (so 4,000
    tokens fit under 50 ms), and KV moves at 1 GB/s.
    """
    a, b, c = prefill
    return Profile(
        name,
        PrefillCost(a, b, c),
        StepCost(*step),
        MixedCost(a, b, c, 2 * step[2]),
        TransferCost(*transfer),
        source="made up",
    )


REFERENCE = Profile(
    name="h100_sxm/llama-3.1-8b",
    prefill=PrefillCost(7.7996e-3, 2.0306e-5, 7.8435e-10, 320.0),
    step=StepCost(6.4014e-3, 9.8810e-6, 4.2006e-8),
    mixed=MixedCost(7.7996e-3, 2.0306e-5, 7.8435e-10, 8.4012e-8, 320.0),
    transfer=TransferCost(1e-3, 5e10),
    source="fitted to step latencies of one H100 SXM serving Llama 3.1 8B; the transfer is made up",
    errors=(("prefill", 0.0188, 0.076), ("step", 0.0212, 0.0596)),
)
"""A fixed, realistic profile for tests and benchmarks."""
FAST = replace(REFERENCE, transfer=TransferCost(5e-4, 3.6e11))
"""The reference with links as within a node."""


def instance(
    instance_id: str = "i0",
    *,
    kv_capacity_tokens: int = 400_000,
    max_model_len: int = 131_072,
    flippable: bool = True,
) -> Instance:
    """Return an instance of the size of an H100 with an 8B model."""
    return Instance(
        instance_id, kv_capacity_tokens, max_model_len, kv_bytes_per_token=131_072, flippable=flippable
    )


def request(
    request_id: str = "r0",
    prompt_tokens: int = 100,
    *,
    max_tokens: int = 100,
    arrival_s: float = 0.0,
    cached: Mapping[str, int] = NOTHING_CACHED,
    ttft_s: float = 1.0,
    tpot_s: float = 0.05,
    tenant: str = "",
    priority: int = 0,
) -> Request:
    """Return a request of 100 prompt tokens with the default SLO."""
    slo = Slo(ttft_s, tpot_s)
    return Request(
        request_id, prompt_tokens, max_tokens, arrival_s, slo, tenant, cached=cached, priority=priority
    )


def cluster(
    instances: int,
    *,
    roles: Sequence[Role] | None = None,
    profile: Profile = REFERENCE,
    kv_capacity_tokens: int = 400_000,
    now: float = 0.0,
) -> Ledger:
    """Return a ledger with instances ``i0``, ``i1``, ... up at ``now``; an even split by default."""
    ledger = Ledger()
    for index, role in enumerate(even_roles(instances) if roles is None else roles):
        ledger.instance_up(instance(f"i{index}", kv_capacity_tokens=kv_capacity_tokens), profile, role, now)
    return ledger


class VirtualClock:
    """A Clock that stands still until a test moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def now(self) -> float:
        """Return the time last set."""
        return self._now

    def set(self, now: float) -> None:
        """Move to ``now``. Raises ValueError when that lies in the past."""
        if now < self._now:
            raise ValueError(f"a clock cannot go back from {self._now} to {now}")
        self._now = now

    def advance(self, seconds: float) -> float:
        """Move forward by ``seconds`` and return the new time."""
        self.set(self._now + seconds)
        return self._now
