"""SIGKILL of the source or the destination at each stage of a migration: the answer is the same."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.live.kv_proxy import KvProxy
from tests.live.live_cluster import Live, cluster
from tidegate.control.live_request import Stage
from tidegate.core.decision import Migrate
from tidegate.gateway.settings import GatewaySettings

Json = dict[str, Any]

MOMENTS: dict[str, Callable[[str, Json], bool]] = {
    "asked for a stage": lambda kind, frame: frame.get("op") == "stage" and frame["epoch"] is None,
    "a stage is told": lambda kind, frame: "stage" in frame and frame["stage"]["state"] is None,
    "asked for the last": lambda kind, frame: frame.get("op") == "stage" and frame["epoch"] is not None,
    "paused": lambda kind, frame: "stage" in frame and frame["stage"]["state"] is not None,
    "commits": lambda kind, frame: frame.get("op") == "commit",
    "committed": lambda kind, frame: "valid" in frame,
}
"""By the frame that is about to be passed on."""


async def moved_and_killed(live: Live, body: Json, moment: str, victim: str) -> tuple[list[int], str]:
    """Stream ``body``, have it move, and kill the ``victim`` of the move at ``moment``."""
    dispatcher = live.gateway.dispatcher
    await live.until(lambda: len(dispatcher.upstreams) == 3)
    killed: list[str] = []
    names: dict[str, str] = {}

    def on_frame(kind: str, frame: Json) -> None:
        if not killed and MOMENTS[moment](kind, frame):
            killed.append(names[victim])
            pid = dispatcher.upstreams[names[victim]].member.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    seen = live.tokens_seen
    answer = asyncio.create_task(live.stream(body))
    await live.until(lambda: live.tokens_seen > seen + 10)
    (request,) = dispatcher.plane.requests.values()
    assert request.stage is Stage.DECODE and request.decode_on is not None
    names["source"] = request.decode_on
    names["destination"] = next(
        name for name in dispatcher.upstreams if name not in (request.decode_on, request.prefill_on)
    )
    upstream = dispatcher.upstreams[request.decode_on]
    proxy = await KvProxy(upstream.member.kv_port, on_frame).start()
    behind = replace(upstream.member, kv_port=proxy.port)
    request.upstream = replace(upstream, member=behind)  # type: ignore[attr-defined]
    dispatcher.act([Migrate(request.id, names["source"], names["destination"], "forced")])
    told = await answer
    proxy.close()
    assert killed, f"nothing was {moment}"
    return told


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["source", "destination"])
async def test_a_kill_at_each_stage_loses_and_repeats_nothing(
    model_dir: Path, tmp_path: Path, victim: str
) -> None:
    journal = tmp_path / "journal.jsonl"
    settings = GatewaySettings(admission=0.0, journal=journal, replays=20)
    async with cluster(model_dir, "static", dtype="float64", settings=settings) as live:
        for index, moment in enumerate(MOMENTS):
            body: Json = {
                "prompt": [5 + (index * 31 + k * 7) % 480 for k in range(400)],
                "max_tokens": 600,
                "temperature": 0.8 if index % 2 else 0,
                "seed": index,
                "ignore_eos": True,
            }
            told = await moved_and_killed(live, body, moment, victim)
            await live.until(lambda: len(live.gateway.dispatcher.upstreams) == 3)
            await live.until_drained()
            assert told == await live.stream(body), moment
        live.gateway.dispatcher.plane.ledger.check_integrity()
    rows = [orjson.loads(line) for line in journal.read_bytes().splitlines()]
    outcomes = [row for row in rows if row["type"] == "outcome"][::2]
    replays = {moment: row["replays"] for moment, row in zip(MOMENTS, outcomes, strict=True)}
    if victim == "destination":
        # Until the commit arrives, which it does although its sender is dead, the decode is the source's.
        assert replays == dict.fromkeys(MOMENTS, 0) | {"commits": 1, "committed": 1}
    else:
        assert {moment: count for moment, count in replays.items() if count > 1} == {}
    events = [row["event"] for row in rows if row["type"] == "migration"]
    assert events.count("begun") == len(MOMENTS)
    assert events.count("done") + events.count("cancelled") == len(MOMENTS)
