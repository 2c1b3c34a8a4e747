"""A client of OpenAI-compatible servers that notes tokens and the times at which they come."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

Json = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWER_S = 180.0
KEEP_S = 2.0
"""Less than the 5 s for which vLLM's server keeps an idle connection: it might close one that is taken up."""


@dataclass
class Answer:
    """What came, whole or so far. ``at_s`` has the time of every streamed piece that brings tokens."""

    status: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: str = ""
    began_s: float = 0.0
    at_s: list[float] = field(default_factory=list)

    @property
    def told(self) -> tuple[list[int], str, str | None]:
        """What must be the same however a greedy request is served."""
        return self.ids, self.text, self.finish_reason

    def begins(self, whole: Answer) -> bool:
        """Tell whether this is a beginning of ``whole``."""
        return whole.ids[: len(self.ids)] == self.ids and whole.text.startswith(self.text)

    def add(self, body: Json) -> None:
        """Take a body, or an event of a streamed one."""
        if "error" in body:
            self.error = self.error or str(body["error"])
        for choice in body.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or choice
            self.text += part.get("text" if part is choice else "content") or ""
            self.ids += choice.get("token_ids") or []
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: Json,
    answer: Answer,
    *,
    headers: Mapping[str, str] | None = None,
    on_piece: Callable[[], None] | None = None,
) -> Answer:
    """POST ``body`` to the endpoint ``url`` and read into ``answer``; ``on_piece`` is called behind each
    streamed piece with tokens, and may raise to leave."""
    answer.began_s = time.perf_counter()
    async with session.post(url, data=orjson.dumps(body), headers=headers) as response:
        answer.status = response.status
        if response.status != 200:
            answer.error = (await response.text())[:300] or "no reason given"
            return answer
        if not body.get("stream"):
            answer.add(orjson.loads(await response.read()))
            return answer
        ended = False
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                continue
            before = len(answer.ids)
            answer.add(orjson.loads(line[6:]))
            if len(answer.ids) > before:
                answer.at_s.append(time.perf_counter())
                if on_piece is not None:
                    on_piece()
        if not ended and not answer.error:
            answer.error = "the stream ended without [DONE]"
    return answer


def client(*, abrupt: bool = False, keep: bool = False) -> aiohttp.ClientSession:
    """Return a session for many requests at once, each on a connection of its own unless it is to ``keep``
    them; an ``abrupt`` one resets connections that it leaves instead of closing them."""
    connector = aiohttp.TCPConnector(
        limit=0,
        force_close=not keep,
        keepalive_timeout=KEEP_S if keep else None,
        socket_factory=_resetting if abrupt else None,
    )
    return aiohttp.ClientSession(
        connector=connector,
        headers={"Content-Type": "application/json"},
        timeout=aiohttp.ClientTimeout(total=ANSWER_S),
    )


def _resetting(address: Any) -> socket.socket:
    made = socket.socket(address[0], address[1], address[2])
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return made
