"""The control plane, verb by verb: what it has a driver do, and what it keeps."""

from __future__ import annotations

import msgspec
import pytest

from tests.control.plane_harness import (
    HoldWhile,
    PlacesNoDecode,
    PlainRequest,
    Scripted,
    decoding,
    make_plane,
    only,
)
from tidegate.control.effects import (
    Flipped,
    GiveUp,
    Held,
    Replay,
    RunPrefill,
    StartMigration,
    Suspect,
    WakeAt,
)
from tidegate.control.live_request import Stage
from tidegate.control.settings import ControlSettings
from tidegate.core.decision import (
    Flip,
    Hold,
    Migrate,
    Path,
    Place,
    Placement,
    Reject,
)
from tidegate.core.errors import EngineFault, EngineUnreachable, KvLost, NoInstance, NotRepeated, Overloaded
from tidegate.core.instance import Role
from tidegate.ledger.live_table import NOWHERE
from tidegate.signals.prefix import PrefixIndex, PromptBlocks
from tidegate_testing import REFERENCE, instance


def test_a_request_goes_from_prefill_to_decode_to_its_end() -> None:
    plane, live = make_plane(), PlainRequest()
    decode = decoding(plane, live)
    assert (live.prefill_on, live.decode_on, live.stage) == ("i0", decode.on, Stage.DECODE)
    assert plane.ledger.role_of(decode.on) is Role.DECODE
    plane.tokens(live, 1, 0.1)
    assert plane.ended(live, None, 0.2) == []
    assert (live.stage, plane.requests, plane.snapshot(0.2).requests.ids) == (Stage.ENDED, {}, ())


def test_a_held_request_is_placed_at_the_next_event_that_may_help() -> None:
    policy = HoldWhile(holding=True)
    plane, first, held = make_plane(prefill=policy), PlainRequest("r0"), PlainRequest("r1")
    policy.holding = False
    plane.arrive(first, 0.0)
    policy.holding = True
    assert isinstance(plane.arrive(held, 0.0)[0], Held)
    assert plane.held_count == 1
    policy.holding = False
    (run,) = plane.ended(first, None, 0.3)
    assert isinstance(run, RunPrefill) and run.live is held


def test_a_held_request_is_placed_by_a_tick_and_given_up_at_its_deadline() -> None:
    policy = HoldWhile(holding=True)
    plane, live = make_plane(prefill=policy), PlainRequest(deadline_s=1.5)
    plane.arrive(live, 0.0)
    assert only(plane.tick(1.0), Held)
    (given_up,) = only(plane.tick(2.0), GiveUp)
    assert isinstance(given_up.error, Overloaded) and "held until its deadline: told to" in str(
        given_up.error
    )


def test_a_rejected_request_says_when_to_come_back() -> None:
    (given_up,) = make_plane(prefill=HoldWhile(rejecting=True)).arrive(PlainRequest(), 0.0)
    assert isinstance(given_up, GiveUp) and given_up.error.retry_after_s == 3.0


# failures


@pytest.mark.parametrize(
    ("decision", "message", "retry_after_s"),
    [
        (Reject("decodes are full", 7.0), "decodes are full", 7.0),
        (Hold("full"), "a decode cannot be held, its first token is out: full", 2.0),
        (Place("i0", None, Path.DISAGGREGATED), "the decode placement named no instance", 2.0),
    ],
)
def test_a_decode_that_is_not_placed_says_why(
    decision: Placement, message: str, retry_after_s: float
) -> None:
    plane, live = make_plane(decode=PlacesNoDecode(decision)), PlainRequest()
    plane.arrive(live, 0.0)
    live.generated = 1
    (given_up,) = plane.prefill_done(live, 0.1)
    assert isinstance(given_up, GiveUp) and isinstance(given_up.error, Overloaded)
    assert (given_up.error.message, given_up.error.retry_after_s) == (message, retry_after_s)


