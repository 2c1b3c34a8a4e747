"""What a system begins with: the lengths of the newest answers in a journal or a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.core.errors import ConfigError, TraceError
from tidegate.journal.schema import HeaderLine, OutcomeLine
from tidegate.journal.writer import encode_line
from tidegate.policies.protocols import AnswerLengths
from tidegate.signals.answered import MOST, answered_in
from tidegate.systems import make_system


def outcome(at_s: float, took_s: float, prompt: int, cached: int = 0, what: str = "ok") -> OutcomeLine:
    return OutcomeLine(
        t_s=at_s + took_s,
        timestamp_ms=1000 * at_s,
        input_tokens=prompt,
        output_tokens=7,
        cached_tokens=cached,
        outcome=what,
    )


def test_a_journal_gives_who_was_answered_in_the_order_of_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lines = (
        HeaderLine(0.0),
        outcome(0.0, 9.0, 300),
        outcome(1.0, 1.0, 100, cached=64),
        outcome(2.0, 1.0, 200, what="overloaded"),
    )
    path.write_bytes(b"".join(encode_line(line) + b"\n" for line in lines))
    assert answered_in(str(path)) == (AnswerLengths(100, 64, 7), AnswerLengths(300, 0, 7))


def test_a_trace_gives_its_newest_requests_and_no_more_than_new_traffic_soon_outweighs(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.csv"
    rows = "".join(f"{number},{number + 1},5\n" for number in range(MOST + 9))
    path.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    found = answered_in(str(path))
    assert (len(found), found[0], found[-1]) == (MOST, AnswerLengths(10, 0, 5), AnswerLengths(MOST + 9, 0, 5))
    assert len(answered_in("like:long:300")) == len(answered_in("sample:azure-conv")) == MOST


def test_a_journal_without_an_answer_yet_gives_none_and_what_is_no_recording_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(encode_line(HeaderLine(0.0)) + b"\n")
    assert answered_in(str(path)) == ()
    path.write_text("a shopping list\n")
    with pytest.raises(TraceError, match="unknown column"):
        answered_in(str(path))


def test_a_system_that_follows_no_lengths_is_not_given_any() -> None:
    with pytest.raises(ConfigError, match="'static' follows no lengths"):
        make_system("static", answered=answered_in("like:long:40"))
    with pytest.raises(ConfigError, match="'static' follows no lengths"):
        make_system("static", answered=())
