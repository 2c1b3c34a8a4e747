"""An instance that is up, and the engine behind it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.engines.dialect import DialectEngine
from tidegate.engines.seam import Engine, KvHandle
from tidegate.engines.vllm.connector import Connector, Mooncake, Nixl
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.fleet.member import Member
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.settings import GatewaySettings

Background = Callable[[Coroutine[None, None, None]], None]


@dataclass(frozen=True, slots=True)
class Upstream:
    """An instance that is up, and how to call it."""

    member: Member
    engine: Engine


def connect(member: Member, settings: GatewaySettings) -> Upstream:
    """Return the upstream of a member; no connection is opened yet."""
    where = member.instance.id, member.url, member.model
    common: dict[str, Any] = {
        "connect_s": settings.connect_s,
        "stall_s": settings.stall_s,
        "engine_id": member.engine_id,
        "api_key": member.api_key,
    }
    if member.kind == "vllm":
        return Upstream(member, VllmEngine(*where, connector=_connector(member), **common))
    return Upstream(member, DialectEngine(*where, secret=member.secret, **common))


def _connector(member: Member) -> Connector | None:
    if not member.capabilities.kv_transfer:
        return None
    if member.connector == "mooncake":
        return Mooncake(member.kv_engine_id, member.bootstrap_url, member.lease_s)
    return Nixl(member.instance.block_tokens, member.lease_s)


class Handles:
    """Which KV handles may still be used, and who frees the others."""

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        metrics: Metrics,
        background: Background,
        suspect: Callable[[str], None],
    ) -> None:
        self._upstreams = upstreams
        self._metrics = metrics
        self._background = background
        self._suspect = suspect

    def usable(self, handle: KvHandle, upstream: Upstream) -> bool:
        """Tell whether a leg on ``upstream`` may begin with the handle's KV; a refusal is counted."""
        reason = upstream.engine.refuses(handle)
        if self._owner(handle) is None:
            reason = "gone"
        elif not upstream.member.consumes_kv:
            reason = "role"
        if reason is None:
            return True
        self._metrics.handles_refused.labels(reason).inc()
        return False

    def release(self, handle: KvHandle, *, sent: bool = False) -> None:
        """Have the handle's KV freed, without waiting for it: by its owner, or by a peer that declines it.

        ``sent`` says that a leg went out with it. A vLLM server that has the leg pulls or declines the KV
        whatever becomes of it, and MooncakeConnector must not be asked for the same KV twice (see
        ``Mooncake``): the lease ends what such a server never got.
        """
        owner = self._owner(handle)
        if owner is None or (sent and owner.member.connector == "mooncake"):
            return
        if owner.member.kind != "vllm":
            self._background(owner.engine.release(handle))
            return
        others = (u for u in self._upstreams.values() if u is not owner and u.member.consumes_kv)
        peer = next(others, None)
        if peer is not None:
            self._background(peer.engine.decline(handle))

    def suspect_owner(self, handle: KvHandle) -> None:
        """Have the handle's owner looked at: its KV could not be had."""
        owner = self._owner(handle)
        if owner is not None:
            self._suspect(owner.member.instance.id)

    def owner_gone(self, engine_id: str) -> None:
        """Give up all that waits for KV of an engine that is gone."""
        for upstream in self._upstreams.values():
            upstream.engine.owner_gone(engine_id)

    def _owner(self, handle: KvHandle) -> Upstream | None:
        return next((u for u in self._upstreams.values() if u.member.engine_id == handle.owner), None)
