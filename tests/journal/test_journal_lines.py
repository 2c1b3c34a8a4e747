"""The journal's lines: what is written is read back, and what earlier versions wrote still is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.control.record import RequestEnding, RequestRecord, outcome_line
from tidegate.core.decision import Alternatives, Hold, Place, Reject, Verdict
from tidegate.core.decision import Path as RequestPath
from tidegate.core.errors import Overloaded, TraceError
from tidegate.core.request import Request
from tidegate.core.slo import Slo
from tidegate.journal import JournalLines, JournalWriter, read_journal
from tidegate.journal.reader import decode_line
from tidegate.journal.schema import (
    LINES,
    Chosen,
    ForecastLine,
    HeaderLine,
    InputLine,
    InstanceLabel,
    InstanceLine,
    JournalLine,
    LoadDriftLine,
    OutcomeLine,
    PredictedLength,
    ProfileLine,
    SessionLine,
)
from tidegate.journal.writer import encode_line

EARLIER = Path(__file__).parent / "journals_0_1_0"
"""Journals that version 0.1.0 wrote before the lines had a schema."""

NUMBERS = st.floats(0.0, 1e9)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
SLOS = st.builds(Slo, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
PLACEMENTS = st.builds(Chosen, prefill_on=TEXTS, decode_on=st.none() | TEXTS, path=TEXTS)
CHOSEN = PLACEMENTS | st.builds(Chosen, hold=TEXTS) | st.builds(Chosen, reject=TEXTS)
BY_TYPE: dict[type[Any], st.SearchStrategy[Any]] = {
    float: NUMBERS,
    str: TEXTS,
    int: st.integers(0, 2**62),
    bool: st.booleans(),
    Slo: SLOS,
    Chosen: CHOSEN,
    InstanceLabel: st.builds(InstanceLabel, TEXTS, TEXTS),
    PredictedLength: st.builds(PredictedLength, st.integers(0, 2**40), NUMBERS, TEXTS),
    type(None): st.none(),
    msgspec.UnsetType: st.just(msgspec.UNSET),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return what a field of this type may hold."""
    if kind in BY_TYPE:
        return BY_TYPE[kind]
    parts = [values(part) for part in get_args(kind)]
    if get_origin(kind) in (dict, Mapping):
        return st.dictionaries(parts[0], parts[1], max_size=3)
    return st.lists(parts[0], max_size=3) if get_origin(kind) in (list, Sequence) else st.one_of(*parts)


def lines_of(line: type[JournalLine]) -> st.SearchStrategy[JournalLine]:
    fields = msgspec.structs.fields(line)
    return st.builds(line, **{field.name: values(field.type) for field in fields})


def decode(text: str) -> JournalLine | None:
    return decode_line(json.loads(text), text, "j.jsonl", 1, LINES)


@given(st.one_of(*(lines_of(line) for line in LINES.values())))
def test_a_line_that_is_written_reads_as_itself(line: JournalLine) -> None:
    text = encode_line(line).decode()
    assert decode(text) == line
    keys = list(json.loads(text))
    assert keys[:2] == ["type", "t"]


@pytest.mark.parametrize("name", ["gateway.jsonl", "simulated.jsonl"])
def test_a_journal_of_an_earlier_version_loses_nothing(name: str) -> None:
    texts = (EARLIER / name).read_bytes().splitlines()
    lines = list(JournalLines(EARLIER / name))
    assert [orjson.loads(encode_line(line)) for line in lines] == [orjson.loads(text) for text in texts]


def test_a_simulations_lines_are_the_bytes_of_an_earlier_version() -> None:
    path = EARLIER / "simulated.jsonl"
    assert [encode_line(line) for line in JournalLines(path)] == path.read_bytes().splitlines()


def test_the_earlier_journals_have_every_type_of_line() -> None:
    seen = {type(line) for path in EARLIER.iterdir() for line in JournalLines(path)}
    later = {ForecastLine, InputLine, ProfileLine, SessionLine}
    assert seen == set(LINES.values()) - later


def test_a_journal_of_an_earlier_version_is_summed_up() -> None:
    journal = read_journal(EARLIER / "gateway.jsonl")
    assert (journal.system, journal.version, journal.slo) == ("arrow", "0.1.0", Slo(1.0, 0.05))
    assert journal.roles == {"i0": "prefill", "i1": "decode"}
    assert [o.outcome for o in journal.outcomes] == ["ok", "prompt_too_long", "engine_unreachable"]
    assert [o.refused for o in journal.outcomes] == [False, True, False]
    assert journal.outcomes[0].arrival_s == pytest.approx(1.057035)
    assert [(f.t_s, f.from_role, f.to_role) for f in journal.flips] == [(3.2, "prefill", "decode")]
    assert journal.decisions == {"place_prefill": 2, "place_decode": 1, "hold": 1, "reject": 1}
    assert (journal.unfinished, journal.truncated) == (1, False)
    assert journal.last_t_s == 3.5


def test_keys_and_types_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"type":"header","mood":"calm"}\n{"type":"weather","t":9}\n{"t":9}\n{"type":{}}\n')
    assert list(JournalLines(path)) == [HeaderLine()]


def test_null_is_alike_to_absent() -> None:
    absent = decode('{"type":"outcome","timestamp":5}')
    nulls = '{"type":"outcome","t":null,"timestamp":5,"stages":null,"cached_tokens":null,"session_id":null}'
    assert decode(nulls) == absent == OutcomeLine(timestamp_ms=5.0)


