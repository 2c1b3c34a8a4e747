"""Conversations whose clients send no session id: known by what they repeat, and never another tenant's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.gateway_cluster import Cluster, Start
from tidegate.core.slo import Slo
from tidegate.gateway.call import TokenEstimate, read_calls
from tidegate.gateway.prompt_keys import KeptAnswer, prompt_blocks, with_answer
from tidegate.gateway.settings import GatewaySettings
from tidegate.protocol.chunks import Tokens

Json = dict[str, Any]
SETTINGS = GatewaySettings(trusted_proxies=("127.0.0.0/8",))
CHAT = "/v1/chat/completions"


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Json:
    return {"role": "assistant", "content": text, **more}


async def say(cluster: Cluster, messages: list[Json], *, stream: bool = False, tenant: str = "a") -> str:
    """Have a turn answered, and return its text."""
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    if stream:
        assert tenant == "a"
        events = await cluster.stream(body, CHAT)
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    status, answer, _ = await cluster.post(CHAT, body, **{"x-tenant-id": tenant} if tenant != "a" else {})
    assert status == 200
    text: str = answer["choices"][0]["message"]["content"]
    return text


def turns(cluster: Cluster) -> list[int]:
    """How many turns each session has had, in the order in which they were last heard of."""
    rows = cluster.gateway.dispatcher.plane.snapshot(0.0).sessions
    assert not rows.live.any()
    return [int(turns) for turns in rows.turns]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_known_by_its_messages(start: Start, stream: bool) -> None:
    cluster = await start("ampd-cost", instances=3, settings=SETTINGS)
    chat = [{"role": "system", "content": "Be brief."}, user("Where do tides come from?")]
    for number in range(3):
        text = await say(cluster, chat, stream=stream)
        chat = [*chat, assistant(text.strip() if number else text), user(f"And number {number}?")]
        await say(cluster, [*chat[:1], user(f"Something else, {number}")], stream=stream)
    assert turns(cluster) == [1, 1, 3, 1] and cluster.live() == 0
    held = cluster.gateway.dispatcher.plane.ledger.sessions
    entry = next(e for name in ("i0", "i1", "i2") for e in held.bound_to(name) if e.turns == 3)
    expected = sum(len(message["content"]) for message in chat[:-2])
    assert expected <= entry.context_tokens <= expected + 12, "the fake engine's tokens are bytes"


async def test_two_that_are_told_the_same_are_no_error_and_go_their_own_ways(start: Start) -> None:
    cluster = await start("ampd-cost", instances=3, settings=SETTINGS)
    opening = [user("Once upon a time")]
    text = await say(cluster, opening)
    assert await say(cluster, opening) == text
    both = [*opening, assistant(text)]
    first = await say(cluster, [*both, user("left")])
    second = await say(cluster, [*both, user("right")])
    await say(cluster, [*both, user("left"), assistant(first), user("left again")])
    await say(cluster, [*both, user("right"), assistant(second), user("right again")])
    assert sorted(turns(cluster)) == [1, 2, 3], "who is last has the one that both could have had"


async def test_another_tenant_that_repeats_a_chat_has_none_of_it(start: Start) -> None:
    cluster = await start("ampd-cost", instances=3, settings=SETTINGS)
    opening = [user("Once upon a time")]
    chat = [*opening, assistant(await say(cluster, opening)), user("and then?")]
    await say(cluster, chat, tenant="b")
    assert turns(cluster) == [1, 1]
    await say(cluster, chat)
    assert turns(cluster) == [1, 2]


async def test_a_text_prompt_that_repeats_its_answer_is_known(start: Start) -> None:
    cluster = await start("ampd-cost", instances=3, settings=SETTINGS)
    prompt = "tell me a long story. " * 10
    for _ in range(3):
        body = {"prompt": prompt, "max_tokens": 80, "temperature": 0}
        _, answer, _ = await cluster.post("/v1/completions", body)
        prompt += answer["choices"][0]["text"] + " and now on."
    assert turns(cluster) == [3]
    await cluster.post("/v1/completions", {"prompt": "tell me a long story. " * 10 + "now", "max_tokens": 80})
    assert turns(cluster) == [3, 1]


class Silent:
    def tokens(self, tokens: Tokens) -> None: ...

    def plain(self, text: str, token_ids: list[int]) -> None: ...


def begins(messages: list[Json], **more: Any) -> int | None:
    """What stands for a prompt's messages up to the newest answer."""
    (call,) = read_calls({"messages": messages, **more}, {}, chat=True, slo=Slo())
    return prompt_blocks(call, TokenEstimate(), followed=True).said


def ends(messages: list[Json], say: Callable[[KeptAnswer], None], **more: Any) -> int | None:
    """What stands for them and an answer that ``say`` gives."""
    (call,) = read_calls({"messages": messages, **more}, {}, chat=True, slo=Slo())
    kept = KeptAnswer(Silent())
    say(kept)
    blocks = prompt_blocks(call, TokenEstimate(), followed=True)
    return with_answer(blocks, call, [], kept).said


def call_of(name: str, arguments: str) -> Json:
    return {"id": "x", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_what_is_the_same_message() -> None:
    ask = [user("Is it raining?")]

    def plain(kept: KeptAnswer) -> None:
        kept.plain("<think>hm</think>", [1])
        kept.plain("\n\nYes. ", [2])

    end = ends(ask, plain)
    same = [assistant("Yes."), assistant("<think>hm</think>Yes."), assistant(None) | {"content": "Yes.\n"}]
    same += [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}], "refusal": None}]
    same += [assistant("Yes.", tool_calls=None), assistant("Yes.", tool_calls=[])]
    for said in same:
        assert begins([*ask, said, user("And now?")]) == end, said
    other = [assistant("Yes"), {"role": "user", "content": "Yes."}, assistant("Y es.")]
    for said in other:
        assert begins([*ask, said, assistant("x"), user("And now?")]) != end, said
        assert begins([*ask, said, user("And now?")]) != end, said
    assert begins([user("Is it snowing?"), same[0], user("And now?")]) != end
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert begins([*ask, same[0], user("And now?")], tools=tools) != end, "tools stand before all"


def test_calls_of_tools_are_compared_by_what_they_say() -> None:
    ask = [user("Is it raining?")]
    tools = [{"type": "function", "function": {"name": "look"}}]

    def calling(kept: KeptAnswer) -> None:
        head = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "look", "arguments": ""}}
        kept.tokens(Tokens("", [1], delta={"tool_calls": [head]}))
        for part in ('{"where": "out', 'side", "far": 1}'):
            kept.tokens(
                Tokens("", [1], delta={"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
            )

    end = ends(ask, calling, tools=tools)
    result = {"role": "tool", "tool_call_id": "x", "content": "wet"}

    def repeated(call: Any) -> int | None:
        return begins([*ask, assistant(None, tool_calls=[call]), result], tools=tools)

    assert repeated(call_of("look", '{"far":1,"where":"outside"}')) == end
    assert repeated(call_of("look", '{"far":2,"where":"outside"}')) != end
    assert repeated(call_of("see", '{"far":1,"where":"outside"}')) != end
    for broken in (call_of("look", "{"), {"function": 5}, "look"):
        assert repeated(broken) != end
