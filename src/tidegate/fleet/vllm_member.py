"""Members that are vLLM servers: how their KV moves, and the profiles that go with them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.errors import ConfigError, EngineError, EngineFault, SetupError
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import VllmClient
from tidegate.fleet.member import LEASE_S, MOONCAKE_LEASE_S, Capabilities, Member


@dataclass(frozen=True, slots=True)
class KvSetup:
    """How servers were started to hand KV on: ``nixl``, ``mooncake``, ``none``, or ``auto`` to look at their
    metrics, which show NIXL only.

    They pin KV for ``lease_s``, None for vLLM's default. ``bidirectional`` says that they have
    NixlConnector's ``bidirectional_kv_xfer``: without it, which nothing shows, a prefill that reads KV hangs.
    ``bootstraps`` are the URLs of MooncakeConnector's bootstrap servers, one for each server in their order;
    by default they are at the servers' hosts, on vLLM's port for them.
    """

    connector: str = "auto"
    lease_s: float | None = None
    bidirectional: bool = False
    bootstraps: Sequence[str] = ()


async def describe_member(
    server: VllmClient,
    kv: KvSetup,
    *,
    bootstrap: VllmClient,
    api_key: str,
    profile: Profile | None,
    engine_id: str = "",
    fixed_role: Role | None = None,
    pid: int | None = None,
) -> Member:
    """Ask a server, and with Mooncake its ``bootstrap`` server, what it is.

    Without an ``engine_id`` the member gets one that changes with the server's start. Raises EngineError when
    asking again later may succeed, SetupError when it never will.
    """
    facts = await server.facts()
    connector = kv.connector
    if connector == "auto":
        connector = "nixl" if facts.metrics.shows_nixl else "none"
    on_mooncake = connector == "mooncake"
    known_as = ""
    if on_mooncake and fixed_role is not Role.DECODE:
        known_as = await _mooncake_engine_id(bootstrap)
    return Member(
        instance=Instance(
            server.instance,
            facts.kv_capacity_tokens,
            facts.max_model_len,
            facts.block_tokens,
            flippable=fixed_role is None,
        ),
        url=server.url,
        model=facts.model,
        engine_id=engine_id or f"{server.instance}-{facts.metrics.started_s or secrets.token_hex(4)}",
        profile=profile,
        api_key=api_key,
        kind="vllm",
        pid=pid,
        capabilities=Capabilities(
            kv_transfer=connector != "none",
            continues=False,
            extends_kv=connector == "nixl" and kv.bidirectional,
            orders=False,
            tells_load=True,
        ),
        connector="" if connector == "none" else connector,
        lease_s=kv.lease_s or (MOONCAKE_LEASE_S if on_mooncake else LEASE_S),
        bootstrap_url=bootstrap.url if on_mooncake else "",
        kv_engine_id=known_as,
        fixed_role=fixed_role,
    )


def profiles_by_id(ids: Sequence[str], profiles: Sequence[Profile]) -> dict[str, Profile]:
    """Return each server's profile: ``profiles`` holds none at all, one for all, or one for each.

    Raises ConfigError for another number.
    """
    if len(profiles) not in (0, 1, len(ids)):
        raise ConfigError(f"{len(profiles)} profiles for {len(ids)} servers: give one for all or for each")
    each = list(profiles) * len(ids) if len(profiles) == 1 else profiles
    return dict(zip(ids, each, strict=False))


async def _mooncake_engine_id(bootstrap: VllmClient) -> str:
    """Return the engine id under which MooncakeConnector's peers pull from a server.

    Raises EngineError when its bootstrap server does not answer properly yet, SetupError when there are
    several engines behind it: nobody could tell which of them holds a request's KV.
    """
    where = f"its Mooncake bootstrap server {bootstrap.url}"
    try:
        reply = await bootstrap.ask("/query")
    except EngineError as error:
        raise EngineFault(f"{where} does not answer: {error.message}") from None
    if reply.status != 200:
        raise EngineFault(f"{where} answers /query with {reply.status}")
    try:
        engines = {str(entry["engine_id"]) for entry in reply.body.values()}
    except (LookupError, TypeError):
        raise EngineFault(f"{bootstrap.url} is no Mooncake bootstrap server") from None
    if len(engines) > 1:
        raise SetupError(
            f"{bootstrap.url} names {len(engines)} data-parallel engines, and MooncakeConnector does not say "
            "which of them holds a request's KV: start each as a server of its own "
            "(--data-parallel-external-lb)"
        )
    if not engines:
        raise EngineFault(f"{where} knows no engine yet")
    return engines.pop()
