"""Answers of several choices: a list of prompts, or ``n`` of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.gateway.gateway_cluster import Start

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
ASKED = {"max_tokens": 6, "temperature": 0}


def outcomes(path: Path) -> list[dict[str, Any]]:
    rows = [orjson.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]
    return [row for row in rows if row["type"] == "outcome"]


async def test_every_prompt_of_a_list_gets_a_choice(start: Start, tmp_path: Path) -> None:
    cluster = await start("static", instances=3)
    apart = [(await cluster.post("/v1/completions", {"prompt": p, **ASKED}))[1] for p in PROMPTS]
    asked = {"prompt": PROMPTS, "return_token_ids": True, **ASKED}
    _, together, _ = await cluster.post("/v1/completions", asked)
    choices = together["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["text"] for choice in choices] == [one["choices"][0]["text"] for one in apart]
    assert [choice["prompt_token_ids"] for choice in choices] == PROMPTS
    assert (together["usage"]["prompt_tokens"], together["usage"]["completion_tokens"]) == (9, 18)
    events = await cluster.stream({**asked, "stream_options": {"include_usage": True}})
    texts, ends = ["", "", ""], []
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
            ends += [choice["index"]] * (choice["finish_reason"] == "length")
    assert texts == [choice["text"] for choice in choices]
    assert sorted(ends) == [0, 1, 2]
    assert {event["id"] for event in events} == {events[0]["id"]}
    assert events[-1]["usage"]["total_tokens"] == 27
    await cluster.gateway.stop()
    assert len({row["request"] for row in outcomes(tmp_path)}) == 9


@pytest.mark.parametrize("chat", [False, True])
async def test_choices_of_one_prompt_differ_by_their_seeds(start: Start, chat: bool) -> None:
    cluster = await start("colocated")
    prompt = {"messages": [{"role": "user", "content": "abc"}]} if chat else {"prompt": "abc"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    for body in ({"seed": 2**63 - 1}, {}):
        for engine in cluster.engines.values():
            engine.bodies.clear()
        status, answer, _ = await cluster.post(path, prompt | body | {"n": 3, "max_tokens": 4})
        assert (status, [choice["index"] for choice in answer["choices"]]) == (200, [0, 1, 2])
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 12)
        seeds = {sent["seed"] for engine in cluster.engines.values() for sent in engine.bodies}
        assert len(seeds) == 3
        assert "seed" not in body or seeds == {2**63 - 1, -(2**63), 1 - 2**63}
    events = await cluster.stream(prompt | {"n": 2, "max_tokens": 4}, path)
    if chat:
        roles = [c["index"] for e in events for c in e["choices"] if c["delta"].get("role")]
        assert sorted(roles) == [0, 1]


async def test_a_choice_that_is_refused_ends_the_others(start: Start) -> None:
    cluster = await start("static", context=100, step_s=0.01)
    body = {"prompt": [[1], [1] * 99], "max_tokens": 50}
    for stream in (False, True):
        status, answer, _ = await cluster.post("/v1/completions", body | {"stream": stream})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    await cluster.until(lambda: cluster.live() == 0 and cluster.streams() == 0)
