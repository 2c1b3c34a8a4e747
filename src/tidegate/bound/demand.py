"""What a trace asks for, request by request, in the units that the bound of ``limit`` prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.core.slo import Slo
from tidegate.costs.forms import MixedCost, PrefillCost, StepCost, Values
from tidegate.costs.profile import Profile
from tidegate.measure.request_table import Mask
from tidegate.workloads.trace import TraceRecord, Workload

ROUNDING = 1e-9
"""Relative room for the simulator's rounding wherever the bound excludes something."""


@dataclass(frozen=True, slots=True)
class DemandKind:
    """``count`` instances with equal costs and equal room for KV."""

    prefill: PrefillCost
    step: StepCost
    mixed: MixedCost
    kv_tokens: int
    max_model_len: int
    count: int


@dataclass(frozen=True, slots=True)
class Batching:
    """How every instance of the fleet may batch; ``host_s`` is added to every step."""

    max_batch_tokens: int
    max_num_seqs: int
    host_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """One entry per request, in order of arrival.

    ``new_tokens`` of the prompt are in blocks that no earlier request named; they follow ``cached_tokens``.
    ``decodes`` are the tokens after the first. ``shared_tokens`` of the context stand in blocks that another
    request names, too, and so may be held once for both.
    """

    arrival_s: Values
    prompt_tokens: Values
    cached_tokens: Values
    new_tokens: Values
    decodes: Values
    shared_tokens: Values

    def __len__(self) -> int:
        return len(self.arrival_s)

    def only(self, keep: Mask) -> Demand:
        """Return the requests where ``keep`` is true."""
        return Demand(*(getattr(self, each.name)[keep] for each in fields(self)))


def kinds_of(profiles: Sequence[Profile], instances: Sequence[Instance]) -> list[DemandKind]:
    """Group a fleet. Raises ConfigError when it is empty or a profile is missing."""
    if not instances or len(profiles) != len(instances):
        raise ConfigError(
            f"{len(instances)} instances need as many profiles, at least one; got {len(profiles)}"
        )
    counts = Counter(
        (profile.prefill, profile.step, profile.mixed, instance.kv_capacity_tokens, instance.max_model_len)
        for profile, instance in zip(profiles, instances, strict=True)
    )
    return [DemandKind(*key, count) for key, count in counts.items()]


def demand_of(records: Iterable[TraceRecord]) -> Demand:
    """Measure a trace.

    A block's prefill is counted where its id first appears, as if one cache without bounds served the whole
    cluster; ids that go on into an answer count as seen from then on.
    """
    workload = Workload.of(records)
    ordered = workload[workload.arrival_s.argsort(kind="stable")]
    prompt = ordered.input_tokens.astype(np.float64)
    nothing = np.zeros_like(prompt)
    cached, new, shared = nothing, prompt, nothing
    if ordered.hash_ids is not None:
        named = Counter(block for ids in ordered.hash_ids for block in set(ids))
        seen: set[int] = set()
        cached, new, shared = np.array([_reuse(record, seen, named) for record in ordered], np.float64).T
    return Demand(
        arrival_s=ordered.arrival_s,
        prompt_tokens=prompt,
        cached_tokens=cached,
        new_tokens=new,
        decodes=np.maximum(ordered.output_tokens - 1.0, 0.0),
        shared_tokens=shared,
    )


def _reuse(record: TraceRecord, seen: set[int], named: Counter[int]) -> tuple[int, int, int]:
    """Return the tokens before the first new block, those in new blocks, and those in shared blocks."""
    prompt, size = record.input_tokens, record.block_tokens
    if not record.hash_ids:
        return 0, prompt, 0
    covered = min(prompt, len(record.hash_ids) * size)
    first_new, new, shared = covered, prompt - covered, 0
    for index, block in enumerate(record.hash_ids):
        inside = max(0, min(size, prompt - index * size))
        if block not in seen:
            first_new = min(first_new, index * size)
            new += inside
        if named[block] > 1:
            shared += size
    seen.update(record.hash_ids)
    return first_new, new, shared


def hopeless(demand: Demand, kinds: Sequence[DemandKind], slo: Slo, batching: Batching) -> Mask:
    """Tell which requests miss even alone: their prefill, their steps or their size rule every instance out.

    Each kind is taken at its best: whichever of its step forms is cheaper, term by term.
    """
    possible = np.zeros(len(demand), dtype=bool)
    for kind in kinds:
        fits = demand.prompt_tokens + demand.decodes + 1.0 <= min(kind.max_model_len, kind.kv_tokens)
        in_time = _prefill_alone_s(demand, kind, batching) <= slo.ttft_s * (1.0 + ROUNDING)
        steps_s = _steps_alone_s(demand, kind, batching)
        possible |= fits & in_time & (steps_s <= slo.tpot_s * demand.decodes * (1.0 + ROUNDING))
    return ~possible


def _prefill_alone_s(demand: Demand, kind: DemandKind, batching: Batching) -> Values:
    """Return the least time for the new tokens of a prompt, in the best number of chunks."""
    pure, mixed = kind.prefill, kind.mixed
    step_s = float(min(pure.a_s, mixed.a_s)) + batching.host_s
    token_s, pair_s = float(min(pure.b_s, mixed.b_s)), float(min(pure.c_s, mixed.c_s))
    hidden = float(max(pure.n0, mixed.n0))
    new = np.maximum(demand.new_tokens, 1.0)
    fewest = np.ceil(new / batching.max_batch_tokens)
    # The time is linear in the number of chunks until the weight reads hide every token.
    most = np.maximum(fewest, np.ceil(new / hidden)) if hidden > 0 else fewest
    few_s, many_s = (
        count * step_s + token_s * np.maximum(new - count * hidden, 0.0) for count in (fewest, most)
    )
    alone_s: Values = np.minimum(few_s, many_s) + pair_s * new * (0.5 * new + demand.cached_tokens)
    return alone_s


def _steps_alone_s(demand: Demand, kind: DemandKind, batching: Batching) -> Values:
    """Return the least time of all decodes of a request, alone in its steps or beside one chunk token."""
    step, mixed = kind.step, kind.mixed
    alone_s = float(min(step.seconds(1.0, 0.0), mixed.seconds(2.0, 0.0, 0.0))) + batching.host_s
    mean_context = demand.prompt_tokens + 0.5 * (demand.decodes + 1.0)
    steps_s: Values = demand.decodes * (alone_s + float(min(step.c_s, mixed.d_s)) * mean_context)
    return steps_s
