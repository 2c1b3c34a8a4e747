"""The report of a comparison in a browser: charts are drawn, tell values, zoom, and fit a phone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browsing import browsed
from tests.reports.comparison_cases import made_comparison, made_entry
from tidegate.reports.comparison_charts import comparison_charts
from tidegate.reports.page import render_page

ENDS = "(() => { const x = document.querySelector('.plot').plotted.scales.x; return [x.min, x.max]; })()"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
async def test_charts_are_drawn_tell_values_and_zoom(tmp_path: Path, width: int, scheme: str) -> None:
    comparison = made_comparison(made_entry("arrow", 8.0), made_entry("static:best", 6.0, slow=1.5))
    path = tmp_path / "report.html"
    path.write_text(render_page(comparison, comparison_charts(comparison), []))
    async with browsed(path.as_uri(), width, scheme) as page:
        plots, canvases = page.locator(".plot"), page.locator(".plot canvas")
        assert await plots.count() == await canvases.count() > 5
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        plot = plots.first
        await plot.scroll_into_view_if_needed()
        box = await plot.locator(".u-over").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        await page.mouse.move(x, y)
        assert any(character.isdigit() for character in await plot.locator(".u-value").nth(1).inner_text())
        before = await page.evaluate(ENDS)
        await page.mouse.down()
        await page.mouse.move(x + box["width"] / 4, y, steps=3)
        await page.mouse.up()
        low, high = await page.evaluate(ENDS)
        assert before[0] < low < high < before[1]
        await page.mouse.dblclick(x, y)
        assert await page.evaluate(ENDS) == before
        ink = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ink == "rgb(255, 255, 255)") is (scheme == "light")