def test_a_failed_leg_waits_for_the_fleets_word_and_avoids_the_instance() -> None:
    plane, live = make_plane(2), PlainRequest()
    plane.arrive(live, 0.0)
    effects = plane.failed(live, EngineFault("broken", instance="i0", stage="prefill"), 1.0)
    assert [type(effect) for effect in effects] == [Replay, Suspect, Held, WakeAt]
    assert not only(plane.tick(1.1), RunPrefill)
    (run,) = only(plane.tick(1.25), RunPrefill)
    assert (run.place.prefill_on, live.replays) == ("i1", 1)
    # Five seconds later the instance is asked again.
    later = PlainRequest("r1")
    plane.ended(live, None, 6.2)
    (run,) = plane.arrive(later, 6.2)
    assert isinstance(run, RunPrefill) and run.place.prefill_on == "i0"


def test_a_request_that_waits_for_word_goes_on_when_the_instance_is_down() -> None:
    plane, live = make_plane(2), PlainRequest()
    plane.arrive(live, 0.0)
    plane.failed(live, EngineUnreachable("broken", instance="i0", stage="prefill"), 1.0)
    (run,) = only(plane.instance_down("i0", "died", 1.01), RunPrefill)
    assert run.place.prefill_on == "i1"


def test_lost_kv_is_replayed_at_once_and_blames_nobody() -> None:
    plane, live = make_plane(2), PlainRequest()
    decoding(plane, live)
    effects = plane.failed(live, KvLost("gone", instance="i1", stage="decode"), 1.0)
    assert [type(effect) for effect in effects] == [Replay, RunPrefill]


def test_deaths_without_a_token_make_a_request_the_cause() -> None:
    plane, live = make_plane(8), PlainRequest()
    plane.arrive(live, 0.0)
    for death in range(3):
        victim = live.prefill_on
        assert victim is not None
        plane.instance_down(victim, "died", float(death))
        effects = plane.failed(live, EngineUnreachable("x", instance=victim, stage="prefill"), float(death))
    (given_up,) = effects
    assert isinstance(given_up, GiveUp) and live.replays == 2


def test_replays_end_and_so_does_a_deadline() -> None:
    for settings, deadline_s in ((ControlSettings(replays=0), 600.0), (ControlSettings(), 0.5)):
        plane, live = make_plane(settings=settings), PlainRequest(deadline_s=deadline_s)
        plane.arrive(live, 0.0)
        (given_up,) = plane.failed(live, EngineFault("x", instance="i0"), 1.0)
        assert isinstance(given_up, GiveUp)


def test_what_cannot_be_repeated_is_not() -> None:
    plane, live = make_plane(), PlainRequest()
    decoding(plane, live)
    live.repeatable = False
    (given_up,) = plane.failed(live, NotRepeated("other words", instance="i1"), 1.0)
    assert isinstance(given_up, GiveUp)


def test_without_instances_a_fresh_request_is_refused_and_a_begun_one_waits() -> None:
    plane, fresh, begun = make_plane(1), PlainRequest("r0"), PlainRequest("r1")
    decoding(plane, begun)
    plane.instance_down("i0", "died", 1.0)
    held, wake = plane.failed(begun, died("i0"), 1.0)[1:]
    assert isinstance(held, Held) and wake == WakeAt(600.0)
    (given_up,) = plane.arrive(fresh, 2.0)
    assert isinstance(given_up, GiveUp) and isinstance(given_up.error, NoInstance)
    (run,) = only(plane.instance_up(instance("i0"), REFERENCE, 300.0), RunPrefill)
    assert run.live is begun
    # Another outage begins another wait, which ends with the request's deadline.
    plane.instance_down("i0", "died", 301.0)
    plane.failed(begun, died("i0"), 301.0)
    assert not only(plane.tick(599.9), GiveUp)
    (given_up,) = only(plane.tick(600.0), GiveUp)
    assert given_up.live is begun and isinstance(given_up.error, NoInstance)


