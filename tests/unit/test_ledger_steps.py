"""Decodes that step together: the books are those of one event per request and token."""

from __future__ import annotations

import numpy as np

from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate_testing import cluster, request


def decoding(names: str) -> Ledger:
    ledger = cluster(1, roles=[Role.DECODE])
    for name in names:
        ledger.prefill_dispatched(request(name), "i0", 0.0)
        ledger.decode_dispatched(name, "i0", 100, 1.0)
        ledger.tokens(name, 1, 2.0)
    return ledger


def test_steps_count_like_tokens() -> None:
    together, apart = decoding("ab"), decoding("ab")
    for name in "ab":
        assert together.joined(name)
    for at_s in (2.5, 2.75, 3.0):
        together.stepped("i0", 1, at_s)
        for name in "ab":
            apart.tokens(name, 1, at_s)
    together.left_step("a")
    together.stepped("i0", 4, 4.0)
    apart.tokens("b", 4, 4.0)
    for ledger in (together, apart):
        ledger.tokens("a", 1, 5.0)
        ledger.window_closed(6.0)
        ledger.check_integrity()
    assert np.array_equal(together.snapshot(6.0).state, apart.snapshot(6.0).state)


def test_a_jump_counts_like_its_steps() -> None:
    jumped, walked = decoding("ab"), decoding("ab")
    for ledger in (jumped, walked):
        ledger.joined("a")
        ledger.joined("b")
    jumped.stepped("i0", 4, 4.0)
    for at_s in (2.5, 3.0, 3.5, 4.0):
        walked.stepped("i0", 1, at_s)
    for ledger in (jumped, walked):
        ledger.finished("a", 4.0)
        ledger.window_closed(4.0)
        ledger.check_integrity()
    assert np.array_equal(jumped.snapshot(4.0).state, walked.snapshot(4.0).state)


def test_only_a_decode_of_the_same_step_falls_in() -> None:
    ledger = decoding("ab")
    ledger.prefill_dispatched(request("c"), "i0", 0.0)
    assert not ledger.joined("c")
    assert ledger.joined("a")
    assert not ledger.joined("a")
    ledger.stepped("i0", 1, 3.0)
    assert not ledger.joined("b")
    ledger.tokens("b", 1, 3.0)
    assert ledger.joined("b")
    assert not ledger.left_step("c")


def test_the_open_gap_of_a_stalled_step_counts() -> None:
    ledger = decoding("a")
    ledger.joined("a")
    ledger.stepped("i0", 1, 3.0)
    ledger.window_closed(3.0)
    ledger.window_closed(7.0)
    assert ledger.snapshot(7.0).mean_gap_s[0] == 4.0
