"""Greedy requests of every kind that has to stay whole: endpoints, prompts, ends, bytes of characters."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.vllm.through_gateway import CHAT, COMPLETIONS, Said, ask
from tests.vllm.vllm_servers import SERVED_NAME, VllmServer

Json = dict[str, Any]
LETTERS = "abcdefghij klmnop qrst. éüßñ 漢字かな Жд 😀🌊"
PIECES = "ЖΩ€🌍"
"""Characters that the tiny tokenizers have as two to four tokens, one per byte."""
AT_ONCE = 8


@dataclass
class Asked:
    """A request, and what one server alone answers to it."""

    path: str
    body: Json
    expected: Said


def _prompt(chance: random.Random, path: str) -> Json:
    length = chance.choice((chance.randint(1, 40), chance.randint(20, 400)))
    text = "".join(chance.choice(LETTERS) for _ in range(length))
    if path == CHAT:
        more = [{"role": "assistant", "content": text[: length // 2]}, {"role": "user", "content": "?"}]
        return {"messages": [{"role": "user", "content": text}, *(more if chance.random() < 0.3 else [])]}
    if chance.random() < 0.25:
        return {"prompt": text}
    return {"prompt": [chance.randrange(5, 512) for _ in range(length)]}


def _body(chance: random.Random, path: str, pieces: Sequence[int]) -> Json:
    body: Json = {"model": SERVED_NAME, "temperature": 0, "return_token_ids": True, **_prompt(chance, path)}
    body["max_tokens"] = 1 if chance.random() < 0.05 else chance.randint(2, 90)
    if chance.random() < 0.6:
        body["ignore_eos"] = True
    if chance.random() < 0.15:
        body |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    if chance.random() < 0.25:
        # Only bytes of these characters: most of them come in several tokens, many never complete.
        body["logit_bias"] = {str(token): 60 for token in pieces}
    if path == COMPLETIONS and "logprobs" not in body and chance.random() < 0.05:
        del body["max_tokens"]
    if chance.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _stopped(chance: random.Random, body: Json, said: Said) -> Json:
    """Return the request with an end somewhere in the answer that it has without one."""
    half = len(said.ids) // 2
    if chance.random() < 0.3:
        body = body | {"stop_token_ids": [said.ids[half]]}
    else:
        begin = chance.randrange(len(said.text))
        stop = said.text[begin : begin + chance.randint(1, 6)]
        body = body | {"stop": [stop, "never said"], "include_stop_str_in_output": chance.random() < 0.3}
    return body | {"min_tokens": chance.randint(1, half)} if chance.random() < 0.3 else body


async def mixed_requests(
    session: aiohttp.ClientSession, server: VllmServer, count: int, seed: int
) -> list[Asked]:
    """Make ``count`` requests, and have ``server`` answer them alone. Their KV there has a salt of its own,
    so that no other request finds it."""
    chance = random.Random(seed)
    tokenised = server.post(
        "/tokenize", {"model": SERVED_NAME, "prompt": PIECES, "add_special_tokens": False}
    )
    pieces: list[int] = sorted(set(tokenised["tokens"]))
    assert len(pieces) > len(PIECES)
    drawn = []
    for _ in range(count):
        path = CHAT if chance.random() < 0.4 else COMPLETIONS
        drawn.append((path, _body(chance, path, pieces), chance.random() < 0.25))
    free = asyncio.Semaphore(AT_ONCE)

    async def alone(path: str, body: Json) -> Said:
        async with free:
            said = await ask(session, server.url, path, body | {"cache_salt": f"alone-{seed}"})
        assert said.status == 200 and not said.error, (body, said.error)
        return said

    async def asked(path: str, body: Json, stop_seed: int | None) -> Asked:
        said = await alone(path, body)
        if stop_seed is not None and len(said.text) > 3 and len(said.ids) > 3:
            body = _stopped(random.Random(stop_seed), body, said)
            said = await alone(path, body)
        return Asked(path, body, said)

    return list(
        await asyncio.gather(
            *(
                asked(path, body, index if stopped else None)
                for index, (path, body, stopped) in enumerate(drawn)
            )
        )
    )
