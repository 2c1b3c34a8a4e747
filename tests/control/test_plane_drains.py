"""The control plane: drains, targets, instances that come and go."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from tests.control.plane_harness import (
    PlainRequest,
    decoding,
    make_plane,
    only,
)
from tidegate.control.effects import (
    Drains,
    Flipped,
    StartInstance,
    StartMigration,
    StopInstance,
)
from tidegate.control.plane import ControlPlane
from tidegate.core.decision import (
    AddInstance,
    Drain,
    Flip,
    Migrate,
    Remove,
    SetSize,
    SetTarget,
    Undrain,
)
from tidegate.core.instance import Role
from tidegate.policies.starting_roles import TARGET, mixed_roles
from tidegate_testing import REFERENCE, instance


@pytest.mark.parametrize(
    ("why", "shut"),
    [
        ("i1 drains", lambda plane: plane.act([Drain("i1")], 0.1)),
        ("i1 is being stopped", lambda plane: plane.act([Remove("i1")], 0.1)),
        ("i1 failed a leg a moment ago", lambda plane: plane.membership.avoid("i1", 5.0)),
    ],
)
def test_no_decode_moves_to_an_instance_that_takes_nothing_new(
    why: str, shut: Callable[[ControlPlane], object]
) -> None:
    lines: list[bytes] = []
    plane, live = make_plane(3, lines=lines, roles=mixed_roles), PlainRequest()
    src = decoding(plane, live).on
    assert src != "i1"
    shut(plane)
    assert not plane.act([Migrate("r0", src, "i1", "balance")], 0.2)
    assert [msgspec.json.decode(line)["detail"] for line in lines if b'"ignored"' in line] == [why]
    assert decoding(plane, PlainRequest("r1"), 0.2).on != "i1"


def test_controllers_see_who_drains_and_placements_do_not_see_them() -> None:
    plane = make_plane(roles=mixed_roles)
    plane.act([Drain("i1"), Drain("i2"), Undrain("i2")], 1.0)
    assert plane.snapshot(1.0).draining.tolist() == [False, True, False, False]
    view, _ = plane.membership.view(1.0)
    assert view.ids == ("i0", "i2", "i3") and not view.draining.any()
    plane.instance_down("i1", "died", 1.1)
    plane.instance_up(instance("i1"), REFERENCE, 1.2)
    assert plane.snapshot(1.2).draining.tolist() == [False, False, False, True]


def test_when_all_drain_no_decode_goes_to_and_fro() -> None:
    plane, live = make_plane(2, roles=mixed_roles), PlainRequest()
    decoding(plane, live)
    plane.act([Drain("i1"), Drain("i0")], 1.0)
    assert not only(plane.tick(2.0), StartMigration) and not plane.migrations


def test_a_drain_moves_decodes_and_stops_the_instance_once_it_is_empty() -> None:
    plane, live, other = make_plane(), PlainRequest(), PlainRequest("r1")
    src = decoding(plane, live).on
    drains, move = plane.act([Drain(src, remove=True, reason="scale-in")], 1.0)
    assert drains == Drains(src, "scale-in", remove=True)
    assert isinstance(move, StartMigration) and move.migrate.src == src
    decoding(plane, other, 1.0)
    assert src not in (other.prefill_on, other.decode_on)
    plane.migration_begun(live, 1.0)
    plane.migration_done(live, 101, 1.1)
    assert only(plane.tick(2.0), StopInstance) == [StopInstance(src, "drained")]
    assert not only(plane.tick(3.0), StopInstance)
    plane.instance_down(src, "drained", 3.1)
    assert src not in plane.membership.labels and not plane.membership.draining


def test_a_drain_waits_for_what_cannot_move() -> None:
    plane, live = make_plane(), PlainRequest()
    src = decoding(plane, live).on
    plane.act([Drain(src, remove=True)], 1.0)
    plane.migration_refused(live, "its state cannot move", 1.0, for_good=True)
    assert not only(plane.tick(2.0), StartMigration)
    assert only(plane.ended(live, None, 2.5), StopInstance) == [StopInstance(src, "drained")]


def test_a_drain_outlasts_a_death_until_an_undrain() -> None:
    lines: list[bytes] = []
    plane = make_plane(roles=mixed_roles, lines=lines)
    plane.act([Drain("i1"), Drain("i2")], 1.0)
    plane.instance_down("i1", "died", 1.1)
    plane.act([Undrain("i2"), Undrain("i3")], 1.2)
    plane.instance_up(instance("i1"), REFERENCE, 1.3)
    assert plane.membership.draining == {"i1": False}
    assert {decoding(plane, PlainRequest(f"r{k}"), 2.0).on for k in range(8)} == {"i0", "i2", "i3"}
    plane.act([Undrain("i1", "mended")], 3.0)
    assert "i1" in {decoding(plane, PlainRequest(f"s{k}"), 3.0).on for k in range(8)}
    assert [line.strip() for line in lines if b"undrained" in line] == [
        b'{"type":"instance","t":1.2,"instance":"i2","event":"undrained"}',
        b'{"type":"instance","t":3.0,"instance":"i1","event":"undrained","reason":"mended"}',
    ]


def test_one_that_died_while_it_was_to_be_removed_is_stopped_when_it_returns() -> None:
    plane = make_plane()
    decoding(plane, PlainRequest())
    src = plane.requests["r0"].decode_on
    assert src is not None
    plane.act([Drain(src, remove=True)], 1.0)
    plane.instance_down(src, "died", 1.1)
    assert not only(plane.tick(1.2), StopInstance)
    plane.instance_up(instance(src), REFERENCE, 1.3)
    assert only(plane.tick(1.4), StopInstance) == [StopInstance(src, "drained")]
    plane.act([Undrain(src)], 1.5)
    assert plane.membership.draining == {src: True}, "too late"


def test_one_that_the_fleet_cannot_stop_stays_drained_until_an_undrain() -> None:
    plane = make_plane()
    assert only(plane.act([Drain("i1", remove=True)], 1.0), StopInstance)
    plane.stop_failed("i1")
    plane.instance_down("i1", "died", 1.1)
    plane.instance_up(instance("i1"), REFERENCE, 1.2)
    assert not only(plane.tick(2.0), StopInstance) and plane.membership.draining == {"i1": False}
    plane.act([Undrain("i1")], 3.0)
    assert not plane.membership.draining


def test_a_target_is_reached_by_flips_then_by_starts_and_drains() -> None:
    plane = make_plane(4)
    (flipped,) = plane.act([SetTarget(3, 1)], 1.0)
    assert isinstance(flipped, Flipped) and flipped.after is Role.PREFILL
    assert plane.act([SetTarget(3, 1)], 2.0) == []
    assert plane.act([SetTarget(3, 2)], 3.0) == [StartInstance(Role.DECODE, "")]
    assert plane.act([SetTarget(3, 2)], 4.0) == []
    plane.instance_up(instance("i4"), REFERENCE, 5.0)
    assert plane.ledger.role_of("i4") is Role.DECODE and not plane.membership.starting
    _, stopped = plane.act([SetTarget(2, 2)], 6.0)
    assert isinstance(stopped, StopInstance) and stopped.instance in ("i0", "i1", "i2", "i3")


def test_a_target_takes_its_drains_back_and_moves_decodes_off_what_becomes_prefill() -> None:
    plane = make_plane(4)  # P, D, D, P
    lives = [PlainRequest(f"r{number}") for number in range(2)]
    on = [decoding(plane, live).on for live in lives]
    assert sorted(on) == ["i1", "i2"]
    plane.act([Drain("i0", remove=False, reason="operator")], 0.5)
    drained = plane.act([SetTarget(1, 1)], 1.0)
    (gone,) = (effect.instance for effect in only(drained, Drains))
    assert gone in on and only(drained, StartMigration)[0].migrate.src == gone
    back = plane.act([SetTarget(1, 2)], 2.0)
    assert only(back, Drains) == [Drains(gone, "", ended=True)] and not only(back, StartInstance)
    plane.migration_refused(lives[on.index(gone)], "no room", 2.5)
    relabelled = plane.act([SetTarget(2, 1)], 3.0)
    (flipped,) = only(relabelled, Flipped)
    (move,) = only(relabelled, StartMigration)
    assert move.migrate.src == flipped.instance != move.migrate.dst
    assert plane.membership.draining == {"i0": False}, "an operator's drain is nobody else's"


def test_decodes_of_several_that_become_prefill_at_once_go_to_those_that_stay() -> None:
    plane = make_plane(4, roles=mixed_roles)
    lives = [PlainRequest(f"r{number}") for number in range(3)]
    flipped = sorted({decoding(plane, live).on for live in lives})
    assert len(flipped) == 3
    effects = plane.act([Flip(name, Role.PREFILL, TARGET) for name in flipped], 0.2)
    (stays,) = set(plane.ledger.ids) - set(flipped)
    moves = [effect.migrate for effect in effects if isinstance(effect, StartMigration)]
    assert sorted(move.src for move in moves) == flipped
    assert {move.dst for move in moves} == {stays}


def test_a_size_leaves_labels_alone_and_takes_its_drains_back() -> None:
    plane = make_plane(4, roles=mixed_roles)
    assert plane.act([SetSize(5, "peak")], 1.0) == [StartInstance(Role.MIXED, "peak")]
    assert plane.act([SetSize(5)], 2.0) == [], "one is on its way"
    plane.instance_up(instance("i4"), REFERENCE, 3.0)
    plane.act([Flip("i0", Role.PREFILL, "test")], 4.0)
    busy = {decoding(plane, PlainRequest(f"r{number}"), 5.0).on for number in range(4)} - {"i0"}
    drained = only(plane.act([SetSize(2)], 6.0), Drains)
    gone = {effect.instance for effect in drained}
    assert len(gone) == 3 and "i0" not in gone, "one of each label is left"
    with_decodes = min(gone & busy)
    plane.act([Drain("i0", reason="operator")], 6.5)
    (back,) = only(plane.act([SetSize(2)], 7.0), Drains)
    assert back.instance in gone and back.ended and plane.ledger.residents(with_decodes).decodes


def test_what_starts_is_no_surplus() -> None:
    plane = make_plane(2)
    assert only(plane.act([SetTarget(1, 2)], 1.0), StartInstance)
    assert plane.act([SetTarget(1, 1)], 2.0) == [], "the one that is up serves until the other is there"


def test_instances_are_added_and_removed() -> None:
    plane = make_plane(2)
    assert plane.act([AddInstance(Role.PREFILL, "peak")], 1.0) == [StartInstance(Role.PREFILL, "peak")]
    plane.start_failed(Role.PREFILL, "no room", 2.0)
    assert not plane.membership.starting
    assert plane.act([Remove("i1", "broken"), Remove("i9")], 1.0) == [StopInstance("i1", "broken")]
