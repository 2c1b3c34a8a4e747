"""The data plane against times worked out by hand."""

from __future__ import annotations

import pytest

from tidegate.core.errors import ConfigError
from tidegate.core.instance import Instance
from tidegate.costs.forms import TransferCost
from tidegate.costs.library import packaged_profile
from tidegate.dataplane.cluster import Cluster
from tidegate.dataplane.events import EventQueue
from tidegate.dataplane.replica import EngineSettings, Replica, replicas_of
from tidegate.dataplane.sequence import ENDED, Pin, SimSequence
from tidegate_testing import profile

ROUND = profile(prefill=(0.0, 1e-3, 0.0), step=(1e-2, 0.0, 0.0), transfer=(0.5, 1000.0))
"""1 ms per prompt token, 10 ms per step; KV of one byte per token, a thousand per second after 0.5 s."""


class Plane:
    """An instance for each letter, which names its node; keeps the times of what it is told."""

    def __init__(self, kv_tokens: int = 4096, node_of: str = "aab") -> None:
        self.events = EventQueue()
        fleet = [
            Replica(
                Instance(f"i{i}", kv_tokens, kv_tokens, 16, 1),
                ROUND,
                EngineSettings(reserve=0.0),
                node=node,
                inter_node=TransferCost(1.0, 100.0),
            )
            for i, node in enumerate(node_of)
        ]
        self.cluster = Cluster(fleet, self.events, self, leap=True)
        self.tokens_s: list[tuple[int, float]] = []
        self.ends_s: dict[int, float] = {}
        self.pins: dict[int, Pin] = {}
        self.migrated_s: list[tuple[bool, int, float]] = []

    def run(self, until_s: float = float("inf")) -> None:
        while (at_s := self.events.next_s()) is not None and at_s <= until_s:
            self.cluster.handle(self.events.pop())

    def free(self, instance: int) -> bool:
        blocks = self.cluster.instances[instance].batcher.blocks
        return blocks.free == blocks.total

    def stepped(self, instance: int, count: int, now: float) -> None: ...

    def preempted(self, sequence: SimSequence) -> None: ...

    def paused(self, sequence: SimSequence, now: float) -> None: ...

    def token(self, sequence: SimSequence, now: float) -> None:
        self.tokens_s.append((sequence.request, now))

    def pull(self, sequence: SimSequence, instance: int, now: float) -> None:
        self.cluster.pull(sequence, instance, now)

    def migrated(
        self, sequence: SimSequence, src: int, dst: int, moved_bytes: int, committed: bool, now: float
    ) -> None:
        self.migrated_s.append((committed, moved_bytes, now))

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        self.ends_s[sequence.request] = now
        if pin is not None:
            self.pins[sequence.request] = pin


@pytest.mark.parametrize(("decode_on", "transfer_s"), [(1, 0.5 + 0.2), (2, 1.0 + 2.0)])
def test_a_pull_costs_what_the_way_costs(decode_on: int, transfer_s: float) -> None:
    plane = Plane()
    plane.cluster.submit(0, SimSequence(0, 200, 201, True), 0.0)
    plane.run()
    plane.cluster.submit(decode_on, SimSequence(0, 201, 203, False, plane.pins[0]), 0.2)
    plane.run()
    assert plane.ends_s[0] == pytest.approx(0.2 + transfer_s + 2 * 0.01)
    assert plane.free(0) and plane.free(decode_on)


def test_pulls_share_the_port_of_their_sender_and_that_of_their_receiver() -> None:
    """200 tokens each: i0 sends to i1 and to i2, and i3 to i1, too."""
    plane = Plane(node_of="aaaa")
    for number, on in ((0, 0), (1, 0), (2, 3)):
        plane.cluster.submit(on, SimSequence(number, 200, 201, True), 0.0)
        plane.run()
    assert {number: pin.on for number, pin in plane.pins.items()} == {0: 0, 1: 0, 2: 3}
    for number, to, at_s in ((0, 1, 1.0), (1, 2, 1.1), (2, 1, 1.2)):
        plane.run(until_s=at_s)
        plane.cluster.submit(to, SimSequence(number, 201, 202, False, plane.pins[number]), at_s)
    plane.run()
    # From 1.5 on pull 0 has 1,000 bytes/s, from 1.6 on half of them, as i0 sends two, and pull 1 has the
    # other half. From 1.7 on i1 receives two, which takes nothing from pull 0; pull 2 has 500 beside it.
    # Pull 0 has moved 100 + 100 by 1.8; then both others have a sender and a receiver to themselves.
    assert plane.ends_s == pytest.approx({0: 1.8 + 0.01, 1: 1.8 + 0.1 + 0.01, 2: 1.8 + 0.15 + 0.01})
    assert all(plane.free(instance) for instance in range(4))


