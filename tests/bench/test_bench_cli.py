"""The ``bench`` and ``report`` commands as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tidegate.bench import BenchRun
from tidegate.cli import bench as bench_command
from tidegate.cli.main import add_verb
from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.slo import Slo
from tidegate.measure.results import RequestResult
from tidegate.reports.bench_report import build_bench_report

app = typer.Typer()
add_verb(app, "bench")
add_verb(app, "report")
SLO = Slo(0.5, 0.05)


def results(failures: int) -> list[RequestResult]:
    good = [
        RequestResult(i, i * 500.0, 10, 5, "ok", i * 0.5, 200, ttft_s=0.1 + i * 0.01, tpot_s=0.02, e2e_s=0.2,
                      prompt_tokens=10, output_tokens=5, finish_reason="length")
        for i in range(10 - failures)
    ]  # fmt: skip
    bad = [
        RequestResult(10 - i, (10 - i) * 500.0, 10, 5, "http", (10 - i) * 0.5, 429) for i in range(failures)
    ]
    return good + bad


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Stand in for the run: what it was told ends up here; ``failures`` and ``interrupted`` steer it."""
    seen: dict[str, object] = {"failures": 0, "interrupted": False}

    def bench(settings: object, records: list[object], **rest: object) -> BenchRun:
        seen.update(settings=settings, records=records, **rest)
        report = build_bench_report(results(int(str(seen["failures"]))), SLO, level=float(str(rest["level"])))
        return BenchRun(report, "m", "tokens", bool(seen["interrupted"]))

    monkeypatch.setattr(bench_command, "bench", bench)
    return seen


def call(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["bench", "--url", "http://h:1", "--poisson", "2", "--limit", "4", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    "words",
    [("--slo", "ttft:500,tpot:50"), ("--goodput", "ttft:500", "tpot:50"), ("--goodput", "tpot:50,ttft:500")],
)
def test_both_spellings_of_the_slo(told: dict[str, object], words: tuple[str, ...]) -> None:
    assert call(*words)[0] == 0
    assert told["settings"].slo == SLO  # type: ignore[attr-defined]


def test_stray_words_are_usage_errors(told: dict[str, object]) -> None:
    assert call("tpot:50")[0] == 2
    assert call("--goodput", "ttft:5,tpot:5", "--slo", "ttft:5,tpot:5")[0] == 2
    with pytest.raises(ConfigError, match="'surprise'"):
        call("--goodput", "ttft:5", "tpot:5", "surprise")


def test_exit_codes(told: dict[str, object]) -> None:
    assert call()[0] == 0
    told["failures"] = 2
    assert call()[0] == 1
    told["failures"] = 0
    assert call("--require-level")[0] == 0
    told["interrupted"] = True
    assert call()[0] == 130


def test_json_is_all_that_goes_to_standard_output(told: dict[str, object]) -> None:
    value = json.loads(call("--json")[1])
    assert value["attainment"]["share"] == 1.0
    assert value["goodput"]["offered_rps"] == pytest.approx(2.0)
    assert value["model"] == "m"


def test_the_api_key_comes_from_the_environment(
    told: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_API_KEY", "secret")
    call()
    assert told["settings"].headers()["Authorization"] == "Bearer secret"  # type: ignore[attr-defined]
    assert "secret" not in repr(told["settings"])


def test_the_block_reads_like_vllms(told: dict[str, object]) -> None:
    told["failures"] = 2
    block = call()[1]
    assert "============ Serving Benchmark Result ============" in block
    for row in (
        "Offered requests:                        10",
        "  http 429:                              2",
        "Attained (% of offered):                 80.00",
        "At least 90 % attained:                  no",
        "Mean TTFT (ms):                          135.00",
        "P99 TTFT (ms):                           169.30",
        "Median TPOT (ms):                        20.00",
    ):
        assert row in block


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    header = {"type": "bench", "slo": {"ttft_s": 0.5, "tpot_s": 0.05}}
    lines = [header, *(r.to_json() for r in results(1))]
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_report_reads_a_bench_result_and_rescores_it(result_file: Path) -> None:
    value = json.loads(CliRunner().invoke(app, ["report", str(result_file), "--json"]).output)
    assert value["attainment"]["attained"] == 9
    assert any("no summary line" in note for note in value["notes"])
    tighter = CliRunner().invoke(app, ["report", str(result_file), "--slo", "ttft:135,tpot:30", "--json"])
    assert json.loads(tighter.output)["attainment"]["attained"] == 4


def test_report_makes_a_page_of_a_bench_result(result_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(result_file), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0 and "Serving Benchmark Result" in done.output
    assert " requests attained ttft:" in out.read_text().partition("</h1>")[0]


def test_report_fails_a_script_only_when_asked(result_file: Path) -> None:
    base = ["report", str(result_file), "--level", "0.95"]
    assert CliRunner().invoke(app, base).exit_code == 0
    assert CliRunner().invoke(app, [*base, "--require-level"]).exit_code == 1


def test_report_says_what_it_can_read(tmp_path: Path) -> None:
    for content in ("arrival_s,input_tokens\n1,2\n", '{"timestamp": 1}\n', ""):
        path = tmp_path / "other"
        path.write_text(content)
        with pytest.raises(TraceError, match="neither a journal"):
            CliRunner().invoke(app, ["report", str(path)], catch_exceptions=False)


@pytest.mark.parametrize("command", ["bench", "report"])
def test_help_shows_examples_and_exit_codes(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output
    assert "Examples" in text
    assert "Exit codes" in text
    assert f"    tidegate {command} " in text
