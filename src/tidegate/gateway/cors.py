"""What browsers ask before pages of other sites may call the gateway (CORS)."""

from __future__ import annotations

from aiohttp import web

from tidegate.protocol.http_front import REQUEST_ID, Handler

ALLOWED_FOR_S = 600
"""How long a browser may believe the answer to a preflight (ours)."""
ANY = "*"


class Cors:
    """Lets pages of ``origins`` read answers; ``*`` stands for every page. Keys come as headers, never as
    cookies, so credentials are not allowed."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    @web.middleware
    async def answer_preflights(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what a browser asks before a call; it never sends a key with that."""
        headers = request.headers
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in headers:
            return await handler(request)
        allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Max-Age": str(ALLOWED_FOR_S)}
        if wanted := headers.get("Access-Control-Request-Headers"):
            allowed["Access-Control-Allow-Headers"] = wanted
        return web.Response(status=204, headers=allowed if self._allowed(request) else {})

    async def name_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say in an answer's head that the page may read it."""
        if ANY not in self._origins:
            response.headers.add("Vary", "Origin")
        if origin := self._allowed(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = f"{REQUEST_ID}, Retry-After"

    def _allowed(self, request: web.Request) -> str | None:
        if ANY in self._origins:
            return ANY
        origin = request.headers.get("Origin")
        return origin if origin in self._origins else None
