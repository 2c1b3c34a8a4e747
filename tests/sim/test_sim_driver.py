"""What a simulation promises of its input, its verdicts and its journal."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.sim.sim_cases import ended
from tidegate.core.decision import Hold, Reject, Verdict
from tidegate.core.errors import ConfigError
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.journal import read_journal
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.baselines import LEAST_LOADED
from tidegate.policies.protocols import Signal
from tidegate.reports.journal_report import build_report
from tidegate.sim import EngineSettings, Replica, SimRun, SimSettings, simulate
from tidegate.systems import System, make_system
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import REFERENCE, instance

SLO = Slo(0.5, 0.05)


def fleet(count: int = 2, kv_capacity_tokens: int = 8192, max_model_len: int = 4096) -> list[Replica]:
    shape = instance(kv_capacity_tokens=kv_capacity_tokens, max_model_len=max_model_len)
    return [Replica(replace(shape, id=f"i{i}"), REFERENCE) for i in range(count)]


def run(*records: TraceRecord, system: System | None = None, settings: SimSettings | None = None) -> SimRun:
    return simulate(records, system or make_system("arrow-lending"), fleet(), settings)


@dataclass(frozen=True)
class Moody:
    """Holds every prefill until a time, or rejects every request."""

    until_s: float = 0.0
    rejects: bool = False
    needs: frozenset[Signal] = frozenset()

    def place_prefill(self, request: Request, snapshot: Snapshot) -> Verdict:
        if self.rejects:
            return Verdict(Reject("full", 1.0))
        if snapshot.at_s < self.until_s:
            return Verdict(Hold("not yet"))
        return LEAST_LOADED.place_prefill(request, snapshot)

    def place_decode(self, request: Request, snapshot: Snapshot, prefill_on: str) -> Verdict:
        return LEAST_LOADED.place_decode(request, snapshot, prefill_on)


def moody(policy: Moody) -> System:
    return replace(make_system("static"), prefill=policy, decode=policy)


def test_an_empty_trace() -> None:
    done = run()
    assert (len(done.requests), done.attained, done.flips, done.outcomes) == (0, 0, 0, {})


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([TraceRecord(2.0, 1, 1), TraceRecord(1.0, 1, 1)], "request 1: it arrives at 1.0 s, after"),
        ([TraceRecord(float("nan"), 1, 1)], "request 0: it arrives at nan s"),
        ([TraceRecord(0.0, 0, 1)], "request 0: 0 input"),
        ([TraceRecord(0.0, 5, -1)], "-1 output"),
    ],
)
def test_a_trace_that_cannot_be(records: list[TraceRecord], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run(*records)


def test_kv_that_holds_less_than_a_context() -> None:
    with pytest.raises(ConfigError, match="less than one context"):
        fleet(kv_capacity_tokens=4000)


def test_a_batch_without_room() -> None:
    with pytest.raises(ConfigError, match="at least one token"):
        EngineSettings(max_batch_tokens=0)


def test_an_instance_named_twice() -> None:
    with pytest.raises(ConfigError, match="two instances"):
        simulate([], make_system("arrow-lending"), [*fleet(1), *fleet(1)])


def test_a_request_larger_than_a_context_is_refused() -> None:
    done = run(TraceRecord(0.0, 4000, 97), TraceRecord(0.0, 4000, 96))
    assert [r.outcome for r in ended(done)] == ["prompt_too_long", "ok"]
    assert ended(done)[0].first_token_s is None and done.requests.attained.tolist() == [False, True]


def test_a_rejected_request_ends() -> None:
    done = run(TraceRecord(0.0, 10, 10), system=moody(Moody(rejects=True)))
    assert done.outcomes == {"overloaded": 1}


def test_a_held_request_waits_for_a_tick() -> None:
    (result,) = ended(run(TraceRecord(0.25, 10, 10), system=moody(Moody(until_s=2.5))))
    assert result.ok and result.stages_s["queue"] == pytest.approx(2.75)


def test_a_held_request_ends_at_its_deadline() -> None:
    system, settings = moody(Moody(until_s=1e9)), SimSettings(deadline_s=2.0)
    (result,) = ended(run(TraceRecord(0.25, 10, 10), system=system, settings=settings))
    assert (result.outcome, result.end_s) == ("overloaded", 3.0)


def test_the_journal_is_one_that_report_and_traces_read(tmp_path: Path) -> None:
    records = [TraceRecord(0.01 * i, 50 + i, 5 + i % 7) for i in range(60)]
    out = io.BytesIO()
    done = simulate(
        records, make_system("arrow-lending", slo=SLO), fleet(4), SimSettings(slo=SLO), journal=out
    )
    path = tmp_path / "sim.jsonl"
    path.write_bytes(out.getvalue())
    journal = read_journal(path)
    assert (journal.system, journal.slo, journal.unfinished) == ("arrow-lending", SLO, 0)
    assert journal.decisions == {"place_prefill": 60, "place_decode": 60}
    assert len(journal.flips) == done.flips
    assert build_report(journal).attainment.attained == done.attained
    again = list(read_trace(path))
    assert [(r.input_tokens, r.output_tokens) for r in again] == [
        (r.input_tokens, r.output_tokens) for r in records
    ]
