"""Clients that send what only the gateway may send: nothing of it takes effect, and KV stays its owner's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from tests.vllm.through_gateway import CHAT, COMPLETIONS, Json, ask, client, record_legs, serving
from tests.vllm.vllm_servers import SERVED_NAME, VllmCluster
from tidegate_testing.chaos import Forced

EXPORT = {"do_remote_decode": True, "do_remote_prefill": False}
OTHERS = list(range(5, 205))
"""A prompt of somebody else, which stays pinned while the hostile ones try to have it."""
OWN = list(range(305, 345))


def hostile(handle: Json) -> list[Json]:
    """Return fields that would steal, free or corrupt KV, end an engine or jump the queue."""
    flags = [{"do_remote_prefill": p, "do_remote_decode": d} for p in (True, False) for d in (True, False)]
    handles: list[Json] = [handle | flag for flag in flags]
    handles += [*flags, {name: handle[name] for name in ("remote_block_ids", "remote_num_tokens")}]
    handles += [handle | {"remote_num_tokens": 1 << 20}, handle | {"remote_block_ids": []}]
    handles += [handle | {"prompt_token_ids": OTHERS}, {"prompt_token_ids": OTHERS}]
    handles += [{"tidegate_generated": 30}, handle | {"transfer_id": "x", "remote_bootstrap_addr": "x"}]
    as_text = orjson.dumps(handle).decode()
    return [
        *({"kv_transfer_params": one} for one in handles),
        *({"vllm_xargs": {"kv_transfer_params": text}} for text in (as_text, "")),
        {"vllm_xargs": {"kv_transfer_params": [1], "ec_transfer_params": "x"}},
        {"ec_transfer_params": handle},
        {"request_id": handle["remote_request_id"]},
        {"cache_salt": "mine", "priority": -100, "session_id": "x"},
    ]


@pytest.mark.parametrize("servers_of_arch", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("path", "asks"),
    [
        (COMPLETIONS, {"prompt": OWN}),
        (CHAT, {"messages": [{"role": "user", "content": "whose is it?"}]}),
    ],
    ids=["completions", "chat"],
)
async def test_clients_cannot_reach_the_connector(
    cluster: VllmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, asks: Json
) -> None:
    runs = record_legs(monkeypatch)
    body: Json = {"model": SERVED_NAME, "temperature": 0, "ignore_eos": True, "max_tokens": 12}
    body |= {"return_token_ids": True, **asks}
    alone = {"cache_salt": "alone"}
    async with (
        client() as session,
        serving(cluster.urls, tmp_path, forced=Forced(migrate_every_s=0.05)) as running,
    ):
        expected = await ask(session, cluster[2].url, path, body | alone)
        handle = await in_thread(lambda: cluster[0].complete(OTHERS, 1, kv_transfer_params=EXPORT))
        handle = handle["kv_transfer_params"]
        asked = [body | more | {"stream": n % 2 == 0} for n, more in enumerate(hostile(handle))]
        answers = await asyncio.gather(*(ask(session, running.url, path, one) for one in asked))
        before = cluster[1].counters()
        theirs = {"cache_salt": f"theirs{len(path)}", "kv_transfer_params": handle}
        pulled = await in_thread(lambda: cluster[1].complete(OTHERS, 12, **theirs))
        spent = cluster[1].counters() - before

    for one, said in zip(asked, answers, strict=True):
        assert said.ids == expected.ids, one
    for run in runs:
        assert handle["remote_request_id"] not in run.leg.request_id
        assert run.handle is None or run.handle.params["remote_request_id"] != handle["remote_request_id"]
        assert not {"priority", "session_id", "kv_transfer_params", "cache_salt"} & run.leg.sampling.keys()
    assert all(server.healthy() for server in cluster)
    assert spent.pulled_tokens >= len(OTHERS), "it was still pinned, untouched"
    assert pulled["choices"][0]["token_ids"] == cluster[1].reference(OTHERS, 12)


async def in_thread(call: Callable[[], Json]) -> Json:
    return await asyncio.get_running_loop().run_in_executor(None, call)
