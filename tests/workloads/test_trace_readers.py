"""Reading traces: round trips, formats, and the place of every defect."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError, TraceError
from tidegate.workloads.formats import given_format
from tidegate.workloads.readers import has_arrivals, read_trace, read_untimed
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.trace_statistics import statistics

ids = st.integers(0, 2**40)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
records = st.builds(
    TraceRecord,
    arrival_s=st.integers(0, 10**9).map(lambda us: us / 1e6),
    input_tokens=st.integers(1, 10**6),
    output_tokens=st.integers(1, 10**6),
    hash_ids=st.lists(ids, max_size=4).map(tuple),
    block_tokens=st.sampled_from((512, 16)),
    session_id=names,
    turn=st.integers(0, 9),
    delay_s=st.one_of(st.none(), st.integers(0, 10**6).map(lambda ms: ms / 1e3)),
    slo_class=names,
    client_id=names,
)


def fitting(record: TraceRecord) -> TraceRecord:
    """Return the record without ids that its prompt and answer have no blocks for."""
    blocks = -(-(record.input_tokens + record.output_tokens) // record.block_tokens)
    return record._replace(hash_ids=record.hash_ids[:blocks])


traces = st.lists(records.map(fitting), min_size=1, max_size=8).map(
    lambda rs: sorted(rs, key=lambda r: r.arrival_s)
)


def load(content: bytes | str) -> list[TraceRecord]:
    with tempfile.NamedTemporaryFile(suffix=".trace") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        return list(read_trace(file.name))


def failure(content: bytes | str) -> TraceError:
    with pytest.raises(TraceError) as error:
        load(content)
    return error.value


def native(record: TraceRecord) -> dict[str, Any]:
    """Write a record as Mooncake JSONL with the optional extra keys."""
    line = {
        "timestamp": round(record.arrival_s * 1000.0, 6),
        "input_length": record.input_tokens,
        "output_length": record.output_tokens,
        "hash_ids": list(record.hash_ids),
        "block_tokens": record.block_tokens,
        "session_id": record.session_id,
        "turn": record.turn,
        "delay_ms": None if record.delay_s is None else round(record.delay_s * 1000.0, 6),
        "slo_class": record.slo_class,
        "client_id": record.client_id,
    }
    return {key: value for key, value in line.items() if value not in (None, "", [])}


@given(traces, st.booleans())
def test_native_jsonl_round_trips(trace: list[TraceRecord], compressed: bool) -> None:
    content = "".join(json.dumps(native(record)) + "\n" for record in trace).encode()
    loaded = load(gzip.compress(content) if compressed else content)
    for got, want in zip(loaded, trace, strict=True):
        assert got.arrival_s == pytest.approx(want.arrival_s, abs=1e-9)
        assert got.delay_s == (None if want.delay_s is None else pytest.approx(want.delay_s, abs=1e-9))
        assert (got.input_tokens, got.output_tokens, got.hash_ids, got.block_tokens) == (
            want.input_tokens, want.output_tokens, want.hash_ids, want.block_tokens,
        )  # fmt: skip
        assert (got.session_id, got.turn, got.slo_class, got.client_id) == (
            want.session_id, want.turn, want.slo_class, want.client_id,
        )  # fmt: skip


@given(traces)
def test_own_csv_round_trips(trace: list[TraceRecord]) -> None:
    trace = [fitting(r._replace(block_tokens=512)) for r in trace]
    rows = [
        f"{r.arrival_s!r},{r.input_tokens},{r.output_tokens},{'|'.join(map(str, r.hash_ids))}\n"
        for r in trace
    ]
    loaded = load("arrival_s,input_tokens,output_tokens,hash_ids\n" + "".join(rows))
    assert loaded == [TraceRecord(r.arrival_s, r.input_tokens, r.output_tokens, r.hash_ids) for r in trace]


def test_azure_counts_from_its_first_row_and_raises_zero_outputs() -> None:
    loaded = load(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n"
        "2023-11-16 18:15:50.9951690,396,0\r\n"
    )
    assert [(r.input_tokens, r.output_tokens) for r in loaded] == [(374, 44), (396, 1)]
    assert [r.arrival_s for r in loaded] == pytest.approx([0.0, 4.314579], abs=1e-6)


def test_burstgpt_old_and_new_columns_and_failed_rows() -> None:
    old = load(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "7,ChatGPT,0,0,0,Conversation log\n"
        '45,"GPT-4, turbo",1087,230,1317,API log\n'
    )
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in old] == [(5, 472, 18), (45, 1087, 230)]
    new = load(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,s1,0.3,ChatGPT,472,18,490,Conversation log\n"
    )
    assert new[0].session_id == "s1"


def test_bench_results_are_traces() -> None:
    loaded = load(
        '{"type":"bench"}\n'
        '{"type":"request","timestamp":20,"input_length":5,"output_length":6,"status":"ok"}\n'
        '{"type":"request","timestamp":10,"input_length":3,"output_length":4,"status":"http"}\n'
        '{"type":"summary"}\n'
    )
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in loaded] == [(0.01, 3, 4), (0.02, 5, 6)]


BLOCKS_OF_16 = [
    {"input_length": 521, "output_length": 132, "hash_ids": [*range(16), *range(start, start + 17)]}
    for start in (100, 200)
]


def jsonl(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_more_ids_than_blocks_is_an_error_that_names_block_tokens() -> None:
    """Believed, half of the prompts would be shared; with their blocks of 16 tokens it is a quarter."""
    lines = [{"timestamp": 0, **line} for line in BLOCKS_OF_16]
    error = failure(jsonl(*lines))
    assert (error.line, error.column) == (1, 73)
    assert "has 33 ids, but 521 tokens of prompt and 132 of answer are 2 blocks of 512" in str(error)
    assert "block_tokens" in str(error)
    sized = load(jsonl(*({**line, "block_tokens": 16} for line in lines)))
    reuse = statistics(Workload.of(sized), timed=True).reuse
    assert reuse is not None and reuse.tokens == pytest.approx(0.2457, abs=1e-4)
    assert "2 blocks of 512" in str(failure("arrival_s,input_tokens,output_tokens,hash_ids\n0,600,9,1|2|3\n"))
    assert "11 blocks of 64" in str(failure(jsonl(*({**line, "block_tokens": 64} for line in lines))))


CHAT = {"parent_chat_id": -1, "type": "text", "turn": 1, "input_length": 10, "output_length": 2}


@pytest.mark.parametrize(
    ("content", "title", "expected"),
    [
        (
            "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
            "2025-05-01 00:00:01+00:00,2,374,44\n2025-05-01 00:00:03.5,0,396,1\n",
            "Azure CSV, 2 requests; NumImages is not used",
            [TraceRecord(0.0, 374, 44), TraceRecord(2.5, 396, 1)],
        ),
        (
            "\n\n,arrived_at,num_prefill_tokens,num_decode_tokens\n0,0.5,374.0,44\n1,2.5,396,1\n",
            "Vidur CSV, 2 requests",
            [TraceRecord(0.5, 374, 44), TraceRecord(2.5, 396, 1)],
        ),
        (
            "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
            "0,2,0,0.25,1,374,44\n",
            "Splitwise CSV, 1 requests",
            [TraceRecord(0.25, 374, 44)],
        ),
        (
            "Unnamed: 0,arrival_s,input_tokens,output_tokens\n0,1.0,5,6\n",
            "tidegate CSV, 1 requests",
            [TraceRecord(1.0, 5, 6)],
        ),
        (
            "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
            "5,M,472,18,490,API log\n7,M,300,0,300,API log\n8,M,0,0,0,API log\n",
            "BurstGPT CSV, 1 requests; 2 failed requests (0 tokens) left out",
            [TraceRecord(5.0, 472, 18)],
        ),
        (
            jsonl({"type": "text", "timestamp": 1500, "input_length": 5, "output_length": 6}),
            "Mooncake JSONL, 1 requests",
            [TraceRecord(1.5, 5, 6)],
        ),
        (
            jsonl(
                {"chat_id": 7, **CHAT, "timestamp": 1.5, "hash_ids": [4]},
                {"chat_id": 8, **CHAT, "timestamp": 2.0, "parent_chat_id": 7, "turn": 2, "hash_ids": [4]},
            ),
            "Bailian JSONL, 2 requests",
            [TraceRecord(1.5, 10, 2, (4,), 16, "7", 0), TraceRecord(2.0, 10, 2, (4,), 16, "7", 1)],
        ),
        (
            jsonl(
                {"session_id": "a", "timestamp": 1000, "input_length": 5, "output_length": 6},
                {"session_id": "a", "delay": 2500, "input_length": 7, "output_length": 8},
                {"session_id": "b", "timestamp": 2000, "input_length": 9, "output_length": 1},
            ),
            "Mooncake JSONL, 3 requests",
            [
                TraceRecord(1.0, 5, 6, session_id="a"),
                TraceRecord(2.0, 9, 1, session_id="b"),
                TraceRecord(3.5, 7, 8, session_id="a", delay_s=2.5),
            ],
        ),
    ],
)
def test_traces_that_people_have(
    content: str, title: str, expected: list[TraceRecord], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tidegate.workloads")
    assert load(content) == expected
    assert [record.getMessage().partition(": read as ")[2] for record in caplog.records] == [title]


def test_turns_with_pauses_only_wait_for_a_start_of_their_session(tmp_path: Path) -> None:
    path = tmp_path / "turns.jsonl"
    first = {"session_id": "a", "input_length": 5, "output_length": 6, "delay": 0}
    path.write_text(jsonl(first, {**first, "session_id": "b"}, {**first, "delay": 1500}))
    with pytest.raises(TraceError, match="no arrival times"):
        read_trace(path)
    assert not has_arrivals(path)
    assert [(r.session_id, r.arrival_s) for r in read_untimed(path)] == [("a", 0.0), ("a", 1.5), ("b", 0.0)]


def test_a_turn_without_a_time_needs_one_before_it() -> None:
    first = {"session_id": "a", "timestamp": 0, "input_length": 5, "output_length": 6}
    later = {"session_id": "b", "delay": 10, "input_length": 5, "output_length": 6}
    assert "no turn of its session comes before it" in str(failure(jsonl(first, later)))
    assert "timestamp is missing" in str(failure(jsonl(first, {**later, "session_id": ""})))


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("when,who,prompt,answer,turn\n1500,x,5,6,odd\n", "arrival_ms=when,input=prompt,output=answer"),
        (
            jsonl({"when": 1.5, "prompt": 5, "answer": 6.0, "text": "hello"}),
            "arrival=when,input=prompt,output=answer",
        ),
    ],
)
def test_columns_may_be_named_for_everything_else(content: str, columns: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(content)
    with pytest.raises(TraceError, match="--columns arrival"):
        read_trace(path)
    assert list(read_trace(path, columns)) == [TraceRecord(1.5, 5, 6)]
    assert has_arrivals(path, columns)
    with pytest.raises(TraceError, match=r"lacks 'nope'|nope is missing"):
        read_trace(path, columns.replace("answer", "nope"))


@pytest.mark.parametrize("columns", ["", "input=a", "input=a,output=b,input=c", "colour=a,input=b,output=c"])
def test_wrong_columns_are_told(columns: str) -> None:
    with pytest.raises(ConfigError, match="--columns names the columns of a trace"):
        given_format(columns)


OWN = "arrival_s,input_tokens,output_tokens\n"
MOON = '{"timestamp": 0, "input_length": 5, "output_length": 1}\n'


@pytest.mark.parametrize(
    ("content", "line", "column", "words"),
    [
        (OWN + "0.0,10,5\n1.0,ten,5\n", 3, 5, "input_tokens is 'ten', expected an integer >= 1"),
        (OWN + "0.0,0,5\n", 2, 5, "input_tokens is '0', expected an integer >= 1"),
        (OWN + "0.0,-3,5\n", 2, 5, "input_tokens is '-3'"),
        (OWN + "0.0,10,5.5\n", 2, 8, "output_tokens is '5.5', expected an integer"),
        (OWN + "0.0,10,-1\n", 2, 8, "output_tokens is '-1', expected an integer >= 0"),
        (OWN + "2.0,10,5\n1.5,10,5\n", 3, 1, "arrival_s is '1.5', earlier than the row before"),
        (OWN + "nan,10,5\n", 2, 1, "arrival_s is 'nan', expected a number of seconds >= 0"),
        (OWN + "0.0,10\n", 2, 7, "2 fields, expected 3"),
        (OWN + "0.0,10,5,9\n", 2, 10, "4 fields, expected 3"),
        ("arrival_s,input_tokens,surprise,output_tokens\n", 1, 24, "unknown column 'surprise'"),
        ("arrival_s,input_tokens\n", 1, 0, "lacks 'output_tokens'"),
        ("arrival_s,arrival_s,input_tokens,output_tokens\n", 1, 11, "appears twice"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", 2, 1, "TIMESTAMP is 'yesterday'"),
        (OWN[:-1] + ",hash_ids\n0.0,10,5,1|x\n", 2, 10, "hash_ids is ['1', 'x'], expected integers"),
        (MOON + '{"timestamp": 1,\n', 2, 17, "broken JSON"),
        (MOON + "[1]\n", 2, 1, "expected a JSON object"),
        (MOON + '{"timestamp": 9, "input_length": "5", "output_length": 1}\n', 2, 34, "input_length is '5'"),
        (
            MOON + '{"timestamp": 9, "input_length": true, "output_length": 1}\n',
            2,
            34,
            "input_length is True",
        ),
        (
            MOON + '{"timestamp": 9, "input_length": 5}\n',
            2,
            0,
            "output_length is missing, expected an integer",
        ),
        (MOON + '{"timestamp": -1, "input_length": 5, "output_length": 1}\n', 2, 15, "timestamp is -1"),
        (MOON.replace("0", "7") + MOON, 2, 15, "timestamp is 0, earlier than the row before"),
        (MOON.replace("}", ', "color": 1}'), 1, 66, "color is an unknown key"),
        # The first line that is wrong, whichever of its columns it is.
        (OWN + "0.0,10,x\n1.0,ten,5\n0.5,1,1\n", 2, 8, "output_tokens is 'x'"),
        (OWN + "0.0,10,5\n1.0,10,0.5\n1.0,10\n", 3, 8, "output_tokens is '0.5'"),
        (MOON + '{"timestamp": 9, "input_length": 5, "output_length": -1}\n{"timestamp": -1\n', 2, 54, "-1"),
        ("", 0, 0, "the file is empty"),
        (OWN.encode() + b"0.0,\xff,5\n", 1, 0, "not UTF-8"),
    ],
)
def test_a_defect_is_reported_at_its_place(content: bytes | str, line: int, column: int, words: str) -> None:
    error = failure(content)
    assert words in str(error)
    assert (error.line, error.column) == (line, column)


def test_a_truncated_gzip_is_named_as_such() -> None:
    rows = "".join(f"{i}.0,{i * 7919 % 997 + 1},{i % 13 + 1}\n" for i in range(20_000))
    whole = gzip.compress((OWN + rows).encode())
    error = failure(whole[: len(whole) // 2])
    assert "truncated" in str(error)
    assert error.line > 100


def test_damaged_gzip_is_named_as_such() -> None:
    whole = bytearray(gzip.compress((OWN + "0.0,10,5\n" * 1000).encode()))
    whole[-6] ^= 0xFF
    assert "damaged gzip" in str(failure(bytes(whole)))


def test_a_missing_file_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "absent.csv")


def test_a_file_without_arrivals_says_what_to_choose(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n5,6\n")
    with pytest.raises(TraceError, match="--poisson RPS"):
        read_trace(path)
    assert list(read_untimed(path)) == [TraceRecord(0.0, 5, 6)]


def test_a_session_file_keeps_session_time_agent_and_pause(tmp_path: Path) -> None:
    path = tmp_path / "sessions.csv"
    path.write_text(
        "session_id,agent,round,session_t_s,input_tokens,output_tokens,prefix_hit_tokens,think_time_s\n"
        "7,main,1,19.0,72762,296,71168,12.0\n"
    )
    (got,) = read_untimed(path)
    assert (got.arrival_s, got.input_tokens, got.output_tokens) == (19.0, 72762, 296)
    assert (got.session_id, got.turn, got.delay_s) == ("7/main", 1, 12.0)


def test_the_packaged_sample_is_ten_minutes_of_chat() -> None:
    sample = list(read_trace("sample:azure-conv"))
    assert len(sample) == 2867
    assert 590 < sample[-1].arrival_s < 600
    with pytest.raises(TraceError, match="there is azure-conv"):
        read_trace("sample:nope")
