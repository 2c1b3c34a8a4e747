"""The HTTP front that every server of the dialect shares: uploads in, JSON and errors out.

Nothing a client sends, malformed HTTP included, ends in a traceback or outside the OpenAI error schema.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
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
    NoDescriptors,
    TidegateError,
    Unauthorized,
    UnknownRoute,
    WrongMethod,
    status_of,
)
from tidegate.protocol.bodies import parse_object
from tidegate.protocol.chunks import error_body
from tidegate.protocol.descriptors import raise_descriptor_limit
from tidegate.protocol.uploads import MOST_HELD_BYTES, BodyMemory, HeldBody, inflated, weight_bytes

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OnError = Callable[[web.Request, TidegateError], None]

UPLOAD_S = 30.0
"""How long a body may take to arrive (ours)."""
HEAD_S = 20.0
"""How long the first head of a connection may take to arrive (ours)."""
IDLE_S = 75.0
"""How long a connection may be idle: above the 60 s of common proxies, which reuse theirs (ours)."""
KEYED = ("/v1/", "/metrics", "/tokenize", "/detokenize")
"""What a server's key opens, by the beginnings of paths."""
SPARE_DESCRIPTORS = 64
"""Kept for files and engines, whatever clients do (ours)."""
MOST_REFUSED = 32
"""How many clients beyond the most are told that they are (ours)."""
JSON = "application/json"
_held_body: ContextVar[HeldBody] = ContextVar("held body")
"""What the body of the request takes; aiohttp handles each request in a task of its own."""
REQUEST_ID = "X-Request-Id"
MOST_ID_CHARS = 256
_SILENT = logging.Logger("access", level=logging.CRITICAL)
_MALFORMED = (HttpProcessingError, web.RequestPayloadError)


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in the body, which counts as memory of this request until its end.

    Raises BadRequest for anything else or for a stalled upload, BodyTooLarge, Overloaded when bodies take too
    much memory together, and UnsupportedEncoding.
    """
    held, most_bytes = _held_body.get(), request.client_max_size
    try:
        # Timers cost too much to have one for every body: a small one came with its head.
        async with nullcontext() if request.content.is_eof() else asyncio.timeout(UPLOAD_S):
            raw = await _arrived(request, held, most_bytes)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {UPLOAD_S:g} s") from None
    except _MALFORMED as error:
        raise BadRequest(f"the upload is broken: {_words(error)}") from None
    if encoding := request.headers.get("Content-Encoding"):
        raw = await inflated(raw, encoding, most_bytes, held)
    held.grow_to(weight_bytes(raw))
    return parse_object(raw)


async def _arrived(request: web.Request, held: HeldBody, most_bytes: int) -> bytes:
    """Return the body as it comes over the connection, still compressed if it is."""
    raw = bytearray()
    if (request.content_length or 0) <= most_bytes:
        while chunk := await request.content.readany():
            raw += chunk
            if len(raw) > most_bytes:
                break
            held.grow_to(len(raw))
        else:
            return bytes(raw)
    raise BodyTooLarge(f"the body exceeds {most_bytes} bytes")


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


def owner_of_key(request: web.Request, owners: Mapping[bytes, str]) -> str:
    """Return whose key the request carries, of ``owners`` by their keys. Raises Unauthorized; takes the same
    time for every wrong key."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    key = header_bytes(given.strip())
    found = [owner for known, owner in owners.items() if hmac.compare_digest(key, known)]
    if scheme.lower() != "bearer" or not found:
        raise Unauthorized("a valid API key is needed: Authorization: Bearer KEY")
    return found[-1]


def answering_errors(on_error: OnError | None = None) -> Middleware:
    """Return the middleware that turns whatever a handler raises into an error answer. ``on_error`` hears of
    every error before it is answered. An error the tree does not know is logged and shows nothing. Once an
    answer's head is out, an error can only cut the connection. It also counts the memory of bodies, which
    ``read_object`` reads."""
    memory = BodyMemory(MOST_HELD_BYTES)

    @web.middleware
    async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        held = HeldBody(memory)
        _held_body.set(held)
        try:
            return await handler(request)
        except Exception as failure:
            error = _in_tree(failure, request)
        finally:
            held.release()
        if on_error is not None:
            on_error(request, error)
        if request.writer.output_size > 0 and request.transport is not None:
            request.transport.abort()
        answer = error_answer(error)
        if isinstance(error, BodyTooLarge):
            answer.force_close()
        return answer

    return answer_errors


