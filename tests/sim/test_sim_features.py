"""Sessions, SLO classes, stale reports, instances that come and die, prefixes, warnings and replays."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.sim.sim_cases import MovingPool, ended
from tidegate.core.errors import ConfigError
from tidegate.core.slo import Slo
from tidegate.journal import read_journal
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import AnswerLengths
from tidegate.sim import Replica, SimSettings, simulate, slo_warnings
from tidegate.sim.replay import replay_journal
from tidegate.sim.sampling import Sampler
from tidegate.systems import make_system
from tidegate.workloads.trace import TraceRecord
from tidegate_testing import REFERENCE, instance

SLO = Slo(0.5, 0.05)


def fleet(count: int = 2) -> list[Replica]:
    return [Replica(instance(f"i{i}", max_model_len=4096), REFERENCE) for i in range(count)]


def many(count: int, gap_s: float = 0.01) -> list[TraceRecord]:
    return [TraceRecord(gap_s * i, 50 + 37 * i % 900, 5 + 13 * i % 60) for i in range(count)]


# sessions


def turn(
    at_s: float, number: int, delay_s: float | None, tokens: int = 10, session: str = "s"
) -> TraceRecord:
    return TraceRecord(at_s, tokens, 10, session_id=session, turn=number, delay_s=delay_s)


def test_a_turn_arrives_after_the_answer_before_it_and_the_pause() -> None:
    records = [turn(0.0, 0, None), turn(0.0, 0, None, session="t"), turn(0.0, 1, 2.5), turn(90.0, 2, 0.25)]
    first, other, second, third = ended(
        simulate(records, make_system("arrow-lending"), fleet(), SimSettings(closed_loop=True))
    )
    assert (first.arrival_s, other.arrival_s) == (0.0, 0.0)
    assert second.arrival_s == pytest.approx(first.end_s + 2.5)
    assert third.arrival_s == pytest.approx(second.end_s + 0.25)


def test_a_turn_that_fails_is_followed_too() -> None:
    records = [turn(0.0, 0, None, tokens=5000), turn(0.0, 1, 1.0, tokens=6000), turn(0.0, 2, 1.0)]
    done = ended(simulate(records, make_system("arrow-lending"), fleet(), SimSettings(closed_loop=True)))
    assert [r.outcome for r in done] == ["prompt_too_long", "prompt_too_long", "ok"]
    assert [r.arrival_s for r in done] == [0.0, 1.0, 2.0]


def test_an_open_loop_keeps_the_recorded_arrivals() -> None:
    records = [turn(0.0, 0, None), turn(0.001, 1, 5.0)]
    assert simulate(records, make_system("arrow-lending"), fleet()).requests.arrival_s.tolist() == [
        0.0,
        0.001,
    ]


def test_a_delay_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"request 1: its delay is -1\.0 s"):
        records = [turn(0.0, 0, None), turn(0.0, 1, -1.0)]
        simulate(records, make_system("arrow-lending"), fleet(), SimSettings(closed_loop=True))


# SLO classes and warnings


def test_a_class_has_targets_of_its_own() -> None:
    settings = SimSettings(slo_classes={"batch": Slo(30.0, 1.0)})
    records = [TraceRecord(0.0, 10, 10, slo_class="batch"), TraceRecord(0.0, 10, 10)]
    table = simulate(records, make_system("arrow-lending"), fleet(), settings).requests
    assert table.ttft_target_s.tolist() == [30.0, 1.0]


def test_an_unknown_class_names_the_known_ones() -> None:
    settings = SimSettings(slo_classes={"batch": Slo(), "chat": Slo()})
    with pytest.raises(ConfigError, match=r"request 0: .*'fast'; known classes: batch, chat"):
        simulate([TraceRecord(0.0, 1, 1, slo_class="fast")], make_system("arrow-lending"), fleet(), settings)


def test_targets_that_nobody_can_meet_are_named() -> None:
    assert slo_warnings(fleet(), SLO) == []
    ttft, tpot = slo_warnings(fleet(), Slo(1e-6, 1e-6))
    assert "TTFT target of 0.001 ms" in ttft and "TPOT target" in tpot
    assert simulate([], make_system("arrow-lending"), fleet(), SimSettings(slo=Slo(1e-6, 1.0))).warnings == [
        ttft
    ]


def test_requests_that_nobody_can_hold_are_counted() -> None:
    records = [TraceRecord(0.0, 5000, 1), TraceRecord(0.0, 10, 9000), TraceRecord(0.0, 10, 10)]
    (warning,) = simulate(records, make_system("arrow-lending"), fleet()).warnings
    assert "2 requests were refused" in warning and "4096; the largest is request 1 with 9010" in warning


# what the control plane knows, and of whom


def test_steps_are_known_as_of_the_last_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def tick(_: Sampler, snapshot: Snapshot, held: int, *, idle: bool) -> None:
        seen.append(float(snapshot.decode_tokens.sum() + snapshot.handoff_tokens.sum()))

    monkeypatch.setattr(Sampler, "tick", tick)

    # What its first token on the second instance told is known: the prompt and two tokens.
    def resident_at_first_tick(heartbeat_s: float) -> float:
        settings = SimSettings(heartbeat_s=heartbeat_s)
        seen.clear()
        simulate([TraceRecord(0.0, 100, 500)], make_system("static"), fleet(), settings)
        return seen[0]

    assert resident_at_first_tick(0.0) > 150
    assert 150 < resident_at_first_tick(0.9) < resident_at_first_tick(0.0)
    assert resident_at_first_tick(50.0) == 102


def test_leaping_shows_the_kv_in_use_that_stepping_shows() -> None:
    records = [TraceRecord(0.37 * k, 700, 600) for k in range(12)]
    leapt, stepped = (
        simulate(records, make_system("static"), fleet(), SimSettings(leap=leap)).timeline
        for leap in (True, False)
    )
    assert leapt.kv_tokens.tolist() == stepped.kv_tokens.tolist()
    assert leapt.kv_tokens.max() > 700


def test_requests_before_the_first_instance_are_refused_and_later_ones_served() -> None:
    run = simulate(
        [TraceRecord(0.0, 10, 10), TraceRecord(3.5, 10, 10)],
        make_system("arrow-lending"),
        fleet(),
        SimSettings(starts_s={"i0": 3.3, "i1": 4.4}),
    )
    early, late = ended(run)
    assert (early.outcome, early.end_s) == ("no_instance", 0.0)
    assert late.ok and late.stages_s["queue"] == 0.0
    assert [use.up_s for use in run.instances] == pytest.approx([run.end_s - 3.3, 0.0])
    assert run.instance_hours == pytest.approx((run.end_s - 3.3) / 3600)


def test_observers_hear_of_prompt_and_answer_apart_and_of_what_was_cached() -> None:
    heard: list[AnswerLengths] = []

    class Recorder:
        def answered(self, answer: AnswerLengths, now: float) -> None:
            heard.append(answer)

    records = [TraceRecord(at_s, 1024, 30, (1, 2), 512) for at_s in (0.0, 5.0)]
    run = simulate(records, replace(make_system("colocated"), observers=(Recorder(),)), fleet(1))
    cached = int(run.requests.cached_tokens[1])
    assert cached > 500 and heard == [AnswerLengths(1024, 0, 30), AnswerLengths(1024, cached, 30)]


def test_a_dead_instance_loses_no_token() -> None:
    records, out = many(40, 0.03), io.BytesIO()
    settings = SimSettings(slo=SLO, deaths=[(0.21, "i0"), (0.73, "i2")])
    run = simulate(records, make_system("arrow-lending"), fleet(4), settings, journal=out)
    assert run.outcomes == {"ok": 40}
    assert run.requests.output_tokens.tolist() == [record.output_tokens for record in records]
    assert out.getvalue().count(b'"type":"failure"') > 0
    assert (run.instances[0].up_s, run.instances[2].up_s) == (0.21, 0.73)
    assert np.isnan(run.timeline.roles[-1]).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "settings",
    [{"deaths": [(1.0, "x")]}, {"deaths": [(0.0, "i0")]}, {"starts_s": {"i0": -1.0}}, {"heartbeat_s": -1.0}],
)
def test_a_fleet_that_cannot_be(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        simulate([], make_system("arrow-lending"), fleet(), SimSettings(**settings))  # type: ignore[arg-type]


def test_moves_are_counted_and_ignored_ones_say_why() -> None:
    out = io.BytesIO()
    system = replace(make_system("static"), controllers=(MovingPool(1),))
    run = simulate(many(40), system, fleet(4), journal=out)
    assert run.migrations == run.requests.migrations.sum() > 0
    assert run.requests.output_tokens.tolist() == [record.output_tokens for record in many(40)]
    assert b"it does not decode on i0" in out.getvalue() and b"it has ended" in out.getvalue()


def test_a_session_finds_its_prefix() -> None:
    ids = tuple(range(40))
    records = [TraceRecord(0.0, 640, 10, hash_ids=ids, block_tokens=16)] * 2
    records[1] = records[1]._replace(arrival_s=5.0)
    run = simulate(records, make_system("colocated"), fleet(1))
    assert run.requests.cached_tokens.tolist() == [0, 624]


def test_samples_stay_few() -> None:
    records = [TraceRecord(0.0, 10, 10), TraceRecord(5000.25, 10, 10)]
    timeline = simulate(records, make_system("static"), fleet()).timeline
    assert 1000 < len(timeline.at_s) <= 2001
    assert set(np.diff(timeline.at_s).tolist()) == {4.0}


# journals


def test_a_small_run_is_what_it_was() -> None:
    out = io.BytesIO()
    simulate(many(20), make_system("arrow-lending", slo=SLO), fleet(4), SimSettings(slo=SLO), journal=out)
    lines = out.getvalue().split(b"\n", 1)[1]  # the header names the version
    golden = Path(__file__).parent / "golden_small_run.jsonl"
    assert lines.decode().splitlines() == golden.read_text().splitlines(), (
        f"decisions changed; if that is meant, write the new journal's lines to {golden}"
    )


def test_a_short_journal_of_the_simulator_is_predicted_to_the_microsecond(tmp_path: Path) -> None:
    out = io.BytesIO()
    system = make_system("arrow-lending", slo=SLO)
    run = simulate(many(60), system, fleet(4), SimSettings(slo=SLO), journal=out)
    path = tmp_path / "live.jsonl"
    path.write_bytes(out.getvalue())
    replay = replay_journal(read_journal(path), system, fleet(4))
    assert (replay.requests, replay.left_out) == (60, 0)
    assert replay.predicted_flips == replay.observed_flips == run.flips
    for compared in (replay.ttft, replay.tpot, replay.e2e):
        assert compared is not None
        # The journal has microseconds.
        assert compared.p99_error == pytest.approx(0.0, abs=1e-3)
        assert compared.request_error == pytest.approx(0.0, abs=1e-3)


def test_a_journal_of_another_fleet(tmp_path: Path) -> None:
    out = io.BytesIO()
    simulate(many(3), make_system("arrow-lending"), fleet(4), journal=out)
    path = tmp_path / "live.jsonl"
    path.write_bytes(out.getvalue())
    with pytest.raises(ConfigError, match="had 4 instances, this one has 2"):
        replay_journal(read_journal(path), make_system("arrow-lending"), fleet(2))
