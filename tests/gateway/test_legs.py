"""What a request carries from leg to leg, and what becomes of it when a leg goes wrong."""

from __future__ import annotations

import asyncio
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.core.errors import EngineUnreachable
from tidegate.engines.wire import Wire
from tidegate.fleet.member import Capabilities
from tidegate.gateway.settings import GatewaySettings
from tidegate.systems import make_system
from tidegate_testing import fake_engine
from tidegate_testing.fake_engine import FakeEngine, text_of, token_at

PROMPT = [3, 1, 4, 1, 5]
BODY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
CHAT = {"messages": [{"role": "user", "content": "tide"}], "max_tokens": 5, "temperature": 0}


def journal(folder: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines()]


async def test_a_chat_is_a_chat_on_both_legs(start: Start) -> None:
    cluster = await start("static")
    status, whole, _ = await cluster.post(
        "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 0}
    )
    ids = list(b"tide")
    said = "".join(text_of(token_at(ids, p)) for p in range(5))
    assert status == 200
    choice = whole["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": said}
    assert [row["token"] for row in choice["logprobs"]["content"]] == [
        text_of(token_at(ids, p)) for p in range(5)
    ]
    second = cluster.engines["i1"].bodies[0]
    assert second["messages"] == CHAT["messages"]
    assert second["kv_transfer_params"]["prompt_token_ids"] == [*ids, token_at(ids, 0)]
    events = await cluster.stream(CHAT, path="/v1/chat/completions")
    deltas = [e["choices"][0]["delta"] for e in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == said


async def test_logprob_offsets_run_through_both_legs(start: Start) -> None:
    cluster = await start("static")
    _, whole, _ = await cluster.post("/v1/completions", BODY | {"logprobs": 1})
    logprobs = whole["choices"][0]["logprobs"]
    ends = [o + len(t) for o, t in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
    assert logprobs["text_offset"] == [0, *ends[:-1]]
    events = await cluster.stream(BODY | {"logprobs": 1})
    assert [e["choices"][0]["logprobs"]["text_offset"][0] for e in events] == logprobs["text_offset"]


async def test_min_tokens_asks_no_leg_for_more_than_it_generates(start: Start) -> None:
    cluster = await start("static")
    status, _, _ = await cluster.post("/v1/completions", BODY | {"min_tokens": 9})
    assert status == 200
    assert cluster.engines["i0"].bodies[0]["min_tokens"] == 1
    assert cluster.engines["i1"].bodies[0]["min_tokens"] == 9


async def test_a_streamed_text_prompt_that_is_too_long_is_a_400_not_a_stream(start: Start) -> None:
    cluster = await start("static", context=100)
    status, answer, _ = await cluster.post(
        "/v1/completions", {"prompt": "x" * 95, "max_tokens": 20, "stream": True, "temperature": 0}
    )
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    await cluster.until(lambda: bool(cluster.engines["i0"].released))


async def test_without_max_tokens_a_completion_takes_what_room_there_is(start: Start) -> None:
    cluster = await start("static", context=100)
    status, answer, _ = await cluster.post("/v1/completions", {"prompt": [1] * 95, "temperature": 0})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 5)


async def test_a_chat_without_max_tokens_keeps_its_limit_when_its_instance_dies(start: Start) -> None:
    cluster = await start("colocated", instances=2, step_s=0.001, context=60)
    task = asyncio.create_task(cluster.stream(CHAT | {"max_tokens": None}, path="/v1/chat/completions"))
    await cluster.until(
        lambda: any(s.position > 5 for e in cluster.engines.values() for s in e.streams.values())
    )
    name = next(n for n, e in cluster.engines.items() if e.streams)
    await cluster.engines[name].stop()
    cluster.fleet.down(name)
    events = await task
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert said == "".join(text_of(token_at(list(b"tide"), p)) for p in range(56))


async def test_engines_that_cannot_move_kv_or_resume_sampling_are_not_asked_to(start: Start) -> None:
    cluster = await start("static", capabilities=Capabilities(kv_transfer=False, continues=False))
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert (status, answer["choices"][0]["token_ids"]) == (200, [token_at(PROMPT, p) for p in range(12)])
    for engine in cluster.engines.values():
        for body in engine.bodies:
            assert not any(
                key.startswith(("remote_", "do_remote")) for key in body.get("kv_transfer_params", {})
            )
    assert [len(e.bodies) for e in cluster.engines.values()] == [1, 1], "greedy: two legs"
    await cluster.post("/v1/completions", BODY | {"temperature": 0.8, "seed": 4})
    assert sum(len(e.bodies) for e in cluster.engines.values()) == 3, "sampled: one leg"


ALONE = Capabilities(kv_transfer=False, continues=False)
"""What an engine can that knows nothing of a request's earlier legs."""


async def stream_over_a_death(cluster: Cluster, body: dict[str, Any], before_it: Any = None) -> list[Any]:
    """Stream while the instance that decodes dies; return the events."""
    task = asyncio.create_task(cluster.stream(body))
    await cluster.until(
        lambda: any(s.position > 3 for e in cluster.engines.values() for s in e.streams.values())
    )
    if before_it is not None:
        before_it()
    name = next(n for n, e in cluster.engines.items() if e.streams)
    await cluster.engines[name].stop()
    cluster.fleet.down(name)
    events: list[Any] = await task
    return events


async def test_a_sampled_stream_goes_on_elsewhere_behind_its_tokens(start: Start) -> None:
    cluster = await start("static", instances=3, step_s=0.001, capabilities=ALONE)
    events = await stream_over_a_death(cluster, BODY | {"max_tokens": 40, "temperature": 0.8})
    told = [t for e in events for t in e["choices"][0]["token_ids"]]
    bodies = [body for engine in cluster.engines.values() for body in engine.bodies]
    last = max(bodies, key=lambda body: len(body["prompt"]))
    begun = len(last["prompt"]) - len(PROMPT)
    assert last["prompt"] == PROMPT + told[:begun] and begun > 3
    assert len(told) == 40 and last["max_tokens"] == 40 - begun
    assert len({body["seed"] for body in bodies}) > 1, "no leg draws another one's random numbers"


async def test_a_seeded_stream_begins_anew_and_repeats_itself(start: Start, tmp_path: Path) -> None:
    cluster = await start("static", instances=3, step_s=0.001, capabilities=ALONE)
    events = await stream_over_a_death(cluster, BODY | {"max_tokens": 40, "temperature": 0.8, "seed": 4})
    told = [t for e in events for t in e["choices"][0]["token_ids"]]
    assert told == [token_at(PROMPT, p) for p in range(40)], "what was said again is not told twice"
    bodies = [body for engine in cluster.engines.values() for body in engine.bodies]
    assert [(body["prompt"], body["seed"]) for body in bodies] == [(PROMPT, 4)] * 2
    await cluster.gateway.stop()
    (outcome,) = [row for row in journal(tmp_path) if row["type"] == "outcome"]
    assert (outcome["outcome"], outcome["unmovable"]) == ("ok", "seed")


async def test_a_seeded_stream_that_no_engine_repeats_ends_with_a_true_error(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start("static", instances=3, step_s=0.001, capabilities=ALONE)

    def other_tokens() -> None:
        monkeypatch.setattr(fake_engine, "token_at", lambda prompt, position: token_at(prompt, position) + 1)

    body = BODY | {"max_tokens": 40, "temperature": 0.8, "seed": 4}
    events = await stream_over_a_death(cluster, body, other_tokens)
    assert events[-1]["error"]["code"] == "not_repeated"
    assert "does not repeat" in events[-1]["error"]["message"]


async def test_a_prefill_that_queues_longer_than_the_stall_limit_is_not_run_twice(start: Start) -> None:
    cluster = await start("static", settings=GatewaySettings(stall_s=0.1, request_deadline_s=1.5))
    cluster.engines["i0"].hold_prefill = True
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (504, "engine_timeout")
    assert len(cluster.engines["i0"].bodies) == 1


async def test_the_last_instance_that_is_up_pins_nothing(start: Start) -> None:
    cluster = await start("static", capabilities=Capabilities(continues=False))
    for others, pinned in ((1, True), (0, False)):
        if not others:
            cluster.fleet.down("i1")
        status, answer, _ = await cluster.post("/v1/completions", BODY)
        assert (status, answer["choices"][0]["token_ids"]) == (200, [token_at(PROMPT, p) for p in range(12)])
        asked = [body.get("kv_transfer_params", {}) for body in cluster.engines["i0"].bodies]
        assert any(kv.get("do_remote_decode") for kv in asked) is pinned
        cluster.engines["i0"].bodies.clear()


async def test_a_dropped_wire_sends_nothing_more() -> None:
    engine = FakeEngine()
    engine.keep_bodies = True
    wire = Wire(await engine.start(), connect_s=1, stall_s=60, headers={})
    body = orjson.dumps({"prompt": [1], "max_tokens": 1})
    await wire.exchange("POST", "/v1/completions", body, deadline_s=5)
    engine.hold_prefill = True
    waiting = asyncio.create_task(wire.exchange("POST", "/v1/completions", body, deadline_s=5))
    while len(engine.bodies) < 2:
        await asyncio.sleep(0)
    wire.drop("gone")
    for attempt in (waiting, wire.exchange("POST", "/v1/completions", body, deadline_s=5)):
        with pytest.raises(EngineUnreachable, match="gone"):
            await attempt
    assert len(engine.bodies) == 2
    await engine.stop()


async def test_a_sink_ends_an_exchange_and_the_engine_its_work() -> None:
    engine = FakeEngine(step_s=0.001)
    wire = Wire(await engine.start(), connect_s=1, stall_s=60, headers={})
    body = orjson.dumps({"prompt": [1], "max_tokens": 100_000, "stream": True})
    seen: list[bytes] = []

    def three(data: bytes) -> bool:
        seen.append(data)
        return len(seen) == 3

    answer = await wire.exchange("POST", "/v1/completions", body, sink=three, deadline_s=5)
    assert (answer.status, len(seen)) == (200, 3)
    async with asyncio.timeout(5):
        while engine.streams:
            await asyncio.sleep(0)
    assert len(seen) == 3
    await engine.stop()


async def test_a_stop_string_that_the_gateway_finds_ends_the_leg(start: Start) -> None:
    cluster = await start("static", step_s=0.001, capabilities=ALONE)
    stop = text_of(token_at(PROMPT, 6))
    body = BODY | {"max_tokens": 100_000, "stop": stop, "stop_token_ids": [499]}
    told = "".join(text_of(token_at(PROMPT, p)) for p in range(6))
    status, whole, _ = await cluster.post("/v1/completions", body)
    assert status == 200
    assert (whole["choices"][0]["text"], whole["choices"][0]["stop_reason"]) == (told, stop)
    events = await cluster.stream(body)
    assert "".join(e["choices"][0]["text"] for e in events) == told
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    await cluster.until(lambda: not cluster.streams())
    assert cluster.live() == 0


async def test_a_connection_that_is_cut_leaves_no_cycle_behind() -> None:
    engine = FakeEngine(step_s=0.001)
    wire = Wire(await engine.start(), connect_s=1, stall_s=60, headers={})
    body = orjson.dumps({"prompt": [1], "max_tokens": 1000, "stream": True})

    def leave(data: bytes) -> None:
        connections.update(wire._busy.things)
        raise EngineUnreachable("enough")

    connections: weakref.WeakSet[object] = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(EngineUnreachable, match="enough"):
            await wire.exchange("POST", "/v1/completions", body, sink=leave, deadline_s=5)
        async with asyncio.timeout(5):
            while connections:
                await asyncio.sleep(0)
    finally:
        gc.enable()
        await engine.stop()


async def test_a_fast_failing_instance_does_not_draw_every_request(start: Start) -> None:
    cluster = await start("arrow-lending", instances=4)
    cluster.engines["i0"].fail_with = (500, "boom")
    for _ in range(6):
        assert (await cluster.post("/v1/completions", BODY))[0] == 200
    assert len(cluster.engines["i0"].bodies) == 1
    assert cluster.gateway.dispatcher.flips == 0, "avoiding an instance is no reason to flip another"


async def test_with_nothing_up_a_request_without_a_token_gets_503_at_once(start: Start) -> None:
    cluster = await start("static")
    for engine in cluster.engines.values():
        engine.hold_prefill = True
    task = asyncio.create_task(cluster.post("/v1/completions", BODY))
    await cluster.until(lambda: any(e.bodies for e in cluster.engines.values()))
    for name, engine in cluster.engines.items():
        await engine.stop()
        cluster.fleet.down(name)
    status, answer, headers = await asyncio.wait_for(task, 5)
    assert (status, answer["error"]["code"]) == (503, "no_instance")
    assert headers["Retry-After"]


async def test_a_policy_that_raises_is_our_fault_and_journalled_so(start: Start, tmp_path: Path) -> None:
    class Broken:
        needs: frozenset[Any] = frozenset()

        def place_decode(self, *_: Any) -> Any:
            raise ValueError("bad policy")

    cluster = await start(replace(make_system("static"), decode=Broken()))
    status, answer, _ = await cluster.post("/v1/completions", BODY)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    await cluster.until(lambda: bool(cluster.engines["i0"].released))
    await cluster.gateway.stop()
    (outcome,) = [r for r in journal(tmp_path) if r["type"] == "outcome"]
    assert (outcome["outcome"], outcome["status"]) == ("internal", 500)


async def test_a_control_tick_that_fails_does_not_end_control(start: Start, caplog: Any) -> None:
    ticks = 0

    class Broken:
        period_s = 0.001
        name = "broken"
        needs: frozenset[Any] = frozenset()

        def initial(self) -> None:
            return None

        def decide(self, *_: Any) -> Any:
            nonlocal ticks
            ticks += 1
            raise ValueError("bad control")

    system = replace(make_system("arrow"), controllers=(Broken(),), window_s=0.001)
    cluster = await start(system, instances=3)
    await cluster.until(lambda: ticks > 2)
    assert "bad control" in caplog.text


async def test_a_timer_that_comes_early_does_not_end_control(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    later = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda delay, *rest, **named: later(0.9 * delay, *rest, **named))
    cluster = await start(replace(make_system("static"), window_s=0.01), instances=2)
    plane = cluster.gateway.dispatcher.plane
    first_s = plane.window_ends_s
    await cluster.until(lambda: plane.window_ends_s > first_s + 0.035)


async def test_an_http_1_0_client_gets_its_stream(start: Start) -> None:
    cluster = await start("static")
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, port)
    body = orjson.dumps(BODY | {"stream": True})
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head, _, raw = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    assert b"200 OK" in head and b"chunked" not in head.lower()
    events = [orjson.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    assert [t for e in events for t in e["choices"][0]["token_ids"]] == [
        token_at(PROMPT, p) for p in range(12)
    ]
    assert raw.endswith(b"data: [DONE]\n\n")
