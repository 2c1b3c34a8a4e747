"""Windows: mean inter-token gaps, stalls, and the average prefill queue."""

from __future__ import annotations

import pytest

from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate_testing import cluster, instance, profile, request

P, D = Role.PREFILL, Role.DECODE


def decoding(at_s: float = 0.0, *, pulled: bool = True) -> Ledger:
    """Return i0 (prefill) and i1 (decode), where r0 decodes since ``at_s``."""
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.prefill_dispatched(request("r0", 100), "i0", at_s)
    ledger.prefill_ended("r0", at_s)
    ledger.decode_dispatched("r0", "i1", 101, at_s)
    if pulled:
        ledger.transfer_ended("r0", at_s)
    return ledger


def gap(ledger: Ledger, now: float) -> float:
    ledger.window_closed(now)
    return float(ledger.snapshot(now).mean_gap_s[1])


def test_gaps_average_over_tokens_of_the_window() -> None:
    ledger = decoding()
    for at_s in (0.1, 0.2, 0.5):
        ledger.tokens("r0", 1, at_s)
    assert gap(ledger, 1.0) == pytest.approx(0.2)
    assert float(ledger.snapshot(1.5).mean_gap_s[1]) == pytest.approx(0.2), "published until the next close"


def test_a_window_that_is_hardly_there_averages_to_the_queue_as_it_stands() -> None:
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.window_closed(0.0)
    ledger.prefill_dispatched(request("r0", 100), "i0", 2e-311)
    ledger.window_closed(2e-311)
    seen = ledger.snapshot(0.0)
    assert seen.prefill_queue_avg_s[0] == seen.prefill_queue_s[0] > 0 and seen.prefill_demand[0] == 0


def test_the_way_into_the_instance_is_no_gap() -> None:
    """The gap before the first decode token spans transfer and queue (Narwhal)."""
    ledger = decoding()
    ledger.tokens("r0", 1, 5.0)
    ledger.tokens("r0", 1, 5.1)
    assert gap(ledger, 6.0) == pytest.approx(0.1)


def test_a_chunk_of_several_tokens_counts_each() -> None:
    ledger = decoding()
    ledger.tokens("r0", 1, 0.1)
    ledger.tokens("r0", 4, 0.5)
    assert gap(ledger, 1.0) == pytest.approx(0.1)


def test_a_stalled_instance_reports_its_longest_open_gap() -> None:
    ledger = decoding()
    ledger.tokens("r0", 1, 0.1)
    ledger.tokens("r0", 1, 0.2)
    gap(ledger, 1.0)
    assert gap(ledger, 2.0) == pytest.approx(1.8)
    assert gap(ledger, 3.0) == pytest.approx(2.8)


def test_waiting_for_the_link_is_not_a_stall() -> None:
    ledger = decoding(pulled=False)
    assert gap(ledger, 9.0) == 0.0
    ledger.transfer_ended("r0", 9.0)
    assert gap(ledger, 10.0) == pytest.approx(1.0)


def test_without_decodes_the_gap_is_zero() -> None:
    ledger = decoding()
    ledger.tokens("r0", 1, 0.1)
    ledger.tokens("r0", 1, 0.2)
    ledger.finished("r0", 0.3)
    gap(ledger, 1.0)
    assert gap(ledger, 2.0) == 0.0


def test_the_queue_average_is_over_time() -> None:
    """One second of work resident for half of the window averages to half a second."""
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.window_closed(0.0)
    ledger.prefill_dispatched(request("r0", 1000), "i0", 0.25)
    ledger.prefill_ended("r0", 0.75)
    ledger.window_closed(1.0)
    snapshot = ledger.snapshot(1.0)
    assert snapshot.prefill_queue_avg_s.tolist() == pytest.approx([0.5, 0.0])
    ledger.window_closed(2.0)
    assert ledger.snapshot(2.0).prefill_queue_avg_s.tolist() == [0.0, 0.0]


def test_a_queue_that_spans_windows_counts_in_each() -> None:
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.window_closed(0.0)
    ledger.prefill_dispatched(request("r0", 1000), "i0", 0.5)
    ledger.window_closed(1.0)
    assert ledger.snapshot(1.0).prefill_queue_avg_s[0] == pytest.approx(0.5)
    ledger.window_closed(2.0)
    assert ledger.snapshot(2.0).prefill_queue_avg_s[0] == pytest.approx(1.0)


