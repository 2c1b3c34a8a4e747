"""The ledger's events: what each changes, and that late ones change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec.structs import replace

from tidegate.core.errors import InternalError, NoInstance
from tidegate.core.instance import Role
from tidegate.ledger.ledger import Ledger
from tidegate.ledger.records import Residents
from tidegate.ledger.snapshot import Field, Snapshot
from tidegate_testing import cluster, instance, profile, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def pair() -> Ledger:
    """Return one prefill instance i0 and one decode instance i1; a prompt token takes 1 ms."""
    return cluster(2, roles=(P, D), profile=profile())


def decoding(ledger: Ledger, request_id: str = "r0", tokens: int = 100, on: str = "i1") -> None:
    """Bring a request to decode on ``on`` with its KV pulled, at second 1."""
    ledger.prefill_dispatched(request(request_id, tokens), "i0", 0.0)
    ledger.prefill_ended(request_id, 1.0)
    ledger.decode_dispatched(request_id, on, tokens + 1, 1.0)
    ledger.transfer_ended(request_id, 1.0)


def owner_of(ledger: Ledger, request_id: str) -> str | None:
    """Return the one instance whose loss loses the request's KV; None when it is not live."""
    snapshot = ledger.snapshot(0.0)
    rows = snapshot.requests
    if request_id not in rows.ids:
        return None
    k = rows.ids.index(request_id)
    places = (rows.prefill_on[k], rows.source_on[k], rows.decode_on[k])
    return next(snapshot.ids[int(column)] for column in places if column >= 0)


def column(snapshot: Snapshot, name: str) -> list[float]:
    return [float(value) for value in getattr(snapshot, name)]


def test_a_disaggregated_request_from_dispatch_to_finish() -> None:
    ledger = pair()
    assert ledger.prefill_dispatched(request("r0", 100), "i0", 0.0) == pytest.approx(0.1, abs=1e-9)
    at_prefill = ledger.snapshot(0.0)
    assert column(at_prefill, "prefill_tokens") == [100, 0]
    assert column(at_prefill, "prefill_requests") == [1, 0]
    assert owner_of(ledger, "r0") == "i0"

    assert ledger.prefill_ended("r0", 0.1)
    waiting = ledger.snapshot(0.1)
    assert column(waiting, "prefill_tokens") == column(waiting, "prefill_queue_s") == [0, 0]
    assert column(waiting, "handoff_tokens") == [100, 0]

    assert ledger.decode_dispatched("r0", "i1", 101, 0.1)
    pulling = ledger.snapshot(0.1)
    assert column(pulling, "handoff_tokens") == [100, 0]
    assert column(pulling, "decode_tokens") == [0, 101]
    assert column(pulling, "outbound_tokens") == [100, 0] and column(pulling, "inbound_tokens") == [0, 100]
    assert owner_of(ledger, "r0") == "i0", "until the pull ended, only the source can give the KV"

    assert ledger.transfer_ended("r0", 0.2)
    assert column(ledger.snapshot(0.2), "handoff_tokens") == [0, 0]
    assert column(ledger.snapshot(0.2), "inbound_tokens") == [0, 0]
    assert owner_of(ledger, "r0") == "i1"
    assert ledger.tokens("r0", 3, 0.3)
    assert column(ledger.snapshot(0.3), "decode_tokens") == [0, 104]
    ledger.check_integrity()

    assert ledger.finished("r0", 0.4)
    assert column(ledger.snapshot(0.4), "decode_tokens") == [0, 0]
    assert owner_of(ledger, "r0") is None
    ledger.check_integrity()


def test_decoding_where_the_prefill_ran_holds_the_kv_once() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    ledger.prefill_ended("r0", 0.1)
    ledger.decode_dispatched("r0", "i0", 101, 0.1)
    after = ledger.snapshot(0.1)
    assert column(after, "handoff_tokens") == [0, 0]
    assert column(after, "decode_tokens") == [101, 0]
    assert not ledger.transfer_ended("r0", 0.1)


