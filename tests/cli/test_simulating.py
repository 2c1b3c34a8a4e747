"""The verbs that simulate: one object as documented, resumable comparisons, clear words for bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidegate.cli import main as command_line
from tidegate.measure.summary import KEYS

SMALL = ("--requests", "300", "--slo", "ttft:500,tpot:50")
COMPARE = ("compare", *SMALL, "--systems", "arrow,static:best", "--levels", "0.9", "--seeds", "1")
DEADLINE_S = 120.0


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tidegate.cli.main", *words]


def run(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )


def keys_in(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()] if path.exists() else []


def test_sim_prints_the_documented_object_and_says_what_it_assumed() -> None:
    done = run("sim", *SMALL, "--rate", "20", "--json")
    found = json.loads(done.stdout)
    assert tuple(found) == KEYS
    assert (found["requests"], found["instances"], found["system"]) == (300, 4, "arrow")
    assert found["rate_rps"] == pytest.approx(20)
    assert "--trace sample:azure-conv" in done.stderr


def test_a_journal_is_reported_replayed_and_never_overwritten(tmp_path: Path) -> None:
    journal = str(tmp_path / "j.jsonl")
    assert run("sim", *SMALL, "--journal", journal).returncode == 0
    assert json.loads(run("report", journal, "--json").stdout)["attainment"]["offered"] == 300
    replayed = json.loads(run("sim", "--replay", journal, "--json").stdout)
    assert replayed["requests"] == 300
    assert abs(replayed["tpot"]["mean_error"]) < 0.01
    again = run("sim", *SMALL, "--journal", journal)
    assert again.returncode == 2 and "never written over" in again.stderr


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (*COMPARE, "--out", str(out), "--jobs", "2", "--json")
    with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + DEADLINE_S
        while len(keys_in_so_far(out / "probes.jsonl")) < 4:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    kept = keys_in_so_far(out / "probes.jsonl")
    resumed = run(*words)
    assert resumed.returncode == 0, resumed.stderr
    assert "not run again" in resumed.stderr
    keys = keys_in(out / "probes.jsonl")
    assert len(set(keys)) == len(keys) and keys[: len(kept)] == kept
    fresh = run(*COMPARE, "--out", str(tmp_path / "fresh"), "--jobs", "1", "--json")
    assert json.loads(fresh.stdout)["goodputs"] == json.loads(resumed.stdout)["goodputs"]
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "goodput.csv", "timeline.csv"} <= names
    assert any(name.endswith("-attainment.png") for name in names)


def keys_in_so_far(path: Path) -> list[str]:
    """Return the keys of the whole lines of a file that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["key"] for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("sim", "--system", "nosuch"), "unknown system"),
        (("sim", "--profile", "nosuch"), "no packaged profile"),
        (("sim", "--split", "2:3"), "the fleet has 4"),
        (("sim", "--rate", "4", "--scale-rate", "2"), "give one"),
        (("sim", "--kv-tokens", "0"), "--kv-tokens"),
        (("sim", "--host-ms", "nan"), "--host-ms"),
        (("sim", "--trace", "bad.csv"), "bad.csv:3:1"),
        (("sim", "--trace", "one.csv", "--goodput"), "has no rate"),
        (("sim", "--replay", "bad.csv"), "bad.csv"),
        (("compare", "--out", "o", "--systems", "nosuch,static:x"), "2 problems"),
        (("compare", "--out", "o", "--levels", "2"), "--levels"),
        (("compare", "--out", "bad.csv"), "cannot keep results"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_and_exits_2(
    words: tuple[str, ...],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    head = "arrival_s,input_tokens,output_tokens\n"
    (tmp_path / "bad.csv").write_text(head + "5,10,10\n1,10,10\n")
    (tmp_path / "one.csv").write_text(head + "5,10,10\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command_line.main(words)
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert text in told.err and not told.out


def test_an_slo_out_of_reach_and_a_request_too_large_are_named_warnings(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,900000,10\n1,10,10\n2,10,10\n")
    done = run("sim", "--trace", str(trace), "--slo", "ttft:1,tpot:1", "--goodput", "--limit", "--json")
    assert done.returncode == 0, done.stderr
    assert "no instance can meet the TTFT target" in done.stderr and "longest context" in done.stderr
    assert json.loads(done.stdout)["goodput_rps"] == 0
