"""Explanations say what the journal says of a request, a flip and a moment, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.core.errors import ConfigError
from tidegate.journal.reader import JournalLines
from tidegate.journal.schema import Chosen, ControlLine, DecisionLine, FlipLine, JournalLine, OutcomeLine
from tidegate.reports.explanation import explain_flip, explain_moment, explain_request, worst_requests

JOURNAL = """\
{"type":"header","t":0,"version":"1","system":"s","slo":{"ttft_s":0.5,"tpot_s":0.03},
"instances":[{"id":"i0","role":"prefill"},{"id":"i1","role":"decode"},{"id":"i2","role":"decode"}]}
{"type":"control","t":1,"reason":"decode load 0.2","flips":0,"controller":"monitor"}
{"type":"flip","t":2,"instance":"i1","from":"decode","to":"prefill","reason":"inline",
"why":"all wait for 600 ms"}
{"type":"decision","t":2,"request":"r1","kind":"place_prefill","chosen":{"prefill_on":"i1","decode_on":null,
"path":"disaggregated"},"alternatives":[{"instance":"i1","ttft_s":0.1},{"instance":"i0","ttft_s":0.7}],
"predicted":{"wait_s":0.05,"prefill_s":0.05},"reason":"meets the TTFT target"}
{"type":"flip","t":2,"instance":"i0","from":"prefill","to":"decode","reason":"monitor"}
{"type":"decision","t":2.1,"request":"r1","kind":"place_decode","chosen":{"prefill_on":"i1","decode_on":"i2",
"path":"disaggregated"},"predicted":{"step_s":0.01}}
{"type":"migration","t":2.5,"request":"r1","event":"done","from":"i2","to":"i1","reason":"drain",
"moved_bytes":2000000,"stages":3,"pause_s":0.012}
{"type":"control","t":2.6,"reason":"decode load 0.9","flips":1,"controller":"monitor"}
{"type":"outcome","t":3,"request":"r1","timestamp":2000,"input_length":700,"output_length":40,"outcome":"ok",
"ttft_s":0.1,"tpot_s":0.04,"e2e_s":1.0,"stages":{"queue":0.05,"prefill":0.05,"decode":0.9},"prefill_on":"i1",
"decode_on":"i1","slo":{"ttft_s":0.5,"tpot_s":0.03},"attained":false,"predicted_lengths":[[1,50.0,"hidden"]]}
{"type":"outcome","t":3,"request":"r2","timestamp":1500,"input_length":9,"output_length":0,"outcome":"overloaded",
"status":429,"error":"full","slo":{"ttft_s":0.5,"tpot_s":0.03},"attained":false}
{"type":"flip","t":9,"instance":"i1","from":"prefill","to":"decode","reason":"monitor"}
"""


@pytest.fixture
def lines(tmp_path: Path) -> list[JournalLine]:
    path = tmp_path / "j.jsonl"
    path.write_text(JOURNAL.replace(",\n", ","))
    return list(JournalLines(path))


def test_a_request_has_its_decisions_their_alternatives_and_its_end(lines: list[JournalLine]) -> None:
    text = explain_request(lines, "r1")
    for words in (
        "700 prompt tokens, 40 answered",
        "prefill on i1: meets the TTFT target; predicted wait 50.0 ms, prefill 50.0 ms",
        "chosen  i1: ttft 100.0 ms",
        "instead i0: ttft 700.0 ms",
        "with it i1 became prefill: all wait for 600 ms",
        "decode on i2; predicted step 10.0 ms",
        "i2 -> i1 (drain) is done: 2.0 MB in 3 copies, the client waited for 12.0 ms",
        "ended: missed",
        "TPOT 40.0 ms, over 30.0 ms",
        "at token 1 hidden predicted 50 more; 39 came",
    ):
        assert words in text
    assert "i0 became decode" not in text, "a monitor's flip at the same time is not the request's"


def test_a_flip_has_the_fleet_before_it_the_last_word_and_what_followed(lines: list[JournalLine]) -> None:
    text = explain_flip(lines, 1)
    assert "because all wait for 600 ms" in text and "monitor said: decode load 0.2" in text
    assert "the fleet was 1 prefill, 2 decode" in text and "decode load 0.9" not in text
    assert "i1 went back to decode, 7.0 s later (monitor)" in text
    assert "before: 1 request came, 0.0 % attained" in text
    with pytest.raises(ConfigError, match="flips 1 to 3"):
        explain_flip(lines, 4)
    with pytest.raises(ConfigError, match="no flip"):
        explain_flip([line for line in lines if not isinstance(line, FlipLine)], 1)


def test_a_moment_and_the_worst(lines: list[JournalLine]) -> None:
    assert "the fleet was 1 prefill, 2 decode" in explain_moment(lines, 2.2)
    assert "2 requests were under way" in explain_moment(lines, 2.2)
    silent = ControlLine(2.1, "", 0, controller="speed")
    assert "speed said" not in explain_moment([*lines, silent], 2.2)


def test_the_worst_are_of_those_that_were_served_and_the_refused_are_counted(
    lines: list[JournalLine],
) -> None:
    failed = OutcomeLine(
        request="r3", timestamp_ms=0.0, outcome="engine_fault", prefill_on="i0", attained=False
    )
    ids, elsewhere = worst_requests([*lines, failed], 5)
    assert ids == ["r3", "r1"], "one that failed missed by more than any delay"
    assert elsewhere == {"overloaded": 1}
    assert worst_requests([*lines, failed], 1)[0] == ["r3"]


def test_an_unknown_request_names_some_that_there_are(lines: list[JournalLine]) -> None:
    with pytest.raises(ConfigError, match=r"no request 'r9'; it has r1, r2"):
        explain_request(lines, "r9")
    unfinished = [line for line in lines if not isinstance(line, OutcomeLine)]
    assert "it has not ended" in explain_request(unfinished, "r1")


def test_a_number_and_its_unit_stay_on_one_line(lines: list[JournalLine]) -> None:
    said = explain_request(lines, "r1") + explain_flip(lines, 1) + explain_moment(lines, 2.2)
    assert "100.0 ms" in said and "\N{NO-BREAK SPACE}" not in said
    for width in range(90):
        decision = DecisionLine(
            1.0,
            "r8",
            "place_prefill",
            Chosen(prefill_on="i" * width),
            [{"instance": "i" * width, "wait_s": 0.1, "cost_s": 1.0, "late_s": 2.0}],
            {"wait_s": 0.1, "prefill_s": 0.2},
        )
        for line in explain_request([decision], "r8").splitlines():
            assert not line.strip().startswith(("ms", "s,"))