def test_a_prefill_that_ends_as_the_last_instance_dies_waits_too() -> None:
    plane, live = make_plane(1), PlainRequest()
    plane.arrive(live, 0.0)
    live.generated = 1
    plane.instance_down("i0", "died", 1.0)
    assert [type(effect) for effect in plane.prefill_done(live, 1.0)] == [Replay, Held, WakeAt]
    assert only(plane.instance_up(instance("i0"), REFERENCE, 50.0), RunPrefill)


def test_replays_without_a_token_between_them_are_limited() -> None:
    plane, live = make_plane(2), PlainRequest()
    decoding(plane, live)
    for failure in range(20):
        live.generated += failure % 5 == 4
        assert only(plane.failed(live, KvLost("gone", instance="i1"), 1.0), RunPrefill), failure
    for failure in range(4):
        assert only(plane.failed(live, KvLost("gone", instance="i1"), 2.0), RunPrefill), failure
    assert only(plane.failed(live, KvLost("gone", instance="i1"), 2.0), GiveUp)


@pytest.mark.parametrize("generated", [0, 1])
def test_an_instance_that_could_not_be_asked_is_no_replay_and_no_death(generated: int) -> None:
    plane, live = make_plane(8), PlainRequest()
    plane.arrive(live, 0.0)
    live.generated = generated
    plane.failed(live, died("i0"), 0.0)
    (run,) = only(plane.instance_down("i0", "died", 0.0), RunPrefill)
    # The whole fleet is dead, which is told of one instance after the other.
    for death in range(1, 7):
        on = run.place.prefill_on
        effects = plane.failed(live, EngineUnreachable("x", instance=on, refused=True), 0.01 * death)
        assert not only(effects, GiveUp)
        (run,) = only(plane.instance_down(on, "died", 0.01 * death), RunPrefill)
    assert (live.failures, live.deaths) == (1, 1)
    plane.failed(live, EngineUnreachable("x", instance=run.place.prefill_on, refused=True), 0.1)
    last = plane.instance_down(run.place.prefill_on, "died", 0.1)
    assert only(last, Held if generated else GiveUp) and not only(last, GiveUp if generated else Held)


def died(name: str) -> EngineUnreachable:
    return EngineUnreachable("it died", instance=name, stage="decode")


# membership


def test_a_returning_instance_takes_the_label_that_is_missing_most() -> None:
    plane = make_plane(4)
    assert [plane.ledger.role_of(f"i{k}").label for k in range(4)] == [
        "prefill",
        "decode",
        "decode",
        "prefill",
    ]
    plane.act([Flip("i1", Role.PREFILL, "forced")], 1.0)
    plane.instance_down("i0", "died", 2.0)
    plane.instance_up(instance("i0"), REFERENCE, 3.0)
    assert plane.ledger.role_of("i0") is Role.DECODE


def test_a_fixed_role_changes_places_with_one_that_is_free() -> None:
    plane = make_plane(2)
    plane.instance_down("i1", "died", 1.0)
    joined = plane.instance_up(instance("i1", flippable=False), REFERENCE, 2.0, fixed_role=Role.PREFILL)
    (flipped,) = only(joined, Flipped)
    assert flipped[:4] == ("i0", Role.PREFILL, Role.DECODE, "repair") and "i1 came up" in flipped.why
    assert plane.ledger.role_of("i1") is Role.PREFILL


def test_no_label_changes_by_a_view_that_avoids_an_instance() -> None:
    plane, live = make_plane(2), PlainRequest()
    plane.arrive(live, 0.0)
    plane.failed(live, EngineFault("x", instance="i0"), 0.1)
    view, whole = plane.membership.view(0.2)
    assert (view.ids, whole) == (("i1",), False)
    assert plane.membership.view(5.2)[1]


# actions


