"""Emptying decode instances under low load: when one is drained, which, and when it comes back."""

from __future__ import annotations

from tests.paper.ares_fleet import KnownAnswers, asking
from tidegate.core.decision import Action, Drain, Place, Undrain
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.ares.avoiding import AvoidingPlacement
from tidegate.policies.ares.consolidation import Consolidation, ConsolidationConstants, Emptied
from tidegate.policies.ares.damage import Damage, Terms
from tidegate.policies.ares.loads import LoadBoard

CONSTANTS = ConsolidationConstants(steady_s=10.0, cooldown_s=100.0)
CONTROLLER = Consolidation(CONSTANTS)
LONG = 50_000.0


def acted(fleet: KnownAnswers, at_s: float, state: Emptied) -> tuple[Emptied, list[Action]]:
    """Decide, and carry the drains out in the ledger."""
    decided = CONTROLLER.decide(fleet.ledger.snapshot(at_s), state)
    for action in decided.actions:
        assert isinstance(action, Drain | Undrain)
        fleet.ledger.drains(action.instance, isinstance(action, Drain))
    return decided.state, list(decided.actions)


def drained(fleet: KnownAnswers, until_s: int = 60) -> tuple[Emptied, list[str]]:
    """Decide every 5 s; return the state, and who was drained in that order."""
    state, names = CONTROLLER.initial(), []
    for at_s in range(0, until_s, 5):
        state, actions = acted(fleet, float(at_s), state)
        names += [action.instance for action in actions if isinstance(action, Drain)]
    return state, names


def test_the_least_loaded_is_drained_once_the_load_stayed_low_and_never_the_last() -> None:
    fleet = KnownAnswers([(300, 400.0)], [(100, 400.0)], [(200, 400.0)])
    assert drained(fleet, 10)[1] == []
    assert drained(fleet)[1] == ["d1", "d2"]


def test_nobody_is_drained_where_the_others_would_not_carry_twice_the_load() -> None:
    """Steps may take 50 ms, 4,000 tokens: 1,600 an instance are 3,200 on one of two, but not twice that."""
    assert drained(KnownAnswers([(1600, 400.0)], [(1600, 400.0)], kv=10**6))[1] == []
    assert drained(KnownAnswers([(600, 400.0)], [(600, 400.0)], kv=10**6))[1] == ["d0"]
    assert drained(KnownAnswers([(600, 400.0)], [(600, 400.0)], kv=2_000))[1] == []


def test_as_many_come_back_as_the_load_needs_and_nobody_goes_for_a_while() -> None:
    fleet = KnownAnswers([(100, 400.0)], [(100, 400.0)], [(100, 400.0)], [(100, 400.0)])
    state, names = drained(fleet)
    assert names == ["d0", "d1", "d2"]
    for number in range(3):
        fleet.decode(f"new{number}", "d3", 1500, LONG)
    state, actions = acted(fleet, 60.0, state)
    assert [action.instance for action in actions if isinstance(action, Undrain)] == ["d1", "d2"]
    assert state == Emptied(("d0",), back_at_s=60.0)
    for number in range(3):
        fleet.ledger.finished(f"new{number}", 61.0)
    for at_s in range(65, 160, 5):
        state, actions = acted(fleet, float(at_s), state)
        assert actions == []
    assert acted(fleet, 160.0, state)[1] != []


def test_who_else_drains_or_is_down_is_left_alone() -> None:
    fleet = KnownAnswers([(100, 400.0)], [(100, 400.0)], [(6000, LONG)])
    fleet.ledger.drains("d0", True)
    state = Emptied(("gone",))
    state, actions = acted(fleet, 0.0, state)
    assert (state.names, actions) == (("gone",), [])


def test_without_instances_nothing_is_decided() -> None:
    assert acted(KnownAnswers(), 0.0, Emptied()) == (Emptied(), [])


def test_a_placement_reads_what_the_round_made_while_an_instance_drains() -> None:
    made: list[Snapshot] = []

    def make(snapshot: Snapshot, rows: object) -> Damage:
        made.append(snapshot)
        return Damage(snapshot, snapshot.requests, Terms())

    board = LoadBoard(make, 1.0)
    fleet = KnownAnswers([(100, LONG)], [(900, LONG)], [(100, LONG)])
    fleet.ledger.drains("d0", True)
    snapshot = fleet.ledger.snapshot(0.0)
    board.renewed(snapshot, snapshot.requests)
    seen = fleet.ledger.snapshot(0.5).without_draining()
    decision = AvoidingPlacement(board).place_decode(asking(100, LONG), seen, "p").decision
    assert isinstance(decision, Place) and decision.decode_on == "d2"
    assert len(made) == 1
