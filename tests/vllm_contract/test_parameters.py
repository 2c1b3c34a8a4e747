"""The table of parameters, walked: what becomes of each on one leg, on two, and when the decode moves."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.vllm_contract.contract_bench import Bench, Json, alone, bench
from tests.vllm_contract.parameter_examples import EXAMPLES, asking
from tests.vllm_contract.strict_vllm import KNOWN, MODEL, prompt_logprobs, prompt_of
from tidegate.core.decision import Migrate
from tidegate.protocol.parameters import PARAMETERS, PASSED, Fate, Parameter

ALL = [(chat, name) for chat in (False, True) for name in PARAMETERS[chat]]
GO = {fate: [(c, n) for c, n in ALL if PARAMETERS[c][n].fate is fate] for fate in Fate}
SERVED = [(chat, name) for fate in PASSED for chat, name in GO[fate]]
PAGE = Path(__file__).parents[2] / "docs" / "parameters.md"
Case = tuple[bool, str]


def named(case: Case) -> str:
    return f"{'chat' if case[0] else 'completions'}-{case[1]}"


def legs(it: Bench) -> list[Json]:
    """Return the bodies of the legs in the order in which they were sent."""
    bodies = [body for server in it.servers for body in server.bodies]
    return sorted(bodies, key=lambda body: int(body["request_id"].rpartition("-")[2]))


async def ask_moving(it: Bench, body: Json) -> Any:
    """Ask, and have the decode move whenever it can."""
    dispatcher = it.gateway.dispatcher
    task = asyncio.create_task(it.ask(body))
    while not task.done():
        for request, live in list(dispatcher.plane.requests.items()):
            src = live.decode_on or live.prefill_on
            if src is not None:
                dst = next(name for name in dispatcher.plane.ledger.ids if name != src)
                dispatcher.act([Migrate(request, src, dst, "told so")])
        await asyncio.sleep(0)
    return await task


def test_the_table_has_what_vllm_documents_and_passes_on_nothing_else() -> None:
    for chat, kind in ((False, "completions"), (True, "chat")):
        assert set(KNOWN[kind]) <= PARAMETERS[chat].keys()
        passed = {name for name, parameter in PARAMETERS[chat].items() if parameter.fate in PASSED}
        assert passed <= set(KNOWN[kind])
        assert PARAMETERS[chat].keys() <= EXAMPLES.keys()


@pytest.mark.parametrize("case", SERVED, ids=named)
@pytest.mark.parametrize("way", ["one leg", "two legs", "moved"])
async def test_what_engines_get(way: str, case: Case) -> None:
    chat, name = case
    body = asking(name, chat=chat)
    async with bench("colocated" if way == "one leg" else "static") as it:
        said = await ask_moving(it, body) if way == "moved" else await it.ask(body)
        sent = legs(it)
        if name not in ("max_completion_tokens", "suffix"):
            assert said == alone(body | {"max_tokens": body["max_tokens"]})
        assert it.breaches() == []
        moved = it.metric("tidegate_migrations_total", event="done")
        fate = PARAMETERS[chat][name].fate
        if fate in (Fate.EVERY, Fate.GUARDED, Fate.STATE) and name != "tool_choice":
            assert all(leg[name] == body[name] for leg in sent)
        if way == "one leg":
            assert len(sent) == 1
        elif fate is Fate.STATE and name != "seed":
            assert [prompt_of(leg) for leg in sent] == [prompt_of(body)] * 2 and not moved
        elif fate is Fate.ONCE:
            assert [name in leg for leg in sent] == [True] + [False] * (len(sent) - 1)
            assert moved or way == "two legs"
        else:
            assert len(prompt_of(sent[1])) >= len(prompt_of(body))
            assert moved or way == "two legs"


@pytest.mark.parametrize("case", GO[Fate.REFUSED], ids=named)
async def test_what_is_refused_and_in_which_words(case: Case) -> None:
    chat, name = case
    async with bench("static") as it:
        status, error, _ = await it.refused(asking(name, chat=chat))
        assert (status, error["param"]) == (400, name)
        assert error["message"] == f"{name}: not supported: {PARAMETERS[chat][name].words}"
        for neutral in PARAMETERS[chat][name].neutral:
            body = asking(name, chat=chat) | {name: neutral}
            assert await it.ask(body) == alone(body)
        assert it.breaches() == []


@pytest.mark.parametrize("case", GO[Fate.NOTHING], ids=named)
async def test_what_changes_nothing(case: Case) -> None:
    chat, name = case
    async with bench("static") as it:
        body = asking(name, chat=chat)
        assert await it.ask(body) == alone(body)
        sent = legs(it)
        assert len(sent) == 2 and b"theirs" not in orjson.dumps(sent)
        assert all(leg.get(name) != body[name] for leg in sent)


@pytest.mark.parametrize("system", ["static", "colocated"])
@pytest.mark.parametrize("chat", [False, True])
async def test_prompt_logprobs_are_those_of_the_prefill(system: str, chat: bool) -> None:
    for asked in (0, 1):
        async with bench(system) as it:
            for most in (1, 12):
                body = asking("prompt_logprobs", chat=chat) | {"prompt_logprobs": asked, "max_tokens": most}
                path = "/v1/chat/completions" if chat else "/v1/completions"
                async with it.client.post(it.url + path, json={"model": MODEL} | body) as response:
                    answer = await response.json()
                told = answer if chat else answer["choices"][0]
                assert told["prompt_logprobs"] == prompt_logprobs(prompt_of(body))
            status, error, _ = await it.refused(body | {"stream": True})
            assert (status, error["param"]) == (400, "prompt_logprobs")
            assert it.breaches() == []


async def test_unknown_parameters_are_named() -> None:
    async with bench("static") as it:
        for chat in (False, True):
            body = asking("user", chat=chat)
            status, error, _ = await it.refused(body | {"temprature": 1, "top_a": 2})
            assert (status, error["param"]) == (400, "temprature")
            assert error["message"] == "unknown parameters: temprature, top_a"
            assert await it.ask(body | {"temprature": None}) == alone(body)


def rows(chat: bool) -> str:
    """Return the table of an endpoint as the page has it."""

    def row(name: str, parameter: Parameter) -> str:
        where = parameter.fate.value
        neutral = ", ".join(f"`{orjson.dumps(value).decode()}`" for value in parameter.neutral)
        cells = [f"`{name}`", where.one_leg, where.two_legs, where.moved, neutral, parameter.words]
        return f"| {' | '.join(cells)} |"

    head = ["| parameter | one leg | two legs | after a migration | asks for nothing | |", "| --- " * 6 + "|"]
    return "\n".join([*head, *(row(name, parameter) for name, parameter in sorted(PARAMETERS[chat].items()))])


@pytest.mark.parametrize("chat", [False, True])
def test_the_page_has_the_table(chat: bool) -> None:
    assert rows(chat) in PAGE.read_text()