def test_the_first_token_shows_that_the_pull_ended() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    ledger.prefill_ended("r0", 0.1)
    ledger.decode_dispatched("r0", "i1", 101, 0.1)
    ledger.tokens("r0", 1, 0.5)
    assert column(ledger.snapshot(0.5), "handoff_tokens") == [0, 0]
    assert owner_of(ledger, "r0") == "i1"


def test_a_decode_placed_without_word_of_the_prefills_end() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    ledger.decode_dispatched("r0", "i1", 101, 0.1)
    assert column(ledger.snapshot(0.1), "prefill_requests") == [0, 0]
    ledger.check_integrity()


def test_late_and_unknown_events_change_nothing() -> None:
    ledger = pair()
    decoding(ledger)
    ledger.finished("r0", 2.0)
    before = ledger.snapshot(2.0).state
    for request_id in ("r0", "never"):
        assert not ledger.prefill_ended(request_id, 3.0)
        assert not ledger.decode_dispatched(request_id, "i1", 5, 3.0)
        assert not ledger.transfer_ended(request_id, 3.0)
        assert not ledger.tokens(request_id, 1, 3.0)
        assert not ledger.finished(request_id, 3.0)
        assert not ledger.aborted(request_id, 3.0)
    np.testing.assert_array_equal(ledger.snapshot(2.0).state, before)


def test_tokens_before_the_decode_is_placed_are_not_counted() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    assert not ledger.tokens("r0", 1, 0.1)
    ledger.prefill_ended("r0", 0.1)
    assert not ledger.tokens("r0", 1, 0.1)
    ledger.check_integrity()


@pytest.mark.parametrize("stage", ["prefill", "handoff", "pulling", "decode"])
def test_an_abort_frees_everything_in_any_stage_and_only_once(stage: str) -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    if stage != "prefill":
        ledger.prefill_ended("r0", 0.1)
    if stage in ("pulling", "decode"):
        ledger.decode_dispatched("r0", "i1", 101, 0.1)
    if stage == "decode":
        ledger.tokens("r0", 1, 0.2)
    assert ledger.aborted("r0", 0.3)
    assert not ledger.aborted("r0", 0.3)
    counted = ledger.snapshot(0.3)
    for name in ("prefill_tokens", "prefill_queue_s", "handoff_tokens", "decode_tokens", "decode_requests"):
        assert column(counted, name) == [0, 0]
    ledger.check_integrity()


def test_a_replay_under_the_same_id_supersedes_the_live_one() -> None:
    ledger = pair()
    decoding(ledger)
    ledger.prefill_dispatched(request("r0", 150), "i0", 2.0)
    after = ledger.snapshot(2.0)
    assert column(after, "decode_requests") == [0, 0]
    assert column(after, "prefill_tokens") == [150, 0]
    assert (after.placed_prefills, column(after, "prefill_requests")) == (2, [1, 0])


def test_dispatching_to_an_instance_that_is_not_up_raises() -> None:
    ledger = pair()
    with pytest.raises(NoInstance, match="i9"):
        ledger.prefill_dispatched(request(), "i9", 0.0)
    ledger.prefill_dispatched(request("r0"), "i0", 0.0)
    with pytest.raises(NoInstance):
        ledger.decode_dispatched("r0", "i9", 5, 0.0)
    ledger.check_integrity()


def test_cached_tokens_shorten_the_prediction_not_the_residents() -> None:
    ledger = pair()
    seconds = ledger.prefill_dispatched(request("r0", 100, cached={"i0": 60, "i1": 90}), "i0", 0.0)
    assert seconds == pytest.approx(0.04, abs=1e-9)
    assert column(ledger.snapshot(0.0), "prefill_tokens") == [100, 0]
    assert ledger.prefill_dispatched(request("r1", 100, cached={"i0": 100}), "i0", 0.0) > 0


# Prefill queue


