"""Writing traces: what goes in comes out, files appear whole, and what a format lacks is named."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.errors import ConfigError
from tidegate.workloads.readers import read_trace
from tidegate.workloads.trace import TraceRecord, Workload
from tidegate.workloads.writers import WriteFormat, lost_in, write_trace

names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=8)
records = st.builds(
    TraceRecord,
    arrival_s=st.integers(0, 10**10).map(lambda us: us / 1e6),
    input_tokens=st.integers(4 * 512, 10**6),  # enough for its ids
    output_tokens=st.integers(1, 10**6),
    hash_ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=4).map(tuple),
    block_tokens=st.sampled_from((512, 16)),
    session_id=names.filter(bool),
    turn=st.integers(0, 9),
    delay_s=st.one_of(st.none(), st.integers(0, 10**9).map(lambda us: us / 1e6)),
    slo_class=names,
    client_id=names,
)
traces = st.lists(records, min_size=1, max_size=8).map(lambda rs: sorted(rs, key=lambda r: r.arrival_s))


def there_and_back(trace: list[TraceRecord], name: str, form: WriteFormat | None = None) -> list[TraceRecord]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_trace(path, Workload.of(trace), form)
        return list(read_trace(path))


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.csv.gz"])
@given(trace=traces)
def test_whole_formats_round_trip(name: str, trace: list[TraceRecord]) -> None:
    for got, want in zip(there_and_back(trace, name), trace, strict=True):
        assert got.arrival_s == pytest.approx(want.arrival_s, abs=1e-8)
        assert got.delay_s == (None if want.delay_s is None else pytest.approx(want.delay_s, abs=1e-8))
        for field in ("input_tokens", "output_tokens", "hash_ids", "block_tokens", "session_id", "turn",
                      "slo_class", "client_id"):  # fmt: skip
            assert getattr(got, field) == getattr(want, field)


@given(traces)
def test_azure_and_burstgpt_keep_times_and_lengths(trace: list[TraceRecord]) -> None:
    origin_s = trace[0].arrival_s
    for form, start_s in ((WriteFormat.AZURE, origin_s), (WriteFormat.BURSTGPT, 0.0)):
        for got, want in zip(there_and_back(trace, "t.csv", form), trace, strict=True):
            assert got.arrival_s == pytest.approx(want.arrival_s - start_s, abs=2e-6)
            assert (got.input_tokens, got.output_tokens) == (want.input_tokens, want.output_tokens)
            assert got.session_id == (want.session_id if form is WriteFormat.BURSTGPT else "")


def test_what_a_format_cannot_hold_is_named() -> None:
    first = TraceRecord(0, 5, 5, session_id="a")
    trace = Workload.of([first, first._replace(arrival_s=1, turn=1, delay_s=2.0)])
    assert lost_in(WriteFormat.AZURE, trace) == ["session_id", "turn", "delay_s"]
    assert lost_in(WriteFormat.BURSTGPT, trace) == ["turn", "delay_s"]
    assert lost_in(WriteFormat.MOONCAKE, trace) == lost_in(WriteFormat.CSV, trace) == []


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    trace = Workload.of([TraceRecord(0.5, 5, 5, (1, 2))])
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_trace(tmp_path / name, trace)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_trace(path, Workload.of([TraceRecord(0.0, 5, 5)]))
    before = path.read_bytes()
    broken = Workload.of([TraceRecord(0.0, 6, 6), TraceRecord(0.0, 5, 5, session_id="a\nb")])
    with pytest.raises(ConfigError, match="--force"):
        write_trace(path, Workload.of([]))
    with pytest.raises(ConfigError, match="line break"):
        write_trace(path, broken, force=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_an_unknown_suffix_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.jsonl, \.csv"):
        write_trace(tmp_path / "t.parquet", Workload.of([]))
    with pytest.raises(ConfigError, match="cannot write there"):
        write_trace(tmp_path / "absent" / "t.csv", Workload.of([]))


def test_ids_that_lengths_leave_no_blocks_for_are_not_written(tmp_path: Path) -> None:
    """Rounding shortened the prompt by a block; readers refuse a file that says otherwise."""
    trace = Workload.of([TraceRecord(0.0, 30, 1, (1, 2, 3), 16)])
    for name in ("t.jsonl", "t.csv"):
        write_trace(tmp_path / name, trace)
        assert read_trace(tmp_path / name)[0].hash_ids == (1, 2)
