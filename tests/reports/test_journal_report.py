"""The report of a journal."""

from __future__ import annotations

import io
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tidegate.core.slo import Slo
from tidegate.journal import read_journal
from tidegate.reports.journal_report import build_report, render_report
from tidegate.reports.run_page import journal_page
from tidegate.workloads.readers import read_trace

HEADER = {
    "type": "header", "version": "0.1.0", "system": "arrow", "started_unix_s": 1.0,
    "slo": {"ttft_s": 0.5, "tpot_s": 0.05},
    "instances": [{"id": "i0", "role": "prefill"}, {"id": "i1", "role": "decode"}],
}  # fmt: skip


def decision(request: str, **fields: Any) -> dict[str, Any]:
    chosen = {"prefill_on": "i0", "decode_on": None, "path": "disaggregated"}
    return {
        "type": "decision",
        "t": 0.0,
        "request": request,
        "kind": "place_prefill",
        "chosen": chosen,
    } | fields


def outcome(request: str, arrival_s: float, **fields: Any) -> dict[str, Any]:
    """A request with 0.1 s of queue, 0.2 s of prefill, 0.1 s until the second token, 1 s of decode."""
    stages = {
        "queue": 0.1,
        "prefill": 0.2,
        "transfer": 0.05,
        "decode_queue": 0.03,
        "first_step": 0.02,
        "decode": 1.0,
    }
    return {
        "type": "outcome", "t": arrival_s + 1.4, "request": request, "timestamp": arrival_s * 1000,
        "input_length": 100, "output_length": 23, "outcome": "ok", "status": 200, "finish_reason": "length",
        "ttft_s": 0.3, "tpot_s": 0.05, "e2e_s": 1.4, "stages": stages, "prefill_on": "i0", "decode_on": "i1",
        "predicted_prefill_s": 0.25, "observed_prefill_s": 0.2, "cached_tokens": 10, "replays": 0,
    } | fields  # fmt: skip


REJECTED = {
    "ttft_s": None, "tpot_s": None, "e2e_s": None, "stages": None, "prefill_on": None, "decode_on": None,
    "predicted_prefill_s": None, "observed_prefill_s": None, "output_length": 0, "cached_tokens": None,
    "outcome": "overloaded", "status": 429, "finish_reason": None,
}  # fmt: skip


