"""Admission: who is refused, and when to come back."""

from __future__ import annotations

import pytest

from tidegate.core.decision import Hold, Place, Reject, Verdict
from tidegate.core.instance import Role
from tidegate.costs.profile import UNMEASURED, Profile
from tidegate.ledger.ledger import Ledger
from tidegate.policies.admission import admitted
from tidegate.policies.baselines import LEAST_LOADED
from tidegate_testing import cluster, profile, request


def queue(*prompts: int, of: Profile | None = None) -> Ledger:
    """Return one instance that takes 1 ms per token, with prefills that began to wait at 0."""
    ledger = cluster(1, roles=(Role.MIXED,), profile=of or profile())
    ledger.window_closed(0.0)
    for number, tokens in enumerate(prompts):
        ledger.prefill_dispatched(request(f"q{number}", tokens), "i0", 0.0)
    return ledger


def asked(ledger: Ledger, tokens: int, *, now: float = 0.0, ttft_s: float = 1.0) -> Verdict:
    new = request("r", tokens, ttft_s=ttft_s, arrival_s=now)
    snapshot = ledger.snapshot(now)
    return admitted(LEAST_LOADED.place_prefill(new, snapshot), new, snapshot, 3.0)


def again_s(verdict: Verdict) -> float:
    assert isinstance(verdict.decision, Reject)
    return verdict.decision.retry_after_s


def test_the_queue_is_bounded_by_the_first_token_that_it_makes() -> None:
    ledger = queue(1000, 1900)
    assert isinstance(asked(ledger, 99).decision, Place)
    late = asked(ledger, 600)
    assert again_s(late) == pytest.approx(0.5)
    assert late.reason == "a first token would take 3.5 s, more than 3 times the target of 1 s"
    assert isinstance(asked(ledger, 600, now=0.51).decision, Place), "it told the truth"
    assert isinstance(asked(ledger, 600, ttft_s=2.0).decision, Place), "a target of its own"
    assert again_s(asked(ledger, 100, ttft_s=0.1)) == pytest.approx(2.7)


def test_a_prompt_longer_than_its_target_waits_in_proportion() -> None:
    assert isinstance(asked(queue(), 60_000).decision, Place)
    assert isinstance(asked(queue(20_000), 10_000).decision, Place)
    assert again_s(asked(queue(20_001), 10_000)) == pytest.approx(0.001)


def test_what_prefills_took_of_late_counts() -> None:
    ledger = queue(1000, 1000, 1000)
    ledger.prefill_ended("q0", 2.0)
    ledger.window_closed(2.0)
    assert ledger.snapshot(2.0).prefill_slowness.tolist() == [2.0]
    assert again_s(asked(ledger, 500, now=2.0)) == pytest.approx(2.0)
    # One that prefills nothing any more gets slower with every window.
    ledger.window_closed(4.0)
    stalled = float(ledger.snapshot(4.0).prefill_slowness[0])
    assert stalled > 3.0
    ledger.prefill_ended("q1", 4.0)
    ledger.prefill_ended("q2", 4.0)
    ledger.window_closed(5.0)
    idle = float(ledger.snapshot(5.0).prefill_slowness[0])
    ledger.window_closed(500.0)
    assert 1.0 < float(ledger.snapshot(500.0).prefill_slowness[0]) == idle < stalled


def test_without_a_profile_nothing_is_refused_until_prefills_were_seen() -> None:
    ledger = queue(*[1000] * 100, of=UNMEASURED)
    assert isinstance(asked(ledger, 1000).decision, Place)
    for number in range(20):
        ledger.prefill_ended(f"q{number}", 2.0)
    ledger.window_closed(2.0)
    # Twenty in two seconds: eighty more take eight, and the prompt asked about a tenth.
    assert again_s(asked(ledger, 1000, now=2.0)) == pytest.approx(8.1 - 3.0, abs=0.2)


def test_what_a_policy_holds_or_rejects() -> None:
    ledger = queue()
    held = Verdict(Hold("busy"))
    new = request("r", 100, arrival_s=0.0)
    assert admitted(held, new, ledger.snapshot(3.0), 3.0) is held
    assert again_s(admitted(held, new, ledger.snapshot(4.0), 3.0)) == pytest.approx(4.0)
    no = Verdict(Reject("no", 9.0))
    assert admitted(no, new, ledger.snapshot(40.0), 3.0) is no
