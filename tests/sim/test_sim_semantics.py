"""What a simulated engine does in a step, and what a flip leaves alone, against times worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.sim.sim_cases import ended
from tidegate.core.decision import ControlDecision, Flip
from tidegate.core.instance import Role
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.sim import EngineSettings, Replica, SimRun, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import instance, profile

ROUND = profile()
"""1 ms per prompt token; a step 10 ms plus 10 us per resident token, 20 us beside a chunk."""


def alone(
    *records: TraceRecord, mixed_d_s: float = 2e-5, kv_tokens: int = 4096, budget: int = 8192
) -> SimRun:
    engine = EngineSettings(max_batch_tokens=budget, reserve=0.0)
    priced = replace(ROUND, mixed=replace(ROUND.mixed, d_s=mixed_d_s))
    shape = instance(kv_capacity_tokens=kv_tokens, max_model_len=kv_tokens)
    return simulate(records, make_system("colocated"), [Replica(shape, priced, engine)])


@pytest.mark.parametrize("mixed_d_s", [1e-5, 4e-5])
def test_decodes_go_first_and_chunks_get_what_is_left_of_the_budget(mixed_d_s: float) -> None:
    run = alone(TraceRecord(0.0, 10, 8), TraceRecord(0.015, 150, 1), budget=100, mixed_d_s=mixed_d_s)
    decode, prompt = ended(run)
    # A prefill step of 10 tokens, a decode step with 11 resident; then 1 + 99 and 1 + 51 tokens, with 12 and
    # 13 resident; then 4 decode steps from 14 resident on.
    second = 0.010 + 0.01011
    fourth = second + 0.100 + 12 * mixed_d_s + 0.052 + 13 * mixed_d_s
    assert prompt.first_token_s == pytest.approx(fourth)
    assert decode.last_token_s == pytest.approx(fourth + 0.04 + 1e-5 * (14 + 15 + 16 + 17))


def test_the_youngest_gives_its_kv_back_and_computes_it_again() -> None:
    older, younger = ended(alone(TraceRecord(0.0, 16, 20), TraceRecord(0.0, 16, 20), kv_tokens=64))
    # Four blocks: two each until 32 tokens have KV, after the prefill and 16 decode steps. Then the younger
    # makes room; the older has 3 steps to go, in which the 3 blocks that the younger needs are not free.
    full = 0.032 + 0.16 + 2e-5 * sum(range(17, 33))
    assert older.last_token_s == pytest.approx(full + 0.03 + 1e-5 * (33 + 34 + 35))
    # It computes its 16 + 17 tokens in one step, which brings the 18th of its answer.
    assert younger.last_token_s == pytest.approx(older.end_s + 0.033 + 0.02 + 1e-5 * (34 + 35))
    assert (older.preemptions, younger.preemptions) == (0, 1)


@dataclass(frozen=True)
class SwapOnce:
    """Exchanges the labels of two instances at the first tick."""

    period_s: float = 0.25
    needs: frozenset[Signal] = frozenset()
    name: str = "swap"

    def initial(self) -> bool:
        return False

    def decide(self, snapshot: Snapshot, swapped: bool) -> ControlDecision[bool]:
        swap = (Flip("p", Role.DECODE, "swapped"), Flip("d", Role.PREFILL, "swapped"))
        return ControlDecision(True, () if swapped else swap)


def test_a_flip_drains_nothing() -> None:
    fleet = [Replica(instance(name, max_model_len=4096), ROUND) for name in ("p", "d")]
    records = [TraceRecord(0.0, 100, 101), TraceRecord(0.5, 100, 2)]
    swapped = replace(make_system("static", split=(1, 1)), controllers=(SwapOnce(),))
    alike = simulate(records[:1], make_system("static", split=(1, 1)), fleet)
    run = simulate(records, swapped, fleet)
    running, coming = ended(run)
    # The new label counts at once: the next prefill goes to where a decode runs, and waits a step at most.
    assert (running.prefill_on, running.decode_on) == ("p", "d")
    assert (coming.prefill_on, coming.decode_on) == ("d", "p")
    assert coming.stages_s["queue"] <= 0.012
    # The decode stays, and but for the step that it shares with that prefill it goes on as before.
    assert (run.flips, run.migrations, running.preemptions) == (2, 0, 0)
    assert 0.09 < running.end_s - ended(alike)[0].end_s < 0.1