def write(path: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


@pytest.fixture
def journal_file(tmp_path: Path) -> Path:
    flip = {
        "type": "flip",
        "t": 2.0,
        "instance": "i1",
        "from": "decode",
        "to": "prefill",
        "reason": "monitor",
    }
    return write(
        tmp_path / "run.jsonl",
        HEADER,
        decision("a"),
        decision("b"),
        decision("c", chosen={"reject": "overloaded"}),
        decision("d"),
        outcome("b", 1.0, ttft_s=0.6, predicted_prefill_s=0.1, replays=1),
        outcome("a", 0.0),
        flip,
        {"type": "weather", "t": 2.5, "note": "kinds of a later version are skipped"},
        outcome("c", 2.0, t=4.0, **REJECTED),
    )


def test_report_scores_offered_requests(journal_file: Path) -> None:
    report = build_report(read_journal(journal_file))
    assert report.system == "arrow"
    assert report.slo == Slo(0.5, 0.05)
    assert (report.attainment.offered, report.attainment.attained) == (3, 1)
    assert (report.attainment.ttft_attained, report.attainment.tpot_attained) == (1, 2)
    assert report.outcomes == {"ok": 2, "overloaded": 1}
    assert report.goodput.offered_rps == pytest.approx(1.0)
    assert not report.goodput.level_met


def test_requests_wrong_in_themselves_are_not_scored_nor_replayed(tmp_path: Path) -> None:
    wrong = outcome("w", 1.0, **(REJECTED | {"outcome": "bad_request", "status": 400}))
    gone = outcome("g", 2.0, outcome="client_gone", status=499)
    path = write(tmp_path / "j.jsonl", HEADER, outcome("a", 0.0), wrong, gone)
    report = build_report(read_journal(path))
    assert (report.attainment.offered, report.attainment.attained) == (2, 1)
    assert report.outcomes == {"ok": 1, "bad_request": 1, "client_gone": 1}
    assert any("refused as malformed: 1" in note for note in report.notes)
    assert [r.arrival_s for r in read_trace(path)] == [0.0, 2.0]


def test_slo_option_overrides_and_a_requests_own_slo_beats_the_header(tmp_path: Path) -> None:
    own = {"ttft_s": 0.2, "tpot_s": 0.05}
    path = write(tmp_path / "j.jsonl", HEADER, outcome("a", 0.0, slo=own), outcome("b", 1.0))
    assert build_report(read_journal(path)).attainment.attained == 1
    assert build_report(read_journal(path), slo=Slo(0.4, 0.05)).attainment.attained == 2


def test_decisions_flips_and_replays_are_counted(journal_file: Path) -> None:
    report = build_report(read_journal(journal_file))
    assert report.decisions == {"place_prefill": 3, "reject": 1}
    assert report.flip_counts == {"decode to prefill, monitor": 1}
    assert (report.replays, report.replayed_requests, report.migrations) == (1, 1, 0)
    assert report.unfinished == 1
    assert any("a decision but no outcome: 1" in note for note in report.notes)


def test_controllers_are_told_apart_also_where_an_old_journal_does_not_name_them(tmp_path: Path) -> None:
    said = {"type": "control", "t": 1.0, "reason": "low", "flips": 0}
    path = write(
        tmp_path / "j.jsonl",
        HEADER,
        said,
        said | {"controller": "monitor", "flips": 1},
        said | {"controller": "scale", "reason": "[wait]"},
        said | {"controller": "monitor", "reason": "high", "flips": 2},
        outcome("a", 0.0),
    )
    report = build_report(read_journal(path))
    assert [astuple(work) for work in report.controllers] == [
        ("", 1, 0, "low"),
        ("monitor", 2, 3, "high"),
        ("scale", 1, 0, "[wait]"),
    ]
    out = io.StringIO()
    Console(file=out, width=100).print(render_report(report))
    assert "[wait]" in out.getvalue()


def test_instance_use_counts_overlapping_work_once(journal_file: Path) -> None:
    uses = {use.instance: use for use in build_report(read_journal(journal_file)).instances}
    assert (uses["i0"].prefills, uses["i0"].decodes, uses["i0"].prompt_tokens) == (2, 0, 200)
    assert (uses["i1"].decodes, uses["i1"].generated_tokens, uses["i1"].first_role) == (2, 46, "decode")
    assert uses["i0"].busy_share == pytest.approx(2 * 0.2 / 4.0)
    # a decodes in [0.38, 1.4], b in [1.38, 2.4]: together [0.38, 2.4] of 4 s.
    assert uses["i1"].busy_share == pytest.approx(2.02 / 4.0)


def test_prediction_error_and_bias(journal_file: Path) -> None:
    prediction = build_report(read_journal(journal_file)).prediction
    assert prediction is not None  # relative errors +0.25 and -0.5
    assert prediction.count == 2
    assert prediction.median_abs_error == pytest.approx(0.375)
    assert prediction.p90_abs_error == pytest.approx(0.475)
    assert prediction.bias == pytest.approx(-0.125)


def test_stages_are_summarised_by_the_token_they_come_before(journal_file: Path) -> None:
    report = build_report(read_journal(journal_file))
    assert list(report.stages_of_ttft_s) == ["queue", "prefill", "other"]
    assert report.stages_of_ttft_s["prefill"].p99 == pytest.approx(0.2)
    later = ["transfer", "decode_queue", "first_step", "decode"]
    assert list(report.stages_after_first_token_s) == later
    assert report.to_json()["stages_after_first_token_s"]["decode"]["p50"] == pytest.approx(1.0)
    ttft_s = sum(stage.mean for stage in report.stages_of_ttft_s.values())
    assert report.ttft_s is not None and ttft_s == pytest.approx(report.ttft_s.mean)


def test_what_engines_do_not_tell_of_ttft_is_named(tmp_path: Path) -> None:
    told = {"queue": 0.0, "prefill": 0.0096, "decode": 1.0}
    longer = {"queue": 0.25, "prefill": 0.2}  # by an engine's own clock
    path = write(
        tmp_path / "j.jsonl",
        HEADER,
        outcome("a", 0.0, ttft_s=0.0545, stages=told),
        outcome("b", 1.0, stages=longer),
    )
    report = build_report(read_journal(path))
    parts = report.to_json()["stages_of_ttft_s"]
    assert parts["other"]["max"] == pytest.approx(0.0449) and parts["prefill"]["max"] == pytest.approx(0.05)
    assert report.ttft_s is not None
    assert sum(part["mean"] for part in parts.values()) == pytest.approx(report.ttft_s.mean)
    text = io.StringIO()
    Console(file=text, width=100).print(render_report(report))
    assert "other: HTTP" in text.getvalue()
    assert "other: HTTP" in journal_page(report, read_journal(path), [])


def test_half_a_last_line_is_tolerated_and_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "j.jsonl", HEADER, outcome("a", 0.0), tail='{"type":"outcome","t":3.')
    report = build_report(read_journal(path))
    assert report.attainment.offered == 1
    assert any("cut off" in note for note in report.notes)


def test_a_sparse_outcome_is_enough(tmp_path: Path) -> None:
    sparse = {"type": "outcome", "timestamp": 5, "input_length": 7, "output_length": 2, "outcome": "ok"}
    report = build_report(read_journal(write(tmp_path / "j.jsonl", {"type": "header"}, sparse)))
    assert (report.attainment.offered, report.attainment.attained) == (1, 0)  # no TTFT: not known to attain
    assert any("names no SLO" in note for note in report.notes)


def test_a_journal_is_a_trace_sorted_by_arrival(journal_file: Path) -> None:
    records = list(read_trace(journal_file))
    assert [r.arrival_s for r in records] == [0.0, 1.0, 2.0]
    assert [r.output_tokens for r in records] == [23, 23, 1]


def test_rendering_shows_the_numbers(journal_file: Path) -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(render_report(build_report(read_journal(journal_file))))
    text = out.getvalue()
    for shown in (
        "33.33 %",
        "1 of 3",
        "overloaded",
        "decode to prefill, monitor",
        "50.5 %",
        "-12.5 %",
        "missed",
        "of TTFT",
        "after the first token",
        "decode queue",
    ):
        assert shown in text


def test_an_empty_journal_reports_that_nothing_ended(tmp_path: Path) -> None:
    report = build_report(read_journal(write(tmp_path / "j.jsonl", HEADER)))
    out = io.StringIO()
    Console(file=out, width=100).print(render_report(report))
    assert "nothing to score" in out.getvalue()
    json.dumps(report.to_json())


def test_length_errors_are_told_by_progress(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    rows = [
        HEADER,
        outcome(
            "r0", 0.0, output_length=200, predicted_lengths=[[0, 150.0, "histogram"], [100, 130.0, "hidden"]]
        ),
        outcome("r1", 1.0, output_length=300, predicted_lengths=[[0, 350.0, "histogram"]]),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build_report(read_journal(path)).lengths
    assert [astuple(each) for each in found] == [
        ("hidden", 64, 1, 30.0, 30.0, 100.0),
        ("histogram", 0, 2, 50.0, 0.0, 250.0),
    ]