def test_an_empty_window_averages_to_the_queue_as_it_stands() -> None:
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.prefill_dispatched(request("r0", 1000), "i0", 0.0)
    ledger.window_closed(1.0)
    ledger.window_closed(1.0)
    assert ledger.snapshot(1.0).prefill_queue_avg_s[0] == pytest.approx(1.0)


def test_an_instance_that_joins_in_mid_window_counts_from_then() -> None:
    ledger = cluster(1, roles=(D,), profile=profile())
    ledger.window_closed(0.0)
    ledger.instance_up(instance("late"), profile(), P, 0.5)
    ledger.prefill_dispatched(request("r0", 1000), "late", 0.5)
    ledger.window_closed(1.0)
    assert ledger.snapshot(1.0).prefill_queue_avg_s[1] == pytest.approx(0.5)


def test_a_named_window_moves_along_and_follows_the_instances_that_are_seen() -> None:
    ledger = Ledger(1.0, {"long": 2.0})
    for name, role in (("i0", P), ("i1", D), ("i2", D)):
        ledger.instance_up(instance(name), profile(), role, 0.0)
    ledger.window_closed(0.0)
    ledger.prefill_dispatched(request("r0", 1000), "i0", 0.0)
    ledger.prefill_ended("r0", 0.5)
    ledger.decode_dispatched("r0", "i2", 1001, 0.5)
    for at_s in (0.6, 0.7, 1.6):
        ledger.tokens("r0", 1, at_s)
        if at_s == 0.7:
            long = ledger.snapshot(0.7).windows["long"]
            assert long.mean_gap_s.tolist() == pytest.approx([0.0, 0.0, 0.1]), "the open window counts"
            assert long.mean_ttft_s.tolist() == pytest.approx([0.5, 0.0, 0.0])
            ledger.window_closed(1.0)
    ledger.window_closed(2.0)
    snapshot = ledger.snapshot(2.0)
    long = snapshot.windows["long"]
    assert long.mean_gap_s.tolist() == pytest.approx([0.0, 0.0, 0.5])
    assert long.prefill_queue_s.tolist() == pytest.approx([0.25, 0.0, 0.0])
    assert snapshot.without({"i1"}).windows["long"].mean_gap_s.tolist() == pytest.approx([0.0, 0.5])
    ledger.instance_down("i0", 2.5)
    assert ledger.snapshot(2.5).windows["long"].mean_gap_s.tolist() == pytest.approx([0.0, 0.5])
    ledger.window_closed(3.0)
    assert ledger.snapshot(3.0).windows["long"].mean_gap_s.tolist() == pytest.approx([0.0, 0.9])
    ledger.window_closed(4.0)
    assert ledger.snapshot(4.0).windows["long"].mean_gap_s.tolist() == [0.0, 0.0], "two seconds without"


def test_what_an_instance_did_is_compared_with_its_profile() -> None:
    """Twenty steps of 50 ms beside a prefill that was predicted to take 0.2 s."""
    ledger = decoding()
    ledger.window_closed(0.0)
    for step in range(21):
        ledger.tokens("r0", 1, 0.05 * step)
    predicted_s = ledger.prefill_dispatched(request("r1", 100), "i1", 0.5)
    ledger.prefill_ended("r1", 0.7)
    ledger.window_closed(1.0)
    seen = ledger.snapshot(1.0)
    step_s = float(seen.costs.step.seconds(1.0, 111.0))
    assert (seen.busy_s[1], seen.idle_s[1]) == (1.0, 0.0)
    assert seen.work_s[1] == pytest.approx(predicted_s + 20 * step_s, rel=1e-3)


def test_where_decodes_begin_in_a_window_some_of_it_may_be_idle() -> None:
    ledger = cluster(2, roles=(P, D), profile=profile())
    ledger.window_closed(0.0)
    ledger.prefill_dispatched(request("r0", 100), "i1", 0.1)
    ledger.decode_dispatched("r0", "i1", 101, 0.4)
    for at_s in (0.5, 0.6, 0.7):
        ledger.tokens("r0", 1, at_s)
    ledger.window_closed(1.0)
    seen = ledger.snapshot(1.0)
    assert seen.busy_s[1] == pytest.approx(0.3 + 0.2) and seen.idle_s[1] == pytest.approx(0.2)
    assert (seen.busy_s[0], seen.work_s[0]) == (0.0, 0.0)
    ledger.window_closed(1.0)
    assert ledger.snapshot(1.0).busy_s[1] == 0.0, "a window without length tells nothing"