def test_controllers_decide_at_their_own_periods_and_keep_their_own_state() -> None:
    fast = Scripted([(Flip("i1", Role.PREFILL, "monitor"),)], 0.5, "fast")
    slow = Scripted([(Flip("i2", Role.PREFILL, "monitor"),)], 2.0, "slow")
    plane = make_plane(controllers=(fast, slow))
    assert only(plane.tick(0.5), Flipped) == [Flipped("i1", Role.DECODE, Role.PREFILL, "monitor")]
    assert not only(plane.tick(1.0), Flipped) and not only(plane.tick(1.5), Flipped)
    assert [flip.instance for flip in only(plane.tick(2.0), Flipped)] == ["i2"]


def test_a_tick_asks_to_be_woken_for_the_next_one_once() -> None:
    plane = make_plane(controllers=(Scripted(period_s=0.4),), window_s=1.0)
    assert plane.tick(0.4) == [WakeAt(0.8)]
    assert plane.tick(0.4) == []
    assert plane.tick(0.8) == [WakeAt(1.0)]
    assert plane.tick(1.0) == [WakeAt(3 * 0.4)]
    # Periods that were slept through count as one, and the next one ends in the future.
    assert plane.tick(7.7) == [WakeAt(8.0)]


def test_a_migration_is_begun_once_and_booked_when_it_is_done() -> None:
    plane, live = make_plane(), PlainRequest()
    src = decoding(plane, live).on
    dst = next(name for name in ("i1", "i2") if name != src)
    move = Migrate("r0", src, dst, "test")
    assert plane.act([move, move, Migrate("r9", src, dst)], 0.1) == [StartMigration(live, move)]
    assert dict(plane.migrations) == {"ignored": 2}
    plane.migration_begun(live, 0.1)
    rows = plane.snapshot(0.1).requests
    assert (rows.moving_to.tolist(), rows.moved_at_s.tolist()) == ([plane.snapshot(0.1).index[dst]], [0.1])
    plane.migration_done(live, 101, 0.2)
    rows = plane.snapshot(0.2).requests
    assert (rows.moving_to.tolist(), rows.moved_at_s.tolist()) == ([NOWHERE], [0.2])
    assert (live.decode_on, live.migrations, live.migrate) == (dst, 1, None)
    assert plane.ledger.residents(dst).decodes == ("r0",)
    assert plane.ledger.residents(src).handoffs == ()


def test_prefills_are_priced_with_what_an_instance_has_to_compute() -> None:
    policy, index = HoldWhile(), PrefixIndex()
    plane = make_plane(2, prefill=policy, prefixes=index)
    blocks = PromptBlocks((1, 2, 3), 32)
    first, second = PlainRequest("r0", blocks=blocks), PlainRequest("r1", blocks=PromptBlocks((1, 2, 9), 32))
    decoding(plane, first)
    assert not policy.asked[0].cached
    plane.arrive(second, 1.0)
    assert policy.asked[1].cached == {first.prefill_on: 64, first.decode_on: 64}
    assert second.predicted_prefill_s == pytest.approx(REFERENCE.prefill_s(36, 64), abs=1e-8)
    plane.prefill_reported(second, 60, 0.0)
    assert (index.predicted_tokens, index.reported_tokens) == (64, 60)
    plane.instance_down("i0", "died", 2.0)
    plane.instance_up(instance("i0"), REFERENCE, 3.0)
    plane.arrive(PlainRequest("r2", blocks=blocks), 3.0)
    assert "i0" not in policy.asked[2].cached


def test_the_journal_tells_of_every_decision() -> None:
    lines: list[bytes] = []
    plane, live = make_plane(2, controllers=(Scripted(),), lines=lines), PlainRequest()
    decoding(plane, live)
    plane.tick(1.0)
    plane.failed(live, EngineFault("x", instance="i1", stage="decode"), 1.5)
    kinds = [line.split(b'"')[3].decode() for line in lines]
    assert kinds == ["instance", "instance", "decision", "decision", "control", "failure"]
    assert msgspec.json.decode(lines[4])["controller"] == "scripted"
