"""What names the beginnings of prompts, so that a later prompt is known to go on from an earlier answer.

A prompt is cut into blocks of ids or characters, whose chained hashes name all before them, too. A chat's
messages are no beginning of the next turn's text, character by character: clients write them anew. Of a chat
it is the messages that are compared, each as ``_message`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import islice
from typing import Any

import orjson

from tidegate.engines.seam import TokensSink
from tidegate.gateway.call import Call, TokenEstimate
from tidegate.protocol.chunks import Json, Tokens, joined_delta
from tidegate.signals.prefix import PromptBlocks

BLOCK_TOKENS = 32
"""Tokens of a block where the prompt comes as ids (ours): two of vLLM's. Shorter ones cost long prompts time,
longer ones miss more of what an engine finds of a short one's beginning."""
BLOCK_CHARS = 128
"""Characters of a block where it comes as text (ours): about as long at four a token."""
HALF = 0.5
"""How much of the block behind those that two texts share they share, too, in the mean."""
MOST_BLOCKS = 4096
"""Blocks of a prompt that are looked at (ours): hashing a huge body whole would hold up every stream."""
THOUGHT_ENDS = "</think>"
"""What stands before it in an answer is no part of it: chat templates and clients leave it out of history."""


class KeptAnswer:
    """Passes the pieces of an answer on to ``answer``, and keeps what it says."""

    __slots__ = ("_answer", "_calls", "_keep", "_text")

    def __init__(self, answer: TokensSink) -> None:
        self._answer = answer
        self._text = StringIO()
        self._keep = self._text.write
        self._calls: Any = None

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._text.getvalue()

    @property
    def message(self) -> Json:
        """What was said so far, as a message of a chat."""
        return {"role": "assistant", "content": self.text, "tool_calls": self._calls}

    def tokens(self, tokens: Tokens) -> None:
        """See ``TokensSink.tokens``."""
        self._keep(tokens.text)
        if tokens.delta and tokens.delta.get("tool_calls"):
            self._calls = joined_delta(self._calls, tokens.delta["tool_calls"])
        self._answer.tokens(tokens)

    def plain(self, text: str, token_ids: list[int]) -> None:
        """See ``TokensSink.plain``."""
        self._keep(text)
        self._answer.plain(text, token_ids)


def prompt_blocks(call: Call, estimate: TokenEstimate, *, followed: bool) -> PromptBlocks:
    """Return the prompt's whole blocks. Prompts of different tenants or salts share none.

    Of a chat that is ``followed`` they have, too, what stands for its messages up to the newest answer.
    """
    key = _root(call)
    if isinstance(call.prompt, list):
        return PromptBlocks(tuple(_chain(key, call.prompt, BLOCK_TOKENS)), BLOCK_TOKENS)
    text = call.prompt or "" if call.messages is None else repr(call.messages)[:-1]
    tokens = estimate.tokens(call.prompt_chars) * BLOCK_CHARS / max(1, len(text))
    if call.messages is None:
        return PromptBlocks(tuple(_chain(key, text, BLOCK_CHARS)), tokens, with_answer=False, beyond=HALF)
    said = _said(call, _answered(call.messages)) if followed else None
    keys = tuple(_chain(key, text, BLOCK_CHARS))
    return PromptBlocks(keys, tokens, with_answer=False, said=said, beyond=HALF)


def with_answer(blocks: PromptBlocks, call: Call, ids: list[int], kept: KeptAnswer | None) -> PromptBlocks:
    """Return the blocks of ``ids``, a prompt and its answer; ``blocks`` are the prompt's.

    Of one that came as text it is the text that they name, if it was ``kept``; of a chat they have what
    stands for its messages with the answer.
    """
    if isinstance(call.prompt, list):
        return blocks._replace(keys=_further(blocks.keys, call, ids, BLOCK_TOKENS))
    if kept is None:
        return blocks
    if call.messages is not None:
        return blocks._replace(said=_said(call, [*call.messages, kept.message]))
    keys = _further(blocks.keys, call, (call.prompt or "") + kept.text, BLOCK_CHARS)
    return blocks._replace(keys=keys, said=keys[-1] if len(keys) > len(blocks.keys) else None)


def _root(call: Call) -> int:
    return hash((call.tenant, call.salt, call.model, call.chat))


def _further(keys: Sequence[int], call: Call, prompt: list[int] | str, length: int) -> tuple[int, ...]:
    """Return the keys of a prompt that begins with the blocks of ``keys``."""
    known = len(keys)
    more = _chain(keys[-1] if known else _root(call), prompt[known * length :], length)
    return (*keys, *islice(more, MOST_BLOCKS - known))


def _chain(key: int, prompt: list[int] | str, length: int) -> Iterator[int]:
    for start in range(0, min(len(prompt) - length + 1, MOST_BLOCKS * length), length):
        block = prompt[start : start + length]
        key = hash((key, block if isinstance(block, str) else tuple(block)))
        yield key


# messages


def _answered(messages: list[Json]) -> list[Json]:
    """Return the messages up to the newest answer."""
    ends = (at for at in range(len(messages), 0, -1) if messages[at - 1].get("role") == "assistant")
    return messages[: next(ends, 0)]


def _said(call: Call, messages: list[Json]) -> int:
    """Return what stands for messages behind a call's tools."""
    tools = call.sampling.get("tools")
    return hash((_root(call), orjson.dumps(tools) if tools else b"", *map(_message, messages)))


def _message(message: Json) -> tuple[Any, ...]:
    """Return what makes two messages one: the role, the text but for white space around it and thoughts
    before it, and what is called with which arguments. Ids of calls are the client's to choose."""
    role, text = message.get("role"), _text(message.get("content"))
    if role == "assistant":
        text = text.rpartition(THOUGHT_ENDS)[2]
    calls = message.get("tool_calls") or ()
    return role, text.strip(), *(map(_called, calls) if isinstance(calls, list | tuple) else ())


def _text(content: Any) -> str:
    """Return a message's text; what else is among its parts is written out."""
    if isinstance(content, list):
        return "".join(map(_text, content))
    if isinstance(content, dict):
        text = content.get("text")
        return text if isinstance(text, str) else _written(content)
    return content if isinstance(content, str) else "" if content is None else _written(content)


def _called(call: Any) -> tuple[str, str]:
    """Return a call's name and arguments: the same in whatever order and spacing they are written."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return "", _written(call)
    arguments = function.get("arguments")
    try:
        arguments = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except orjson.JSONDecodeError:
        pass
    return str(function.get("name")), _written(arguments)


def _written(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
