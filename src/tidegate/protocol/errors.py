"""The OpenAI error schema, from the one error tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from tidegate.core.errors import TidegateError, WrongMethod, status_of


def error_body(error: TidegateError) -> bytes:
    """Encode ``{"error": {message, type, param, code}}`` for ``error``."""
    row = status_of(error)
    fields = {"message": error.message, "type": row.type, "param": error.param, "code": row.code}
    return orjson.dumps({"error": fields})


def error_headers(error: TidegateError) -> dict[str, str]:
    """Return the headers of an error answer: Retry-After in whole seconds and Allow, where they apply."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, WrongMethod):
        headers["Allow"] = ", ".join(error.allowed)
    return headers


def error_text(answer: Mapping[str, Any], otherwise: str = "no message") -> str:
    """Return the words of an error answer in OpenAI's form, or nearly so; ``otherwise`` when it has none."""
    error = answer.get("error") or answer.get("message") or otherwise
    return str((error.get("message") or otherwise) if isinstance(error, dict) else error)
