"""The report of a comparison: a page that needs nothing else, and tables without charts."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.reports.comparison_cases import made_comparison, made_entry
from tidegate.cli import simulating
from tidegate.reports.comparison import write_tables
from tidegate.reports.figures import draw_figures
from tidegate.reports.page import render_page
from tidegate.reports.plot_style import NoPlots, looks

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
    figures = draw_figures(COMPARISON)
    text = render_page(COMPARISON, figures, ["arrow leads"])
    page = Page()
    page.feed(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b", re.sub(r"<[^>]*>", " ", text), re.IGNORECASE)
    assert "&lt;odd&gt;" in text and "<odd>" not in text
    assert len(figures) == 6
    assert all(figure.png.startswith(b"\x89PNG") for figure in figures)


@pytest.mark.parametrize("name", [r"$\frac{x$", "a_$b$^c", "100 % <b>&", "$", "\\u{"])
def test_names_in_charts_are_what_they_are(name: str) -> None:
    comparison = made_comparison(made_entry(name, 8.0), made_entry("static:best", 6.0, chosen=name))
    figures = draw_figures(replace(comparison, traces=(replace(comparison.traces[0], title=name),)))
    goodput = next(figure.svg for figure in figures if figure.name.endswith("goodput"))
    assert goodput.count(escape(name, quote=False)) >= 3, "the title, a system, a split"


def test_a_chart_that_fails_loses_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("a chart that cannot be drawn")

    monkeypatch.setattr(simulating, "draw_figures", failing)
    simulating.write_folder(tmp_path, COMPARISON, ["arrow leads"])
    assert "arrow leads" in (tmp_path / "report.html").read_text()
    assert list(tmp_path.glob("*.csv"))


def test_without_matplotlib_tables_still_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoPlots, match=r"tidegate\[plots\]"):
        draw_figures(COMPARISON)
    assert "no charts here" in render_page(COMPARISON, [], [], "no charts here")
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


def test_systems_differ_in_colour_marker_or_dash_however_many_they_are() -> None:
    found = looks([f"s{index}" for index in range(20)])
    assert len({(look.colour, look.marker, look.dash) for look in found.values()}) == 20
