"""Who may ask the gateway for what: keys and tenants, browsers, and fields that run code."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.gateway import access
from tidegate.gateway.settings import GatewaySettings
from tidegate.protocol.http_front import owner_of_key

GOOD = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}
KEYS = GatewaySettings(api_key="op", tenants={"k-red": "red", "k-blue": "blue"})


async def get(cluster: Cluster, path: str, **headers: str) -> int:
    async with cluster.client.get(cluster.url + path, headers=headers) as response:
        return response.status


def salts(cluster: Cluster) -> set[str | None]:
    return {body.get("cache_salt") for engine in cluster.engines.values() for body in engine.bodies}


async def test_a_key_is_looked_up_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = Mock(wraps=owner_of_key)
    monkeypatch.setattr(access, "owner_of_key", looked_up)
    cluster = await start("static", settings=KEYS)
    assert (await cluster.post("/v1/completions", GOOD, Authorization="Bearer k-red"))[0] == 200
    assert looked_up.call_count == 1


async def test_a_key_names_its_tenant_and_a_header_cannot(start: Start) -> None:
    cluster = await start("static", settings=KEYS)
    for key in ("k-red", "k-blue", "op"):
        status, *_ = await cluster.post("/v1/completions", GOOD, Authorization=f"Bearer {key}")
        assert status == 200
    assert len(salts(cluster)) == 3 and None in salts(cluster)
    for key in ("k-red", "op"):
        forged = {"Authorization": f"Bearer {key}", "x-tenant-id": "blue"}
        status, answer, _ = await cluster.post("/v1/completions", GOOD, **forged)
        assert (status, answer["error"]["param"]) == (403, "x-tenant-id")
    assert (await cluster.post("/v1/completions", GOOD, Authorization="Bearer k-green"))[0] == 401


@pytest.mark.parametrize("path", ["/metrics", "/tidegate/state"])
async def test_operators_paths_want_the_operators_key(start: Start, path: str) -> None:
    cluster = await start("static", settings=KEYS)
    assert await get(cluster, path) == 401
    assert await get(cluster, path, Authorization="Bearer k-red") == 403
    assert await get(cluster, path, Authorization="Bearer op") == 200
    assert await get(cluster, "/health") == 200


@pytest.mark.parametrize(("proxies", "status"), [((), 403), (("10.0.0.0/8",), 403), (("127.0.0.1",), 200)])
async def test_a_tenant_header_is_taken_from_trusted_proxies(
    start: Start, proxies: tuple[str, ...], status: int
) -> None:
    cluster = await start("static", settings=GatewaySettings(trusted_proxies=proxies))
    assert (await cluster.post("/v1/completions", GOOD, **{"x-tenant-id": "red"}))[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000", "Origin": "http://127.0.0.1:3000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "inside.example", "Origin": "http://inside.example"}, 200),
    ],
)
async def test_pages_from_elsewhere_cannot_use_a_gateway_without_a_key(
    start: Start, headers: dict[str, str], status: int
) -> None:
    cluster = await start("static", settings=GatewaySettings(allowed_hosts=("inside.example",)))
    assert (await cluster.post("/v1/completions", GOOD, **headers))[0] == status
    assert await get(cluster, "/tidegate/state", **headers) == status
    assert await get(cluster, "/health", **headers) == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ x }}"),
        ("mm_processor_kwargs", {"a": 1}),
        ("chat_template_kwargs.chat_template", "{{ x }}"),
        ("chat_template_kwargs.tokenize", True),
    ],
)
async def test_fields_that_run_code_are_refused_unless_allowed(
    start: Start, field: str, value: object
) -> None:
    outer, _, inner = field.partition(".")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body |= {outer: {inner: value} if inner else value}
    cluster = await start("static")
    for path in ("/v1/chat/completions", "/tokenize"):
        status, answer, _ = await cluster.post(path, body)
        assert (status, answer["error"]["param"]) == (400, field)
    assert all(not engine.bodies for engine in cluster.engines.values())


async def test_a_guarded_field_that_asks_for_nothing_passes(start: Start) -> None:
    cluster = await start("static")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body |= {"chat_template": None, "media_io_kwargs": {}, "mm_processor_kwargs": {}}
    assert (await cluster.post("/v1/chat/completions", body))[0] == 200


async def test_an_allowed_field_and_harmless_arguments_pass(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(allow_fields=("chat_template",)))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "chat_template": "{{ x }}"}
    body |= {"chat_template_kwargs": {"enable_thinking": False}}
    assert (await cluster.post("/v1/chat/completions", body))[0] == 200
