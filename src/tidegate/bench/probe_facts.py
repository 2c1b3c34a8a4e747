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

import aiohttp

ASK_S = 5.0
BUSY_CHECKS, BUSY_PAUSE_S = 5, 0.3
_COUNT = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.MULTILINE)
_BUSY = ("num_requests_running", "num_requests_waiting")


async def busy_servers(session: aiohttp.ClientSession, urls: Sequence[str]) -> list[str]:
    """Return which servers stay busy; what was aborted a moment ago takes a while to end."""
    return [url for url in urls if await _stays_busy(session, url)]


async def _stays_busy(session: aiohttp.ClientSession, url: str) -> bool:
    for check in range(BUSY_CHECKS):
        if check:
            await asyncio.sleep(BUSY_PAUSE_S)
        found = _COUNT.findall(await _text(session, f"{url}/metrics"))
        if sum(float(value) for name, value in found if name in _BUSY) == 0:
            return False
    return True


async def prompt_tokens_served(session: aiohttp.ClientSession, url: str) -> float | None:
    """Return how many prompt tokens the server answered since its start; None when it does not count them."""
    found = _COUNT.findall(await _text(session, f"{url}/metrics"))
    counts = [float(value) for name, value in found if name == "prompt_tokens_total"]
    return sum(counts) if counts else None


async def engine_name(session: aiohttp.ClientSession, url: str) -> str:
    """Return name and version as far as the server tells them: vLLM answers ``/version``."""
    text = await _text(session, f"{url}/version")
    found = re.search(r'"version"\s*:\s*"([^"]{1,40})"', text)
    if found:
        return f"vllm {found[1]}"
    models = await _text(session, f"{url}/v1/models")
    owner = re.search(r'"owned_by"\s*:\s*"([^"]{1,40})"', models)
    return owner[1] if owner else "engine"


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


async def _text(session: aiohttp.ClientSession, url: str) -> str:
    """Return what a GET answers; empty when it fails."""
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=ASK_S)) as response:
            return await response.text() if response.status == 200 else ""
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return ""
