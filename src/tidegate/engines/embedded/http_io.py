"""Reading uploads and writing answers: what every route of the instance's server shares."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from tidegate.core.errors import (
    BadRequest,
    BodyTooLarge,
    InternalError,
    TidegateError,
    UnknownRoute,
    status_of,
)
from tidegate.protocol.bodies import parse_object
from tidegate.protocol.errors import error_body, error_headers

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

UPLOAD_S = 30.0
MOST_BODY_BYTES = 8 << 20
JSON = "application/json"


async def read_object(request: web.Request) -> dict[str, Any]:
    """Return the JSON object in the body. Raises BadRequest for anything else or for a stalled upload."""
    try:
        async with asyncio.timeout(UPLOAD_S):
            raw = await request.read()
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {UPLOAD_S:g} s") from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise BadRequest(f"the upload is broken: {error}") from None
    return parse_object(raw)


def json_answer(value: Any) -> web.Response:
    """Return ``value`` as a JSON answer."""
    return web.Response(body=orjson.dumps(value), content_type=JSON)


def error_answer(error: TidegateError) -> web.Response:
    """Return ``error`` in OpenAI's schema."""
    return web.Response(
        body=error_body(error),
        status=status_of(error).http,
        headers=error_headers(error),
        content_type=JSON,
    )


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an error answer; an unforeseen one is logged and shows nothing."""
    try:
        return await handler(request)
    except TidegateError as error:
        return error_answer(error)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        return error_answer(UnknownRoute(f"unknown path or method: {request.method} {request.path}"))
    except web.HTTPRequestEntityTooLarge:
        return error_answer(BodyTooLarge(f"the body exceeds {MOST_BODY_BYTES} bytes"))
    except web.HTTPException as error:
        return error_answer(BadRequest(error.reason))
    except ConnectionError:
        raise
    except Exception:
        log.exception("answering %s %s failed", request.method, request.path)
        return error_answer(InternalError("internal error"))
