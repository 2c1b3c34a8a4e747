"""Planners that DOPD is compared with: its own released formula, and Dynamo's two.

Each is a pure step from what was seen or forecast in an interval to counts of instances, with the constants
of the repository ``liao4s/DOPD``, which holds all three. There an instance is one or two GPUs; here all are
alike, and a budget counts instances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.costs.profile import Profile

LEAST = 1
"""Instances of a pool, at least (``min_endpoint``)."""


@dataclass(frozen=True, slots=True)
class IntervalLoad:
    """What comes in an interval: ``requests`` in ``interval_s`` seconds, with mean lengths."""

    requests: float
    interval_s: float
    input_tokens: float
    output_tokens: float

    @property
    def context_tokens(self) -> float:
        """What a decode holds on average."""
        return self.input_tokens + 0.5 * self.output_tokens


@dataclass(frozen=True, slots=True)
class ReleasedConstants:
    """The KV of a decode instance as the released code has it: two H100s with a 70B model in fp8."""

    kv_blocks: int = 2040
    block_tokens: int = 128


def dopd_code(
    load: IntervalLoad,
    profile: Profile,
    *,
    step_correction: float = 1.0,
    budget: int | None = None,
    constants: ReleasedConstants | None = None,
) -> tuple[int, int]:
    """Return (prefill, decode) by DOPD's released formula.

    Two things differ from the paper's derivation (``ratio``): the count of requests in the interval stands
    for their concurrency, and the prefill instances are the ratio itself, not the ratio times the decode
    ones. Raises ConfigError where no request fits the KV, or for a budget without room for the least pools.
    """
    kv = constants or ReleasedConstants()
    batch = kv.kv_blocks // math.ceil(load.context_tokens / kv.block_tokens) if load.requests else 1
    if not batch:
        raise ConfigError(f"a request of {load.context_tokens:.0f} tokens fits no instance's KV")
    step_s = float(profile.step.seconds(batch, batch * load.context_tokens)) * step_correction
    prefill_s = profile.prefill_s(round(load.input_tokens))
    ratio = batch * prefill_s / (load.output_tokens * step_s) if load.requests else 0.0
    return within_budget(math.ceil(ratio), math.ceil(load.requests / batch), budget)


def dynamo_sla(
    load: IntervalLoad,
    profile: Profile,
    tpot_s: float,
    kv_tokens: int,
    *,
    prefill_correction: float = 1.0,
    step_correction: float = 1.0,
    budget: int | None = None,
) -> tuple[int, int]:
    """Return (prefill, decode) by throughput: Dynamo's SLA planner.

    Prefill: tokens per second over those of one prompt of mean length at a time; a correction above 1 means
    queueing and is taken for none. Decode: over the best throughput of a batch in ``kv_tokens`` whose step,
    corrected, keeps ``tpot_s``; that of one request where none does. Raises ConfigError as ``dopd_code``.
    """
    if not load.requests:
        return within_budget(0, 0, budget)
    most = int(kv_tokens // load.context_tokens)
    if not most:
        raise ConfigError(f"a request of {load.context_tokens:.0f} tokens fits no instance's KV")
    asked_per_s = load.requests * load.input_tokens / load.interval_s * min(1.0, prefill_correction)
    prefill_per_s = load.input_tokens / profile.prefill_s(round(load.input_tokens))
    batches = np.arange(1.0, most + 1.0)
    steps_s = np.asarray(profile.step.seconds(batches, batches * load.context_tokens))
    keeps = steps_s <= tpot_s / step_correction
    keeps[0] = True
    decode_per_s = float(np.max(batches[keeps] / steps_s[keeps]))
    answered_per_s = load.requests * load.output_tokens / load.interval_s
    return within_budget(
        math.ceil(asked_per_s / prefill_per_s), math.ceil(answered_per_s / decode_per_s), budget
    )


def within_budget(prefill: int, decode: int, budget: int | None) -> tuple[int, int]:
    """Return the counts, at least ``LEAST`` each, scaled down to a budget as the released code does.

    Prefill gets its share of the budget, rounded down, and decode what is left. Raises ConfigError for a
    budget that has no room for the least pools.
    """
    prefill, decode = max(LEAST, prefill), max(LEAST, decode)
    if budget is None or prefill + decode <= budget:
        return prefill, decode
    if budget < 2 * LEAST:
        raise ConfigError(f"a budget of {budget} instances has no room for two pools")
    prefill = max(LEAST, int(prefill * budget / (prefill + decode)))
    return prefill, max(LEAST, budget - prefill)


@dataclass(frozen=True, slots=True)
class LoadConstants:
    """Thresholds of Dynamo's load planner.

    Queued prompts per prefill instance, and shares of the decode pool's KV: above ``up`` one is added, below
    ``down`` one is removed. ``waiting_kv`` is what each request that waits for room counts in KV, ``ahead``
    the intervals that the queue's trend is carried on, ``grace`` those in which a new decode instance keeps
    the pool from shrinking.
    """

    queue_up: float = 5.0
    queue_down: float = 0.2
    kv_up: float = 0.9
    kv_down: float = 0.5
    waiting_kv: float = 0.02
    ahead: float = 3.0
    grace: int = 3


@dataclass(frozen=True, slots=True)
class PoolsSeen:
    """An interval of two pools: prompts queued per prefill instance, first, last and on average.

    ``kv_share`` is the mean use of the decode instances' KV, ``waiting`` the requests per decode instance
    that have no room there.
    """

    first_queue: float
    last_queue: float
    mean_queue: float
    kv_share: float
    waiting: float


def dynamo_load(
    seen: PoolsSeen,
    prefill: int,
    decode: int,
    grace: int,
    *,
    budget: int,
    constants: LoadConstants | None = None,
) -> tuple[int, int, int]:
    """Return (prefill, decode, grace) for the next interval: Dynamo's load planner, one instance at a time.

    Removals come first and make room in the budget. A prefill instance is added only where the queue's trend
    exceeds the threshold, too.
    """
    limits = constants or LoadConstants()
    kv = seen.kv_share + limits.waiting_kv * seen.waiting
    trend = seen.last_queue + limits.ahead * (seen.last_queue - seen.first_queue)
    if kv < limits.kv_down and not grace and decode > LEAST:
        decode -= 1
    if seen.mean_queue < limits.queue_down and prefill > LEAST:
        prefill -= 1
    if seen.mean_queue > limits.queue_up and trend > limits.queue_up and prefill + decode < budget:
        prefill += 1
    left = max(0, grace - 1)
    if kv > limits.kv_up and prefill + decode < budget:
        decode, left = decode + 1, limits.grace
    return prefill, decode, left
