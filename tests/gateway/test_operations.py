"""What an operator can ask of a running gateway."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from tests.gateway.gateway_cluster import Start
from tidegate.gateway.settings import GatewaySettings

ADD = "/tidegate/instances"
DRAIN = "/tidegate/instances/i2/drain"
UNDRAIN = "/tidegate/instances/i2/undrain"


async def test_a_drained_instance_gets_nothing_more_and_stays_up(start: Start) -> None:
    cluster = await start("colocated", instances=3)
    status, said, _ = await cluster.post(DRAIN, b"")
    assert (status, said) == (200, {"status": "draining", "id": "i2", "remove": False})
    await asyncio.gather(
        *(cluster.post("/v1/completions", {"prompt": [n, 2, 3], "max_tokens": 2}) for n in range(12))
    )
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        state = await response.json()
    assert [i["id"] for i in state["instances"] if i["draining"]] == ["i2"]
    served = {name: len(engine.bodies) for name, engine in cluster.engines.items()}
    assert served["i2"] == 0 and min(served["i0"], served["i1"]) > 0


async def test_an_idle_instance_that_is_to_be_removed_is_stopped(start: Start) -> None:
    cluster = await start("colocated", instances=3)
    status, said, _ = await cluster.post(DRAIN, {"remove": True})
    assert (status, said["remove"]) == (200, True)
    await cluster.until(lambda: "i2" not in cluster.gateway.dispatcher.upstreams)
    assert (await cluster.post(DRAIN, {}))[0] == 404


async def test_a_drain_outlasts_a_restart_until_it_is_ended(start: Start) -> None:
    cluster = await start("colocated", instances=3)
    dispatcher = cluster.gateway.dispatcher
    assert (await cluster.post(UNDRAIN, b""))[0] == 404
    await cluster.post(DRAIN, b"")
    cluster.fleet.down("i2")
    await cluster.until(lambda: "i2" not in dispatcher.upstreams)
    cluster.fleet.up("i2")
    await cluster.until(lambda: "i2" in dispatcher.upstreams)
    for served, path in ((False, DRAIN), (True, UNDRAIN)):
        assert (await cluster.post(path, b""))[0] == 200
        await asyncio.gather(
            *(cluster.post("/v1/completions", {"prompt": [n, 2, 3], "max_tokens": 2}) for n in range(12))
        )
        assert bool(cluster.engines["i2"].bodies) is served
    assert not dispatcher.plane.membership.draining


async def test_one_that_the_fleet_cannot_stop_can_be_undrained(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start("colocated", instances=3)
    monkeypatch.setattr(cluster.fleet, "remove", lambda instance, reason: False)
    await cluster.post(DRAIN, {"remove": True})
    status, said, _ = await cluster.post(UNDRAIN, b"")
    assert (status, said) == (200, {"status": "undrained", "id": "i2"})


async def test_a_fleet_that_cannot_grow_says_so(start: Start) -> None:
    cluster = await start("static", instances=2)
    status, said, _ = await cluster.post(ADD, {})
    assert (status, said["error"]["message"]) == (409, "a fleet of given URLs cannot grow")
    assert not cluster.gateway.dispatcher.plane.membership.starting


@pytest.mark.parametrize(
    ("given", "role"), [({}, "prefill"), ({"role": None}, "prefill"), ({"role": "decode"}, "decode")]
)
async def test_an_added_instance_has_the_role_asked_for_or_the_one_that_lacks(
    start: Start, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], role: str
) -> None:
    cluster = await start("static", instances=3)
    monkeypatch.setattr(cluster.fleet, "add", lambda: "i3")
    assert (await cluster.post(ADD, given))[:2] == (200, {"status": "starting", "role": role})
    dispatcher = cluster.gateway.dispatcher
    assert {r.label: count for r, count in dispatcher.plane.membership.starting.items()} == {role: 1}
    dispatcher.start_failed("i3", "no room")
    assert not dispatcher.plane.membership.starting


async def test_instances_that_are_added_in_quick_succession_share_the_roles(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start("static", instances=2)
    monkeypatch.setattr(cluster.fleet, "add", map("i{}".format, count(2)).__next__)
    said = [(await cluster.post(ADD, {}))[1]["role"] for _ in range(4)]
    assert sorted(said) == ["decode", "decode", "prefill", "prefill"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(ADD, {"role": "chief"}, "role"), (ADD, {"count": 2}, "count"), (DRAIN, {"remove": "yes"}, "remove")],
)
async def test_wrong_bodies_are_refused_by_field(
    start: Start, path: str, body: dict[str, Any], param: str
) -> None:
    cluster = await start("static", instances=3)
    status, said, _ = await cluster.post(path, body)
    assert (status, said["error"]["param"]) == (400, param)
    assert not cluster.gateway.dispatcher.plane.membership.draining


@pytest.mark.parametrize("path", [ADD, DRAIN])
async def test_the_key_is_wanted(start: Start, path: str) -> None:
    cluster = await start("static", instances=3, settings=GatewaySettings(api_key="right"))
    assert (await cluster.post(path, {}))[0] == 401
    status, _, _ = await cluster.post(path, {}, Authorization="Bearer right")
    assert status == (409 if path == ADD else 200)
