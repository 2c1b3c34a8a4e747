"""``report --out``: a journal or a bench result as one page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.reports.test_journal_report import HEADER, REJECTED, decision, outcome
from tidegate.cli.main import main

WHY = "no prefill instance meets 500 ms: the best <i>waits</i> 812 ms"
FLIP = {"type": "flip", "t": 2.0, "instance": "i1", "from": "decode", "to": "prefill", "reason": "inline"}
JOURNALS = Path(__file__).parents[1] / "journal" / "journals_0_1_0"


def report(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, words)])
    return int(caught.value.code or 0)


def written(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def charts_of(page: str) -> list[dict[str, object]]:
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    return [json.loads(data, parse_constant=lambda name: pytest.fail(name)) for data in found]


def test_a_journal_answers_first_and_says_why_labels_moved(tmp_path: Path) -> None:
    ended = [outcome(f"r{n}", 0.5 * n) for n in range(98)]
    late = [outcome("late", 49.0, ttft_s=2.0), outcome("full", 49.5, **REJECTED)]
    lines = [HEADER, decision("r0"), *ended, FLIP | {"why": WHY}, *late]
    out = tmp_path / "page.html"
    assert report(written(tmp_path / "j.jsonl", lines), "--out", out, "--level", "0.99") == 0
    page = out.read_text()
    heading = "98.0 % of 100 requests attained ttft:500,tpot:50: 99 % is missed"
    assert f"<h1>{heading}</h1>" in page and "1 overloaded" in page
    assert "no prefill instance meets 500 ms: the best &lt;i&gt;waits&lt;/i&gt; 812 ms" in page
    assert "too few requests for 99 %" in page
    assert 'src="' not in page and "uPlot" in page
    roles = next(chart for chart in charts_of(page) if chart["stacked"])
    shown = {curve["label"]: curve["ys"] for curve in roles["curves"]}  # type: ignore[attr-defined]
    assert shown["prefill"] == [1.0, 2.0, 2.0] and shown["decode"] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["gateway.jsonl", "simulated.jsonl"])
def test_journals_of_both_drivers_make_a_page_again_and_again(tmp_path: Path, name: str) -> None:
    out = tmp_path / "page.html"
    assert report(JOURNALS / name, "--out", out) == 0
    assert report(JOURNALS / name, "--out", out) == 0, "a page of ours may be made anew"
    assert charts_of(out.read_text())


def test_what_is_no_report_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = written(tmp_path / "j.jsonl", [HEADER, outcome("r0", 0.0)])
    before = journal.read_bytes()
    assert report(journal, "--out", journal) == 2
    assert "is not written over" in capsys.readouterr().err and journal.read_bytes() == before
    assert report(journal, "--out", tmp_path / "none" / "page.html") == 2
    empty = written(tmp_path / "e.jsonl", [HEADER])
    assert report(empty, "--out", tmp_path / "page.html") == 0
    assert "no request has ended" in (tmp_path / "page.html").read_text()
