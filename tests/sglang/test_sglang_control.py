"""What SGLang servers say of themselves, and the switch of their roles."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sglang_contract import StandIn, answer_to
from sglang_split import Split, Taken, leg

from tidegate.core.errors import ConfigError, EngineFault, EngineTimeout, SetupError
from tidegate.core.instance import Role
from tidegate.engines.sglang.facts import read_facts
from tidegate.engines.sglang.server import SglangLoad

INFO: dict[str, Any] = {
    "disaggregation_mode": "prefill",
    "max_total_num_tokens": 4096,
    "enable_pd_role_switch": True,
    "internal_states": [{}],
}
MODELS = {"data": [{"id": "m", "max_model_len": 512}]}


async def test_a_switch_waits_for_the_rooms_and_takes_no_new_ones(split: Split) -> None:
    split.servers["d"].step.clear()
    taken = Taken()
    running = asyncio.create_task(split.engines["p"].run(leg([5, 6], 6), taken, deadline_s=30.0))
    await taken.first.wait()
    switching = asyncio.create_task(split.peers.switch_role("d", Role.PREFILL, drain_s=30.0))
    await asyncio.sleep(0.05)
    assert split.servers["d"].role == "decode", "it is not asked before its requests have ended"
    with pytest.raises(EngineFault, match="changing its role"):
        await split.engines["d"].run(leg([5, 6], 6), Taken(), deadline_s=30.0)
    split.engines["e"].close("down")
    with pytest.raises(EngineFault, match="no decode server"):
        await split.engines["p"].run(leg([7, 8], 3), Taken(), deadline_s=30.0)
    split.servers["d"].step.set()
    await running
    await switching
    assert taken.ids == answer_to([5, 6], 6)
    assert split.engines["d"].server.role is Role.PREFILL


async def test_a_switched_server_works_in_its_new_role(split: Split) -> None:
    await split.peers.switch_role("d", Role.PREFILL, drain_s=30.0)
    await split.peers.switch_role("p", Role.DECODE, drain_s=30.0)
    taken = Taken()
    await split.engines["d"].run(leg([5, 6], 1, pin=True), taken, deadline_s=30.0)
    await split.quiet()
    assert taken.ids == answer_to([5, 6], 1)
    assert split.servers["d"].bodies[-1]["bootstrap_port"] == 9001
    await split.peers.switch_role("p", Role.DECODE, drain_s=30.0)


async def test_kv_that_still_moves_is_waited_for(split: Split) -> None:
    split.servers["e"].foreign = 2
    await split.peers.switch_role("e", Role.PREFILL, drain_s=30.0)
    assert split.engines["e"].server.role is Role.PREFILL
    split.servers["d"].foreign = 1000
    with pytest.raises(EngineTimeout, match="not idle"):
        await split.peers.switch_role("d", Role.PREFILL, drain_s=0.1)
    taken = Taken()
    await split.engines["d"].run(leg([5, 6], 2), taken, deadline_s=30.0)
    assert taken.ids == answer_to([5, 6], 2), "it serves on in its old role"


async def test_requests_that_do_not_end_in_time_keep_the_role(split: Split) -> None:
    split.servers["d"].step.clear()
    taken = Taken()
    running = asyncio.create_task(split.engines["p"].run(leg([5, 6], 6), taken, deadline_s=30.0))
    await taken.first.wait()
    with pytest.raises(EngineTimeout, match="requests still run"):
        await split.peers.switch_role("d", Role.PREFILL, drain_s=0.05)
    assert not split.engines["d"].server.draining
    split.servers["d"].step.set()
    await running


async def test_a_failed_switch_leaves_the_server_out_unless_it_says_it_can_serve(split: Split) -> None:
    split.servers["d"].switch_fails = "role switch failed; instance unhealthy, restart required"
    with pytest.raises(EngineFault, match="until it is restarted"):
        await split.peers.switch_role("d", Role.PREFILL, drain_s=30.0)
    with pytest.raises(EngineFault, match="takes no requests"):
        await split.engines["d"].run(leg([5, 6], 2), Taken(), deadline_s=30.0)
    split.servers["e"].graphs = {}
    await split.connect("e")
    split.engines["d"].close("down")
    await split.add("q", "prefill")
    with pytest.raises(EngineFault, match="CUDA graphs"):
        await split.peers.switch_role("p", Role.DECODE, drain_s=30.0)
    taken = Taken()
    await split.engines["p"].run(leg([5, 6], 2), taken, deadline_s=30.0)
    assert taken.ids == answer_to([5, 6], 2)


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        ({"enable_pd_role_switch": False}, "--enable-pd-role-switch"),
        ({"dp_size": 2, "enable_dp_attention": True}, "data parallelism, DP attention"),
        ({"ep_size": 4}, "expert parallelism"),
        ({"pp_size": 2}, "pipeline parallelism"),
    ],
)
async def test_a_switch_that_would_be_refused_does_not_drain(
    split: Split, launch: dict[str, object], reason: str
) -> None:
    await split.add("fixed", "decode", **launch)
    with pytest.raises(ConfigError, match=reason):
        await split.peers.switch_role("fixed", Role.PREFILL, drain_s=30.0)
    assert not split.engines["fixed"].server.draining


def test_the_role_is_the_one_it_has_now() -> None:
    switched = INFO | {"internal_states": [{"disaggregation_mode": "decode"}]}
    assert read_facts(switched, MODELS, {}).role is Role.DECODE
    facts = read_facts(INFO, MODELS, {})
    assert (facts.role, facts.bootstrap_port, facts.max_model_len) == (Role.PREFILL, 8998, 511)


@pytest.mark.parametrize(
    ("info", "model_info", "message"),
    [
        (INFO | {"disaggregation_mode": "null"}, {}, "--disaggregation-mode"),
        (INFO, {"is_generation": False}, "does not generate"),
        ({}, {}, "disaggregation_mode"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_apart(
    info: dict[str, Any], model_info: dict[str, Any], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        read_facts(info, MODELS, model_info)


@pytest.mark.parametrize("old_paths", [False, True])
async def test_load_and_description_are_read_from_old_and_new_servers(split: Split, old_paths: bool) -> None:
    server = split.servers["o"] = StandIn(split.fabric, "decode", bootstrap_port=9009)
    server.old_paths = old_paths
    await server.up()
    engine = await split.connect("o")
    assert await engine.server.load() == SglangLoad(running=0, waiting=2, used_tokens=64)


async def test_hidden_states_of_prompts_reach_whoever_wants_them(split: Split) -> None:
    heard: list[tuple[str, Any]] = []
    split.peers.hidden_states = lambda request_id, states: heard.append((request_id, states))
    split.servers["p"].launch["enable_return_hidden_states"] = True
    await split.engines["p"].run(leg([5, 6], 2), Taken(), deadline_s=30.0)
    await split.quiet()
    assert heard == [("cmpl-1-1", [[0.5, 0.5]])]
    assert "return_hidden_states" not in split.servers["d"].bodies[0]
