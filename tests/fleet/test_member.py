"""Promises of Member: what it shows of itself."""

from __future__ import annotations

from tidegate.fleet.member import Member
from tidegate_testing.builders import instance


def test_secrets_are_not_in_the_repr() -> None:
    member = Member(instance("i0"), "http://h:1", "m", "i0-1", secret="hush", api_key="sk-quiet")
    assert "http://h:1" in repr(member)
    assert "hush" not in repr(member) and "sk-quiet" not in repr(member)
