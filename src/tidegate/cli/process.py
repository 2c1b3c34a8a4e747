"""What all verbs agree on: exit statuses, and how debugging is switched on."""

from __future__ import annotations

import os

FAILURE = 1
"""The work was done badly: requests failed, a level was missed, an engine broke."""
WRONG_INPUT = 2
"""The user has to correct something first."""
INTERRUPTED = 130


def debugging() -> bool:
    """Tell whether TIDEGATE_DEBUG asks for tracebacks and debug logs."""
    return os.environ.get("TIDEGATE_DEBUG", "") not in ("", "0")
