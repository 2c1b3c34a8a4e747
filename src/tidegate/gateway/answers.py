"""What a flight delivers to: the stream of a client, or an answer that is sent whole."""

from __future__ import annotations

from typing import Protocol

from tidegate.protocol.chunks import ChunkWriter, Tokens
from tidegate.protocol.client_stream import ClientStream


class ClientAnswer(Protocol):
    """Takes a request's tokens on their way to its client."""

    def tokens(self, tokens: Tokens) -> None:
        """Take any piece; the request's last one has its finish reason, and each the prompt's ids."""
        ...

    def plain(self, text: str, token_ids: list[int]) -> None:
        """Take a piece that is only text and ids, never the first one."""
        ...


class StreamedAnswer:
    """Sends each piece to the client as it comes. Raises ClientGone."""

    __slots__ = ("_client", "_writer")

    def __init__(self, writer: ChunkWriter, client: ClientStream) -> None:
        self._writer = writer
        self._client = client

    def tokens(self, tokens: Tokens) -> None:
        """See ``ClientAnswer.tokens``."""
        self._client.send(self._writer.piece(tokens))

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``ClientAnswer.plain``."""
        self._client.send(self._writer.plain(text, token_ids))
