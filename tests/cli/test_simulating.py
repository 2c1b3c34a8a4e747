"""The verbs that simulate: one object as documented, resumable comparisons, clear words for bad input."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, Protocol

import pytest
from rich.console import Console

from tests.reports.comparison_cases import made_comparison, made_entry
from tidegate.cli import compare, sim, simulating, terminal
from tidegate.cli import main as command_line
from tidegate.costs.library import profile_names
from tidegate.measure.summary import KEYS
from tidegate.reports.plot_style import NoPlots

SMALL = ("--requests", "300", "--slo", "ttft:500,tpot:50")
COMPARE = (
    "compare",
    *SMALL,
    "--instances",
    "2",
    "--systems",
    "arrow-lending,static:best",
    "--levels",
    "0.9",
    "--seeds",
    "1",
)
DEADLINE_S = 120.0


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tidegate.cli.main", *words]


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    returncode: object
    stdout: str
    stderr: str


class Run(Protocol):
    """Runs a command in this process."""

    def __call__(self, *words: str) -> Ended: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: str) -> Ended:
        with pytest.raises(SystemExit) as caught:
            command_line.main(words)
        return Ended(caught.value.code, *capsys.readouterr())

    return call


def keys_in(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()] if path.exists() else []


def test_sim_prints_the_documented_object_and_says_what_it_assumed(run: Run) -> None:
    done = run("sim", *SMALL, "--rate", "20", "--json")
    found = json.loads(done.stdout)
    assert tuple(found) == KEYS
    assert (found["requests"], found["instances"], found["system"]) == (300, 4, "tidegate")
    assert found["rate_rps"] == pytest.approx(20)
    assert "--trace sample:azure-conv" in done.stderr


def test_a_suite_says_what_it_takes_and_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "suite"
    rows = ("--suite", "stress", "--quick", "--only", "deaths", "--systems", "round-robin,colocated")
    words = ("compare", *rows, "--tolerance", "0.9", "--jobs", "1", "--out", str(out))
    planned = run(*words, "--plan-only")
    assert "1 row, 2 systems" in planned.stderr and "of CPU" in planned.stderr
    assert not (out / "probes.jsonl").exists()
    found = json.loads(run(*words, "--json").stdout)
    assert {row["system"] for row in found["rows"]} == {"round-robin", "colocated"}
    assert max(row["share_of_best"] for row in found["rows"]) == 1.0
    known = keys_in(out / "probes.jsonl")
    again = run(*words)
    assert keys_in(out / "probes.jsonl") == known
    assert "round-robin is within 2 % of the best" in again.stdout
    page = (out / "report.html").read_text()
    assert page.index("Losses") < page.index("Geometric means") < page.index("Every row")
    assert len((out / "rows.csv").read_text().splitlines()) == 3


def test_spares_wait_beside_the_split_until_a_controller_asks(run: Run) -> None:
    words = ("sim", *SMALL, "--system", "static", "--json", "--instances", "3")
    with_spare = run(*words, "--spares", "1", "--split", "1:1")
    assert with_spare.returncode == 0, with_spare.stderr
    hours, all_hours = (json.loads(ended.stdout)["instance_hours"] for ended in (with_spare, run(*words)))
    assert hours == pytest.approx(all_hours * 2 / 3, rel=0.01)


def test_a_fleet_has_a_range_and_a_budget(run: Run) -> None:
    words = ("sim", *SMALL, "--system", "dopd", "--json", "--slo", "ttft:2000,tpot:100")
    found = json.loads(run(*words, "--instances", "2..4").stdout)
    assert found["instances"] == 4 and found["adds"] <= 2
    two, four = (json.loads(run(*words, "--instances", n).stdout)["instance_hours"] for n in ("2", "4"))
    assert two < 1.05 * found["instance_hours"] and found["instance_hours"] < four
    begun = run(*words, "--instances", "2..4", "--split", "2:2", "--advise")
    assert json.loads(begun.stdout)["instance_hours"] == pytest.approx(four, rel=0.01)
    for flags, problem in (
        (("--instances", "2..4", "--budget", "1"), "--budget 1 allows 1 instances"),
        (("--instances", "2..4", "--budget-per-hour", "5"), "--price"),
        (("--instances", "2..4", "--budget-per-hour", "5", "--price", "3"), "allows 1 instances"),
        (("--instances", "1..4"), "two pools take at least 2"),
        (("--instances", "2..4", "--split", "3:3"), "the split adds up to 6"),
        (("--instances", "4..2"), "expected N instances, or A..B"),
    ):
        refused = run(*words, *flags)
        assert refused.returncode == 2 and problem in " ".join(refused.stderr.split()), refused.stderr


def test_a_journal_is_reported_replayed_and_never_overwritten(run: Run, tmp_path: Path) -> None:
    journal = str(tmp_path / "j.jsonl")
    assert run("sim", *SMALL, "--journal", journal).returncode == 0
    assert json.loads(run("report", journal, "--json").stdout)["attainment"]["offered"] == 300
    replayed = json.loads(run("sim", "--replay", journal, "--json").stdout)
    assert replayed["requests"] == 300
    assert abs(replayed["tpot"]["mean_error"]) < 0.01
    again = run("sim", *SMALL, "--journal", journal)
    assert again.returncode == 2 and "never written over" in again.stderr


def test_the_worst_that_are_explained_were_served_and_the_refused_are_counted(
    run: Run, tmp_path: Path
) -> None:
    journal = tmp_path / "j.jsonl"
    row = (
        '{"type":"outcome","t":3,"timestamp":0,"input_length":9,"output_length":1,"request":"%s",'
        '"attained":false,"slo":{"ttft_s":0.5,"tpot_s":0.03},%s}\n'
    )
    lines = [row % (f"r{number}", '"outcome":"overloaded"') for number in range(3)]
    served = row % ("late", '"outcome":"ok","prefill_on":"i0","ttft_s":0.9')
    journal.write_text('{"type":"header","t":0}\n' + "".join(lines))
    found = run("explain", str(journal), "--worst", "2")
    assert found.stdout.strip() == ""
    assert "no request that was served missed its targets" in found.stderr
    journal.write_text('{"type":"header","t":0}\n' + "".join(lines) + served)
    found = run("explain", str(journal), "--worst", "2")
    assert found.stdout.startswith("Request late") and "r0" not in found.stdout
    assert found.stderr == "tidegate: 3 missed without being placed: 3 overloaded\n"


def test_a_run_may_begin_with_the_journal_that_it_is_to_write(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    first = run("sim", *SMALL, "--warm-start", str(own), "--journal", str(own))
    assert first.returncode == 0
    assert "nothing is known at the start" in first.stderr
    warm = run("sim", *SMALL, "--warm-start", str(own))
    assert warm.returncode == 0
    assert "nothing is known" not in warm.stderr
    missing = run("sim", *SMALL, "--warm-start", str(tmp_path / "none.jsonl"), "--journal", str(own))
    assert missing.returncode == 2
    assert "none.jsonl" in missing.stderr


def test_a_run_that_fails_leaves_no_half_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, journal: IO[bytes], **__: object) -> None:
        journal.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sim, "run_once", interrupted)
    with pytest.raises(SystemExit) as caught:
        command_line.main(["sim", *SMALL, "--journal", str(tmp_path / "j.jsonl")])
    assert caught.value.code == 130 and not list(tmp_path.iterdir())
    capsys.readouterr()


def test_shared_prefixes_never_show_more_kv_in_use_than_there_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulating, "draw_png", without_matplotlib)
    ids = "|".join(map(str, range(20)))
    trace = tmp_path / "t.csv"
    rows = [f"{0.01 * k},10240,400,{ids},512" for k in range(40)]
    head = "arrival_s,input_tokens,output_tokens,hash_ids,block_tokens"
    trace.write_text("\n".join([head, *rows]) + "\n")
    words = ("--kv-tokens", "60000", "--instances", "2", "--out", str(tmp_path / "o"))
    done = run("sim", "--trace", str(trace), *words)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "o" / "timeline.csv").open() as file:
        shares = [float(row["kv_share"]) for row in csv.DictReader(file)]
    assert 0 < max(shares) <= 1
    assert (tmp_path / "o" / "probes.csv").read_text().startswith("trace,system,")


def test_packaged_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main(["profile", "--list", "--json"])
    assert caught.value.code == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(profile_names())


def test_sessions_without_times_take_a_gap_and_a_closed_loop_says_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("sim", "--trace", "sample:tau-airline", "--requests", "200", "--closed-loop", "--limit")
    with pytest.raises(SystemExit) as caught:
        command_line.main(words)
    assert caught.value.code == 0
    said = capsys.readouterr().err
    assert "closed loop: turns wait for answers" in said
    assert "no rate is the fluid limit here: in a closed loop arrivals depend on the system" in said


def test_long_work_says_its_share_of_a_fixed_total(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(simulating, "draw_png", without_matplotlib)
    cut = (*SMALL, "--instances", "4", "--jobs", "1")
    several = ("--systems", "static:best,colocated", "--levels", "0.9,0.99", "--tolerance", "0.2")
    for words in (("sim", "--goodput", "--limit"), ("compare", *several, "--out", str(tmp_path))):
        told = run(*words, *cut).stderr
        shares = [int(share) for share in re.findall(r"(\d+)% in .*(?:limit|requests/s)", told)]
        assert len(shares) > 8 and shares == sorted(shares), told
        assert 85 <= shares[-1] <= 100 and "s left; " in told, told


def without_matplotlib(_: object) -> NoReturn:
    raise NoPlots("charts need matplotlib")


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (*COMPARE, "--tolerance", "0.2", "--out", str(out), "--jobs", "1", "--json")
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
    # The same in one go, and without the charts, which take most of the time.
    monkeypatch.setattr(simulating, "draw_png", without_matplotlib)
    fresh = run(*COMPARE, "--tolerance", "0.2", "--out", str(tmp_path / "fresh"), "--jobs", "1", "--json")
    assert fresh.returncode == 0
    assert json.loads(fresh.stdout)["goodputs"] == json.loads(resumed.stdout)["goodputs"]
    assert "no PNG files: charts need matplotlib" in fresh.stderr
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
        (("sim", "--heartbeat-ms", "0.001"), "--heartbeat-ms is 0"),
        (("sim", "--instances", "0", "--chunk-tokens", "0"), "2 problems"),
        (("sim", "--turn-gap", "2"), "has its own"),
        (("sim", "--requests", "50", "--out", "bad.csv"), "--out bad.csv"),
        (("compare", "--out", "o", "--tolerance", "nan"), "--tolerance"),
        (("compare", "--out", "o", "--instances", "1"), "at least two instances"),
        (("sim", "--trace", "bad.csv"), "bad.csv:3:1"),
        (("sim", "--trace", "one.csv", "--goodput"), "has no rate"),
        (("sim", "--replay", "bad.csv"), "bad.csv"),
        (("compare", "--out", "o", "--systems", "nosuch,static:x"), "2 problems"),
        (("compare", "--out", "o", "--levels", "2"), "--levels"),
        (("compare", "--out", "bad.csv"), "no such folder can be made"),
        (("compare", "--out", "o", "--suite", "nosuch"), "there is papers, traces, stress"),
        (("compare", "--out", "o", "--suite", "stress", "--instances", "4"), "--instances; leave them out"),
        (("compare", "--out", "o", "--suite", "stress", "--price", "2"), "--price; leave them out"),
        (("compare", "--out", "o", "--suite", "stress", "--only", "nosuch"), "no row matches 'nosuch'"),
        (("compare", "--out", "o", "--suite", "stress", "--systems", "nosuch"), "nosuch"),
        (("compare", "--out", "o", "--suite", "stress", "--choose", "none.py"), "none.py"),
        (("compare", "--out", "o", "--only", "spikes"), "go with --suite"),
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


def test_an_slo_out_of_reach_and_a_request_too_large_are_named_warnings(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,900000,10\n1,10,10\n2,10,10\n")
    done = run("sim", "--trace", str(trace), "--slo", "ttft:1,tpot:1", "--goodput", "--limit", "--json")
    assert done.returncode == 0, done.stderr
    assert "no instance can meet the TTFT target" in done.stderr and "longest context" in done.stderr
    assert json.loads(done.stdout)["goodput_rps"] == 0


def test_the_run_beside_a_goodput_attains_the_level(run: Run) -> None:
    # At the mean goodput of three draws, the first one attains 68 %.
    words = ("sim", "--goodput", "--requests", "250", "--system", "static", "--instances", "2", "--jobs", "1")
    done = run(*words, "--require-level", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["attainment"] >= 0.9 and found["rate_rps"] < 0.95 * found["goodput_rps"]
    assert "Highest rate at 90 %" in run(*words).stdout


@pytest.mark.parametrize(
    ("width", "shown"), [(60, "at 99 %"), (80, "flips at"), (110, "p99 TPOT"), (130, "interval")]
)
def test_a_comparison_is_not_cut_in_a_narrow_terminal(
    width: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "arrow-lending+feasible-first"
    comparison = made_comparison(made_entry(name, 8.0), made_entry("static:best", 6.0, chosen="split 1:3"))
    table = compare._goodputs(comparison, comparison.traces[0], width)
    Console(width=width).print(table)
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    assert all(len(line) <= width for line in lines)
    assert all(word in text for word in ("5.6", "35 %", "26 %")), "the last column of the last level"
    assert all(word in text for word in shown.split())


CLASSED = "".join(
    f"{n * 0.5},{4000 if n % 2 else 100},20,{'batch' if n % 2 else 'chat'}\n" for n in range(40)
)


def test_classes_of_a_trace_get_targets_and_are_shown_apart(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens,slo_class\n" + CLASSED)
    words = ("--trace", str(trace), "--instances", "2", "--slo", "ttft:1,tpot:50")
    targets = ("--slo-class", "batch=ttft:5000,tpot:50")
    done = run("sim", *words, *targets, "--json")
    found = json.loads(done.stdout)["classes"]
    assert "no --slo-class for chat: scored by ttft:1,tpot:50" in done.stderr
    assert {name: (each["slo"], each["attainment"]) for name, each in found.items()} == {
        "batch": ("ttft:5000,tpot:50", 1.0), "chat": ("ttft:1,tpot:50", 0.0),
    }  # fmt: skip
    shown = run("sim", *words, *targets).stdout
    assert "batch:                      100.00 % of 20 at ttft:5000,tpot:50" in shown
    wrong = run("sim", *words, "--slo-class", "bach=ttft:5000,tpot:50")
    assert wrong.returncode == 2 and "did you mean 'batch'? it has batch, chat" in wrong.stderr
    assert run("sim", *words, *targets, "--replay", "j.jsonl").returncode == 2


def test_a_comparison_shows_classes_and_its_limit_bounds_them(run: Run, tmp_path: Path) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "out"
    rows = (f"{n * 0.1},{4000 if n % 2 else 100},200,{'batch' if n % 2 else 'chat'}\n" for n in range(400))
    trace.write_text("arrival_s,input_tokens,output_tokens,slo_class\n" + "".join(rows))
    words = ("--traces", str(trace), "--instances", "2", "--systems", "static:even", "--levels", "0.9")
    done = run(
        "compare", *words, "--seeds", "1", "--jobs", "1", "--slo", "ttft:60,tpot:50", "--out", str(out),
        "--slo-class", "batch=ttft:300,tpot:60",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "batch, ttft:300,tpot:60" in done.stdout and "chat, ttft:60,tpot:50" in done.stdout
    page = (out / "report.html").read_text()
    assert "Attained, by SLO class" in page and "chat, ttft:60,tpot:50" in page
    with (out / "goodput.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["goodput_rps"]) <= float(row["limit_rps"])
