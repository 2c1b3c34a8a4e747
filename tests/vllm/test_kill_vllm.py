"""A server dies under load: nobody's answer changes, nobody else waits, and it comes back by itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.through_gateway import CHAT, COMPLETIONS, LegRun, Said, ask, client, record_legs, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster
from tidegate_testing.chaos import Forced

Json = dict[str, Any]
STREAMS = 24
LONGEST_GAP_S = 20.0
"""Less than what a stream waits that hangs on the dead server: leases take 30 s, a stall limit 60."""
VICTIM = "i1"
SYSTEMS = ("arrow-lending", "tidegate+held-feasible-sjf")
"""As ``tidegate serve`` makes them for vLLM servers: the control plane keeps the order."""


def streams(count: int, seed: int, tokens: int) -> list[tuple[str, Json]]:
    """Return requests that stream for so many tokens."""
    chance = random.Random(seed)
    requests = []
    for index in range(count):
        body: Json = {"model": SERVED_NAME, "temperature": 0, "ignore_eos": True, "max_tokens": tokens}
        body |= {"return_token_ids": True, "stream": True, "stream_options": {"include_usage": True}}
        words = "".join(chance.choice("tide gate 漢字 é") for _ in range(100))
        prompt = [chance.randrange(5, 512) for _ in range(chance.randint(20, 300))]
        if index % 3 == 0:
            requests.append((CHAT, body | {"messages": [{"role": "user", "content": words}]}))
        else:
            requests.append((COMPLETIONS, body | {"prompt": prompt}))
    return requests


async def alone(session: Any, url: str, requests: Sequence[tuple[str, Json]]) -> list[Said]:
    """Return what one server answers, with a cache of its own."""
    salt = {"cache_salt": "alone"}
    return list(await asyncio.gather(*(ask(session, url, path, body | salt) for path, body in requests)))


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
@pytest.mark.parametrize("system", SYSTEMS)
async def test_a_killed_server_is_survived_and_comes_back(
    system: str, cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_legs(monkeypatch)
    requests = streams(STREAMS, seed=1, tokens=250)
    later = streams(12, seed=2, tokens=20)
    async with client() as session:
        expected = await alone(session, cluster[0].url, requests)
        expected_later = await alone(session, cluster[0].url, later)
        forced = Forced(migrate_every_s=0.05, flip_every_s=0.5)
        async with serving(cluster.urls, tmp_path, system=system, forced=forced) as running:
            upstreams = running.gateway.dispatcher.upstreams
            dead = upstreams[VICTIM].member.engine_id
            tasks = [asyncio.create_task(ask(session, running.url, *request)) for request in requests]
            await running.until(lambda: running_on(runs, VICTIM) > 2 and pulled_from(runs, dead), 300)
            on_victim = {run.request for run in runs if run.instance == VICTIM and run.runs}
            cluster[1].kill()
            await running.until(lambda: VICTIM not in upstreams)
            known_s = asyncio.get_running_loop().time()
            answers = await asyncio.gather(*tasks)

            for (_, body), said, wanted in zip(requests, answers, expected, strict=True):
                assert said.told() == wanted.told(), body
            gaps = {said.id: max(said.gaps_s) for said in answers}
            others = {request: gap for request, gap in gaps.items() if request not in on_victim}
            assert on_victim and others
            assert max(others.values()) < LONGEST_GAP_S, others
            late = [run for run in runs if run.handle is not None and run.handle.owner == dead]
            assert all(run.began_s < known_s for run in late)

            cluster[1].start()
            await running.until(lambda: VICTIM in upstreams, 240)
            assert upstreams[VICTIM].member.engine_id != dead
            del runs[:]
            answers = []
            while not (served(runs, pin=True) and served(runs, pin=False)):
                answers = await asyncio.gather(*(ask(session, running.url, *request) for request in later))
                assert [said.told() for said in answers] == [said.told() for said in expected_later]
            assert any(run.instance == VICTIM and run.handle is not None and run.end for run in runs)
            assert not any(run.handle is not None and run.handle.owner == dead for run in runs)


def running_on(runs: Sequence[LegRun], instance: str) -> int:
    """How many streams an instance serves."""
    return sum(run.instance == instance and not run.leg.pin and run.runs for run in runs)


def pulled_from(runs: Sequence[LegRun], engine_id: str) -> bool:
    """Whether a leg that went on from an engine's KV has ended."""
    return any(
        run.handle is not None and run.handle.owner == engine_id and run.end is not None for run in runs
    )


def served(runs: Sequence[LegRun], *, pin: bool) -> bool:
    """Whether the victim ended a leg of a kind."""
    return any(run.instance == VICTIM and run.leg.pin is pin and run.end is not None for run in runs)
