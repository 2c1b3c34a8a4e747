"""The text of an answer, one token at a time, at constant cost per token.

Text is held back while it ends in half a character or in what may become a stop string. It depends on the
output ids alone, so a leg that replays the ids of earlier legs stands where the unbroken leg would.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tidegate.engines.serving.types import GenerateRequest, Output
from tidegate.protocol.stop_strings import StopStrings


class TextDecoder(Protocol):
    """Turns ids into text incrementally."""

    def add(self, token_id: int) -> str:
        """Return the text that this id completes; may be empty."""

    def flush(self) -> str:
        """Return what is still undecided, U+FFFD for a broken character."""


class ByteDecoder:
    """For byte-level BPE: ids are bytes by a table, and UTF-8 is decoded incrementally."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class TextAssembler:
    """The text of one request: decoding, stop strings and what is held back.

    ``replayed`` are the ids of earlier legs, whose text has been shown. ``said`` is the text that the newest
    id completed, held back or not.
    """

    __slots__ = ("_decoder", "_stops", "said")

    def __init__(
        self, decoder: TextDecoder, stops: tuple[str, ...], replayed: Sequence[int] = (), min_tokens: int = 0
    ) -> None:
        self.said = ""
        self._decoder = decoder
        self._stops = StopStrings(tuple(stop for stop in stops if stop))
        for count, token_id in enumerate(replayed, start=1):
            self.add(token_id, may_stop=count > min_tokens)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found

    def add(self, token_id: int, may_stop: bool = True) -> str:
        """Take one id and return the text that may be shown now. When a stop string completes, ``stopped_by``
        is set and the text before it returned. With ``may_stop`` false (below ``min_tokens``) stop strings
        are shown like any text."""
        self.said = text = self._decoder.add(token_id)
        return self._stops.feed(text, search=may_stop) if text else text

    def flush(self) -> str:
        """Return everything held back; the request ends here."""
        text = self._stops.feed(self._decoder.flush(), search=True)
        return text + self._stops.flush()


def token_output(
    request: GenerateRequest, token_id: int, new_tokens: int, text: TextAssembler, eos_ids: frozenset[int]
) -> Output:
    """Return what a leg's ``new_tokens``-th token shows; ``finish_reason`` is set when the leg ends with it.
    A leg that ends by length and keeps its KV is going to be continued: what its text holds back is left for
    the continuation, which replays the ids and emits it."""
    params = request.sampling
    output = Output(request.id, [token_id], "")
    if token_id in params.stop_token_ids or (token_id in eos_ids and not params.ignore_eos):
        output.finish_reason = "stop"
        output.stop_reason = token_id if token_id in params.stop_token_ids else None
        output.text = text.flush()
        text.said = ""
        return output
    output.text = text.add(token_id, may_stop=request.generated + new_tokens > params.min_tokens)
    if text.stopped_by is not None:
        output.finish_reason = "stop"
        output.stop_reason = text.stopped_by
    elif new_tokens >= params.max_tokens:
        output.finish_reason = "length"
        if not request.pin_kv:
            output.text += text.flush()
    return output
