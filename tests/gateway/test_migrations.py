"""Running decodes that move: their tokens, the books, the journal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.core.decision import AddInstance, Drain, Migrate
from tidegate.core.errors import FleetFull
from tidegate.core.instance import Role
from tidegate.fleet.member import Capabilities
from tidegate_testing.chaos import Forced
from tidegate_testing.fake_engine import token_at

ABLE = Capabilities()
FORGETFUL = Capabilities(continues=False)
"""What vLLM servers are: each leg is a request of its own to them."""


def body(seed: int, tokens: int) -> dict[str, Any]:
    return {
        "prompt": [seed, seed * 3 % 500, 7],
        "max_tokens": tokens,
        "temperature": 0,
        "return_token_ids": True,
    }


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    return [row for row in map(orjson.loads, lines) if row["type"] == kind]


@pytest.mark.parametrize("capabilities", [ABLE, FORGETFUL], ids=["continues", "forgets"])
async def test_forced_migrations_change_no_token(
    start: Start, tmp_path: Path, capabilities: Capabilities
) -> None:
    cluster = await start(
        "arrow-lending",
        instances=4,
        step_s=0.001,
        capabilities=capabilities,
        forced=Forced(migrate_every_s=0.001, flip_every_s=0.01),
    )

    async def one(seed: int) -> None:
        events = await cluster.stream(body(seed, 30))
        told = [t for e in events for t in e["choices"][0]["token_ids"]]
        assert told == [token_at([seed, seed * 3 % 500, 7], p) for p in range(30)]

    await asyncio.gather(*(one(seed) for seed in range(40)))
    assert cluster.live() == 0
    cluster.gateway.dispatcher.plane.ledger.check_integrity()
    await cluster.gateway.stop()
    done = [row for row in rows(tmp_path, "migration") if row["event"] == "done"]
    assert len(done) > 10
    assert sum(row["migrations"] for row in rows(tmp_path, "outcome")) == len(done)


async def test_a_migration_that_cannot_be_is_left_alone_and_says_why(start: Start, tmp_path: Path) -> None:
    cluster = await start("static", instances=3, step_s=0.002, capabilities=FORGETFUL)
    dispatcher = cluster.gateway.dispatcher
    dispatcher.act([Migrate("nobody", "i0", "i1")])
    seeded = asyncio.create_task(cluster.stream(body(3, 60) | {"temperature": 0.7, "seed": 5}))
    await cluster.until(
        lambda: any(s.position > 2 for e in cluster.engines.values() for s in e.streams.values())
    )
    (request,) = cluster.gateway.dispatcher.plane.requests
    on = next(name for name, engine in cluster.engines.items() if engine.streams)
    other = next(name for name in cluster.engines if name != on)
    dispatcher.act([Migrate(request, on, other)])
    dispatcher.act([Migrate(request, on, "i9")])
    await seeded
    await cluster.gateway.stop()
    why = [row["detail"] for row in rows(tmp_path, "migration")]
    assert why == ["it has ended", "its state cannot move: seed", "i9 is no other instance that is up"]
    assert rows(tmp_path, "outcome")[0]["unmovable"] == "seed"


async def test_a_stream_survives_the_death_of_its_source_in_the_middle_of_a_migration(start: Start) -> None:
    cluster = await start("static", instances=3, step_s=0.002, capabilities=FORGETFUL)
    task = asyncio.create_task(cluster.stream(body(4, 50)))
    await cluster.until(
        lambda: any(s.position > 5 for e in cluster.engines.values() for s in e.streams.values())
    )
    (request,) = cluster.gateway.dispatcher.plane.requests
    on = next(name for name, engine in cluster.engines.items() if engine.streams)
    other = next(name for name in cluster.engines if name not in (on, "i0"))
    cluster.engines[on].hold_prefill = True
    cluster.gateway.dispatcher.act([Migrate(request, on, other)])
    await cluster.until(lambda: bool(cluster.engines[on].held))
    await cluster.engines[on].stop()
    cluster.fleet.down(on)
    told = [t for e in await task for t in e["choices"][0]["token_ids"]]
    assert told == [token_at([4, 12, 7], p) for p in range(50)]


async def test_a_drained_instance_is_stopped_once_its_decodes_have_moved(start: Start) -> None:
    cluster = await start("static", instances=3, step_s=0.002)
    dispatcher = cluster.gateway.dispatcher
    tasks = [asyncio.create_task(cluster.stream(body(seed, 200))) for seed in range(6)]
    await cluster.until(lambda: dispatcher.plane.snapshot(0.0).decode_requests.sum() == 6)
    on = next(iter(dispatcher.plane.requests.values())).decode_on
    assert on is not None
    dispatcher.act([Drain(on, remove=True, reason="scale-in")])
    await cluster.until(lambda: on not in dispatcher.upstreams)
    for seed, task in enumerate(tasks):
        told = [t for e in await task for t in e["choices"][0]["token_ids"]]
        assert told == [token_at([seed, seed * 3 % 500, 7], p) for p in range(200)]
    assert on not in dispatcher.plane.membership.labels
    assert cluster.live() == 0


async def test_a_fleet_that_cannot_grow_says_so(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    cluster = await start("static", instances=2)
    with pytest.raises(FleetFull):
        cluster.gateway.dispatcher.act([AddInstance(Role.DECODE, "peak")])
    assert "no instance can be started (peak)" in caplog.text
    assert not cluster.gateway.dispatcher.plane.membership.starting
