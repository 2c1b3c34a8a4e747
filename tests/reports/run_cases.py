"""Runs made up by formula, for what summarises and draws them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tidegate.core.instance import Role
from tidegate.core.stages import STAGES
from tidegate.measure.request_table import RequestTable
from tidegate.measure.timeline import FlipEvent, Timeline

TARGETS = (0.5, 0.05)


@dataclass(frozen=True)
class MadeRun:
    """What ``measure.summary.Run`` asks for."""

    requests: RequestTable
    timeline: Timeline
    flips: int = 3
    adds: int = 0
    drains: int = 0
    reversals: int = 1
    migrations: int = 0
    preemptions: int = 2
    kv_transfer_bytes: int = 10**9
    instance_hours: float = 0.5


def made_run(
    requests: int = 400, *, slow: float = 1.0, failed: int = 0, instances: int = 4, seed: int = 0
) -> MadeRun:
    """Return ``requests`` at 2 per second whose latencies grow with ``slow``; the last ``failed`` fail."""
    rng = np.random.default_rng(seed)
    names = [f"i{index}" for index in range(instances)]
    arrival_s = np.arange(requests, dtype=np.float64) * 0.5
    outputs = rng.integers(2, 300, requests)
    queue_s = rng.exponential(0.15 * slow, requests)
    prefill_s = rng.uniform(0.02, 0.1, requests)
    first_s = arrival_s + queue_s + prefill_s
    gap_s = rng.gamma(20, 0.0015 * slow, requests)
    last_s = first_s + gap_s * (outputs - 1)
    outcome = np.zeros(requests, dtype=np.int64)
    if failed:
        outcome[-failed:] = 1
        first_s[-failed:] = last_s[-failed:] = np.nan
    stages = {name: np.zeros(requests) for name in STAGES}
    stages |= {"queue": queue_s, "prefill": prefill_s, "decode": np.nan_to_num(last_s - first_s)}
    zeros = np.zeros(requests, dtype=np.int64)
    table = RequestTable(
        instances=names,
        outcomes=["ok", "overloaded"],
        arrival_s=arrival_s,
        input_tokens=rng.integers(10, 4000, requests),
        output_tokens=outputs,
        outcome=outcome,
        first_token_s=first_s,
        last_token_s=last_s,
        end_s=np.where(outcome == 0, last_s, arrival_s),
        ttft_target_s=np.full(requests, TARGETS[0]),
        tpot_target_s=np.full(requests, TARGETS[1]),
        stages_s=stages,
        prefill_on=zeros,
        decode_on=zeros,
        cached_tokens=zeros,
        preemptions=zeros,
        migrations=zeros,
        kv_transfer_bytes=zeros,
    )
    return MadeRun(table, _timeline(names, float(arrival_s[-1]) if requests else 0.0, slow))


def _timeline(names: list[str], end_s: float, slow: float) -> Timeline:
    at_s = np.arange(0.0, end_s + 1.0, 1.0)
    wave = 1.0 + np.sin(at_s / 25.0)
    roles = np.full((len(at_s), len(names)), float(Role.DECODE))
    roles[:, 0] = Role.PREFILL
    roles[wave > 1.5, 1] = Role.PREFILL
    return Timeline(
        instances=names,
        at_s=at_s,
        roles=roles,
        prefill_requests=np.round(3 * wave * slow),
        prefill_queue_s=0.4 * wave * slow,
        decode_requests=np.round(30 * wave * slow),
        kv_tokens=40_000 * wave * slow,
        kv_capacity_tokens=np.full(len(at_s), 400_000.0),
        held_requests=np.zeros(len(at_s)),
        flips=[FlipEvent(30.0, names[-1], Role.DECODE, Role.PREFILL, "made up")],
    )
