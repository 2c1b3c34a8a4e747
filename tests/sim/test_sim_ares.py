"""ARES in simulation: a small cluster of long answers, whose KV round-robin overfills."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tidegate.core.slo import Slo
from tidegate.dataplane.replica import Replica
from tidegate.sim import SimRun, SimSettings, simulate
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import REFERENCE, instance

SLO = Slo(1.0, 0.02)
KV = 20_000


def reasoning() -> list[TraceRecord]:
    """60 requests, a fifth of which answer thirty times as long as the others."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.8, 60))
    long = rng.random(60) < 0.2
    answers = np.where(long, rng.integers(4000, 9000, 60), rng.integers(100, 300, 60))
    return [TraceRecord(float(at), 200, int(tokens)) for at, tokens in zip(arrivals, answers, strict=True)]


def run(system: str, lengths: str = "oracle") -> tuple[SimRun, list[dict[str, object]]]:
    """Return a run on 1P4D, and what its journal says of migrations."""
    journal = io.BytesIO()
    shape = instance(kv_capacity_tokens=KV, max_model_len=KV // 16 * 16)
    fleet = [Replica(replace(shape, id=f"i{i}"), REFERENCE) for i in range(5)]
    made = make_system(system, split=(1, 4), slo=SLO)
    done = simulate(reasoning(), made, fleet, SimSettings(slo=SLO, lengths=lengths), journal=journal)
    lines = [json.loads(line) for line in journal.getvalue().splitlines()]
    return done, [line for line in lines if line["type"] == "migration"]


def test_a_run_of_ares_is_what_it_was() -> None:
    done, moves = run("ares")
    golden = Path(__file__).parent / "golden_ares_moves.jsonl"
    found = [json.dumps(move) for move in moves]
    assert found == golden.read_text().splitlines(), (
        f"moves changed; if that is meant, write the new journal's migrations to {golden}"
    )
    assert done.migrations == sum(move["event"] == "done" for move in moves) > 0


@pytest.mark.parametrize("system", ["ares", "ares-slo", "arrow+ares"])
@pytest.mark.parametrize("lengths", ["oracle", "histogram", "hidden", "max-tokens"])
def test_nobody_is_preempted_where_round_robin_preempts(system: str, lengths: str) -> None:
    assert run("round-robin")[0].preemptions > 0
    done, _ = run(system, lengths)
    assert done.requests.ok.all()
    assert done.preemptions == 0


def test_every_answer_is_whole_whoever_moved() -> None:
    done, _ = run("ares")
    assert done.requests.output_tokens.tolist() == [record.output_tokens for record in reasoning()]


def test_under_low_load_instances_are_emptied_and_nobody_is_late() -> None:
    """A request every 4 s: one instance carries that."""
    quiet = [TraceRecord(4.0 * number, 200, 300) for number in range(60)]
    shape = instance(kv_capacity_tokens=KV, max_model_len=KV // 16 * 16)
    journal = io.BytesIO()
    system = make_system("ares-slo+consolidate", split=(1, 3), slo=SLO)
    fleet = [Replica(replace(shape, id=f"i{i}"), REFERENCE) for i in range(4)]
    done = simulate(quiet, system, fleet, SimSettings(slo=SLO, lengths="oracle"), journal=journal)
    lines = [json.loads(line) for line in journal.getvalue().splitlines()]
    drained = [line for line in lines if line["type"] == "instance" and line["event"] == "draining"]
    assert done.requests.attained.all()
    assert len({line["instance"] for line in drained}) == len(drained) == 2
    late = done.requests.arrival_s > drained[-1]["t"]
    assert late.sum() > 10 and len(set(done.requests.decode_on[late].tolist())) == 1
