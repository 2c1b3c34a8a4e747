"""What a command writes over: its own output, never that of another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reports.test_comparison_report import COMPARISON
from tests.reports.test_journal_report import HEADER, outcome
from tests.reports.test_run_page import report, written
from tidegate.cli import simulating
from tidegate.cli.main import main
from tidegate.cli.outputs import claim_file
from tidegate.core.errors import ConfigError

CONTENTS = {
    "page.html": "<html>mine</html>",
    "journal.jsonl": '{"type":"header","version":"0.1.0"}\n',
    "trace.jsonl": '{"timestamp":0,"input_length":8,"output_length":8}\n',
    "model.json": '{"format": "another"}',
    "picture.png": "\x89PNG of another tool",
}


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize(
    "command",
    [
        ("report", "recorded.jsonl", "--out"),
        ("bench", "--url", "http://127.0.0.1:9", "--poisson", "1", "--limit", "1", "--out"),
        ("profile", "--url", "http://127.0.0.1:9", "--out"),
        ("sim", "--requests", "2", "--journal"),
        ("trace", "make", "--poisson", "1", "--duration", "1"),
        ("trace", "convert", "sample:azure-conv"),
    ],
    ids=" ".join,
)
def test_no_command_writes_over_what_another_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "recorded.jsonl", [HEADER, outcome("r0", 0.0)])
    there = tmp_path / name
    there.write_text(CONTENTS[name])
    assert status(*command, there) == 2
    assert there.read_text() == CONTENTS[name]


def test_a_plot_replaces_a_plot_only(tmp_path: Path) -> None:
    for name in ("plot.png", "plot.pdf", "plot.svg"):
        plot = tmp_path / name
        for _ in range(2):
            assert status("trace", "info", "sample:azure-conv", "--plot", plot) == 0
        plot.write_bytes(b"\x89PNG of another tool")
        assert status("trace", "info", "sample:azure-conv", "--plot", plot) == 2


def test_reports_of_other_commands_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulating.write_folder(tmp_path, "compare", COMPARISON, [])
    simulating.write_folder(tmp_path, "compare", COMPARISON, [])
    page = (tmp_path / "report.html").read_bytes()
    recorded = written(tmp_path / "j.jsonl", [HEADER, outcome("r0", 0.0)])
    assert report(recorded, "--out", tmp_path / "report.html") == 2
    assert status("sim", "--requests", "2", "--out", tmp_path) == 2
    assert "is of `tidegate compare`" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_bytes() == page
    (tmp_path / "report.html").unlink()
    with pytest.raises(ConfigError, match=r"goodput\.csv"):
        simulating.make_folder(tmp_path, "demo")


def test_what_is_empty_or_a_device_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "new", Path("/dev/null")):
        claim_file(path, "bench")
