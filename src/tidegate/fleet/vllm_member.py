"""Members that are vLLM servers, and the profiles that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.errors import ConfigError, EngineError, EngineFault, SetupError
from tidegate.core.instance import Instance, Role
from tidegate.costs.profile import Profile
from tidegate.engines.vllm.client import ServerFacts, VllmClient
from tidegate.fleet.member import Capabilities, Member


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """How a server moves KV: its connector, "" for none that the gateway can use; how long it pins KV for a
    pull; and whether a prefill can begin with KV that another server's decode made."""

    connector: str
    lease_s: float
    bidirectional: bool


def vllm_member(
    name: str,
    url: str,
    facts: ServerFacts,
    kv: KvTransfer,
    *,
    engine_id: str,
    api_key: str,
    profile: Profile | None,
    bootstrap_url: str,
    kv_engine_id: str,
    fixed_role: Role | None = None,
    pid: int | None = None,
) -> Member:
    """Return the member that a server is. ``bootstrap_url`` and ``kv_engine_id`` are for MooncakeConnector's
    peers; one with a ``fixed_role`` does nothing else."""
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
            kv_transfer=bool(kv.connector),
            continues=False,
            extends_kv=kv.connector == "nixl" and kv.bidirectional,
            orders=False,
            tells_load=True,
        ),
        connector=kv.connector,
        lease_s=kv.lease_s,
        bootstrap_url=bootstrap_url if kv.connector == "mooncake" else "",
        kv_engine_id=kv_engine_id,
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


async def mooncake_engine_id(client: VllmClient) -> str:
    """Return the engine id under which MooncakeConnector's peers pull from a server; ``client`` asks its
    bootstrap server.

    Raises EngineError when that does not answer properly yet, SetupError when there are several engines
    behind it: nobody could tell which of them holds a request's KV.
    """
    where = f"its Mooncake bootstrap server {client.url}"
    try:
        reply = await client.ask("/query")
    except EngineError as error:
        raise EngineFault(f"{where} does not answer: {error.message}") from None
    if reply.status != 200:
        raise EngineFault(f"{where} answers /query with {reply.status}")
    try:
        engines = {str(entry["engine_id"]) for entry in reply.body.values()}
    except (LookupError, TypeError):
        raise EngineFault(f"{client.url} is no Mooncake bootstrap server") from None
    if len(engines) > 1:
        raise SetupError(
            f"{client.url} names {len(engines)} data-parallel engines, and MooncakeConnector does not say "
            "which of them holds a request's KV: start each as a server of its own "
            "(--data-parallel-external-lb)"
        )
    if not engines:
        raise EngineFault(f"{where} knows no engine yet")
    return engines.pop()
