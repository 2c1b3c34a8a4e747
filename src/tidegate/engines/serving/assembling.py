"""The text of an answer, one token at a time, at constant cost per token.

Text is held back while it ends in half a character or in what may become a stop string. Assembling
is a function of the output ids alone, so a leg that replays the ids of earlier legs stands exactly
where the unbroken leg would.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tidegate.engines.serving.types import GenerateRequest, Output


class TextDecoder(Protocol):
    """Turns ids into text incrementally."""

    def add(self, token_id: int) -> str:
        """Return the text that this id completes; may be empty."""
        ...

    def flush(self) -> str:
        """Return what is still undecided, U+FFFD for a broken character."""
        ...


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
    """The text of one request: decoding, stop strings and what is held back."""

    __slots__ = ("_decoder", "_held", "_hold", "_stops", "stopped_by")

    def __init__(self, decoder: TextDecoder, stops: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stops = tuple(stop for stop in stops if stop)
        self._hold = max((len(stop) for stop in self._stops), default=0) - 1
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token_id: int, may_stop: bool = True) -> str:
        """Take one id and return the text that may be shown now.

        When a stop string completes, ``stopped_by`` is set and the text before it returned. With
        ``may_stop`` false (below ``min_tokens``) stop strings are shown like any text.
        """
        text = self._decoder.add(token_id)
        if self._hold < 0 or not text:
            return text
        return self._scan(self._held + text, may_stop)

    def replay(self, token_ids: Sequence[int], min_tokens: int) -> None:
        """Take the output of earlier legs, whose text has been shown."""
        for position, token_id in enumerate(token_ids):
            self.add(token_id, may_stop=position + 1 > min_tokens)

    def flush(self) -> str:
        """Return everything held back; the request ends here."""
        text = self._held + self._decoder.flush()
        self._held = ""
        return text if self._hold < 0 else self._scan(text, True) + self._held

    def _scan(self, text: str, may_stop: bool) -> str:
        if may_stop:
            found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
            if found:
                at, self.stopped_by = min(found, key=lambda hit: hit[0])
                self._held = ""
                return text[:at]
        keep = self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest tail of ``text`` that begins a stop string."""
        for length in range(min(self._hold, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def say_token(
    request: GenerateRequest, token_id: int, new_tokens: int, text: TextAssembler, eos_ids: frozenset[int]
) -> Output:
    """Return what a leg's ``new_tokens``-th token shows; ``finish_reason`` is set when the leg ends with it.

    A leg that ends by length and keeps its KV is going to be continued: what its text holds back is
    left for the continuation, which replays the ids and emits it.
    """
    params = request.sampling
    output = Output(request.id, [token_id], "")
    if token_id in params.stop_token_ids or (token_id in eos_ids and not params.ignore_eos):
        output.finish_reason = "stop"
        output.stop_reason = token_id if token_id in params.stop_token_ids else None
        output.text = text.flush()
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
