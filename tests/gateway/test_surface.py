"""What clients ask beside completions, and what every answer carries."""

from __future__ import annotations

import time

import pytest

from tests.gateway.gateway_cluster import Start
from tidegate import __version__
from tidegate.gateway.settings import GatewaySettings

GOOD = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}
PAGE = "https://chat.example"


async def test_models_have_an_entry_each(start: Start) -> None:
    cluster = await start("static", instances=1)
    async with cluster.client.get(cluster.url + "/v1/models") as response:
        (listed,) = (await response.json())["data"]
    assert time.time() - 600 < listed["created"] <= time.time()
    async with cluster.client.get(cluster.url + "/v1/models/" + listed["id"]) as response:
        assert await response.json() == listed
    async with cluster.client.get(cluster.url + "/v1/models/of/another") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")


async def test_version_and_ping(start: Start) -> None:
    cluster = await start("static")
    async with cluster.client.get(cluster.url + "/version") as response:
        assert await response.json() == {"version": __version__}
    for method in ("GET", "POST"):
        async with cluster.client.request(method, cluster.url + "/ping") as response:
            assert response.status == 200


async def test_a_text_is_tokenised_by_whichever_engine_answers(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(api_key="k"))
    key = {"Authorization": "Bearer k"}
    assert (await cluster.post("/tokenize", {"prompt": "ab"}))[0] == 401
    await cluster.engines["i0"].stop()
    assert (await cluster.post("/tokenize", {"prompt": "ab"}, **key))[1] == {"tokens": [97, 98]}
    status, answer, _ = await cluster.post("/tokenize", {}, **key)
    assert (status, answer["error"]["message"]) == (400, "no prompt")
    assert (await cluster.post("/tokenize", {"prompt": "ab", "model": "other"}, **key))[0] == 404
    for name in cluster.engines:
        cluster.fleet.down(name)
    assert (await cluster.post("/tokenize", {"prompt": "ab"}, **key))[0] == 503


async def test_every_answer_has_an_id_and_keeps_the_clients(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(api_key="k"))
    key = {"Authorization": "Bearer k"}
    status, answer, headers = await cluster.post("/v1/completions", GOOD, **key)
    assert (status, headers["X-Request-Id"]) == (200, answer["id"])
    for given, kept in (("mine-1", True), ("x" * 300, False), ("caf\xe9", False)):
        for path, body, right in (
            ("/v1/completions", GOOD, 200),
            ("/v1/completions", {}, 400),
            ("/nowhere", {}, 404),
        ):
            status, _, headers = await cluster.post(path, body, **key, **{"X-Request-Id": given})
            assert status == right
            assert (headers["X-Request-Id"] == given) == kept and headers["X-Request-Id"]
    stream = GOOD | {"stream": True}
    sent = key | {"X-Request-Id": "mine-2"}
    async with cluster.client.post(cluster.url + "/v1/completions", json=stream, headers=sent) as response:
        assert response.headers["X-Request-Id"] == "mine-2"
    async with cluster.client.get(cluster.url + "/v1/models") as response:
        assert (response.status, len(response.headers["X-Request-Id"])) == (401, 24)


@pytest.mark.parametrize("origins", [(PAGE,), ("*",), ()], ids=["one", "any", "none"])
async def test_pages_of_named_origins_may_call(start: Start, origins: tuple[str, ...]) -> None:
    cluster = await start("static", settings=GatewaySettings(api_key="k", cors_origins=origins))
    url = cluster.url + "/v1/completions"
    for page in (PAGE, "https://other.example"):
        allowed = "*" if origins == ("*",) else page if page in origins else None
        asked = {
            "Origin": page,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        async with cluster.client.options(url, headers=asked) as response:
            assert response.status == (204 if origins else 401)
            assert response.headers.get("Access-Control-Allow-Origin") == allowed
            wanted = response.headers.get("Access-Control-Allow-Headers")
            assert wanted == (asked["Access-Control-Request-Headers"] if allowed else None)
        for body in (GOOD, GOOD | {"stream": True}, {}):
            headers = {"Origin": page, "Authorization": "Bearer k"}
            async with cluster.client.post(url, json=body, headers=headers) as response:
                assert response.headers.get("Access-Control-Allow-Origin") == allowed
