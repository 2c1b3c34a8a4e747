"""Whether an SLO can be met at all, by some replica that is offered, alone; and if not, which one can."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Role
from tidegate.planner.capacity import Capacities
from tidegate.planner.deployment import ReplicaKind
from tidegate.planner.question import CHUNKS_TOKENS

Values = NDArray[np.float64]


def check_feasible(capacities: Capacities, kinds: Iterable[ReplicaKind]) -> None:
    """Raise ConfigError unless a share ``level`` of the requests meets each target on some kind of replica.

    It says for each target that binds which one would be met, and by what.
    """
    level, slo = capacities.level, capacities.slo
    ttft: list[tuple[float, ReplicaKind]] = []
    tpot: list[tuple[float, ReplicaKind]] = []
    held = capacities.workload.input_tokens + capacities.workload.output_tokens
    fitting = [
        (kind, float((held <= kind.profile.kv_capacity_tokens).mean())) for kind in dict.fromkeys(kinds)
    ]
    for kind, _ in fitting:
        for chunk in {*CHUNKS_TOKENS[Role.PREFILL], *CHUNKS_TOKENS[Role.MIXED]}:
            first = capacities.sizing(Role.PREFILL, kind, chunk)
            alone_s = first.prefill.alone_s + first.model.costs.front_s
            ttft.append((_quantile(first.traffic.weights, alone_s, level), kind))
        decode = capacities.sizing(Role.DECODE, kind, 0).decode
        steps = decode.traffic.output_tokens - 1.0
        gap_s = float(decode.step_s(np.array(1.0)))
        tpot.append((_quantile(decode.traffic.weights, np.where(steps > 0, gap_s, 0.0), level), kind))
    problems = []
    kind, share = max(fitting, key=lambda each: each[1])
    if share < level:
        problems.append(
            f"KV memory binds: {share:.1%} of the requests fit the KV of an instance, "
            f"{kind.profile.kv_capacity_tokens:,} tokens on {kind.title}; offer larger ones"
        )
    for name, target_s, found in (("ttft", slo.ttft_s, ttft), ("tpot", slo.tpot_s, tpot)):
        least_s, kind = min(found, key=lambda each: each[0])
        if least_s > target_s:
            problems.append(
                f"the {name.upper()} target binds: {level:.0%} of the requests take up to "
                f"{_rounded_up(1e3 * least_s, 3)} ms even alone, on {kind.title}; the nearest that can be "
                f"met is {name}:{_rounded_up(1e3 * least_s)}"
            )
    if problems:
        raise ConfigError(problems)


def _quantile(weights: Values, values: Values, level: float) -> float:
    order = np.argsort(values)
    at = int(np.searchsorted(np.cumsum(weights[order]), level - 1e-9))
    return float(values[order[min(at, len(order) - 1)]])


def _rounded_up(value: float, digits: int = 2) -> str:
    """Return the value with so many digits, rounded up."""
    unit = 10.0 ** (int(np.floor(np.log10(value))) - digits + 1)
    return f"{np.ceil(value / unit - 1e-9) * unit:g}"
