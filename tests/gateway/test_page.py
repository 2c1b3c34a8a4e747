"""The page at / and the state that it reads."""

from __future__ import annotations

import re
from contextlib import suppress

from tests.browsing import browsed
from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.core.decision import Action, AddInstance, Drain, Flip, Undrain
from tidegate.core.errors import FleetFull
from tidegate.core.instance import Role
from tidegate.gateway.settings import GatewaySettings

WHY = "no <b>decode</b> instance meets 20 ms per token: the best holds 1,725 tokens too many"


async def test_the_page_is_one_file_that_may_load_nothing_else_and_tells_nothing(start: Start) -> None:
    cluster = await start(settings=GatewaySettings(api_key="secret"))
    async with cluster.client.get(cluster.url + "/") as response:
        text, policy = await response.text(), response.headers["Content-Security-Policy"]
        assert response.status == 200 and response.content_type == "text/html"
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text), "nothing beside it"
    assert "innerHTML" not in text and "i0" not in text
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        assert response.status == 401


async def busy(start: Start, settings: GatewaySettings | None = None) -> Cluster:
    """Return a cluster that served three requests and made a flip."""
    cluster = await start(instances=3, settings=settings or GatewaySettings())
    key = cluster.gateway.dispatcher.settings.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for n in range(3):
        status, *_ = await cluster.post("/v1/completions", {"prompt": [n, 2, 3], "max_tokens": 4}, **headers)
        assert status == 200
    await cluster.post("/v1/completions", {"prompt": [1], "max_tokens": -1}, **headers)
    roles = cluster.gateway.dispatcher.plane.membership.labels
    prefill = [name for name, role in roles.items() if role is Role.PREFILL]
    decode = [name for name in roles if name not in prefill]
    flip = Flip(decode[0], Role.PREFILL, "forced", WHY) if len(decode) > 1 else None
    cluster.gateway.dispatcher.act([flip or Flip(prefill[0], Role.DECODE, "forced", WHY)])
    return cluster


async def test_the_state_tells_latencies_beside_targets_and_why_a_flip_was_made(start: Start) -> None:
    cluster = await busy(start)
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        state = await response.json()
    recent = state["recent"]
    assert (recent["requests"], recent["failed"], recent["attained_share"]) == (3, 0, 1.0)
    assert 0 < recent["ttft_p50_s"] <= recent["ttft_p99_s"] < state["slo"]["ttft_s"]
    assert state["events"][0]["kind"] == "flip" and state["events"][0]["text"].endswith(f": {WHY}")
    assert {e["text"] for e in state["events"] if e["kind"] == "instance"} >= {"i0 is up", "i2 is up"}
    cluster.fleet.down("i2")
    await cluster.until(lambda: "i2" not in cluster.gateway.dispatcher.upstreams)
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        state = await response.json()
    assert state["events"][0]["text"].startswith("i2 is down: ")


async def test_the_state_tells_drains_starts_and_removals_with_their_reasons(start: Start) -> None:
    cluster = await start(instances=3)
    asked: tuple[Action, ...] = (
        Drain("i2", reason="maintenance"),
        Undrain("i2", "it is over"),
        AddInstance(Role.DECODE, "the peak"),
        Drain("i1", remove=True, reason="scale-in"),
    )
    for action in asked:
        with suppress(FleetFull):
            cluster.gateway.dispatcher.act([action])
    async with cluster.client.get(cluster.url + "/tidegate/state") as response:
        events = (await response.json())["events"]
    told = [(event["kind"], event["text"]) for event in reversed(events)][3:]
    assert told == [
        ("drain", "i2 drains: maintenance"),
        ("drain", "i2 drains no more: it is over"),
        ("instance", "one more instance starts, for decode: the peak"),
        ("instance", "no instance can be started: a fleet of given URLs cannot grow"),
        ("drain", "i1 drains, to be removed: scale-in"),
        ("instance", "i1 is removed: drained"),
        ("instance", "i1 is down: taken down"),
    ]


async def test_a_browser_shows_instances_by_role_and_the_reason_as_text(start: Start) -> None:
    cluster = await busy(start, GatewaySettings(api_key="secret"))
    async with browsed(cluster.url + "/") as page:
        await page.fill("#key", "secret")
        await page.click("#ask button")
        await page.wait_for_selector(".instance")
        text = await page.inner_text("body")
        assert "attained their SLO" in text and "of 3 in the last minute" in text
        assert all(name in text for name in ("i0", "i1", "i2")) and WHY in text
        assert await page.evaluate("document.documentElement.scrollWidth") <= 390
