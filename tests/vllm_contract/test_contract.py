"""The gateway in front of servers that do to a careless router what vLLM does."""

from __future__ import annotations

import asyncio
import random

import orjson
import pytest

from tests.vllm_contract.contract_bench import Json, alone, bench
from tests.vllm_contract.strict_vllm import BLOCK
from tidegate.core.decision import Migrate
from tidegate.engines.vllm.connector import MARGIN_S
from tidegate_testing.chaos import Forced


def mixed(chance: random.Random) -> Json:
    length = chance.randint(1, 150)
    body: Json = {"max_tokens": chance.choice((1, chance.randint(2, 70))), "stream": chance.random() < 0.6}
    if chance.random() < 0.4:
        body["messages"] = [{"role": "user", "content": "".join(chance.choices("tide 漢é", k=length))}]
    else:
        body["prompt"] = [chance.randrange(18) for _ in range(length)]
    if chance.random() < 0.5:
        body |= {"stop": chance.sample(["tide", "de", " a", "漢字t", "b,", "é"], 2)}
        body |= {"include_stop_str_in_output": chance.random() < 0.5}
        body |= {"min_tokens": chance.randint(0, min(20, body["max_tokens"]))}
    return body


async def test_whatever_moves_the_answers_are_those_of_one_server_and_nothing_stays_pinned() -> None:
    chance = random.Random(7)
    bodies = [mixed(chance) for _ in range(80)]
    async with bench("arrow-lending", forced=Forced(migrate_every_s=0.003, flip_every_s=0.05)) as it:
        for _ in range(5):  # moves are asked for by the clock: a fast machine needs more rounds for as many
            answers = await asyncio.gather(*(it.ask(body) for body in bodies))
            for body, said in zip(bodies, answers, strict=True):
                assert said == alone(body), body
            if it.metric("tidegate_migrations_total", event="done") > 20:
                break
        assert it.breaches() == []
        assert it.metric("tidegate_migrations_total", event="done") > 20
        assert sum(server.pulled_tokens for server in it.servers) > 1000
        await it.until(lambda: not any(server.pins for server in it.servers))


@pytest.mark.parametrize("tokens", [31, 32, 33, 63, 64, 65])
async def test_decodes_move_at_every_position(tokens: int) -> None:
    body: Json = {"prompt": [n % 12 for n in range(tokens)], "max_tokens": 40, "stream": True}
    async with bench() as it:
        dispatcher = it.gateway.dispatcher
        plane = dispatcher.plane
        task = asyncio.create_task(it.ask(body))
        while not task.done():
            for request, live in list(plane.requests.items()):
                src = live.decode_on or live.prefill_on
                dst = next(name for name in plane.ledger.ids if name != src)
                if src is not None:
                    dispatcher.act([Migrate(request, src, dst, "told so")])
            await asyncio.sleep(0)
        assert await task == alone(body)
        assert it.breaches() == []
        held = {
            kv["remote_num_tokens"] % BLOCK
            for server in it.servers
            for body in server.bodies
            if "remote_num_tokens" in (kv := body.get("kv_transfer_params") or {})
        }
        assert {BLOCK - 1, 0, 1} & held and len(held) > 3


async def test_a_handle_is_not_used_near_the_end_of_its_lease() -> None:
    body: Json = {"prompt": [1] * 100, "max_tokens": 20}
    async with bench(lease_s=MARGIN_S) as it:
        assert await it.ask(body) == alone(body)
        assert it.metric("tidegate_kv_handles_refused_total", reason="expired") == 1
        assert it.breaches() == [] and not any(server.pulled_tokens for server in it.servers)


async def test_a_pull_from_a_dead_engine_is_tried_again_without_it_and_the_engine_comes_back() -> None:
    body: Json = {"prompt": [2] * 100, "max_tokens": 20, "stream": True}
    async with bench() as it:
        prefills = next(
            n for n, role in it.gateway.dispatcher.plane.membership.labels.items() if role.label == "prefill"
        )
        victim = it.servers[int(prefills[1:])]
        ended: list[asyncio.Task[None]] = []
        victim.on_pin = lambda: ended.append(asyncio.ensure_future(victim.stop()))
        assert await it.ask(body) == alone(body)
        victim.on_pin = None
        await it.until(lambda: prefills not in it.gateway.dispatcher.upstreams)
        dead = victim.engine_id
        await asyncio.gather(*ended)
        for server in it.servers:
            del server.bodies[:]
        await victim.start()
        await it.until(lambda: prefills in it.gateway.dispatcher.upstreams)
        assert await asyncio.gather(*(it.ask(body) for _ in range(6))) == [alone(body)] * 6
        bodies = [orjson.dumps(sent).decode() for server in it.servers for sent in server.bodies]
        assert any(victim.engine_id in sent for sent in bodies), "its new handles are used"
        assert not any(dead in sent for sent in bodies)
        assert it.breaches() == []


@pytest.mark.parametrize("bidirectional", [True, False])
async def test_a_later_round_reads_kv_back_only_from_servers_that_can(bidirectional: bool) -> None:
    chance = random.Random(1)
    history = [chance.randrange(12) for _ in range(200)]
    async with bench(bidirectional=bidirectional) as it:
        for _ in range(3):
            body: Json = {"prompt": history, "max_tokens": 70}
            said = await it.ask(body, headers={"x-session-id": "s"})
            assert said == alone(body)
            history = [*history, *said[0], *(chance.randrange(12) for _ in range(40))]
        read = [
            sent
            for server in it.servers
            for sent in server.bodies
            if (kv := sent.get("kv_transfer_params") or {}).get("do_remote_decode")
            and "remote_num_tokens" in kv
        ]
        assert bool(read) is bidirectional
        assert it.breaches() == []


async def test_nothing_of_what_a_client_says_of_kv_reaches_a_server() -> None:
    stolen = {"do_remote_prefill": True, "remote_engine_id": "theirs", "remote_request_id": "theirs"}
    fields: Json = {"vllm_xargs": {"kv_transfer_params": "theirs"}, "ec_transfer_params": {"a": "theirs"}}
    fields |= {"request_id": "theirs", "priority": -9, "session_id": "theirs", "kv_transfer_params": stolen}
    prompts: list[Json] = [{"prompt": [3] * 40}, {"messages": [{"role": "user", "content": "tide"}]}]
    async with bench() as it:
        for prompt in prompts:
            body = prompt | {"max_tokens": 8}
            assert await it.ask(body | fields) == alone(body)
        assert not any("theirs" in orjson.dumps(sent).decode() for s in it.servers for sent in s.bodies)
