"""What the gateway remembers of conversations is bounded, however long or short they are."""

from __future__ import annotations

import pytest

from tidegate.gateway import sessions
from tidegate.gateway.sessions import ENTRY_TOKENS, Conversations


@pytest.mark.parametrize("tokens", [2, 1000])
def test_the_longest_unused_conversations_are_forgotten(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(sessions, "MOST_TOKENS", 10 * (tokens + ENTRY_TOKENS))
    known = Conversations()
    for number in range(25):
        known.note(("", f"s{number}"), "", [7] * tokens)
        known.note(("", "kept"), "", [7] * tokens)
    prompt = [7] * tokens + [8]
    held = [number for number in range(25) if known.held_of(("", f"s{number}"), "", prompt) is not None]
    assert held == list(range(16, 25))
    assert known.held_of(("", "kept"), "", prompt) == tokens
    assert known.held_of(("", "kept"), "salt", prompt) == known.held_of(("b", "kept"), "", prompt) is None
    assert known.held_of(("", "kept"), "", [7, 8, 7]) == 1


def test_a_prompt_that_shares_nothing_is_told_from_a_conversation_that_is_unknown() -> None:
    known = Conversations()
    known.note(("", "s"), "", [7, 8, 9])
    assert known.held_of(("", "s"), "", [1, 8, 9]) == known.held_of(("", "s"), "", [7]) == 0
    assert known.held_of(("", "t"), "", [7, 8, 9]) is None
