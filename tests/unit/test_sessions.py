"""What the gateway remembers of conversations is bounded, however long or short they are."""

from __future__ import annotations

import pytest

from tidegate.core.slo import Slo
from tidegate.fleet.member import Member
from tidegate.gateway import sessions
from tidegate.gateway.call import Call, read_calls
from tidegate.gateway.sessions import ENTRY_TOKENS, Conversations
from tidegate_testing import instance


def call(session: str) -> Call:
    return read_calls({"prompt": [1]}, {"x-session-id": session}, chat=False, slo=Slo())[0]


@pytest.mark.parametrize("tokens", [1, 1000])
def test_the_longest_unused_conversations_are_forgotten(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(sessions, "MOST_TOKENS", 10 * (tokens + ENTRY_TOKENS))
    known, member = Conversations(), Member(instance("i0"), "http://x", "fake", engine_id="e")
    for number in range(25):
        known.note(call(f"s{number}"), member, [7] * tokens, "i0", 1)
        known.note(call("kept"), member, [7] * tokens, "i0", 1)
    held = [number for number in range(25) if known.find(call(f"s{number}")) is not None]
    assert held == list(range(16, 25))
    assert known.find(call("kept")) is not None
