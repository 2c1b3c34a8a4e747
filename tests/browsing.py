"""A headless Chromium for tests of pages, where playwright and one are there (``make test-browser``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

CHROMIUM = os.environ.get("TIDEGATE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@asynccontextmanager
async def browsed(address: str, width: int = 390, scheme: str = "light") -> AsyncIterator[Any]:
    """Give the page at ``address`` in a window of ``width`` pixels; fails on any error of its scripts."""
    browsers = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no Chromium; TIDEGATE_CHROMIUM names one")
    async with browsers.async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme, locale="en-US"
        )
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        await page.goto(address)
        yield page
        await browser.close()
    assert troubles == []
