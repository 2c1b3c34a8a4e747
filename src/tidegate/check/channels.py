"""Whether peers can reach the side channel that a server's handles name."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from urllib.parse import urlsplit

from tidegate.check.context import CheckContext
from tidegate.check.pairs import PairResult
from tidegate.check.verdict import CheckVerdict, Finding

CONNECT_S = 2.0
GREETING = b"\xff"
"""How every ZeroMQ peer begins."""
SIDE_CHANNEL = (
    "set VLLM_NIXL_SIDE_CHANNEL_HOST to an address that its peers can reach, and open "
    "VLLM_NIXL_SIDE_CHANNEL_PORT to them"
)


async def judge_channels(check: CheckContext, seen: dict[tuple[str, str], PairResult]) -> list[Finding]:
    """Judge each owner of KV: was somebody able to fetch it? Also tries the address from here, which says
    where to look when nobody was."""
    names = sorted({owner for (owner, _), each in seen.items() if each.handle is not None})
    return list(await asyncio.gather(*(_judge(check, seen, name) for name in names)))


async def _judge(check: CheckContext, seen: dict[tuple[str, str], PairResult], name: str) -> Finding:
    pairs = {taker: each for (owner, taker), each in seen.items() if owner == name and each.handle}
    params = next(each.handle for each in pairs.values() if each.handle is not None)
    host, port = str(params.get("remote_host")), params.get("remote_port")
    address = f"{host}:{port}"
    working = [taker for taker, each in pairs.items() if each.works]
    if working:
        return Finding("side channel", (name,), CheckVerdict.GREEN, f"{address} serves {', '.join(working)}")
    heard = await _greets(host, port)
    if heard:
        observed = f"{address} answers from here, but no peer could fetch KV from it"
        change = "let peers reach it, and open UCX's ports (UCX_NET_DEVICES, UCX_TLS) between the servers"
        return Finding("side channel", (name,), CheckVerdict.RED, observed, change)
    observed = f"side channel blocked: neither peers nor we reach {address}"
    if _is_local(host) and not _is_local(urlsplit(check.servers[name].url).hostname or ""):
        observed += ", which is the server's own machine only"
    return Finding("side channel", (name,), CheckVerdict.RED, observed, SIDE_CHANNEL)


async def _greets(host: str, port: object) -> bool:
    """Tell whether a ZeroMQ peer answers at the address."""
    if not isinstance(port, int):
        return False
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                return await reader.read(1) == GREETING
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return False


def _is_local(host: str) -> bool:
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    return address.is_loopback or address.is_unspecified
