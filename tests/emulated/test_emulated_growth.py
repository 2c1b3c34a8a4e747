"""Emulated instances that come and go while the process that serves them goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.emulated.emulated_gateway import gateway, stream
from tests.emulated.emulated_pair import OfTwo
from tidegate.core.errors import ConfigError
from tidegate.dataplane.replica import parse_groups, replicas_in
from tidegate.engines.emulated.vocabulary import answer
from tidegate.engines.serving.process import bind
from tidegate.fleet.emulated import EmulatedFleet, EmulatedLaunch
from tidegate.gateway.run import Gateway

ANY = list(range(40))
ADD = "/tidegate/instances"
PIN = {"do_remote_decode": True, "do_remote_prefill": False}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def state(client: aiohttp.ClientSession, url: str) -> Any:
    async with client.get(url + "/tidegate/state") as response:
        return await response.json()


async def post(
    client: aiohttp.ClientSession, url: str, body: dict[str, Any] | None = None
) -> tuple[int, Any]:
    async with client.post(url, json=body) as response:
        return response.status, await response.json()


def fleet_of(running: Gateway) -> EmulatedFleet:
    fleet = running._fleet
    assert isinstance(fleet, EmulatedFleet)
    return fleet


async def test_instances_come_and_go_and_disturb_no_request() -> None:
    prompts = [list(range(start, start + 60)) for start in range(12)]
    async with gateway("static") as (running, url, client):
        upstreams = running.dispatcher.upstreams
        pid = upstreams["i0"].member.pid
        streams = [asyncio.create_task(stream(client, url, prompt, 400)) for prompt in prompts]
        ledger = running.dispatcher.plane.ledger
        await until(lambda: ledger.snapshot(0.0).decode_requests.sum() == len(prompts))

        status, said = await post(client, url + "/tidegate/instances", {"role": "decode"})
        assert (status, said) == (200, {"status": "starting", "role": "decode"})
        await until(lambda: "i3" in upstreams)
        added = upstreams["i3"].member
        assert added.pid == pid and added.profile == upstreams["i0"].member.profile

        drained = upstreams["i2"].member
        status, said = await post(client, url + "/tidegate/instances/i2/drain", {"remove": True})
        assert (status, said) == (200, {"status": "draining", "id": "i2", "remove": True})
        await until(lambda: "i2" not in upstreams)
        assert await asyncio.gather(*streams) == [answer(prompt, 0, 400) for prompt in prompts]
        with pytest.raises(aiohttp.ClientConnectorError):
            async with asyncio.timeout(20):
                while True:
                    async with client.get(drained.url + "/health"):
                        await asyncio.sleep(0.01)
        assert await stream(client, url, ANY, 20) == answer(ANY, 0, 20)

        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not upstreams)
        await until(lambda: len(upstreams) == 3)
        assert sorted(upstreams) == ["i0", "i1", "i3"], "as it was before"
        assert await stream(client, url, ANY, 20) == answer(ANY, 0, 20)


async def test_the_last_group_grows_to_its_most_and_its_starts_take_the_time_that_is_set() -> None:
    async with gateway(
        "static", launch=EmulatedLaunch(("h100_sxm/llama-3.1-8b:1..2",), start_delay_s=0.2)
    ) as (
        running,
        url,
        client,
    ):
        upstreams = running.dispatcher.upstreams
        assert (await post(client, url + ADD, {"role": "decode"}))[0] == 200
        (start,) = (await state(client, url))["starting"]
        assert (start["id"], start["role"]) == ("i1", "decode")
        status, said = await post(client, url + ADD, {})
        assert (status, said["error"]["message"]) == (409, "the fleet has 2 instances, and may have 2")
        await until(lambda: "i1" in upstreams)
        after = await state(client, url)
        assert not after["starting"] and after["starts"]["decode_s"] > 0.1, "a loop's clock may be late"
        text = running.dispatcher.metrics.render().decode()
        assert 'tidegate_instance_start_seconds_count{role="decode"} 1.0' in text
        assert 'tidegate_instance_start_seconds_bucket{le="0.1",role="decode"} 0.0' in text
        assert (await post(client, url + ADD + "/i1/drain", {"remove": True}))[0] == 200
        await until(lambda: "i1" not in upstreams)
        assert (await post(client, url + ADD, {"role": "decode"}))[0] == 200, "there is room again"
    with pytest.raises(ConfigError, match="only the last group of a fleet can grow"):
        parse_groups(["h100_sxm/llama-3.1-8b:1..2", "h200_sxm/llama-3.1-8b:1"])


async def test_with_its_last_instance_the_process_ends_and_a_new_one_takes_the_next() -> None:
    async with gateway("colocated") as (running, url, client):
        fleet, upstreams = fleet_of(running), running.dispatcher.upstreams
        pid = upstreams["i0"].member.pid
        for name in ("i0", "i1", "i2"):
            assert fleet.remove(name, "not needed")
        assert not fleet.remove("i0", "it is gone")
        await until(lambda: not upstreams)
        await until(lambda: not fleet._slots)
        assert fleet.add() == "i3"
        await until(lambda: bool(upstreams))
        (member,) = (upstream.member for upstream in upstreams.values())
        assert member.pid != pid
        assert await stream(client, url, ANY, 20) == answer(ANY, 0, 20)


async def test_an_instance_that_the_process_cannot_open_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway("colocated") as (running, _, _):
        fleet, dispatcher = fleet_of(running), running.dispatcher
        pid = dispatcher.upstreams["i0"].member.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert fleet.add(), "the fleet does not know yet"
        failed: list[str] = []
        monkeypatch.setattr(dispatcher, "start_failed", lambda name, reason: failed.append(name))
        await until(lambda: failed == ["i3"])
        await until(lambda: sorted(dispatcher.upstreams) == ["i0", "i1", "i2"])


async def test_only_members_of_the_launch_may_add_and_remove() -> None:
    async with gateway("colocated") as (running, _, client):
        process = fleet_of(running)._process
        assert process is not None
        for path in ("/tidegate/instances", "/tidegate/instances/remove"):
            status, said = await post(client, process.url + path, {})
            assert (status, said["error"]["code"]) == (403, "forbidden")
        async with client.get(process.url + "/health") as response:
            assert response.status == 200


async def test_what_is_on_a_removed_instance_is_dropped(two: OfTwo) -> None:
    async with two() as served:
        host = served.instances.host
        kept = asyncio.create_task(served.complete(0, ANY, 300))
        cut = asyncio.create_task(served.complete(1, ANY, 300))
        pinned = await served.complete(1, ANY[:20], 1, kv_transfer_params=PIN)
        handle = {**pinned["kv_transfer_params"], "tidegate_generated": 1}
        await until(lambda: all(place.in_step for place in host.instances))
        first, second = host.instances
        assert second.pins and await served.instances.remove(second.engine_id)
        assert not await served.instances.remove(second.engine_id)
        blocks = second.batcher.blocks
        assert blocks.free == blocks.total and not second.legs and not second.pins
        try:
            assert (await cut)["choices"][0]["finish_reason"] == "abort"
        except aiohttp.ClientError:
            pass  # the server did not wait for its answer
        assert (await kept)["choices"][0]["token_ids"] == answer(ANY, 0, 300)
        prompt = ANY[:20] + answer(ANY[:20], 0, 1)
        again = await served.complete(0, prompt, 5, kv_transfer_params=handle)
        assert again["choices"][0]["token_ids"] == answer(ANY[:20], 1, 5), "computed, where there is no KV"
        assert first.counters.pull_failures == 1

        groups = parse_groups(["h100_sxm/llama-3.1-8b:3"])
        ready = await served.instances.add(replicas_in(groups)[-1], bind("127.0.0.1", 0))
        served.urls.append(f"http://127.0.0.1:{ready['port']}")
        assert (await served.complete(2, ANY, 5))["choices"][0]["token_ids"] == answer(ANY, 0, 5)
