"""What a server refuses keeps its class in whatever form it comes; only faults of servers are tried again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm_contract.contract_bench import Json, alone, bench
from tests.vllm_contract.strict_vllm import VOCAB
from tidegate.bench.endpoint import probe_endpoint
from tidegate.bench.settings import BenchSettings
from tidegate.core.errors import (
    BadRequest,
    EngineBusy,
    EngineFault,
    PromptTooLong,
    TidegateError,
    UnknownModel,
)
from tidegate.engines.dialect import refusal
from tidegate.engines.seam import Leg
from tidegate.workloads.prompts import TokenPrompts

PROMPT = [1, 2, 3]
WRONG: list[tuple[str, Any]] = [
    ("prompt", [1, VOCAB]),
    ("stop_token_ids", [VOCAB]),
    ("allowed_token_ids", [VOCAB]),
    ("logit_bias", {str(VOCAB): 1}),
]


@pytest.mark.parametrize("system", ["static", "colocated"])
@pytest.mark.parametrize("max_tokens", [1, 4])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda case: case[0])
async def test_a_clients_mistake_is_said_once(system: str, max_tokens: int, wrong: tuple[str, Any]) -> None:
    async with bench(system) as it:
        for stream in (False, True):
            body: Json = {"prompt": PROMPT, "max_tokens": max_tokens, "stream": stream, wrong[0]: wrong[1]}
            status, error, before = await it.refused(body)
            assert (status, before) == (400, 0)
            assert error["type"] == "invalid_request_error"
            assert error["message"] == f"{wrong[0]}: token id {VOCAB} is out of vocabulary"
        assert sum(len(server.bodies) for server in it.servers) == 2
        assert it.metric("tidegate_requests_total", outcome="bad_request") == 2


@pytest.mark.parametrize("system", ["static", "colocated"])
@pytest.mark.parametrize("behind", [0, 3])
async def test_a_refusal_in_a_stream_ends_it_as_what_it_is(system: str, behind: int) -> None:
    async with bench(system) as it:
        for server in it.servers:
            server.ends_with = (behind, 400)
        status, error, before = await it.refused({"prompt": PROMPT, "max_tokens": 9, "stream": True})
        assert (status == 400) == (before == 0)
        assert (error["type"], error["message"]) == ("invalid_request_error", "it went wrong")
        assert sum(len(server.bodies) for server in it.servers) == (2 if system == "static" else 1)


@pytest.mark.parametrize("system", ["static", "colocated"])
@pytest.mark.parametrize("code", [500, 503])
async def test_a_fault_in_a_stream_is_tried_elsewhere(system: str, code: int) -> None:
    body: Json = {"prompt": PROMPT, "max_tokens": 9, "stream": True}
    async with bench(system) as it:
        for server in it.servers[:-1]:
            server.ends_with = (2, code)
        assert await it.ask(body) == alone(body)
        if system == "colocated":
            for server in it.servers:
                server.ends_with = (0, code)
            status, error, _ = await it.refused(body)
            assert (status, error["code"]) == ((502, "engine_fault") if code == 500 else (503, "engine_busy"))


@pytest.mark.parametrize("system", ["static", "colocated"])
async def test_bench_finds_the_vocabulary_behind_the_gateway(system: str) -> None:
    async with bench(system) as it:
        endpoint = await probe_endpoint(it.client, BenchSettings(it.url))
        assert endpoint.prompts == TokenPrompts(VOCAB, low=VOCAB // 8, seed=0)
        assert it.metric("tidegate_replays_total", reason="engine_fault") == 0


LEG = Leg("r", [1], None, 4, {"logit_bias": {}})
CONTINUED = Leg("r", [1, 2], None, 4, {"logit_bias": {}}, generated=1)
ANSWERS: list[tuple[Json, int | None, Leg, type[TidegateError]]] = [
    ({"error": {"message": "m", "code": 400}}, None, LEG, BadRequest),
    ({"error": {"message": "m", "code": "invalid_value"}}, None, LEG, BadRequest),
    ({"error": {"message": "m", "code": "context_length_exceeded"}}, None, LEG, PromptTooLong),
    (
        {"error": {"message": "This model's maximum context length is 9", "code": 400}},
        None,
        LEG,
        PromptTooLong,
    ),
    ({"error": {"message": "m", "code": "shutting_down"}}, None, LEG, EngineBusy),
    ({"error": {"message": "m", "code": 503}}, None, LEG, EngineBusy),
    ({"error": "m"}, None, LEG, EngineFault),
    ({}, 501, LEG, BadRequest),
    ({}, 422, LEG, BadRequest),
    ({}, 404, LEG, UnknownModel),
    ({}, 429, LEG, EngineBusy),
    ({}, 401, LEG, EngineFault),
    ({"error": {"message": "m", "param": "logit_bias"}}, 400, CONTINUED, BadRequest),
    ({"error": {"message": "m", "param": None}}, 400, CONTINUED, BadRequest),
    ({"error": {"message": "m", "param": "prompt"}}, 400, CONTINUED, EngineFault),
    ({"error": {"message": "m", "param": "kv_transfer_params.remote_port"}}, 400, CONTINUED, EngineFault),
    ({"error": {"message": "m", "code": "context_length_exceeded"}}, 400, CONTINUED, EngineFault),
]


@pytest.mark.parametrize(("answer", "status", "leg", "expected"), ANSWERS)
def test_what_an_error_answer_means(
    answer: Json, status: int | None, leg: Leg, expected: type[TidegateError]
) -> None:
    assert type(refusal(answer, leg, status)) is expected
