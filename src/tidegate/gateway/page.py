"""The page at ``/``: what a running gateway does, for a browser. Its script reads the state."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from aiohttp import web

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: its own style and script, and the state."""


async def page(request: web.Request) -> web.Response:
    """GET /: the page, the same for everyone; where the gateway has a key, the page asks for it."""
    headers = {
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
    }
    return web.Response(text=_text(), content_type="text/html", charset="utf-8", headers=headers)


@cache
def _text() -> str:
    return (files("tidegate.gateway") / "page.html").read_text(encoding="utf-8")