def test_an_outcome_without_its_end_ends_by_its_duration() -> None:
    line = decode('{"type":"outcome","timestamp":2000,"e2e_s":1.5,"prefill_on":"i0"}')
    assert isinstance(line, OutcomeLine)
    assert (line.arrival_s, line.end_s, line.decoded_on) == (2.0, 3.5, "i0")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ('{"type":"flip",,}', 16, "broken JSON"),
        ('{"type":"outcome","timestamp":"soon"}', 31, "timestamp is 'soon', expected a number"),
        ('{"type":"outcome","timestamp":1,"status":true}', 42, "status is True, expected an integer"),
        ('{"type":"outcome","timestamp":1,"stages":[]}', 42, "stages is .*, expected an object"),
        ('{"type":"outcome","timestamp":1,"stages":{"queue":"x"}}', 42, "stages is .*, expected a number"),
        ('{"type":"outcome","timestamp":1,"slo":{"ttft_s":-1}}', 39, "an SLO needs positive"),
        ('{"type":"header","instances":"i0"}', 30, "instances is 'i0', expected a list"),
        ('{"type":"flip","instance":"i0","from":"decode","to":"prefill"}', 0, "the 'flip' line lacks t"),
    ],
)
def test_damage_is_an_error_with_its_place(tmp_path: Path, text: str, column: int, message: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(f'{{"type":"header"}}\n{text}\n{{"type":"outcome","timestamp":5}}\n')
    with pytest.raises(TraceError, match=message) as error:
        read_journal(path)
    assert (error.value.file, error.value.line, error.value.column) == (str(path), 2, column)


def test_half_a_last_line_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"type":"header"}\n{"type":"outcome","timestamp":5}\n{"type":"outcome","t":3.')
    journal = read_journal(path)
    assert (journal.truncated, len(journal.outcomes)) == (True, 1)


def test_a_file_without_a_header_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"type":"bench"}\n')
    with pytest.raises(TraceError, match="this is not a journal"):
        read_journal(path)


def written(verdict: Verdict) -> dict[str, Any]:
    out: list[bytes] = []
    request = Request("r", 1, 1, 0.0)
    JournalWriter(out.append, 10.0).decision(12.0000004, request, "place_prefill", verdict, None)
    (line,) = out
    assert line.endswith(b"\n")
    row: dict[str, Any] = orjson.loads(line)
    return row


def test_a_decision_says_what_was_chosen_and_among_what() -> None:
    alternatives = Alternatives([f"i{k}" for k in range(12)], dict)
    place = written(Verdict(Place("i0", None, RequestPath.DISAGGREGATED), (), alternatives, "it is idle"))
    assert place["t"] == 2.0
    assert place["chosen"] == {"prefill_on": "i0", "decode_on": None, "path": "disaggregated"}
    assert [row["instance"] for row in place["alternatives"]] == [f"i{k}" for k in range(8)]
    assert place["reason"] == "it is idle"
    held = written(Verdict(Hold("full")))
    assert (held["chosen"], held["alternatives"]) == ({"hold": "full"}, [])
    assert written(Verdict(Reject("full", 1.0)))["chosen"] == {"reject": "full"}


def test_an_outcome_counts_from_the_journals_begin_and_leaves_out_what_is_not_there() -> None:
    record = RequestRecord(11.0, 11.25, 12.25, "i0", "i1", stages={"queue": 0.12345678})
    line = outcome_line(record, RequestEnding("r", Slo(0.3, 0.2), 40, 6, "length", None, 12.5), 10.0)
    row = orjson.loads(encode_line(line))
    assert (row["t"], row["timestamp"], row["ttft_s"], row["tpot_s"], row["e2e_s"]) == (
        2.5,
        1e3,
        0.25,
        0.2,
        1.5,
    )
    assert (row["status"], row["error"], row["attained"]) == (200, None, True)
    assert row["stages"] == {"queue": 0.123457}
    assert not row.keys() & {"session_id", "tenant", "unmovable", "read_back_tokens"}


def test_an_outcome_of_an_error_has_its_status_and_misses_its_targets() -> None:
    record = RequestRecord(11.0, 11.1, 11.2, unmovable="seed", read_back_tokens=32)
    error = Overloaded("held too long", retry_after_s=1.0)
    line = outcome_line(record, RequestEnding("r", Slo(), 40, 6, None, error, 12.5, "chat", "acme"), 10.0)
    assert (line.outcome, line.status, line.error, line.attained) == (
        "overloaded",
        429,
        "held too long",
        False,
    )
    assert (line.session_id, line.tenant, line.unmovable, line.read_back_tokens) == (
        "chat",
        "acme",
        "seed",
        32,
    )


def test_a_disabled_writer_drops_its_lines() -> None:
    writer = JournalWriter(None)
    assert not writer.enabled
    writer.instance(1.0, "i0", "down", reason="died")


def test_odd_values_cost_themselves_and_not_the_line() -> None:
    odd = OutcomeLine(t_s=1.0, timestamp_ms=1.0, tenant="a\udcff", ttft_s=math.inf)
    row = json.loads(encode_line(odd))
    assert (row["type"], row["t"], row["tenant"]) == ("outcome", 1.0, "a?")
    assert (
        orjson.loads(encode_line(LoadDriftLine(1.0, "i0", "kv", "begun", engine=2**70)))["engine"] == 2.0**70
    )
    assert (
        encode_line(InstanceLine(1.0, "i0", "up"))
        == b'{"type":"instance","t":1.0,"instance":"i0","event":"up"}'
    )
