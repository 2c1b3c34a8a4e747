"""The HTTP front that every server of the dialect shares: uploads in, JSON and errors out.

Nothing a client sends, malformed HTTP included, ends in a traceback or outside the OpenAI error schema.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from tidegate.core.errors import (
    BadRequest,
    BodyTooLarge,
    ClientGone,
    InternalError,
    TidegateError,
    Unauthorized,
    UnknownRoute,
    WrongMethod,
    status_of,
)
from tidegate.protocol.bodies import parse_object
from tidegate.protocol.chunks import error_body

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OnError = Callable[[web.Request, TidegateError], None]

UPLOAD_S = 30.0
"""How long a body may take to arrive (ours)."""
JSON = "application/json"
REQUEST_ID = "X-Request-Id"
MOST_ID_CHARS = 256
_SILENT = logging.Logger("access", level=logging.CRITICAL)
_MALFORMED = (HttpProcessingError, web.RequestPayloadError)


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in the body. Raises BadRequest for anything else or for a stalled upload."""
    try:
        async with asyncio.timeout(UPLOAD_S):
            raw = await request.read()
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {UPLOAD_S:g} s") from None
    except _MALFORMED as error:
        raise BadRequest(f"the upload is broken: {_words(error)}") from None
    return parse_object(raw)


def json_answer(value: Any) -> web.Response:
    """Return ``value`` as a JSON answer."""
    return web.Response(body=orjson.dumps(value), content_type=JSON)


def error_answer(error: TidegateError) -> web.Response:
    """Return ``error`` in OpenAI's schema, with Retry-After in whole seconds and Allow where they apply."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, WrongMethod):
        headers["Allow"] = ", ".join(error.allowed)
    return web.Response(
        body=error_body(error), status=status_of(error).http, headers=headers, content_type=JSON
    )


async def name_answer(request: web.Request, response: web.StreamResponse) -> None:
    """Put an id on an answer, errors too (a signal ``on_response_prepare``): the one that the client gave
    it, else that of its body, else a new one."""
    given = request.headers.get(REQUEST_ID, "")
    if given and given.isascii() and given.isprintable() and len(given) <= MOST_ID_CHARS:
        response.headers[REQUEST_ID] = given
    elif REQUEST_ID not in response.headers:
        response.headers[REQUEST_ID] = secrets.token_hex(12)


def header_bytes(value: str | None) -> bytes:
    """Return a header's bytes as they came, valid UTF-8 or not; empty for a missing one."""
    return (value or "").encode(errors="surrogateescape")


def header_texts(request: web.Request, *names: str) -> dict[str, str]:
    """Return those of the named headers that were sent. Raises BadRequest naming one that is not UTF-8."""
    found = {name: value for name in names if (value := request.headers.get(name)) is not None}
    for name, value in found.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"header {name}: not valid UTF-8", param=name) from None
    return found


def check_bearer(request: web.Request, key: str) -> None:
    """Raise Unauthorized unless the request carries ``key``. Takes the same time for every wrong key."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(header_bytes(given.strip()), key.encode()):
        raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")


def answering_errors(most_body_bytes: int, on_error: OnError | None = None) -> Middleware:
    """Return the middleware that turns whatever a handler raises into an error answer. ``on_error`` hears of
    every error before it is answered. An error the tree does not know is logged and shows nothing. Once an
    answer's head is out, an error can only cut the connection."""

    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as failure:
            error = _in_tree(failure, request, most_body_bytes)
        if on_error is not None:
            on_error(request, error)
        if request.writer.output_size > 0 and request.transport is not None:
            request.transport.abort()
        answer = error_answer(error)
        if isinstance(error, BodyTooLarge):
            answer.force_close()
        return answer

    return answer_errors


def _in_tree(failure: Exception, request: web.Request, most_body_bytes: int) -> TidegateError:
    """Return the member of the error tree for what a handler raised."""
    match failure:
        case TidegateError():
            return failure
        case web.HTTPNotFound():
            return UnknownRoute(f"no route {request.method} {request.path}")
        case web.HTTPMethodNotAllowed(allowed_methods=allowed):
            right = ", ".join(sorted(allowed))
            return WrongMethod(f"{request.path} takes {right}, not {request.method}", allowed=allowed)
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLarge(f"the body exceeds {most_body_bytes} bytes")
        case web.HTTPClientError():
            return BadRequest(failure.text or failure.reason)
        case ConnectionError():
            return ClientGone("the client closed the connection")
    log.error("answering %s %s failed", request.method, request.path, exc_info=failure)
    return InternalError("internal error")


class FrontRunner(web.AppRunner):
    """Runs an application whose clients may send malformed HTTP. Cancels handlers of departed clients."""

    def __init__(self, app: web.Application, *, shutdown_timeout_s: float) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout_s)

    async def _make_server(self) -> web.Server:
        # aiohttp has no public hook for requests its parser refuses; this and _Connection are the seam.
        made = await super()._make_server()
        return _Server(made.request_handler, request_factory=made.request_factory, handler_cancellation=True)


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), access_log=_SILENT)


class _Connection(web.RequestHandler):
    """Answers malformed HTTP in OpenAI's schema; it is the client's fault, so the log stays quiet."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if not isinstance(exc, _MALFORMED) or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        answer = error_answer(BadRequest(f"malformed HTTP: {_words(exc)}"))
        answer.headers[REQUEST_ID] = secrets.token_hex(12)
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if not isinstance(kw.get("exc_info"), _MALFORMED):
            super().log_exception(*args, **kw)


def _words(error: Exception) -> str:
    """Return the line of aiohttp's message that says what is wrong; the others quote the bytes."""
    text = str(error)
    lines = (text.partition("message:")[2] or text).splitlines()
    return next((line.strip(" :") for line in lines if line.strip()), type(error).__name__)