def _in_tree(failure: Exception, request: web.Request) -> TidegateError:
    """Return the member of the error tree for what a handler raised."""
    match failure:
        case TidegateError():
            return failure
        case web.HTTPNotFound():
            return UnknownRoute(f"no route {request.method} {request.path}")
        case web.HTTPMethodNotAllowed(allowed_methods=allowed):
            right = ", ".join(sorted(allowed))
            return WrongMethod(f"{request.path} takes {right}, not {request.method}", allowed=allowed)
        case web.HTTPClientError():
            return BadRequest(failure.text or failure.reason)
        case ConnectionError():
            return ClientGone("the client closed the connection")
    log.error("answering %s %s failed", request.method, request.path, exc_info=failure)
    return InternalError("internal error")


def most_connections(onward: int) -> int:
    """Return how many connections clients may have when each takes ``onward`` others to be answered; raises
    the limit of open files first."""
    limit = raise_descriptor_limit()
    return max(limit // 4, limit - SPARE_DESCRIPTORS) // (1 + onward)


class FrontRunner(web.AppRunner):
    """Runs an application whose clients may send malformed HTTP. Cancels handlers of departed clients.
    ``onward`` is how many connections it takes to answer one."""

    def __init__(self, app: web.Application, *, shutdown_timeout_s: float, onward: int = 0) -> None:
        self._onward = onward
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout_s)

    async def _make_server(self) -> web.Server:
        # aiohttp has no public hook for requests its parser refuses; this and _Connection are the seam.
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=True,
            onward=self._onward,
        )


class _Server(web.Server):
    """Keeps descriptors for what its answers need. A client beyond takes the place of the connection that has
    been idle for longest. Where none is, it is told so, and the next ones are cut off."""

    def __init__(self, *args: Any, onward: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.most = most_connections(onward)
        self._told = False

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._connections) <= self.most:
            return
        if not self._told:
            self._told = True
            log.warning(
                "clients have %d connections open: idle ones are closed for new ones, which else get 503 "
                "(ulimit -n raises this)",
                self.most,
            )
        idle = next((h for h in self._connections if isinstance(h, _Connection) and h.idle), None)
        if idle is not None:
            idle.force_close()
        elif len(self._connections) <= self.most + MOST_REFUSED and isinstance(handler, _Connection):
            handler.refuse()
        else:
            handler.force_close()

    def __call__(self) -> web.RequestHandler:
        # Bodies are inflated by read_object, after the key was checked: aiohttp would do it for everybody.
        loop = asyncio.get_running_loop()
        return _Connection(
            self, loop=loop, access_log=_SILENT, auto_decompress=False, keepalive_timeout=IDLE_S
        )


async def _no_room(request: web.BaseRequest) -> web.StreamResponse:
    answer = error_answer(NoDescriptors("too many connections are open", retry_after_s=1.0))
    answer.headers[REQUEST_ID] = secrets.token_hex(12)
    answer.force_close()
    return answer


class _Connection(web.RequestHandler):
    """Answers malformed HTTP in OpenAI's schema; it is the client's fault, so the log stays quiet."""

    __slots__ = ()

    @property
    def idle(self) -> bool:
        """Whether it waits for a request."""
        return self._waiter is not None and not self._messages and self.transport is not None

    def refuse(self) -> None:
        """Answer the next request with the reason why there is no room for it."""
        self._request_handler = _no_room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Give the first head less time than an idle connection has later."""
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
            self._next_keepalive_close_time = loop.time() + HEAD_S
            self._keepalive_handle = loop.call_later(HEAD_S, self._process_keepalive)

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
