"""What a placement knows of a conversation's earlier rounds."""

from __future__ import annotations

import msgspec


class History(msgspec.Struct, frozen=True, gc=False):
    """The beginning of a request's prompt that is there already: instance ``on``, to which the request's
    session is bound, holds KV of its first ``tokens`` tokens (AMPD, section 4: the decode worker that owns
    a session's KV)."""

    on: str
    tokens: int
