"""What a server says of itself beside its answers: who it is, whether it is idle, what it has computed.

All of it can be done without: where a server does not tell, nothing is claimed.
"""

from __future__ import annotations

import asyncio
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from tidegate.core.errors import EngineError
from tidegate.engines.vllm.client import ASK_S, VllmClient
from tidegate.engines.vllm.metrics import VllmMetrics

BUSY_CHECKS, BUSY_PAUSE_S = 5, 0.3
LONGEST_NAME = 40


async def busy_servers(clients: Sequence[VllmClient]) -> list[str]:
    """Return the URLs of servers that stay busy; what was aborted a moment ago takes a while to end."""
    return [client.url for client in clients if await _stays_busy(client)]


async def _stays_busy(client: VllmClient) -> bool:
    for check in range(BUSY_CHECKS):
        if check:
            await asyncio.sleep(BUSY_PAUSE_S)
        metrics = await _metrics(client)
        if not (metrics.running or metrics.waiting):
            return False
    return True


async def prompt_tokens_served(client: VllmClient) -> int | None:
    """Return how many prompt tokens the server answered since its start; None when it does not count them."""
    return (await _metrics(client)).prompt_tokens


async def engine_name(client: VllmClient) -> str:
    """Return name and version as far as the server tells them: vLLM answers ``/version``."""
    try:
        version = await client.version()
        if version:
            return f"vllm {version[:LONGEST_NAME]}"
        owner = (await client.ask("/v1/models")).body["data"][0]["owned_by"]
    except (EngineError, LookupError, TypeError):
        return "engine"
    return str(owner)[:LONGEST_NAME] or "engine"


def hardware_name(url: str) -> str:
    """Return this machine's GPU, or its CPU where there is none, for a server on it; "" for any other."""
    host = urlsplit(url).hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    return (_gpu() or _cpu()) if local else ""


def _gpu() -> str:
    """Return the name of this machine's GPUs, where they are all alike."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    names = (
        {line.strip() for line in told.stdout.splitlines() if line.strip()} if not told.returncode else set()
    )
    return names.pop() if len(names) == 1 else ""


def _cpu() -> str:
    try:
        found = re.search(
            r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor()


async def _metrics(client: VllmClient) -> VllmMetrics:
    """Return what the server shows; nothing when that fails."""
    try:
        return await client.metrics()
    except EngineError:
        return VllmMetrics()
