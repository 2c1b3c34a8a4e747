"""What a running vLLM server says about itself over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tidegate.core.errors import SetupError
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.fleet.member import Capabilities, Member

BLOCK_TOKENS = 16
"""vLLM's default block size, for a server that shows no metrics."""
_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(.*)\}\s", re.MULTILINE)
_STARTED = re.compile(r"^process_start_time_seconds\s+(\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class NotReady(Exception):
    """The server cannot be described yet; asking again later may succeed."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The first model a server lists, its context length and its KV cache.

    ``connector`` is the KV connector its metrics show: ``nixl``, or "" for none that shows any. ``started``
    tells one life of the server from the next; "" when it does not say.
    """

    model: str
    max_model_len: int
    block_tokens: int
    kv_capacity_tokens: int
    connector: str = ""
    started: str = ""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV cache of one server, summed over its data-parallel engines."""

    block_tokens: int
    capacity_tokens: int


def vllm_member(
    name: str,
    url: str,
    facts: ServerFacts,
    *,
    engine_id: str,
    api_key: str,
    profile: Profile | None,
    connector: str,
    bidirectional: bool,
    lease_s: float,
    bootstrap_url: str,
    kv_engine_id: str,
    fixed_role: Role | None = None,
    pid: int | None = None,
) -> Member:
    """Return the member that a server is; ``connector`` is "" for one that hands on no KV."""
    return Member(
        instance=Instance(
            name,
            facts.kv_capacity_tokens,
            facts.max_model_len,
            facts.block_tokens,
            flippable=fixed_role is None,
        ),
        url=url,
        model=facts.model,
        engine_id=engine_id,
        profile=profile,
        api_key=api_key,
        kind="vllm",
        pid=pid,
        capabilities=Capabilities(
            kv_transfer=bool(connector),
            continues=False,
            extends_kv=connector == "nixl" and bidirectional,
            orders=False,
            tells_load=True,
        ),
        connector=connector,
        lease_s=lease_s,
        bootstrap_url=bootstrap_url if connector == "mooncake" else "",
        kv_engine_id=kv_engine_id,
        fixed_role=fixed_role,
    )


async def ask_server(
    session: aiohttp.ClientSession, url: str, api_key: str, deadline_s: float
) -> ServerFacts:
    """Ask ``/v1/models`` and ``/metrics``.

    Without usable metrics the capacity is ``max_model_len``, which vLLM guarantees at its start.
    Raises NotReady when the server does not answer properly yet, SetupError when it never will.
    """
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with session.get(f"{url}/v1/models", headers=headers, timeout=timeout) as response:
            if response.status in (401, 403):
                raise SetupError(
                    f"{url} answers /v1/models with {response.status}: it wants an API key; "
                    "set TIDEGATE_VLLM_API_KEY or fleet.vllm_api_key"
                )
            if response.status == 404:
                raise SetupError(f"{url} has no /v1/models: it is not an OpenAI-compatible server")
            if response.status != 200:
                raise NotReady(f"/v1/models answers {response.status}")
            model, max_model_len = _first_model(url, await response.read())
        async with session.get(f"{url}/metrics", timeout=timeout) as response:
            metrics = await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NotReady(str(error) or type(error).__name__) from None
    cache = parse_cache_config(metrics) or CacheConfig(BLOCK_TOKENS, max_model_len)
    began = _STARTED.search(metrics)
    return ServerFacts(
        model,
        max_model_len,
        cache.block_tokens,
        max(cache.capacity_tokens, max_model_len),
        "nixl" if "\nvllm:nixl_" in metrics else "",
        began.group(1) if began else "",
    )


async def ask_bootstrap(session: aiohttp.ClientSession, url: str, deadline_s: float) -> str:
    """Return the engine id under which MooncakeConnector's peers pull from the server.

    Raises NotReady when its bootstrap server does not answer properly yet, SetupError when there are several
    engines behind it: nobody could tell which of them holds a request's KV.
    """
    timeout = aiohttp.ClientTimeout(total=deadline_s)
    try:
        async with session.get(f"{url}/query", timeout=timeout) as response:
            if response.status != 200:
                raise NotReady(f"its Mooncake bootstrap server {url} answers /query with {response.status}")
            engines = {str(entry["engine_id"]) for entry in orjson.loads(await response.read()).values()}
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        why = str(error) or type(error).__name__
        raise NotReady(f"its Mooncake bootstrap server {url} does not answer: {why}") from None
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError):
        raise NotReady(f"{url} is no Mooncake bootstrap server") from None
    if len(engines) > 1:
        raise SetupError(
            f"{url} names {len(engines)} data-parallel engines, and MooncakeConnector does not say which of "
            "them holds a request's KV: start each as a server of its own (--data-parallel-external-lb)"
        )
    if not engines:
        raise NotReady(f"its Mooncake bootstrap server {url} knows no engine yet")
    return engines.pop()


def parse_cache_config(metrics: str) -> CacheConfig | None:
    """Read ``vllm:cache_config_info`` from Prometheus text; None when absent or without numbers."""
    block_tokens = capacity = 0
    for found in _CACHE_INFO.finditer(metrics):
        labels = dict(_LABEL.findall(found.group(1)))
        size, blocks = labels.get("block_size", ""), labels.get("num_gpu_blocks", "")
        if not (size.isdigit() and blocks.isdigit()):
            return None
        block_tokens = int(size)
        capacity += int(size) * int(blocks)
    return CacheConfig(block_tokens, capacity) if block_tokens and capacity else None


def _first_model(url: str, body: bytes) -> tuple[str, int]:
    try:
        first: dict[str, Any] = orjson.loads(body)["data"][0]
        model = str(first["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise SetupError(f"{url}/v1/models lists no model") from None
    length = first.get("max_model_len")
    if not isinstance(length, int) or length <= 0:
        raise SetupError(
            f"{url}/v1/models gives no max_model_len for {model}: tidegate needs vLLM's own server"
        )
    return model, length
