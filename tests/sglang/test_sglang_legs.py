"""Two legs of the gateway as one request on a pair of SGLang servers."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sglang_contract import EOS, answer_to, spelled
from sglang_split import Split, Taken, leg

from tidegate.core.errors import (
    BadRequest,
    EngineFault,
    EngineUnreachable,
    KvLost,
    PromptTooLong,
)
from tidegate.core.instance import Role
from tidegate.engines.seam import KvHandle
from tidegate.engines.sglang.engine import SglangEngine

PROMPT = [5, 6, 8, 9]


async def prefilled(engine: SglangEngine, **more: object) -> tuple[Taken, KvHandle]:
    """Run a prefill leg; return what it gave and its handle."""
    taken = Taken()
    end = await engine.run(leg(PROMPT, 1, pin=True, **more), taken, deadline_s=30.0)
    assert end.handle is not None
    return taken, end.handle


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("interval", [1, 3])
async def test_both_legs_read_one_stream_whatever_its_form(
    split: Split, incremental: bool, interval: int
) -> None:
    for server in split.servers.values():
        server.launch["incremental_streaming_output"] = incremental
        server.stream_interval = interval
    first, handle = await prefilled(split.engines["p"])
    assert first.ids == answer_to(PROMPT, 1) and first.finish_reason == "length"
    assert (handle.owner, handle.tokens) == ("d-a", len(PROMPT))
    rest = Taken()
    await split.engines["d"].run(leg(PROMPT, 8, handle=handle), rest, deadline_s=30.0)
    assert rest.ids == answer_to(PROMPT, 8) and rest.finish_reason == "length"
    assert spelled(rest.ids).startswith(rest.text) and len(rest.pieces) > 1
    await split.quiet()
    assert split.servers["d"].aborts, "what nobody wants is not generated"
    assert not split.servers["e"].bodies, "one room has one decode server"


async def test_a_leg_to_the_end_runs_on_a_pair_whichever_role_its_server_has(split: Split) -> None:
    for name in ("p", "d", "e"):
        taken = Taken()
        await split.engines[name].run(leg(PROMPT, 5), taken, deadline_s=30.0)
        assert taken.ids == answer_to(PROMPT, 5) and taken.text == spelled(taken.ids)
    sent = split.servers["p"].bodies[0]
    assert (sent["bootstrap_host"], sent["bootstrap_port"]) == ("127.0.0.1", 9000)
    assert sent["sampling_params"] == {"temperature": 0, "max_new_tokens": 5}


async def test_a_stop_comes_with_its_reason_and_ends_the_room(split: Split) -> None:
    taken = Taken()
    end = await split.engines["p"].run(leg([99], 1, pin=True), taken, deadline_s=30.0)
    assert (taken.ids, taken.finish_reason, end.handle) == ([EOS], "stop", None)
    assert taken.pieces[-1].stop_reason is None, "the model's own end is not the request's"
    wanted = answer_to(PROMPT, 3)[2]
    taken = Taken()
    await split.engines["p"].run(leg(PROMPT, 9, stop_token_ids=[wanted]), taken, deadline_s=30.0)
    assert (len(taken.ids), taken.finish_reason, taken.pieces[-1].stop_reason) == (3, "stop", wanted)
    for include, told in ((False, 2), (True, 3)):
        taken = Taken()
        asked = leg(PROMPT, 9, stop=[spelled([wanted])], include_stop_str_in_output=include)
        await split.engines["p"].run(asked, taken, deadline_s=30.0)
        assert taken.text == spelled(answer_to(PROMPT, told))
        assert (taken.finish_reason, taken.pieces[-1].stop_reason) == ("stop", spelled([wanted]))


async def test_another_decode_server_refuses_the_handle_and_computes_again(split: Split) -> None:
    _, handle = await prefilled(split.engines["p"])
    other = split.engines["e"]
    assert other.refuses(handle) == "elsewhere" and split.engines["d"].refuses(handle) is None
    with pytest.raises(KvLost):
        await other.run(leg(PROMPT, 8, handle=handle), Taken(), deadline_s=30.0)
    await split.engines["p"].release(handle)
    assert split.engines["d"].refuses(handle) == "expired"
    taken = Taken()
    again = [*PROMPT, *answer_to(PROMPT, 1)]
    await other.run(leg(again, 4, request_id="cmpl-1-2", generated=1), taken, deadline_s=30.0)
    assert taken.ids == answer_to(PROMPT, 5)[1:]


async def test_rooms_are_spread_over_the_peers(split: Split) -> None:
    for server in (split.servers["d"], split.servers["e"]):
        server.step.clear()
    handles = [(await prefilled(split.engines["p"], request_id=f"cmpl-{n}-1"))[1] for n in range(4)]
    assert sorted(handle.owner for handle in handles) == ["d-a", "d-a", "e-a", "e-a"]
    for handle in handles:
        await split.engines[handle.owner[0]].release(handle)


async def test_a_handle_covers_exactly_its_tokens(split: Split) -> None:
    _, handle = await prefilled(split.engines["p"])
    with pytest.raises(KvLost, match="covers 4 tokens"):
        await split.engines["d"].run(leg([*PROMPT, 1], 8, handle=handle), Taken(), deadline_s=30.0)
    await split.engines["d"].decline(handle)


async def test_a_room_without_a_decode_leg_is_closed_when_its_lease_ends(split: Split) -> None:
    split.peers.lease_s = 0.05
    split.servers["d"].step.clear()
    _, handle = await prefilled(split.engines["p"])
    await split.quiet()
    assert split.engines["d"].refuses(handle) == "expired"


async def test_a_prefill_whose_answer_is_lost_is_aborted_by_its_id_alone(split: Split) -> None:
    for server in split.servers.values():
        server.step.clear()
    legs = [leg(PROMPT, 1, pin=True, request_id=name) for name in ("cmpl-1-1", "cmpl-1-10")]
    tasks = [asyncio.create_task(split.engines["p"].run(each, Taken(), deadline_s=30.0)) for each in legs]
    while len(split.servers["p"].running) < 2:
        await asyncio.sleep(0.01)
    await split.engines["p"].release_request("cmpl-1-1")
    with pytest.raises(EngineUnreachable):
        await tasks[0]
    while not all(server.aborts for server in (split.servers["p"], split.servers["d"])):
        await asyncio.sleep(0.01)
    for server in split.servers.values():
        server.step.set()
    end = await tasks[1]
    assert end.handle is not None


async def test_cancelling_a_leg_aborts_both_servers(split: Split) -> None:
    split.servers["p"].step.clear()
    task = asyncio.create_task(split.engines["p"].run(leg(PROMPT, 9), Taken(), deadline_s=30.0))
    while not (split.servers["p"].running and split.servers["d"].running):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await split.quiet()


@pytest.mark.parametrize(("dead", "stage"), [("p", "prefill"), ("d", "decode")])
async def test_a_death_before_the_first_token_names_the_server_and_frees_the_other(
    split: Split, dead: str, stage: str
) -> None:
    split.servers["p"].step.clear()
    task = asyncio.create_task(split.engines["p"].run(leg(PROMPT, 9), Taken(), deadline_s=30.0))
    while not (split.servers["p"].running and split.servers["d"].running):
        await asyncio.sleep(0.01)
    await split.servers[dead].down()
    with pytest.raises(EngineUnreachable) as caught:
        await task
    assert (caught.value.instance, caught.value.stage) == (dead, stage)
    await split.quiet()


async def test_kv_of_a_prefill_server_that_is_gone_is_not_waited_for(split: Split) -> None:
    split.servers["p"].step.clear()
    task = asyncio.create_task(split.engines["d"].run(leg(PROMPT, 9), Taken(), deadline_s=30.0))
    while not (split.servers["p"].running and split.servers["d"].running):
        await asyncio.sleep(0.01)
    split.engines["e"].owner_gone("p-a")
    assert not task.done()
    split.engines["d"].owner_gone("p-a")
    with pytest.raises(KvLost):
        await task


async def test_a_decode_outlives_its_prefill_server(split: Split) -> None:
    split.servers["d"].step.clear()
    split.servers["p"].answering.clear()
    taken = Taken()
    task = asyncio.create_task(split.engines["p"].run(leg(PROMPT, 9), taken, deadline_s=30.0))
    await taken.first.wait()
    await split.servers["p"].down()
    split.engines["p"].close("killed")
    split.engines["d"].owner_gone("p-a")
    split.servers["d"].step.set()
    await task
    assert taken.ids == answer_to(PROMPT, 9)


async def test_a_decode_server_that_dies_in_the_middle_is_named(split: Split) -> None:
    taken = Taken()
    task = asyncio.create_task(split.engines["p"].run(leg(PROMPT, 9), taken, deadline_s=30.0))
    split.servers["d"].step.clear()
    await taken.first.wait()
    await split.servers["d"].down()
    with pytest.raises(EngineUnreachable) as caught:
        await task
    assert (caught.value.instance, caught.value.stage) == ("d", "decode")


async def test_a_refusal_is_the_clients_unless_the_gateway_continued(split: Split) -> None:
    engine = split.engines["p"]
    with pytest.raises(BadRequest, match="top_k"):
        await engine.run(leg(PROMPT, 4, top_k=0), Taken(), deadline_s=30.0)
    with pytest.raises(EngineFault, match="continued leg"):
        await engine.run(leg(PROMPT, 4, generated=1, top_k=0), Taken(), deadline_s=30.0)
    with pytest.raises(BadRequest, match="best_of") as caught:
        await engine.run(leg(PROMPT, 4, best_of=2), Taken(), deadline_s=30.0)
    assert caught.value.param == "best_of"
    with pytest.raises(BadRequest, match="chats"):
        await engine.run(replace(leg("", 4), prompt=None, messages=[]), Taken(), deadline_s=30.0)
    with pytest.raises(PromptTooLong):
        await engine.run(leg([1] * 255, 1), Taken(), deadline_s=30.0)


async def test_a_text_is_tokenised_first_and_its_ids_are_told(split: Split) -> None:
    taken = Taken()
    await split.engines["p"].run(leg("tide", 1, pin=True), taken, deadline_s=30.0)
    assert taken.pieces[0].prompt_token_ids == list(b"tide")
    assert taken.ids == answer_to(list(b"tide"), 1)


async def test_a_minimum_of_tokens_is_kept_by_not_handing_the_room_on(split: Split) -> None:
    taken = Taken()
    end = await split.engines["p"].run(leg(PROMPT, 1, pin=True, min_tokens=1), taken, deadline_s=30.0)
    assert len(taken.ids) == 1 and end.handle is None


async def test_logprobs_and_salts_go_to_both_servers(split: Split) -> None:
    taken = Taken()
    asked = replace(leg(PROMPT, 3, logprobs=2, guided_json={"type": "object"}), salt="tenant")
    await split.engines["p"].run(asked, taken, deadline_s=30.0)
    rows = [piece.logprobs for piece in taken.pieces if piece.logprobs]
    told = [token for row in rows for token in row["tokens"]]
    assert told == [f"<{token}>" for token in taken.ids]
    for name in ("p", "d"):
        body = split.servers[name].bodies[0]
        assert body["extra_key"] == "tenant" and body["return_logprob"] is True
        assert body["sampling_params"]["json_schema"] == '{"type":"object"}'


async def test_without_a_peer_of_the_other_role_no_leg_is_sent(split: Split) -> None:
    for name in ("d", "e"):
        split.engines[name].close("down")
    with pytest.raises(EngineFault, match="no decode server"):
        await split.engines["p"].run(leg(PROMPT, 4), Taken(), deadline_s=30.0)
    assert split.engines["p"].server.role is Role.PREFILL and not split.servers["p"].bodies
