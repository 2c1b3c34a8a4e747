"""Every parameter through the gateway and to a server itself: the same answer, or refusal, said once."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import orjson
import pytest

from tests.vllm.through_gateway import CHAT, COMPLETIONS, Json, ask, client, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster
from tests.vllm_contract.parameter_examples import asking
from tests.vllm_contract.strict_vllm import KNOWN
from tidegate.protocol.parameters import PARAMETERS, Fate
from tidegate_testing.chaos import NOT_FORCED, Forced

PATHS = {False: COMPLETIONS, True: CHAT}
SCHEMAS = {"completions": "CompletionRequest", "chat": "ChatCompletionRequest"}
TOO_LARGE = 999_999
WRONG: list[Json] = [
    {"prompt": [5, TOO_LARGE]},
    {"stop_token_ids": [TOO_LARGE]},
    {"allowed_token_ids": [TOO_LARGE]},
    {"logit_bias": {str(TOO_LARGE): 1}},
    {"structured_outputs": {"regex": "(["}},
    {"structured_outputs": {"grammar": "root ::= ("}},
    {"structured_outputs": {"json": {"type": "no such type"}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
    {"structured_outputs": {}},
    {"logprob_token_ids": [1]},
    {"logprobs": 20, "logprob_token_ids": [TOO_LARGE]},
    {"bad_words": [""]},
]
WAYS = {"one leg": ("colocated", NOT_FORCED), "moved": ("static", Forced(migrate_every_s=0.01))}
llama_only = pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)


@llama_only
def test_the_table_has_what_this_vllm_documents(cluster: VllmCluster) -> None:
    with urllib.request.urlopen(f"{cluster[0].url}/openapi.json") as answer:
        schemas = orjson.loads(answer.read())["components"]["schemas"]
    for kind, schema in SCHEMAS.items():
        assert sorted(schemas[schema]["properties"]) == KNOWN[kind]


@llama_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chat", [False, True])
async def test_every_parameter_does_what_it_does_on_one_server(
    cluster: VllmCluster, tmp_path: Path, way: str, chat: bool
) -> None:
    system, forced = WAYS[way]
    table = PARAMETERS[chat]
    names = [
        name for name in KNOWN["chat" if chat else "completions"] if name not in ("echo", "stream_options")
    ]
    async with client() as session, serving(cluster.urls, tmp_path, system=system, forced=forced) as running:
        for name in names:
            if table[name].fate in (Fate.REFUSED, Fate.NOTHING):
                continue
            body = asking(name, chat=chat) | {"model": SERVED_NAME, "return_token_ids": True}
            alone = await ask(session, cluster[0].url, PATHS[chat], body | {"cache_salt": "alone"})
            said = await ask(session, running.url, PATHS[chat], body)
            assert said.status == alone.status, (name, said, alone)
            if said.status != 200:
                assert said.error["message"] == alone.error["message"], name
            elif name != "temperature":
                assert said.told() == alone.told(), name
        assert running.metric("tidegate_replays_total") == 0


@llama_only
@pytest.mark.parametrize("way", WAYS)
async def test_a_clients_mistake_is_said_once_in_vllms_words(
    cluster: VllmCluster, tmp_path: Path, way: str
) -> None:
    system, forced = WAYS[way]
    async with client() as session, serving(cluster.urls, tmp_path, system=system, forced=forced) as running:
        for wrong in WRONG:
            for more in ({"max_tokens": 1}, {"max_tokens": 4}, {"max_tokens": 4, "stream": True}):
                body = {"model": SERVED_NAME, "prompt": [5, 6, 7], **wrong, **more}
                alone = await ask(session, cluster[0].url, COMPLETIONS, body | {"stream": False})
                said = await ask(session, running.url, COMPLETIONS, body)
                assert (alone.status, said.status) == (400, 400), (wrong, said, alone)
                assert said.error["type"] == "invalid_request_error"
                assert said.error["message"] == alone.error["message"]
        assert running.metric("tidegate_replays_total") == 0


@llama_only
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chat", [False, True])
async def test_prompt_logprobs_are_those_of_one_server(
    cluster: VllmCluster, tmp_path: Path, way: str, chat: bool
) -> None:
    system, forced = WAYS[way]
    async with client() as session, serving(cluster.urls, tmp_path, system=system, forced=forced) as running:
        for asked in (0, 2):
            for most in (1, 40):
                body = asking("prompt_logprobs", chat=chat) | {"prompt_logprobs": asked, "max_tokens": most}
                answers = []
                for url in (cluster[0].url, running.url):
                    async with session.post(
                        url + PATHS[chat], json={"model": SERVED_NAME} | body
                    ) as response:
                        answer = await response.json()
                    told = (answer if chat else answer["choices"][0])["prompt_logprobs"]
                    answers.append(
                        [item and {token: row["rank"] for token, row in item.items()} for item in told]
                    )
                assert answers[0] == answers[1] and len(answers[0]) > 7
        assert running.metric("tidegate_replays_total") == 0
