"""A simulated instance against a naive engine, and against times worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from tests.sim.naive_engine import NaiveEngine
from tests.sim.sim_cases import CASES, Case, ended
from tests.sim.test_sim_property import QUICK
from tidegate.core.slo import Slo
from tidegate.policies.chunks import make_chunks
from tidegate.policies.orders import make_order
from tidegate.sim import EngineSettings, Replica, SimRun, SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import instance, profile

ROUND = profile(prefill=(0.0, 1e-3, 0.0), step=(1e-2, 0.0, 1e-5), transfer=(0.5, 131_072 * 100.0))
"""1 ms per prompt token; a step 10 ms plus 10 us per resident token; KV 100 tokens per second after 0.5 s."""


@settings(QUICK, max_examples=150)
@given(case=CASES)
def test_an_instance_is_the_naive_engine(case: Case) -> None:
    case = replace(
        case, system="colocated", order="fifo", tied=False, instances=1, pool="", front_s=0.0, sessions=0
    )
    replica = case.fleet()[0]
    fits = [r for r in case.trace() if r.input_tokens + r.output_tokens <= replica.instance.max_model_len]
    jobs = NaiveEngine(replica).serve(fits)
    for leap in (True, False):
        run = simulate(fits, case.made_system(), [replica], SimSettings(leap=leap))
        for result, job in zip(ended(run), jobs, strict=True):
            assert result.preemptions == job.preemptions
            assert result.first_token_s == pytest.approx(job.first_s, rel=1e-9)
            assert result.last_token_s == pytest.approx(job.last_s, rel=1e-9)


def pair(*records: TraceRecord, engine: EngineSettings | None = None, **kwargs: float) -> SimRun:
    fleet = [
        Replica(instance(name, max_model_len=4096), ROUND, engine or EngineSettings()) for name in ("p", "d")
    ]
    settings = SimSettings(**kwargs)  # type: ignore[arg-type]
    return simulate(records, make_system("static", split=(1, 1)), fleet, settings)


def test_the_way_of_one_request() -> None:
    run = pair(TraceRecord(1.0, 100, 3), front_s=0.25, engine=EngineSettings(host_s=0.001))
    (result,) = ended(run)
    # Front end 0.25, prefill 0.1 + host; front end again, 0.5 + 100/100 s on the link, two decode steps.
    first = 1.0 + 0.25 + 0.101
    second = first + 0.25 + 1.5 + 0.001 + 0.01 + 101e-5
    third = second + 0.001 + 0.01 + 102e-5
    assert result.first_token_s == pytest.approx(first)
    assert result.last_token_s == pytest.approx(third)
    assert (result.prefill_on, result.decode_on) == ("p", "d")
    assert result.kv_transfer_bytes == 100 * 131_072
    assert result.stages_s == pytest.approx(
        {
            "queue": 0.0,
            "prefill": 0.101,
            "other": 0.25,
            "transfer": 1.5,
            "decode_queue": 0.25,
            "first_step": 0.01201,
            "decode": third - second,
        }
    )


def test_two_transfers_share_a_link() -> None:
    # Prefilled in one step of 0.2 s; both enter the link at 0.7 s and share it for 2 s.
    run = pair(TraceRecord(0.0, 100, 2), TraceRecord(0.0, 100, 2))
    assert [r.stages_s["transfer"] for r in ended(run)] == pytest.approx([2.5, 2.5])


def test_a_transfer_alone_on_the_link_speeds_up() -> None:
    # Ends of prefill 0.1 and 0.2 s. The first runs alone from 0.6 to 0.7, both at half speed until the
    # first has its 100 tokens at 2.5, then the second alone for its last 10, until 2.6.
    run = pair(
        TraceRecord(0.0, 100, 2), TraceRecord(0.0, 100, 2), engine=EngineSettings(max_batch_tokens=100)
    )
    assert [r.stages_s["transfer"] for r in ended(run)] == pytest.approx([2.4, 2.4])


def test_an_answer_of_one_token_needs_no_decode() -> None:
    (result,) = ended(pair(TraceRecord(0.0, 100, 1)))
    assert result.first_token_s == result.end_s == pytest.approx(0.1)
    assert result.decode_on is None and result.kv_transfer_bytes == 0


def by_slack(*prompts: tuple[float, int]) -> list[float | None]:
    """Return when first tokens come of prompts of 0.1 s and 1 ms per token, due 1 s after they arrive."""
    fixed = profile(prefill=(0.1, 1e-3, 0.0), step=(1e-2, 0.0, 0.0))
    records = [TraceRecord(at_s, tokens, 1) for at_s, tokens in prompts]
    system = replace(make_system("colocated"), order=make_order("feasible-sjf"), chunks=make_chunks("slack"))
    fleet = [Replica(instance("i0", max_model_len=4096), fixed, EngineSettings())]
    run = simulate(records, system, fleet, SimSettings(slo=Slo(1.0, 0.05)))
    return [result.first_token_s for result in ended(run)]


def test_no_prompt_joins_a_step_by_which_one_in_it_misses() -> None:
    """The first runs until 0.7 s. The second is due at 1.05 s: there is room for 43 tokens of the third."""
    firsts = by_slack((0.0, 600), (0.05, 200), (0.5, 300), (0.55, 500))
    assert firsts == pytest.approx([0.7, 1.043, 1.49, 2.0])


def test_who_would_be_late_behind_a_step_does_not_go_before_one_that_would_not() -> None:
    """The shortest is first. The second would be in time alone, but not behind it; the longest would."""
    firsts = by_slack((0.0, 600), (0.05, 200), (0.6, 100), (0.65, 600))
    assert firsts == pytest.approx([0.7, 1.8, 1.582, 1.582])
