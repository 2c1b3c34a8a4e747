"""The report of a comparison: a page that needs nothing else, and tables without charts."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reports.comparison_cases import made_comparison, made_entry
from tidegate.cli import simulating
from tidegate.reports.charts import Bars, Panel, coinciding
from tidegate.reports.comparison import RunAt, write_tables
from tidegate.reports.comparison_charts import comparison_charts
from tidegate.reports.looks import looks
from tidegate.reports.page import render_page
from tidegate.reports.plot_style import NoPlots
from tidegate.reports.png import draw_png

COMPARISON = made_comparison(
    made_entry("arrow", 8.0),
    made_entry("static:best", 6.0, chosen="split 1:3", slow=1.5),
    made_entry("hopeless", 0.0, slow=9.0, reason="even <1> request/s misses"),
)


class Page(HTMLParser):
    """Collects what a page refers to, its ids and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_the_page_needs_nothing_beside_it() -> None:
    charts = comparison_charts(COMPARISON)
    text = render_page(COMPARISON, charts, ["arrow leads"])
    page = Page()
    page.feed(text)
    assert "link" not in page.tags and "img" not in page.tags
    assert "uPlot" in text and 'src="' not in text, "the one library is in the file"
    assert all(link.startswith("#") for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    shown = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", re.sub(r"<[^>]*>", " ", shown), re.IGNORECASE)
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        json.loads(data, parse_constant=lambda name: pytest.fail(name))
    assert "&lt;odd&gt;" in text and "<odd>" not in text
    assert text.index("serves") < text.index("<table"), "the heading is the answer"
    assert len(charts) == 7
    assert all(draw_png(chart).startswith(b"\x89PNG") for chart in charts)


def test_bars_that_are_compared_share_a_scale_and_curves_that_coincide_are_named() -> None:
    twins = made_comparison(made_entry("static:best", 6.0), made_entry("static:even", 6.0))
    charts = {chart.name.removeprefix("t-"): chart for chart in comparison_charts(twins)}
    assert len({bars.reach for bars in charts["goodput"].panels if isinstance(bars, Bars)}) == 1
    (panel,) = charts["attainment"].panels
    assert isinstance(panel, Panel) and list(coinciding(panel)) == [("static:best", "static:even")]
    assert panel.curves[0].look.dash != panel.curves[1].look.dash
    assert "static:best and static:even coincide" in charts["attainment"].caption
    assert any("fluid limit" in mark.text for mark in panel.marks)


def test_a_point_has_every_seed_in_it_and_one_seed_has_no_interval() -> None:
    first = made_entry("arrow", 8.0)
    level = first.levels[0]
    lone = RunAt(9.0, 0, 0.2)  # between two rates that both seeds have
    for probes, by_seed, spread in (
        ((*level.probes, lone), (8.0, 8.0), True),
        (tuple(run for run in level.probes if run.seed == 0), (8.0,), False),
    ):
        entry = replace(first, levels=(replace(level, probes=probes, by_seed=by_seed),))
        charts = {chart.name: chart for chart in comparison_charts(made_comparison(entry))}
        panel, bars = charts["t-attainment"].panels[0], charts["t-goodput"].panels[0]
        assert isinstance(panel, Panel) and isinstance(bars, Bars)
        (curve,) = panel.curves
        assert bool(curve.low) is spread and (bars.bars[0].interval is not None) is spread
        at_lone = dict(zip(curve.xs, curve.ys, strict=True)).get(9.0)
        assert at_lone is None or at_lone > 20.0, "the mean of both seeds' curves, not the point of one"


@pytest.mark.parametrize("name", [r"$\frac{x$", "a_$b$^c", "100 % <b>&", "$", "\\u{"])
def test_names_in_charts_are_what_they_are(name: str) -> None:
    comparison = made_comparison(made_entry(name, 8.0), made_entry("static:best", 6.0, chosen=name))
    renamed = replace(comparison, traces=(replace(comparison.traces[0], title=name),))
    for chart in comparison_charts(renamed):
        assert draw_png(chart).startswith(b"\x89PNG")


def test_a_chart_that_fails_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("a chart that cannot be drawn")

    monkeypatch.setattr(simulating, "draw_png", failing)
    simulating.write_folder(tmp_path, "compare", COMPARISON, ["arrow leads"])
    assert "arrow leads" in (tmp_path / "report.html").read_text()
    assert list(tmp_path.glob("*.csv"))


def test_without_matplotlib_tables_still_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoPlots, match="pip install matplotlib"):
        draw_png(comparison_charts(COMPARISON)[0])
    for path in write_tables(tmp_path, COMPARISON):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows or path.name == "candidates.csv"
        assert not any(value.lower() in ("nan", "inf", "none") for row in rows for value in row.values())


def test_the_object_is_strict_json_with_a_run_per_system() -> None:
    found = json.loads(json.dumps(COMPARISON.to_json(), allow_nan=False))
    assert [run["system"] for run in found["runs"]] == ["arrow", "static:best", "hopeless"]
    assert found["goodputs"][0]["share_of_limit"] == 0.5
    assert len(found["goodputs"]) == 6


def test_systems_differ_in_tone_or_dash_however_many_they_are() -> None:
    found = looks([f"s{index}" for index in range(20)])
    assert len({(look.tone, look.dash) for look in found.values()}) == 20


def test_a_system_looks_the_same_in_every_report() -> None:
    one, other = looks(["arrow-lending", "static:best"]), looks(["static:best", "mine", "arrow-lending+edf"])
    assert one["static:best"] == other["static:best"]
    assert one["arrow-lending"].tone == other["arrow-lending+edf"].tone
    assert one["arrow-lending"].dash != other["arrow-lending+edf"].dash
