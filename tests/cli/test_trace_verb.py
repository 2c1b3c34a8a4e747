"""``tidegate trace`` from the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Protocol

import pytest

from tidegate.cli.main import main
from tidegate.workloads.readers import read_trace

SESSIONS = "session_id,round,input_tokens,output_tokens,prefix_hit_tokens\n" + "".join(
    f"{s},{k},{100 * (k + 1)},20,{100 * k}\n" for s in range(8) for k in range(3)
)


class Run(Protocol):
    """Runs a command in this process."""

    def __call__(self, *words: str) -> tuple[int, str, str]: ...


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``tidegate trace ...`` in an empty folder; return status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["trace", *words])
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return call


def test_info_tells_rates_mix_and_load(run: Run) -> None:
    status, out, _ = run("info", "sample:azure-conv", "--profile", "h100_sxm/llama-3.1-8b")
    assert status == 0
    for words in ("2,867", "4.78/s", "IDC60", "by 5 min 4.16 to 4.64", "P:D"):
        assert words in out


def test_a_trace_of_any_columns_is_converted_and_what_it_was_taken_for_is_told(run: Run) -> None:
    Path("t.csv").write_text("ts,user,prompt,answer\n1500,x,5,6\n")
    status, _, err = run(
        "convert", "t.csv", "t.jsonl", "--columns", "arrival_ms=ts,input=prompt,output=answer"
    )
    assert (status, err) == (0, "tidegate: t.csv: read as columns as given, 1 requests\n")
    status, out, err = run("info", "t.jsonl", "--json")
    assert err == "tidegate: t.jsonl: read as Mooncake JSONL, 1 requests\n"
    assert json.loads(out)["traces"][0]["input_tokens"]["mean"] == 5
    assert "--columns names the columns" in run("info", "t.csv", "--columns", "ts")[2]


def test_info_as_json_is_one_object_without_nan(run: Run) -> None:
    Path("s.csv").write_text(SESSIONS)
    status, out, _ = run(
        "info", "s.csv", "sample:tau-airline", "--json", "--profile", "h100_sxm/llama-3.1-8b"
    )
    untimed, timed = json.loads(out, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))["traces"]
    assert status == 0
    assert (untimed["arrivals"], untimed["phase_load"], untimed["sessions"]["count"]) == (None, None, 8)
    assert timed["reuse"]["tokens"] == pytest.approx(0.919, abs=0.002)
    assert all(0 <= w["prefill_share"] <= 1 for w in timed["phase_load"])


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_info_draws(run: Run, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    Path("s.csv").write_text(SESSIONS)
    traces = ("sample:tau-airline", "s.csv", "sample:azure-conv")
    status, _, err = run("info", *traces, "--profile", "h100_sxm/llama-3.1-8b", "--plot", f"p.{suffix}")
    assert (status, err.splitlines()[-1]) == (0, f"wrote p.{suffix}")
    head = Path(f"p.{suffix}").read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in head


def test_info_says_what_a_plot_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    status, _, err = run("info", "sample:azure-conv", "--plot", "p.png")
    assert status == 2
    assert "pip install matplotlib" in err
    assert run("info", "sample:azure-conv", "--plot", "p.gif")[0] == 2


def test_convert_goes_both_ways(run: Run) -> None:
    for one, other in (("sample:tau-airline", "a.jsonl.gz"), ("a.jsonl.gz", "b.csv"), ("b.csv", "c.jsonl")):
        status, out, _ = run("convert", one, other)
        assert (status, out.strip()) == (0, f"wrote 2,454 requests to {other}")
    assert list(read_trace("c.jsonl")) == list(read_trace("sample:tau-airline"))


def test_convert_loses_nothing_in_silence(run: Run) -> None:
    status, _, err = run("convert", "sample:tau-airline", "a.csv", "--format", "azure")
    assert status == 2
    assert "the azure format cannot hold session_id, turn, delay_s, hash_ids" in err
    assert not Path("a.csv").exists()
    status, _, err = run("convert", "sample:tau-airline", "a.csv", "--format", "azure", "--lossy")
    assert status == 0
    assert "warning: a.csv: left out session_id, turn" in err
    lengths = [(r.input_tokens, r.output_tokens) for r in read_trace("sample:tau-airline")]
    assert [(r.input_tokens, r.output_tokens) for r in read_trace("a.csv")] == lengths


def test_convert_needs_arrivals_and_leave_to_replace(run: Run) -> None:
    Path("s.csv").write_text(SESSIONS)
    status, _, err = run("convert", "s.csv", "a.jsonl")
    assert (status, "tidegate trace make OUT --base s.csv" in err) == (2, True)
    Path("a.jsonl").write_text("mine")
    assert "--force" in run("convert", "sample:azure-conv", "a.jsonl")[2]
    assert Path("a.jsonl").read_text() == "mine"
    assert run("convert", "sample:azure-conv", "a.jsonl", "--force")[0] == 0


def test_make_repeats_byte_for_byte(run: Run) -> None:
    words = ("--base", "sample:azure-conv", "--duration", "200", "--rate-factor", "1.5", "--spike", "4:50:20",
             "--drift", "linear:0.5:2:200", "--add", "sample:mooncake-conv", "--reseed", "3")  # fmt: skip
    assert run("make", "a.jsonl.gz", *words, "--seed", "5")[0] == 0
    assert run("make", "b.jsonl.gz", *words, "--seed", "5")[0] == 0
    assert run("make", "c.jsonl.gz", *words, "--seed", "6")[0] == 0
    one, same, other = (Path(f"{name}.jsonl.gz").read_bytes() for name in "abc")
    assert one == same
    assert gzip.decompress(one) != gzip.decompress(other)
    status, out, _ = run("info", "a.jsonl.gz", "--json")
    assert (status, json.loads(out)["traces"][0]["requests"]) == (0, len(list(read_trace("a.jsonl.gz"))))


def test_make_starts_sessions_and_keeps_them_whole(run: Run) -> None:
    Path("s.csv").write_text(SESSIONS)
    words = ("--base", "s.csv", "--sessions-per-s", ".5", "--turn-gap", "4", "--rate-factor", "2")
    assert run("make", "a.jsonl", *words)[0] == 0
    turns: dict[str, list[tuple[int, float | None, int]]] = {}
    for r in read_trace("a.jsonl"):
        turns.setdefault(r.session_id, []).append((r.turn, r.delay_s, r.input_tokens))
    assert len(turns) == 16
    assert all(got == [(0, None, 100), (1, 4.0, 200), (2, 4.0, 300)] for got in turns.values())


def test_make_starts_the_sessions_of_a_timed_trace_anew(run: Run) -> None:
    assert run("make", "a.jsonl", "--base", "sample:tau-airline", "--sessions-per-s", "1")[0] == 0
    made = {(r.session_id, r.turn): r._replace(arrival_s=0.0) for r in read_trace("a.jsonl")}
    base = {(r.session_id, r.turn): r._replace(arrival_s=0.0) for r in read_trace("sample:tau-airline")}
    assert made == base


def test_make_follows_a_rate_curve_with_a_presets_lengths(run: Run) -> None:
    Path("c.csv").write_text("t_s,day\n0,1\n600,5\n")
    words = (
        "--rate-curve",
        "c.csv:day",
        "--rps",
        "6",
        "--preset",
        "azure-conv",
        "--duration",
        "1200",
        "--json",
    )
    status, out, _ = run("make", "a.csv.gz", *words)
    about = json.loads(out)
    early = sum(1 for r in read_trace("a.csv.gz") if r.arrival_s < 600)
    assert status == 0
    assert about["requests"] == pytest.approx(7200, rel=0.05)
    assert early == pytest.approx(1200, rel=0.1)
    assert about["input_tokens"]["mean"] == pytest.approx(1155, rel=0.06)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "say what to send: --base FILE"),
        (("--sessions-per-s", "1", "--limit", "5"), "needs the sessions of a trace"),
        (("--poisson", "1", "--rps", "2", "--limit", "5"), "--rps goes with --rate-curve"),
        (("--poisson", "1", "--preset", "nope", "--limit", "5"), "there are arxiv-summarization"),
        (("--base", "sample:azure-conv", "--preset", "azure-conv"), "--base brings its own lengths"),
        (("--base", "sample:azure-conv", "--spike", "4"), "FACTOR:START_S:DURATION_S"),
        (("--base", "sample:azure-conv", "--drift", "up"), "linear:FROM:TO:OVER_S"),
        (("--base", "sample:azure-conv", "--rate-factor", "0"), "the rate factor must be positive"),
        (("--base", "sample:azure-conv", "--rate-factor", "1e-9"), "no request is left"),
        (("--base", "sample:azure-conv", "--jitter", "-1", "--rate-factor", "2"), "the jitter must be"),
        (("--base", "sample:azure-conv", "--reseed", "-1"), "a seed must be 0 or more"),
        (("--base", "sample:azure-conv", "--add", "absent.csv"), "absent.csv: cannot read the file"),
    ],
)
def test_make_says_what_is_wrong_and_writes_nothing(run: Run, words: tuple[str, ...], told: str) -> None:
    status, _, err = run("make", "a.jsonl", *words)
    assert status == 2
    assert told in err
    assert not Path("a.jsonl").exists()


@pytest.mark.parametrize("verb", ["info", "convert", "make"])
def test_defects_are_told_at_their_place(run: Run, verb: str) -> None:
    Path("t.csv").write_text("arrival_s,input_tokens,output_tokens\n2,10,5\n1,10,5\n")
    words = {"info": ("t.csv",), "convert": ("t.csv", "a.csv"), "make": ("a.csv", "--base", "t.csv")}[verb]
    status, _, err = run(verb, *words)
    assert status == 2
    assert "t.csv:3:1: arrival_s is '1', earlier than the row before" in err


def test_help_has_examples(run: Run) -> None:
    for verb in ("info", "make", "convert"):
        assert f"tidegate trace {verb}" in run(verb, "--help")[1]
    assert "Xiang et al., ServeGen" in run("make", "--presets", "x.csv")[1]
