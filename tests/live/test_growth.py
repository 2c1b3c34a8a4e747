"""A fleet of real engines grows and shrinks under load, and no token is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.live.live_cluster import Live, cluster
from tidegate.control.effects import Drains
from tidegate.core.decision import ControlDecision, SetTarget
from tidegate.fleet.processes import LocalFleet
from tidegate.ledger.snapshot import Snapshot
from tidegate.policies.protocols import Signal
from tidegate.systems import make_system

OPEN = 8


@dataclass
class Wanting:
    """A controller that wants what a test sets."""

    split: tuple[int, int] = (1, 1)
    name: str = "wanting"
    period_s: float = 0.25
    needs: frozenset[Signal] = frozenset()

    def initial(self) -> tuple[int, int]:
        return self.split

    def decide(self, snapshot: Snapshot, state: tuple[int, int]) -> ControlDecision[tuple[int, int]]:
        actions = (SetTarget(*self.split, "the test"),) if self.split != state else ()
        return ControlDecision(self.split, actions, f"{self.split}")


@asynccontextmanager
async def loaded(live: Live, asked: list[dict[str, Any]]) -> AsyncIterator[None]:
    """Ask the same again and again meanwhile; every answer has to be what an undisturbed engine says, and
    nothing may be left of any."""
    reference = await asyncio.gather(*(live.stream(body) for body in asked))
    done, under_way = asyncio.Event(), asyncio.Event()
    rounds = 0

    async def load(body: dict[str, Any]) -> list[Any]:
        nonlocal rounds
        told = []
        while not done.is_set():
            told.append(await live.stream(body))
            rounds += 1
            if rounds >= OPEN:
                under_way.set()
        return told

    loads = [asyncio.create_task(load(body)) for body in asked]
    await asyncio.wait_for(under_way.wait(), 60)
    try:
        yield
    finally:
        done.set()
    for told, expected in zip(await asyncio.gather(*loads), reference, strict=True):
        assert told and all(one == expected for one in told)
    plane = live.gateway.dispatcher.plane
    assert not plane.requests and not plane.snapshot(0.0).requests.ids and not plane.held_count
    plane.ledger.check_integrity()
    await live.until_drained()


@pytest.mark.slow
async def test_a_controller_adds_an_instance_and_drains_one_under_load(model_dir: Path) -> None:
    wanting = Wanting()
    system = replace(make_system("static"), controllers=(wanting,))
    async with cluster(model_dir, system, instances=2, most=3, dtype="float64") as live:
        dispatcher = live.gateway.dispatcher
        upstreams, plane = dispatcher.upstreams, dispatcher.plane
        async with loaded(live, bodies(OPEN)):
            wanting.split = (1, 2)
            await live.until(lambda: "i2" in upstreams and bool(plane.ledger.residents("i2").decodes))
            assert set(plane.snapshot(0.0).start_s) and not plane.membership.starting
            wanting.split = (1, 1)
            await live.until(lambda: len(upstreams) == 2)
        assert dispatcher.metrics.render().count(b"tidegate_replays_total{") == 0
        assert not plane.membership.draining and len(plane.membership.labels) == 2


@pytest.mark.slow
async def test_instances_that_are_killed_while_they_start_and_while_they_drain(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanting = Wanting()
    system = replace(make_system("static"), controllers=(wanting,))
    async with cluster(model_dir, system, instances=2, most=3, dtype="float64") as live:
        dispatcher, fleet = live.gateway.dispatcher, live.gateway._fleet
        assert isinstance(fleet, LocalFleet)
        upstreams, plane = dispatcher.upstreams, dispatcher.plane
        async with loaded(live, bodies(OPEN)):
            wanting.split = (1, 2)
            await live.until(lambda: "i2" in fleet._slots and fleet._slots["i2"].child is not None)
            child = fleet._slots["i2"].child
            assert child is not None
            os.kill(child.pid, signal.SIGKILL)
            await live.until(lambda: not plane.membership.starting and fleet.count == 2)
            assert "i2" not in plane.membership.labels
            wanting.split = (1, 1)
            await live.until(lambda: plane._periods.states["wanting"] == (1, 1))
            wanting.split = (1, 2)
            await live.until(lambda: "i3" in upstreams and bool(plane.ledger.residents("i3").decodes))

            killed: list[str] = []
            note = dispatcher.recent.carried_out

            def kill_what_drains(at_s: float, effect: Any) -> None:
                note(at_s, effect)
                if isinstance(effect, Drains) and not killed:
                    killed.append(effect.instance)
                    os.kill(upstreams[effect.instance].member.pid or 0, signal.SIGKILL)

            monkeypatch.setattr(dispatcher.recent, "carried_out", kill_what_drains)
            wanting.split = (1, 1)
            await live.until(lambda: bool(killed) and fleet.count == 2 and len(upstreams) == 2)
        assert not plane.membership.draining and killed[0] not in plane.membership.labels


def bodies(count: int) -> list[dict[str, Any]]:
    """Prompts whose answers are long enough to be under way when the fleet changes."""
    return [
        {
            "prompt": [5 + (n * 37 + k * 11) % 480 for k in range(20 + n)],
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
        }
        for n in range(count)
    ]


@pytest.mark.slow
async def test_an_instance_joins_and_one_is_drained_and_stopped_under_load(model_dir: Path) -> None:
    async with cluster(model_dir, "static", instances=2, dtype="float64") as live:
        upstreams, ledger = live.gateway.dispatcher.upstreams, live.gateway.dispatcher.plane.ledger
        async with loaded(live, bodies(OPEN)):
            async with live.client.post(
                live.url + "/tidegate/instances", json={"role": "decode"}
            ) as response:
                assert response.status == 200
            await live.until(lambda: "i2" in upstreams)
            assert upstreams["i2"].member.profile == upstreams["i1"].member.profile
            await live.until(lambda: bool(ledger.residents("i2").decodes))

            await live.until(lambda: bool(ledger.residents("i1").decodes))
            pid = upstreams["i1"].member.pid
            drain = live.url + "/tidegate/instances/i1/drain"
            async with live.client.post(drain, json={"remove": True}) as response:
                assert response.status == 200
            await live.until(lambda: "i1" not in upstreams)
            await live.until(lambda: not Path(f"/proc/{pid}").exists())
        assert sorted(upstreams) == ["i0", "i2"]
        assert live.gateway.dispatcher.metrics.render().count(b"tidegate_replays_total{") == 0
