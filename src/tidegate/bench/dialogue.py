"""What a session has said so far, as a client sends it again with its next turn."""

from __future__ import annotations

from typing import Any

from tidegate.bench.answer import TimedAnswer
from tidegate.bench.settings import Prompt
from tidegate.workloads.prompts import TokenPrompts, WordPrompts
from tidegate.workloads.trace import TraceRecord


class Dialogue:
    """The rounds of one session. A turn is all rounds before it, answers as they came, and what it adds.

    A turn whose recorded prompt is not longer than all that (a client that compacted its history) begins
    anew. Lengths are the endpoint's counts where it reports them.
    """

    def __init__(self, prompts: TokenPrompts | WordPrompts, *, chat: bool) -> None:
        self._prompts = prompts
        self._chat = chat
        self._held_tokens = 0
        self._ids: list[int] = []
        self._text = ""
        self._messages: list[dict[str, Any]] = []

    def turn(self, record: TraceRecord, index: int) -> Prompt:
        """Return the prompt of the next turn, of about ``record.input_tokens``."""
        more = record.input_tokens - self._held_tokens
        if not self._held_tokens or more < 1:
            piece = self._prompts.prompt(record, index)
            self._ids, self._text, self._messages = [], "", []
        else:
            piece = self._prompts.piece(f"{record.session_id} {record.turn}", more)
        self._held_tokens = record.input_tokens
        if isinstance(piece, list):
            self._ids += piece
            return list(self._ids)
        if self._chat:
            self._messages.append({"role": "user", "content": piece})
            return list(self._messages)
        self._text = f"{self._text} {piece}" if self._text else piece
        return self._text

    def answered(self, answer: TimedAnswer) -> None:
        """Add an answer that came whole; one that did not is no part of what the client sends again."""
        self._ids += answer.ids
        self._text += answer.text
        if self._chat:
            self._messages.append({"role": "assistant", "content": answer.text})
        if isinstance(self._prompts, TokenPrompts):
            self._held_tokens = len(self._ids)
        else:
            self._held_tokens = (answer.prompt_tokens or self._held_tokens) + answer.output_tokens