def test_without_starts_the_oldest_prefill_runs_from_the_end_of_the_one_before() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("a", 1000), "i0", 0.0)
    ledger.prefill_dispatched(request("b", 2000), "i0", 0.5)
    assert ledger.snapshot(0.5).prefill_wait_s[0] == pytest.approx(2.5)
    assert ledger.snapshot(9.0).prefill_wait_s[0] == pytest.approx(2.0), (
        "a late head has nothing left, no less"
    )
    ledger.prefill_ended("a", 1.2)
    assert ledger.snapshot(1.2).prefill_wait_s[0] == pytest.approx(2.0)
    assert ledger.snapshot(2.2).prefill_wait_s[0] == pytest.approx(1.0)


def test_a_prefill_that_ends_out_of_turn_leaves_the_head_running() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("a", 1000), "i0", 0.0)
    ledger.prefill_dispatched(request("b", 2000), "i0", 0.0)
    ledger.aborted("b", 0.5)
    assert ledger.snapshot(0.5).prefill_wait_s[0] == pytest.approx(0.5)
    ledger.check_integrity()


# Instances


def test_a_flip_changes_the_label_and_its_time_only() -> None:
    ledger = pair()
    decoding(ledger)
    before = ledger.snapshot(2.0)
    assert ledger.flip("i0", D, 2.0)
    after = ledger.snapshot(2.0)
    changed = np.flatnonzero((before.state != after.state).any(axis=1))
    assert after.flipped_at_s.tolist() == [2.0, -math.inf]
    assert changed.tolist() == [Field.ROLE, Field.FLIPPED_AT_S]
    assert ledger.role_of("i0") == D
    assert after.last_flip_to_decode_s == 2.0
    ledger.flip("i0", P, 3.0)
    assert ledger.snapshot(3.0).last_flip_to_decode_s == 2.0


def test_flips_that_do_not_apply_are_refused() -> None:
    ledger = pair()
    ledger.instance_up(instance("pinned", flippable=False), profile(), P, 0.0)
    assert not ledger.flip("i0", P, 1.0), "it has that label"
    assert not ledger.flip("pinned", D, 1.0)
    assert not ledger.flip("i9", D, 1.0)
    assert ledger.snapshot(1.0).last_flip_to_decode_s == -math.inf


def test_an_id_comes_up_once() -> None:
    ledger = pair()
    with pytest.raises(InternalError):
        ledger.instance_up(instance("i0"), profile(), P, 0.0)
    ledger.instance_down("i0", 1.0)
    ledger.instance_up(instance("i0"), profile(), D, 2.0)
    assert ledger.ids == ("i1", "i0")


def test_removal_keeps_order_and_the_others_sums() -> None:
    ledger = cluster(4, roles=(P, P, D, D), profile=profile())
    ledger.prefill_dispatched(request("a", 300), "i1", 0.0)
    ledger.prefill_dispatched(request("b", 500), "i0", 0.0)
    assert ledger.instance_down("i0", 1.0) == ["b"]
    assert ledger.ids == ("i1", "i2", "i3")
    after = ledger.snapshot(1.0)
    assert after.index == {"i1": 0, "i2": 1, "i3": 2}
    assert column(after, "prefill_tokens") == [300, 0, 0]
    ledger.prefill_ended("a", 1.1)
    ledger.check_integrity()
    assert ledger.instance_down("i0", 1.0) == []


def test_a_dead_instance_returns_all_it_had_and_what_lives_on() -> None:
    """Prefills, decodes and waiting KV are lost; a pull in flight survives on its living side."""
    ledger = cluster(3, roles=(P, D, D), profile=profile())
    for name in ("queued", "waiting", "pulling", "pulled"):
        ledger.prefill_dispatched(request(name, 100), "i0", 0.0)
    for name in ("waiting", "pulling", "pulled"):
        ledger.prefill_ended(name, 1.0)
    for name in ("pulling", "pulled"):
        ledger.decode_dispatched(name, "i1", 101, 1.0)
    ledger.transfer_ended("pulled", 1.1)

    assert ledger.instance_down("i0", 2.0) == ["queued", "waiting", "pulling"]
    assert ledger.residents("i1") == Residents((), (), ("pulling", "pulled"))
    assert ledger.snapshot(2.0).requests.ids == ("pulling", "pulled")
    ledger.check_integrity()

    assert ledger.instance_down("i1", 3.0) == ["pulling", "pulled"]
    assert ledger.snapshot(3.0).requests.ids == ()
    ledger.check_integrity()


