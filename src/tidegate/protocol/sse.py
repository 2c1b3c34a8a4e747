"""Server-sent events: framing out, with the HTTP chunks around them, and an incremental parser in."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"


def event(payload: bytes) -> bytes:
    """Frame one JSON payload as an event."""
    return b"data: " + payload + b"\n\n"


def http_chunk(data: bytes) -> bytes:
    """Frame bytes as a chunk of an HTTP/1.1 body with chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class SseParser:
    """Cuts a byte stream into the payloads of its ``data:`` lines.

    Accepts LF and CRLF line ends and ignores comments and other fields. One data line per event,
    as every OpenAI-style server sends. ``feed`` keeps an incomplete last line for the next call.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads completed by ``data``, in order; ``b"[DONE]"`` is returned as such."""
        if self._rest:
            data = self._rest + data
        elif data.startswith(b"data: ") and data.find(b"\n") == len(data) - 2:
            # One whole event and nothing else: nearly every read of a token stream.
            return [data[6:-2]]
        lines = data.split(b"\n")
        self._rest = lines.pop()
        found: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                found.append(line[5:].strip())
        return found
