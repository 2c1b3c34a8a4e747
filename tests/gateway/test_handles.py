"""Who frees the KV behind a handle that is not used."""

from __future__ import annotations

from collections.abc import Coroutine

import pytest

from tidegate.control.plane import ControlPlane
from tidegate.engines.seam import KvHandle
from tidegate.engines.vllm.engine import VllmEngine
from tidegate.fleet.member import Member
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.upstream import Handles, connect
from tidegate.journal.writer import JournalWriter
from tidegate.systems import make_system
from tidegate_testing.builders import instance


@pytest.mark.parametrize(
    ("connector", "sent", "declined"),
    [
        ("nixl", False, ["i1"]),
        ("nixl", True, ["i1"]),
        ("mooncake", False, ["i1"]),
        ("mooncake", True, []),
    ],
)
async def test_a_peer_declines_what_was_not_pulled_but_never_asks_mooncake_twice(
    connector: str, sent: bool, declined: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [
        Member(instance(name), f"http://{name}", "m", f"{name}-1", kind="vllm", connector=connector)
        for name in ("i0", "i1", "i2")
    ]
    asked: list[str] = []
    running: list[Coroutine[None, None, None]] = []

    async def decline(engine: VllmEngine, _: KvHandle) -> None:
        asked.append(engine.instance)

    monkeypatch.setattr(VllmEngine, "decline", decline)
    upstreams = {member.instance.id: connect(member, GatewaySettings()) for member in members}
    metrics = Metrics(ControlPlane(make_system("static"), list(upstreams), JournalWriter(None)), lambda: 0.0)
    handles = Handles(upstreams, metrics, running.append, lambda _: None)
    handles.release(KvHandle({}, "i0-1", 64), sent=sent)
    for work in running:
        await work
    assert asked == declined
