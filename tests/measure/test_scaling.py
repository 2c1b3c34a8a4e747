"""What was done to a fleet, and what of it was taken back."""

from __future__ import annotations

from tidegate.measure.scaling import REVERSED_S, ScalingEvent, reversals


def test_an_action_is_taken_back_once_and_soon() -> None:
    def event(at_s: float, kind: str, prefill: int, decode: int) -> ScalingEvent:
        return ScalingEvent(at_s, kind, prefill, decode)

    add, drain = event(0.0, "add", 0, 1), event(100.0, "drain", 0, -1)
    assert reversals([add, drain]) == 1
    assert reversals([add, drain, drain]) == 1, "there was one to take back"
    assert reversals([add, event(100.0, "drain", -1, 0)]) == 0, "another pool"
    assert reversals([add, event(REVERSED_S + 1.0, "drain", 0, -1)]) == 0, "later is a new decision"
    assert reversals([event(0.0, "flip", 1, -1), event(9.0, "flip", -1, 1), event(9.5, "flip", 1, -1)]) == 1
    assert reversals([add, add, drain, drain]) == 2