def test_a_known_prefix_is_not_computed_again() -> None:
    plane = Plane()
    for number, at_s in ((0, 0.0), (1, 1.0)):
        plane.cluster.submit(0, SimSequence(number, 200, 201, False, None, (7, 8, 9), 64), at_s)
        plane.run()
    # 3 blocks of 64 are known; 8 tokens are left to compute.
    assert plane.ends_s == pytest.approx({0: 0.2, 1: 1.008})


def test_a_prefix_goes_when_its_blocks_are_needed() -> None:
    plane = Plane(kv_tokens=256)
    for number, at_s, ids in ((0, 0.0, (7, 8, 9)), (1, 1.0, ()), (2, 2.0, (7, 8, 9))):
        plane.cluster.submit(0, SimSequence(number, 200, 201, False, None, ids, 64), at_s)
        plane.run()
    # The second takes 13 of 16 blocks; the 3 left hold no whole unit of 4.
    assert plane.ends_s == pytest.approx({0: 0.2, 1: 1.2, 2: 2.2})


def test_a_migration_pauses_for_its_last_stage_only() -> None:
    plane = Plane()
    plane.cluster.submit(0, SimSequence(0, 200, 400, False), 0.0)
    plane.run(until_s=0.2)
    plane.run(until_s=0.205)
    assert plane.cluster.begin_migration(0, 0, 1, 0.205)
    plane.run()
    # 200 tokens until 0.205 + 0.5 + 0.2 = 0.905, 70 more until 0.905 + 0.57 = 1.475, 57 until 2.032. Three
    # stages are the most: the step that runs ends at 2.04, with KV of 384 tokens, and the other 57 take
    # 0.5 + 0.057 s. The 385th token is there; 15 steps remain.
    assert plane.migrated_s == [(True, 384, pytest.approx(2.04 + 0.557))]
    assert plane.ends_s[0] == pytest.approx(2.597 + 0.01 * (400 - 385))
    assert plane.free(0) and plane.free(1)


def test_an_abort_in_mid_pull_frees_both_ends() -> None:
    plane = Plane()
    plane.cluster.submit(0, SimSequence(0, 200, 201, True), 0.0)
    plane.run()
    leg = SimSequence(0, 201, 203, False, plane.pins[0])
    plane.cluster.submit(1, leg, 0.2)
    plane.run(until_s=0.6)
    plane.cluster.abort(leg, 0.6)
    plane.cluster.abort(leg, 0.6)
    assert leg.state == ENDED and plane.free(0) and plane.free(1)
    plane.run()
    assert plane.tokens_s == [(0, pytest.approx(0.2))]


def test_a_fleet_of_a_packaged_profile() -> None:
    packaged = packaged_profile("h100_sxm/llama-3.1-8b")
    fleet = replicas_of(packaged, 10, engine=EngineSettings(), kv_tokens=50_000)
    assert [replica.instance.id for replica in fleet[:2]] == ["i0", "i1"]
    assert [replica.node for replica in fleet] == ["n0"] * 8 + ["n1"] * 2
    assert fleet[0].instance.max_model_len == 50_000 and fleet[0].inter_node == packaged.inter_node
    with pytest.raises(ConfigError, match="at least one instance"):
        replicas_of(packaged, 0)


class Watched(Plane):
    """Notes how many steps of the second instance are known when a leg on the first one ends."""

    def __init__(self, *, leap: bool) -> None:
        super().__init__()
        fleet = [instance.replica for instance in self.cluster.instances]
        self.cluster = Cluster(fleet, self.events, self, leap=leap)
        self.steps = 0
        self.known: list[int] = []

    def stepped(self, instance: int, count: int, now: float) -> None:
        self.steps += count if instance == 1 else 0

    def ended(self, sequence: SimSequence, pin: Pin | None, now: float) -> None:
        super().ended(sequence, pin, now)
        self.cluster.report(now)
        self.known.append(self.steps)


@pytest.mark.parametrize("leap", [True, False])
def test_a_step_that_ends_at_this_very_time_is_known(leap: bool) -> None:
    plane = Watched(leap=leap)
    plane.cluster.submit(0, SimSequence(0, 200, 204, False), 0.0)
    plane.cluster.submit(1, SimSequence(1, 200, 260, False), 0.0)
    plane.run()
    assert plane.known == [4, 60]


def test_pins_in_each_others_way_end_long_before_their_leases() -> None:
    plane = Plane(kv_tokens=640)  # 40 blocks; 39 are pinned for the other one
    for on in (0, 1):
        for number in range(3):
            plane.cluster.submit(on, SimSequence(10 * on + number, 200, 201, True), 0.0)
    plane.run()
    for pin in plane.pins.values():
        plane.cluster.begin_lease(pin, 0.6)
    plane.ends_s.clear()
    for on in (0, 1):
        for number in range(3):
            request = 10 * (1 - on) + number
            plane.cluster.submit(on, SimSequence(request, 201, 240, False, plane.pins[request]), 2.0)
    plane.run()
    assert len(plane.ends_s) == 6 and max(plane.ends_s.values()) < 10.0
    assert plane.free(0) and plane.free(1)
