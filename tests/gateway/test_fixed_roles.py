"""Members that may do only one phase: pools plan around them."""

from __future__ import annotations

from tests.gateway.gateway_cluster import Start
from tidegate.core.instance import Role
from tidegate.fleet.static import server_of

BODY = {"prompt": [3, 1, 4, 1, 5], "max_tokens": 8, "temperature": 0}


def test_a_role_stands_before_the_url() -> None:
    assert server_of("prefill=http://a:1/v1") == ("http://a:1", Role.PREFILL)
    assert server_of("http://a:1") == ("http://a:1", None)


async def test_a_fixed_member_keeps_its_role_and_another_takes_the_one_it_had(start: Start) -> None:
    cluster = await start("arrow-lending", instances=3, fixed={"i0": Role.DECODE})
    plane = cluster.gateway.dispatcher.plane
    roles = {name: plane.ledger.role_of(name) for name in plane.ledger.ids}
    assert roles["i0"] is Role.DECODE and Role.PREFILL in roles.values()
    assert roles == plane.membership.labels
    for _ in range(4):
        status, answer, _ = await cluster.post("/v1/completions", BODY)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
    assert all(not engine.pinned for name, engine in cluster.engines.items() if name == "i0")


async def test_kv_is_not_pulled_by_a_member_that_only_hands_it_on(start: Start) -> None:
    cluster = await start("static", instances=2, fixed={"i0": Role.PREFILL, "i1": Role.PREFILL})
    status, _, _ = await cluster.post("/v1/completions", BODY)
    assert status == 200
    for engine in cluster.engines.values():
        for body in engine.bodies:
            assert "remote_block_ids" not in body.get("kv_transfer_params", {})