def test_kv_waits_at_its_source_again_when_the_decode_instance_dies_mid_pull() -> None:
    ledger = pair()
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    ledger.prefill_ended("r0", 1.0)
    ledger.decode_dispatched("r0", "i1", 101, 1.0)
    assert ledger.instance_down("i1", 1.5) == ["r0"]
    assert ledger.residents("i0") == Residents((), ("r0",), ())
    assert ledger.decode_dispatched("r0", "i0", 101, 1.6)
    ledger.check_integrity()


def test_a_migration_keeps_one_owner() -> None:
    ledger = cluster(3, roles=(P, D, D), profile=profile())
    decoding(ledger)
    ledger.tokens("r0", 9, 2.0)
    ledger.decode_dispatched("r0", "i2", 110, 2.0)
    during = ledger.snapshot(2.0)
    assert column(during, "handoff_tokens") == [0, 110, 0]
    assert column(during, "decode_tokens") == [0, 0, 110]
    assert owner_of(ledger, "r0") == "i1"
    ledger.transfer_ended("r0", 2.1)
    assert owner_of(ledger, "r0") == "i2"
    ledger.check_integrity()


def test_a_migrated_decodes_first_tokens_free_the_old_instance_and_are_no_gap() -> None:
    ledger = cluster(3, roles=(P, D, D), profile=profile())
    decoding(ledger)
    ledger.tokens("r0", 1, 2.0)
    ledger.decode_dispatched("r0", "i2", 102, 2.0)
    ledger.tokens("r0", 1, 5.0)
    assert column(ledger.snapshot(5.0), "handoff_tokens") == [0, 0, 0]
    ledger.tokens("r0", 1, 5.1)
    ledger.window_closed(6.0)
    assert ledger.snapshot(6.0).mean_gap_s[2] == pytest.approx(0.1)


def test_the_pause_of_a_move_is_the_gap_around_it_smoothed_at_the_destination() -> None:
    ledger = cluster(3, roles=(P, D, D), profile=profile())
    decoding(ledger)
    for on, left_s, back_s in (("i2", 2.0, 2.5), ("i1", 3.0, 7.0), ("i2", 8.0, 8.1)):
        ledger.tokens("r0", 1, left_s)
        ledger.decode_dispatched("r0", on, 110, left_s + 0.05)
        ledger.tokens("r0", 1, back_s)
    assert ledger.snapshot(9.0).move_pause_s.tolist() == pytest.approx([0.0, 4.0, 0.5 + 0.1 * (0.1 - 0.5)])


# Snapshots


def test_a_snapshot_is_frozen_in_time_and_read_only() -> None:
    ledger = pair()
    before = ledger.snapshot(0.0)
    ledger.prefill_dispatched(request("r0", 100), "i0", 0.0)
    assert column(before, "prefill_tokens") == [0, 0]
    with pytest.raises(ValueError, match="read-only"):
        before.prefill_tokens[0] = 1.0


def test_a_snapshot_carries_labels_capacity_and_placement_counts() -> None:
    ledger = cluster(3, roles=(P, D, M), profile=profile(), kv_capacity_tokens=5000)
    decoding(ledger)
    snapshot = ledger.snapshot(1.0)
    assert [snapshot.labelled(role).tolist() for role in Role] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert column(snapshot, "kv_capacity_tokens") == [5000, 5000, 5000]
    assert snapshot.flippable.all()
    assert (snapshot.placed_prefills, snapshot.placed_decodes) == (1, 1)
    assert len(snapshot) == 3


def test_a_snapshot_has_a_row_per_live_request_and_per_session() -> None:
    ledger = cluster(3, roles=(P, D, D), profile=profile())
    for name, session, turn in (("r0", "s0", 0), ("r1", "s1", 0)):
        asked = replace(request(name, 100), session=session, turn=turn, tenant="acme")
        ledger.prefill_dispatched(asked, "i0", 0.0)
    ledger.prefill_ended("r0", 1.0)
    ledger.decode_dispatched("r0", "i2", 101, 1.0)
    ledger.tokens("r0", 4, 1.5)
    rows = ledger.snapshot(2.0).requests
    assert (rows.ids, rows.sessions) == (("r0", "r1"), ("s0", "s1"))
    assert (rows.prefill_on.tolist(), rows.source_on.tolist()) == ([-1, 0], [-1, -1])
    assert (rows.decode_on.tolist(), rows.context_tokens.tolist()) == ([2, -1], [105, 100])
    assert (rows.generated_tokens.tolist(), rows.ttft_s.tolist()) == ([5, 0], [1.0, 1.0])

    ledger.finished("r0", 3.0)
    ledger.prefill_dispatched(replace(request("r0", 100), session="s1", tenant="acme"), "i0", 3.5)
    snapshot = ledger.snapshot(4.0)
    sessions = snapshot.sessions
    assert sessions.keys == (("acme", "s0"), ("acme", "s1"))
    assert (sessions.held_on.tolist(), sessions.context_tokens.tolist()) == ([2, -1], [105, 0])
    assert (sessions.turns.tolist(), sessions.live.tolist()) == ([1, 2], [0, 2])
    assert sessions.last_s.tolist() == [3.0, 3.5]
    seen = snapshot.without({"i1"})
    assert (seen.ids, seen.sessions.held_on.tolist()) == (("i0", "i2"), [1, -1])
    assert seen.requests.prefill_on.tolist() == [0, 0]
    ledger.instance_down("i2", 5.0)
    assert ledger.snapshot(5.0).sessions.held_on.tolist() == [-1, -1]


def test_check_integrity_finds_a_wrong_sum() -> None:
    ledger = pair()
    ledger._matrix.decode_tokens[1] += 1.0
    with pytest.raises(InternalError, match="DECODE_TOKENS"):
        ledger.check_integrity()


def test_predicted_seconds_add_up_exactly() -> None:
    """0.1 + 0.2 - 0.1 - 0.2 is not 0 in floating point; on the ledger's grid it is."""
    ledger = pair()
    for n, tokens in enumerate((101, 203, 307)):
        ledger.prefill_dispatched(request(f"r{n}", tokens), "i0", 0.0)
    for n in (1, 0, 2):
        ledger.prefill_ended(f"r{n}", 1.0)
        ledger.check_integrity()
    assert ledger.snapshot(1.0).prefill_queue_s[0] == 0.0


def test_rows_keep_order_and_numbers_while_hundreds_come_and_go() -> None:
    ledger, live = pair(), list[str]()
    for number in range(500):
        name = f"r{number}"
        decoding(ledger, name, 10 + number)
        ledger.tokens(name, 3, 2.0)
        if number % 2:
            ledger.joined(name)
        live.append(name)
        if number % 7 and number > 20:
            assert ledger.finished(live.pop(number % len(live)), 3.0)
    ledger.stepped("i1", 5, 4.0)
    ledger.moves(live[0], "i0", 5.0)
    ledger.check_integrity()
    rows = ledger.snapshot(6.0).requests
    assert list(rows.ids) == live and [each.id for each in rows.requests] == live
    in_step = [int(name[1:]) % 2 for name in live]
    assert rows.generated_tokens.tolist() == [4 + 5 * each for each in in_step]
    assert rows.context_tokens.tolist() == [
        10 + int(name[1:]) + 4 + 5 * each for name, each in zip(live, in_step, strict=True)
    ]
    assert rows.moving_to.tolist() == [0] + [-1] * (len(live) - 1)
    assert rows.moved_at_s[0] == 5.0 and np.isneginf(rows.moved_at_s[1:]).all()
    ledger.instance_down("i0", 7.0)
    assert (ledger.snapshot(7.0).requests.decode_on == 0).all()
    ledger.check_integrity()
